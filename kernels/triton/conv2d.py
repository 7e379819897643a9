"""Dense 2-D convolution as implicit GEMM: forward, gradient of the input, gradient of the weight.

Nothing is unfolded in memory: a tile of the GEMM's left side is gathered from the image while it is loaded. One loop
runs over the filter's taps and, inside, over blocks of channels, so that loads are in flight across taps, too; a step
adds one scalar offset to pointers made before the loop and compares the rows' places with the image's borders. FOLDED
is for few channels: one reduction over (tap, channel), or in the gradient of the weight one column for each, so that
blocks do not pad every tap's channels. C and K count the channels and filters of one group; every tensor has its own
strides, and a channel stride of one is known at compile time.

A transposed convolution is the same three kernels in other roles, a linear layer is the case of one pixel and one tap.
Options (None where off): what conv_fusion.py does to blocks on load and on store.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.activation import activate, activate_backward
from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.conv_fusion import (
    corrected,
    pending_activation,
    pending_activation_backward,
    store_sums,
)


@triton.jit
def band_order(pid, tiles_m, tiles_n, BAND: tl.constexpr):
    """(tile_m, tile_n) of a program. BAND row tiles take turns with every column tile, so both operands stay in L2."""
    per_band = BAND * tiles_n
    first = pid // per_band * BAND
    height = tl.minimum(tiles_m - first, BAND)
    within = pid % per_band
    return first + within % height, within // height


@triton.jit
def next_step(c0, s, r, C, S, BLOCK_K: tl.constexpr):
    """The counters of a loop over filter rows, filter columns and, innermost, blocks of channels: one step on."""
    # selects, not branches: those would keep the compiler from pipelining the loop
    c0 += BLOCK_K
    wraps = c0 >= C
    c0 = tl.where(wraps, 0, c0)
    s = tl.where(wraps, s + 1, s)
    wraps = s >= S
    return c0, tl.where(wraps, 0, s), tl.where(wraps, r + 1, r)


@triton.jit
def within(h, w, H, W):
    """Whether places lie in the image: one comparison per axis, as unsigned numbers the negative ones are large."""
    return (h.to(tl.uint32) < H.to(tl.uint32)) & (w.to(tl.uint32) < W.to(tl.uint32))


@triton.jit
def divide(m, multiplier, shift):
    """m // d for 0 <= m < 2^31, by the two numbers that the host computed for d (Granlund and Montgomery 1994)."""
    m = m.to(tl.uint32)
    return ((tl.umulhi(m, multiplier.to(tl.uint32)) + m) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
def multiples(a, b, c, VECTOR: tl.constexpr):
    """The same three numbers, multiples of VECTOR in a form that tells the compiler. Of 16 it knows by itself."""
    return a // VECTOR * VECTOR, b // VECTOR * VECTOR, c // VECTOR * VECTOR


@triton.jit
def channel_vector(pointer, channels, count):
    """Per-channel numbers of an option; zero past the end."""
    return tl.load(pointer + channels, mask=channels < count, other=0.0)


@triton.jit
def gate_block(gate, n, channels, stride, mask):
    """What a pending activation is multiplied by: rows of the images n, columns of these channels."""
    return accumulator(tl.load(gate + (n * stride)[:, None] + channels[None, :], mask=mask, other=0.0))


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "pad_h", "pad_w", "dil_h", "dil_w"])
def conv2d_forward_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    scale_ptr,  # pending activation of x
    shift_ptr,
    gate_ptr,  # its factor per image and channel: [N, channels of all groups]
    residual_ptr,  # laid out as y
    pivot_ptr,
    sums_ptr,  # [tiles of M, 2, filters of all groups]
    M,  # N * P * Q
    H,
    W,
    P,
    Q,
    C,
    K,
    R,
    S,
    G,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wk,
    stride_wc,
    stride_wr,
    stride_ws,
    stride_yn,
    stride_yk,
    stride_yp,
    stride_yq,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    PENDING: tl.constexpr,
    PENDING_SLOPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    FOLDED: tl.constexpr,
    FOLDED_C: tl.constexpr,  # channels of a tap in x and, forward, w: C, or those and zeros
    FOLDED_S: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that loads may take at once, if the compiler does not see it by itself
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    # one program computes BLOCK_M output pixels x BLOCK_N filters of one group
    if VECTOR > 1:
        stride_xn, stride_xh, stride_xw = multiples(stride_xn, stride_xh, stride_xw, VECTOR)
        stride_wk, stride_wr, stride_ws = multiples(stride_wk, stride_wr, stride_ws, VECTOR)
        if not FOLDED:
            stride_yn, stride_yp, stride_yq = multiples(stride_yn, stride_yp, stride_yq, VECTOR)
            C, K, _ = multiples(C, K, 0, VECTOR)
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    if INT64:
        M = M.to(tl.int64)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    g = pid // (tiles_m * tiles_n)
    tile_m, tile_n = band_order(pid % (tiles_m * tiles_n), tiles_m, tiles_n, BAND)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_K)
    if INT64:
        g = g.to(tl.int64)
        k = k.to(tl.int64)
        c = c.to(tl.int64)
    n = m // (P * Q)
    p = m % (P * Q) // Q
    q = m % Q
    h0 = p * stride_h - pad_h
    w0 = q * stride_w - pad_w
    x_rows = n * stride_xn + h0 * stride_xh + w0 * stride_xw
    y_rows = n * stride_yn + p * stride_yp + q * stride_yq
    # rows past the end are sent out of the image: the padding's mask covers them
    h0 = tl.where(m < M, h0, H).to(tl.int32)
    w0 = w0.to(tl.int32)
    x_group = x_ptr + g * C * stride_xc
    w_group = w_ptr + g * K * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if FOLDED:
        x_group = x_ptr + (g * C // VECTOR * VECTOR) * stride_xc  # vectors are for one group: g is 0
        w_rows = k * stride_wk
        for j0 in range(0, R * FOLDED_S * FOLDED_C, BLOCK_K):
            j = j0 + c
            channels = j % FOLDED_C
            r = j // FOLDED_C // FOLDED_S
            s = j // FOLDED_C % FOLDED_S
            real = j < R * FOLDED_S * FOLDED_C
            h_shift = r * dil_h
            w_shift = s * dil_w
            h = h0[:, None] + h_shift.to(tl.int32)[None, :]
            inside = within(h, w0[:, None] + w_shift.to(tl.int32)[None, :], H, W) & real[None, :]
            x_columns = channels * stride_xc + h_shift * stride_xh + w_shift * stride_xw
            x_block = tl.load(  # [BLOCK_M, BLOCK_K]
                x_group + (x_rows[:, None] + x_columns[None, :]), mask=inside, other=0.0
            )
            # as rows, so that the threads that hold x's columns hold those of w
            w_columns = channels * stride_wc + r * stride_wr + s * stride_ws
            w_block = tl.load(  # [BLOCK_N, BLOCK_K]
                w_group + (w_rows[:, None] + w_columns[None, :]), mask=(k < K)[:, None] & real[None, :], other=0.0
            )
            if PENDING is not None:
                scale = channel_vector(scale_ptr + g * C, channels, C)
                shift = channel_vector(shift_ptr + g * C, channels, C)
                z = pending_activation(
                    accumulator(x_block), scale[None, :], shift[None, :], PENDING_SLOPE, PENDING,
                    x_block.dtype.primitive_bitwidth == 16,
                )  # fmt: skip
                if gate_ptr is not None:
                    z *= gate_block(gate_ptr + g * C, n, channels, C * G, inside & (channels < C)[None, :])
                x_block = tl.where(inside, z, 0.0).to(x_block.dtype)
            acc = tl.dot(x_block, tl.trans(w_block), acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        x_block_ptr = x_group + x_rows[:, None] + (c * stride_xc)[None, :]  # [BLOCK_M, BLOCK_K]
        w_block_ptr = w_group + (k * stride_wk)[None, :] + (c * stride_wc)[:, None]  # [BLOCK_K, BLOCK_N]
        r = tl.zeros((), tl.int32)
        s = tl.zeros((), tl.int32)
        c0 = tl.zeros((), tl.int32)
        for _ in range(R * S * tl.cdiv(C, BLOCK_K)):
            h_shift = r * dil_h
            w_shift = s * dil_w
            inside = within(h0 + h_shift, w0 + w_shift, H, W)
            real = c0 + c < C
            tap = c.dtype
            x_block = tl.load(  # [BLOCK_M, BLOCK_K]
                x_block_ptr + (h_shift.to(tap) * stride_xh + w_shift.to(tap) * stride_xw + c0.to(tap) * stride_xc),
                mask=inside[:, None] & real[None, :],
                other=0.0,
            )
            w_block = tl.load(  # [BLOCK_K, BLOCK_N]
                w_block_ptr + (r.to(tap) * stride_wr + s.to(tap) * stride_ws + c0.to(tap) * stride_wc),
                mask=real[:, None] & (k < K)[None, :],
                other=0.0,
            )
            if PENDING is not None:
                scale = channel_vector(scale_ptr + g * C, c0 + c, C)
                shift = channel_vector(shift_ptr + g * C, c0 + c, C)
                z = pending_activation(
                    accumulator(x_block), scale[None, :], shift[None, :], PENDING_SLOPE, PENDING,
                    x_block.dtype.primitive_bitwidth == 16,
                )  # fmt: skip
                if gate_ptr is not None:
                    z *= gate_block(gate_ptr + g * C, n, c0 + c, C * G, inside[:, None] & real[None, :])
                x_block = tl.where(inside[:, None], z, 0.0).to(x_block.dtype)
            acc = tl.dot(x_block, w_block, acc, input_precision=PRECISION, out_dtype=ACC)
            c0, s, r = next_step(c0, s, r, C, S, BLOCK_K)
    if bias_ptr is not None:
        acc += channel_vector(bias_ptr + g * K, k, K).to(ACC)[None, :]
    if (residual_ptr is not None or sums_ptr is not None) and BLOCK_N >= 64:
        left, right = halves(acc)
        k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        if INT64:
            k = k.to(tl.int64)
        store_output(
            left, y_ptr, residual_ptr, pivot_ptr, sums_ptr,
            y_rows, m < M, k, g, tile_m, K, G, stride_yk, ACTIVATION, SLOPE,
        )  # fmt: skip
        store_output(
            right, y_ptr, residual_ptr, pivot_ptr, sums_ptr,
            y_rows, m < M, k + BLOCK_N // 2, g, tile_m, K, G, stride_yk, ACTIVATION, SLOPE,
        )  # fmt: skip
    else:
        store_output(
            acc, y_ptr, residual_ptr, pivot_ptr, sums_ptr,
            y_rows, m < M, k, g, tile_m, K, G, stride_yk, ACTIVATION, SLOPE,
        )  # fmt: skip


@triton.jit
def halves(acc):
    """The left and the right half of the columns: with all that options read, a whole tile does not fit in registers.

    It also ends the tensor cores' layout here: in the one that loads and stores have, columns are added up sooner.
    """
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def store_output(
    acc, y_ptr, residual_ptr, pivot_ptr, sums_ptr,
    rows, inside, k, g, tile, K, G, stride_yk, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """The options of conv2d_forward_kernel for the filters k of a tile, its store and its sums."""
    stored = inside[:, None] & (k < K)[None, :]
    offsets = g * K * stride_yk + rows[:, None] + (k * stride_yk)[None, :]
    if residual_ptr is not None:
        acc += accumulator(tl.load(residual_ptr + offsets, mask=stored, other=0.0))
    if ACTIVATION is not None:
        acc = activate(acc, SLOPE, ACTIVATION)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=stored)
    if sums_ptr is not None:
        # of what a reader of y sees
        d = accumulator(y) - channel_vector(pivot_ptr + g * K, k, K)[None, :]
        d = tl.where(stored, d, 0.0)
        row = sums_ptr + tile.to(tl.int64) * (2 * G * K)
        store_sums(row, tl.sum(d, axis=0), tl.sum(d * d, axis=0), g * K + k, k < K, G * K)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "pad_h", "pad_w"])
