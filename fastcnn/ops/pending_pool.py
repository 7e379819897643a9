"""Pools of a pending activation: y = pool(z), z = f(x * scale + shift) * gate, of which z is not kept.

x, z [N, C, H, W] -> y [N, C, P, Q]. Saved for backward: x, the vectors, the gate, and of max pooling which tap of its
window each maximum came from, a byte per output. On a GPU max pooling with strides of 1 or 2 and global pooling make z
on load, and their backward computes the gradient of z, that of x and batch norm's sums in one pass (channels_last,
no gate), as global pooling does on CPU; elsewhere z and its gradient are temporaries. Second derivatives are refused.
Torch counterpart: the same functions on z. The gradient that goes with x is the one before the scale, as in pending.py.
"""

from typing import NamedTuple

import torch

from fastcnn.ops import adaptive_avg_pool2d as adaptive
from fastcnn.ops import avg_pool2d as avg
from fastcnn.ops import common, pending, pending_cpu, pooling
from fastcnn.ops import max_pool2d as maximum
from fastcnn.ops.conv_batch_norm import Inputs, refuse_second_derivatives

TILE = 1024  # elements, or cells, of a tile
PROGRAMS = 1024  # strips times blocks of channels at most


class MaxPool(NamedTuple):
    """Max pooling; window as pooling.window gives it."""

    window: list
    ceil_mode: bool

    def loads(self, x):
        return maximum.cells(x.shape, self.window) is not None

    def forward(self, x, backend, *pending):
        """(y, taps, or PyTorch's indices where it runs)"""
        if backend == "triton" or (backend == "cpu" and maximum.cpu_refusal(x, self.window) is None):
            return maximum.max_pool2d_forward(x, self.window, self.ceil_mode, True, backend, *pending)
        return torch.ops.aten.max_pool2d_with_indices(x, *self._arguments())

    def _arguments(self):
        return *(self.window[i : i + 2] for i in (0, 2, 4, 6)), self.ceil_mode

    def backward(self, grad, taps, x, channels_last, backend):
        """The gradient of z, which has the shape and dtype of x."""
        if taps.dtype == torch.int64:
            return torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *self._arguments(), taps)
        return maximum.max_pool2d_backward(grad, taps, x.shape, channels_last, self.window, backend)

    def launch_backward(self, grad, taps, x, scale, shift, activation, slope, add, scaled):
        """(gradient of x, sums of du * x and of du [2, C])."""
        from fastcnn.kernels.triton.pending_pool import max_pool2d_pending_backward_kernel as kernel

        (n, _, h, w), (p, q) = x.shape, grad.shape[2:]
        by_cell = maximum.cells(x.shape, self.window)
        return _launch(
            kernel, n * by_cell["cells_h"] * by_cell["cells_w"], (grad, taps), x, scale, shift, add,
            H=h, W=w, P=p, Q=q, **by_cell, ACTIVATION=activation, SLOPE=slope, SCALED=scaled,
        )  # fmt: skip


class AvgPool(NamedTuple):
    """Average pooling; window as pooling.window gives it."""

    window: list
    ceil_mode: bool
    count_include_pad: bool
    divisor_override: int | None

    def loads(self, x):
        return False

    def _arguments(self):
        windows = (self.window[i : i + 2] for i in (0, 2, 4))
        return *windows, self.ceil_mode, self.count_include_pad, self.divisor_override

    def forward(self, x, backend):
        if backend == "triton":
            return avg.avg_pool2d_forward(x, *self, backend), None
        return torch.ops.aten.avg_pool2d(x, *self._arguments()), None

    def backward(self, grad, _, x, channels_last, backend):
        if backend != "triton":
            return torch.ops.aten.avg_pool2d_backward(grad, x, *self._arguments())
        counts = self.count_include_pad, self.divisor_override
        return avg.avg_pool2d_backward(grad, x.shape, channels_last, self.window, *counts, backend)


class AdaptiveAvgPool(NamedTuple):
    """Adaptive average pooling to [P, Q]."""

    size: list

    def loads(self, x):
        return list(self.size) == [1, 1]

    def forward(self, x, backend, *pending):
        if backend == "triton":
            return adaptive.adaptive_avg_pool2d_forward(x, self.size, backend, *pending), None
        return torch.ops.aten.adaptive_avg_pool2d(x, self.size), None

    def backward(self, grad, _, x, channels_last, backend):
        if backend == "triton":
            return adaptive.adaptive_avg_pool2d_backward(grad, x.shape, channels_last, backend)
        if list(self.size) == [1, 1]:  # what PyTorch does, too
            return (grad / (x.shape[2] * x.shape[3])).expand(x.shape)
        return torch.ops.aten._adaptive_avg_pool2d_backward(grad, x)

    def launch_backward(self, grad, _, x, scale, shift, activation, slope, add, scaled):
        """(gradient of x, sums of du * x and of du [2, C])."""
        from fastcnn.kernels.triton.pending_pool import global_avg_pool2d_pending_backward_kernel as kernel

        n, _, h, w = x.shape
        how = dict(pixels=h * w, ACTIVATION=activation, SLOPE=slope, SCALED=scaled)
        return _launch(kernel, n * h * w, (grad,), x, scale, shift, add, **how)


