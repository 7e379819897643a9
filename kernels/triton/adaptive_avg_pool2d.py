"""Adaptive average pooling: output pixel p averages the input rows from floor(p*H/P) to ceil((p+1)*H/P), columns alike.

Global pooling (1x1) has a kernel of its own that reads whole tiles; the others loop over their window.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.pooling import part_end, part_start, pixel_tile, transformed


@triton.jit
def adaptive_avg_pool2d_forward_kernel(
    x_ptr, y_ptr,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    rows, columns, C, H, W, P, Q, max_r, max_s,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program computes BLOCK_A x BLOCK_B outputs: pixels x channels (channels_last) or planes x pixels
    n, c, p, q, y_offset, inside = pixel_tile(rows, columns, C, P, Q, CHANNELS_LAST, INT64, BLOCK_A, BLOCK_B)
    base = n * x_stride_n + c * x_stride_c
    h0, h1 = part_start(p, P, H), part_end(p, P, H)
    w0, w1 = part_start(q, Q, W), part_end(q, Q, W)
    total = accumulator(tl.zeros([BLOCK_A, BLOCK_B], x_ptr.dtype.element_ty))
    for r in range(max_r):
        for s in range(max_s):
            mask = inside & (h0 + r < h1) & (w0 + s < w1)
            x = tl.load(x_ptr + (base + (h0 + r) * x_stride_h + (w0 + s) * x_stride_w), mask=mask, other=0.0)
            total += accumulator(x)
    y = total / ((h1 - h0) * (w1 - w0))
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def global_avg_pool2d_forward_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    rows, columns, C, H, W,
    SLOPE: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program computes the means of BLOCK_B channels of an image, BLOCK_A pixels at a time (channels_last; rows is
    # the number of its pixels), or of BLOCK_A planes, BLOCK_B pixels at a time (contiguous; columns is that number)
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    a, b = tl.arange(0, BLOCK_A)[:, None], tl.arange(0, BLOCK_B)[None, :]
    total = accumulator(tl.zeros([BLOCK_A, BLOCK_B], x_ptr.dtype.element_ty))
    if CHANNELS_LAST:
        blocks = tl.cdiv(C, BLOCK_B)
        n, c = pid // blocks, pid % blocks * BLOCK_B + b
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)
            shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)
        for start in range(0, rows, BLOCK_A):
            pixel = start + a
            mask = (pixel < rows) & (c < C)
            offset = n * x_stride_n + c * x_stride_c + pixel // W * x_stride_h + pixel % W * x_stride_w
            x = accumulator(tl.load(x_ptr + offset, mask=mask, other=0.0))
            if scale_ptr is not None:
                x = tl.where(mask, transformed(x, scale, shift, SLOPE, ACTIVATION), 0.0)
            total += x
        y = tl.sum(total, axis=0)[None, :] / rows
        tl.store(y_ptr + n * C + c, y.to(y_ptr.dtype.element_ty), mask=c < C)
    else:
        plane = pid * BLOCK_A + a
        n, c = plane // C, plane % C
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + c)
            shift = tl.load(shift_ptr + c)
        for start in range(0, columns, BLOCK_B):
            pixel = start + b
            mask = (plane < rows) & (pixel < columns)
            offset = n * x_stride_n + c * x_stride_c + pixel // W * x_stride_h + pixel % W * x_stride_w
            x = accumulator(tl.load(x_ptr + offset, mask=mask, other=0.0))
            if scale_ptr is not None:
                x = tl.where(mask, transformed(x, scale, shift, SLOPE, ACTIVATION), 0.0)
            total += x
        y = tl.sum(total, axis=1)[:, None] / columns
        tl.store(y_ptr + plane, y.to(y_ptr.dtype.element_ty), mask=plane < rows)


@triton.jit
def adaptive_avg_pool2d_backward_kernel(
    dy_ptr, dx_ptr,
    rows, columns, C, H, W, P, Q, cover_h, cover_w,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program computes the gradient of BLOCK_A x BLOCK_B input elements; at most cover_h x cover_w windows reach one
    n, c, h, w, dx_offset, inside = pixel_tile(rows, columns, C, H, W, CHANNELS_LAST, INT64, BLOCK_A, BLOCK_B)
    # the windows over pixel h are those that the parts of the output, laid over the input, would give it
    p0, p1 = part_start(h, H, P), part_end(h, H, P)
    q0, q1 = part_start(w, W, Q), part_end(w, W, Q)
    dx = accumulator(tl.zeros([BLOCK_A, BLOCK_B], dy_ptr.dtype.element_ty))
    for i in range(cover_h):
        p = p0 + i
        count_h = part_end(p, P, H) - part_start(p, P, H)
        for j in range(cover_w):
            q = q0 + j
            mask = inside & (p < p1) & (q < q1)
            if CHANNELS_LAST:
                offset = ((n * P + p) * Q + q) * C + c
            else:
                offset = ((n * C + c) * P + p) * Q + q
            dy = accumulator(tl.load(dy_ptr + offset, mask=mask, other=0.0))
            dx += dy / (count_h * (part_end(q, Q, W) - part_start(q, Q, W)))
    tl.store(dx_ptr + dx_offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
