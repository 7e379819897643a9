"""Both gradients of a 1x1 convolution of stride 1 in one pass over memory.

Its pixels are rows, so with dy the gradient of the output (M pixels x K), z the input (M x C) and w the weight (K x C)

    dz = dy @ w            dw = dy.T @ z

and both need the same rows of dy, which is made of two tensors where there is a correction. Here a block of rows is
read once: dy is computed, rounded and multiplied from both sides. dw stays in registers for a whole band of pixels,
which bounds filters x channels of a program; more channels are split over programs, which read dy again. Both products
are computed transposed: so dy is the right side of either, which tensor cores read from shared memory, and no registers
hold it.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.conv2d import channel_vector, multiples
from fastcnn.kernels.triton.conv_fusion import (
    corrected,
    pending_activation,
    pending_activation_backward,
    store_sums,
)


@triton.jit(do_not_specialize=["M", "share"])
def conv2d_backward_kernel(
    dy_ptr,  # [M, K]
    y_ptr,  # correction of dy: [M, K]; without it, b and c dy is multiplied by a
    a_ptr,
    b_ptr,
    c_ptr,
    w_ptr,  # [K, C]
    x_ptr,  # [M, C], as all that follow
    scale_ptr,  # pending activation of x
    shift_ptr,
    left_ptr,  # join
    add_ptr,
    dx_ptr,
    dw_ptr,  # [bands, K, C]
    sums_ptr,  # [bands, 2, C]
    M,
    C,
    K,
    share,  # pixels of a band, a multiple of BLOCK_M
    stride_x,  # elements from one pixel to the next; None where it is C
    stride_add,
    stride_dx,
    PENDING: tl.constexpr,  # activation of x, None if it is plain
    PENDING_SLOPE: tl.constexpr,
    SCALED: tl.constexpr,  # dx is the gradient of x, else that of x * scale + shift
    MASKED: tl.constexpr,  # x is the output of a join with relu
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,  # not below K
    STAGES: tl.constexpr,
):
    # one program computes dx of a band of pixels x BLOCK_C channels and, summed over the band, dw of all filters x
    # these channels
    C, K, _ = multiples(C, K, 0, 8)
    stride_x = C if stride_x is None else stride_x // 8 * 8
    stride_add = C if stride_add is None else stride_add // 8 * 8
    stride_dx = C if stride_dx is None else stride_dx // 8 * 8
    columns = tl.cdiv(C, BLOCK_C)
    band = tl.program_id(0) // columns
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    row = tl.arange(0, BLOCK_M)
    start = band * share
    stop = tl.minimum(start + share, M)
    whole = (k < K)[:, None] & (c < C)[None, :]
    w = tl.load(w_ptr + k[:, None] * C + c[None, :], mask=whole, other=0.0)  # [BLOCK_K, BLOCK_C]
    dw = tl.zeros((BLOCK_C, BLOCK_K), dtype=tl.float32)
    first = tl.zeros((BLOCK_C,), dtype=tl.float32)
    second = tl.zeros((BLOCK_C,), dtype=tl.float32)
    # stages given to the loop count for all its loads, not only for what is multiplied; what does not change from step
    # to step is computed anew: hoisted, it would fill the registers
    for m0 in tl.range(start, stop, BLOCK_M, num_stages=STAGES, disable_licm=True):
        inside = (m0 + row < stop)[:, None]
        m = m0
        if INT64:
            m = m.to(tl.int64)
        reads_dy = inside & (k < K)[None, :]
        reads_x = inside & (c < C)[None, :]
        dy_offsets = row[:, None] * K + k[None, :]
        dy = tl.load(dy_ptr + m * K + dy_offsets, mask=reads_dy, other=0.0)  # [BLOCK_M, BLOCK_K]
        if a_ptr is not None:
            if y_ptr is not None:
                y = tl.load(y_ptr + m * K + dy_offsets, mask=reads_dy, other=0.0).to(tl.float32)
                a = channel_vector(a_ptr, k, K)[None, :]
                b = channel_vector(b_ptr, k, K)[None, :]
                constant = channel_vector(c_ptr, k, K)[None, :]
                value = corrected(dy.to(tl.float32), y, a, b, constant)
            else:
                value = dy.to(tl.float32) * channel_vector(a_ptr, k, K)[None, :]
            # rows past the end stay zero
            dy = tl.where(inside, value, 0.0).to(dy.dtype)
        x = tl.load(x_ptr + m * stride_x + row[:, None] * stride_x + c[None, :], mask=reads_x, other=0.0)
        z = x  # [BLOCK_M, BLOCK_C]
        if PENDING is not None:
            scale = channel_vector(scale_ptr, c, C)[None, :]
            shift = channel_vector(shift_ptr, c, C)[None, :]
            z = pending_activation(x.to(tl.float32), scale, shift, PENDING_SLOPE, PENDING)
            # there, too: fp16 could make Inf of an activation of zero, and Inf times zero is NaN
            z = tl.where(inside, z, 0.0).to(x.dtype)
        dx = tl.trans(tl.dot(tl.trans(w), tl.trans(dy), out_dtype=tl.float32))
        dw = tl.dot(tl.trans(z), dy, dw, out_dtype=tl.float32)
        if left_ptr is None and PENDING is not None:
            raw = x.to(tl.float32)
            dx = pending_activation_backward(dx, raw, scale, shift, PENDING_SLOPE, PENDING)
            dx = tl.where(inside, dx, 0.0)
            first += tl.sum(dx * raw, axis=0)
            second += tl.sum(dx, axis=0)
            if SCALED:
                dx = dx * scale
        if add_ptr is not None:
            pointers = add_ptr + m * stride_add + row[:, None] * stride_add + c[None, :]
            dx += tl.load(pointers, mask=reads_x, other=0.0).to(tl.float32)
        if left_ptr is not None:
            dx = tl.where(x <= 0, 0.0, dx) if MASKED else tl.where(inside, dx, 0.0)
            left = tl.load(left_ptr + m * C + row[:, None] * C + c[None, :], mask=reads_x, other=0.0).to(tl.float32)
            first += tl.sum(dx * left, axis=0)
            second += tl.sum(dx, axis=0)
        pointers = dx_ptr + m * stride_dx + row[:, None] * stride_dx + c[None, :]
        tl.store(pointers, dx.to(dx_ptr.dtype.element_ty), mask=reads_x)
    # 64 bits: slabs of many bands reach far
    slab = dw_ptr + band.to(tl.int64) * K * C
    tl.store(slab + k[:, None] * C + c[None, :], tl.trans(dw), mask=whole)
    if sums_ptr is not None:
        store_sums(sums_ptr + band * 2 * C, first, second, c, c < C, C)
