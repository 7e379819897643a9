"""adaptive_avg_pool2d: y[n,c,p,q] = mean of x[n, c, floor(p*H/P) : ceil((p+1)*H/P), floor(q*W/Q) : ceil((q+1)*W/Q)].

x [N, C, H, W] or [C, H, W] -> y [N, C, P, Q] or [C, P, Q]. Saved for backward: nothing but the shape. The backward is
a gather in fixed order, so it is deterministic, which torch's on CUDA is not. Parts overlap where P does not divide H.
Counterpart: torch.nn.functional.adaptive_avg_pool2d.
"""

import torch
import torch.nn.functional as F

from fastcnn.backends import Op, current_backend
from fastcnn.ops import common, pooling

OP = Op(
    "adaptive_avg_pool2d",
    cpu_kernel=True,
    cpu_auto=True,
    why="global pooling with a backward from 2^23 elements: 1.7 to 2.1 times as fast as PyTorch, which runs the rest",
)


def adaptive_avg_pool2d_reference(input, output_size):
    """The mean of every part, in plain PyTorch."""
    return F.adaptive_avg_pool2d(input, output_size)


def _why_not(backend, input, output_size):
    if input.dtype not in common.FLOATS:
        return f"adaptive_avg_pool2d has kernels for floating-point tensors and got {input.dtype}"
    if backend == "cpu":
        if input.dtype not in (torch.float32, torch.float64):
            return f"the CPU kernel of adaptive_avg_pool2d takes float32 and float64 and got {input.dtype}"
        if output_size != [1, 1] or input.numel() == 0:
            return "the CPU kernel of adaptive_avg_pool2d is that of global pooling: elsewhere PyTorch was as fast"
        if current_backend() == "auto":
            if input.numel() < 2**23 or (pooling.follows_channels_last(input) and input.shape[1] < 32):
                return "below 2^23 elements, and in channels_last below 32 channels, PyTorch was measured as fast"
            if not (torch.is_grad_enabled() and input.requires_grad):
                return "without a backward PyTorch was measured as fast"
    return None


def _empty_output(input, output_size, *_):
    return pooling.empty((*input.shape[:-2], *output_size), input, pooling.follows_channels_last(input))


def adaptive_avg_pool2d_forward(input, output_size, backend, pending=(None, None, "none", 0.0)):
    """Launch a kernel on an input of any strides; returns the output.

    pending: (scale, shift, activation, slope) of the activation that the kernel of global pooling makes of the input.
    """
    if backend == "cpu":
        output = _empty_output(input, output_size)
        return torch.mean(input, (-2, -1), keepdim=True, out=output)
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
    int64 = pooling.parts_exceed_int32((x, y), x.shape, output_size)
    with common.device_guard(input):
        if tuple(output_size) == (1, 1):
            grid, arguments = pooling.global_launch_arguments(x.shape, channels_last)
            if x.dtype == torch.float64 and pending[2] != "none":
                # left alone, ptxas takes 80 registers for silu on sm_90, and spills
                arguments["maxnreg"] = 128
            global_avg_pool2d_forward_kernel[grid](
                x, *pending[:2], y, *x.stride(), H=h, W=w, ACTIVATION=pending[2], SLOPE=pending[3], INT64=int64,
                **arguments,
            )  # fmt: skip
        else:
            grid, arguments = pooling.launch_arguments(y.shape, channels_last)
            p, q = output_size
            adaptive_avg_pool2d_forward_kernel[grid](
                x, y, *x.stride(), H=h, W=w, P=p, Q=q, max_r=pooling.longest_part(p, h),
                max_s=pooling.longest_part(q, w), INT64=int64, **arguments,
            )  # fmt: skip
    return output


def adaptive_avg_pool2d_backward(grad_output, input_shape, channels_last, backend):
    """grad_input in the layout that the output had."""
    if backend == "cpu":
        from fastcnn.kernels.cpu import adaptive_avg_pool2d as kernels

        grad_input = pooling.empty(input_shape, grad_output, channels_last)
        kernel = kernels.global_avg_pool2d_backward
        if channels_last:
            kernel = kernels.global_avg_pool2d_backward_channels_last
        pooling.run_on_cpu(kernel, (grad_output,), (grad_input,), channels_last)
        return grad_input
    from fastcnn.kernels.triton.adaptive_avg_pool2d import adaptive_avg_pool2d_backward_kernel

    grad_input = pooling.empty(input_shape, grad_output, channels_last)
    if grad_output.numel() == 0 or grad_input.numel() == 0:
        return grad_input.zero_()
    dy, dx = pooling.as_dense(grad_output, channels_last), pooling.batched(grad_input)
    (h, w), (p, q) = dx.shape[2:], dy.shape[2:]
    grid, arguments = pooling.launch_arguments(dx.shape, channels_last)
    with common.device_guard(dy):
        adaptive_avg_pool2d_backward_kernel[grid](
            dy, dx, H=h, W=w, P=p, Q=q, cover_h=pooling.longest_part(h, p), cover_w=pooling.longest_part(w, q),
            INT64=pooling.parts_exceed_int32((dy, dx), dx.shape, (p, q)), **arguments,
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
    size = pooling.parts("output_size", output_size, input)
    backend = OP.route(input, lambda candidate: _why_not(candidate, input, size))
    if backend == "torch":
        return F.adaptive_avg_pool2d(input, output_size)
    return AdaptiveAvgPool2dFunction.apply(input, size, backend)
