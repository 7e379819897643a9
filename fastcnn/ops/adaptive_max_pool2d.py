"""adaptive_max_pool2d: y[n,c,p,q] = max of x[n, c, floor(p*H/P) : ceil((p+1)*H/P), floor(q*W/Q) : ceil((q+1)*W/Q)].

x [N, C, H, W] or [C, H, W] -> y [N, C, P, Q] or [C, P, Q]. Saved for backward: which tap of its part each maximum came
from, in one byte per output for parts of up to 256 pixels, else two or four; neither x nor 64-bit indices. The backward
is a gather in fixed order, so it is deterministic, which torch's on CUDA is not.
Counterpart: torch.nn.functional.adaptive_max_pool2d.
"""

import torch
import torch.nn.functional as F

from fastcnn.backends import Op
from fastcnn.ops import common, pooling

OP = Op(
    "adaptive_max_pool2d",
    cpu_kernel=False,
    cpu_auto=False,
    why="there is no CPU kernel: PyTorch's loops run",
)


def adaptive_max_pool2d_reference(input, output_size):
    """The maximum of every part, in plain PyTorch."""
    return F.adaptive_max_pool2d(input, output_size)


def _why_not(backend, input):
    if input.dtype not in common.FLOATS:
        return f"adaptive_max_pool2d has kernels for floating-point tensors and got {input.dtype}"
    return None


def _empty_outputs(input, output_size, with_taps):
    shape = (*input.shape[:-2], *output_size)
    channels_last = pooling.follows_channels_last(input)
    output = pooling.empty(shape, input, channels_last)
    if not with_taps:
        return output, input.new_empty(0, dtype=torch.uint8)
    longest = [pooling.longest_part(out, size) for out, size in zip(output_size, input.shape[-2:], strict=True)]
    return output, pooling.empty(shape, input, channels_last, pooling.tap_dtype(longest[0] * longest[1]))


def adaptive_max_pool2d_forward(input, output_size, with_taps, backend):
    """Launch a kernel on an input of any strides; returns the output and its taps (of size 0 unless with_taps)."""
    from fastcnn.kernels.triton.adaptive_max_pool2d import (
        adaptive_max_pool2d_forward_kernel,
        global_max_pool2d_forward_kernel,
    )

    output, taps = _empty_outputs(input, output_size, with_taps)
    if output.numel() == 0:
        return output, taps
    channels_last = pooling.follows_channels_last(input)
    x, y = pooling.batched(input), pooling.batched(output)
    (h, w), (p, q) = x.shape[2:], output_size
    int64 = pooling.parts_exceed_int32((x, y), x.shape, output_size)
    with common.device_guard(input):
        if (p, q) == (1, 1):
            grid, arguments = pooling.global_launch_arguments(x.shape, channels_last)
            global_max_pool2d_forward_kernel[grid](
                x, y, taps, *x.stride(), H=h, W=w, STORE_TAP=with_taps, INT64=int64, **arguments
            )
        else:
            grid, arguments = pooling.launch_arguments(y.shape, channels_last)
            adaptive_max_pool2d_forward_kernel[grid](
                x, y, taps, *x.stride(), H=h, W=w, P=p, Q=q, max_r=pooling.longest_part(p, h),
                max_s=pooling.longest_part(q, w), STORE_TAP=with_taps, INT64=int64, **arguments,
            )  # fmt: skip
    return output, taps


def adaptive_max_pool2d_backward(grad_output, taps, input_shape, channels_last, backend):
    """grad_input in the layout that the output had."""
    from fastcnn.kernels.triton.adaptive_max_pool2d import adaptive_max_pool2d_backward_kernel

    grad_input = pooling.empty(input_shape, grad_output, channels_last)
    if grad_output.numel() == 0 or grad_input.numel() == 0:
        return grad_input.zero_()
    dy, dx = pooling.as_dense(grad_output, channels_last), pooling.batched(grad_input)
    (h, w), (p, q) = dx.shape[2:], dy.shape[2:]
    grid, arguments = pooling.launch_arguments(dx.shape, channels_last)
    with common.device_guard(dy):
        adaptive_max_pool2d_backward_kernel[grid](
            dy, taps, dx, H=h, W=w, P=p, Q=q, max_s=pooling.longest_part(q, w),
            cover_h=pooling.longest_part(h, p), cover_w=pooling.longest_part(w, q),
            INT64=pooling.parts_exceed_int32((dy, dx), dx.shape, (p, q)), **arguments,
        )  # fmt: skip
    return grad_input


