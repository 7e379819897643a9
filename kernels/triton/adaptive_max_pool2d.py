"""Adaptive max pooling: output pixel p takes the maximum of the input rows from floor(p*H/P) to ceil((p+1)*H/P),
columns alike. The forward also stores which tap of its part each maximum came from; the backward gathers by it.

Global pooling (1x1) has a kernel of its own that reads whole tiles; the others loop over their part.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.pooling import part_end, part_start, pixel_tile, take


@triton.jit
def adaptive_max_pool2d_forward_kernel(
    x_ptr, y_ptr, tap_ptr,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    rows, columns, C, H, W, P, Q, max_r, max_s,
    STORE_TAP: tl.constexpr, CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program computes BLOCK_A x BLOCK_B outputs: pixels x channels (channels_last) or planes x pixels
    n, c, p, q, y_offset, inside = pixel_tile(rows, columns, C, P, Q, CHANNELS_LAST, INT64, BLOCK_A, BLOCK_B)
    base = n * x_stride_n + c * x_stride_c
    h0, h1 = part_start(p, P, H), part_end(p, P, H)
    w0, w1 = part_start(q, Q, W), part_end(q, Q, W)
    best = accumulator(tl.zeros([BLOCK_A, BLOCK_B], x_ptr.dtype.element_ty)) - float("inf")
    tap = tl.zeros([BLOCK_A, BLOCK_B], tl.int32)
    for r in range(max_r):
        for s in range(max_s):
            mask = inside & (h0 + r < h1) & (w0 + s < w1)
            offset = base + (h0 + r) * x_stride_h + (w0 + s) * x_stride_w
            x = accumulator(tl.load(x_ptr + offset, mask=mask, other=-float("inf")))
            best, tap = take(best, tap, x, r * max_s + s)
    tl.store(y_ptr + y_offset, best.to(y_ptr.dtype.element_ty), mask=inside)
    if STORE_TAP:
        tl.store(tap_ptr + y_offset, tap.to(tap_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _winner(best, tap, AXIS: tl.constexpr):
    """The maximum of a tile along an axis and its tap: the first of equals, of NaNs the last. Lanes without: tap -1."""
    is_nan = best != best
    last_nan = tl.max(tl.where(is_nan, tap, -1), axis=AXIS, keep_dims=True)
    highest = tl.max(tl.where(is_nan, -float("inf"), best), axis=AXIS, keep_dims=True)
    first = tl.min(tl.where((best == highest) & (tap >= 0), tap, 2147483647), axis=AXIS, keep_dims=True)
    return tl.where(last_nan >= 0, float("nan"), highest), tl.where(last_nan >= 0, last_nan, first)


@triton.jit
def global_max_pool2d_forward_kernel(
    x_ptr, y_ptr, tap_ptr,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    rows, columns, C, H, W,
    STORE_TAP: tl.constexpr, CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program computes the maxima of BLOCK_B channels of an image, BLOCK_A pixels at a time (channels_last; rows is
    # the number of its pixels), or of BLOCK_A planes, BLOCK_B pixels at a time (contiguous; columns is that number)
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    a, b = tl.arange(0, BLOCK_A)[:, None], tl.arange(0, BLOCK_B)[None, :]
    best = accumulator(tl.zeros([BLOCK_A, BLOCK_B], x_ptr.dtype.element_ty)) - float("inf")
    if CHANNELS_LAST:
        blocks = tl.cdiv(C, BLOCK_B)
        n, c = pid // blocks, pid % blocks * BLOCK_B + b
        # a tile's first pixels, in case that nothing is larger than -inf
        tap = tl.where(a < rows, a, -1) + tl.zeros([BLOCK_A, BLOCK_B], tl.int32)
        for start in range(0, rows, BLOCK_A):
            pixel = start + a
            mask = (pixel < rows) & (c < C)
            offset = n * x_stride_n + c * x_stride_c + pixel // W * x_stride_h + pixel % W * x_stride_w
            best, tap = take(best, tap, accumulator(tl.load(x_ptr + offset, mask=mask, other=-float("inf"))), pixel)
        y, winner = _winner(best, tap, 0)
        y_offset = n * C + c
        inside = c < C
    else:
        plane = pid * BLOCK_A + a
        n, c = plane // C, plane % C
        tap = tl.where(b < columns, b, -1) + tl.zeros([BLOCK_A, BLOCK_B], tl.int32)
        for start in range(0, columns, BLOCK_B):
            pixel = start + b
            mask = (plane < rows) & (pixel < columns)
            offset = n * x_stride_n + c * x_stride_c + pixel // W * x_stride_h + pixel % W * x_stride_w
            best, tap = take(best, tap, accumulator(tl.load(x_ptr + offset, mask=mask, other=-float("inf"))), pixel)
        y, winner = _winner(best, tap, 1)
        y_offset = plane
        inside = plane < rows
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=inside)
    if STORE_TAP:
        tl.store(tap_ptr + y_offset, winner.to(tap_ptr.dtype.element_ty), mask=inside)


@triton.jit
def adaptive_max_pool2d_backward_kernel(
    dy_ptr, tap_ptr, dx_ptr,
    rows, columns, C, H, W, P, Q, max_s, cover_h, cover_w,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program computes the gradient of BLOCK_A x BLOCK_B input elements; at most cover_h x cover_w parts reach one
    n, c, h, w, dx_offset, inside = pixel_tile(rows, columns, C, H, W, CHANNELS_LAST, INT64, BLOCK_A, BLOCK_B)
    # the parts over pixel h are those that the parts of the output, laid over the input, would give it
    p0, p1 = part_start(h, H, P), part_end(h, H, P)
    q0, q1 = part_start(w, W, Q), part_end(w, W, Q)
    dx = accumulator(tl.zeros([BLOCK_A, BLOCK_B], dy_ptr.dtype.element_ty))
    for i in range(cover_h):
        p = p0 + i
        r = h - part_start(p, P, H)
        for j in range(cover_w):
            q = q0 + j
            mask = inside & (p < p1) & (q < q1)
            if CHANNELS_LAST:
                offset = ((n * P + p) * Q + q) * C + c
            else:
                offset = ((n * C + c) * P + p) * Q + q
            tap = tl.load(tap_ptr + offset, mask=mask, other=0).to(tl.int32)
            dy = accumulator(tl.load(dy_ptr + offset, mask=mask, other=0.0))
            dx += tl.where(mask & (tap == r * max_s + w - part_start(q, Q, W)), dy, 0.0)
    tl.store(dx_ptr + dx_offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
