import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops import local_response_norm as ops
from fastcnn.testing import assert_matches

LANES = ("triton", "cpu")
HALF = (torch.float16, torch.bfloat16)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def plain(x):
    return x


def reference(x, *arguments):
    # PyTorch on CPU has no average pooling in 16 bits
    return F.local_response_norm(x.float() if x.dtype in HALF else x, *arguments).to(x.dtype)


def check(lane, shape, arguments=(5,), dtype=torch.float32, layout=plain):
    if lane.name == "cpu" and dtype in HALF:
        pytest.skip("numba has no 16-bit floats")
    generator = torch.Generator().manual_seed(0)
    x = layout((torch.randn(shape, generator=generator) * 3).to(lane.device, dtype)).requires_grad_()
    assert_matches(lambda x: fF.local_response_norm(x, *arguments), lambda x: reference(x, *arguments), x)


LAYOUTS = pytest.mark.parametrize("layout", (plain, channels_last), ids=("contiguous", "channels_last"))
CASES = [
    pytest.param(dict(shape=(2, 7, 5, 3)), id="odd sizes"),
    pytest.param(dict(shape=(2, 7, 5, 3), arguments=(1, 0.5)), id="window of one"),
    pytest.param(dict(shape=(2, 7, 5, 3), arguments=(2, 0.5)), id="even window of two"),
    pytest.param(dict(shape=(2, 7, 5, 3), arguments=(4, 0.5)), id="even window of four"),
    pytest.param(dict(shape=(2, 3, 4, 5), arguments=(9, 0.5)), id="window wider than the channels"),
    pytest.param(dict(shape=(2, 1, 4, 5), arguments=(3, 0.5)), id="one channel"),
    pytest.param(dict(shape=(2, 6, 4, 4), arguments=(5, 0.5, 0.75, 2.0)), id="the paper's k"),
    pytest.param(dict(shape=(2, 6, 4, 4), arguments=(3, 0.5, 0.6, 1.5)), id="another power"),
    pytest.param(dict(shape=(2, 6, 4, 4), arguments=(3, 0.5, -0.5, 1.5)), id="negative power"),
    pytest.param(dict(shape=(2, 6, 4, 4), arguments=(3, 0.5, 0.0, 0.0)), id="power of zero"),
    pytest.param(dict(shape=(2, 6, 5, 5), arguments=(5, 0.5), dtype=torch.float64), id="fp64"),
    pytest.param(dict(shape=(2, 6, 5, 5), arguments=(3, 0.5, 0.6), dtype=torch.float64), id="fp64, another power"),
    pytest.param(dict(shape=(2, 8, 5, 5), arguments=(5, 0.5), dtype=torch.float16), id="fp16"),
    pytest.param(dict(shape=(2, 8, 5, 5), arguments=(5, 0.5), dtype=torch.bfloat16), id="bf16"),
    pytest.param(dict(shape=(2, 40, 9, 7), arguments=(5, 0.5)), id="several programs"),
]


@LAYOUTS
@pytest.mark.parametrize("case", CASES)
def test_local_response_norm_matches_torch(lane, case, layout):
    check(lane, layout=layout, **case)


@pytest.mark.parametrize("shape", [(2, 6, 11), (2, 5, 2, 3, 4), (3, 8, 1, 1), (1, 7, 1)])
def test_local_response_norm_of_any_rank(lane, shape):
    check(lane, shape, (3, 0.5))
    if len(shape) == 5:
        check(lane, shape, (3, 0.5), layout=lambda x: x.to(memory_format=torch.channels_last_3d))


@LAYOUTS
def test_local_response_norm_blocks_of_the_cpu_kernels(lane, layout):
    # more pixels and rows than a block, ragged
    if lane.name == "cpu":
        check(lane, (2, 70, 29, 31), (5, 0.5), layout=layout)


def test_local_response_norm_window_too_wide_to_unroll(lane):
    x = torch.randn(1, 4, 3, 3, device=lane.device)
    if lane.name != "cpu":
        with pytest.raises(NotImplementedError, match="windows of up to 9 channels and got 11"):
            fF.local_response_norm(x, 11)
    else:
        check(lane, (1, 15, 3, 3), (11, 0.5))


@LAYOUTS
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_local_response_norm_bad_value_as_torch(lane, bad, layout):
    x = layout(torch.randn(2, 8, 3, 5, device=lane.device))
    x[1, 3, 2, 1] = bad
    results = []
    for function in (fF.local_response_norm, F.local_response_norm):
        leaf = x.detach().clone().requires_grad_()
        y = function(leaf, 3, 0.5)
        results.append((y, *torch.autograd.grad(y, leaf, torch.ones_like(y))))
    torch.testing.assert_close(*results, equal_nan=True)