def _launch(kernel, rows, pooled, x, scale, shift, add, **how):
    c = x.shape[1]
    block_b = min(64, max(8, 1 << (c - 1).bit_length()))
    block_a = (TILE // 2 if x.dtype == torch.float64 else TILE) // block_b
    tiles, blocks = -(-rows // block_a), -(-c // block_b)
    per_strip = -(-tiles // max(1, PROGRAMS // blocks))
    strips = -(-tiles // per_strip)
    pooled = [pooling.as_dense(t, True) for t in pooled]
    add = None if add is None else pooling.as_dense(add, True)
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    partial = torch.empty((1, strips, 2 * c), dtype=pending.vector_dtype(x), device=x.device)
    with common.device_guard(x):
        kernel[(strips, blocks)](
            *pooled, x, scale.contiguous(), shift.contiguous(), add, grad_x, partial, rows=rows, C=c, tiles=tiles,
            tiles_per_strip=per_strip, INT64=common.exceeds_int32(x, *pooled), BLOCK_A=block_a, BLOCK_B=block_b, **how,
        )  # fmt: skip
        return grad_x, pending.added(partial, partial.dtype).view(2, c)


def _loads(pool, x, scale, gate, backend):
    """Whether the pool's kernels make z on load."""
    dense = x.is_contiguous(memory_format=torch.channels_last) and pooling.follows_channels_last(x)
    return backend == "triton" and scale is not None and gate is None and dense and pool.loads(x)


def _is_means(pool, x, activation, gate, backend):
    """Whether the pool is the mean of each image and CPU kernels compute it from x."""
    whole = isinstance(pool, AdaptiveAvgPool) and list(pool.size) == [1, 1]
    return whole and backend == "cpu" and gate is None and pending_cpu.can(x, activation)


def pooled(e, pool, backend):
    """(what the pool read, y, taps) of an expression without right side."""
    if isinstance(pool, MaxPool) and e.activation == "relu" and e.scale is None and e.gate is None:
        # the maximum's ReLU is the ReLUs' maximum, of fewer numbers; where it is 0, no tap gets a gradient
        y, taps = pool.forward(e.x, backend)
        return e.x, y.relu_(), taps
    z = e.x if e.is_plain else pending.pending_forward(*e, backend)
    return z, *pool.forward(z, backend)


class PendingPoolFunction(torch.autograd.Function):
    """(y, passed): passed is x again for the next reader."""

    @staticmethod
    def forward(ctx, x, scale, shift, activation, slope, gate, scaled, pool, backend):
        fused = _loads(pool, x, scale, gate, backend)
        z = x
        means = not fused and _is_means(pool, x, activation, gate, backend)
        if means:
            y, taps = pending_cpu.image_means(x, scale, shift, activation, slope), None
        elif fused:
            y, taps = pool.forward(x, backend, (scale.contiguous(), shift.contiguous(), activation, slope))
        else:
            z, y, taps = pooled(pending.Expression(x, scale, shift, activation, slope, gate), pool, backend)
        ctx.save_for_backward(x, scale, shift, gate, taps)
        ctx.arguments = (activation, slope, scaled, pool, backend, fused, means, pooling.follows_channels_last(z))
        ctx.set_materialize_grads(False)
        return y, x if ctx.needs_input_grad[0] else None

    @staticmethod
    def backward(ctx, grad_y, grad_passed):
        refuse_second_derivatives()
        if grad_y is None:
            return grad_passed, *[None] * 8
        x, scale, shift, gate, taps = ctx.saved_tensors
        activation, slope, scaled, pool, backend, fused, means, channels_last = ctx.arguments
        if fused:
            how = activation, slope, grad_passed, scaled
            grad_x, sums = pool.launch_backward(grad_y, taps, x, scale, shift, *how)
            return grad_x, *sums.unbind(0), *[None] * 6
        if means:
            how = activation, slope, scaled
            grad_x, sums = pending_cpu.image_means_backward(grad_y, grad_passed, x, scale, shift, *how)
            return grad_x, *((None, None) if scale is None else sums.unbind(0)), *[None] * 6
        inputs = Inputs(x, scale, shift, gate, None, None, None, activation, slope, "none", False, scaled)
        dz = pool.backward(grad_y, taps, x, channels_last, backend)
        own = not isinstance(pool, AdaptiveAvgPool)  # whose gradient may be one number expanded
        grads = inputs.grads(dz, grad_passed, ctx.needs_input_grad[5], backend, overwrite=own)
        grad_x, grad_scale, grad_shift, grad_gate, *_ = grads
        return grad_x, grad_scale, grad_shift, None, None, grad_gate, None, None, None
