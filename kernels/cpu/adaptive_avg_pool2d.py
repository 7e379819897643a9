"""Adaptive average pooling on CPU, fp32 and fp64: what kernels/triton/adaptive_avg_pool2d.py does."""

import numba


@numba.njit(inline="always")
def begin(i, parts, size):
    return i * size // parts


@numba.njit(inline="always")
def end(i, parts, size):
    return ((i + 1) * size + parts - 1) // parts


@numba.njit(parallel=True, cache=True, fastmath={"reassoc"})
def adaptive_avg_pool2d_forward(x, y):
    # x [N*C, H, W]; y [N*C, P, Q]. Sums may be reordered, so that rows are added as vectors
    planes, H, W = x.shape
    P, Q = y.shape[1:]
    for plane in numba.prange(planes):
        for p in range(P):
            h0, h1 = begin(p, P, H), end(p, P, H)
            for q in range(Q):
                w0, w1 = begin(q, Q, W), end(q, Q, W)
                total = x.dtype.type(0)
                for h in range(h0, h1):
                    row = x[plane, h, w0:w1]
                    for w in range(len(row)):
                        total += row[w]
                y[plane, p, q] = total / x.dtype.type((h1 - h0) * (w1 - w0))


@numba.njit(parallel=True, cache=True)
def adaptive_avg_pool2d_forward_channels_last(x, y):
    # x [N, H, W, C]; y [N, P, Q, C]
    N, H, W, C = x.shape
    P, Q = y.shape[1:3]
    for row in numba.prange(N * P):
        n, p = row // P, row % P
        h0, h1 = begin(p, P, H), end(p, P, H)
        for q in range(Q):
            w0, w1 = begin(q, Q, W), end(q, Q, W)
            total = y[n, p, q]
            total[:] = 0
            for h in range(h0, h1):
                for w in range(w0, w1):
                    source = x[n, h, w]
                    for c in range(C):
                        total[c] += source[c]
            divisor = x.dtype.type((h1 - h0) * (w1 - w0))
            for c in range(C):
                total[c] /= divisor


@numba.njit(parallel=True, cache=True)
def adaptive_avg_pool2d_backward(dy, dx):
    # dy [N*C, P, Q]; dx [N*C, H, W]. A plane belongs to one thread: the sums have one order
    planes, P, Q = dy.shape
    H, W = dx.shape[1:]
    for plane in numba.prange(planes):
        dx[plane] = 0
        for p in range(P):
            h0, h1 = begin(p, P, H), end(p, P, H)
            for q in range(Q):
                w0, w1 = begin(q, Q, W), end(q, Q, W)
                g = dy[plane, p, q] / dx.dtype.type((h1 - h0) * (w1 - w0))
                for h in range(h0, h1):
                    row = dx[plane, h, w0:w1]
                    for w in range(len(row)):
                        row[w] += g


@numba.njit(parallel=True, cache=True)
def adaptive_avg_pool2d_backward_channels_last(dy, dx):
    # dy [N, P, Q, C]; dx [N, H, W, C]. Each row of dx gathers from the windows over it
    N, P, Q, C = dy.shape
    H, W = dx.shape[1:3]
    for row in numba.prange(N * H):
        n, h = row // H, row % H
        target = dx[n, h]
        target[:] = 0
        for p in range(begin(h, H, P), end(h, H, P)):
            rows = end(p, P, H) - begin(p, P, H)
            for q in range(Q):
                w0, w1 = begin(q, Q, W), end(q, Q, W)
                divisor = dx.dtype.type(rows * (w1 - w0))
                source = dy[n, p, q]
                for w in range(w0, w1):
                    pixel = target[w]
                    for c in range(C):
                        pixel[c] += source[c] / divisor
