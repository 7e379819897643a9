"""Dense 2-D convolution whose tiles hold one pixel of many images: forward, gradient of the input and of the weight.

For one output pixel, a convolution is a sum of plain matrix products over its taps,

    y[:, p, q] = sum over r, s of x[:, h, w] @ weight[:, r, s].T        [images, K] = [images, C] @ [C, K]

and everything a gather has to compute per row (the shift into the image, the mask of the padding) is one scalar here.
So tiles are copied by the tensor memory accelerator as in a matrix product, taps in the padding are not computed at
all, and stride and dilation cost nothing. A convolution with one tap and one pixel per "image" is a matrix product:
1x1 filters of stride 1 come here with N * H * W images. Needs NHWC memory without gaps, a batch that fills a tile,
sm_90.

The first kernel is forward and gradient of the input: a table says, per pixel, where its taps start and how many there
are. It is persistent: while one tile is stored, the next one's blocks are on their way. The pipeliner only sees that
if what addresses the loads (tile, i, j, c) and what belongs to the store (done, left) are separate counters.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.activation import activate, activate_backward
from fastcnn.kernels.triton.conv_fusion import (
    corrected,
    pending_activation,
    pending_activation_backward,
    store_sums,
)


@triton.jit
def pixel_taps(taps_ptr, pixel, pixels):
    """A column of the table: (pixel of the input under the first tap, first tap, rows of taps, taps per row)."""
    column = taps_ptr + pixel
    return (
        tl.load(column + pixels),
        tl.load(column + 2 * pixels),
        tl.load(column + 3 * pixels),
        tl.load(column + 4 * pixels),
    )


@triton.jit
def count_steps(taps_ptr, pixels, columns, tiles, blocks):
    """Steps of all tiles of this program, which takes every num_programs-th."""
    rows = tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0))
    steps = 0
    for first in range(0, rows, 256):
        i = first + tl.arange(0, 256)
        tile = tl.program_id(0) + i * tl.num_programs(0)
        column = taps_ptr + tile // columns % pixels
        r = tl.load(column + 3 * pixels, mask=i < rows, other=0)
        s = tl.load(column + 4 * pixels, mask=i < rows, other=0)
        steps += tl.sum(r * s)
    return steps * blocks


@triton.jit
def gate_rows(gate, rows, channels, stride, image_rows, mask):
    """What a pending activation is multiplied by: these rows, of which an image has image_rows, and channels."""
    gate = tl.load(gate + (rows // image_rows * stride)[:, None] + channels[None, :], mask=mask, other=0.0)
    return gate.to(tl.float32)


@triton.jit(do_not_specialize=["N", "pixels", "step_r", "step_s", "tap_r", "tap_s", "image_rows"])
def conv2d_images_kernel(
    x_desc,  # [N, input pixels * C of all groups]
    weight_desc,  # [filters, taps * channels of a group]
    y_desc,  # [N, output pixels, K of all groups]
    taps_ptr,  # [5, output pixels]: output pixel, input pixel, tap, rows of taps, taps per row; heaviest first
    corrected_desc,  # CORRECTED: as x_desc; None, as b_ptr and c_ptr: multiply by a
    raw_desc,  # PENDING of a gradient, or a join's left side: as y_desc
    output_desc,  # of a JOIN: as y_desc
    add_desc,  # HAS_ADD: as y_desc
    bias_ptr,
    scale_ptr,
    shift_ptr,
    gate_ptr,  # the pending x's factor per image, of image_rows rows, and channel
    a_ptr,  # CORRECTED
    b_ptr,
    c_ptr,
    pivot_ptr,
    sums_ptr,  # SUMS, PENDING of a gradient or JOIN: [N blocks * output pixels, 2, K of all groups]
    N,
    pixels,  # of the output
    C,  # reduced: channels of a group of x
    K,  # columns: channels of a group of y
    G,
    step_r,  # input pixels from one row of taps to the next, and from one tap of a row to the next
    step_s,
    tap_r,  # the same in taps of the weight
    tap_s,
    x_pitch,  # elements from a pixel of x to the next, where it is not C * G; else None
    image_rows,
    BACKWARD: tl.constexpr,  # the weight is [reduced, taps, columns], else [columns, taps, reduced]
    ONE_PIXEL: tl.constexpr,  # a matrix product: one pixel, one tap, no table
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    ACTIVATION: tl.constexpr,  # of y; "none"
    SLOPE: tl.constexpr,
    CORRECTED: tl.constexpr,
    PENDING: tl.constexpr,  # activation of a pending x, applied on load (forward) or on store (backward); None if off
    PENDING_SLOPE: tl.constexpr,
    SCALED: tl.constexpr,  # PENDING of a gradient: the result is du * scale, else du
    JOIN: tl.constexpr,  # activation of a join whose gradient is stored, "none" or "relu"; None if off
    SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one program computes tiles of BLOCK_M images x BLOCK_N channels at one pixel, one after the other
    tiles_n = tl.cdiv(K, BLOCK_N)
    columns = tiles_n * G
    tiles = columns * pixels * tl.cdiv(N, BLOCK_M)
    blocks = tl.cdiv(C, BLOCK_K)
    programs = tl.num_programs(0)
    if x_pitch is None:
        x_pitch = C * G
    if ONE_PIXEL:
        steps = tl.cdiv(tiles - tl.program_id(0), programs) * blocks
    else:
        steps = count_steps(taps_ptr, pixels, columns, tiles, blocks)

    # what is loaded next: tile, tap (i, j) and first channel c of it
    tile = tl.program_id(0) - programs
    i = 0
    j = 0
    c = 0
    rows = 0
    per_row = 0
    image = 0
    group = 0
    first_k = 0
    x_pixel = 0
    tap = 0
    # what is stored next: tile, steps until then
    done = tl.program_id(0)
    left = blocks
    if not ONE_PIXEL:
        _, _, done_rows, done_per_row = pixel_taps(taps_ptr, done // columns % pixels, pixels)
        left = done_rows * done_per_row * blocks
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(steps):
        if i == rows:
            i = 0
            tile += programs
            first_k = tile % tiles_n * BLOCK_N
            group = tile // tiles_n % G
            if ONE_PIXEL:
                image = tile // columns * BLOCK_M
                rows = 1
                per_row = 1
            else:
                image = tile // (columns * pixels) * BLOCK_M
                x_pixel, tap, rows, per_row = pixel_taps(taps_ptr, tile // columns % pixels, pixels)
        first_x = (x_pixel + i * step_r + j * step_s) * x_pitch + group * C + c
        this_tap = tap + i * tap_r + j * tap_s
        x = x_desc.load([image, first_x])  # [BLOCK_M, BLOCK_K]
        # what no tap reaches stays zero, where a transform could make Inf of it: the weight is zero there, too
        channel = c + tl.arange(0, BLOCK_K)
        read = (channel < C) & (x_pixel >= 0)
        if PENDING is not None and not BACKWARD:
            scale = tl.load(scale_ptr + group * C + channel, mask=read, other=0.0)
            shift = tl.load(shift_ptr + group * C + channel, mask=read, other=0.0)
            z = pending_activation(x.to(tl.float32), scale[None, :], shift[None, :], PENDING_SLOPE, PENDING)
            if gate_ptr is not None:
                row = image + tl.arange(0, BLOCK_M)
                real = (row < N)[:, None] & read[None, :]
                z *= gate_rows(gate_ptr + group * C, row, channel, C * G, image_rows, real)
            x = z.to(x.dtype)
        if CORRECTED:
            y_a = tl.load(a_ptr + group * C + channel, mask=read, other=0.0)
            if corrected_desc is not None:
                y_b = tl.load(b_ptr + group * C + channel, mask=read, other=0.0)
                y_c = tl.load(c_ptr + group * C + channel, mask=read, other=0.0)
                other = corrected_desc.load([image, first_x]).to(tl.float32)
                x = corrected(x.to(tl.float32), other, y_a[None, :], y_b[None, :], y_c[None, :]).to(x.dtype)
            else:
                x = (x.to(tl.float32) * y_a[None, :]).to(x.dtype)
        if BACKWARD:
            weight = weight_desc.load([group * C + c, this_tap * K + first_k])  # [BLOCK_K, BLOCK_N]
        else:
            weight = weight_desc.load([group * K + first_k, this_tap * C + c]).T
        acc = tl.dot(x, weight, acc, input_precision=PRECISION, out_dtype=tl.float32)
        c += BLOCK_K
        next_tap = c >= C
        c = tl.where(next_tap, 0, c)
        j = tl.where(next_tap, j + 1, j)
        next_row = j >= per_row
        j = tl.where(next_row, 0, j)
        i = tl.where(next_row, i + 1, i)

        left -= 1
        if left == 0:
            k = done % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = k < K
            k += done // tiles_n % G * K
            first_image = done // (columns * pixels) * BLOCK_M
            pixel = 0
            if not ONE_PIXEL:
                pixel = tl.load(taps_ptr + done // columns % pixels)
            at = [first_image, pixel, done // tiles_n % G * K + done % tiles_n * BLOCK_N]
            valid = ((first_image + tl.arange(0, BLOCK_M)) < N)[:, None]
            out = acc
            if HAS_BIAS:
                out += tl.load(bias_ptr + k, mask=inside, other=0.0).to(tl.float32)[None, :]
            if BACKWARD and PENDING is not None:
                raw = raw_desc.load(at).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
                scale = tl.load(scale_ptr + k, mask=inside, other=0.0)[None, :]
                shift = tl.load(shift_ptr + k, mask=inside, other=0.0)[None, :]
                du = pending_activation_backward(out, raw, scale, shift, PENDING_SLOPE, PENDING)
                du = tl.where(valid, du, 0.0)
                sums_row = sums_ptr + done // columns * (2 * K * G)
                store_sums(sums_row, tl.sum(du * raw, axis=0), tl.sum(du, axis=0), k, inside, K * G)
                out = du
                if SCALED:
                    out = du * scale
            if HAS_ADD:
                out += add_desc.load(at).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
            if JOIN is not None:
                if JOIN != "none":
                    joined = output_desc.load(at).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
                    out = activate_backward(out, joined, 0.0, JOIN)
                out = tl.where(valid, out, 0.0)
                left_side = raw_desc.load(at).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
                sums_row = sums_ptr + done // columns * (2 * K * G)
                store_sums(sums_row, tl.sum(out * left_side, axis=0), tl.sum(out, axis=0), k, inside, K * G)
            if ACTIVATION != "none":
                out = activate(out, SLOPE, ACTIVATION)
            y = out.to(y_desc.dtype)
            y_desc.store(at, y.reshape(BLOCK_M, 1, BLOCK_N))
            if SUMS:
                pivot = tl.load(pivot_ptr + k, mask=inside, other=0.0)[None, :]
                centred = tl.where(valid, y.to(tl.float32) - pivot, 0.0)
                sums_row = sums_ptr + done // columns * (2 * K * G)
                store_sums(sums_row, tl.sum(centred, axis=0), tl.sum(centred * centred, axis=0), k, inside, K * G)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            done += programs
            if not ONE_PIXEL:
                _, _, done_rows, done_per_row = pixel_taps(taps_ptr, done // columns % pixels, pixels)
                left = done_rows * done_per_row * blocks
            else:
                left = blocks


@triton.jit
def output_range(tap, outputs, inputs, stride, pad, dil):
    """First output position and number of those whose tap falls inside the input, on one axis."""
    shift = tap * dil - pad
    first = tl.where(shift < 0, (stride - 1 - shift) // stride, 0)
    last = tl.where(shift < inputs, (inputs - 1 - shift) // stride, -1)
    return first, tl.maximum(tl.minimum(last, outputs - 1) + 1 - first, 0)


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "splits", "pad_h", "pad_w", "dil_h", "dil_w", "image_rows"])
def conv2d_images_backward_weight_kernel(
    dy_desc,  # [N, output pixels * K of all groups]
    x_desc,  # [N, input pixels * C of all groups]
    dw_ptr,
    corrected_desc,  # CORRECTED: as dy_desc; None, as b_ptr and c_ptr: multiply by a
    scale_ptr,
    shift_ptr,
    gate_ptr,  # the pending x's factor per image, of image_rows rows, and channel
    a_ptr,  # CORRECTED
    b_ptr,
    c_ptr,
    N,
    H,
    W,
    P,
    Q,
    C,
    K,
    R,
    S,
    G,
    splits,
    stride_split,
    stride_wk,
    stride_wc,
    stride_wr,
    stride_ws,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    x_pitch,  # elements from a pixel of x to the next, where it is not C * G; else None
    y_pitch,
    image_rows,
    PRECISION: tl.constexpr,
    CORRECTED: tl.constexpr,
    PENDING: tl.constexpr,
    PENDING_SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one program computes, for one tap, BLOCK_M channels x BLOCK_N filters of a group, summed over its share of the
    # (BLOCK_K images, pixel) pairs of that tap. The channels are the rows because only the left side of a product can
    # come from registers, where a pending x is. dw is the gradient itself, or one slab per share for sum_slabs_kernel
    tiles_m = tl.cdiv(C, BLOCK_M)
    tiles_n = tl.cdiv(K, BLOCK_N)
    if x_pitch is None:
        x_pitch = C * G
    if y_pitch is None:
        y_pitch = K * G
    # the taps of one tile run side by side: they read the same dy and nearly the same x
    pid = tl.program_id(0)
    tap = pid % (R * S)
    r = tap // S
    s = tap % S
    pid = pid // (R * S)
    first_k = pid % tiles_n * BLOCK_N
    pid = pid // tiles_n
    first_c = pid % tiles_m * BLOCK_M
    pid = pid // tiles_m
    g = pid % G
    split = pid // G

    first_p, rows = output_range(r, P, H, stride_h, pad_h, dil_h)
    first_q, per_row = output_range(s, Q, W, stride_w, pad_w, dil_w)
    total = (tl.cdiv(N, BLOCK_K) * rows * per_row).to(tl.int64)
    start = (total * split // splits).to(tl.int32)
    stop = (total * (split + 1) // splits).to(tl.int32)
    # position of the next step, of which q runs fastest: neighbouring pixels of the same images
    q = start % tl.maximum(per_row, 1)
    p = start // tl.maximum(per_row, 1) % tl.maximum(rows, 1)
    image = start // tl.maximum(rows * per_row, 1) * BLOCK_K
    first_h = first_p * stride_h - pad_h + r * dil_h
    first_w = first_q * stride_w - pad_w + s * dil_w
    if PENDING is not None:
        channel = first_c + tl.arange(0, BLOCK_M)
        scale = tl.load(scale_ptr + g * C + channel, mask=channel < C, other=0.0)[None, :]
        shift = tl.load(shift_ptr + g * C + channel, mask=channel < C, other=0.0)[None, :]
    if CORRECTED:
        filters = first_k + tl.arange(0, BLOCK_N)
        y_a = tl.load(a_ptr + g * K + filters, mask=filters < K, other=0.0)[None, :]
        if corrected_desc is not None:
            y_b = tl.load(b_ptr + g * K + filters, mask=filters < K, other=0.0)[None, :]
            y_c = tl.load(c_ptr + g * K + filters, mask=filters < K, other=0.0)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(start, stop):
        x_pixel = (first_h + p * stride_h) * W + first_w + q * stride_w
        y_pixel = (first_p + p) * Q + first_q + q
        x = x_desc.load([image, x_pixel * x_pitch + g * C + first_c])  # [BLOCK_K, BLOCK_M]
        dy = dy_desc.load([image, y_pixel * y_pitch + g * K + first_k])  # [BLOCK_K, BLOCK_N]
        valid = ((image + tl.arange(0, BLOCK_K)) < N)[:, None]
        if PENDING is not None:
            z = pending_activation(x.to(tl.float32), scale, shift, PENDING_SLOPE, PENDING)
            if gate_ptr is not None:
                row = image + tl.arange(0, BLOCK_K)
                z *= gate_rows(gate_ptr + g * C, row, channel, C * G, image_rows, valid & (channel < C)[None, :])
            # past the batch dy is zero; fp16 could make Inf of z there
            if x.dtype == tl.float16:
                z = tl.where(valid, z, 0.0)
            x = z.to(x.dtype)
        if CORRECTED:
            if corrected_desc is not None:
                other = corrected_desc.load([image, y_pixel * y_pitch + g * K + first_k]).to(tl.float32)
                value = corrected(dy.to(tl.float32), other, y_a, y_b, y_c)
            else:
                value = dy.to(tl.float32) * y_a
            dy = tl.where(valid, value, 0.0).to(dy.dtype)
        acc = tl.dot(x.T, dy, acc, input_precision=PRECISION, out_dtype=tl.float32)
        q += 1
        next_row = q >= per_row
        q = tl.where(next_row, 0, q)
        p = tl.where(next_row, p + 1, p)
        next_images = p >= rows
        p = tl.where(next_images, 0, p)
        image = tl.where(next_images, image + BLOCK_K, image)
    c = first_c + tl.arange(0, BLOCK_M)
    k = first_k + tl.arange(0, BLOCK_N)
    # 64 bits: slabs of a large gradient reach far
    dw_tap = dw_ptr + split.to(tl.int64) * stride_split + r * stride_wr + s * stride_ws
    pointers = dw_tap + ((g * K + k) * stride_wk)[None, :] + (c * stride_wc)[:, None]
    tl.store(pointers, acc.to(dw_ptr.dtype.element_ty), mask=(c < C)[:, None] & (k < K)[None, :])
