"""Depthwise convolution: a memory copy with R * S multiply-adds per element, on vector units, fp32 inside (fp64).

The sliding kernel keeps the whole filter of its channels in registers, and of every output row that the filter covers
the unfinished sums. It walks down a strip of the image, COLUMNS outputs wide: each row of the input is loaded, made
fp32 and activated once, and added to all those sums; then the oldest row of sums is complete. The row behind is on its
way from memory meanwhile. Threads are numbered through columns and channels as one axis, so that any number of
channels keeps all of them busy. The body of the loop is ROWS output rows long, so that the sums change registers less
often than once per row. The general kernel takes everything else: any layout, filter, stride and dilation.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.activation import activate
from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.conv2d import channel_vector, multiples, within
from fastcnn.kernels.triton.conv_fusion import pending_activation


@triton.jit
def source_channel(k, C, multiplier, SHUFFLE: tl.constexpr):
    """The channel of x that filter k reads: channel k // multiplier of the channels in shuffled order."""
    c = k // multiplier
    if SHUFFLE > 1:
        return c % SHUFFLE * (C // SHUFFLE) + c // SHUFFLE
    else:
        return c


@triton.jit
def epilogue(acc, residual_ptr, offsets, stored, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """act(acc + residual), where either may be None."""
    if residual_ptr is not None:
        acc += accumulator(tl.load(residual_ptr + offsets, mask=stored, other=0.0))
    if ACTIVATION is not None:
        acc = activate(acc, SLOPE, ACTIVATION)
    return acc


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "R", "S", "tiles", "per_strip", "pad_h", "pad_w"])
def depthwise_conv2d_general_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    scale_ptr,  # pending activation of x
    shift_ptr,
    residual_ptr,  # laid out as y
    pivot_ptr,
    y_ptr,
    sums_ptr,  # [strips, 2, K]
    M,  # N * P * Q
    H,
    W,
    P,
    Q,
    C,
    K,
    R,
    S,
    multiplier,
    tiles,
    per_strip,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wk,
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
    SHUFFLE: tl.constexpr,
    PENDING: tl.constexpr,
    PENDING_SLOPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one program computes a strip of tiles of BLOCK_M pixels x BLOCK_K filters, in any layout, with any filter
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(K, BLOCK_K)
    strip = tl.program_id(0) // blocks
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    real = k < K
    if INT64:
        strip = strip.to(tl.int64)
        k = k.to(tl.int64)
    c = source_channel(k, C, multiplier, SHUFFLE)
    if PENDING is not None:
        scale = tl.load(scale_ptr + c, mask=real, other=0.0)[None, :]
        shift = tl.load(shift_ptr + c, mask=real, other=0.0)[None, :]
    if bias_ptr is not None:
        bias = accumulator(channel_vector(bias_ptr, k, K))[None, :]
    if sums_ptr is not None:
        pivot = channel_vector(pivot_ptr, k, K)[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_K], ACC)
        total_of_squares = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    for tile in range(strip * per_strip, tl.minimum(strip * per_strip + per_strip, tiles)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        n = m // (P * Q)
        p = m // Q % P
        q = m % Q
        stored = (m < M)[:, None] & real[None, :]
        first_h = p * stride_h - pad_h
        first_w = q * stride_w - pad_w
        pixels = n * stride_xn + first_h * stride_xh + first_w * stride_xw
        x_offsets = pixels[:, None] + (c * stride_xc)[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_K], ACC)
        for tap in range(R * S):
            h_shift = tap // S * dil_h
            w_shift = tap % S * dil_w
            inside = stored & within(first_h + h_shift, first_w + w_shift, H, W)[:, None]
            x = tl.load(
                x_ptr + (x_offsets + (h_shift.to(k.dtype) * stride_xh + w_shift.to(k.dtype) * stride_xw)),
                mask=inside,
                other=0.0,
            )
            x = accumulator(x)
            if PENDING is not None:
                x = tl.where(inside, pending_activation(x, scale, shift, PENDING_SLOPE, PENDING), 0.0)
            w_offset = (tap // S).to(k.dtype) * stride_wr + (tap % S).to(k.dtype) * stride_ws
            w = tl.load(w_ptr + k * stride_wk + w_offset, mask=real, other=0.0)
            acc += x * accumulator(w)[None, :]
        if bias_ptr is not None:
            acc += bias
        y_offsets = (n * stride_yn + p * stride_yp + q * stride_yq)[:, None] + (k * stride_yk)[None, :]
        acc = epilogue(acc, residual_ptr, y_offsets, stored, ACTIVATION, SLOPE)
        y = acc.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + y_offsets, y, mask=stored)
        if sums_ptr is not None:
            # of what a reader of y sees
            d = tl.where(stored, accumulator(y) - pivot, 0.0)
            total += d
            total_of_squares += d * d
    if sums_ptr is not None:
        row = sums_ptr + strip.to(tl.int64) * (2 * K)
        tl.store(row + k, tl.sum(total, axis=0), mask=real)
        tl.store(row + K + k, tl.sum(total_of_squares, axis=0), mask=real)


