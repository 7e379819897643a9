"""Both gradients of a depthwise convolution with a small filter in one pass over memory, channels_last.

dx[h, w] is the sum over the taps of dy[p, q] * filter[r, s] with p = (h + pad - r) / stride, and dfilter[r, s] the sum
over all pixels of z[h, w] * dy[p, q]: the same few gradients around a pixel, the window, serve both. A thread holds
some channels of a few columns of the image and walks down. Every step reads the next row of its window, which is
corrected once, and the pixels of x under it, each of which no other thread reads; what is past the image is zero in
dy, so x needs no padding. With stride 2 a step is two rows of x, and which taps meet which pixel is known to the
compiler. What later steps need is loaded ahead, as it lies in memory: 16 bits take half a register.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.conv2d import multiples
from fastcnn.kernels.triton.conv_fusion import (
    corrected,
    pending_activation,
    pending_activation_backward,
)


@triton.jit
def load_columns(ptrs, start, stride, masks, real, COUNT: tl.constexpr):
    """COUNT columns of one row of an image, as they lie in memory; none without the image."""
    found = ()
    if ptrs is not None:
        for i in tl.static_range(COUNT):
            found = found + (tl.load(ptrs + (start + i * stride), mask=masks[i] & real, other=0.0),)
    return found


@triton.jit
def load_rows(ptrs, h, row_stride, stride, H, masks, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """load_columns of ROWS rows."""
    found = ()
    for i in tl.static_range(ROWS):
        found = found + load_columns(ptrs, (h + i) * row_stride, stride, masks, h + i < H, COUNT)
    return found


@triton.jit
def correct_columns(
    dys, ys, masks, real, a, b, c, gate, gate_add, gate_scale, gate_shift,
    GATED: tl.constexpr, GATED_SLOPE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The gradients of the convolution's raw output of load_columns' dy and y."""
    row = ()
    for i in tl.static_range(COUNT):
        dy = accumulator(dys[i])
        if GATED is not None:
            dy = pending_activation_backward(
                dy * gate + gate_add, accumulator(ys[i]), gate_scale, gate_shift, GATED_SLOPE, GATED
            )
        if b is not None:
            dy = corrected(dy, accumulator(ys[i]), a, b, c)
        elif a is not None:
            dy = dy * a
        if GATED is not None or b is not None:
            dy = tl.where(masks[i] & real, dy, 0.0)
        row = row + (dy,)
    return row


@triton.jit
def per_channel(ptr, offsets, inside):
    """Numbers of the channels in all rows of a tile."""
    return accumulator(tl.load(ptr + offsets, mask=inside, other=0.0))


@triton.jit
def add_to_share(ptr, sums, c, inside):
    """Write the sums over the rows of a tile."""
    tl.store(ptr + c, tl.sum(sums, axis=0), mask=inside)


