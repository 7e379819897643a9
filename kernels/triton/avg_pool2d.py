"""Average pooling. The backward gathers: each input pixel asks the windows that cover it.

y[n,c,p,q] = 1 / divisor * sum over r, s of x[n, c, p*stride_h - pad_h + r, q*stride_w - pad_w + s]
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.pooling import pixel_tile


@triton.jit
def _extent(start, size, WINDOW: tl.constexpr, PAD: tl.constexpr, COUNT_PAD: tl.constexpr):
    """How many pixels a window counts along one axis: those of the image, or those of the padding as well."""
    end = tl.minimum(start + WINDOW, size + PAD)
    if COUNT_PAD:
        return end - start
    else:
        return tl.minimum(end, size) - tl.maximum(start, 0)


@triton.jit
def avg_pool2d_forward_kernel(
    x_ptr, y_ptr,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    rows, columns, C, H, W, P, Q, divisor,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, COUNT_PAD: tl.constexpr, OVERRIDE: tl.constexpr,
    UNROLL: tl.constexpr, CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program computes BLOCK_A x BLOCK_B outputs: pixels x channels (channels_last) or planes x pixels
    n, c, p, q, y_offset, inside = pixel_tile(rows, columns, C, P, Q, CHANNELS_LAST, INT64, BLOCK_A, BLOCK_B)
    base = n * x_stride_n + c * x_stride_c
    h0, w0 = p * STRIDE_H - PAD_H, q * STRIDE_W - PAD_W
    total = accumulator(tl.zeros([BLOCK_A, BLOCK_B], x_ptr.dtype.element_ty))
    if UNROLL:
        for r in tl.static_range(R):
            for s in tl.static_range(S):
                h, w = h0 + r, w0 + s
                mask = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                x = tl.load(x_ptr + (base + h * x_stride_h + w * x_stride_w), mask=mask, other=0.0)
                total += accumulator(x)
    else:
        for r in range(R):
            for s in range(S):
                h, w = h0 + r, w0 + s
                mask = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                x = tl.load(x_ptr + (base + h * x_stride_h + w * x_stride_w), mask=mask, other=0.0)
                total += accumulator(x)
    if OVERRIDE:
        y = total / divisor
    else:
        y = total / (_extent(h0, H, R, PAD_H, COUNT_PAD) * _extent(w0, W, S, PAD_W, COUNT_PAD))
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _collect(
    dx, dy_ptr, n, c, h, w, inside, C, H, W, P, Q, divisor, i, j,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, COUNT_PAD: tl.constexpr, OVERRIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """dx plus what flows back from the i-th by j-th last window that can reach each pixel."""
    p, q = (h + PAD_H) // STRIDE_H - i, (w + PAD_W) // STRIDE_W - j
    h0, w0 = p * STRIDE_H - PAD_H, q * STRIDE_W - PAD_W
    mask = inside & (p >= 0) & (p < P) & (q >= 0) & (q < Q) & (h - h0 < R) & (w - w0 < S)
    if CHANNELS_LAST:
        offset = ((n * P + p) * Q + q) * C + c
    else:
        offset = ((n * C + c) * P + p) * Q + q
    dy = accumulator(tl.load(dy_ptr + offset, mask=mask, other=0.0))
    if OVERRIDE:
        return dx + dy / divisor
    else:
        count = _extent(h0, H, R, PAD_H, COUNT_PAD) * _extent(w0, W, S, PAD_W, COUNT_PAD)
        # no window, no count: 0 / 0 must not become NaN
        return dx + dy / tl.where(mask, count, 1)


@triton.jit
def avg_pool2d_backward_kernel(
    dy_ptr, dx_ptr,
    rows, columns, C, H, W, P, Q, divisor,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, COUNT_PAD: tl.constexpr, OVERRIDE: tl.constexpr,
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
                    dx, dy_ptr, n, c, h, w, inside, C, H, W, P, Q, divisor, i, j, R, S, STRIDE_H, STRIDE_W,
                    PAD_H, PAD_W, COUNT_PAD, OVERRIDE, CHANNELS_LAST,
                )  # fmt: skip
    else:
        for i in range(COVER_H):
            for j in range(COVER_W):
                dx = _collect(
                    dx, dy_ptr, n, c, h, w, inside, C, H, W, P, Q, divisor, i, j, R, S, STRIDE_H, STRIDE_W,
                    PAD_H, PAD_W, COUNT_PAD, OVERRIDE, CHANNELS_LAST,
                )  # fmt: skip
    tl.store(dx_ptr + dx_offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
