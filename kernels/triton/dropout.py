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
def dropout_transposed_kernel(
    x_ptr,
    y_ptr,
    seed_ptr,
    numel,
    P,
    C,
    threshold: tl.uint32,
    scale: tl.float64,
    QUADS: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program computes BLOCK elements of memory (N, P pixels, C), whose logical order is (N, C, P): neighbours in
    # memory or, if QUADS, BLOCK // 4 neighbours in one pixel and the same in the three pixels after it
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    seed = tl.load(seed_ptr)
    if QUADS:  # P % 4 == 0: the four words of a Philox call belong to four neighbouring pixels of one channel
        i = pid * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        inside = i < numel // 4
        quad = i // C  # counts fours of pixels over all images
        c = i % C
        group = (quad // (P // 4) * C + c) * (P // 4) + quad % (P // 4)
        words = tl.randint4x(seed, group)
        offset = quad * (4 * C) + c
        _drop(x_ptr, y_ptr, offset, inside, words[0], threshold, scale)
        _drop(x_ptr, y_ptr, offset + C, inside, words[1], threshold, scale)
        _drop(x_ptr, y_ptr, offset + 2 * C, inside, words[2], threshold, scale)
        _drop(x_ptr, y_ptr, offset + 3 * C, inside, words[3], threshold, scale)
    else:
        offset = pid * BLOCK + tl.arange(0, BLOCK)
        pixel = offset // C
        i = (pixel // P * C + offset % C) * P + pixel % P
        a, b, c, d = tl.randint4x(seed, i // 4)
        j = i % 4
        word = tl.where(j < 2, tl.where(j == 0, a, b), tl.where(j == 2, c, d))
        _drop(x_ptr, y_ptr, offset, offset < numel, word, threshold, scale)
