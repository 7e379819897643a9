"""Batch norm with activation and residual, against PyTorch's three ops."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn import nn
from fastcnn.ops import batch_norm as ops
from fastcnn.ops import batch_norm_passes as passes
from fastcnn.testing import assert_matches

LANES = ("triton", "cpu")
HALF = (torch.float16, torch.bfloat16)
ON_CPU = ("relu", "relu6", None)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def plain(x):
    return x


def reference(x, weight, bias, residual, mean, var, training, activation):
    return ops.batch_norm_reference(x, weight, bias, mean, var, training, 1e-3, activation, residual)


def tensors(lane, shape, dtype=torch.float32, parameters=None, layout=plain, residual=True, seed=0):
    """input, weight, bias, residual, running statistics; values on both sides of every bend of the activations."""
    generator = torch.Generator().manual_seed(seed)
    C = shape[1]
    x, r = torch.randn(2, *shape, generator=generator) * 2 + 3
    per_channel = torch.randn(2, C, generator=generator)
    mean, var = torch.randn(C, generator=generator) + 3, torch.rand(C, generator=generator) + 2
    x, r = (layout(t.to(lane.device, dtype)).clone().requires_grad_() for t in (x, r - 3))
    weight, bias, mean, var = (t.to(lane.device, parameters or dtype).clone() for t in (*per_channel, mean, var))
    return x, weight.requires_grad_(), bias.requires_grad_(), r if residual else None, mean, var


def check(lane, shape, activation="relu", residual=True, training=True, dtype=torch.float32, parameters=None,
          layout=plain):  # fmt: skip
    if lane.name == "cpu" and (dtype in HALF or activation not in ON_CPU):
        pytest.skip("no CPU kernel")
    *inputs, mean, var = tensors(lane, shape, dtype, parameters, layout, residual)

    def ours(x, weight, bias, residual, mean, var):
        return fF.batch_norm(
            x, mean.clone(), var.clone(), weight, bias, training, eps=1e-3, activation=activation, residual=residual
        )

    assert_matches(ours, lambda *a: reference(*a, training, activation), *inputs, mean, var)


CASES = [
    pytest.param(dict(shape=(4, 3, 5, 7)), id="odd sizes"),
    pytest.param(dict(shape=(4, 3, 5, 7), layout=channels_last), id="channels_last, odd sizes"),
    pytest.param(dict(shape=(3, 17, 3, 3), layout=channels_last), id="17 channels: a byte for one"),
    pytest.param(dict(shape=(3, 16, 7, 7)), id="a byte for the last pixel"),
    pytest.param(dict(shape=(3, 16, 7, 7), layout=channels_last), id="whole bytes"),
    pytest.param(dict(shape=(2, 1, 5, 7)), id="one channel"),
    pytest.param(dict(shape=(5, 11)), id="2-D"),
    pytest.param(dict(shape=(3, 5, 1, 1)), id="one pixel"),
    pytest.param(dict(shape=(2, 5, 9)), id="3-D"),
    pytest.param(dict(shape=(2, 3, 2, 3, 5), layout=lambda x: x.to(memory_format=torch.channels_last_3d)),
                 id="5-D channels_last"),
    pytest.param(dict(shape=(1, 2, 45, 50)), id="planes longer than a segment"),
    pytest.param(dict(shape=(2, 80, 9, 9)), id="channels in several blocks"),
    pytest.param(dict(shape=(2, 80, 9, 9), layout=channels_last), id="several segments"),
    pytest.param(dict(shape=(3, 10, 4, 5), dtype=torch.float64), id="fp64"),
    pytest.param(dict(shape=(3, 10, 4, 5), dtype=torch.float64, layout=channels_last), id="fp64 channels_last"),
    pytest.param(dict(shape=(3, 8, 4, 5), dtype=torch.float16, layout=channels_last), id="fp16"),
    pytest.param(dict(shape=(3, 8, 4, 5), dtype=torch.bfloat16, parameters=torch.float32), id="bf16, fp32 parameters"),
    pytest.param(dict(shape=(64, 256, 56, 56), dtype=torch.bfloat16, parameters=torch.float32, layout=channels_last),
                 id="resnet50 layer1", marks=pytest.mark.gpu),
    pytest.param(dict(shape=(64, 2048, 7, 7), dtype=torch.bfloat16, parameters=torch.float32),
                 id="resnet50 layer4, contiguous", marks=pytest.mark.gpu),
]  # fmt: skip


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("case", CASES)
def test_add_relu_matches_torch(lane, case, training):
    if case["shape"][0] == 64 and lane.name != "gpu":
        pytest.skip("a GPU's size")
    check(lane, **case, training=training)


@pytest.mark.parametrize("residual", (True, False), ids=("add", "alone"))
@pytest.mark.parametrize("activation", (None, *ops.ACTIVATIONS))
def test_every_activation_matches_torch(lane, activation, residual):
    check(lane, (3, 5, 4, 6), activation, residual)
    check(lane, (3, 9, 4, 5), activation, residual, layout=channels_last, training=False, dtype=torch.float64)


@pytest.mark.parametrize("layout", (plain, channels_last), ids=("contiguous", "channels_last"))
def test_strips(lane, layout, monkeypatch):
    # small tiles: bytes of the mask at every border of tiles and strips
    monkeypatch.setattr(passes, "TILE", 64)
    monkeypatch.setattr(passes, "PROGRAMS", 6)
    check(lane, (3, 11, 5, 10), layout=layout)


@pytest.mark.parametrize("activation", ("relu", None))
@pytest.mark.parametrize("make", [
    pytest.param(channels_last, id="channels_last"),
    pytest.param(lambda r: r[:, :, ::2, 1:], id="slice"),
    pytest.param(lambda r: r[:1].expand(4, -1, -1, -1), id="expanded"),
    pytest.param(lambda r: r.transpose(2, 3), id="transposed"),
])  # fmt: skip
@pytest.mark.parametrize("layout", (plain, channels_last), ids=("contiguous x", "channels_last x"))
def test_residual_of_another_layout(lane, make, layout, activation):
    r = make(torch.randn(4, 3, 6, 6, device=lane.device)).detach()
    x = layout(torch.randn(r.shape, device=lane.device))
    results = []
    for function in (
        fF.batch_norm,
        lambda *a, residual, activation: ops.finished(F.batch_norm(*a), activation, residual),
    ):
        leaf_x, leaf_r = x.detach().requires_grad_(), r.detach().requires_grad_()
        y = function(leaf_x, None, None, None, None, True, residual=leaf_r, activation=activation)
        results.append((y, *torch.autograd.grad(y, (leaf_x, leaf_r), torch.ones_like(y) * 0.3 + y.detach())))
        assert results[-1][1].stride() == x.stride()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    if r.stride() == r.contiguous().stride() or make is channels_last:
        assert results[0][2].stride() == r.stride()


@pytest.mark.parametrize("needed", ["input", "weight", "residual", "bias residual", ""])
@pytest.mark.parametrize("training", (True, False))
def test_only_the_gradients_asked_for(lane, needed, training):
    leaves = dict(zip(("input", "weight", "bias", "residual", "mean", "var"), tensors(lane, (3, 9, 4, 5)), strict=True))
    for name in ("input", "weight", "bias", "residual"):
        leaves[name].requires_grad_(name in needed.split())
    assert_matches(
        lambda x, w, b, r, m, v: fF.batch_norm(
            x, m.clone(), v.clone(), w, b, training, eps=1e-3, activation="relu", residual=r
        ),
        lambda *a: reference(*a, training, "relu"),
        *leaves.values(),
    )


@pytest.mark.parametrize("layout", (plain, channels_last), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("residual", (True, False), ids=("add", "alone"))
def test_nan_and_inf(lane, layout, residual):
    x, weight, bias, r, _, _ = tensors(lane, (3, 9, 4, 5), layout=layout, residual=residual)
    with torch.no_grad():
        x[1, 2, 3, 1] = math.nan
        x[1, 4, 0, 0] = math.inf
        if residual:
            r[0, 5, 0, 0], r[0, 6, 0, 0], r[0, 7, 0, 0] = math.nan, math.inf, -math.inf
    leaves = [t for t in (x, weight, bias, r) if t is not None]
    results = []
    for function in (fF.batch_norm, None):
        if function is None:
            y = ops.finished(F.batch_norm(x, None, None, weight, bias, True), "relu", r)
        else:
            y = function(x, None, None, weight, bias, True, activation="relu", residual=r)
        results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("layout", (plain, channels_last), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("mean", (1e4, 1e6))
def test_mean_far_from_zero(lane, mean, layout):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 8, 8, 8, dtype=torch.float64, generator=generator) + mean
    x = layout(x.to(lane.device, torch.float32)).requires_grad_()
    r = layout(torch.randn(x.shape, generator=generator).to(lane.device)).requires_grad_()
    assert_matches(
        lambda x: fF.batch_norm(x, None, None, None, None, True, activation=None),
        lambda x: F.batch_norm(x, None, None, None, None, True), x,
    )  # fmt: skip
    # where z is within rounding of the bend, truth and result may lie on different sides of it: no gradients
    with torch.no_grad():
        y = fF.batch_norm(x, None, None, None, None, True, activation="relu", residual=r)
        z = F.batch_norm(x.double(), None, None, None, None, True) + r.double()
        error = (F.batch_norm(x, None, None, None, None, True) + r - z).abs().max()
    assert (y - z.relu()).abs().max() <= 2 * error + 2e-6


def test_second_derivative(lane):
    for activation, residual in (("relu", True), ("silu", True), ("tanh", False)):
        if lane.name == "cpu" and activation not in ON_CPU:
            continue
        x, weight, bias, r, mean, var = tensors(lane, (3, 2, 3), torch.float64, residual=residual)
        leaves = (x, weight, bias, r) if residual else (x, weight, bias)
        for training in (True, False):
            rest = dict(training=training, activation=activation)

            def function(x, w, b, r=None, mean=mean, var=var, rest=rest):
                return fF.batch_norm(x, mean.clone(), var.clone(), w, b, residual=r, **rest)

            assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("layout", (plain, channels_last), ids=("contiguous", "channels_last"))
def test_what_is_saved(lane, layout):
    x, weight, bias, r, _, _ = tensors(lane, (2, 16, 8, 8), layout=layout)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fF.batch_norm(x, None, None, weight, bias, True, activation="relu", residual=r)
    assert r.untyped_storage().data_ptr() not in kept
    assert sum(kept.values()) == 4 * x.numel() + x.numel() // 8 + 4 * 4 * 16


def test_no_mask_without_a_graph(lane):
    x, weight, bias, r, mean, var = tensors(lane, (2, 16, 8, 8))
    with torch.no_grad():
        y = fF.batch_norm(x, mean, var, weight, bias, False, activation="relu", residual=r)
    assert not y.requires_grad
    expected = (F.batch_norm(x, mean, var, weight, bias) + r).relu()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_empty(lane):
    x = torch.randn(0, 3, 4, 4, device=lane.device, requires_grad=True)
    r = torch.randn(0, 3, 4, 4, device=lane.device, requires_grad=True)
    y = fF.batch_norm(x, None, None, None, None, True, activation="relu", residual=r)
    assert y.shape == x.shape
    assert [g.shape for g in torch.autograd.grad(y.sum(), (x, r))] == [x.shape, r.shape]


def test_compiles_without_graph_breaks(lane):
    x, weight, bias, r, mean, var = tensors(lane, (2, 3, 4, 4))
    function = lambda x, r: fF.batch_norm(x * 2, None, None, weight, bias, True, activation="relu", residual=r)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [(y, *torch.autograd.grad(y.square().sum(), (x, r, weight))) for y in (compiled(x, r), function(x, r))]
    torch.testing.assert_close(*results)


def test_same_bits_every_time(lane):
    x, weight, bias, r, _, _ = tensors(lane, (5, 7, 9, 11), layout=channels_last)
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = fF.batch_norm(x, None, None, weight, bias, True, activation="relu", residual=r)
        runs.append((y, *torch.autograd.grad(y, (x, weight, bias, r), torch.ones_like(y) * 0.3)))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_functorch_and_fallback():
    x, r = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for activation in (None, *ops.ACTIVATIONS):
        with fastcnn.backend("torch"):
            y = fF.batch_norm(x, None, None, training=True, activation=activation, residual=r)
        expected = ops.finished(F.batch_norm(x, None, None, training=True), activation, r)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
    ours = lambda x: fF.batch_norm(x, None, None, training=True, activation="relu", residual=r).square().sum()
    theirs = lambda x: (F.batch_norm(x, None, None, training=True) + r).relu().square().sum()
    torch.testing.assert_close(torch.func.grad(ours)(x), torch.func.grad(theirs)(x))


def test_module_takes_activation_and_residual_and_averages_cumulatively(lane):
    ours, theirs = (m.BatchNorm2d(3, momentum=None, device=lane.device) for m in (nn, torch.nn))
    for seed in range(3):
        x, _, _, r, _, _ = tensors(lane, (4, 3, 5, 6), seed=seed)
        torch.testing.assert_close(
            ours(x, activation="relu", residual=r), (theirs(x) + r).relu(), rtol=1e-5, atol=1e-5
        )  # fmt: skip
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    x, _, _, r, _, _ = tensors(lane, (4, 3, 5, 6))
    torch.testing.assert_close(ours.eval()(x, activation="relu"), theirs.eval()(x).relu(), rtol=1e-5, atol=1e-5)
