"""Dropout of whole units, samples or channels: y = residual + x * (scale where the unit is kept, else 0).

The stream is dropout's (kernels/triton/dropout.py): unit u, counted row-major, takes word u % 4 of counter u // 4.
Backward is the same kernel on the gradient.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator


@triton.jit
def factors_of(word, threshold, scale, like_ptr):
    """What units with these words are multiplied by, in the dtype in which elements at like_ptr are computed."""
    dtype: tl.constexpr = tl.float64 if like_ptr.dtype.element_ty == tl.float64 else tl.float32
    return tl.where(word >= threshold, tl.full([1], scale, dtype), tl.full([1], 0.0, dtype))


@triton.jit
def unit_factors(seed, unit, threshold, scale, like_ptr):
    """What each of these units is multiplied by."""
    a, b, c, d = tl.randint4x(seed, unit // 4)
    j = unit % 4
    word = tl.where(j < 2, tl.where(j == 0, a, b), tl.where(j == 2, c, d))
    return factors_of(word, threshold, scale, like_ptr)


@triton.jit
def unit_dropout_kernel(
    x_ptr, residual_ptr, y_ptr, seed_ptr, units, inner, threshold: tl.uint32, scale: tl.float64,
    INT64: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    # one program computes BLOCK_I neighbours of BLOCK_U units, each of which lies in one piece of `inner` elements
    pid = tl.program_id(0)
    tiles = tl.cdiv(inner, BLOCK_I)
    unit = pid // tiles * BLOCK_U + tl.arange(0, BLOCK_U)
    i = pid % tiles
    if INT64:
        unit, i = unit.to(tl.int64), i.to(tl.int64)
    i = i * BLOCK_I + tl.arange(0, BLOCK_I)
    offset = (unit * inner)[:, None] + i[None, :]  # [BLOCK_U, BLOCK_I]
    inside = (unit < units)[:, None] & (i < inner)[None, :]
    x = accumulator(tl.load(x_ptr + offset, mask=inside))
    y = x * unit_factors(tl.load(seed_ptr), unit, threshold, scale, x_ptr)[:, None]
    if residual_ptr is not None:
        y += accumulator(tl.load(residual_ptr + offset, mask=inside))
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def channel_dropout_kernel(
    x_ptr, y_ptr, seed_ptr, P, C, strips, threshold: tl.uint32, scale: tl.float64,
    QUADS: tl.constexpr, INT64: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program computes BLOCK_C channels of every strips-th tile of BLOCK_P pixels of one image; memory (N, P, C)
    n = tl.program_id(0) // strips
    strip = tl.program_id(0) % strips
    first_c = tl.program_id(1) * BLOCK_C
    if INT64:
        n, first_c = n.to(tl.int64), first_c.to(tl.int64)
    c = first_c + tl.arange(0, BLOCK_C)
    seed = tl.load(seed_ptr)
    if QUADS:  # C % 4 == 0: one Philox call serves four channels
        words = tl.randint4x(seed, (n * C + first_c) // 4 + tl.arange(0, BLOCK_C // 4))
        word = tl.interleave(tl.interleave(words[0], words[2]), tl.interleave(words[1], words[3]))
        factor = factors_of(word, threshold, scale, x_ptr)
    else:
        factor = unit_factors(seed, n * C + c, threshold, scale, x_ptr)
    for tile in range(strip, tl.cdiv(P, BLOCK_P), strips):
        pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        offset = ((n * P + pixel) * C)[:, None] + c[None, :]  # [BLOCK_P, BLOCK_C]
        inside = (pixel < P)[:, None] & (c < C)[None, :]
        x = accumulator(tl.load(x_ptr + offset, mask=inside))
        y = x * factor[None, :]
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
