"""Depthwise convolution: a memory copy with R * S multiply-adds per element, on vector units, fp32 inside (fp64).

`source_channel` and `epilogue` are what all its kernels share.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.activation import activate
from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.conv2d import channel_vector, within
from fastcnn.kernels.triton.conv_fusion import pending_activation


@triton.jit
def source_channel(k, C, multiplier, SHUFFLE: tl.constexpr):
    """The channel of x that filter k reads: channel k // multiplier of the channels in shuffled order."""
    c = k // multiplier
    if SHUFFLE > 1:
        return c % SHUFFLE * (C // SHUFFLE) + c // SHUFFLE
    else:
        return c


@triton.jit
def epilogue(acc, residual_ptr, offsets, stored, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """act(acc + residual), where either may be None."""
    if residual_ptr is not None:
        acc += accumulator(tl.load(residual_ptr + offsets, mask=stored, other=0.0))
    if ACTIVATION is not None:
        acc = activate(acc, SLOPE, ACTIVATION)
    return acc


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "R", "S", "tiles", "per_strip", "pad_h", "pad_w"])
def depthwise_conv2d_general_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    scale_ptr,  # pending activation of x
    shift_ptr,
    residual_ptr,  # laid out as y
    pivot_ptr,
    y_ptr,
    sums_ptr,  # [strips, 2, K]
    M,  # N * P * Q
    H,
    W,
    P,
    Q,
    C,
    K,
    R,
    S,
    multiplier,
    tiles,
    per_strip,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wk,
    stride_wr,
    stride_ws,
    stride_yn,
    stride_yk,
    stride_yp,
    stride_yq,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    SHUFFLE: tl.constexpr,
    PENDING: tl.constexpr,
    PENDING_SLOPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one program computes a strip of tiles of BLOCK_M pixels x BLOCK_K filters, in any layout, with any filter
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(K, BLOCK_K)
    strip = tl.program_id(0) // blocks
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    real = k < K
    if INT64:
        strip = strip.to(tl.int64)
        k = k.to(tl.int64)
    c = source_channel(k, C, multiplier, SHUFFLE)
    if PENDING is not None:
        scale = tl.load(scale_ptr + c, mask=real, other=0.0)[None, :]
        shift = tl.load(shift_ptr + c, mask=real, other=0.0)[None, :]
    if bias_ptr is not None:
        bias = accumulator(channel_vector(bias_ptr, k, K))[None, :]
    if sums_ptr is not None:
        pivot = channel_vector(pivot_ptr, k, K)[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_K], ACC)
        total_of_squares = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    for tile in range(strip * per_strip, tl.minimum(strip * per_strip + per_strip, tiles)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        n = m // (P * Q)
        p = m // Q % P
        q = m % Q
        stored = (m < M)[:, None] & real[None, :]
        first_h = p * stride_h - pad_h
        first_w = q * stride_w - pad_w
        pixels = n * stride_xn + first_h * stride_xh + first_w * stride_xw
        x_offsets = pixels[:, None] + (c * stride_xc)[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_K], ACC)
        for tap in range(R * S):
            h_shift = tap // S * dil_h
            w_shift = tap % S * dil_w
            inside = stored & within(first_h + h_shift, first_w + w_shift, H, W)[:, None]
            x = tl.load(
                x_ptr + (x_offsets + (h_shift.to(k.dtype) * stride_xh + w_shift.to(k.dtype) * stride_xw)),
                mask=inside,
                other=0.0,
            )
            x = accumulator(x)
            if PENDING is not None:
                x = tl.where(inside, pending_activation(x, scale, shift, PENDING_SLOPE, PENDING), 0.0)
            w_offset = (tap // S).to(k.dtype) * stride_wr + (tap % S).to(k.dtype) * stride_ws
            w = tl.load(w_ptr + k * stride_wk + w_offset, mask=real, other=0.0)
            acc += x * accumulator(w)[None, :]
        if bias_ptr is not None:
            acc += bias
        y_offsets = (n * stride_yn + p * stride_yp + q * stride_yq)[:, None] + (k * stride_yk)[None, :]
        acc = epilogue(acc, residual_ptr, y_offsets, stored, ACTIVATION, SLOPE)
        y = acc.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + y_offsets, y, mask=stored)
        if sums_ptr is not None:
            # of what a reader of y sees
            d = tl.where(stored, accumulator(y) - pivot, 0.0)
            total += d
            total_of_squares += d * d
    if sums_ptr is not None:
        row = sums_ptr + strip.to(tl.int64) * (2 * K)
        tl.store(row + k, tl.sum(total, axis=0), mask=real)
        tl.store(row + K + k, tl.sum(total_of_squares, axis=0), mask=real)
