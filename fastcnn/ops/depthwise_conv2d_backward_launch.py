"""Launches of the depthwise convolution's backward kernels."""

from typing import NamedTuple

import torch

from fastcnn.ops import common
from fastcnn.ops import depthwise_conv2d_backward_sliding as sliding
from fastcnn.ops.conv2d_gather import kernel_strides, needs_int64
from fastcnn.ops.conv_layout import empty_grad_weight, empty_image
from fastcnn.ops.conv_sums import accumulator_dtype, sum_slabs
from fastcnn.ops.depthwise_conv2d import Gradients

# The general kernels: elements of a block, of which channels_last has so many channels; programs (eight on an SM of an
# H100), rows of partial sums (two for an SM), and steps of a loop that a program is worth
BLOCK, CHANNELS, PROGRAMS, ROWS, MIN_STEPS = 1024, 64, 1056, 264, 4
# taps of a filter row whose sums one program holds: registers allow no more of fp64
TAPS, TAPS_FP64 = 4, 2


def backward(
    grad_output, input, weight, stride, padding, dilation, channels_last, needs, *, correction=None, gated=None,
    pending=None, shuffle=1, add=None,
):  # fmt: skip
    """Gradients, as of depthwise_conv2d.depthwise_backward."""
    problem = _Problem.of(
        grad_output, input, weight, stride, padding, dilation, channels_last, correction, gated, pending, shuffle
    )  # fmt: skip
    with common.device_guard(input):
        if not sliding.can(problem):
            return _general(_corrected(problem), needs, add)
        if not sliding.corrects(problem):
            problem = _corrected(problem)
        return Gradients(*sliding.run(problem, needs, add))


class _Problem(NamedTuple):
    """What all kernels read, and how."""

    grad_output: torch.Tensor
    y: torch.Tensor | None  # of the correction or of the gate, with the strides of grad_output
    vectors: tuple  # a, b, c of the correction, gate, add, scale, shift of the gate; None what is not there
    input: torch.Tensor
    weight: torch.Tensor
    stride: tuple
    padding: tuple
    dilation: tuple
    channels_last: bool
    gated: tuple  # (activation, slope); (None, 0.0) without
    pending: object  # Pending or None
    shuffle: int

    @classmethod
    def of(
        cls, grad_output, input, weight, stride, padding, dilation, channels_last, correction, gated, pending, shuffle
    ):  # fmt: skip
        y = gated.y if gated is not None else correction.y if correction is not None else None
        if y is not None and y.stride() != grad_output.stride():
            # kernels read both at the same places
            y = y if common.is_dense(y) else y.contiguous()
            grad_output = common.with_strides_of(grad_output, y)
        vectors = (None,) * 3 if correction is None else correction[1:]
        vectors += (None,) * 4 if gated is None else gated[1:5]
        dense = lambda t: None if t is None else t.contiguous()
        if pending is not None:
            pending = pending._replace(scale=dense(pending.scale), shift=dense(pending.shift))
        how = (None, 0.0) if gated is None else (gated.activation, gated.slope)
        geometry = (tuple(stride), tuple(padding), tuple(dilation), channels_last)
        return cls(
            grad_output, y, tuple(map(dense, vectors)), input, weight, *geometry, how, pending, shuffle
        )  # fmt: skip

    @property
    def vectors_of_input(self):
        return (None, None) if self.pending is None else self.pending[:2]

    @property
    def constants(self):
        """Compile-time values of every kernel."""
        pending = self.pending
        return dict(
            STRIDE_H=self.stride[0],
            STRIDE_W=self.stride[1],
            PENDING=None if pending is None else pending.activation,
            PENDING_SLOPE=0.0 if pending is None else pending.slope,
        )


def _general(problem, needs, add):
    grad_input = sums = grad_weight = grad_bias = None
    if needs[0]:
        grad_input, sums = _general_input(problem, add)
    if needs[1] or needs[2]:
        grad_weight, grad_bias = _general_weight(problem, needs[2])
    return Gradients(grad_input, grad_weight if needs[1] else None, grad_bias, sums)


