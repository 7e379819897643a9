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


@numba.njit(parallel=True, cache=True)
def max_pool2d_forward_channels_last(x, y, taps, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w):
    # x [N, H, W, C]; y, taps [N, P, Q, C]
    N, H, W, C = x.shape
    P, Q = y.shape[1:3]
    for row in numba.prange(N * P):
        n, p = row // P, row % P
        h0 = p * stride_h - pad_h
        r0 = (dilation_h - 1 - h0) // dilation_h if h0 < 0 else 0
        r1 = min(R, (H - 1 - h0) // dilation_h + 1)
        for q in range(Q):
            w0 = q * stride_w - pad_w
            s0 = (dilation_w - 1 - w0) // dilation_w if w0 < 0 else 0
            s1 = min(S, (W - 1 - w0) // dilation_w + 1)
            best, tap = y[n, p, q], taps[n, p, q]
            for c in range(C):
                best[c] = -np.inf
                tap[c] = r0 * S + s0
            for r in range(r0, r1):
                for s in range(s0, s1):
                    source = x[n, h0 + r * dilation_h, w0 + s * dilation_w]
                    t = r * S + s
                    for c in range(C):
                        best[c], tap[c] = take(best[c], tap[c], source[c], t)


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
