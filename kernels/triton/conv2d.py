"""Dense 2-D convolution as implicit GEMM: forward, gradient of the input, gradient of the weight, gradient of the bias.

Nothing is unfolded in memory: a tile of the GEMM's left side is gathered from the image while it is loaded. Reductions
run over the filter's taps outside and the channels inside, so that what depends on the tap (the shift into the image,
the mask of rows that fall into the padding) is computed once per tap. C and K count the channels and filters of one
group; every tensor has its own strides, and a channel stride of one is known at compile time.

A transposed convolution is the same three kernels in other roles, a linear layer is the case of one pixel and one tap.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator


@triton.jit
def band_order(pid, tiles_m, tiles_n, BAND: tl.constexpr):
    """(tile_m, tile_n) of a program. BAND row tiles take turns with every column tile, so both operands stay in L2."""
    per_band = BAND * tiles_n
    first = pid // per_band * BAND
    height = tl.minimum(tiles_m - first, BAND)
    within = pid % per_band
    return first + within % height, within // height


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "pad_h", "pad_w", "dil_h", "dil_w"])
def conv2d_forward_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    M,  # N * P * Q
    H,
    W,
    P,
    Q,
    C,
    K,
    R,
    S,
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
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    # one program computes BLOCK_M output pixels x BLOCK_N filters of one group
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
    h0 = tl.where(m < M, h0, H)
    x_group = x_ptr + g * C * stride_xc
    w_group = w_ptr + g * K * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for tap in range(R * S):
        r = tap // S
        s = tap % S
        h = h0 + r * dil_h
        w = w0 + s * dil_w
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x_tap = x_group + r * dil_h * stride_xh + s * dil_w * stride_xw
        w_tap = w_group + r * stride_wr + s * stride_ws
        for c0 in range(0, C, BLOCK_K):
            channels = c0 + c
            x_block = tl.load(  # [BLOCK_M, BLOCK_K]
                x_tap + x_rows[:, None] + (channels * stride_xc)[None, :],
                mask=inside[:, None] & (channels < C)[None, :],
                other=0.0,
            )
            w_block = tl.load(  # [BLOCK_K, BLOCK_N]
                w_tap + (k * stride_wk)[None, :] + (channels * stride_wc)[:, None],
                mask=(channels < C)[:, None] & (k < K)[None, :],
                other=0.0,
            )
            acc = tl.dot(x_block, w_block, acc, input_precision=PRECISION, out_dtype=ACC)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + g * K + k, mask=k < K, other=0.0).to(ACC)[None, :]
    y_pointers = y_ptr + g * K * stride_yk + y_rows[:, None] + (k * stride_yk)[None, :]
    tl.store(y_pointers, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "pad_h", "pad_w", "dil_h", "dil_w"])
def conv2d_backward_input_kernel(
    dy_ptr,
    w_ptr,
    bias_ptr,
    dx_ptr,
    M,  # N * ceil(H / stride_h) * ceil(W / stride_w)
    H,
    W,
    P,
    Q,
    C,
    K,
    R,
    S,
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
    HAS_BIAS: tl.constexpr,
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
    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    if INT64:
        M = M.to(tl.int64)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(C, BLOCK_N)
    classes = tl.minimum(stride_h, H) * tl.minimum(stride_w, W)
    pid = tl.program_id(0)
    g = pid // (tiles_m * tiles_n * classes)
    # the classes of one tile run side by side: they share the rows of dy and together fill whole lines of dx
    parity = (pid % classes).to(tl.int32)
    h_parity = parity // tl.minimum(stride_w, W)
    w_parity = parity % tl.minimum(stride_w, W)
    tile_m, tile_n = band_order(pid // classes % (tiles_m * tiles_n), tiles_m, tiles_n, BAND)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if INT64:
        g = g.to(tl.int64)
        c = c.to(tl.int64)
        k = k.to(tl.int64)
    class_h = tl.cdiv(H, stride_h)
    class_w = tl.cdiv(W, stride_w)
    n = m // (class_h * class_w)
    i = m % (class_h * class_w) // class_w
    j = m % class_w
    h = i * stride_h + h_parity
    w = j * stride_w + w_parity
    inside_x = (m < M) & (h < H) & (w < W)
    dx_rows = n * stride_xn + h * stride_xh + w * stride_xw
    dy_rows = n * stride_yn + i * stride_yp + j * stride_yq
    # rows past the end are sent far out of dy: the mask of its borders covers them
    i = tl.where(m < M, i, -(1 << 30))
    dy_group = dy_ptr + g * K * stride_yk
    w_group = w_ptr + g * K * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for tap in range(R * S):
        r = tap // S
        s = tap % S
        h_shift = h_parity + pad_h - r * dil_h
        w_shift = w_parity + pad_w - s * dil_w
        reached = (h_shift % stride_h == 0) & (w_shift % stride_w == 0)
        p_shift = h_shift // stride_h
        q_shift = w_shift // stride_w
        p = i + p_shift
        q = j + q_shift
        inside = (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        dy_tap = dy_group + p_shift * stride_yp + q_shift * stride_yq
        w_tap = w_group + r * stride_wr + s * stride_ws
        for k0 in range(0, tl.where(reached, K, 0), BLOCK_K):
            filters = k0 + k
            dy_block = tl.load(  # [BLOCK_M, BLOCK_K]
                dy_tap + dy_rows[:, None] + (filters * stride_yk)[None, :],
                mask=inside[:, None] & (filters < K)[None, :],
                other=0.0,
            )
            w_block = tl.load(  # [BLOCK_K, BLOCK_N]
                w_tap + (c * stride_wc)[None, :] + (filters * stride_wk)[:, None],
                mask=(filters < K)[:, None] & (c < C)[None, :],
                other=0.0,
            )
            acc = tl.dot(dy_block, w_block, acc, input_precision=PRECISION, out_dtype=ACC)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + g * C + c, mask=c < C, other=0.0).to(ACC)[None, :]
    dx_pointers = dx_ptr + g * C * stride_xc + dx_rows[:, None] + (c * stride_xc)[None, :]
    tl.store(dx_pointers, acc.to(dx_ptr.dtype.element_ty), mask=inside_x[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "G", "share", "pad_h", "pad_w", "dil_h", "dil_w"])
def conv2d_backward_weight_kernel(
    dy_ptr,
    x_ptr,
    dw_ptr,
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
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one program computes, for one tap, BLOCK_M filters x BLOCK_N channels of a group, summed over its share of the
    # pixels. dw is the gradient itself, or one slab per share for sum_slabs_kernel
    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles_m = tl.cdiv(K, BLOCK_M)
    tiles_n = tl.cdiv(C, BLOCK_N)
    # the taps of one tile run side by side: they read the same dy and nearly the same x
    pid = tl.program_id(0)
    tap = pid % (R * S)
    r = tap // S
    s = tap % S
    pid = pid // (R * S)
    k = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    pid = pid // tiles_m
    c = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // tiles_n
    g = pid % G
    split = pid // G
    step = tl.arange(0, BLOCK_K)
    if INT64:
        step = step.to(tl.int64)
        k = k.to(tl.int64)
        c = c.to(tl.int64)
        g = g.to(tl.int64)
        split = split.to(tl.int64)
        M = M.to(tl.int64)
    dy_group = dy_ptr + g * K * stride_yk
    x_tap = x_ptr + g * C * stride_xc + (r * dil_h - pad_h) * stride_xh + (s * dil_w - pad_w) * stride_xw
    start = split * share
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for m0 in range(start, tl.minimum(start + share, M), BLOCK_K):
        m = m0 + step
        n = m // (P * Q)
        p = m % (P * Q) // Q
        q = m % Q
        h = p * stride_h - pad_h + r * dil_h
        w = q * stride_w - pad_w + s * dil_w
        # dy is masked by the padding, too: an Inf in dy times the zero of the padding would be NaN
        inside = (m < M) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        dy_block = tl.load(  # [BLOCK_M, BLOCK_K]
            dy_group + (n * stride_yn + p * stride_yp + q * stride_yq)[None, :] + (k * stride_yk)[:, None],
            mask=(k < K)[:, None] & inside[None, :],
            other=0.0,
        )
        x_block = tl.load(  # [BLOCK_K, BLOCK_N]
            x_tap
            + (n * stride_xn + p * stride_h * stride_xh + q * stride_w * stride_xw)[:, None]
            + (c * stride_xc)[None, :],
            mask=inside[:, None] & (c < C)[None, :],
            other=0.0,
        )
        acc = tl.dot(dy_block, x_block, acc, input_precision=PRECISION, out_dtype=ACC)
    dw_rows = dw_ptr + split * stride_split + (g * K + k) * stride_wk + r * stride_wr + s * stride_ws
    dw_pointers = dw_rows[:, None] + (c * stride_wc)[None, :]
    tl.store(dw_pointers, acc.to(dw_ptr.dtype.element_ty), mask=(k < K)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["M", "P", "Q", "share"])
def conv2d_backward_bias_kernel(
    dy_ptr,
    db_ptr,
    M,  # N * P * Q
    P,
    Q,
    K,
    share,  # pixels per program, a multiple of BLOCK_M
    stride_yn,
    stride_yk,
    stride_yp,
    stride_yq,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # one program sums its share of the pixels for BLOCK_N filters. db has one slab per share, as the weight's gradient
    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    k = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split = pid // tiles_n
    step = tl.arange(0, BLOCK_M)
    if INT64:
        step = step.to(tl.int64)
        k = k.to(tl.int64)
        split = split.to(tl.int64)
        M = M.to(tl.int64)
    start = split * share
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for m0 in range(start, tl.minimum(start + share, M), BLOCK_M):
        m = m0 + step
        n = m // (P * Q)
        p = m % (P * Q) // Q
        q = m % Q
        rows = dy_ptr + n * stride_yn + p * stride_yp + q * stride_yq
        pointers = rows[:, None] + (k * stride_yk)[None, :]
        acc += accumulator(tl.load(pointers, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0))
    tl.store(db_ptr + split * K + k, tl.sum(acc, axis=0).to(db_ptr.dtype.element_ty), mask=k < K)


@triton.jit(do_not_specialize=["slabs"])
def sum_slabs_kernel(slab_ptr, out_ptr, numel, slabs, INT64: tl.constexpr, BLOCK: tl.constexpr):
    # one program sums BLOCK elements over all slabs, always in the same order
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    acc = tl.zeros((BLOCK,), dtype=slab_ptr.dtype.element_ty)
    for slab in range(slabs):
        acc += tl.load(slab_ptr + slab * numel + i, mask=inside, other=0.0)
    tl.store(out_ptr + i, acc.to(out_ptr.dtype.element_ty), mask=inside)
