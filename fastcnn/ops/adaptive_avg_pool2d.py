"""adaptive_avg_pool2d: y[n,c,p,q] = mean of x[n, c, floor(p*H/P) : ceil((p+1)*H/P), floor(q*W/Q) : ceil((q+1)*W/Q)].

x [N, C, H, W] or [C, H, W] -> y [N, C, P, Q] or [C, P, Q]. Saved for backward: nothing but the shape. The backward is
a gather in fixed order, so it is deterministic, which torch's on CUDA is not. Parts overlap where P does not divide H.
Counterpart: torch.nn.functional.adaptive_avg_pool2d.
"""

import torch
import torch.nn.functional as F

from fastcnn.backends import Op
from fastcnn.ops import common, pooling

OP = Op(
    "adaptive_avg_pool2d",
    cpu_kernel=False,
    cpu_auto=False,
    why="PyTorch's loops were measured up to twice as fast as a numba kernel, and slower only from 60x60 to 6x6",
)


def adaptive_avg_pool2d_reference(input, output_size):
    """The mean of every part, in plain PyTorch."""
    return F.adaptive_avg_pool2d(input, output_size)


def _why_not(backend, input):
    if input.dtype not in common.FLOATS:
        return f"adaptive_avg_pool2d has kernels for floating-point tensors and got {input.dtype}"
    return None


def _empty_output(input, output_size, *_):
    return pooling.empty((*input.shape[:-2], *output_size), input, pooling.follows_channels_last(input))


def _longest(parts, size):
    """A bound on the pixels in the longest of so many parts of `size` pixels; exact where they divide."""
    return size // parts if size % parts == 0 else min(size, size // parts + 2)


def _exceeds_int32(tensors, shape, output_size):
    return common.exceeds_int32(*tensors) or any(
        (size + 1) * (out + 1) >= 2**31 for size, out in zip(shape[-2:], output_size, strict=True)
    )


def adaptive_avg_pool2d_forward(input, output_size, backend):
    """Launch a kernel on an input of any strides; returns the output."""
    from fastcnn.kernels.triton.adaptive_avg_pool2d import (
        adaptive_avg_pool2d_forward_kernel,
        global_avg_pool2d_forward_kernel,
    )

    output = _empty_output(input, output_size)
    if output.numel() == 0:
        return output
    channels_last = pooling.follows_channels_last(input)
    x, y = pooling.batched(input), pooling.batched(output)
    h, w = x.shape[2:]
    int64 = _exceeds_int32((x, y), x.shape, output_size)
    with common.device_guard(input):
        if tuple(output_size) == (1, 1):
            # tiles of x, not of y: an image's or some planes' pixels are one program's work
            _, arguments = pooling.launch_arguments(x.shape, channels_last)
            n, c = x.shape[:2]
            if channels_last:
                arguments["rows"] = h * w
                grid = (n * -(-c // arguments["BLOCK_B"]),)
            else:
                grid = (-(-n * c // arguments["BLOCK_A"]),)
            global_avg_pool2d_forward_kernel[grid](x, y, *x.stride(), H=h, W=w, INT64=int64, **arguments)
        else:
            grid, arguments = pooling.launch_arguments(y.shape, channels_last)
            p, q = output_size
            adaptive_avg_pool2d_forward_kernel[grid](
                x,
                y,
                *x.stride(),
                H=h,
                W=w,
                P=p,
                Q=q,
                max_r=_longest(p, h),
                max_s=_longest(q, w),
                INT64=int64,
                **arguments,
            )
    return output


def adaptive_avg_pool2d_backward(grad_output, input_shape, channels_last, backend):
    """grad_input in the layout that the output had."""
    from fastcnn.kernels.triton.adaptive_avg_pool2d import adaptive_avg_pool2d_backward_kernel

    grad_input = pooling.empty(input_shape, grad_output, channels_last)
    if grad_output.numel() == 0 or grad_input.numel() == 0:
        return grad_input.zero_()
    dy, dx = pooling.as_dense(grad_output, channels_last), pooling.batched(grad_input)
    (h, w), (p, q) = dx.shape[2:], dy.shape[2:]
    grid, arguments = pooling.launch_arguments(dx.shape, channels_last)
    with common.device_guard(dy):
        adaptive_avg_pool2d_backward_kernel[grid](
            dy, dx, H=h, W=w, P=p, Q=q, cover_h=_longest(h, p), cover_w=_longest(w, q),
            INT64=_exceeds_int32((dy, dx), dx.shape, (p, q)), **arguments,
        )  # fmt: skip
    return grad_input


_forward = common.register(
    "adaptive_avg_pool2d(Tensor input, SymInt[] output_size, str backend) -> Tensor",
    adaptive_avg_pool2d_forward,
    _empty_output,
)
_backward = common.register(
    "adaptive_avg_pool2d_backward(Tensor grad_output, SymInt[] input_shape, bool channels_last, str backend) -> Tensor",
    adaptive_avg_pool2d_backward,
    lambda grad_output, input_shape, channels_last, *_: pooling.empty(input_shape, grad_output, channels_last),
)


class AdaptiveAvgPool2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, output_size, backend):
        ctx.arguments = (input.shape, pooling.follows_channels_last(input), backend)
        return _forward(input, output_size, backend)

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():
            grad_input = AdaptiveAvgPool2dBackwardFunction.apply(grad_output, *ctx.arguments)
        else:
            grad_input = _backward(grad_output, *ctx.arguments)
        return grad_input, None, None


class AdaptiveAvgPool2dBackwardFunction(torch.autograd.Function):
    """The backward as a linear function of grad_output, for second derivatives: its transpose is the pooling itself."""

    @staticmethod
    def forward(ctx, grad_output, input_shape, channels_last, backend):
        ctx.arguments = (grad_output.shape[-2:], backend)
        return _backward(grad_output, input_shape, channels_last, backend)

    @staticmethod
    def backward(ctx, grad):
        return AdaptiveAvgPool2dFunction.apply(grad, *ctx.arguments), None, None, None


def adaptive_avg_pool2d(input, output_size):
    """The mean of each of P x Q parts of the image. As torch.nn.functional.adaptive_avg_pool2d.

    Args:
        input: [N, C, H, W] or [C, H, W]; batch and channels may be empty.
        output_size: int or pair (P, Q); None in a pair keeps that size of the input. May exceed the input.

    Returns:
        [N, C, P, Q] or [C, P, Q] in the input's dtype and layout; sums in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument that torch refuses; the message names it.
    """
    common.check_tensor("input", input, (3, 4))
    if 0 in input.shape[-2:]:
        raise ValueError(f"input must have rows and columns, got shape {tuple(input.shape)}")
    size = output_size
    if isinstance(size, (tuple, list)):
        if len(size) != 2:
            raise ValueError(f"output_size must be an int or a pair, got {output_size!r}")
        size = [given if wanted is None else wanted for wanted, given in zip(size, input.shape[-2:], strict=True)]
    size = list(common.pair("output_size", size, 0))
    backend = OP.route(input, lambda candidate: _why_not(candidate, input))
    if backend == "torch":
        return F.adaptive_avg_pool2d(input, output_size)
    return AdaptiveAvgPool2dFunction.apply(input, size, backend)
