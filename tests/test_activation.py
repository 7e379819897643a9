import pytest
import torch
import torch.nn.functional as F

import fastcnn.functional as fF
from fastcnn.ops import pending
from fastcnn.testing import assert_matches

KINDS = {
    "relu": (fF.relu, F.relu),
    "relu6": (fF.relu6, F.relu6),
    "leaky_relu": (lambda x: fF.leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, 0.2)),
    "silu": (fF.silu, F.silu),
    "sigmoid": (fF.sigmoid, torch.sigmoid),
    "tanh": (fF.tanh, torch.tanh),
    "hardswish": (fF.hardswish, F.hardswish),
    "gelu": (fF.gelu, F.gelu),
    "gelu_tanh": (lambda x: fF.gelu(x, approximate="tanh"), lambda x: F.gelu(x, approximate="tanh")),
}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_activation_matches_torch(lane, kind, dtype):
    ours, theirs = KINDS[kind]
    # 1025 elements: one more than a block; scaled so that every branch of every kind is taken
    x = (torch.randn(5, 5, 41, device=lane.device) * 4).to(dtype).requires_grad_()
    assert_matches(ours, theirs, x)


SPECIAL = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-30, 6.0, -6.0, -3.0, 3.0, 100.0, -100.0, -1e6]


def one_by_one(function):
    """(f, f') of the special values: PyTorch's scalar loops and CUDA kernels agree there, its SIMD loops differ."""
    found = []
    for value in SPECIAL:
        x = torch.tensor([value], dtype=torch.float64, requires_grad=True)
        y = function(x)
        found.append((y.detach(), torch.autograd.grad(y, x)[0]))
    return [torch.cat(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_activation_special_values(lane, kind, dtype):
    ours, theirs = KINDS[kind]
    x = torch.tensor(SPECIAL, dtype=dtype, device=lane.device, requires_grad=True)
    y = ours(x)
    found = y, torch.autograd.grad(y.sum(), x)[0]
    # the same formulas on load and on store of the fused chain
    one, zero = torch.ones(1, device=lane.device), torch.zeros(1, device=lane.device)
    raw = x.detach().view(-1, 1, 1, 1)
    z = pending.pending_forward(raw, one, zero, kind, 0.2, None, None, None, None, "none", "triton")
    grad, *_ = pending.pending_backward(
        torch.ones_like(raw), None, raw, one, zero, kind, 0.2, None, False, None, None, None, "none", False, False,
        "triton",
    )  # fmt: skip
    expected = [tensor.to(dtype) for tensor in one_by_one(theirs)]
    for tensors in (found, (z.flatten(), grad.flatten())):
        for tensor, truth in zip(tensors, expected, strict=True):
            torch.testing.assert_close(tensor.detach().cpu(), truth, equal_nan=True)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda x: x.to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(lambda x: x[:, ::2, 1:, ::3], id="slice"),
        pytest.param(lambda x: x[:1].expand(3, -1, -1, -1), id="expanded"),
        pytest.param(lambda x: x.transpose(1, 3), id="transposed"),
        pytest.param(lambda x: x[:0], id="empty batch"),
        pytest.param(lambda x: x[0, 0, 0, 0], id="scalar"),
    ],
)
def test_activation_layouts(lane, make):
    x = make(torch.randn(3, 4, 5, 6, device=lane.device)).detach()
    x.requires_grad_()
    y = fF.relu(x)
    expected = F.relu(x)
    assert y.stride() == expected.stride()
    grad = torch.randn(expected.shape, device=lane.device).flip(0) if x.dim() else torch.ones((), device=lane.device)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


@pytest.mark.parametrize("kind", ("relu", "relu6", "leaky_relu", "silu", "hardswish"))
def test_activation_in_place(lane, kind):
    leaf = torch.randn(4, 100, device=lane.device, requires_grad=True)
    results = []
    for functional in (fF, F):
        x = leaf * 2
        y = getattr(functional, kind)(x, inplace=True)
        assert y.data_ptr() == x.data_ptr()
        results.append((x.detach(), torch.autograd.grad((x * y).sum(), leaf)[0]))
    torch.testing.assert_close(results[0], results[1])
    with pytest.raises(RuntimeError, match="leaf"):
        getattr(fF, kind)(leaf, inplace=True)


def test_activation_in_place_on_a_slice_of_channels(lane):
    # not dense: strict mode refuses, otherwise PyTorch does it
    import fastcnn

    x = torch.randn(4, 6, device=lane.device)
    with pytest.raises(NotImplementedError, match="one block of memory"):
        fF.relu(x[:, ::2], inplace=True)
    with fastcnn.strict(False):
        fF.relu(x[:, ::2], inplace=True)
    assert (x[:, ::2] >= 0).all() and (x[:, 1::2] < 0).any()


def test_activation_refuses_bad_arguments():
    with pytest.raises(TypeError, match="input must be a torch.Tensor, got list"):
        fF.relu([1.0])
    with pytest.raises(TypeError, match="inplace must be a bool, got 'yes'"):
        fF.relu(torch.zeros(1), inplace="yes")
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
        fF.gelu(torch.zeros(1), approximate="erf")
