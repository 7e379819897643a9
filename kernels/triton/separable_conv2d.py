"""Depthwise convolution and the 1x1 convolution of its result in one kernel: what lies between is never written.

A matrix product whose left side [pixels, channels] is computed where another kernel would load it. A strip is LANES
neighbouring pixels of an output row: what the filter's columns share among them is loaded and converted once.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.conv2d import multiples, within


@triton.jit
def depthwise_strips(
    x_ptr,  # [STRIPS, BLOCK_C]: what tap (0, 0) reads for each strip's first pixel
    filters_ptr,  # [BLOCK_C]: tap (0, 0) of filters [R * S, C]
    h0,  # [STRIPS]: place of x_ptr in the image
    w0,
    channels,  # [BLOCK_C]: which there are
    H,
    W,
    C,
    stride_xh,
    stride_xw,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    LANES: tl.constexpr,
    ACC: tl.constexpr,
):
    """The depthwise convolution of strips: a tuple of LANES blocks [STRIPS, BLOCK_C]."""
    sums = (tl.zeros(x_ptr.shape, ACC),) * LANES
    for r in range(R):
        for column in tl.static_range((LANES - 1) * STRIDE_W + (S - 1) * DIL_W + 1):
            # the compiler drops the load of a column that no tap reads, and loads a tap's weights once
            inside = within(h0 + r * DIL_H, w0 + column, H, W)[:, None] & channels[None, :]
            x = accumulator(tl.load(x_ptr + (r * DIL_H * stride_xh + column * stride_xw), mask=inside, other=0.0))
            for s in tl.static_range(S):
                for lane in tl.static_range(LANES):
                    if lane * STRIDE_W + s * DIL_W == column:
                        weights = tl.load(filters_ptr + (r * S + s) * C, mask=channels, other=0.0)
                        sums = sums[:lane] + (sums[lane] + x * weights[None, :],) + sums[lane + 1 :]
    return sums


@triton.jit
def side_by_side(blocks, LANES: tl.constexpr, STRIPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """[STRIPS * LANES, BLOCK_C] of a tuple of 4 blocks: a strip's pixels one after the other."""
    tl.static_assert(LANES == 4)
    joined = tl.join(tl.join(blocks[0], blocks[2]), tl.join(blocks[1], blocks[3]))
    joined = joined.reshape(STRIPS, BLOCK_C, LANES)
    return joined.permute(0, 2, 1).reshape(STRIPS * LANES, BLOCK_C)


@triton.jit(do_not_specialize=["strips", "H", "W", "P", "Q", "pad_h", "pad_w"])
def separable_conv2d_kernel(
    x_ptr,
    filters_ptr,  # depthwise [R * S, C], fp32
    depthwise_bias_ptr,  # [C] or None
    w_ptr,  # pointwise [K, C]
    bias_ptr,  # [K] or None
    y_ptr,
    strips,  # N * P * ceil(Q / LANES)
    H,
    W,
    P,
    Q,
    C,
    K,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yp,
    stride_yq,
    pad_h,
    pad_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    VECTOR: tl.constexpr,  # what channels, filters and all strides are multiples of
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    STRIPS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # one program computes the pixels of STRIPS strips x BLOCK_N filters
    stride_xn, stride_xh, stride_xw = multiples(stride_xn, stride_xh, stride_xw, VECTOR)
    stride_yn, stride_yp, stride_yq = multiples(stride_yn, stride_yp, stride_yq, VECTOR)
    C, K, _ = multiples(C, K, 0, VECTOR)
    tiles_n = tl.cdiv(K, BLOCK_N)
    m = tl.program_id(0) // tiles_n * STRIPS + tl.arange(0, STRIPS)
    k = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    if INT64:
        m = m.to(tl.int64)
    per_row = tl.cdiv(Q, LANES)
    p = m // per_row % P
    h0 = p * STRIDE_H - pad_h
    w0 = m % per_row * (LANES * STRIDE_W) - pad_w
    x_rows = m // (P * per_row) * stride_xn + h0 * stride_xh + w0 * stride_xw
    # strips past the end are sent out of the image
    h0 = tl.where(m < strips, h0, H).to(tl.int32)
    w0 = w0.to(tl.int32)
    x_block_ptr = x_ptr + x_rows[:, None] + c[None, :]
    w_block_ptr = w_ptr + (k * C)[None, :] + c[:, None]  # [BLOCK_C, BLOCK_N]
    acc = tl.zeros((STRIPS * LANES, BLOCK_N), dtype=tl.float32)
    for c0 in range(0, C, BLOCK_C):
        channels = c0 + c < C
        sums = depthwise_strips(
            *(x_block_ptr + c0, filters_ptr + c0 + c, h0, w0, channels, H, W, C, stride_xh, stride_xw),
            *(R, S, STRIDE_W, DIL_H, DIL_W, LANES, tl.float32),
        )
        z = side_by_side(sums, LANES, STRIPS, BLOCK_C)
        if depthwise_bias_ptr is not None:
            z += tl.load(depthwise_bias_ptr + c0 + c, mask=channels, other=0.0).to(tl.float32)[None, :]
        w_block = tl.load(w_block_ptr + c0, mask=channels[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(z.to(x_ptr.dtype.element_ty), w_block, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    # of the same strips, one row per pixel
    pixel = tl.program_id(0) // tiles_n * (STRIPS * LANES) + tl.arange(0, STRIPS * LANES)
    if INT64:
        pixel = pixel.to(tl.int64)
    strip = pixel // LANES
    q = strip % per_row * LANES + pixel % LANES
    y_rows = strip // (P * per_row) * stride_yn + strip // per_row % P * stride_yp + q * stride_yq
    inside = ((strip < strips) & (q < Q))[:, None] & (k < K)[None, :]
    tl.store(y_ptr + y_rows[:, None] + k[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)