@triton.jit(do_not_specialize=["H", "W", "P", "Q", "columns", "bands", "band", "units", "shares"])
def depthwise_conv2d_sliding_backward_kernel(
    dy_ptr,  # [N, P, Q, C]
    y_ptr,  # laid out as dy
    a_ptr,
    b_ptr,
    c_ptr,
    gate_ptr,  # [N, C]
    gate_add_ptr,
    gate_scale_ptr,
    gate_shift_ptr,
    w_ptr,  # [C, 1, R, S]
    x_ptr,  # [N, H, W, C], as all that follow
    scale_ptr,  # pending activation of x
    shift_ptr,
    add_ptr,
    dx_ptr,  # None: only the gradient of the filter is wanted
    dw_ptr,  # [shares, C * R * S]; None: only dx is wanted
    db_ptr,  # [shares, C] or None
    sums_ptr,  # [shares, 2, C] with a pending activation and dx
    C,
    H,
    W,
    P,
    Q,
    columns,  # groups of GROUP columns in all images
    bands,
    band,  # steps of a band, which are STRIDE_H rows of x
    units,  # blocks of columns x bands
    shares,
    dy_q,  # from one pixel to the next; None where it is C
    x_w,
    add_w,
    w_k,
    w_r,
    w_s,
    dw_k,
    dw_r,
    dw_s,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    SHUFFLE: tl.constexpr,
    GATED: tl.constexpr,
    GATED_SLOPE: tl.constexpr,
    PENDING: tl.constexpr,
    PENDING_SLOPE: tl.constexpr,
    SCALED: tl.constexpr,
    RAGGED: tl.constexpr,  # the last rows or columns of a tile may be past the image
    VECTOR: tl.constexpr,  # a divisor of C and of all distances of pixels
    INT64: tl.constexpr,
    GROUP: tl.constexpr,  # columns of x that a thread holds, a multiple of STRIDE_W
    AHEAD: tl.constexpr,  # steps that are loaded ahead
    ROWS: tl.constexpr,  # groups of columns of a program
    BLOCK_C: tl.constexpr,
):
    # one program computes dx of every shares-th unit of BLOCK_C channels and, summed over them, dfilter
    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    # the window, in rows and columns of dy around the one that belongs to a step
    LAST_P: tl.constexpr = (STRIDE_H - 1 + PAD_H) // STRIDE_H
    FIRST_P: tl.constexpr = -((R - 1 - PAD_H) // STRIDE_H)
    LAST_Q: tl.constexpr = (GROUP - 1 + PAD_W) // STRIDE_W
    FIRST_Q: tl.constexpr = -((S - 1 - PAD_W) // STRIDE_W)
    HIGH: tl.constexpr = LAST_P - FIRST_P + 1
    WIDE: tl.constexpr = LAST_Q - FIRST_Q + 1
    STEP: tl.constexpr = STRIDE_H * GROUP  # pixels of x
    C, _, _ = multiples(C, 0, 0, VECTOR)
    dy_q = C if dy_q is None else dy_q // VECTOR * VECTOR
    x_w = C if x_w is None else x_w // VECTOR * VECTOR
    add_w = C if add_w is None else add_w // VECTOR * VECTOR
    blocks = tl.cdiv(C, BLOCK_C)
    share = tl.program_id(0) // blocks
    vector = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, ROWS)
    # [ROWS, BLOCK_C] from the start: the same numbers in all rows
    k = vector[None, :] + (row * 0)[:, None]
    real_k = k < C
    source = k
    if SHUFFLE > 1:  # puts channel i of group g at i * SHUFFLE + g
        source = k % SHUFFLE * (C // SHUFFLE) + k // SHUFFLE
    a = None if a_ptr is None else per_channel(a_ptr, k, real_k)
    b = None if b_ptr is None else per_channel(b_ptr, k, real_k)
    c = None if c_ptr is None else per_channel(c_ptr, k, real_k)
    gate_scale = None if gate_scale_ptr is None else per_channel(gate_scale_ptr, k, real_k)
    gate_shift = None if gate_shift_ptr is None else per_channel(gate_shift_ptr, k, real_k)
    scale = None if scale_ptr is None else per_channel(scale_ptr, source, real_k)
    shift = None if shift_ptr is None else per_channel(shift_ptr, source, real_k)
    taps = ()
    sums = ()
    for i in tl.static_range(R * S):
        if dx_ptr is not None:
            taps = taps + (accumulator(tl.load(w_ptr + k * w_k + (i // S * w_r + i % S * w_s), real_k, 0.0)),)
        if dw_ptr is not None:
            sums = sums + (tl.zeros([ROWS, BLOCK_C], ACC),)
    total = tl.zeros([ROWS, BLOCK_C], ACC)
    first = tl.zeros([ROWS, BLOCK_C], ACC)
    second = tl.zeros([ROWS, BLOCK_C], ACC)
    if INT64:
        k = k.to(tl.int64)
        source = source.to(tl.int64)
        row = row.to(tl.int64)
        C = C.to(tl.int64)
        H = H.to(tl.int64)
        P = P.to(tl.int64)
        dy_q = dy_q.to(tl.int64)
        x_w = x_w.to(tl.int64)
        add_w = add_w.to(tl.int64)
    groups = tl.cdiv(W, GROUP)
    for unit in range(share, units, shares):
        column = unit // bands * ROWS + row  # [ROWS]
        n = column // groups
        w = column % groups * GROUP
        q = w // STRIDE_W
        real = (column < columns)[:, None] & real_k
        inside_q = ()
        for i in tl.static_range(WIDE):
            inside_q = inside_q + (real & ((q + (FIRST_Q + i) >= 0) & (q + (FIRST_Q + i) < Q))[:, None],)
        inside_w = ()
        for i in tl.static_range(GROUP):
            if RAGGED:
                inside_w = inside_w + (real & (w + i < W)[:, None],)
            else:
                inside_w = inside_w + (real,)
        gate = None if gate_ptr is None else per_channel(gate_ptr, n[:, None] * C + k, real)
        gate_add = None if gate_add_ptr is None else per_channel(gate_add_ptr, n[:, None] * C + k, real)
        dys = dy_ptr + ((n * P * Q + q + FIRST_Q) * dy_q)[:, None] + k
        ys = None if y_ptr is None else y_ptr + ((n * P * Q + q + FIRST_Q) * dy_q)[:, None] + k
        xs = None if x_ptr is None else x_ptr + ((n * H * W + w) * x_w)[:, None] + source
        adds = None if add_ptr is None else add_ptr + ((n * H * W + w) * add_w)[:, None] + source
        dxs = None if dx_ptr is None else dx_ptr + ((n * H * W + w) * C)[:, None] + source
        start = unit % bands * band
        if INT64:
            start = start.to(tl.int64)
        steps = tl.minimum(start + band, tl.cdiv(H, STRIDE_H))
        # what the next band reads is not loaded ahead
        last_p = tl.minimum(steps + LAST_P, P)
        last_h = tl.minimum(steps * STRIDE_H, H)
        window = ()
        for i in tl.static_range(HIGH - 1):
            p = start + (FIRST_P + i)
            known = (p >= 0) & (p < P)
            window = window + correct_columns(
                load_columns(dys, p * Q * dy_q, dy_q, inside_q, known, WIDE),
                load_columns(ys, p * Q * dy_q, dy_q, inside_q, known, WIDE),
                inside_q,
                known,
                a,
                b,
                c,
                gate,
                gate_add,
                gate_scale,
                gate_shift,
                GATED,
                GATED_SLOPE,
                WIDE,
            )
        ahead_dy, ahead_y, ahead_x, ahead_add = (), (), (), ()
        for i in tl.static_range(AHEAD):
            p = start + (LAST_P + i)
            known = (p >= 0) & (p < last_p)
            ahead_dy = ahead_dy + load_columns(dys, p * Q * dy_q, dy_q, inside_q, known, WIDE)
            ahead_y = ahead_y + load_columns(ys, p * Q * dy_q, dy_q, inside_q, known, WIDE)
            h = (start + i) * STRIDE_H
            ahead_x = ahead_x + load_rows(xs, h, W * x_w, x_w, last_h, inside_w, STRIDE_H, GROUP)
            ahead_add = ahead_add + load_rows(adds, h, W * add_w, add_w, last_h, inside_w, STRIDE_H, GROUP)
        for step in range(start, steps):
            p = step + (LAST_P + AHEAD)
            known = p < last_p
            ahead_dy = ahead_dy + load_columns(dys, p * Q * dy_q, dy_q, inside_q, known, WIDE)
            ahead_y = ahead_y + load_columns(ys, p * Q * dy_q, dy_q, inside_q, known, WIDE)
            h = (step + AHEAD) * STRIDE_H
            ahead_x = ahead_x + load_rows(xs, h, W * x_w, x_w, last_h, inside_w, STRIDE_H, GROUP)
            ahead_add = ahead_add + load_rows(adds, h, W * add_w, add_w, last_h, inside_w, STRIDE_H, GROUP)
            known = step + LAST_P < last_p
            window = window + correct_columns(
                ahead_dy,
                ahead_y,
                inside_q,
                known,
                a,
                b,
                c,
                gate,
                gate_add,
                gate_scale,
                gate_shift,
                GATED,
                GATED_SLOPE,
                WIDE,
            )
            if db_ptr is not None:
                for i in tl.static_range(GROUP // STRIDE_W):
                    total += window[-FIRST_P * WIDE + i - FIRST_Q]
            for v in tl.static_range(STRIDE_H):
                for u in tl.static_range(GROUP):
                    inside = inside_w[u]
                    if RAGGED:
                        inside = inside & (step * STRIDE_H + v < H)
                    if x_ptr is not None:
                        x = accumulator(ahead_x[v * GROUP + u])
                    if dw_ptr is not None:
                        z = x
                        if PENDING is not None:
                            z = pending_activation(x, scale, shift, PENDING_SLOPE, PENDING)
                            if RAGGED:
                                z = tl.where(inside, z, 0.0)
                    dx = tl.zeros([ROWS, BLOCK_C], ACC)
                    after = ()
                    for i in tl.static_range(R * S):
                        if (v + PAD_H - i // S) % STRIDE_H == 0 and (u + PAD_W - i % S) % STRIDE_W == 0:
                            dy = window[
                                ((v + PAD_H - i // S) // STRIDE_H - FIRST_P) * WIDE
                                + (u + PAD_W - i % S) // STRIDE_W
                                - FIRST_Q
                            ]
                            if dx_ptr is not None:
                                dx += dy * taps[i]
                            if dw_ptr is not None:
                                after = after + (sums[i] + dy * z,)
                        elif dw_ptr is not None:
                            after = after + (sums[i],)
                    sums = after
                    if dx_ptr is not None:
                        if PENDING is not None:
                            dx = pending_activation_backward(dx, x, scale, shift, PENDING_SLOPE, PENDING)
                            if RAGGED:
                                dx = tl.where(inside, dx, 0.0)
                            first += dx * x
                            second += dx
                            if SCALED:
                                dx = dx * scale
                        if add_ptr is not None:
                            dx += accumulator(ahead_add[v * GROUP + u])
                        at = ((step * STRIDE_H + v) * W + u) * C
                        tl.store(dxs + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            window = window[WIDE:]
            ahead_dy = ahead_dy[WIDE:]
            ahead_y = ahead_y[WIDE:] if y_ptr is not None else ()
            ahead_x = ahead_x[STEP:] if x_ptr is not None else ()
            ahead_add = ahead_add[STEP:] if add_ptr is not None else ()
    if dw_ptr is not None:
        slab = dw_ptr + share.to(tl.int64) * C * (R * S)
        for i in tl.static_range(R * S):
            tl.store(
                slab + vector * dw_k + (i // S * dw_r + i % S * dw_s),
                tl.sum(sums[i], axis=0).to(dw_ptr.dtype.element_ty),
                mask=vector < C,
            )
    if db_ptr is not None:
        add_to_share(db_ptr + share * C, total, vector, vector < C)
    if sums_ptr is not None:
        out = vector
        if SHUFFLE > 1:
            out = vector % SHUFFLE * (C // SHUFFLE) + vector // SHUFFLE
        add_to_share(sums_ptr + share * 2 * C, first, out, vector < C)
        add_to_share(sums_ptr + share * 2 * C + C, second, out, vector < C)
