"""Depthwise conv2d: y[n, k, p, q] = bias[k] + sum over r, s of x[n, k // M, h, w] * w[k, 0, r, s], with

h = p * stride - padding + r * dilation, w = q * stride - padding + s * dilation, and x = 0 outside the image.

x [N, C, H, W], w [K, 1, R, S], y [N, K, P, Q]; M = K / C filters per channel; any strides. There is no sum over
channels: a memory copy with R * S multiply-adds per element, on vector units. Saved for backward: x and w. Torch
counterpart: torch.nn.functional.conv2d with groups = C, which is how it is called: `conv2d` comes here by itself.
Source: Sifre and Mallat 2014; Howard et al. 2017 (MobileNets).

The host functions of both backends (depthwise_conv2d_launch, depthwise_conv2d_cpu) take what the fused chain needs,
too. As in conv2d, padding is (top, left).

Kernels that slide meet the zeros of the padding: where a channel holds an Inf or NaN, at an image's border more of its
own values may be NaN than in PyTorch, and more taps of a filter's gradient that is not finite either way.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastcnn.backends import Op
from fastcnn.ops import common
from fastcnn.ops.conv_layout import empty_grad_weight, empty_image, padded_reference, suggests_channels_last

op = Op(
    "depthwise_conv2d",
    cpu_kernel=True,
    cpu_auto=True,
    why="forward runs on PyTorch; both gradients of 5x5 windows, and of 3x3 in large channels_last images, in numba",
)


class Gradients(NamedTuple):
    """What backward gives; None what was not asked for."""

    input: torch.Tensor | None  # [N, C, H, W]
    weight: torch.Tensor | None  # as the weight, with its strides
    bias: torch.Tensor | None  # [K]
    sums: torch.Tensor | None  # [S, 2, C]: with pending those of du * x and of du, in S parts


def is_depthwise(weight, groups):
    """Whether a convolution with this weight and so many groups is one."""
    return groups > 1 and weight.shape[1] == 1


def depthwise_conv2d_reference(input, weight, bias, size, stride, padding, dilation):
    """The same in plain PyTorch."""
    return padded_reference(input, weight, bias, size, stride, padding, dilation, input.shape[1])


def why_not(backend, input, weight):
    """None if the backend's kernels can, else the sentence why not."""
    if backend == "cpu":
        from fastcnn.ops import depthwise_conv2d_cpu

        return depthwise_conv2d_cpu.why_not(input, weight)
    if input.dtype not in common.FLOATS:
        return f"the convolution kernels take floating-point tensors and got {input.dtype}"
    return None


def pays_on_cpu(input, weight, stride, dilation, groups):
    """Whether "auto" takes our kernels for the gradients of this convolution of CPU tensors."""
    if not is_depthwise(weight, groups) or input.dim() != 4 or why_not("cpu", input, weight) is not None:
        return False
    strides, dilations = (value if isinstance(value, (tuple, list)) else (value, value) for value in (stride, dilation))
    return _kernels("cpu").pays(input, weight, strides, dilations)


def _kernels(backend):
    """The host functions of a backend."""
    if backend == "triton":
        from fastcnn.ops import depthwise_conv2d_launch

        return depthwise_conv2d_launch
    from fastcnn.ops import depthwise_conv2d_cpu

    return depthwise_conv2d_cpu


def _size_of(input, weight, stride, padding, dilation):
    """Of the output, where the far side has as much padding as the near one, as PyTorch has it."""
    sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return tuple((h + 2 * pad - dil * (r - 1) - 1) // step + 1 for h, r, step, pad, dil in sizes)


def depthwise_forward(input, weight, bias, size, stride, padding, dilation, channels_last, backend, **fused):
    """y [N, K, *size]. Backend "auto": PyTorch's forward pass, which is faster on CPU, where only gradients are ours.

    Args:
        fused: of both backends pending (conv_fusion.Pending, applied to input as it is loaded), shuffle (the
            convolution reads channel_shuffle(pending(input), shuffle)) and out (where y is written). Of Triton
            activation ((name, slope)), residual, pivot: as of conv2d.conv2d_forward. Of CPU statistics: with True,
            returns (y, mean, biased variance [K]).
    """
    if backend == "auto" and tuple(size) == _size_of(input, weight, stride, padding, dilation):
        y = F.conv2d(input, weight, bias, stride, padding, dilation, input.shape[1])
        return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return _kernels(backend).forward(input, weight, bias, size, stride, padding, dilation, channels_last, **fused)


def depthwise_backward(
    grad_output, input, weight, stride, padding, dilation, channels_last, needs, backend, **fused
):  # fmt: skip
    """Gradients; needs says of input, weight and bias whether it is wanted.

    Args:
        fused: correction (conv_fusion.Correction) and gated (conv_fusion.Gated, only with correction), applied to
            grad_output as it is loaded; pending and shuffle, as of depthwise_forward; add, a gradient that is added to
            that of the input, and which the sums are without.
    """
    return _kernels(backend).backward(
        grad_output, input, weight, stride, padding, dilation, channels_last, needs, **fused
    )  # fmt: skip


def _backward(grad_output, input, weight, stride, padding, dilation, channels_last, needs, backend):
    grads = depthwise_backward(grad_output, input, weight, stride, padding, dilation, channels_last, needs, backend)
    return tuple(input.new_empty(0) if grad is None else grad for grad in grads[:3])


def _fake_backward(grad_output, input, weight, stride, padding, dilation, channels_last, needs, backend):
    empty = lambda: input.new_empty(0)
    return (
        empty_image(input, input.shape[1], input.shape[2:], channels_last) if needs[0] else empty(),
        empty_grad_weight(weight) if needs[1] else empty(),
        input.new_empty(weight.shape[0]) if needs[2] else empty(),
    )


_geometry = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool channels_last"
forward_op = common.register(
    f"depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[] size, {_geometry}, str backend) -> Tensor",
    depthwise_forward,
    lambda input, weight, bias, size, stride, padding, dilation, channels_last, backend: empty_image(
        input, weight.shape[0], size, channels_last
    ),
)
backward_op = common.register(
    f"depthwise_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, {_geometry}, bool[] needs,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class DepthwiseConv2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, size, stride, padding, dilation, backend):
        """padding is (top, left); with size it says all."""
        ctx.save_for_backward(input, weight, bias)
        ctx.geometry = (stride, padding, dilation)
        ctx.size, ctx.backend = size, backend
        ctx.channels_last = suggests_channels_last(input) or suggests_channels_last(weight)
        return forward_op(input, weight, bias, size, *ctx.geometry, ctx.channels_last, backend)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        unused = (None,) * 5
        if torch.is_grad_enabled():
            reference = lambda *inputs: depthwise_conv2d_reference(*inputs, ctx.size, *ctx.geometry)
            return *common.differentiable_grads(reference, (input, weight, bias), grad_output, needs), *unused
        grads = backward_op(grad_output, input, weight, *ctx.geometry, ctx.channels_last, list(needs), ctx.backend)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *unused
