"""lp_pool2d: y[n,c,p,q] = (sum over r, s of x[n, c, p*stride + r, q*stride + s]^norm_type)^(1 / norm_type).

x [N, C, H, W] or [C, H, W] -> y [N, C, P, Q] or [C, P, Q]. Saved for backward: x and y, where torch keeps x, its powers
and five tensors of y's size. The backward is a gather in fixed order, so it is deterministic:
dx = x^(norm_type - 1) * sum over the windows of dy * y^(1 - norm_type), and 0 from a window whose sum is 0.
Counterpart: torch.nn.functional.lp_pool2d.
"""

import torch
import torch.nn.functional as F

from fastcnn.backends import Op
from fastcnn.ops import common, pooling
from fastcnn.ops.max_pool2d import max_pool2d

OP = Op(
    "lp_pool2d",
    cpu_kernel=False,
    cpu_auto=False,
    why="there is no CPU kernel: PyTorch's ops run",
)


def lp_pool2d_reference(input, norm_type, kernel_size, stride=None, ceil_mode=False):
    """The norm of every window, in plain PyTorch."""
    return F.lp_pool2d(input, norm_type, kernel_size, stride, ceil_mode)


def _why_not(backend, input):
    if input.dtype not in common.FLOATS:
        return f"lp_pool2d has kernels for floating-point tensors and got {input.dtype}"
    return None


def _empty_output(input, norm_type, window, ceil_mode, *_):
    shape = (*input.shape[:-2], *pooling.output_size(input.shape[-2:], window, ceil_mode))
    return pooling.empty(shape, input, pooling.follows_channels_last(input))


def _meta(norm_type, window):
    names = ("R", "S", "STRIDE_H", "STRIDE_W")
    return dict(zip(names, window, strict=False), NORM=norm_type)


def lp_pool2d_forward(input, norm_type, window, ceil_mode, backend):
    """Launch the kernel on an input of any strides; returns the output."""
    from fastcnn.kernels.triton.lp_pool2d import lp_pool2d_forward_kernel

    output = _empty_output(input, norm_type, window, ceil_mode)
    if output.numel() == 0:
        return output
    x, y = pooling.batched(input), pooling.batched(output)
    grid, arguments = pooling.launch_arguments(y.shape, pooling.follows_channels_last(input), pooling.tile(input.dtype))
    with common.device_guard(input):
        lp_pool2d_forward_kernel[grid](
            x, y, *x.stride(), H=x.shape[2], W=x.shape[3], P=y.shape[2], Q=y.shape[3], **_meta(norm_type, window),
            UNROLL=window[0] * window[1] <= 25, INT64=common.exceeds_int32(x, y), **arguments,
        )  # fmt: skip
    return output


def lp_pool2d_backward(grad_output, input, output, norm_type, window, backend):
    """grad_input in the layout that the output had."""
    from fastcnn.kernels.triton.lp_pool2d import lp_pool2d_backward_kernel

    channels_last = pooling.follows_channels_last(input)
    grad_input = pooling.empty(input.shape, grad_output, channels_last)
    if grad_input.numel() == 0:
        return grad_input
    dy, y = (pooling.as_dense(tensor, channels_last) for tensor in (grad_output, output))
    x, dx = pooling.batched(input), pooling.batched(grad_input)
    # a window's extent over its step: how many windows can cover one pixel
    cover_h, cover_w = ((window[i] - 1) // window[i + 2] + 1 for i in (0, 1))
    grid, arguments = pooling.launch_arguments(dx.shape, channels_last, pooling.tile(input.dtype))
    with common.device_guard(dy):
        lp_pool2d_backward_kernel[grid](
            dy, x, y, dx, *x.stride(), H=x.shape[2], W=x.shape[3], P=y.shape[2], Q=y.shape[3],
            **_meta(norm_type, window), COVER_H=cover_h, COVER_W=cover_w, UNROLL=cover_h * cover_w <= 9,
            INT64=common.exceeds_int32(x, dy, dx), **arguments,
        )  # fmt: skip
    return grad_input


_forward = common.register(
    "lp_pool2d(Tensor input, float norm_type, int[] window, bool ceil_mode, str backend) -> Tensor",
    lp_pool2d_forward,
    _empty_output,
)
_backward = common.register(
    "lp_pool2d_backward(Tensor grad_output, Tensor input, Tensor output, float norm_type, int[] window, str backend) "
    "-> Tensor",
    lp_pool2d_backward,
    lambda grad_output, input, *_: pooling.empty(input.shape, grad_output, pooling.follows_channels_last(input)),
)


class LPPool2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, norm_type, window, ceil_mode, backend):
        output = _forward(input, norm_type, window, ceil_mode, backend)
        ctx.save_for_backward(input, output)
        ctx.arguments = (norm_type, window, ceil_mode, backend)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        input, output = ctx.saved_tensors
        norm_type, window, ceil_mode, backend = ctx.arguments
        if torch.is_grad_enabled():

            def reference(x):
                return lp_pool2d_reference(x, norm_type, window[:2], window[2:4], ceil_mode)

            (grad_input,) = common.differentiable_grads(reference, [input], grad_output, [True])
        else:
            grad_input = _backward(grad_output, input, output, norm_type, window, backend)
        return grad_input, None, None, None, None


def lp_pool2d(input, norm_type, kernel_size, stride=None, ceil_mode=False):
    """The norm of every window, without absolute values. As torch.nn.functional.lp_pool2d.

    Args:
        input: [N, C, H, W] or [C, H, W]; the batch may be empty, nothing else.
        norm_type: int or float but 0. 1 sums; inf and -inf take the largest and smallest absolute value. A negative
            sum has no other root than the first: NaN.
        kernel_size, stride: int or pair; stride None means kernel_size.
        ceil_mode: round the output size up; a window over the image's end counts as if it were whole.

    Returns:
        [N, C, P, Q] or [C, P, Q] in the input's dtype and layout; sums in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument that torch refuses; the message names it.
    """
    window = pooling.window(input, kernel_size, stride, 0, 1, ceil_mode)
    if isinstance(norm_type, bool) or not isinstance(norm_type, (int, float)):
        raise TypeError(f"norm_type must be an int or a float, got {norm_type!r}")
    if norm_type == 0 or norm_type != norm_type:
        raise ValueError(f"norm_type must be a number other than 0, got {norm_type!r}")
    if norm_type == float("inf"):
        return max_pool2d(input.abs(), kernel_size, stride, 0, 1, ceil_mode)
    if norm_type == -float("inf"):
        return -max_pool2d(-input.abs(), kernel_size, stride, 0, 1, ceil_mode)
    backend = OP.route(input, lambda candidate: _why_not(candidate, input))
    if backend == "torch":
        return F.lp_pool2d(input, norm_type, kernel_size, stride, ceil_mode)
    return LPPool2dFunction.apply(input, float(norm_type), window, ceil_mode, backend)
