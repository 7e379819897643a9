"""Images that enter and leave the channels of a dense block's buffer, whose pixels or planes lie further apart.

Both are rows by channels in tiles and strips, as in batch_norm. fp32 inside (fp64 for fp64).
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.batch_norm import tile_of
from fastcnn.kernels.triton.common import accumulator


@triton.jit
def dense_block_enter_kernel(
    x_ptr, buffer_ptr, pivot_ptr,
    sums_ptr,  # [strips, 2, C]: of x - pivot, and of its square
    C, inner, tiles, tiles_per_strip, stride_o, stride_i, stride_c, buffer_o, buffer_i,
    BY_CHANNEL: tl.constexpr, ALIGN: tl.constexpr, INT64: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program copies a strip of BLOCK_C channels of x, and leaves its sums
    strip = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pivot = tl.load(pivot_ptr + c, mask=c < C, other=0.0)
    first = tl.zeros([BLOCK_I, BLOCK_C], pivot.dtype)
    second = tl.zeros_like(first)
    for tile in range(strip * tiles_per_strip, tl.minimum((strip + 1) * tiles_per_strip, tiles)):
        at, inside, _ = tile_of(tile, c, C, inner, stride_o, stride_i, stride_c, BY_CHANNEL, ALIGN, INT64, BLOCK_I)
        to, _, _ = tile_of(tile, c, C, inner, buffer_o, buffer_i, stride_c, BY_CHANNEL, ALIGN, INT64, BLOCK_I)
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        tl.store(buffer_ptr + to, x, mask=inside)
        d = tl.where(inside, accumulator(x) - pivot[None, :], 0.0)
        first += d
        second += d * d
    if INT64:
        strip = strip.to(tl.int64)
    sums_ptr += strip * 2 * C + c
    tl.store(sums_ptr, tl.sum(first, axis=0), mask=c < C)
    tl.store(sums_ptr + C, tl.sum(second, axis=0), mask=c < C)


@triton.jit
def dense_block_leave_kernel(
    grad_ptr, buffer_ptr, b_ptr, c_ptr, dx_ptr,
    C, inner, tiles, tiles_per_strip, stride_o, stride_i, stride_c, buffer_o, buffer_i,
    BY_CHANNEL: tl.constexpr, ALIGN: tl.constexpr, INT64: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program computes dx = grad + b * x + c of a strip of BLOCK_C channels; grad and x lie as the buffer
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.program_id(0) * tiles_per_strip
    b = tl.load(b_ptr + channel, mask=channel < C, other=0.0)[None, :]
    c = tl.load(c_ptr + channel, mask=channel < C, other=0.0)[None, :]
    for tile in range(begin, tl.minimum(begin + tiles_per_strip, tiles)):
        at, inside, _ = tile_of(
            tile, channel, C, inner, buffer_o, buffer_i, stride_c, BY_CHANNEL, ALIGN, INT64, BLOCK_I
        )
        to, _, _ = tile_of(tile, channel, C, inner, stride_o, stride_i, stride_c, BY_CHANNEL, ALIGN, INT64, BLOCK_I)
        grad = accumulator(tl.load(grad_ptr + at, mask=inside, other=0.0))
        x = accumulator(tl.load(buffer_ptr + at, mask=inside, other=0.0))
        tl.store(dx_ptr + to, (grad + (b * x + c)).to(dx_ptr.dtype.element_ty), mask=inside)
