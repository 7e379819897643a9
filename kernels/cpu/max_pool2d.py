"""Max pooling on CPU, fp32 and fp64: what kernels/triton/max_pool2d.py does, and the same taps.

Every select is branch-free: which tap wins is random, and a mispredicted branch costs more than the whole window.
"""

import numba
import numpy as np


@numba.njit(inline="always")
def take(best, tap, x, t):
    # the first of equals wins, of NaNs the last
    better = (x > best) | (x != x)
    return (x if better else best), (t if better else tap)


@numba.njit(inline="always")
def inner_row(image, best, tap, h0, w0, R, S, STRIDE_W):
    # outputs whose windows lie inside the image; called with literals, so that the loops over the window unroll
    rows = image[h0 : h0 + R, w0:]
    for q in range(len(best)):
        m, k = rows[0, q * STRIDE_W], 0
        for r in range(R):
            for s in range(S):
                m, k = take(m, k, rows[r, q * STRIDE_W + s], r * S + s)
        best[q] = m
        tap[q] = k


@numba.njit(parallel=True, cache=True)
def max_pool2d_forward(x, y, taps, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    # x [N*C, H, W]; y, taps [N*C, P, Q]
    planes, H, W = x.shape
    P, Q = y.shape[1:]
    # the outputs whose windows lie between the left and the right edge
    inner_begin = min(Q, (pad_w + stride_w - 1) // stride_w)
    inner_end = max(inner_begin, min(Q, (W + pad_w - S) // stride_w + 1))
    dense = dilation_h == 1 and dilation_w == 1
    for plane in numba.prange(planes):
        image = x[plane]
        for p in range(P):
            h0 = p * stride_h - pad_h
            r0 = (dilation_h - 1 - h0) // dilation_h if h0 < 0 else 0
            r1 = min(R, (H - 1 - h0) // dilation_h + 1)
            q = 0
            while q < Q:
                if q == inner_begin and inner_begin < inner_end and dense and r0 == 0 and r1 == R:
                    best, tap = y[plane, p, inner_begin:inner_end], taps[plane, p, inner_begin:inner_end]
                    w0 = inner_begin * stride_w - pad_w
                    if R == 2 and S == 2 and stride_w == 2:
                        inner_row(image, best, tap, h0, w0, 2, 2, 2)
                        q = inner_end
                        continue
                    if R == 3 and S == 3 and stride_w == 2:
                        inner_row(image, best, tap, h0, w0, 3, 3, 2)
                        q = inner_end
                        continue
                    if R == 3 and S == 3 and stride_w == 1:
                        inner_row(image, best, tap, h0, w0, 3, 3, 1)
                        q = inner_end
                        continue
                w0 = q * stride_w - pad_w
                s0 = (dilation_w - 1 - w0) // dilation_w if w0 < 0 else 0
                s1 = min(S, (W - 1 - w0) // dilation_w + 1)
                m, k = x.dtype.type(-np.inf), r0 * S + s0
                for r in range(r0, r1):
                    for s in range(s0, s1):
                        m, k = take(m, k, image[h0 + r * dilation_h, w0 + s * dilation_w], r * S + s)
                y[plane, p, q] = m
                taps[plane, p, q] = k
                q += 1


@numba.njit(inline="always")
def inner_2x2(best, tap, upper, lower, C):
    # windows inside the image, side by side in memory; upper, lower: the image's rows from the first window on
    n = len(best)
    a, b, c, d = upper[:n], upper[C : C + n], lower[:n], lower[C : C + n]
    for i in range(n):
        m, k = a[i], numba.uint8(0)
        m, k = take(m, k, b[i], numba.uint8(1))
        m, k = take(m, k, c[i], numba.uint8(2))
        m, k = take(m, k, d[i], numba.uint8(3))
        best[i] = m
        tap[i] = k


@numba.njit(inline="always")
def inner_3x3(best, tap, upper, middle, lower, C):
    n = len(best)
    a, b, c = upper[:n], upper[C : C + n], upper[2 * C : 2 * C + n]
    d, e, f = middle[:n], middle[C : C + n], middle[2 * C : 2 * C + n]
    g, h, j = lower[:n], lower[C : C + n], lower[2 * C : 2 * C + n]
    for i in range(n):
        m, k = a[i], numba.uint8(0)
        m, k = take(m, k, b[i], numba.uint8(1))
        m, k = take(m, k, c[i], numba.uint8(2))
        m, k = take(m, k, d[i], numba.uint8(3))
        m, k = take(m, k, e[i], numba.uint8(4))
        m, k = take(m, k, f[i], numba.uint8(5))
        m, k = take(m, k, g[i], numba.uint8(6))
        m, k = take(m, k, h[i], numba.uint8(7))
        m, k = take(m, k, j[i], numba.uint8(8))
        best[i] = m
        tap[i] = k


@numba.njit(parallel=True, cache=True)
def max_pool2d_forward_channels_last(x, y, taps, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    # x [N, H, W, C]; y, taps [N, P, Q, C]
    N, H, W, C = x.shape
    P, Q = y.shape[1:3]
    dense = dilation_h == 1 and dilation_w == 1
    inner_begin = min(Q, (pad_w + stride_w - 1) // stride_w)
    inner_end = max(inner_begin, min(Q, (W + pad_w - S) // stride_w + 1))
    # at stride 1 windows side by side in the image are so in the output: one loop for all of them
    together = inner_end - inner_begin if stride_w == 1 else 1
    # short loops cost more than they save
    square = R if dense and R == S and (R == 2 or R == 3) and together * C >= 32 else 0
    for row in numba.prange(N * P):
        n, p = row // P, row % P
        h0 = p * stride_h - pad_h
        r0 = (dilation_h - 1 - h0) // dilation_h if h0 < 0 else 0
        r1 = min(R, (H - 1 - h0) // dilation_h + 1)
        whole = square if r0 == 0 and r1 == R else 0
        q = 0
        while q < Q:
            w0 = q * stride_w - pad_w
            if whole != 0 and inner_begin <= q and q < inner_end:
                best, tap = y[n, p, q : q + together].reshape(-1), taps[n, p, q : q + together].reshape(-1)
                first, second = x[n, h0, w0:].reshape(-1), x[n, h0 + 1, w0:].reshape(-1)
                if whole == 2:
                    inner_2x2(best, tap, first, second, C)
                else:
                    inner_3x3(best, tap, first, second, x[n, h0 + 2, w0:].reshape(-1), C)
                q += together
                continue
            s0 = (dilation_w - 1 - w0) // dilation_w if w0 < 0 else 0
            s1 = min(S, (W - 1 - w0) // dilation_w + 1)
            best, tap = y[n, p, q], taps[n, p, q]
            for c in range(C):
                best[c] = -np.inf
                tap[c] = r0 * S + s0
            for r in range(r0, r1):
                for s in range(s0, s1):
                    source = x[n, h0 + r * dilation_h, w0 + s * dilation_w]
                    t = taps.dtype.type(r * S + s)
                    for c in range(C):
                        best[c], tap[c] = take(best[c], tap[c], source[c], t)
            q += 1


@numba.njit(cache=True)
def tap_offsets(R, S, dilation_h, dilation_w, width):
    """How far tap t lies behind its window's first, in pixels of a plane this wide."""
    offsets = np.empty(R * S, np.int64)
    for r in range(R):
        for s in range(S):
            offsets[r * S + s] = r * dilation_h * width + s * dilation_w
    return offsets


@numba.njit(parallel=True, cache=True)
def max_pool2d_backward(dy, taps, dx, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    # dy, taps [N*C, P, Q]; dx [N*C, H, W]. A plane belongs to one thread: the sums have one order
    planes, P, Q = dy.shape
    H, W = dx.shape[1:]
    offsets = tap_offsets(R, S, dilation_h, dilation_w, W)
    for plane in numba.prange(planes):
        target = dx[plane].reshape(H * W)
        target[:] = 0
        for p in range(P):
            corner = (p * stride_h - pad_h) * W - pad_w
            for q in range(Q):
                target[corner + q * stride_w + offsets[taps[plane, p, q]]] += dy[plane, p, q]


@numba.njit(parallel=True, cache=True)
def max_pool2d_backward_channels_last(dy, taps, dx, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    # dy, taps [N, P, Q, C]; dx [N, H, W, C]. An image belongs to one thread: the sums have one order
    N, P, Q, C = dy.shape
    H, W = dx.shape[1:3]
    offsets = tap_offsets(R, S, dilation_h, dilation_w, W) * C
    for n in numba.prange(N):
        target = dx[n].reshape(H * W * C)
        target[:] = 0
        for p in range(P):
            for q in range(Q):
                corner = ((p * stride_h - pad_h) * W + q * stride_w - pad_w) * C
                source, tap = dy[n, p, q], taps[n, p, q]
                for c in range(C):
                    target[corner + c + offsets[tap[c]]] += source[c]


@numba.njit(inline="always")
def from_one(target, dy, taps, t, ADD):
    zero = target.dtype.type(0)
    for c in range(len(target)):
        new = dy[c] if taps[c] == t else zero
        target[c] = target[c] + new if ADD else new


@numba.njit(inline="always")
def from_two(target, dy, taps, t, u, ADD):
    # the first window sees the pixel by tap t, the second by tap u
    zero = target.dtype.type(0)
    a, b, i, j = dy[0], dy[1], taps[0], taps[1]
    for c in range(len(target)):
        new = (a[c] if i[c] == t else zero) + (b[c] if j[c] == u else zero)
        target[c] = target[c] + new if ADD else new


@numba.njit(inline="always")
def from_three(target, dy, taps, t, u, v, ADD):
    zero = target.dtype.type(0)
    a, b, d, i, j, k = dy[0], dy[1], dy[2], taps[0], taps[1], taps[2]
    for c in range(len(target)):
        new = ((a[c] if i[c] == t else zero) + (b[c] if j[c] == u else zero)) + (d[c] if k[c] == v else zero)
        target[c] = target[c] + new if ADD else new


@numba.njit(parallel=True, cache=True)
def max_pool2d_backward_gather(dy, taps, dx, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    # as max_pool2d_backward_channels_last, for undilated windows of which at most three lie side by side over a pixel:
    # every element of dx is written once, and no load depends on a tap
    N, P, Q, C = dy.shape
    H, W = dx.shape[1:3]
    tap_type = taps.dtype.type
    for row in numba.prange(N * H):
        n, h = row // H, row % H
        p0 = max(0, (h + pad_h - R + stride_h) // stride_h)
        p1 = min(P, (h + pad_h) // stride_h + 1)
        for w in range(W):
            target = dx[n, h, w]
            q0 = max(0, (w + pad_w - S + stride_w) // stride_w)
            q1 = min(Q, (w + pad_w) // stride_w + 1)
            if p0 >= p1 or q0 >= q1:
                target[:] = 0
                continue
            for p in range(p0, p1):
                first = (h + pad_h - p * stride_h) * S + w + pad_w - q0 * stride_w
                t, u, v = tap_type(first), tap_type(first - stride_w), tap_type(first - 2 * stride_w)
                source, tap = dy[n, p, q0:q1], taps[n, p, q0:q1]
                if q1 - q0 == 1:
                    if p == p0:
                        from_one(target, source[0], tap[0], t, False)
                    else:
                        from_one(target, source[0], tap[0], t, True)
                elif q1 - q0 == 2:
                    if p == p0:
                        from_two(target, source, tap, t, u, False)
                    else:
                        from_two(target, source, tap, t, u, True)
                elif p == p0:
                    from_three(target, source, tap, t, u, v, False)
                else:
                    from_three(target, source, tap, t, u, v, True)
