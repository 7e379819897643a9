"""Pools of pending activations against PyTorch's pools of the activation."""

import pytest
import torch
import torch.nn.functional as F

import fastcnn
from fastcnn import chain
from fastcnn.ops import common
from fastcnn.ops.pending import Expression, pending_reference
from fastcnn.testing import assert_close_to_truth, make_grad

LANES = ("triton", "cpu")
POOLS = {
    "max": (chain.max_pool2d, F.max_pool2d),
    "avg": (chain.avg_pool2d, F.avg_pool2d),
    "adaptive": (chain.adaptive_avg_pool2d, F.adaptive_avg_pool2d),
}
CASES = {
    # pool, its arguments, shape, channels_last, activation, gate, whether others read the value
    "stem": ("max", (3, 2, 1), (2, 9, 11, 14), True, "relu", False, False),
    "stem, 70 channels, other readers": ("max", (3, 2, 1), (1, 70, 8, 9), True, "relu", False, True),
    "2x2": ("max", (2,), (3, 8, 7, 9), True, "silu", False, False),
    "3x3 stride 1": ("max", (3, 1, 1), (1, 16, 6, 5), True, "leaky_relu", False, True),
    "one channel": ("max", (3, 2, 1), (2, 1, 6, 5), True, "relu6", False, False),
    "contiguous": ("max", (3, 2, 1), (2, 5, 9, 6), False, "relu", False, True),
    "no activation, ceil": ("max", (3, 2, 0, 1, True), (2, 12, 8, 8), True, "none", False, False),
    "two passes: stride 3": ("max", (3, 3), (2, 8, 9, 9), True, "relu", False, True),
    "gate": ("max", (2,), (2, 6, 6, 6), True, "hardswish", True, False),
    "global": ("adaptive", (1,), (3, 20, 7, 5), True, "silu", False, True),
    "global, 130 channels": ("adaptive", (1,), (2, 130, 3, 3), True, "sigmoid", False, False),
    "global, contiguous": ("adaptive", (1,), (2, 6, 5, 7), False, "relu6", False, False),
    "global, gate": ("adaptive", (1,), (2, 6, 5, 7), True, "silu", True, True),
    "parts": ("adaptive", ((2, 3),), (2, 8, 5, 7), True, "tanh", False, False),
    "average 3x3": ("avg", (3, 1, 1, False, False), (2, 8, 6, 7), True, "relu", False, True),
    "average 2x2": ("avg", (2, 2), (1, 5, 7, 8), False, "gelu", False, False),
}


