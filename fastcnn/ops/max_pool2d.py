"""max_pool2d: y[n,c,p,q] = max over the window's taps (r, s) of x[n, c, p*stride - pad + r*dilation, ... + s*dilation].

x [N, C, H, W] or [C, H, W] -> y [N, C, P, Q] or [C, P, Q]. Saved for backward: which tap of its window each maximum
came from, one byte per output (windows of up to 256 taps); neither x nor 64-bit indices. The backward is a gather: each
input pixel asks the windows that cover it, in fixed order, so it is deterministic.
Counterpart: torch.nn.functional.max_pool2d.
"""

import torch
import torch.nn.functional as F

from fastcnn.backends import Op, current_backend
from fastcnn.ops import common, pooling

OP = Op(
    "max_pool2d",
    cpu_kernel=True,
    cpu_auto=True,
    why="from 2^16 elements (channels_last 2^20) 1.3 to 3 times as fast as PyTorch; a fraction of the saved bytes",
)


def max_pool2d_reference(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    """The maximum of every window, in plain PyTorch."""
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


def cpu_refusal(input, window):
    """None, or the sentence why the CPU kernels cannot."""
    if input.dtype not in (torch.float32, torch.float64):
        return f"the CPU kernel of max_pool2d takes float32 and float64 and got {input.dtype}"
    # such a window can step over the image: no tap inside, and no place for its gradient
    if any(dilation > size for dilation, size in zip(window[6:], input.shape[-2:], strict=True)):
        return f"the CPU kernel of max_pool2d needs a dilation within the image and got {tuple(window[6:])}"
    return None


def _why_not(backend, input, window):
    if input.dtype not in common.FLOATS:
        return f"max_pool2d has kernels for floating-point tensors and got {input.dtype}"
    if backend == "cpu":
        refusal = cpu_refusal(input, window)
        if refusal is not None:
            return refusal
        if current_backend() == "auto":
            least = (2**18 if window[3] == 1 else 2**20) if pooling.follows_channels_last(input) else 2**16
            if input.numel() < least:
                return f"below {least} elements in this layout PyTorch was measured faster"
    return None


def _empty_outputs(input, window, ceil_mode, with_taps):
    shape = (*input.shape[:-2], *pooling.output_size(input.shape[-2:], window, ceil_mode))
    channels_last = pooling.follows_channels_last(input)
    output = pooling.empty(shape, input, channels_last)
    if not with_taps:
        return output, input.new_empty(0, dtype=torch.uint8)
    return output, pooling.empty(shape, input, channels_last, pooling.tap_dtype(window[0] * window[1]))


def _meta(window):
    names = ("R", "S", "STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W", "DILATION_H", "DILATION_W")
    return dict(zip(names, window, strict=True))


def cells(shape, window):
    """What the backward over cells of as many pixels as the stride needs beside the window, by the kernel's names.

    None where it does not serve: strides above 2, dilation, more than 9 windows over one pixel.
    """
    cover_h, cover_w = (-(-window[i] // window[i + 2]) for i in (0, 1))
    if cover_h * cover_w > 9 or max(window[2:4]) > 2 or window[6:] != [1, 1]:
        return None
    # how many windows further, and further back, than the one of its own number can reach a cell
    after_h, after_w = ((window[i + 2] - 1 + window[i]) // window[i] for i in (2, 3))
    before_h, before_w = ((window[i] - 1 - window[i + 4]) // window[i + 2] for i in (0, 1))
    return dict(
        cells_h=-(-shape[-2] // window[2]), cells_w=-(-shape[-1] // window[3]),
        **dict(list(_meta(window).items())[:6]),
        BEFORE_H=before_h, BEFORE_W=before_w, AFTER_H=after_h, AFTER_W=after_w,
    )  # fmt: skip


def max_pool2d_forward(input, window, ceil_mode, with_taps, backend, pending=(None, None, "none", 0.0)):
    """Launch the kernel on an input of any strides; returns the output and its taps (of size 0 unless with_taps).

    pending: (scale, shift, activation, slope) of the activation that the Triton kernel makes of the input.
    """
    output, taps = _empty_outputs(input, window, ceil_mode, with_taps)
    if output.numel() == 0:
        return output, taps
    channels_last = pooling.follows_channels_last(input)
    if backend == "cpu":
        from fastcnn.kernels.cpu import max_pool2d as kernels

        kernel = kernels.max_pool2d_forward_channels_last if channels_last else kernels.max_pool2d_forward
        kept = taps if with_taps else torch.empty_like(output, dtype=pooling.tap_dtype(window[0] * window[1]))
        pooling.run_on_cpu(kernel, (input,), (output, kept), channels_last, *window)
        return output, taps
    from fastcnn.kernels.triton.max_pool2d import max_pool2d_forward_kernel

    x, y = pooling.batched(input), pooling.batched(output)
    grid, arguments = pooling.launch_arguments(y.shape, channels_last)
    with common.device_guard(input):
        max_pool2d_forward_kernel[grid](
            x, *pending[:2], y, taps, *x.stride(), H=x.shape[2], W=x.shape[3], P=y.shape[2], Q=y.shape[3],
            **_meta(window), ACTIVATION=pending[2], SLOPE=pending[3], STORE_TAP=with_taps,
            UNROLL=window[0] * window[1] <= 25, INT64=common.exceeds_int32(x, y), **arguments,
        )  # fmt: skip
    return output, taps


def max_pool2d_backward(grad_output, taps, input_shape, channels_last, window, backend):
    """grad_input in the layout that the output had."""
    grad_input = pooling.empty(input_shape, grad_output, channels_last)
    if grad_input.numel() == 0:
        return grad_input
    if backend == "cpu":
        from fastcnn.kernels.cpu import max_pool2d as kernels

        kernel = kernels.max_pool2d_backward_channels_last if channels_last else kernels.max_pool2d_backward
        side_by_side = (window[1] - 1) // window[3] + 1
        # below 32 channels the loops over them are too short
        if channels_last and side_by_side <= 3 and window[6:] == [1, 1] and input_shape[1] >= 32:
            kernel = kernels.max_pool2d_backward_gather
        pooling.run_on_cpu(kernel, (grad_output, taps), (grad_input,), channels_last, *window)
        return grad_input
    from fastcnn.kernels.triton.max_pool2d import max_pool2d_backward_cells_kernel, max_pool2d_backward_kernel

    dy, dx = pooling.as_dense(grad_output, channels_last), pooling.batched(grad_input)
    by_cell = cells(dx.shape, window)
    if by_cell is not None:
        shape = *dx.shape[:2], by_cell["cells_h"], by_cell["cells_w"]
        grid, arguments = pooling.launch_arguments(shape, channels_last)
        with common.device_guard(dy):
            max_pool2d_backward_cells_kernel[grid](
                dy, taps, dx, H=dx.shape[2], W=dx.shape[3], P=dy.shape[2], Q=dy.shape[3], **by_cell,
                INT64=common.exceeds_int32(dy, dx), **arguments,
            )  # fmt: skip
        return grad_input
    # a window's extent over its step: how many windows can cover one pixel
    cover_h, cover_w = ((window[i] - 1) * window[i + 6] // window[i + 2] + 1 for i in (0, 1))
    grid, arguments = pooling.launch_arguments(dx.shape, channels_last)
    with common.device_guard(dy):
        max_pool2d_backward_kernel[grid](
            dy, taps, dx, H=dx.shape[2], W=dx.shape[3], P=dy.shape[2], Q=dy.shape[3], **_meta(window),
            COVER_H=cover_h, COVER_W=cover_w, UNROLL=cover_h * cover_w <= 16,
            INT64=common.exceeds_int32(dy, dx), **arguments,
        )  # fmt: skip
    return grad_input


_forward = common.register(
    "max_pool2d(Tensor input, int[] window, bool ceil_mode, bool with_taps, str backend) -> (Tensor, Tensor)",
    max_pool2d_forward,
    lambda input, window, ceil_mode, with_taps, backend: _empty_outputs(input, window, ceil_mode, with_taps),
)
_backward = common.register(
    "max_pool2d_backward(Tensor grad_output, Tensor taps, SymInt[] input_shape, bool channels_last, int[] window, "
    "str backend) -> Tensor",
    max_pool2d_backward,
    lambda grad_output, taps, input_shape, channels_last, *_: pooling.empty(input_shape, grad_output, channels_last),
)


def _flat_indices(taps, width, window):
    """Taps as torch's indices: row * width + column of each maximum in its plane, int64."""
    _, s, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = window
    tap = taps.long()
    p = torch.arange(taps.shape[-2], device=taps.device)[:, None]
    q = torch.arange(taps.shape[-1], device=taps.device)
    h = p * stride_h - pad_h + tap.div(s, rounding_mode="floor") * dilation_h
    w = q * stride_w - pad_w + tap.remainder(s) * dilation_w
    return pooling.flat_indices(taps, h, w, width)


class MaxPool2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, window, ceil_mode, backend):
        output, taps = _forward(input, window, ceil_mode, True, backend)
        ctx.save_for_backward(taps)
        ctx.arguments = (input.shape, pooling.follows_channels_last(input), window, backend)
        ctx.mark_non_differentiable(taps)
        ctx.set_materialize_grads(False)
        return output, taps

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return None, None, None, None
        (taps,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            grad_input = MaxPool2dBackwardFunction.apply(grad_output, taps, *ctx.arguments)
        else:
            grad_input = _backward(grad_output, taps, *ctx.arguments)
        return grad_input, None, None, None


class MaxPool2dBackwardFunction(torch.autograd.Function):
    """The backward as a linear function of grad_output, for second derivatives: its transpose picks by index."""

    @staticmethod
    def forward(ctx, grad_output, taps, input_shape, channels_last, window, backend):
        ctx.save_for_backward(taps)
        ctx.arguments = (input_shape[-1], window)
        return _backward(grad_output, taps, input_shape, channels_last, window, backend)

    @staticmethod
    def backward(ctx, grad):
        (taps,) = ctx.saved_tensors
        return pooling.pick(grad, _flat_indices(taps, *ctx.arguments)), None, None, None, None, None


def max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """The maximum of every window. As torch.nn.functional.max_pool2d.

    Args:
        input: [N, C, H, W] or [C, H, W]; the batch may be empty, nothing else.
        kernel_size, stride, padding, dilation: int or pair; stride None means kernel_size. Padding counts as -inf and
            is at most half of the kernel.
        ceil_mode: round the output size up, if the added window begins inside the image or the padding before it.
        return_indices: also return where in its plane each maximum lies.

    Returns:
        [N, C, P, Q] or [C, P, Q] in the input's dtype and layout; with return_indices also int64 indices of that
        shape. NaN propagates; of equal values the first wins.

    Raises:
        TypeError, ValueError: an argument that torch refuses; the message names it.
    """
    window = pooling.window(input, kernel_size, stride, padding, dilation, ceil_mode)
    if not isinstance(return_indices, bool):
        raise TypeError(f"return_indices must be a bool, got {return_indices!r}")
    backend = OP.route(input, lambda candidate: _why_not(candidate, input, window))
    if backend == "torch":
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    if torch.is_grad_enabled() and input.requires_grad:
        output, taps = MaxPool2dFunction.apply(input, window, ceil_mode, backend)
    else:
        output, taps = _forward(input, window, ceil_mode, return_indices, backend)
    if return_indices:
        return output, _flat_indices(taps, input.shape[-1], window)
    return output
