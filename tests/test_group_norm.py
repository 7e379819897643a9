import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops import group_norm as ops
from fastcnn.testing import assert_matches

LANES = ("triton",)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def tensors(lane, shape, dtype=torch.float32, parameters=None, layout=lambda x: x, seed=0):
    """Leaves input, weight and bias, all far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    x = layout((torch.randn(shape, generator=generator) * 2 + 3).to(lane.device, dtype)).requires_grad_()
    values = torch.randn(2, shape[1], generator=generator).to(lane.device, parameters or dtype)
    return x, values[0].clone().requires_grad_(), values[1].clone().requires_grad_()


def check(lane, shape, groups, **how):
    assert_matches(
        lambda x, w, b: fF.group_norm(x, groups, w, b, 1e-3),
        lambda x, w, b: F.group_norm(x, groups, w, b, 1e-3),
        *tensors(lane, shape, **how),
    )


CASES = [
    pytest.param(dict(shape=(3, 6, 5, 7), groups=3), id="odd sizes"),
    pytest.param(dict(shape=(3, 6, 5, 7), groups=3, layout=channels_last), id="channels_last, odd sizes"),
    pytest.param(dict(shape=(2, 35, 4, 3), groups=5, layout=channels_last), id="groups of seven, channels_last"),
    pytest.param(dict(shape=(2, 6, 5, 3), groups=1, layout=channels_last), id="one group"),
    pytest.param(dict(shape=(2, 6, 5, 3), groups=6), id="one channel to a group"),
    pytest.param(dict(shape=(2, 1, 7, 7), groups=1), id="one channel"),
    pytest.param(dict(shape=(2, 6, 4, 4), groups=2, dtype=torch.float64), id="fp64"),
    pytest.param(dict(shape=(2, 6, 4, 4), groups=2, dtype=torch.float64, layout=channels_last), id="fp64 nhwc"),
    pytest.param(
        dict(shape=(2, 64, 5, 5), groups=32, dtype=torch.bfloat16, parameters=torch.float32, layout=channels_last),
        id="bf16, fp32 parameters, more groups than a program",
    ),
    pytest.param(dict(shape=(2, 8, 5, 5), groups=2, dtype=torch.bfloat16), id="bf16"),
    pytest.param(dict(shape=(33, 70), groups=7), id="2-D"),
    pytest.param(dict(shape=(2, 6, 11), groups=2), id="3-D"),
    pytest.param(dict(shape=(2, 4, 2, 3, 5), groups=2), id="5-D"),
    pytest.param(
        dict(shape=(2, 4, 2, 3, 5), groups=2, layout=lambda x: x.to(memory_format=torch.channels_last_3d)),
        id="5-D channels_last",
    ),
    pytest.param(dict(shape=(1, 70, 45, 52), groups=35), id="strips, more channels than a block"),
    pytest.param(dict(shape=(1, 70, 45, 52), groups=5, layout=channels_last), id="strips, channels_last"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_group_norm_matches_torch(lane, case):
    check(lane, **case)


def in_strips(monkeypatch, programs=1024, tile=64):
    """Small tiles, no fused kernel."""
    monkeypatch.setattr(ops, "FUSED", 0)
    monkeypatch.setattr(ops, "TILE", tile)
    monkeypatch.setattr(ops, "PROGRAMS", programs)
    monkeypatch.setattr(ops, "FINALIZE", 16)
    monkeypatch.setattr(ops, "PARAMETERS", dict(BLOCK_R=4, BLOCK_C=4))


@pytest.mark.parametrize("programs", (1, 24, 1024))
@pytest.mark.parametrize("layout", (lambda x: x, channels_last), ids=("contiguous", "channels_last"))
def test_group_norm_strips(lane, layout, programs, monkeypatch):
    # all tiles in one strip, a ragged last strip of several, one strip for each tile
    in_strips(monkeypatch, programs)
    check(lane, (3, 6, 9, 10), 2, layout=layout)


@pytest.mark.parametrize("case", CASES[:14])
def test_group_norm_strips_of_every_shape(lane, case, monkeypatch):
    in_strips(monkeypatch)
    check(lane, **case)


@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("layout", (lambda x: x, channels_last), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("mean", (1e2, 1e4))
def test_group_norm_mean_far_from_zero(lane, mean, layout, fused, monkeypatch):
    if not fused:
        in_strips(monkeypatch, tile=256)
    x = layout(torch.randn(2, 6, 16, 16, dtype=torch.float64) + mean).to(lane.device, torch.float32)
    y = fF.group_norm(x, 2)
    expected = F.group_norm(x.double(), 2)
    # half a last place of the mean is what fp32 leaves; of E[x^2] - E[x]^2 nothing would be left
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=mean * 1.2e-7 + 2e-6)


@pytest.mark.parametrize("fused", (True, False))
def test_group_norm_channels_of_unlike_mean(lane, fused, monkeypatch):
    if not fused:
        in_strips(monkeypatch)
    x = torch.randn(2, 8, 9, 7) + 1e3 * torch.arange(8.0)[:, None, None]
    for layout in (lambda x: x, channels_last):
        assert_matches(
            lambda x: fF.group_norm(x, 2), lambda x: F.group_norm(x, 2), layout(x).to(lane.device).requires_grad_()
        )


@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("layout", (lambda x: x, channels_last), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_group_norm_bad_value_stays_in_its_group(lane, bad, layout, fused, monkeypatch):
    if not fused:
        in_strips(monkeypatch)
    x, weight, bias = tensors(lane, (3, 6, 4, 6), layout=layout)
    dirty = x.detach().clone()
    dirty[1, 2, 3, 1] = bad  # group 1 of image 1
    dirty.requires_grad_()
    results = []
    for tensor in (x, dirty):
        y = fF.group_norm(tensor, 3, weight, bias)
        results.append((y, *torch.autograd.grad(y, (tensor, weight, bias), torch.ones_like(y))))
    clean = torch.ones(3, 6, dtype=torch.bool)
    clean[1, 2:4] = False
    for a, b in zip(*results, strict=True):
        if a.dim() == 4:
            torch.testing.assert_close(a[clean], b[clean], rtol=0, atol=0)
            assert b[1, 2:4].isnan().all()
    weights = results[1][2]
    assert weights[2:4].isnan().all() and not weights[[0, 1, 4, 5]].isnan().any()


@pytest.mark.parametrize("fused", (True, False))
def test_group_norm_constant_group(lane, fused, monkeypatch):
    if not fused:
        in_strips(monkeypatch)
    x = torch.full((2, 4, 7, 7), 1234.567, device=lane.device)
    torch.testing.assert_close(fF.group_norm(x, 2, eps=1e-3), torch.zeros_like(x), rtol=0, atol=1e-2)


LAYOUTS = [
    pytest.param(channels_last, id="channels_last"),
    pytest.param(lambda x: x[:, :, ::2, 1:], id="slice"),
    pytest.param(lambda x: x[:, 1:3], id="slice of channels"),
    pytest.param(lambda x: x[:1].expand(4, -1, -1, -1), id="expanded"),
    pytest.param(lambda x: x.transpose(2, 3), id="transposed"),
]


@pytest.mark.parametrize("make", LAYOUTS)
def test_group_norm_layouts(lane, make):
    x = make(torch.randn(4, 4, 5, 6, device=lane.device)).detach().requires_grad_()
    y = fF.group_norm(x, 2)
    expected = F.group_norm(x, 2)
    wanted = torch.empty_like(x, memory_format=ops.memory_format(x))
    assert y.stride() == wanted.stride()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(y.shape, device=lane.device)
    for layout in (grad, grad.transpose(0, 1).contiguous().transpose(0, 1), grad[:1, :1, :1, :1].expand(y.shape)):
        (ours,) = torch.autograd.grad(y, x, layout, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected, x, layout, retain_graph=True)
        assert ours.stride() == wanted.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 4, 4), (2, 4, 0, 4), (2, 0, 4, 4), (0, 4)])
def test_group_norm_empty(lane, shape):
    x = torch.randn(shape, device=lane.device, requires_grad=True)
    weight, bias = (torch.ones(shape[1], device=lane.device, requires_grad=True) for _ in range(2))
    y = fF.group_norm(x, 2, weight, bias)
    assert y.shape == x.shape
    for grad, leaf in zip(torch.autograd.grad(y.sum(), (x, weight, bias)), (x, weight, bias), strict=True):
        assert grad.shape == leaf.shape and (grad == 0).all()


@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("needed", ["input", "weight", "bias", "input bias", ""])
def test_group_norm_only_the_gradients_asked_for(lane, needed, fused, monkeypatch):
    if not fused:
        in_strips(monkeypatch)
    leaves = dict(zip(("input", "weight", "bias"), tensors(lane, (2, 4, 5, 5)), strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in needed.split())
    assert_matches(
        lambda x, w, b: fF.group_norm(x, 2, w, b), lambda x, w, b: F.group_norm(x, 2, w, b), *leaves.values()
    )


@pytest.mark.parametrize("fused", (True, False))
def test_group_norm_without_parameters(lane, fused, monkeypatch):
    if not fused:
        in_strips(monkeypatch)
    x, w, b = tensors(lane, (2, 4, 5, 5), layout=channels_last)
    assert_matches(lambda x: fF.group_norm(x, 2), lambda x: F.group_norm(x, 2), x)
    assert_matches(lambda x, w: fF.group_norm(x, 2, w), lambda x, w: F.group_norm(x, 2, w), x, w)
    # PyTorch on CPU fails in the backward of a bias alone
    ones = torch.ones_like(w).detach()
    assert_matches(lambda x, b: fF.group_norm(x, 2, None, b), lambda x, b: F.group_norm(x, 2, ones.to(x), b), x, b)


def test_group_norm_second_derivative(lane):
    inputs = tensors(lane, (2, 4, 3), torch.float64)
    function = lambda x, w, b: fF.group_norm(x, 2, w, b)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_group_norm_same_bits_every_time(lane, monkeypatch):
    in_strips(monkeypatch)
    x, weight, bias = tensors(lane, (2, 6, 9, 11), layout=channels_last)
    runs = []
    for _ in range(2):
        y = fF.group_norm(x, 3, weight, bias)
        runs.append((y, *torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y) * 0.3)))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_group_norm_float32_from_bfloat16(lane):
    # what autocast on a GPU asks for: no copy of the input in float32
    x, weight, bias = (t.detach() for t in tensors(lane, (2, 4, 5, 5), torch.bfloat16, torch.float32))
    y, mean, rstd = ops._forward(x, 2, weight, bias, 1e-5, torch.float32, "triton")
    torch.testing.assert_close(y, F.group_norm(x.float(), 2, weight, bias))
    grad_input, *_ = ops._backward(y, x, 2, weight, mean, rstd, True, True, "triton")
    assert y.dtype == torch.float32 and grad_input.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", (lambda x: x, channels_last, lambda x: x.transpose(2, 3)))
def test_group_norm_registration(lane, layout):
    x, weight, bias = (t.detach() for t in tensors(lane, (2, 4, 4, 5), layout=layout))
    torch.library.opcheck(ops._forward, (x, 2, weight, bias, 1e-5, x.dtype, "triton"))
    torch.library.opcheck(ops._forward, (x, 2, None, None, 1e-5, torch.float64, "triton"))
    statistics = torch.randn(2, 2, device=lane.device), torch.rand(2, 2, device=lane.device)
    for need_input, need_params in ((True, True), (True, False), (False, True)):
        arguments = (torch.randn_like(x), x, 2, weight, *statistics, need_input, need_params, "triton")
        torch.library.opcheck(ops._backward, arguments)


def test_group_norm_strided_parameters_run_on_pytorch(lane):
    x, weight = torch.randn(2, 4, 4, 4, device=lane.device), torch.zeros(4, 2, device=lane.device)[:, 0]
    with pytest.raises(NotImplementedError, match="contiguous weight and bias"):
        fF.group_norm(x, 2, weight)


REFUSED = [
    (TypeError, "input must be a torch.Tensor, got list", dict(input=[1.0])),
    (ValueError, r"input must have at least 2 dimensions.*got shape \(4,\)", dict(input=torch.zeros(4))),
    (TypeError, "input must have a floating-point dtype, got torch.int64", dict(input=torch.zeros(2, 4, 3).long())),
    (TypeError, "num_groups must be an int, got 2.0", dict(num_groups=2.0)),
    (ValueError, "num_groups must be positive and divide the 4 channels of input, got 3", dict(num_groups=3)),
    (ValueError, "num_groups must be positive and divide the 4 channels of input, got 0", dict(num_groups=0)),
    (ValueError, r"weight must have 4 elements, one per channel, got shape \(3,\)", dict(weight=torch.ones(3))),
    (TypeError, r"bias must have the dtype of input \(torch.float32\) or float32", dict(bias=torch.ones(4).half())),
    (TypeError, "bias must have the dtype of weight",
     dict(input=torch.zeros(2, 4, 3).half(), weight=torch.ones(4), bias=torch.ones(4).half())),
    (ValueError, r"Expected more than 1 value per channel when training, got input size \(1, 4, 1\)",
     dict(input=torch.zeros(1, 4, 1), num_groups=4)),
    (TypeError, "eps must be a number, got None", dict(eps=None)),
]  # fmt: skip


@pytest.mark.parametrize("backend", ("cpu", "auto"))
@pytest.mark.parametrize("error, message, changed", REFUSED, ids=[message[:40] for _, message, _ in REFUSED])
def test_group_norm_refuses_bad_arguments(error, message, changed, backend):
    arguments = dict(input=torch.randn(2, 4, 4, 4), num_groups=2) | changed
    with fastcnn.backend(backend), pytest.raises(error, match=message):
        fF.group_norm(**arguments)
