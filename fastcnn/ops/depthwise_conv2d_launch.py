"""Depthwise convolution on Triton's kernels: the host functions, of which backward has a file of its own."""

from typing import NamedTuple

import torch

from fastcnn.ops import common
from fastcnn.ops.conv2d_gather import kernel_strides, needs_int64
from fastcnn.ops.conv_layout import output_of
from fastcnn.ops.conv_sums import accumulator_dtype, sum_rows_in_parts
from fastcnn.ops.depthwise_conv2d_backward_launch import backward

__all__ = ["backward", "forward"]

TILE = 1024  # elements of a tile of the general kernel; half with fp64
MAX_CHANNELS = 64  # of them side by side
PROGRAMS = 2112  # with sums: as many as run at a time on an H100, 16 on each SM, so that rows of sums stay few


class Sliding(NamedTuple):
    """How the sliding kernel runs filters up to a size.

    Attributes:
        size: of the filter, the larger of height and width.
        stride: in height.
        rows: output rows in the body of the loop.
        columns: output columns of a tile, at most.
        channels: of a thread.
    """

    size: int
    stride: int
    rows: int
    columns: int
    channels: int


# sm_90, Triton 3.7.1, machine code for bf16 (benchmarks/results/aot). 7 columns: images of 224 pixels come down to
# multiples of 7, and fewer load more of what neighbours load, too. One channel of 7x7: filter and open sums of each
# take 98 registers. rows: as many as the filter has, and sums do not change registers in the loop, which for 5x5 and
# stride 1 takes 34 instructions per output against 37 with 2 rows. An SM starts 33 while it moves the 4 bytes, but 83
# for the 10 of stride 2, where fewer do; so they do for 7x7, bound by its 49 multiply-adds. Triton's compile time
# grows with the cube of the body's length
SLIDING = (
    *(Sliding(3, 1, 3, 7, 2), Sliding(5, 1, 5, 7, 2), Sliding(7, 1, 2, 7, 1)),
    *(Sliding(3, 2, 3, 7, 2), Sliding(5, 2, 2, 7, 2), Sliding(7, 2, 1, 7, 1)),
)
MAX_FILTER = max(choice.size for choice in SLIDING)
SLIDING_WARPS = 4
SLIDING_PROGRAMS = 660  # 5 of them run at a time on each SM of an H100


def forward(
    input, weight, bias, size, stride, padding, dilation, channels_last, *,
    pending=None, shuffle=1, out=None, activation=None, residual=None, pivot=None,
):  # fmt: skip
    """y = act(conv(channel_shuffle(pending(input), shuffle)) + bias + residual), [N, K, *size].

    Args:
        padding: (top, left); with size it says all.
        channels_last: whether a new y is.
        pending: conv_fusion.Pending or None.
        shuffle: groups of the channel shuffle.
        out: where y is written, a slice of wider images' channels for example, or None; it is what is returned.
        activation: (name, slope) or None.
        residual: a tensor like y, or None.
        pivot: [K] in fp32 (fp64 for fp64), or None. With it, returns (y, sums [S, 2, K]): of y - pivot and of its
            square over the rounded y, in S parts.
    """
    y = output_of(out, input, weight.shape[0], size, channels_last)
    if y.numel() == 0:
        return y if pivot is None else (y, pivot.new_zeros((1, 2, y.shape[1])))
    if residual is not None:
        residual = common.with_strides_of(residual, y)
    pivot, *vectors = (
        None if vector is None else vector.contiguous() for vector in (pivot, bias, *(pending or (None, None))[:2])
    )
    fused = dict(
        SHUFFLE=shuffle,
        PENDING=pending and pending.activation,
        PENDING_SLOPE=pending.slope if pending else 0.0,
        ACTIVATION=activation and activation[0],
        SLOPE=activation[1] if activation else 0.0,
    )
    with common.device_guard(y):
        launch = _general if why_not_sliding(input, weight, y, stride, dilation) else _sliding
        sums = launch(input, weight, vectors, residual, pivot, y, stride, padding, dilation, fused)
        return y if pivot is None else (y, sum_rows_in_parts(sums))


def _sums(pivot, strips, y):
    """Room for partial sums, or None."""
    if pivot is None:
        return None
    return torch.empty((strips, 2, y.shape[1]), dtype=accumulator_dtype(y.dtype), device=y.device)


