"""Fractional max pooling (Graham 2014, arXiv 1412.6071): windows of R x S pixels at random steps between the rows and
columns where they begin. The forward also stores which tap of its window each maximum came from; the backward finds the
windows over a pixel again from the random numbers, and gathers.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.pooling import pixel_tile, take


@triton.jit
def _window_start(p, sample, alpha, P, last):
    """Where the p-th of P windows begins; the last one ends with the image."""
    start = ((p + sample) * alpha).to(tl.int32) - (sample * alpha).to(tl.int32)
    return tl.where(p == P - 1, last, start.to(p.dtype))


@triton.jit
def _mean_step(sample, size, WINDOW: tl.constexpr, P):
    """The mean distance of P windows."""
    # in sample's dtype and rounded once, as in torch: one ulp may move a window
    free = (size - WINDOW).to(sample.dtype) + tl.zeros_like(sample)
    steps = tl.maximum(P - 1, 1).to(sample.dtype) + tl.zeros_like(sample)
    if sample.dtype == tl.float64:
        return free / steps
    else:
        return tl.div_rn(free, steps)


@triton.jit
def fractional_max_pool2d_forward_kernel(
    x_ptr, sample_ptr, y_ptr, tap_ptr,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    rows, columns, C, H, W, P, Q,
    R: tl.constexpr, S: tl.constexpr, STORE_TAP: tl.constexpr, CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program computes BLOCK_A x BLOCK_B outputs: pixels x channels (channels_last) or planes x pixels
    n, c, p, q, y_offset, inside = pixel_tile(rows, columns, C, P, Q, CHANNELS_LAST, INT64, BLOCK_A, BLOCK_B)
    samples = sample_ptr + (n * C + c) * 2
    sample_w = accumulator(tl.load(samples, mask=inside, other=0.0))
    sample_h = accumulator(tl.load(samples + 1, mask=inside, other=0.0))
    h0 = _window_start(p, sample_h, _mean_step(sample_h, H, R, P), P, H - R)
    w0 = _window_start(q, sample_w, _mean_step(sample_w, W, S, Q), Q, W - S)
    base = n * x_stride_n + c * x_stride_c + h0 * x_stride_h + w0 * x_stride_w
    best = accumulator(tl.zeros([BLOCK_A, BLOCK_B], x_ptr.dtype.element_ty)) - float("inf")
    tap = tl.zeros([BLOCK_A, BLOCK_B], tl.int32)
    for r in range(R):
        for s in range(S):
            x = tl.load(x_ptr + (base + r * x_stride_h + s * x_stride_w), mask=inside, other=0.0)
            best, tap = take(best, tap, accumulator(x), r * S + s)
    tl.store(y_ptr + y_offset, best.to(y_ptr.dtype.element_ty), mask=inside)
    if STORE_TAP:
        tl.store(tap_ptr + y_offset, tap.to(tap_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _first_window(h, alpha, WINDOW: tl.constexpr):
    """A window at or before the first that may cover pixel h."""
    # a window begins less than one pixel from p * alpha; one window more for the rounding of the division. alpha is at
    # least 1, or 0 where the only window is the image
    return tl.maximum(((h - WINDOW - 1) / tl.maximum(alpha, 1.0)).to(tl.int32) - 1, 0).to(h.dtype)


@triton.jit
def fractional_max_pool2d_backward_kernel(
    dy_ptr, sample_ptr, tap_ptr, dx_ptr,
    rows, columns, C, H, W, P, Q, cover_h, cover_w,
    R: tl.constexpr, S: tl.constexpr, CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program computes the gradient of BLOCK_A x BLOCK_B input elements, each from cover_h x cover_w windows, among
    # which are all that reach it
    n, c, h, w, dx_offset, inside = pixel_tile(rows, columns, C, H, W, CHANNELS_LAST, INT64, BLOCK_A, BLOCK_B)
    samples = sample_ptr + (n * C + c) * 2
    sample_w = accumulator(tl.load(samples, mask=inside, other=0.0))
    sample_h = accumulator(tl.load(samples + 1, mask=inside, other=0.0))
    alpha_h, alpha_w = _mean_step(sample_h, H, R, P), _mean_step(sample_w, W, S, Q)
    # rows and columns fit 32 bits; 64-bit ones would go through floating point slowly
    h, w = h.to(tl.int32), w.to(tl.int32)
    p0, q0 = _first_window(h, alpha_h, R), _first_window(w, alpha_w, S)
    dx = accumulator(tl.zeros([BLOCK_A, BLOCK_B], dy_ptr.dtype.element_ty))
    for i in range(cover_h):
        p = p0 + i
        r = h - _window_start(p, sample_h, alpha_h, P, H - R)
        over = inside & (p < P) & (r >= 0) & (r < R)
        for j in range(cover_w):
            q = q0 + j
            s = w - _window_start(q, sample_w, alpha_w, Q, W - S)
            mask = over & (q < Q) & (s >= 0) & (s < S)
            if CHANNELS_LAST:
                offset = ((n * P + p) * Q + q) * C + c
            else:
                offset = ((n * C + c) * P + p) * Q + q
            tap = tl.load(tap_ptr + offset, mask=mask, other=0).to(tl.int32)
            dy = accumulator(tl.load(dy_ptr + offset, mask=mask, other=0.0))
            dx += tl.where(mask & (tap == r * S + s), dy, 0.0)
    tl.store(dx_ptr + dx_offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
