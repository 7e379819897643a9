import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.testing import assert_matches

fp16, bf16, fp32, fp64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def randn(*shape, device, dtype=fp32):
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


# x, w, dtype
CASES = {
    "LeNet's classifier": ((5, 84), (10, 84), fp32),
    "one feature each way": ((3, 1), (1, 1), fp32),
    "1-D input": ((19,), (7, 19), fp32),
    "three leading dimensions": ((2, 3, 2, 17), (5, 17), fp32),
    "several tiles each way": ((150, 70), (80, 70), fp32),
    "many rows: the gradient of the weight is split": ((1100, 3), (2, 3), fp32),
    "batch 0": ((0, 4), (3, 4), fp32),
    "batch 0 inside": ((2, 0, 4), (3, 4), fp32),
    "fp64": ((5, 20), (7, 20), fp64),
    "fp16, wide loads": ((5, 32), (48, 32), fp16),
    "bf16": ((5, 20), (7, 20), bf16),
}


@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@pytest.mark.parametrize("x, w, dtype", CASES.values(), ids=CASES)
def test_linear_matches_torch(lane, x, w, dtype, bias):
    inputs = [randn(*x, device=lane.device, dtype=dtype), randn(*w, device=lane.device, dtype=dtype)]
    if bias:
        inputs.append(randn(w[0], device=lane.device, dtype=dtype))
    assert_matches(fF.linear, F.linear, *inputs)
    y, expected = fF.linear(*inputs), F.linear(*inputs)
    assert y.is_contiguous()
    ours, theirs = (torch.autograd.grad(out.sum(), inputs) for out in (y, expected))
    assert [g.stride() for g in ours] == [g.stride() for g in theirs]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (bf16, fp32), ids=str)
def test_linear_of_real_networks(dtype):
    with fastcnn.backend("triton"), fastcnn.strict():
        for rows, features, out in ((256, 2048, 1000), (128, 4096, 4096), (64, 9216, 4096)):
            x, w = randn(rows, features, device="cuda", dtype=dtype), randn(out, features, device="cuda", dtype=dtype)
            assert_matches(fF.linear, F.linear, x, w, randn(out, device="cuda", dtype=dtype))


VIEWS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every second": lambda t: torch.stack([t, t * torch.nan], -1).flatten(-2)[:, ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
    "one element off": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("which", (0, 1), ids=("input", "weight"))
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_linear_of_views(lane, view, which):
    tensors = [torch.randn(6, 16, device=lane.device), torch.randn(5, 16, device=lane.device)]
    tensors[which] = view(tensors[which])
    assert_matches(fF.linear, F.linear, *(t.detach().requires_grad_() for t in tensors))


def test_linear_of_swapped_leading_dimensions(lane):
    x = torch.randn(4, 2, 3, device=lane.device).transpose(0, 1).requires_grad_()
    assert_matches(fF.linear, F.linear, x, randn(5, 3, device=lane.device))


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_linear_broadcasts_the_bias(lane, shape):
    assert_matches(fF.linear, F.linear, *(randn(*s, device=lane.device) for s in ((5, 4), (3, 4), shape)))


@pytest.mark.parametrize(
    "x, w, bias", [((2, 4), (4,), None), ((2, 4), (3, 4), (2, 3)), ((2, 0), (3, 0), (3,)), ((2, 4), (0, 4), (0,))]
)
def test_linear_leaves_the_rest_to_torch(lane, x, w, bias):
    inputs = [randn(*shape, device=lane.device) for shape in (x, w, bias) if shape is not None]
    with fastcnn.strict(False):
        assert_matches(fF.linear, F.linear, *inputs)
    with pytest.raises(NotImplementedError, match="not worth a kernel|one bias per output feature|at least one input"):
        fF.linear(*inputs)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
def test_linear_with_frozen_operands(lane, needs):
    tensors = [torch.randn(shape, device=lane.device) for shape in ((6, 5), (4, 5), (4,))]
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(bool(need))
    assert_matches(fF.linear, F.linear, *tensors)


def test_linear_takes_an_activation_in_place(lane):
    x, w = randn(6, 5, device=lane.device), randn(4, 5, device=lane.device)
    ours, theirs = (torch.autograd.grad(f.linear(x, w).relu_().sum(), (x, w)) for f in (fF, F))
    torch.testing.assert_close(ours, theirs)


def test_linear_double_backward(lane):
    inputs = [randn(*shape, device=lane.device, dtype=fp64) for shape in ((3, 4), (2, 4), (2,))]
    assert torch.autograd.gradcheck(fF.linear, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(fF.linear, inputs, fast_mode=True)


def test_linear_under_autocast(lane):
    x, w, b = (randn(*shape, device=lane.device) for shape in ((6, 5), (4, 5), (4,)))
    with torch.autocast(lane.device.type, dtype=bf16):
        y, expected = fF.linear(x, w, b), F.linear(x, w, b)
    assert y.dtype == expected.dtype == bf16
    torch.testing.assert_close(y, expected, atol=0.05, rtol=0.05)
    assert all(g.dtype == fp32 for g in torch.autograd.grad(y.float().sum(), (x, w, b)))


def test_linear_compiles_without_graph_breaks(lane):
    x, w, b = (randn(*shape, device=lane.device) for shape in ((2, 3, 5), (4, 5), (4,)))
    step = lambda *i: fF.linear(*i).square()
    y, expected = torch.compile(step, fullgraph=True, backend="aot_eager")(x, w, b), step(x, w, b)
    ours, eager = (torch.autograd.grad(out.sum(), (x, w, b)) for out in (y, expected))
    torch.testing.assert_close((y, ours), (expected, eager))


BAD = {
    "input must be a torch.Tensor, got float": dict(input=1.0),
    "input must have at least 1 dimension, got a scalar": dict(input=torch.zeros(())),
    "weight must be 1-D or 2-D, got 3-D": dict(weight=torch.zeros(2, 3, 5)),
    r"input must have weight.shape\[-1\] = 4 features, got 5": dict(weight=torch.zeros(3, 4)),
    "weight must have the dtype of input .torch.float32., got torch.float64": dict(weight=torch.zeros(3, 5).double()),
    "bias must have the dtype of input": dict(bias=torch.zeros(3).half()),
    "bias must be on the device of input": dict(bias=torch.zeros(3, device="meta")),
    r"bias must have shape \(3,\), got \(4,\)": dict(bias=torch.zeros(4)),
    "bias must be None when weight is 1-D": dict(weight=torch.zeros(5)),
}


@pytest.mark.parametrize("message, arguments", BAD.items(), ids=BAD)
def test_linear_refuses_bad_arguments(message, arguments):
    good = dict(input=torch.zeros(2, 5), weight=torch.zeros(3, 5), bias=torch.zeros(3))
    with pytest.raises((TypeError, ValueError), match=message):
        fF.linear(**good | arguments)
