"""fractional_max_pool2d: y[n,c,p,q] = max over r < R, s < S of x[n, c, h(p) + r, w(q) + s], at random h and w.

h(p) = floor((p + u) * a) - floor(u * a) with a = (H - R) / (P - 1) and one u in [0, 1) per plane; the last window ends
with the image; columns alike. x [N, C, H, W] or [C, H, W] -> y [N, C, P, Q] or [C, P, Q]. Saved for backward: the two
random numbers of each plane, and which tap of its window each maximum came from, one byte per output (windows of up to
256 taps); neither x nor 64-bit indices. The backward is a gather in fixed order, so it is deterministic, which torch's
on CUDA is not. Counterpart: torch.nn.functional.fractional_max_pool2d. Source: Graham 2014, arXiv 1412.6071.
"""

import math

import torch
import torch.nn.functional as F

from fastcnn.backends import Op
from fastcnn.ops import common, pooling

OP = Op(
    "fractional_max_pool2d",
    cpu_kernel=False,
    cpu_auto=False,
    why="there is no CPU kernel: PyTorch's loops run",
)


def fractional_max_pool2d_reference(input, kernel_size, output_size, random_samples):
    """The maximum of every window, in plain PyTorch."""
    return F.fractional_max_pool2d(input, kernel_size, output_size, _random_samples=random_samples)


def _why_not(backend, input):
    if input.dtype not in common.FLOATS:
        return f"fractional_max_pool2d has kernels for floating-point tensors and got {input.dtype}"
    return None


def _empty_outputs(input, kernel_size, output_size, with_taps):
    shape = (*input.shape[:-2], *output_size)
    # torch's output is contiguous whatever the input is; ours follows it
    channels_last = pooling.follows_channels_last(input)
    output = pooling.empty(shape, input, channels_last)
    if not with_taps:
        return output, input.new_empty(0, dtype=torch.uint8)
    return output, pooling.empty(shape, input, channels_last, pooling.tap_dtype(kernel_size[0] * kernel_size[1]))


def fractional_max_pool2d_forward(input, samples, kernel_size, output_size, with_taps, backend):
    """Launch the kernel on an input of any strides; returns the output and its taps (of size 0 unless with_taps)."""
    from fastcnn.kernels.triton.fractional_max_pool2d import fractional_max_pool2d_forward_kernel

    output, taps = _empty_outputs(input, kernel_size, output_size, with_taps)
    if output.numel() == 0:
        return output, taps
    channels_last = pooling.follows_channels_last(input)
    x, y = pooling.batched(input), pooling.batched(output)
    grid, arguments = pooling.launch_arguments(y.shape, channels_last, pooling.tile(x.dtype))
    with common.device_guard(input):
        fractional_max_pool2d_forward_kernel[grid](
            x, samples.contiguous(), y, taps, *x.stride(), H=x.shape[2], W=x.shape[3], P=y.shape[2], Q=y.shape[3],
            R=kernel_size[0], S=kernel_size[1], STORE_TAP=with_taps, INT64=common.exceeds_int32(x, y), **arguments,
        )  # fmt: skip
    return output, taps


def _cover(size, window, out):
    """How many neighbouring windows to look at for those over one pixel: each begins less than 1 from its mean place,
    and the division that finds the first of them is rounded."""
    return min(out, math.ceil((window + 2) * max(out - 1, 1) / max(size - window, 1)) + 2)


def fractional_max_pool2d_backward(grad_output, samples, taps, input_shape, channels_last, kernel_size, backend):
    """grad_input in the layout that the output had."""
    from fastcnn.kernels.triton.fractional_max_pool2d import fractional_max_pool2d_backward_kernel

    grad_input = pooling.empty(input_shape, grad_output, channels_last)
    if grad_input.numel() == 0:
        return grad_input
    dy, dx = pooling.as_dense(grad_output, channels_last), pooling.batched(grad_input)
    (h, w), (p, q), (r, s) = dx.shape[2:], dy.shape[2:], kernel_size
    int64 = common.exceeds_int32(dy, dx)
    grid, arguments = pooling.launch_arguments(dx.shape, channels_last, pooling.tile(dx.dtype, int64))
    with common.device_guard(dy):
        fractional_max_pool2d_backward_kernel[grid](
            dy, samples.contiguous(), taps, dx, H=h, W=w, P=p, Q=q, cover_h=_cover(h, r, p), cover_w=_cover(w, s, q),
            R=r, S=s, INT64=int64, **arguments,
        )  # fmt: skip
    return grad_input


_forward = common.register(
    "fractional_max_pool2d(Tensor input, Tensor samples, int[] kernel_size, SymInt[] output_size, bool with_taps, "
    "str backend) -> (Tensor, Tensor)",
    fractional_max_pool2d_forward,
    lambda input, samples, kernel, size, with_taps, backend: _empty_outputs(input, kernel, size, with_taps),
)
_backward = common.register(
    "fractional_max_pool2d_backward(Tensor grad_output, Tensor samples, Tensor taps, SymInt[] input_shape, "
    "bool channels_last, int[] kernel_size, str backend) -> Tensor",
    fractional_max_pool2d_backward,
    lambda grad_output, samples, taps, shape, channels_last, *_: pooling.empty(shape, grad_output, channels_last),
)


def _starts(sample, size, window, out):
    """Where the windows begin along one axis, [N, C, out], as the kernel finds it."""
    u = sample.to(torch.promote_types(sample.dtype, torch.float32))[..., None]
    step = u.new_full((), size - window) / u.new_full((), max(out - 1, 1))
    place = torch.arange(out, device=u.device, dtype=u.dtype)
    start = ((place + u) * step).long() - (u * step).long()
    start[..., -1:] = size - window
    return start


