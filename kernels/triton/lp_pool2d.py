"""Power-average pooling, forward and backward in one pass each. The backward gathers from the windows over a pixel.

y[n,c,p,q] = (sum over r, s of x[n, c, p*stride_h + r, q*stride_w + s]^NORM * factor)^(1 / NORM)

factor is 1 for a window inside the image; one that hangs over its end (ceil_mode) counts as if it were whole, as in
torch.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.pooling import pixel_tile


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """x^EXPONENT; NaN for a negative x unless the exponent is whole."""
    # a constant exponent, because a float argument would be fp32
    WHOLE: tl.constexpr = EXPONENT % 1 == 0
    if EXPONENT == 0:
        return tl.zeros_like(x) + 1.0
    elif EXPONENT == 1:
        return x
    elif EXPONENT == 2:
        return x * x
    elif EXPONENT == 3:
        return x * x * x
    elif EXPONENT == 0.5:
        return tl.sqrt(x)
    elif EXPONENT == -1:
        return 1.0 / x
    elif WHOLE:
        size = tl.exp2(tl.log2(tl.abs(x)) * EXPONENT)
        if EXPONENT % 2 == 0:
            return size
        else:
            return tl.where(x < 0, -size, size)
    else:
        # as IEEE 754's pow, which takes -inf for inf here
        return tl.exp2(tl.log2(tl.where(x == -float("inf"), float("inf"), x)) * EXPONENT)


@triton.jit
def _factor(h0, w0, H, W, R: tl.constexpr, S: tl.constexpr, x):
    """What the sum of a window that hangs over the end of the image is multiplied by, in x's dtype."""
    pixels = tl.minimum(R, H - h0) * tl.minimum(S, W - w0)
    return R * S / pixels.to(x.dtype)


@triton.jit
def lp_pool2d_forward_kernel(
    x_ptr, y_ptr,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    rows, columns, C, H, W, P, Q,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, NORM: tl.constexpr,
    UNROLL: tl.constexpr, CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program computes BLOCK_A x BLOCK_B outputs: pixels x channels (channels_last) or planes x pixels
    n, c, p, q, y_offset, inside = pixel_tile(rows, columns, C, P, Q, CHANNELS_LAST, INT64, BLOCK_A, BLOCK_B)
    base = n * x_stride_n + c * x_stride_c
    h0, w0 = p * STRIDE_H, q * STRIDE_W
    total = accumulator(tl.zeros([BLOCK_A, BLOCK_B], x_ptr.dtype.element_ty))
    if UNROLL:
        for r in tl.static_range(R):
            for s in tl.static_range(S):
                mask = inside & (h0 + r < H) & (w0 + s < W)
                x = tl.load(x_ptr + (base + (h0 + r) * x_stride_h + (w0 + s) * x_stride_w), mask=mask, other=0.0)
                # outside the image 0 counts, whatever its power
                total += tl.where(mask, power(accumulator(x), NORM), 0.0)
    else:
        for r in range(R):
            for s in range(S):
                mask = inside & (h0 + r < H) & (w0 + s < W)
                x = tl.load(x_ptr + (base + (h0 + r) * x_stride_h + (w0 + s) * x_stride_w), mask=mask, other=0.0)
                total += tl.where(mask, power(accumulator(x), NORM), 0.0)
    y = power(total * _factor(h0, w0, H, W, R, S, total), 1 / NORM)
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _collect(
    total, dy_ptr, y_ptr, n, c, h, w, inside, C, H, W, P, Q, i, j,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, NORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """total plus what flows back from the i-th by j-th last window that can reach each pixel, but for x^(NORM - 1)."""
    p, q = h // STRIDE_H - i, w // STRIDE_W - j
    h0, w0 = p * STRIDE_H, q * STRIDE_W
    mask = inside & (p >= 0) & (p < P) & (q >= 0) & (q < Q) & (h - h0 < R) & (w - w0 < S)
    if CHANNELS_LAST:
        offset = ((n * P + p) * Q + q) * C + c
    else:
        offset = ((n * C + c) * P + p) * Q + q
    dy = accumulator(tl.load(dy_ptr + offset, mask=mask, other=0.0))
    y = accumulator(tl.load(y_ptr + offset, mask=mask, other=0.0))
    slope = dy * power(y, 1 - NORM) * _factor(h0, w0, H, W, R, S, total)
    # where the sum is 0 there is no gradient, by definition; where it is NaN, torch's NORM of 1 has none
    if NORM == 1:
        return total + tl.where(mask & (tl.abs(y) > 0), slope, 0.0)
    else:
        return total + tl.where(mask & (y != 0), slope, 0.0)


@triton.jit
def lp_pool2d_backward_kernel(
    dy_ptr, x_ptr, y_ptr, dx_ptr,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    rows, columns, C, H, W, P, Q,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, NORM: tl.constexpr,
    COVER_H: tl.constexpr, COVER_W: tl.constexpr, UNROLL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program computes the gradient of BLOCK_A x BLOCK_B input elements; at most COVER_H x COVER_W windows reach one
    n, c, h, w, dx_offset, inside = pixel_tile(rows, columns, C, H, W, CHANNELS_LAST, INT64, BLOCK_A, BLOCK_B)
    total = accumulator(tl.zeros([BLOCK_A, BLOCK_B], dy_ptr.dtype.element_ty))
    if UNROLL:
        for i in tl.static_range(COVER_H):
            for j in tl.static_range(COVER_W):
                total = _collect(
                    total, dy_ptr, y_ptr, n, c, h, w, inside, C, H, W, P, Q, i, j, R, S, STRIDE_H, STRIDE_W, NORM,
                    CHANNELS_LAST,
                )  # fmt: skip
    else:
        for i in range(COVER_H):
            for j in range(COVER_W):
                total = _collect(
                    total, dy_ptr, y_ptr, n, c, h, w, inside, C, H, W, P, Q, i, j, R, S, STRIDE_H, STRIDE_W, NORM,
                    CHANNELS_LAST,
                )  # fmt: skip
    offset = n * x_stride_n + c * x_stride_c + h * x_stride_h + w * x_stride_w
    x = accumulator(tl.load(x_ptr + offset, mask=inside, other=1.0))
    dx = total * power(x, NORM - 1)
    tl.store(dx_ptr + dx_offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