def conv2d_backward_input_kernel(
    dy_ptr,
    w_ptr,
    bias_ptr,
    dx_ptr,
    y_ptr,  # correction of dy; y is laid out as dy; without it, b and c dy is multiplied by a
    a_ptr,
    b_ptr,
    c_ptr,
    x_ptr,  # pending activation's x, or a join's left side; these and the added tensor are laid out as dx
    output_ptr,  # of the join
    scale_ptr,
    shift_ptr,
    sums_ptr,  # [classes * tiles of M, 2, channels of all groups]
    add_ptr,
    M,  # N * ceil(H / stride_h) * ceil(W / stride_w)
    H,
    W,
    P,
    Q,
    C,
    K,
    R,
    S,
    G,
    stride_yn,
    stride_yk,
    stride_yp,
    stride_yq,
    stride_wk,
    stride_wc,
    stride_wr,
    stride_ws,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    gcd_h,  # of stride and dilation
    gcd_w,
    PENDING: tl.constexpr,
    PENDING_SLOPE: tl.constexpr,
    SCALED: tl.constexpr,  # PENDING: dx is du * scale, else du
    JOIN: tl.constexpr,  # activation of the join, "none" or "relu"; None if off
    VECTOR: tl.constexpr,  # elements that loads may take at once, if the compiler does not see it by itself
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    # one program computes BLOCK_M input pixels of one parity class (h % stride_h, w % stride_w) x BLOCK_N channels of a
    # group. A tap reaches all pixels of a class or none; a class no tap reaches gets its zeros (or bias) here, too.
    # The bias belongs to the transposed convolution, whose forward this is
    if VECTOR > 1:
        stride_yn, stride_yp, stride_yq = multiples(stride_yn, stride_yp, stride_yq, VECTOR)
        stride_wk, stride_wr, stride_ws = multiples(stride_wk, stride_wr, stride_ws, VECTOR)
        stride_xn, stride_xh, stride_xw = multiples(stride_xn, stride_xh, stride_xw, VECTOR)
        C, K, _ = multiples(C, K, 0, VECTOR)
    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    if INT64:
        M = M.to(tl.int64)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(C, BLOCK_N)
    classes = stride_h * stride_w
    pid = tl.program_id(0)
    g = pid // (tiles_m * tiles_n * classes)
    pid = pid % (tiles_m * tiles_n * classes)
    # the classes of a band of row tiles follow each other: they read the same rows of dy
    per_band = BAND * tiles_n * classes
    first = pid // per_band * BAND
    height = tl.minimum(tiles_m - first, BAND)
    pid = pid % per_band
    kind = (pid // (height * tiles_n)).to(tl.int32)
    pid = pid % (height * tiles_n)
    tile_m = first + pid % height
    tile_n = pid // height
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if INT64:
        g = g.to(tl.int64)
        c = c.to(tl.int64)
        k = k.to(tl.int64)
    h_parity, r0, r_step, r_count, p0, p_step = parity_class(kind // stride_w, stride_h, pad_h, dil_h, gcd_h, R)
    w_parity, s0, s_step, s_count, q0, q_step = parity_class(kind % stride_w, stride_w, pad_w, dil_w, gcd_w, S)
    class_h = tl.cdiv(H, stride_h)
    class_w = tl.cdiv(W, stride_w)
    n = m // (class_h * class_w)
    i = m % (class_h * class_w) // class_w
    j = m % class_w
    h = i * stride_h + h_parity
    w = j * stride_w + w_parity
    inside_x = (m < M) & (h < H) & (w < W)
    dx_rows = n * stride_xn + h * stride_xh + w * stride_xw
    i = i + p0
    j = j + q0
    dy_rows = n * stride_yn + i * stride_yp + j * stride_yq
    # rows past the end are sent far out of dy: the mask of its borders covers them
    i = tl.where(m < M, i, -(1 << 30)).to(tl.int32)
    j = j.to(tl.int32)
    dy_offsets = g * K * stride_yk + dy_rows[:, None] + (k * stride_yk)[None, :]
    w_block_ptr = w_ptr + (g * K * stride_wk + r0 * stride_wr + s0 * stride_ws)
    w_block_ptr = w_block_ptr + (c * stride_wc)[None, :] + (k * stride_wk)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    r = tl.zeros((), tl.int32)
    s = tl.zeros((), tl.int32)
    k0 = tl.zeros((), tl.int32)
    for _ in range(r_count * s_count * tl.cdiv(K, BLOCK_K)):
        p_shift = r * p_step
        q_shift = s * q_step
        inside = within(i - p_shift, j - q_shift, P, Q)
        real = k0 + k < K
        tap = k.dtype
        shift = k0.to(tap) * stride_yk - p_shift.to(tap) * stride_yp - q_shift.to(tap) * stride_yq
        dy_block = tl.load(  # [BLOCK_M, BLOCK_K]
            dy_ptr + dy_offsets + shift, mask=inside[:, None] & real[None, :], other=0.0
        )
        w_block = tl.load(  # [BLOCK_K, BLOCK_N]
            w_block_ptr
            + ((r * r_step).to(tap) * stride_wr + (s * s_step).to(tap) * stride_ws + k0.to(tap) * stride_wk),
            mask=real[:, None] & (c < C)[None, :],
            other=0.0,
        )
        if a_ptr is not None:
            if y_ptr is not None:
                y_block = tl.load(y_ptr + dy_offsets + shift, mask=inside[:, None] & real[None, :], other=0.0)
                y_a = channel_vector(a_ptr + g * K, k0 + k, K)[None, :]
                y_b = channel_vector(b_ptr + g * K, k0 + k, K)[None, :]
                y_c = channel_vector(c_ptr + g * K, k0 + k, K)[None, :]
                value = corrected(accumulator(dy_block), accumulator(y_block), y_a, y_b, y_c)
            else:
                value = accumulator(dy_block) * channel_vector(a_ptr + g * K, k0 + k, K)[None, :]
            dy_block = tl.where(inside[:, None], value, 0.0).to(dy_block.dtype)
        acc = tl.dot(dy_block, w_block, acc, input_precision=PRECISION, out_dtype=ACC)
        k0, s, r = next_step(k0, s, r, K, s_count, BLOCK_K)
    if bias_ptr is not None:
        acc += channel_vector(bias_ptr + g * C, c, C).to(ACC)[None, :]
    row = kind * tiles_m + tile_m
    if (PENDING is not None or JOIN is not None) and BLOCK_N >= 64:
        left, right = halves(acc)
        c = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        if INT64:
            c = c.to(tl.int64)
        store_input_gradient(
            left, dx_ptr, x_ptr, output_ptr, scale_ptr, shift_ptr, sums_ptr, add_ptr,
            dx_rows, inside_x, c, g, row, C, G, stride_xc, PENDING, PENDING_SLOPE, SCALED, JOIN,
        )  # fmt: skip
        store_input_gradient(
            right, dx_ptr, x_ptr, output_ptr, scale_ptr, shift_ptr, sums_ptr, add_ptr,
            dx_rows, inside_x, c + BLOCK_N // 2, g, row, C, G, stride_xc, PENDING, PENDING_SLOPE, SCALED, JOIN,
        )  # fmt: skip
    else:
        store_input_gradient(
            acc, dx_ptr, x_ptr, output_ptr, scale_ptr, shift_ptr, sums_ptr, add_ptr,
            dx_rows, inside_x, c, g, row, C, G, stride_xc, PENDING, PENDING_SLOPE, SCALED, JOIN,
        )  # fmt: skip


@triton.jit
def store_input_gradient(
    acc, dx_ptr, x_ptr, output_ptr, scale_ptr, shift_ptr, sums_ptr, add_ptr,
    rows, inside, c, g, tile, C, G, stride_xc,
    PENDING: tl.constexpr, PENDING_SLOPE: tl.constexpr, SCALED: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """The options of conv2d_backward_input_kernel for the channels c of a tile, its sums and its store."""
    stored = inside[:, None] & (c < C)[None, :]
    offsets = g * C * stride_xc + rows[:, None] + (c * stride_xc)[None, :]
    if PENDING is not None:
        x = accumulator(tl.load(x_ptr + offsets, mask=stored, other=0.0))
        scale = channel_vector(scale_ptr + g * C, c, C)[None, :]
        shift = channel_vector(shift_ptr + g * C, c, C)[None, :]
        # rows past the end have been reached by taps where the class has fewer rows than others
        du = tl.where(stored, pending_activation_backward(acc, x, scale, shift, PENDING_SLOPE, PENDING), 0.0)
        row = sums_ptr + tile.to(tl.int64) * (2 * G * C)
        store_sums(row, tl.sum(du * x, axis=0), tl.sum(du, axis=0), g * C + c, c < C, G * C)
        acc = du
        if SCALED:
            acc = du * scale
    if add_ptr is not None:
        acc += accumulator(tl.load(add_ptr + offsets, mask=stored, other=0.0))
    if JOIN is not None:
        if JOIN != "none":
            joined = accumulator(tl.load(output_ptr + offsets, mask=stored, other=0.0))
            acc = activate_backward(acc, joined, 0.0, JOIN)
        acc = tl.where(stored, acc, 0.0)
        x = accumulator(tl.load(x_ptr + offsets, mask=stored, other=0.0))
        row = sums_ptr + tile.to(tl.int64) * (2 * G * C)
        store_sums(row, tl.sum(acc * x, axis=0), tl.sum(acc, axis=0), g * C + c, c < C, G * C)
    tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask=stored)


@triton.jit
def parity_class(index, stride, pad, dil, gcd, R):
    """One axis of a parity class: (parity, first tap, step between its taps, how many, place in dy, its step).

    Classes are counted by their first tap, those with most taps first; from stride / gcd on no tap reaches them.
    Tap number i of pixel parity + j * stride meets dy at j + place - i * step.
    """
    taps_apart = stride // gcd
    first = index % taps_apart
    rest = index // taps_apart
    parity = ((first * dil + rest - pad) % stride + stride) % stride
    count = tl.where(rest == 0, tl.cdiv(tl.maximum(R - first, 0), taps_apart), 0)
    return parity, first, taps_apart, count, (parity + pad - first * dil) // stride, dil // gcd


@triton.jit(
    do_not_specialize=[
        "M", "H", "W", "P", "Q", "G", "share", "pad_h", "pad_w", "dil_h", "dil_w",
        "image_multiplier", "image_shift", "row_multiplier", "row_shift",
    ]
)  # fmt: skip
def conv2d_backward_weight_kernel(
    dy_ptr,
    x_ptr,
    dw_ptr,
    y_ptr,  # correction of dy; y is laid out as dy; without it, b and c dy is multiplied by a
    a_ptr,
    b_ptr,
    c_ptr,
    scale_ptr,  # pending activation of x
    shift_ptr,
    gate_ptr,  # its factor per image and channel: [N, channels of all groups]
    M,  # N * P * Q
    H,
    W,
    P,
    Q,
    C,
    K,
    R,
    S,
    G,
    share,  # pixels per program, a multiple of BLOCK_K
    image_multiplier,  # for m // (P * Q) and m // Q
    image_shift,
    row_multiplier,
    row_shift,
    stride_split,
    stride_yn,
    stride_yk,
    stride_yp,
    stride_yq,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
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
    PENDING: tl.constexpr,
    PENDING_SLOPE: tl.constexpr,
    FOLDED: tl.constexpr,
    FOLDED_C: tl.constexpr,  # channels of a tap in x and, forward, w: C, or those and zeros
    FOLDED_S: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that loads may take at once, if the compiler does not see it by itself
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one program computes BLOCK_M filters x BLOCK_N channels of one tap of a group (FOLDED: x BLOCK_N pairs of tap and
    # channel), summed over its share of the pixels. dw is the gradient itself, or a slab per share for sum_slabs_kernel
    if VECTOR > 1:
        stride_xn, stride_xh, stride_xw = multiples(stride_xn, stride_xh, stride_xw, VECTOR)
        if not FOLDED:
            stride_yn, stride_yp, stride_yq = multiples(stride_yn, stride_yp, stride_yq, VECTOR)
            C, K, _ = multiples(C, K, 0, VECTOR)
    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(K, BLOCK_M)
    # the taps of one tile run side by side: they read the same dy and nearly the same x
    if FOLDED:
        tiles_n = tl.cdiv(R * FOLDED_S * FOLDED_C, BLOCK_N)
        j = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        pid = pid // tiles_n
        k = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        pid = pid // tiles_m
        c = j % FOLDED_C
        r = j // FOLDED_C // FOLDED_S
        s = j // FOLDED_C % FOLDED_S
        real = j < R * FOLDED_S * FOLDED_C
    else:
        tap = pid % (R * S)
        r = tap // S
        s = tap % S
        pid = pid // (R * S)
        k = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        pid = pid // tiles_m
        tiles_n = tl.cdiv(C, BLOCK_N)
        c = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        pid = pid // tiles_n
        real = c < C
    g = pid % G
    split = pid // G
    step = tl.arange(0, BLOCK_K)
    h_shift = r * dil_h - pad_h
    w_shift = s * dil_w - pad_w
    if INT64:
        step = step.to(tl.int64)
        k = k.to(tl.int64)
        c = c.to(tl.int64)
        r = r.to(tl.int64)
        s = s.to(tl.int64)
        g = g.to(tl.int64)
        split = split.to(tl.int64)
        M = M.to(tl.int64)
    x_columns = h_shift.to(c.dtype) * stride_xh + w_shift.to(c.dtype) * stride_xw
    x_group = x_ptr + g * C * stride_xc
    if FOLDED:
        x_group = x_ptr + (g * C // VECTOR * VECTOR) * stride_xc  # vectors are for one group: g is 0
    x_columns += c * stride_xc
    dy_filters = g * K * stride_yk + k * stride_yk
    if a_ptr is not None:
        y_a = channel_vector(a_ptr + g * K, k, K)[:, None]
    if y_ptr is not None:
        y_b = channel_vector(b_ptr + g * K, k, K)[:, None]
        y_c = channel_vector(c_ptr + g * K, k, K)[:, None]
    if PENDING is not None:
        scale = channel_vector(scale_ptr + g * C, c, C)[None, :]
        bias = channel_vector(shift_ptr + g * C, c, C)[None, :]
    start = split * share
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for m0 in range(start, tl.minimum(start + share, M), BLOCK_K):
        m = m0 + step
        if INT64:
            n = m // (P * Q)
            p = m % (P * Q) // Q
            q = m % Q
        else:
            n = divide(m, image_multiplier, image_shift)
            p = divide(m, row_multiplier, row_shift)
            q = m - p * Q
            p = p - n * P
        h = (p * stride_h).to(tl.int32)
        w = (q * stride_w).to(tl.int32)
        if FOLDED:
            inside_y = m < M
            inside = within(h[:, None] + h_shift[None, :], w[:, None] + w_shift[None, :], H, W)
            inside = inside & inside_y[:, None] & real[None, :]
        else:
            # dy is masked by the padding, too: an Inf in dy times the zero of the padding would be NaN
            inside_y = within(h + h_shift, w + w_shift, H, W) & (m < M)
            inside = inside_y[:, None] & real[None, :]
        dy_offsets = (n * stride_yn + p * stride_yp + q * stride_yq)[None, :] + dy_filters[:, None]
        dy_mask = (k < K)[:, None] & inside_y[None, :]
        dy_block = tl.load(dy_ptr + dy_offsets, mask=dy_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        x_rows = n * stride_xn + p * stride_h * stride_xh + q * stride_w * stride_xw
        x_block = tl.load(  # [BLOCK_K, BLOCK_N]
            x_group + (x_rows[:, None] + x_columns[None, :]), mask=inside, other=0.0
        )
        if a_ptr is not None:
            if y_ptr is not None:
                y_block = tl.load(y_ptr + dy_offsets, mask=dy_mask, other=0.0)
                value = corrected(accumulator(dy_block), accumulator(y_block), y_a, y_b, y_c)
            else:
                value = accumulator(dy_block) * y_a
            # not zero where dy was masked, but there x is; fp16 could make Inf of it, and Inf times zero is NaN
            if dy_ptr.dtype.element_ty == tl.float16:
                value = tl.where(dy_mask, value, 0.0)
            dy_block = value.to(dy_block.dtype)
        if PENDING is not None:
            MAXIMUM: tl.constexpr = x_block.dtype.primitive_bitwidth == 16
            z = pending_activation(accumulator(x_block), scale, bias, PENDING_SLOPE, PENDING, MAXIMUM)
            if gate_ptr is not None:
                z *= gate_block(gate_ptr + g * C, n, c, C * G, inside & (c < C)[None, :])
            if FOLDED:
                x_block = tl.where(inside, z, 0.0).to(x_block.dtype)
            else:
                x_block = tl.where(inside_y[:, None], z, 0.0).to(x_block.dtype)
        acc = tl.dot(dy_block, x_block, acc, input_precision=PRECISION, out_dtype=ACC)
    dw_rows = dw_ptr + split * stride_split + (g * K + k) * stride_wk
    dw_columns = r * stride_wr + s * stride_ws + c * stride_wc
    stored = (k < K)[:, None] & (real & (c < C))[None, :]
    tl.store(dw_rows[:, None] + dw_columns[None, :], acc.to(dw_ptr.dtype.element_ty), mask=stored)
