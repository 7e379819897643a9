"""Depthwise convolution on Triton's kernels: the host functions, of which backward has a file of its own."""

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
    vectors = [None if vector is None else vector.contiguous() for vector in (bias, *(pending or (None, None))[:2])]
    fused = dict(
        SHUFFLE=shuffle,
        PENDING=pending and pending.activation,
        PENDING_SLOPE=pending.slope if pending else 0.0,
        ACTIVATION=activation and activation[0],
        SLOPE=activation[1] if activation else 0.0,
    )
    with common.device_guard(y):
        sums = _general(input, weight, vectors, residual, pivot, y, stride, padding, dilation, fused)
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
        *(x, weight, *vectors, residual, None if pivot is None else pivot.contiguous(), y, sums),
        *(n * p * q, h, w, p, q, c, k, r, s, k // c, tiles, per_strip),
        *(*kernel_strides(x), strides_w[0], *strides_w[2:], *kernel_strides(y)),
        *(*stride, *padding, *dilation),
        INT64=needs_int64(n * p * q, x, y, residual),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        **fused,
    )
    return sums