_forward = common.register(
    "adaptive_max_pool2d(Tensor input, SymInt[] output_size, bool with_taps, str backend) -> (Tensor, Tensor)",
    adaptive_max_pool2d_forward,
    lambda input, output_size, with_taps, backend: _empty_outputs(input, output_size, with_taps),
)
_backward = common.register(
    "adaptive_max_pool2d_backward(Tensor grad_output, Tensor taps, SymInt[] input_shape, bool channels_last, "
    "str backend) -> Tensor",
    adaptive_max_pool2d_backward,
    lambda grad_output, taps, input_shape, channels_last, *_: pooling.empty(input_shape, grad_output, channels_last),
)


def _flat_indices(taps, height, width):
    """Taps as torch's indices: row * width + column of each maximum in its plane, int64."""
    p, q = taps.shape[-2:]
    step = pooling.longest_part(q, width)
    top = torch.arange(p, device=taps.device)[:, None] * height // p
    left = torch.arange(q, device=taps.device) * width // q
    tap = taps.long()
    return pooling.flat_indices(taps, top + tap.div(step, rounding_mode="floor"), left + tap.remainder(step), width)


class AdaptiveMaxPool2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, output_size, backend):
        output, taps = _forward(input, output_size, True, backend)
        ctx.save_for_backward(taps)
        ctx.arguments = (input.shape, pooling.follows_channels_last(input), backend)
        ctx.mark_non_differentiable(taps)
        ctx.set_materialize_grads(False)
        return output, taps

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return None, None, None
        (taps,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            grad_input = AdaptiveMaxPool2dBackwardFunction.apply(grad_output, taps, *ctx.arguments)
        else:
            grad_input = _backward(grad_output, taps, *ctx.arguments)
        return grad_input, None, None


class AdaptiveMaxPool2dBackwardFunction(torch.autograd.Function):
    """The backward as a linear function of grad_output, for second derivatives: its transpose picks by index."""

    @staticmethod
    def forward(ctx, grad_output, taps, input_shape, channels_last, backend):
        ctx.save_for_backward(taps)
        ctx.size = input_shape[-2:]
        return _backward(grad_output, taps, input_shape, channels_last, backend)

    @staticmethod
    def backward(ctx, grad):
        (taps,) = ctx.saved_tensors
        return pooling.pick(grad, _flat_indices(taps, *ctx.size)), None, None, None, None


def adaptive_max_pool2d(input, output_size, return_indices=False):
    """The maximum of each of P x Q parts of the image. As torch.nn.functional.adaptive_max_pool2d.

    Args:
        input: [N, C, H, W] or [C, H, W]; the batch may be empty, nothing else.
        output_size: int or pair (P, Q); None in a pair keeps that size of the input. May exceed the input.
        return_indices: also return where in its plane each maximum lies.

    Returns:
        [N, C, P, Q] or [C, P, Q] in the input's dtype and layout; with return_indices also int64 indices of that
        shape. NaN propagates; of equal values the first wins.

    Raises:
        TypeError, ValueError: an argument that torch refuses; the message names it.
    """
    common.check_tensor("input", input, (3, 4))
    if 0 in input.shape[-3:]:
        raise ValueError(f"input must have channels, rows and columns, got shape {tuple(input.shape)}")
    size = pooling.parts("output_size", output_size, input)
    if not isinstance(return_indices, bool):
        raise TypeError(f"return_indices must be a bool, got {return_indices!r}")
    backend = OP.route(input, lambda candidate: _why_not(candidate, input))
    if backend == "torch":
        return F.adaptive_max_pool2d(input, output_size, return_indices)
    if torch.is_grad_enabled() and input.requires_grad:
        output, taps = AdaptiveMaxPool2dFunction.apply(input, size, backend)
    else:
        output, taps = _forward(input, size, return_indices, backend)
    if return_indices:
        return output, _flat_indices(taps, *input.shape[-2:])
    return output