@triton.jit
def reaches(place, size):
    """Whether 0 <= place < size, in one comparison."""
    return place.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def load_row(
    pointers, stride_xw, row_inside, first_w, W, COUNT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):  # fmt: skip
    """COUNT columns of a row of the input, as a tuple; those from LEFT up to RIGHT lie in every image."""
    xs = ()
    for j in tl.static_range(COUNT):
        inside = row_inside
        if j < LEFT or j >= RIGHT:
            inside = row_inside & reaches(first_w + j, W)
        xs = xs + (tl.load(pointers, mask=inside, other=0.0),)
        pointers += stride_xw  # a product per column takes more registers
    return xs


@triton.jit
def convolution_input(
    xs, scale, shift, first_w, W, COUNT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PENDING: tl.constexpr,
    PENDING_SLOPE: tl.constexpr,
):  # fmt: skip
    """What the filter meets, of a row that load_row loaded from inside the image."""
    zs = ()
    for j in tl.static_range(COUNT):
        z = accumulator(xs[j])
        if PENDING is not None:
            z = pending_activation(z, scale, shift, PENDING_SLOPE, PENDING)
            if j < LEFT or j >= RIGHT:
                z = tl.where(reaches(first_w + j, W), z, 0.0)
        zs = zs + (z,)
    return zs


@triton.jit
def add_row(acc, zs, ws, COLUMNS: tl.constexpr, S: tl.constexpr, STRIDE_W: tl.constexpr):
    """The sums acc of an output row and what a row zs of the input under a row ws of the filter adds to them."""
    added = ()
    for j in tl.static_range(COLUMNS):
        a = acc[j]
        for s in tl.static_range(S):
            a = tl.fma(zs[j * STRIDE_W + s], ws[s], a)
        added = added + (a,)
    return added


