"""The first convolution of a network, with one to four channels: forward and gradient of the weight.

With so few channels a tap is too short for a tensor core. But in NHWC memory a row of the window under the filter is
one run of S * C elements, and the whole window of one pixel, of many images, is one box that the tensor memory
accelerator copies: [images, rows, run]. So a tile is one pixel of BLOCK_M images, as in conv2d_images.py, its
reduction is a single step of ROWS * RUN elements, both powers of two, and the padding is what the box finds outside
the tensor: zero.

A box must start on 16 bytes, but a window may start anywhere. So the box starts up to 7 elements before it, and the
weight is laid out likewise, [K, ROWS * RUN] with zeros beside the filter, once for each shift that occurs. Columns
q, q + SHIFTS, q + 2 * SHIFTS, ... have the same shift: a program keeps to one of these classes, and to one weight.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.activation import activate
from fastcnn.kernels.triton.conv_fusion import corrected, store_sums


@triton.jit
def columns_of_class(shift_class, Q, SHIFTS: tl.constexpr):
    """How many output columns have this class's shift; at least one, so that it can divide."""
    return tl.maximum(tl.cdiv(Q - shift_class, SHIFTS), 1)


@triton.jit
def window_start(q, stride_w, pad_w, C):
    """First element under the filter, from the left edge of the image, and how far behind 16 bytes it lies."""
    start = (q * stride_w - pad_w) * C
    return start, start & 7