def _general(x, weight, vectors, residual, pivot, y, stride, padding, dilation, fused):
    from fastcnn.kernels.triton.depthwise_conv2d import depthwise_conv2d_general_kernel

    (n, c, h, w), (k, _, r, s), (p, q) = x.shape, weight.shape, y.shape[2:]
    strides_w = kernel_strides(weight)
    # with planes of channels apart, threads that are neighbours take pixels that are
    block_k = min(MAX_CHANNELS, 1 << (k - 1).bit_length()) if y.stride(1) == 1 else 1
    block_m = (TILE // 2 if y.dtype == torch.float64 else TILE) // block_k
    blocks, tiles = -(-k // block_k), -(-(n * p * q) // block_m)
    per_strip = 1 if pivot is None else -(-tiles // max(1, PROGRAMS // blocks))
    strips = -(-tiles // per_strip)
    sums = _sums(pivot, strips, y)
    depthwise_conv2d_general_kernel[(blocks * strips,)](
        *(x, weight, *vectors, residual, pivot, y, sums),
        *(n * p * q, h, w, p, q, c, k, r, s, k // c, tiles, per_strip),
        *(*kernel_strides(x), strides_w[0], *strides_w[2:], *kernel_strides(y)),
        *(*stride, *padding, *dilation),
        INT64=needs_int64(n * p * q, x, y, residual),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        **fused,
    )
    return sums


def why_not_sliding(x, weight, y, stride, dilation):
    """None if the sliding kernel can, else the sentence why not."""
    (r, s), c = weight.shape[2:], 1
    if x.dtype == torch.float64:
        return "the sliding kernel computes in fp32"
    if kernel_strides(x)[c] != 1 or kernel_strides(y)[c] != 1:
        return "the sliding kernel reads and writes channels_last"
    if max(r, s) > MAX_FILTER:
        return f"the sliding kernel keeps filters up to {MAX_FILTER}x{MAX_FILTER} in registers"
    if stride[0] > min(r, 2) or stride[1] > min(s, 2):
        return "the sliding kernel takes strides of 1 and 2 that skip no pixels"
    if (dilation[0] != 1 and r > 1) or (dilation[1] != 1 and s > 1):
        return "the sliding kernel takes no dilation"
    if common.exceeds_int32(x[:1], y[:1]):
        return "the sliding kernel counts places in an image with 32 bits"
    return None


def columns_of_tile(q, s, stride_w, most):
    """Output columns of a tile: those that make its columns of input, over all tiles of a row of q, the fewest."""
    return min(range(min(q, most), 0, -1), key=lambda columns: -(-q // columns) * ((columns - 1) * stride_w + s))


def _vector(channels, strides):
    """How many channels accesses may take at once, of so many that a thread has."""
    return channels if all(number % channels == 0 for number in strides) else 1


def _sliding(x, weight, vectors, residual, pivot, y, stride, padding, dilation, fused):
    from fastcnn.kernels.triton.depthwise_conv2d import depthwise_conv2d_sliding_kernel

    (n, c, h, w), (k, _, r, s), (p, q) = x.shape, weight.shape, y.shape[2:]
    choice = next(choice for choice in SLIDING if choice.size >= max(r, s) and choice.stride == stride[0])
    columns = columns_of_tile(q, s, stride[1], choice.columns)
    count = (columns - 1) * stride[1] + s
    tiles_w, chunks = -(-q // columns), -(-p // choice.rows)
    last = (tiles_w - 1) * columns  # first output column of the last tile
    block = 32 * SLIDING_WARPS * choice.channels
    units, lanes = n * tiles_w, SLIDING_PROGRAMS * block
    # strips of the height where images are few, then several units one after the other where they are many
    per_strip = -(-chunks // max(1, min(chunks, lanes // (units * k))))
    strips = -(-chunks // per_strip)
    steps = -(-units // max(1, lanes // (strips * k)))
    lines = -(-units // steps)
    xn, _, xh, xw = kernel_strides(x)
    yn, _, yp, yq = kernel_strides(y)
    wk, _, wr, ws = kernel_strides(weight)
    sums = _sums(pivot, strips * lines, y)
    depthwise_conv2d_sliding_kernel[(-(-lines * k // block), strips)](
        *(x, weight, *vectors, residual, pivot, y, sums),
        *(units, lines, steps, per_strip, tiles_w, h, w, p, q, c, k, k // c),
        *(xn, xh, xw, wk, wr, ws, yn, yp, yq, *padding),
        R=r,
        S=s,
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        LEFT=min(max(padding[1], 0), count),
        RIGHT=min(max(w + padding[1] - last * stride[1], 0), count),
        WHOLE=q - last,
        VECTOR=_vector(choice.channels, (c, k, xn, xh, xw, yn, yp, yq)),
        ROWS=choice.rows,
        COLUMNS=columns,
        BLOCK=block,
        num_warps=SLIDING_WARPS,
        **fused,
    )
    return sums