@LAYOUTS
def test_local_response_norm_of_zeros_without_k(lane, layout):
    # 0 / 0, as in PyTorch
    x = layout(torch.zeros(1, 4, 2, 3, device=lane.device))
    x[0, 3] = 1.0
    y, expected = fF.local_response_norm(x, 3, 1.0, 0.75, 0.0), F.local_response_norm(x, 3, 1.0, 0.75, 0.0)
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize(
    "make", (channels_last, lambda x: x[:, :, ::2, 1:], lambda x: x[:, 1:3], lambda x: x.transpose(2, 3))
)
def test_local_response_norm_layouts(lane, make):
    x = make(torch.randn(2, 4, 5, 6, device=lane.device)).detach().requires_grad_()
    y, expected = fF.local_response_norm(x, 3, 0.5), F.local_response_norm(x, 3, 0.5)
    wanted = channels_last(x) if ops._memory_format(x) == torch.channels_last else x.contiguous()
    assert y.stride() == wanted.stride()
    torch.testing.assert_close(y, expected)
    grad = torch.randn(y.shape, device=lane.device)
    for layout in (grad, channels_last(grad), grad[:1, :1, :1, :1].expand(y.shape)):
        (ours,) = torch.autograd.grad(y, x, layout, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected, x, layout, retain_graph=True)
        assert ours.stride() == wanted.stride()
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 4, 4, 4), (2, 4, 0, 4), (2, 0, 4, 4)])
def test_local_response_norm_empty(lane, shape):
    x = torch.randn(shape, device=lane.device, requires_grad=True)
    y = fF.local_response_norm(x, 3)
    assert y.shape == shape and torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_local_response_norm_saves_its_input_alone(lane):
    x = torch.randn(2, 6, 4, 4, device=lane.device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        fF.local_response_norm(x, 5)
    assert saved == [x.data_ptr()]


def test_local_response_norm_second_derivative(lane):
    x = torch.randn(2, 5, 3, dtype=torch.float64, device=lane.device, requires_grad=True)
    function = lambda x: fF.local_response_norm(x, 3, 0.5)
    assert torch.autograd.gradcheck(function, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)


def test_local_response_norm_float32_from_bfloat16(lane):
    # what autocast on a GPU asks for: no copy of the input in float32
    if lane.name == "cpu":
        pytest.skip("numba has no 16-bit floats")
    x = torch.randn(2, 6, 4, 4, device=lane.device).bfloat16()
    y = ops._forward(x, 3, 0.5, 0.75, 1.0, torch.float32, "triton")
    torch.testing.assert_close(y, F.local_response_norm(x.float(), 3, 0.5))
    assert ops._backward(y, x, 3, 0.5, 0.75, 1.0, "triton").dtype == torch.bfloat16


@LAYOUTS
def test_local_response_norm_registration(lane, layout):
    x = layout(torch.randn(2, 6, 4, 5, device=lane.device))
    backend = "cpu" if lane.name == "cpu" else "triton"
    torch.library.opcheck(ops._forward, (x, 3, 0.5, 0.75, 1.0, x.dtype, backend))
    torch.library.opcheck(ops._backward, (torch.randn_like(x), x, 3, 0.5, 0.75, 1.0, backend))


REFUSED = [
    (TypeError, "input must be a torch.Tensor, got list", dict(input=[1.0])),
    (ValueError, r"input must have at least 3 dimensions.*got shape \(2, 3\)", dict(input=torch.zeros(2, 3))),
    (TypeError, "input must have a floating-point dtype, got torch.int64", dict(input=torch.zeros(2, 3, 4).long())),
    (TypeError, "size must be an int, got 3.0", dict(size=3.0)),
    (ValueError, "size must be positive, got 0", dict(size=0)),
    (TypeError, "beta must be a number, got None", dict(beta=None)),
    (TypeError, "alpha must be a number, got '1'", dict(alpha="1")),
]


@pytest.mark.parametrize("backend", ("cpu", "auto"))
@pytest.mark.parametrize("error, message, changed", REFUSED, ids=[message[:40] for _, message, _ in REFUSED])
def test_local_response_norm_refuses_bad_arguments(error, message, changed, backend):
    with fastcnn.backend(backend), pytest.raises(error, match=message):
        fF.local_response_norm(**(dict(input=torch.randn(2, 4, 3, 3), size=3) | changed))
