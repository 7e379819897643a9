"""Max pooling. The forward also stores which tap of its window each maximum came from; the backward gathers by it.

y[n,c,p,q] = max over r, s of x[n, c, p*stride_h - pad_h + r*dilation_h, q*stride_w - pad_w + s*dilation_w]

Of a pending activation x is f(raw * scale + shift), made on load; its backward is in pending_pool.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.pooling import pixel_tile, take, transformed


@triton.jit
def _take(
    best, tap, x_ptr, scale, shift, base, inside, h0, w0, x_stride_h, x_stride_w, H, W, r, s, S,
    DILATION_H, DILATION_W, SLOPE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Maximum so far and its tap, after a look at tap (r, s)."""
    h, w = h0 + r * DILATION_H, w0 + s * DILATION_W
    mask = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x = accumulator(tl.load(x_ptr + (base + h * x_stride_h + w * x_stride_w), mask=mask, other=-float("inf")))
    if scale is not None:
        x = tl.where(mask, transformed(x, scale, shift, SLOPE, ACTIVATION), -float("inf"))
    return take(best, tap, x, r * S + s)


@triton.jit
def max_pool2d_forward_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr, tap_ptr,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    rows, columns, C, H, W, P, Q,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    SLOPE: tl.constexpr, ACTIVATION: tl.constexpr, STORE_TAP: tl.constexpr, UNROLL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program computes BLOCK_A x BLOCK_B outputs: pixels x channels (channels_last) or planes x pixels
    n, c, p, q, y_offset, inside = pixel_tile(rows, columns, C, P, Q, CHANNELS_LAST, INT64, BLOCK_A, BLOCK_B)
    base = n * x_stride_n + c * x_stride_c
    h0, w0 = p * STRIDE_H - PAD_H, q * STRIDE_W - PAD_W
    best = accumulator(tl.zeros([BLOCK_A, BLOCK_B], x_ptr.dtype.element_ty)) - float("inf")
    scale, shift = None, None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)
        shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)
    # a window of nothing but -inf: its first tap inside the image, as in torch
    first_r = tl.where(h0 < 0, (DILATION_H - 1 - h0) // DILATION_H, 0)
    first_s = tl.where(w0 < 0, (DILATION_W - 1 - w0) // DILATION_W, 0)
    tap = (first_r * S + first_s).to(tl.int32) + tl.zeros([BLOCK_A, BLOCK_B], tl.int32)
    if UNROLL:
        for r in tl.static_range(R):
            for s in tl.static_range(S):
                best, tap = _take(
                    best, tap, x_ptr, scale, shift, base, inside, h0, w0, x_stride_h, x_stride_w, H, W, r, s, S,
                    DILATION_H, DILATION_W, SLOPE, ACTIVATION,
                )  # fmt: skip
    else:
        for r in range(R):
            for s in range(S):
                best, tap = _take(
                    best, tap, x_ptr, scale, shift, base, inside, h0, w0, x_stride_h, x_stride_w, H, W, r, s, S,
                    DILATION_H, DILATION_W, SLOPE, ACTIVATION,
                )  # fmt: skip
    tl.store(y_ptr + y_offset, best.to(y_ptr.dtype.element_ty), mask=inside)
    if STORE_TAP:
        tl.store(tap_ptr + y_offset, tap.to(tap_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _collect(
    dx, dy_ptr, tap_ptr, n, c, h, w, inside, C, P, Q, i, j,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """dx plus what flows back from the i-th by j-th last window that can reach each pixel."""
    p, q = (h + PAD_H) // STRIDE_H - i, (w + PAD_W) // STRIDE_W - j
    # how far the pixel lies into that window, and by which tap the window would see it
    far_h, far_w = h + PAD_H - p * STRIDE_H, w + PAD_W - q * STRIDE_W
    r, s = far_h // DILATION_H, far_w // DILATION_W
    mask = inside & (p >= 0) & (p < P) & (q >= 0) & (q < Q) & (r < R) & (s < S)
    if DILATION_H > 1:
        mask = mask & (far_h % DILATION_H == 0)
    if DILATION_W > 1:
        mask = mask & (far_w % DILATION_W == 0)
    if CHANNELS_LAST:
        offset = ((n * P + p) * Q + q) * C + c
    else:
        offset = ((n * C + c) * P + p) * Q + q
    tap = tl.load(tap_ptr + offset, mask=mask, other=0).to(tl.int32)
    dy = accumulator(tl.load(dy_ptr + offset, mask=mask, other=0.0))
    return dx + tl.where(mask & (tap == r * S + s), dy, 0.0)


@triton.jit
def max_pool2d_backward_kernel(
    dy_ptr, tap_ptr, dx_ptr,
    rows, columns, C, H, W, P, Q,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    COVER_H: tl.constexpr, COVER_W: tl.constexpr, UNROLL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program computes the gradient of BLOCK_A x BLOCK_B input elements; at most COVER_H x COVER_W windows reach one
    n, c, h, w, dx_offset, inside = pixel_tile(rows, columns, C, H, W, CHANNELS_LAST, INT64, BLOCK_A, BLOCK_B)
    dx = accumulator(tl.zeros([BLOCK_A, BLOCK_B], dy_ptr.dtype.element_ty))
    if UNROLL:
        for i in tl.static_range(COVER_H):
            for j in tl.static_range(COVER_W):
                dx = _collect(
                    dx, dy_ptr, tap_ptr, n, c, h, w, inside, C, P, Q, i, j, R, S, STRIDE_H, STRIDE_W,
                    PAD_H, PAD_W, DILATION_H, DILATION_W, CHANNELS_LAST,
                )  # fmt: skip
    else:
        for i in range(COVER_H):
            for j in range(COVER_W):
                dx = _collect(
                    dx, dy_ptr, tap_ptr, n, c, h, w, inside, C, P, Q, i, j, R, S, STRIDE_H, STRIDE_W,
                    PAD_H, PAD_W, DILATION_H, DILATION_W, CHANNELS_LAST,
                )  # fmt: skip
    tl.store(dx_ptr + dx_offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def from_windows(
    dy_ptr, tap_ptr, offset, a, b, inside, C, P, Q, i: tl.constexpr, j: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, BEFORE_H: tl.constexpr, BEFORE_W: tl.constexpr,
    AFTER_H: tl.constexpr, AFTER_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """What flows back to pixel (i, j) of each cell. The compiler loads once what several pixels of a cell load."""
    dx = accumulator(tl.zeros(inside.shape, dy_ptr.dtype.element_ty))
    for k in tl.static_range(-BEFORE_H, AFTER_H + 1):
        for l in tl.static_range(-BEFORE_W, AFTER_W + 1):
            # window (a + k, b + l) sees the pixel by tap (r, s), if at all
            r, s = i + PAD_H - k * STRIDE_H, j + PAD_W - l * STRIDE_W
            if r >= 0 and r < R and s >= 0 and s < S:
                mask = inside & (a + k >= 0) & (a + k < P) & (b + l >= 0) & (b + l < Q)
                if CHANNELS_LAST:
                    window = offset + (k * Q + l) * C
                else:
                    window = offset + (k * Q + l)
                tap = tl.load(tap_ptr + window, mask=mask, other=255)
                dy = accumulator(tl.load(dy_ptr + window, mask=mask, other=0.0))
                dx += tl.where(tap == r * S + s, dy, 0.0)
    return dx


@triton.jit
def max_pool2d_backward_cells_kernel(
    dy_ptr, tap_ptr, dx_ptr,
    rows, columns, C, H, W, P, Q, cells_h, cells_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, BEFORE_H: tl.constexpr, BEFORE_W: tl.constexpr,
    AFTER_H: tl.constexpr, AFTER_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program computes the gradient of BLOCK_A x BLOCK_B cells of STRIDE_H x STRIDE_W (1 or 2) input elements, so
    # that which taps can reach an element is known to the compiler
    n, c, a, b, _, inside = pixel_tile(rows, columns, C, cells_h, cells_w, CHANNELS_LAST, INT64, BLOCK_A, BLOCK_B)
    h, w = a * STRIDE_H, b * STRIDE_W
    if CHANNELS_LAST:
        offset = ((n * P + a) * Q + b) * C + c
        target = dx_ptr + (((n * H + h) * W + w) * C + c)
        right, down = C, W * C
    else:
        offset = ((n * C + c) * P + a) * Q + b
        target = dx_ptr + (((n * C + c) * H + h) * W + w)
        right, down = 1, W
    dx00 = from_windows(
        dy_ptr, tap_ptr, offset, a, b, inside, C, P, Q, 0, 0, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
        BEFORE_H, BEFORE_W, AFTER_H, AFTER_W, CHANNELS_LAST,
    )  # fmt: skip
    if STRIDE_W == 2:
        dx01 = from_windows(
            dy_ptr, tap_ptr, offset, a, b, inside, C, P, Q, 0, 1, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
            BEFORE_H, BEFORE_W, AFTER_H, AFTER_W, CHANNELS_LAST,
        )  # fmt: skip
    if STRIDE_H == 2:
        dx10 = from_windows(
            dy_ptr, tap_ptr, offset, a, b, inside, C, P, Q, 1, 0, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
            BEFORE_H, BEFORE_W, AFTER_H, AFTER_W, CHANNELS_LAST,
        )  # fmt: skip
    if STRIDE_H == 2 and STRIDE_W == 2:
        dx11 = from_windows(
            dy_ptr, tap_ptr, offset, a, b, inside, C, P, Q, 1, 1, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
            BEFORE_H, BEFORE_W, AFTER_H, AFTER_W, CHANNELS_LAST,
        )  # fmt: skip
    # all loads before the first store, which might change what they load for all that the compiler knows
    tl.store(target, dx00.to(dx_ptr.dtype.element_ty), mask=inside)
    if STRIDE_W == 2:
        tl.store(target + right, dx01.to(dx_ptr.dtype.element_ty), mask=inside & (w + 1 < W))
    if STRIDE_H == 2:
        tl.store(target + down, dx10.to(dx_ptr.dtype.element_ty), mask=inside & (h + 1 < H))
    if STRIDE_H == 2 and STRIDE_W == 2:
        tl.store(target + (down + right), dx11.to(dx_ptr.dtype.element_ty), mask=inside & (h + 1 < H) & (w + 1 < W))
