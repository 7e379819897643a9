import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops import layer_norm as ops
from fastcnn.testing import assert_matches

LANES = ("triton",)


def tensors(lane, shape, dimensions=1, dtype=torch.float32, parameters=None, layout=lambda x: x):
    """Leaves input, weight and bias, all far from 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    x = layout((torch.randn(shape, generator=generator) * 2 + 3).to(lane.device, dtype)).requires_grad_()
    sizes = x.shape[x.dim() - dimensions :]
    values = [torch.randn(sizes, generator=generator).to(lane.device, parameters or dtype) for _ in range(2)]
    return x, *(v.requires_grad_() for v in values)


def check(lane, shape, dimensions=1, **how):
    inputs = tensors(lane, shape, dimensions, **how)
    sizes = inputs[1].shape
    assert_matches(
        lambda x, w, b: fF.layer_norm(x, sizes, w, b, 1e-3), lambda x, w, b: F.layer_norm(x, sizes, w, b, 1e-3), *inputs
    )


def nhwc(x):
    return x.to(memory_format=torch.channels_last).permute(0, 2, 3, 1)


CASES = [
    pytest.param(dict(shape=(5, 7)), id="odd sizes"),
    pytest.param(dict(shape=(7,)), id="one row"),
    pytest.param(dict(shape=(3, 1)), id="rows of one"),
    pytest.param(dict(shape=(2, 96, 5, 3), layout=nhwc), id="convnext"),
    pytest.param(dict(shape=(33, 70)), id="more rows than a tile"),
    pytest.param(dict(shape=(2, 3, 5, 7), dimensions=3), id="whole images"),
    pytest.param(dict(shape=(5, 3, 7), dimensions=2, dtype=torch.float64), id="fp64"),
    pytest.param(dict(shape=(9, 40), dtype=torch.bfloat16), id="bf16"),
    pytest.param(dict(shape=(9, 40), dtype=torch.float16, parameters=torch.float32), id="fp16, fp32 parameters"),
]
LONG = [
    pytest.param(dict(shape=(3, 8200)), id="long rows"),
    pytest.param(dict(shape=(2, 3, 52, 60), dimensions=3, dtype=torch.float64), id="long rows, fp64"),
]


@pytest.mark.parametrize("case", CASES + LONG)
def test_layer_norm_matches_torch(lane, case):
    check(lane, **case)


def with_long_rows(monkeypatch, programs=1024):
    """Every row longer than four elements is long, in tiles of 64."""
    monkeypatch.setattr(ops, "LONGEST", 4)
    for module in (ops, ops.groups):
        monkeypatch.setattr(module, "TILE", 64)
        monkeypatch.setattr(module, "PROGRAMS", programs)
    monkeypatch.setattr(ops.groups, "FINALIZE", 4)


@pytest.mark.parametrize("case", CASES)
def test_layer_norm_long_rows_of_every_shape(lane, case, monkeypatch):
    with_long_rows(monkeypatch)
    check(lane, **case)


@pytest.mark.parametrize("programs", (1, 3))
def test_layer_norm_programs_with_many_rows(lane, programs, monkeypatch):
    # tiles of 32 rows, over which the programs stride
    monkeypatch.setattr(ops, "TILE", 256)
    monkeypatch.setattr(ops, "PROGRAMS", programs)
    check(lane, (150, 8))


@pytest.mark.parametrize("programs", (1, 4))
def test_layer_norm_long_rows_in_strips(lane, programs, monkeypatch):
    with_long_rows(monkeypatch, programs)
    check(lane, (5, 300))


@pytest.mark.parametrize("long", (False, True))
@pytest.mark.parametrize("mean", (1e2, 1e4))
def test_layer_norm_mean_far_from_zero(lane, mean, long, monkeypatch):
    if long:
        with_long_rows(monkeypatch)
    x = (torch.randn(6, 300, dtype=torch.float64) + mean).to(lane.device, torch.float32)
    expected = F.layer_norm(x.double(), (300,))
    torch.testing.assert_close(fF.layer_norm(x, (300,)).double(), expected, rtol=0, atol=mean * 1.2e-7 + 2e-6)


@pytest.mark.parametrize("long", (False, True))
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_layer_norm_bad_value_stays_in_its_row(lane, bad, long, monkeypatch):
    if long:
        with_long_rows(monkeypatch)
    x, weight, bias = tensors(lane, (6, 20))
    dirty = x.detach().clone()
    dirty[2, 5] = bad
    dirty.requires_grad_()
    results = []
    for tensor in (x, dirty):
        y = fF.layer_norm(tensor, (20,), weight, bias)
        results.append((y, torch.autograd.grad(y, tensor, torch.ones_like(y))[0]))
    clean = torch.tensor([0, 1, 3, 4, 5])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a[clean], b[clean], rtol=0, atol=0)
        assert b[2].isnan().all()


def test_layer_norm_constant_rows(lane):
    x = torch.full((4, 49), 1234.567, device=lane.device)
    torch.testing.assert_close(fF.layer_norm(x, (49,), eps=1e-3), torch.zeros_like(x), rtol=0, atol=1e-2)


LAYOUTS = [
    pytest.param(lambda x: x.to(memory_format=torch.channels_last), id="channels_last"),
    pytest.param(lambda x: x[:, :, ::2, 1:], id="slice"),
    pytest.param(lambda x: x[:1].expand(4, -1, -1, -1), id="expanded"),
    pytest.param(lambda x: x.permute(0, 2, 3, 1), id="permuted"),
]


@pytest.mark.parametrize("make", LAYOUTS)
def test_layer_norm_layouts(lane, make):
    x = make(torch.randn(4, 3, 5, 6, device=lane.device)).detach().requires_grad_()
    sizes = x.shape[2:]
    y, expected = fF.layer_norm(x, sizes), F.layer_norm(x, sizes)
    assert y.is_contiguous() and y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(y.shape, device=lane.device)
    for layout in (grad, grad.transpose(0, 1).contiguous().transpose(0, 1), grad[:1, :1, :1, :1].expand(y.shape)):
        (ours,) = torch.autograd.grad(y, x, layout, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected, x, layout, retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_layer_norm_takes_convnexts_view_without_a_copy(lane):
    x = torch.randn(2, 8, 5, 5, device=lane.device).to(memory_format=torch.channels_last)
    y = fF.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)
    assert x.permute(0, 2, 3, 1).contiguous().data_ptr() == x.data_ptr() and y.stride() == x.stride()


@pytest.mark.parametrize("shape, dimensions", [((0, 4), 1), ((2, 0), 1), ((2, 0, 3), 1), ((2, 3, 0), 2)])
def test_layer_norm_empty(lane, shape, dimensions):
    x = torch.randn(shape, device=lane.device, requires_grad=True)
    sizes = shape[len(shape) - dimensions :]
    weight, bias = (torch.ones(sizes, device=lane.device, requires_grad=True) for _ in range(2))
    y = fF.layer_norm(x, sizes, weight, bias)
    assert y.shape == x.shape
    for grad, leaf in zip(torch.autograd.grad(y.sum(), (x, weight, bias)), (x, weight, bias), strict=True):
        assert grad.shape == leaf.shape and (grad == 0).all()


@pytest.mark.parametrize("long", (False, True))
@pytest.mark.parametrize("needed", ["input", "weight", "bias", "input bias", ""])
def test_layer_norm_only_the_gradients_asked_for(lane, needed, long, monkeypatch):
    if long:
        with_long_rows(monkeypatch)
    leaves = dict(zip(("input", "weight", "bias"), tensors(lane, (4, 25)), strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in needed.split())
    assert_matches(
        lambda x, w, b: fF.layer_norm(x, (25,), w, b), lambda x, w, b: F.layer_norm(x, (25,), w, b), *leaves.values()
    )


@pytest.mark.parametrize("long", (False, True))
def test_layer_norm_without_parameters(lane, long, monkeypatch):
    if long:
        with_long_rows(monkeypatch)
    x, w, b = tensors(lane, (4, 25))
    assert_matches(lambda x: fF.layer_norm(x, (25,)), lambda x: F.layer_norm(x, (25,)), x)
    assert_matches(lambda x, w: fF.layer_norm(x, (25,), w), lambda x, w: F.layer_norm(x, (25,), w), x, w)
    assert_matches(lambda x, b: fF.layer_norm(x, (25,), None, b), lambda x, b: F.layer_norm(x, (25,), None, b), x, b)


def test_layer_norm_second_derivative(lane):
    inputs = tensors(lane, (3, 5), dtype=torch.float64)
    function = lambda x, w, b: fF.layer_norm(x, (5,), w, b)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_layer_norm_float32_from_bfloat16(lane):
    # what autocast on a GPU asks for: no copy of the input in float32
    x, weight, bias = (t.detach() for t in tensors(lane, (4, 25), 1, torch.bfloat16, torch.float32))
    y, mean, rstd = ops._forward(x, [25], weight, bias, 1e-5, torch.float32, "triton")
    torch.testing.assert_close(y, F.layer_norm(x.float(), (25,), weight, bias))
    grad_input, *_ = ops._backward(y, x, [25], weight, mean, rstd, True, True, "triton")
    assert y.dtype == torch.float32 and grad_input.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", (lambda x: x, lambda x: x.transpose(0, 1)))
def test_layer_norm_registration(lane, layout):
    x, weight, bias = (t.detach() for t in tensors(lane, (3, 4, 5), 2, layout=layout))
    sizes = list(weight.shape)
    torch.library.opcheck(ops._forward, (x, sizes, weight, bias, 1e-5, x.dtype, "triton"))
    torch.library.opcheck(ops._forward, (x, sizes, None, None, 1e-5, torch.float64, "triton"))
    statistics = torch.randn(x.shape[0], device=lane.device), torch.rand(x.shape[0], device=lane.device)
    for need_input, need_params in ((True, True), (True, False), (False, True)):
        arguments = (torch.randn_like(x), x, sizes, weight, *statistics, need_input, need_params, "triton")
        torch.library.opcheck(ops._backward, arguments)


REFUSED = [
    (TypeError, "input must be a torch.Tensor, got list", dict(input=[1.0])),
    (TypeError, "input must have a floating-point dtype, got torch.int64", dict(input=torch.zeros(2, 4).long())),
    (TypeError, "normalized_shape must be a sequence of ints, got 4", dict(normalized_shape=4)),
    (ValueError, r"normalized_shape must be the trailing sizes of input \(2, 4\), got \(3,\)",
     dict(normalized_shape=(3,))),
    (ValueError, r"normalized_shape must be the trailing sizes of input \(2, 4\), got \(\)", dict(normalized_shape=())),
    (ValueError, r"normalized_shape must be the trailing sizes", dict(normalized_shape=(1, 2, 4))),
    (ValueError, r"weight must have the shape normalized_shape \(4,\), got \(1, 4\)", dict(weight=torch.ones(1, 4))),
    (TypeError, r"bias must have the dtype of input \(torch.float32\) or float32", dict(bias=torch.ones(4).half())),
    (TypeError, "eps must be a number, got None", dict(eps=None)),
]  # fmt: skip


@pytest.mark.parametrize("backend", ("cpu", "auto"))
@pytest.mark.parametrize("error, message, changed", REFUSED, ids=[message[:40] for _, message, _ in REFUSED])
def test_layer_norm_refuses_bad_arguments(error, message, changed, backend):
    with fastcnn.backend(backend), pytest.raises(error, match=message):
        fF.layer_norm(**(dict(input=torch.randn(2, 4), normalized_shape=(4,)) | changed))