def make(case, device="cpu", dtype=torch.float32):
    _, _, shape, channels_last, _, gate, _ = CASES[case]
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    c = shape[1]
    x = torch.randn(shape, device=device).to(dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    scale = torch.linspace(-1, 2, c, device=device, dtype=vectors) + 0.1
    shift = torch.linspace(1, -1, c, device=device, dtype=vectors)
    gates = torch.rand(shape[:2], device=device).to(dtype) if gate else None
    return x, scale, shift, gates


def ours(case, tensors):
    """Output and gradients, x's before the scale."""
    name, arguments, _, _, activation, _, shared = CASES[case]
    x, scale, shift, gate = leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    value = chain.Pending(x, scale, shift, activation, 0.01 if activation == "leaky_relu" else 0.0, gate)
    y = POOLS[name][0](value, *arguments)
    outputs, grads = [y], [make_grad(y)]
    if shared:
        outputs.append(value.raw)
        grads.append(make_grad(x, 1))
    return y.detach(), torch.autograd.grad(outputs, [t for t in leaves if t is not None], grads)


def theirs(case, tensors, dtype=None):
    name, arguments, _, _, activation, _, shared = CASES[case]
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    x, scale, shift, gate = leaves
    # the gradient before the scale: that of something added after it
    after = torch.zeros_like(x, requires_grad=True)
    per_channel = lambda v: v.to(x.dtype).view(1, -1, 1, 1)
    slope = 0.01 if activation == "leaky_relu" else 0.0
    u = Expression(x * per_channel(scale) + per_channel(shift) + after, None, None, activation, slope, gate)
    y = POOLS[name][1](pending_reference(u), *arguments)
    wanted = [t for t in (after, scale, shift, gate) if t is not None]
    grads = list(torch.autograd.grad(y, wanted, make_grad(y)))
    if shared:
        grads[0] = grads[0] + make_grad(x, 1)
    return y.detach(), grads


def check(case, lane, dtype=torch.float32):
    tensors = make(case, lane.device, dtype)
    (y, grads), (torch_y, torch_grads), (true_y, true_grads) = (
        ours(case, tensors), theirs(case, tensors), theirs(case, tensors, torch.float64)
    )  # fmt: skip
    assert y.dtype == torch_y.dtype and (y.shape[1] == 1 or y.stride() == torch_y.stride())
    assert_close_to_truth("output", y, torch_y, true_y, dtype)
    for name, mine, stock, truth in zip(("x", "scale", "shift", "gate"), grads, torch_grads, true_grads, strict=False):
        assert mine.dtype == stock.dtype
        assert_close_to_truth(name, mine, stock, truth, dtype)


@pytest.mark.parametrize("case", CASES)
def test_pools_match_torch(lane, case):
    check(case, lane)


@pytest.mark.parametrize("case", ["stem", "global", "average 3x3", "two passes: stride 3"])
def test_pools_in_other_dtypes(lane, case):
    check(case, lane, torch.float64)
    if case in ("global", "average 3x3"):  # rounding makes ties, and other taps
        check(case, lane, torch.bfloat16)


@pytest.mark.parametrize("case", ["stem, 70 channels, other readers", "global"])
def test_pools_64_bit_variant(lane, case, monkeypatch):
    monkeypatch.setattr(common, "exceeds_int32", lambda *tensors: True)
    check(case, lane)


@pytest.mark.parametrize("case", ["stem", "global"])
def test_special_values(lane, case):
    x, *vectors = make(case, lane.device)
    x[0, 0, 2, 2], x[0, 1, 3, 3], x[1, 2, :4, :4] = torch.nan, torch.inf, -torch.inf
    (y, grads), (torch_y, torch_grads) = ours(case, (x, *vectors)), theirs(case, (x, *vectors))
    torch.testing.assert_close(y, torch_y, equal_nan=True)
    torch.testing.assert_close(grads[0], torch_grads[0], equal_nan=True)
    for mine, stock in zip(grads[1:3], torch_grads[1:], strict=True):
        torch.testing.assert_close(mine, stock, equal_nan=True)


def test_gradient_after_the_scale(lane):
    for pool, arguments in ((chain.max_pool2d, (3, 2, 1)), (chain.adaptive_avg_pool2d, (1,))):
        x, scale, shift, _ = make("stem", lane.device, torch.float64)
        x.requires_grad_()
        y = pool(chain.Pending(x, scale, shift, "relu", scaled=True), *arguments)
        z = F.relu(x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1))
        z = F.max_pool2d(z, 3, 2, 1) if arguments == (3, 2, 1) else z.mean((2, 3), keepdim=True)
        torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), x), torch.autograd.grad(z.sin().sum(), x))


def test_what_is_saved(lane):
    for case, least in (("stem", 2 * 9 * 6 * 7), ("global", 0)):
        tensors, saved = make(case, lane.device), {}

        def keep(t, saved=saved):
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            pool, arguments, *_ = CASES[case]
            x, scale, shift = (t.detach().requires_grad_() for t in tensors[:3])
            POOLS[pool][0](chain.Pending(x, scale, shift, "relu"), *arguments)
        assert sum(saved.values()) == least + sum(4 * t.numel() for t in tensors[:3])


def test_same_bits_twice_and_retained_graphs(lane):
    x, scale, shift, _ = (None if t is None else t.requires_grad_() for t in make("stem", lane.device))
    y = chain.max_pool2d(chain.Pending(x, scale, shift, "relu"), 3, 2, 1)
    first, second = (torch.autograd.grad(y, (x, scale, shift), make_grad(y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pools_where_pytorch_runs(dtype):
    x, scale, shift, _ = (None if t is None else t.requires_grad_() for t in make("stem", dtype=dtype))
    value = chain.Pending(x, scale, shift, "relu")
    with fastcnn.backend("torch" if dtype == torch.float32 else "auto"):
        for pool, arguments in (("max", (3, 2, 1)), ("max", (2, 1, 1, 2)), ("avg", (2,)), ("adaptive", (3,))):
            y = POOLS[pool][0](value, *arguments)
            z = pending_reference(Expression(x.float(), scale, shift, "relu")).to(dtype)
            expected = POOLS[pool][1](z, *arguments)
            torch.testing.assert_close(y, expected)
            mine = torch.autograd.grad(y.sum(), (scale, shift))
            torch.testing.assert_close(mine, torch.autograd.grad(expected.sum(), (scale, shift)), rtol=2e-2, atol=0.2)


def test_bad_arguments_are_refused():
    value = chain.Pending(torch.zeros(1, 2, 4, 4), torch.ones(2), torch.ones(2), "relu")
    with pytest.raises(ValueError, match="padding must be at most half of kernel_size"):
        chain.max_pool2d(value, 2, 2, 2)
    with pytest.raises(ValueError, match="too large for an input"):
        chain.avg_pool2d(value, 5)
    with pytest.raises(TypeError, match="output_size must be an int"):
        chain.adaptive_avg_pool2d(value, 2.5)