def _shares(pixels, tiles, block):
    """(programs that share the pixels, pixels of each); the order of summation hangs on sizes only."""
    steps = -(-pixels // block)
    count = max(1, min(-(-PROGRAMS // tiles), ROWS, -(-steps // MIN_STEPS)))
    share = max(1, -(-steps // count)) * block
    return max(1, -(-pixels // share)), share


def _block(image):
    """(pixels, channels) of a block: along memory."""
    channels = image.shape[1]
    most = BLOCK // 4 if image.dtype == torch.float64 else BLOCK
    across = min(CHANNELS, 1 << (channels - 1).bit_length()) if image.stride(1) == 1 else 1
    return most // across, across


def _corrected(problem):
    """The problem whose grad_output is what correction and gate make of this one's, in a pass of its own."""
    from fastcnn.kernels.triton.depthwise_conv2d_backward import depthwise_conv2d_corrected_kernel

    dy, (a, *_), (gated, slope) = problem.grad_output, problem.vectors, problem.gated
    if a is None and gated is None:
        return problem
    n, k, p, q = dy.shape
    out = empty_image(dy, k, (p, q), problem.channels_last)
    if dy.numel() > 0:
        block_m, block_k = _block(out)
        depthwise_conv2d_corrected_kernel[(-(-n * p * q // block_m) * -(-k // block_k),)](
            *(dy, problem.y, *problem.vectors, out, n * p * q, k, p, q),
            *kernel_strides(dy),
            *kernel_strides(out),
            GATED=gated,
            GATED_SLOPE=slope,
            INT64=needs_int64(n * p * q, dy, out),
            BLOCK_M=block_m,
            BLOCK_K=block_k,
        )
    return problem._replace(grad_output=out, y=None, vectors=(None,) * 7, gated=(None, 0.0))


def _general_input(problem, add):
    """grad_input and, with pending, its sums."""
    from fastcnn.kernels.triton.depthwise_conv2d_backward import depthwise_conv2d_backward_input_kernel

    dy, x, weight, pending = problem.grad_output, problem.input, problem.weight, problem.pending
    n, c, h, w = x.shape
    grad = empty_image(x, c, (h, w), problem.channels_last)
    new_sums = lambda make, rows: make((rows, 2, c), dtype=accumulator_dtype(x.dtype), device=x.device)
    if grad.numel() == 0:
        return grad, None if pending is None else new_sums(torch.zeros, 1)
    pixels = n * h * w
    block_m, block_c = _block(grad)
    tiles = -(-c // block_c)
    count, share = _shares(pixels, tiles, block_m)
    sums = None if pending is None else new_sums(torch.empty, count)
    depthwise_conv2d_backward_input_kernel[(count * tiles,)](
        *(dy, weight, None if pending is None else x, *problem.vectors_of_input, add, grad, sums),
        *(pixels, c, h, w, *dy.shape[2:], *weight.shape[2:], share, *problem.padding),
        *kernel_strides(dy),
        *(weight.stride(0), weight.stride(2), weight.stride(3)),
        *kernel_strides(x),
        *([0] * 4 if add is None else kernel_strides(add)),
        *kernel_strides(grad),
        **problem.constants,
        DILATION_H=problem.dilation[0],
        DILATION_W=problem.dilation[1],
        MULTIPLIER=dy.shape[1] // c,
        SHUFFLE=problem.shuffle,
        SCALED=pending is not None and pending.scaled,
        INT64=needs_int64(pixels, dy, x, add, grad),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
    )
    return grad, sums


def _general_weight(problem, need_bias):
    """grad_weight, and grad_bias or None."""
    from fastcnn.kernels.triton.depthwise_conv2d_backward import depthwise_conv2d_backward_weight_kernel

    dy, x, weight = problem.grad_output, problem.input, problem.weight
    n, k, p, q = dy.shape
    r, s = weight.shape[2:]
    grad = empty_grad_weight(weight)
    grad_bias = torch.empty(k, dtype=weight.dtype, device=weight.device) if need_bias else None
    if dy.numel() == 0:
        return grad.zero_(), None if grad_bias is None else grad_bias.zero_()
    taps = min(TAPS_FP64 if dy.dtype == torch.float64 else TAPS, s)
    block_m, block_k = _block(dy)
    tiles = -(-k // block_k) * r * -(-s // taps)
    pixels = n * p * q
    count, share = _shares(pixels, tiles, block_m)
    parts, bias_parts = grad, grad_bias
    if count > 1:
        new = lambda size: torch.empty((count, size), dtype=accumulator_dtype(dy.dtype), device=dy.device)
        parts, bias_parts = new(grad.numel()), new(k) if need_bias else None
    depthwise_conv2d_backward_weight_kernel[(count * tiles,)](
        *(dy, x, *problem.vectors_of_input, parts, bias_parts),
        *(pixels, k, *x.shape[2:], p, q, r, s, share, *problem.padding),
        *kernel_strides(dy),
        *kernel_strides(x),
        *(grad.stride(0), grad.stride(2), grad.stride(3)),
        **problem.constants,
        DILATION_H=problem.dilation[0],
        DILATION_W=problem.dilation[1],
        MULTIPLIER=k // x.shape[1],
        SHUFFLE=problem.shuffle,
        INT64=needs_int64(pixels, dy, x),
        TAPS=taps,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
    )
    if count > 1:
        sum_slabs(parts, grad)
        if need_bias:
            sum_slabs(bias_parts, grad_bias)
    return grad, grad_bias