@triton.jit(do_not_specialize=["N", "P", "Q", "pad_h", "pad_w"])
def conv2d_stem_kernel(
    x_desc,  # [N, H, W * C]
    weight_desc,  # [SHIFTS * K, ROWS * RUN]
    y_desc,  # [N, P * Q, K]
    add_desc,  # HAS_ADD: as y_desc
    bias_ptr,
    pivot_ptr,
    sums_ptr,  # SUMS: [N blocks * P * Q, 2, K]
    N,
    P,
    Q,
    C,
    K,
    R,
    run,  # S * C, elements of a row of the window
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    SHIFTS: tl.constexpr,
):
    # one program computes tiles of BLOCK_M images x BLOCK_N filters at one pixel, one after the other
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    first_k = pid % tiles_n * BLOCK_N
    shift_class = pid // tiles_n % SHIFTS
    k = first_k + tl.arange(0, BLOCK_N)
    inside = k < K
    weight = weight_desc.load([shift_class * K + first_k, 0]).T  # [ROWS * RUN, BLOCK_N], kept for all tiles
    # elements of the box beside the filter meet zeros of the weight, but Inf or NaN times zero would be NaN
    _, shift = window_start(shift_class, stride_w, pad_w, C)
    element = tl.arange(0, ROWS * RUN)
    run_start = element // RUN * RUN + shift
    under_filter = ((element >= run_start) & (element < run_start + run) & (element < R * RUN))[None, :]
    per_row = columns_of_class(shift_class, Q, SHIFTS)
    tiles = tl.where(shift_class < Q, tl.cdiv(N, BLOCK_M) * P * per_row, 0)
    for tile in range(pid // (tiles_n * SHIFTS), tiles, tl.num_programs(0) // (tiles_n * SHIFTS)):
        image = tile // (P * per_row) * BLOCK_M
        p = tile // per_row % P
        q = tile % per_row * SHIFTS + shift_class
        pixel = p * Q + q
        start, _ = window_start(q, stride_w, pad_w, C)
        x = x_desc.load([image, p * stride_h - pad_h, start - shift])
        x = tl.where(under_filter, x.reshape(BLOCK_M, ROWS * RUN), 0.0)
        out = tl.dot(x, weight, out_dtype=tl.float32)
        if HAS_BIAS:
            out += tl.load(bias_ptr + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        if HAS_ADD:
            out += add_desc.load([image, pixel, first_k]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
        if ACTIVATION != "none":
            out = activate(out, SLOPE, ACTIVATION)
        y = out.to(y_desc.dtype)
        y_desc.store([image, pixel, first_k], y.reshape(BLOCK_M, 1, BLOCK_N))
        if SUMS:
            valid = ((image + tl.arange(0, BLOCK_M)) < N)[:, None]
            pivot = tl.load(pivot_ptr + k, mask=inside, other=0.0)[None, :]
            centred = tl.where(valid, y.to(tl.float32) - pivot, 0.0)
            first, second = tl.sum(centred, axis=0), tl.sum(centred * centred, axis=0)
            row = image // BLOCK_M * (P * Q) + pixel
            store_sums(sums_ptr + row * (2 * K), first, second, k, inside, K)


@triton.jit(do_not_specialize=["N", "P", "Q", "splits", "pad_h", "pad_w"])
def conv2d_stem_backward_weight_kernel(
    dy_desc,  # [N, P * Q * K]
    x_desc,  # [N, H, W * C]
    dw_ptr,  # [splits, SHIFTS, K, ROWS * RUN]
    corrected_desc,  # CORRECTED: as dy_desc; None, as b_ptr and c_ptr: multiply by a
    a_ptr,  # CORRECTED
    b_ptr,
    c_ptr,
    N,
    P,
    Q,
    C,
    K,
    splits,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    CORRECTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    SHIFTS: tl.constexpr,
):
    # one program computes BLOCK_M filters x the whole box, for one class of columns, summed over its share of their
    # (BLOCK_K images, pixel) pairs
    tiles_m = tl.cdiv(K, BLOCK_M)
    pid = tl.program_id(0)
    first_k = pid % tiles_m * BLOCK_M
    shift_class = pid // tiles_m % SHIFTS
    split = pid // (tiles_m * SHIFTS)
    k = first_k + tl.arange(0, BLOCK_M)
    per_row = columns_of_class(shift_class, Q, SHIFTS)
    total = tl.where(shift_class < Q, tl.cdiv(N, BLOCK_K) * P * per_row, 0).to(tl.int64)
    first = (total * split // splits).to(tl.int32)
    last = (total * (split + 1) // splits).to(tl.int32)
    if CORRECTED:
        y_a = tl.load(a_ptr + k, mask=k < K, other=0.0)[:, None]
        if corrected_desc is not None:
            y_b = tl.load(b_ptr + k, mask=k < K, other=0.0)[:, None]
            y_c = tl.load(c_ptr + k, mask=k < K, other=0.0)[:, None]
    acc = tl.zeros((BLOCK_M, ROWS * RUN), dtype=tl.float32)
    for step in range(first, last):
        image = step // (P * per_row) * BLOCK_K
        p = step // per_row % P
        q = step % per_row * SHIFTS + shift_class
        start, shift = window_start(q, stride_w, pad_w, C)
        dy = dy_desc.load([image, (p * Q + q) * K + first_k]).T  # [BLOCK_M, BLOCK_K]
        x = x_desc.load([image, p * stride_h - pad_h, start - shift])
        if CORRECTED:
            if corrected_desc is not None:
                other = corrected_desc.load([image, (p * Q + q) * K + first_k]).T.to(tl.float32)
                value = corrected(dy.to(tl.float32), other, y_a, y_b, y_c)
            else:
                value = dy.to(tl.float32) * y_a
            # rows past the batch are zero, where the correction could make Inf of them
            valid = ((image + tl.arange(0, BLOCK_K)) < N)[None, :]
            dy = tl.where(valid, value, 0.0).to(dy.dtype)
        acc = tl.dot(dy, x.reshape(BLOCK_K, ROWS * RUN), acc, out_dtype=tl.float32)
    # 64 bits: many slabs reach far
    pointers = (
        dw_ptr
        + ((split * SHIFTS + shift_class).to(tl.int64) * K + k[:, None]) * (ROWS * RUN)
        + tl.arange(0, ROWS * RUN)[None, :]
    )
    tl.store(pointers, acc, mask=(k < K)[:, None])