@triton.jit(
    do_not_specialize=["units", "lines", "steps", "per_strip", "tiles_w", "H", "W", "P", "Q", "pad_h", "pad_w"]
)  # fmt: skip
def depthwise_conv2d_sliding_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    scale_ptr,  # pending activation of x
    shift_ptr,
    residual_ptr,  # laid out as y
    pivot_ptr,
    y_ptr,
    sums_ptr,  # [strips * lines, 2, K]
    units,  # N * tiles_w
    lines,  # units at a time; a program takes steps of them, one after the other
    steps,
    per_strip,
    tiles_w,  # of COLUMNS output columns
    H,
    W,
    P,
    Q,
    C,
    K,
    multiplier,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_wk,
    stride_wr,
    stride_ws,
    stride_yn,
    stride_yp,
    stride_yq,
    pad_h,
    pad_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    LEFT: tl.constexpr,  # columns from LEFT up to RIGHT of what a tile reads lie in every image
    RIGHT: tl.constexpr,
    WHOLE: tl.constexpr,  # columns that every tile has
    SHUFFLE: tl.constexpr,
    PENDING: tl.constexpr,
    PENDING_SLOPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that accesses may take at once, if the compiler does not see it by itself
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program computes a strip of per_strip * ROWS rows in BLOCK (tile of COLUMNS columns of an image, channel)s,
    # and then that strip further on, of the same channels
    COUNT: tl.constexpr = (COLUMNS - 1) * STRIDE_W + S  # columns that a tile reads
    LEAD: tl.constexpr = R - STRIDE_H  # rows that ROWS outputs share with those before them
    OPEN: tl.constexpr = (LEAD + STRIDE_H - 1) // STRIDE_H  # output rows that those rows belong to
    if VECTOR > 1:
        C, K = C // VECTOR * VECTOR, K // VECTOR * VECTOR
        stride_xn, stride_xh, stride_xw = multiples(stride_xn, stride_xh, stride_xw, VECTOR)
        stride_yn, stride_yp, stride_yq = multiples(stride_yn, stride_yp, stride_yq, VECTOR)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    line = i // K
    k = i % K
    c = source_channel(k, C, multiplier, SHUFFLE)
    ws = ()
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            ws = ws + (accumulator(tl.load(w_ptr + (k * stride_wk + r * stride_wr + s * stride_ws))),)
    scale, shift = None, None
    if PENDING is not None:
        scale = tl.load(scale_ptr + c)
        shift = tl.load(shift_ptr + c)
    start = tl.zeros([BLOCK], tl.float32)
    if sums_ptr is not None:
        pivot = tl.load(pivot_ptr + k)
        total = tl.zeros([BLOCK], tl.float32)
        total_of_squares = tl.zeros([BLOCK], tl.float32)
    if bias_ptr is not None:
        start += accumulator(tl.load(bias_ptr + k))
    strip = tl.program_id(1)
    begin = strip * per_strip
    last_p = tl.minimum(P, (begin + per_strip) * ROWS)
    for step in range(steps):
        unit = line + step * lines
        real = (unit < units) & (line < lines)
        unit = tl.minimum(unit, units - 1)
        n = unit // tiles_w
        q = unit % tiles_w * COLUMNS
        first_w = q * STRIDE_W - pad_w
        x_tile = x_ptr + n.to(tl.int64) * stride_xn + (first_w * stride_xw + c)
        y_tile = n.to(tl.int64) * stride_yn + (q * stride_yq + k)
        accs = ()
        for _ in tl.static_range(OPEN * COLUMNS):
            accs = accs + (start,)
        # the rows that the first outputs share with those of the strip above, of which nothing is stored
        first = begin - (LEAD + ROWS * STRIDE_H - 1) // (ROWS * STRIDE_H)
        h = first * (ROWS * STRIDE_H) - pad_h + LEAD
        xs = load_row(x_tile + h * stride_xh, stride_xw, reaches(h, H), first_w, W, COUNT, LEFT, RIGHT)
        for chunk in range(first, begin + per_strip):
            p = chunk * ROWS
            h = p * STRIDE_H - pad_h
            for row in tl.static_range(LEAD, LEAD + ROWS * STRIDE_H):
                ahead_h = h + row + 1
                ahead = load_row(
                    x_tile + ahead_h * stride_xh, stride_xw, reaches(ahead_h, H), first_w, W, COUNT, LEFT, RIGHT
                )
                if row % STRIDE_H == 0:  # an output begins
                    for _ in tl.static_range(COLUMNS):
                        accs = accs + (start,)
                if reaches(h + row, H):
                    zs = convolution_input(
                        xs, scale, shift, first_w, W, COUNT, LEFT, RIGHT, PENDING, PENDING_SLOPE
                    )  # fmt: skip
                    for o in tl.static_range(ROWS + OPEN):
                        if row >= o * STRIDE_H and row - o * STRIDE_H < R:
                            accs = (
                                accs[: o * COLUMNS]
                                + add_row(
                                    accs[o * COLUMNS : (o + 1) * COLUMNS], zs,
                                    ws[(row - o * STRIDE_H) * S : (row - o * STRIDE_H + 1) * S], COLUMNS, S, STRIDE_W,
                                )
                                + accs[(o + 1) * COLUMNS :]
                            )  # fmt: skip
                xs = ahead
                for o in tl.static_range(ROWS):
                    if row == o * STRIDE_H + R - 1:  # an output is complete
                        if (p + o >= begin * ROWS) & (p + o < last_p):
                            pixels = y_tile + (p + o) * stride_yp
                            for j in tl.static_range(COLUMNS):
                                stored = real
                                if j >= WHOLE:
                                    stored = real & (q + j < Q)
                                acc = epilogue(
                                    accs[o * COLUMNS + j], residual_ptr, pixels, stored, ACTIVATION, SLOPE
                                )  # fmt: skip
                                y = acc.to(y_ptr.dtype.element_ty)
                                tl.store(y_ptr + pixels, y, mask=stored)
                                pixels += stride_yq
                                if sums_ptr is not None:
                                    # of what a reader of y sees
                                    d = tl.where(stored, accumulator(y) - pivot, 0.0)
                                    total += d
                                    total_of_squares += d * d
            accs = accs[ROWS * COLUMNS :]
    if sums_ptr is not None:
        sums = sums_ptr + strip.to(tl.int64) * lines * (2 * K) + (line * (2 * K) + k)
        tl.store(sums, total, mask=line < lines)
        tl.store(sums + K, total_of_squares, mask=line < lines)