def _flat_indices(taps, samples, height, width, kernel_size):
    """Taps as torch's indices: row * width + column of each maximum in its plane, int64."""
    samples = samples if taps.dim() == 4 else samples[0]
    top = _starts(samples[..., 1], height, kernel_size[0], taps.shape[-2])[..., None]
    left = _starts(samples[..., 0], width, kernel_size[1], taps.shape[-1])[..., None, :]
    tap = taps.long()
    row = top + tap.div(kernel_size[1], rounding_mode="floor")
    return pooling.flat_indices(taps, row, left + tap.remainder(kernel_size[1]), width)


class FractionalMaxPool2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, samples, kernel_size, output_size, backend):
        output, taps = _forward(input, samples, kernel_size, output_size, True, backend)
        ctx.save_for_backward(samples, taps)
        ctx.arguments = (input.shape, pooling.follows_channels_last(input), kernel_size, backend)
        ctx.mark_non_differentiable(taps)
        ctx.set_materialize_grads(False)
        return output, taps

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return None, None, None, None, None
        if torch.is_grad_enabled():
            grad_input = FractionalMaxPool2dBackwardFunction.apply(grad_output, *ctx.saved_tensors, *ctx.arguments)
        else:
            grad_input = _backward(grad_output, *ctx.saved_tensors, *ctx.arguments)
        return grad_input, None, None, None, None


class FractionalMaxPool2dBackwardFunction(torch.autograd.Function):
    """The backward as a linear function of grad_output, for second derivatives: its transpose picks by index."""

    @staticmethod
    def forward(ctx, grad_output, samples, taps, input_shape, channels_last, kernel_size, backend):
        ctx.save_for_backward(samples, taps)
        ctx.arguments = (*input_shape[-2:], kernel_size)
        return _backward(grad_output, samples, taps, input_shape, channels_last, kernel_size, backend)

    @staticmethod
    def backward(ctx, grad):
        samples, taps = ctx.saved_tensors
        picked = pooling.pick(grad, _flat_indices(taps, samples, *ctx.arguments))
        return picked, None, None, None, None, None, None


def fractional_max_pool2d(
    input, kernel_size, output_size=None, output_ratio=None, return_indices=False, _random_samples=None
):
    """The maximum of windows at random steps. As torch.nn.functional.fractional_max_pool2d.

    Args:
        input: [N, C, H, W] or [C, H, W]; the batch may be empty, nothing else.
        kernel_size: int or pair, the window.
        output_size: int or pair (P, Q), at most the size of the input less the window plus 1.
        output_ratio: number or pair in (0, 1), instead of output_size: the output's size over the input's.
        return_indices: also return where in its plane each maximum lies.
        _random_samples: [N, C, 2] in [0, 1), the random numbers of each plane for columns and rows, in the input's
            dtype. Default: torch.rand, the numbers that torch would draw.

    Returns:
        [N, C, P, Q] or [C, P, Q] in the input's dtype; channels_last stays so, where torch forgets it. With
        return_indices also int64 indices of that shape. NaN propagates; of equal values the first wins.

    Raises:
        TypeError, ValueError: an argument that torch refuses; the message names it.
    """
    common.check_tensor("input", input, (3, 4))
    if 0 in input.shape[-3:]:
        raise ValueError(f"input must have channels, rows and columns, got shape {tuple(input.shape)}")
    if not isinstance(return_indices, bool):
        raise TypeError(f"return_indices must be a bool, got {return_indices!r}")
    kernel = list(common.pair("kernel_size", kernel_size, 1))
    size = _output_size(input, kernel, output_size, output_ratio)
    samples = _checked_samples(input, _random_samples)
    backend = OP.route(input, lambda candidate: _why_not(candidate, input))
    if backend == "torch":
        return F.fractional_max_pool2d(input, kernel, size, None, return_indices, samples)
    if torch.is_grad_enabled() and input.requires_grad:
        output, taps = FractionalMaxPool2dFunction.apply(input, samples, kernel, size, backend)
    else:
        output, taps = _forward(input, samples, kernel, size, return_indices, backend)
    if return_indices:
        return output, _flat_indices(taps, samples, *input.shape[-2:], kernel)
    return output


def _output_size(input, kernel, output_size, output_ratio):
    if output_size is None and output_ratio is None:
        raise ValueError("output_size or output_ratio must be given, got neither")
    if output_size is not None:
        size = common.pair("output_size", output_size, 1)
    else:
        ratio = tuple(output_ratio) if isinstance(output_ratio, (tuple, list)) else (output_ratio,) * 2
        if len(ratio) != 2 or not all(isinstance(r, (int, float)) and 0 < r <= 1 for r in ratio):
            raise ValueError(f"output_ratio must be a number or a pair of numbers in (0, 1), got {output_ratio!r}")
        size = [int(pixels * r) for pixels, r in zip(input.shape[-2:], ratio, strict=True)]
    for pixels, window, out in zip(input.shape[-2:], kernel, size, strict=True):
        if not 1 <= out <= pixels - window + 1:
            raise ValueError(
                f"an output of {tuple(size)} must have from 1 pixel to the input's size less kernel_size plus 1, got "
                f"an input of {tuple(input.shape[-2:])} and kernel_size {tuple(kernel)}"
            )
    return list(size)


def _checked_samples(input, samples):
    shape = (1 if input.dim() == 3 else input.shape[0], input.shape[-3], 2)
    if samples is None:
        return torch.rand(shape, dtype=input.dtype, device=input.device)
    common.check_tensor("_random_samples", samples)
    common.check_alike("_random_samples", samples, "input", input)
    if samples.shape != shape:
        raise ValueError(f"_random_samples must have shape {shape}, got {tuple(samples.shape)}")
    return samples
