"""Dropout: y = x / (1 - p) where kept, 0 * x where dropped, each element dropped with probability p; any shape.

Plain dropout (inverted=False), the form of 2012, has y = x where kept and multiplies by 1 - p in evaluation instead.

Saved for backward: the seed, eight bytes; the mask is computed again. Torch counterpart: torch.nn.functional.dropout,
with other random numbers. Source: Hinton et al. 2012 (plain), Srivastava et al. 2014; random numbers Philox4x32-10,
Salmon et al. 2011.

The element with logical index i (row-major over the shape) takes word i % 4 of Philox4x32-10 with key = seed and
counter = i // 4, and is dropped where that word is below round(p * 2^32). The mask depends on seed, p and shape alone:
CPU and GPU, contiguous and channels_last give the same one. The seed is drawn from torch's generator of the tensor's
device and stays there: torch.manual_seed, activation checkpointing and CUDA-graph replay work as with torch's dropout.
"""

import math
import numbers

import torch
import torch.nn.functional as F

from fastcnn.backends import Op, current_backend
from fastcnn.ops import common

BLOCK = 1024  # one launch for every shape: the kernel streams memory
CPU_SMALLEST = 8192  # elements


def philox_reference(counter, key):
    """Philox4x32-10 in plain PyTorch.

    Args:
        counter: four int64 tensors with values below 2^32.
        key: two int64 tensors with values below 2^32.

    Returns:
        the four words, int64 tensors with values below 2^32.
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # wraps around in int64; the low 64 bits are right
        c0, c1, c2, c3 = (b >> 32) & low ^ c1 ^ k0, b & low, (a >> 32) & low ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def factors_reference(n, seed, p, inverted=True):
    """What the first n elements of the stream of this seed are multiplied by, in plain PyTorch; fp64."""
    low = 0xFFFFFFFF
    group = torch.arange(-(-n // 4), device=seed.device)
    zero = torch.zeros_like(group)
    counter, key = (group & low, group >> 32, zero, zero), (seed & low, (seed >> 32) & low)
    words = torch.stack(philox_reference(counter, key), dim=1)
    threshold, scale = threshold_and_scale(p, inverted)
    return (words.reshape(-1)[:n] >= threshold).double() * scale


def dropout_reference(x, seed, p, inverted=True):
    """y for this seed (int64 tensor of one element) in plain PyTorch."""
    return x * factors_reference(x.numel(), seed, p, inverted).reshape(x.shape).to(x.dtype)


def threshold_and_scale(p, inverted=True):
    """Words below the threshold drop; what is kept is multiplied by the scale."""
    # at p = 1 the scale 0 drops what the largest threshold would keep
    return min(round(p * 2**32), 2**32 - 1), 0.0 if p == 1 else 1.0 / (1.0 - p) if inverted else 1.0


def _why_not(backend, x, inplace):
    if x.dtype not in common.FLOATS:
        return f"dropout has kernels for fp16, bf16, fp32 and fp64 and got {x.dtype}"
    if backend == "cpu" and x.dtype not in (torch.float32, torch.float64):
        return f"the CPU kernel of dropout takes float32 and float64 and got {x.dtype}"
    if backend == "cpu" and current_backend() == "auto" and x.numel() < CPU_SMALLEST:
        return f"PyTorch is faster on CPU below {CPU_SMALLEST:,} elements"
    if inplace and (not common.is_dense(x) or _memory_order(x) is None):
        return f"dropout in place needs contiguous or channels_last memory, got strides {x.stride()}"
    return None


def _memory_order(x):
    """(A, B, C) where a dense x of logical order (A, C, B) lies in memory as (A, B, C); B = 1: contiguous. Or None."""
    dims = [d for d in range(x.dim()) if x.shape[d] != 1]
    order = sorted(dims, key=lambda d: -x.stride(d))
    if order == dims:
        return 1, 1, x.numel()
    a = next(i for i, d in enumerate(order) if d != dims[i])
    k = dims.index(order[a])
    if order != dims[:a] + dims[k:] + dims[a:k]:
        return None

    def size(ds):
        return math.prod(x.shape[d] for d in ds)

    return size(dims[:a]), size(dims[k:]), size(dims[a:k])


def dropout_forward(x, seed, p, backend, inverted=True):
    """Launch the kernel; returns y in the memory order of x. Of a gradient it returns the gradient of the input."""
    y = torch.empty_like(x)  # dense, also where x is not
    _launch(common.with_strides_of(x, y), y, seed, threshold_and_scale(p, inverted), backend)
    return y


def dropout_forward_(x, seed, p, backend, inverted=True):
    """The same, written over x."""
    _launch(x, x, seed, threshold_and_scale(p, inverted), backend)


def _launch(x, y, seed, draw, backend):
    if x.numel() == 0:
        return
    memory_order = _memory_order(y)
    if memory_order is None:
        contiguous = x.contiguous()
        _launch(contiguous, contiguous, seed, draw, backend)
        y.copy_(contiguous)
    elif backend == "cpu":
        _launch_cpu(x, y, seed, draw, memory_order)
    else:
        _launch_triton(x, y, seed, draw, memory_order)


def _launch_triton(x, y, seed, draw, memory_order):
    from fastcnn.kernels.triton import dropout as kernels

    numel, (_, P, C) = x.numel(), memory_order
    int64 = common.exceeds_int32(x)
    grid = (-(-numel // BLOCK),)
    with common.device_guard(x):
        if P == 1:
            kernels.dropout_kernel[grid](x, y, seed, numel, *draw, INT64=int64, BLOCK=BLOCK)
        elif P % 4:
            kernels.dropout_transposed_kernel[grid](x, y, seed, numel, P, C, *draw, INT64=int64, BLOCK=BLOCK)
        else:
            block_c = min(64, 1 << (C - 1).bit_length())
            block_q = BLOCK // block_c  # of four elements for each thread's Philox call
            quads = numel // C // 4
            grid = (-(-quads // block_q), -(-C // block_c))
            kernels.dropout_quads_kernel[grid](
                x, y, seed, quads, P // 4, C, *draw,
                ALIGN=math.gcd(C, 8), INT64=int64, BLOCK_Q=block_q, BLOCK_C=block_c,
            )  # fmt: skip


def _launch_cpu(x, y, seed, draw, memory_order):
    import numpy as np

    from fastcnn.kernels.cpu import dropout as kernels

    N, P, C = memory_order
    threshold, scale = draw
    scale = np.float64(scale) if x.dtype == torch.float64 else np.float32(scale)
    arguments = (np.int64(seed.item()), np.uint64(threshold), scale)
    common.cpu_threads(x.numel())
    if P == 1:
        kernels.dropout(x.detach().numpy().reshape(-1), y.detach().numpy().reshape(-1), *arguments)
    else:
        x, y = (t.detach().as_strided((N, P, C), (P * C, C, 1)).numpy() for t in (x, y))
        quads = P % 4 == 0 and C >= kernels.WIDE
        (kernels.dropout_quads if quads else kernels.dropout_channels_last)(x, y, *arguments)


_forward = common.register(
    "dropout(Tensor input, Tensor seed, float p, str backend, bool inverted=True) -> Tensor",
    dropout_forward,
    lambda x, *_: torch.empty_like(x),
)
_forward_ = common.register(
    "dropout_(Tensor(a!) input, Tensor seed, float p, str backend, bool inverted=True) -> ()",
    dropout_forward_,
    lambda *_: None,
)


class DropoutFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, p, inplace, backend, inverted=True):
        ctx.save_for_backward(seed)
        ctx.arguments = (p, backend, inverted, common.is_channels_last(x))
        if inplace:
            _forward_(x, seed, p, backend, inverted)
            ctx.mark_dirty(x)
            return x
        return _forward(x, seed, p, backend, inverted)

    @staticmethod
    def backward(ctx, grad_output):
        (seed,) = ctx.saved_tensors
        p, backend, inverted, channels_last = ctx.arguments
        if channels_last:
            grad_output = grad_output.contiguous(memory_format=torch.channels_last)
        # linear in x: the gradient is the same op, and so is the gradient's gradient
        if torch.is_grad_enabled():
            return DropoutFunction.apply(grad_output, seed, p, False, backend, inverted), *[None] * 5
        return _forward(grad_output, seed, p, backend, inverted), *[None] * 5


_op = Op(
    "dropout",
    cpu_kernel=True,
    cpu_auto=True,
    why="forward and backward at 2 to 10x PyTorch's speed from 40,000 elements, equal at 64 x 120",
)


def _pytorchs(input, p=0.5, training=True, inplace=False):
    check_p_and_flags(p, training=training, inplace=inplace)
    return F.dropout(input, p, training, inplace)


@_op.torch_first(_pytorchs, CPU_SMALLEST)
def dropout(input, p=0.5, training=True, inplace=False, *, inverted=True):
    """Zero each element with probability p and scale the others by 1 / (1 - p); the identity in evaluation.

    As torch.nn.functional.dropout, with a random stream of its own and no mask kept for backward.

    Args:
        input: floating-point tensor of any shape and layout.
        p: probability of dropping, between 0 and 1.
        training: False returns input itself.
        inplace: write over input and return it.
        inverted: False for plain dropout: training leaves what is kept as it is, evaluation multiplies by 1 - p.

    Returns:
        tensor with the shape, dtype and layout of input.

    Raises:
        TypeError: input is no floating-point tensor, or another argument has the wrong type.
        ValueError: p is not between 0 and 1.
    """
    common.check_tensor("input", input)
    check_p_and_flags(p, training=training, inplace=inplace, inverted=inverted)
    if p == 0 or input.numel() == 0:
        return input
    if not training:
        if inverted:
            return input
        common.check_float("input", input)
        return input.mul_(1 - p) if inplace else input * (1 - p)
    common.check_float("input", input)
    backend = _op.route(input, lambda backend: _why_not(backend, input, inplace))
    if backend == "torch":
        if inverted:
            return F.dropout(input, p, training, inplace)
        kept = torch.empty_like(input).bernoulli_(1 - p)
        return input.mul_(kept) if inplace else input * kept
    return DropoutFunction.apply(input, draw_seed(input), float(p), inplace, backend, inverted)


def draw_seed(tensor):
    """A seed from the default generator of the tensor's device, and there; a host number a CUDA graph would freeze."""
    return torch.randint(2**63 - 1, (), device=tensor.device)


def check_p_and_flags(p, **flags):
    """Raise unless p is a probability and the flags are bools."""
    if isinstance(p, bool) or not isinstance(p, numbers.Real):
        raise TypeError(f"p must be a float, got {p!r}")
    if not 0 <= p <= 1:
        raise ValueError(f"p (the dropout probability) has to be between 0 and 1, but got {p}")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {value!r}")
