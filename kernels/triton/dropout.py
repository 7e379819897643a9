"""Dropout without a mask in memory: y = x * (scale where kept, else 0), forward and backward alike.

The stream, which no block size, layout or device changes: the element with logical index i (row-major over the shape)
takes word i % 4 of Philox4x32-10 with key = seed (low word, high word) and counter = i // 4 (low word, high word, 0,
0), and is dropped where that word, unsigned, is below the threshold. One Philox call serves four elements.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator


@triton.jit
def _drop(x_ptr, y_ptr, offset, inside, word, threshold, scale):
    # a product, not a selection of zero: NaN and Inf stay visible where they are dropped, as in torch
    x = accumulator(tl.load(x_ptr + offset, mask=inside))
    factor = tl.where(word >= threshold, tl.full([1], scale, x.dtype), tl.full([1], 0.0, x.dtype))
    tl.store(y_ptr + offset, (x * factor).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dropout_kernel(
    x_ptr,
    y_ptr,
    seed_ptr,
    numel,
    threshold: tl.uint32,
    scale: tl.float64,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program computes BLOCK elements that follow each other in memory and in logical order
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    group = pid * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.randint4x(tl.load(seed_ptr), group)
    word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))  # a b c d a b c d ...
    i = pid * BLOCK + tl.arange(0, BLOCK)
    _drop(x_ptr, y_ptr, i, i < numel, word, threshold, scale)


@triton.jit
def dropout_quads_kernel(
    x_ptr,
    y_ptr,
    seed_ptr,
    quads,
    quads_per_image,
    C,
    threshold: tl.uint32,
    scale: tl.float64,
    ALIGN: tl.constexpr,  # divides C; known to the compiler, it makes the accesses wide
    INT64: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # one program computes BLOCK_Q fours of pixels and BLOCK_C channels of memory (N, P pixels, C), P % 4 == 0: the four
    # words of a Philox call belong to four neighbouring pixels of one channel
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    C = C // ALIGN * ALIGN
    inside = (q < quads)[:, None] & (c < C)[None, :]
    if INT64:
        q, c = q.to(tl.int64), c.to(tl.int64)
    first = q // quads_per_image * C * quads_per_image + q % quads_per_image
    words = tl.randint4x(tl.load(seed_ptr), first[:, None] + (c * quads_per_image)[None, :])
    offset = (q * (4 * C))[:, None] + c[None, :]
    _drop(x_ptr, y_ptr, offset, inside, words[0], threshold, scale)
    _drop(x_ptr, y_ptr, offset + C, inside, words[1], threshold, scale)
    _drop(x_ptr, y_ptr, offset + 2 * C, inside, words[2], threshold, scale)
    _drop(x_ptr, y_ptr, offset + 3 * C, inside, words[3], threshold, scale)


@triton.jit
def dropout_transposed_kernel(
    x_ptr,
    y_ptr,
    seed_ptr,
    numel,
    P,
    C,
    threshold: tl.uint32,
    scale: tl.float64,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program computes BLOCK neighbouring elements of memory (N, P pixels, C), whose logical order is (N, C, P)
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    offset = pid * BLOCK + tl.arange(0, BLOCK)
    pixel = offset // C
    i = (pixel // P * C + offset % C) * P + pixel % P
    a, b, c, d = tl.randint4x(tl.load(seed_ptr), i // 4)
    j = i % 4
    word = tl.where(j < 2, tl.where(j == 0, a, b), tl.where(j == 2, c, d))
    _drop(x_ptr, y_ptr, offset, offset < numel, word, threshold, scale)
