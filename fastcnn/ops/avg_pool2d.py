"""avg_pool2d: y[n,c,p,q] = 1/divisor * sum over r, s of x[n, c, p*stride - pad + r, q*stride - pad + s].

x [N, C, H, W] or [C, H, W] -> y [N, C, P, Q] or [C, P, Q]. The divisor counts the window's pixels. Saved for backward:
nothing but the shape. The backward is a gather in fixed order, so it is deterministic.
Counterpart: torch.nn.functional.avg_pool2d.
"""

import torch
import torch.nn.functional as F

from fastcnn.backends import Op, current_backend
from fastcnn.ops import common, pooling

OP = Op(
    "avg_pool2d",
    cpu_kernel=True,
    cpu_auto=True,
    why="large tensors, windows 2x2 stride 2 and 3x3: 1.1 to 2.3 times as fast as PyTorch, which runs the rest",
)


def avg_pool2d_reference(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    """The mean of every window, in plain PyTorch."""
    return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _why_not(backend, input, window):
    if input.dtype not in common.FLOATS:
        return f"avg_pool2d has kernels for floating-point tensors and got {input.dtype}"
    if backend == "cpu":
        if input.dtype not in (torch.float32, torch.float64):
            return f"the CPU kernel of avg_pool2d takes float32 and float64 and got {input.dtype}"
        if current_backend() == "auto":
            least = _least_elements(input, window)
            if least is None:
                return "PyTorch was measured as fast but for windows of 2x2 and 3x3, and partly in channels_last"
            if input.numel() < least:
                return f"below {least} elements in this layout and window PyTorch was measured as fast"
    return None


def _least_elements(input, window):
    """From how many elements on our kernels were measured faster on CPU; None for never."""
    square = window[0] if window[0] == window[1] and window[2] == window[3] else None
    if (square, window[2]) not in ((2, 2), (3, 1), (3, 2)):
        return None
    if not pooling.follows_channels_last(input):
        return 2**17
    if input.shape[1] < 32:
        return None
    if window[2] == 1:
        return 2**18
    # forward alone PyTorch is as fast
    return 2**21 if torch.is_grad_enabled() and input.requires_grad else None


def _meta(window, count_include_pad, divisor_override):
    names = ("R", "S", "STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W")
    meta = dict(zip(names, window, strict=False))
    override = divisor_override is not None
    return dict(meta, COUNT_PAD=count_include_pad, OVERRIDE=override, divisor=divisor_override if override else 1)


def _empty_output(input, window, ceil_mode, *_):
    shape = (*input.shape[:-2], *pooling.output_size(input.shape[-2:], window, ceil_mode))
    return pooling.empty(shape, input, pooling.follows_channels_last(input))


def avg_pool2d_forward(input, window, ceil_mode, count_include_pad, divisor_override, backend):
    """Launch the kernel on an input of any strides; returns the output."""
    output = _empty_output(input, window, ceil_mode)
    if output.numel() == 0:
        return output
    channels_last = pooling.follows_channels_last(input)
    if backend == "cpu":
        from fastcnn.kernels.cpu import avg_pool2d as kernels

        kernel = kernels.avg_pool2d_forward_channels_last if channels_last else kernels.avg_pool2d_forward
        pooling.run_on_cpu(
            kernel, (input,), (output,), channels_last, *window[:6], count_include_pad, divisor_override or 0
        )
        return output
    from fastcnn.kernels.triton.avg_pool2d import avg_pool2d_forward_kernel

    x, y = pooling.batched(input), pooling.batched(output)
    grid, arguments = pooling.launch_arguments(y.shape, channels_last)
    with common.device_guard(input):
        avg_pool2d_forward_kernel[grid](
            x, y, *x.stride(), H=x.shape[2], W=x.shape[3], P=y.shape[2], Q=y.shape[3],
            **_meta(window, count_include_pad, divisor_override),
            UNROLL=window[0] * window[1] <= 25, INT64=common.exceeds_int32(x, y), **arguments,
        )  # fmt: skip
    return output


def avg_pool2d_backward(grad_output, input_shape, channels_last, window, count_include_pad, divisor_override, backend):
    """grad_input in the layout that the output had."""
    grad_input = pooling.empty(input_shape, grad_output, channels_last)
    if grad_input.numel() == 0:
        return grad_input
    if backend == "cpu":
        from fastcnn.kernels.cpu import avg_pool2d as kernels

        kernel = kernels.avg_pool2d_backward_channels_last if channels_last else kernels.avg_pool2d_backward
        pooling.run_on_cpu(
            kernel, (grad_output,), (grad_input,), channels_last, *window[:6], count_include_pad, divisor_override or 0
        )
        return grad_input
    from fastcnn.kernels.triton.avg_pool2d import avg_pool2d_backward_kernel

    dy, dx = pooling.as_dense(grad_output, channels_last), pooling.batched(grad_input)
    # a window's extent over its step: how many windows can cover one pixel
    cover_h, cover_w = ((window[i] - 1) // window[i + 2] + 1 for i in (0, 1))
    grid, arguments = pooling.launch_arguments(dx.shape, channels_last)
    with common.device_guard(dy):
        avg_pool2d_backward_kernel[grid](
            dy, dx, H=dx.shape[2], W=dx.shape[3], P=dy.shape[2], Q=dy.shape[3],
            **_meta(window, count_include_pad, divisor_override),
            COVER_H=cover_h, COVER_W=cover_w, UNROLL=cover_h * cover_w <= 16,
            INT64=common.exceeds_int32(dy, dx), **arguments,
        )  # fmt: skip
    return grad_input


_forward = common.register(
    "avg_pool2d(Tensor input, int[] window, bool ceil_mode, bool count_include_pad, int? divisor_override, "
    "str backend) -> Tensor",
    avg_pool2d_forward,
    _empty_output,
)
_backward = common.register(
    "avg_pool2d_backward(Tensor grad_output, SymInt[] input_shape, bool channels_last, int[] window, "
    "bool count_include_pad, int? divisor_override, str backend) -> Tensor",
    avg_pool2d_backward,
    lambda grad_output, input_shape, channels_last, *_: pooling.empty(input_shape, grad_output, channels_last),
)


class AvgPool2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, window, ceil_mode, *rest):
        ctx.arguments = (input.shape, pooling.follows_channels_last(input), window, *rest)
        ctx.ceil_mode = ceil_mode
        return _forward(input, window, ceil_mode, *rest)

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():
            grad_input = AvgPool2dBackwardFunction.apply(grad_output, ctx.ceil_mode, *ctx.arguments)
        else:
            grad_input = _backward(grad_output, *ctx.arguments)
        return grad_input, None, None, None, None, None


class AvgPool2dBackwardFunction(torch.autograd.Function):
    """The backward as a linear function of grad_output, for second derivatives: its transpose is the pooling itself."""

    @staticmethod
    def forward(ctx, grad_output, ceil_mode, input_shape, channels_last, window, *rest):
        ctx.arguments = (window, ceil_mode, *rest)
        return _backward(grad_output, input_shape, channels_last, window, *rest)

    @staticmethod
    def backward(ctx, grad):
        return AvgPool2dFunction.apply(grad, *ctx.arguments), None, None, None, None, None, None, None


def avg_pool2d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    """The mean of every window. As torch.nn.functional.avg_pool2d.

    Args:
        input: [N, C, H, W] or [C, H, W]; the batch may be empty, nothing else.
        kernel_size, stride, padding: int or pair; stride None means kernel_size. Padding counts as 0 and is at most
            half of the kernel.
        ceil_mode: round the output size up, if the added window begins inside the image or the padding before it.
        count_include_pad: whether padding counts in the divisor; what ceil_mode adds beyond the padding never does.
        divisor_override: an int to divide by instead of the number of pixels.

    Returns:
        [N, C, P, Q] or [C, P, Q] in the input's dtype and layout; sums in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument that torch refuses; the message names it.
    """
    window = pooling.window(input, kernel_size, stride, padding, 1, ceil_mode)
    if not isinstance(count_include_pad, bool):
        raise TypeError(f"count_include_pad must be a bool, got {count_include_pad!r}")
    if divisor_override is not None:
        if isinstance(divisor_override, bool) or not isinstance(divisor_override, int):
            raise TypeError(f"divisor_override must be an int or None, got {divisor_override!r}")
        if divisor_override == 0:
            raise ValueError("divisor_override must not be 0")
    backend = OP.route(input, lambda candidate: _why_not(candidate, input, window))
    if backend == "torch":
        return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return AvgPool2dFunction.apply(input, window, ceil_mode, count_include_pad, divisor_override, backend)
