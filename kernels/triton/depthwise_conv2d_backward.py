"""Both gradients of a depthwise convolution, whatever its filters, strides, dilation and layout: one kernel for each.

No sum over channels, so a program works on pixels x channels and loops over the taps at run time. The input's side
applies a pending activation and its gradient. Every tap reads its pixels again, from the caches, so that what is done
to the gradient of the output is done before, by a pass of its own. Small filters in channels_last have a kernel that
reads everything once (depthwise_conv2d_sliding_backward).
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.conv_fusion import (
    corrected,
    pending_activation,
    pending_activation_backward,
    store_sums,
)


@triton.jit
def channels_of(ptr, c, inside):
    """Per-channel numbers, zero where there is no channel."""
    return accumulator(tl.load(ptr + c, mask=inside, other=0.0))


@triton.jit(do_not_specialize=["M", "P", "Q"])
def depthwise_conv2d_corrected_kernel(
    dy_ptr,  # [N, K, P, Q]
    y_ptr,  # laid out as dy
    a_ptr,  # correction
    b_ptr,
    c_ptr,
    gate_ptr,  # gated: [N, K]
    gate_add_ptr,
    gate_scale_ptr,
    gate_shift_ptr,
    out_ptr,  # [N, K, P, Q]
    M,  # N * P * Q
    K,
    P,
    Q,
    dy_n,
    dy_k,
    dy_p,
    dy_q,
    out_n,
    out_k,
    out_p,
    out_q,
    GATED: tl.constexpr,  # activation, None if there is no gate
    GATED_SLOPE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one program computes the gradient of the convolution's raw output for BLOCK_M pixels x BLOCK_K channels
    tiles_k = tl.cdiv(K, BLOCK_K)
    row = tl.program_id(0) // tiles_k
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    if INT64:
        row = row.to(tl.int64)
        k = k.to(tl.int64)
        M = M.to(tl.int64)
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = m // (P * Q)
    p = m % (P * Q) // Q
    q = m % Q
    real = k < K
    inside = (m < M)[:, None] & real[None, :]
    offsets = (n * dy_n + p * dy_p + q * dy_q)[:, None] + (k * dy_k)[None, :]
    dy = accumulator(tl.load(dy_ptr + offsets, mask=inside, other=0.0))
    if y_ptr is not None:
        y = accumulator(tl.load(y_ptr + offsets, mask=inside, other=0.0))
    if GATED is not None:
        per_image = (n * K)[:, None] + k[None, :]
        gate = tl.load(gate_ptr + per_image, mask=inside, other=0.0)
        more = tl.load(gate_add_ptr + per_image, mask=inside, other=0.0)
        scale = channels_of(gate_scale_ptr, k, real)[None, :]
        shift = channels_of(gate_shift_ptr, k, real)[None, :]
        dy = pending_activation_backward(dy * gate + more, y, scale, shift, GATED_SLOPE, GATED)
    if b_ptr is not None:
        a = channels_of(a_ptr, k, real)[None, :]
        dy = corrected(dy, y, a, channels_of(b_ptr, k, real)[None, :], channels_of(c_ptr, k, real)[None, :])
    elif a_ptr is not None:
        dy = dy * channels_of(a_ptr, k, real)[None, :]
    offsets = (n * out_n + p * out_p + q * out_q)[:, None] + (k * out_k)[None, :]
    tl.store(out_ptr + offsets, dy.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "R", "S", "share", "pad_h", "pad_w"])
def depthwise_conv2d_backward_input_kernel(
    dy_ptr,  # [N, K, P, Q]
    w_ptr,  # [K, 1, R, S]
    x_ptr,  # with a pending activation: [N, C, H, W]
    scale_ptr,
    shift_ptr,
    add_ptr,  # [N, C, H, W]
    dx_ptr,
    sums_ptr,  # [shares, 2, C]
    M,  # N * H * W
    C,
    H,
    W,
    P,
    Q,
    R,
    S,
    share,  # pixels per program, a multiple of BLOCK_M
    pad_h,
    pad_w,
    dy_n,
    dy_k,
    dy_p,
    dy_q,
    w_k,
    w_r,
    w_s,
    x_n,
    x_c,
    x_h,
    x_w,
    add_n,
    add_c,
    add_h,
    add_w,
    dx_n,
    dx_c,
    dx_h,
    dx_w,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    MULTIPLIER: tl.constexpr,  # filters per channel
    SHUFFLE: tl.constexpr,  # groups of channels that were shuffled, 1 for none
    PENDING: tl.constexpr,  # activation of x, None if it is plain
    PENDING_SLOPE: tl.constexpr,
    SCALED: tl.constexpr,  # dx is the gradient of x, else that of x * scale + shift
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # one program computes dx of a share of the pixels x BLOCK_C channels, and their sums
    ACC: tl.constexpr = tl.float64 if dx_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles_c = tl.cdiv(C, BLOCK_C)
    row = tl.program_id(0) // tiles_c
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    step = tl.arange(0, BLOCK_M)
    if INT64:
        row = row.to(tl.int64)
        c = c.to(tl.int64)
        step = step.to(tl.int64)
        M = M.to(tl.int64)
    z = c
    if SHUFFLE > 1:  # puts channel i of group g at i * SHUFFLE + g
        size = C // SHUFFLE
        z = c % size * SHUFFLE + c // size
    if PENDING is not None:
        scale = channels_of(scale_ptr, c, c < C)[None, :]
        shift = channels_of(shift_ptr, c, c < C)[None, :]
    first = tl.zeros([BLOCK_C], ACC)
    second = tl.zeros([BLOCK_C], ACC)
    start = row * share
    for m0 in range(start, tl.minimum(start + share, M), BLOCK_M):
        m = m0 + step
        n = m // (H * W)
        h = m % (H * W) // W
        w = m % W
        inside = (m < M)[:, None] & (c < C)[None, :]
        dz = tl.zeros([BLOCK_M, BLOCK_C], ACC)
        for i in range(MULTIPLIER):
            k = z * MULTIPLIER + i
            for r in range(R):
                p = h + pad_h - r * DILATION_H
                hits_p = (p >= 0) & (p % STRIDE_H == 0)
                p = p // STRIDE_H
                for s in range(S):
                    q = w + pad_w - s * DILATION_W
                    hits = hits_p & (p < P) & (q >= 0) & (q % STRIDE_W == 0)
                    q = q // STRIDE_W
                    hits = inside & (hits & (q < Q))[:, None]
                    offsets = (n * dy_n + p * dy_p + q * dy_q)[:, None] + (k * dy_k)[None, :]
                    dy = accumulator(tl.load(dy_ptr + offsets, mask=hits, other=0.0))
                    tap = channels_of(w_ptr + r * w_r + s * w_s, k * w_k, c < C)
                    # an infinite weight counts only where it has something to weigh
                    dz += tl.where(hits, dy * tap[None, :], 0.0)
        dx = dz
        if PENDING is not None:
            offsets = (n * x_n + h * x_h + w * x_w)[:, None] + (c * x_c)[None, :]
            x = accumulator(tl.load(x_ptr + offsets, mask=inside, other=0.0))
            dx = tl.where(inside, pending_activation_backward(dz, x, scale, shift, PENDING_SLOPE, PENDING), 0.0)
            first += tl.sum(dx * x, axis=0)
            second += tl.sum(dx, axis=0)
            if SCALED:
                dx = dx * scale
        if add_ptr is not None:
            offsets = (n * add_n + h * add_h + w * add_w)[:, None] + (c * add_c)[None, :]
            dx += accumulator(tl.load(add_ptr + offsets, mask=inside, other=0.0))
        offsets = (n * dx_n + h * dx_h + w * dx_w)[:, None] + (c * dx_c)[None, :]
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if PENDING is not None:
        store_sums(sums_ptr + row * 2 * C, first, second, c, c < C, C)


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "R", "S", "share", "pad_h", "pad_w"])
def depthwise_conv2d_backward_weight_kernel(
    dy_ptr,  # [N, K, P, Q]
    x_ptr,  # [N, C, H, W]
    scale_ptr,
    shift_ptr,
    dw_ptr,  # [shares, K * R * S]
    db_ptr,  # [shares, K], or None
    M,  # N * P * Q
    K,
    H,
    W,
    P,
    Q,
    R,
    S,
    share,  # pixels per program, a multiple of BLOCK_M
    pad_h,
    pad_w,
    dy_n,
    dy_k,
    dy_p,
    dy_q,
    x_n,
    x_c,
    x_h,
    x_w,
    dw_k,
    dw_r,
    dw_s,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    SHUFFLE: tl.constexpr,
    PENDING: tl.constexpr,
    PENDING_SLOPE: tl.constexpr,
    INT64: tl.constexpr,
    TAPS: tl.constexpr,  # neighbours in a row of the filter
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one program sums, over its share of the pixels, the gradients of TAPS taps of BLOCK_K filters
    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles_s = tl.cdiv(S, TAPS)
    pid = tl.program_id(0)
    k = pid % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    s0 = pid // tiles_k % tiles_s * TAPS
    r = pid // (tiles_k * tiles_s) % R
    row = pid // (tiles_k * tiles_s * R)
    step = tl.arange(0, BLOCK_M)
    if INT64:
        row = row.to(tl.int64)
        k = k.to(tl.int64)
        step = step.to(tl.int64)
        M = M.to(tl.int64)
    c = k // MULTIPLIER
    if SHUFFLE > 1:  # puts channel i of group g at i * SHUFFLE + g
        c = c % SHUFFLE * (K // MULTIPLIER // SHUFFLE) + c // SHUFFLE
    if PENDING is not None:
        scale = channels_of(scale_ptr, c, k < K)[None, :]
        shift = channels_of(shift_ptr, c, k < K)[None, :]
    sums = ()
    for _ in tl.static_range(TAPS):
        sums = sums + (tl.zeros([BLOCK_M, BLOCK_K], ACC),)
    total = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    start = row * share
    for m0 in range(start, tl.minimum(start + share, M), BLOCK_M):
        m = m0 + step
        n = m // (P * Q)
        p = m % (P * Q) // Q
        q = m % Q
        real = (m < M)[:, None] & (k < K)[None, :]
        offsets = (n * dy_n + p * dy_p + q * dy_q)[:, None] + (k * dy_k)[None, :]
        dy = accumulator(tl.load(dy_ptr + offsets, mask=real, other=0.0))
        if db_ptr is not None:
            total += dy
        h = p * STRIDE_H - pad_h + r * DILATION_H
        inside_h = (h >= 0) & (h < H)
        after = ()
        for t in tl.static_range(TAPS):
            w = q * STRIDE_W - pad_w + (s0 + t) * DILATION_W
            inside = real & (inside_h & (w >= 0) & (w < W))[:, None]
            offsets = (n * x_n + h * x_h + w * x_w)[:, None] + (c * x_c)[None, :]
            x = accumulator(tl.load(x_ptr + offsets, mask=inside, other=0.0))
            if PENDING is not None:
                x = pending_activation(x, scale, shift, PENDING_SLOPE, PENDING)
            after = after + (sums[t] + tl.where(inside, x * dy, 0.0),)
        sums = after
    dw_ptr += row * K * R * S + r * dw_r
    for t in tl.static_range(TAPS):
        s = s0 + t
        gradient = tl.sum(sums[t], axis=0).to(dw_ptr.dtype.element_ty)
        tl.store(dw_ptr + k * dw_k + s * dw_s, gradient, mask=(k < K) & (s < S))
    if db_ptr is not None and r == 0 and s0 == 0:
        tl.store(db_ptr + row * K + k, tl.sum(total, axis=0).to(db_ptr.dtype.element_ty), mask=k < K)
