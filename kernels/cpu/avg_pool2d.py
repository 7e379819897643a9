"""Average pooling on CPU, fp32 and fp64: what kernels/triton/avg_pool2d.py does, in the same order of summation."""

import numba


@numba.njit(inline="always")
def count(start, size, window, pad, count_pad):
    """How many pixels a window counts along one axis: those of the image, or those of the padding as well."""
    end = min(start + window, size + pad)
    return end - start if count_pad else min(end, size) - max(start, 0)


@numba.njit(inline="always")
def inner_row(image, target, h0, w0, R, S, STRIDE_W, divisor):
    # outputs whose windows lie inside the image; called with literals, so that the loops over the window unroll
    rows = image[h0 : h0 + R, w0:]
    for q in range(len(target)):
        total = image.dtype.type(0)
        for r in range(R):
            for s in range(S):
                total += rows[r, q * STRIDE_W + s]
        target[q] = total / divisor


@numba.njit(inline="always")
def inner_row_backward(image, source, h0, w0, R, S, STRIDE_W, divisor):
    rows = image[h0 : h0 + R, w0:]
    for q in range(len(source)):
        g = source[q] / divisor
        for r in range(R):
            for s in range(S):
                rows[r, q * STRIDE_W + s] += g


@numba.njit(cache=True)
def inner_columns(W, Q, S, stride_w, pad_w):
    """The range of outputs whose windows lie between the left and the right edge."""
    begin = min(Q, (pad_w + stride_w - 1) // stride_w)
    return begin, max(begin, min(Q, (W + pad_w - S) // stride_w + 1))


@numba.njit(parallel=True, cache=True)
def avg_pool2d_forward(x, y, R, S, stride_h, stride_w, pad_h, pad_w, count_pad, override):
    # x [N*C, H, W]; y [N*C, P, Q]; override is 0 for none
    planes, H, W = x.shape
    P, Q = y.shape[1:]
    zero = x.dtype.type(0)
    inner_begin, inner_end = inner_columns(W, Q, S, stride_w, pad_w)
    full = x.dtype.type(override if override != 0 else R * S)
    for plane in numba.prange(planes):
        image = x[plane]
        for p in range(P):
            h0 = p * stride_h - pad_h
            r0, r1 = max(0, -h0), min(R, H - h0)
            q = 0
            while q < Q:
                if q == inner_begin and inner_begin < inner_end and r0 == 0 and r1 == R:
                    target, w0 = y[plane, p, inner_begin:inner_end], inner_begin * stride_w - pad_w
                    if R == 2 and S == 2 and stride_w == 2:
                        inner_row(image, target, h0, w0, 2, 2, 2, full)
                        q = inner_end
                        continue
                    if R == 3 and S == 3 and stride_w == 2:
                        inner_row(image, target, h0, w0, 3, 3, 2, full)
                        q = inner_end
                        continue
                    if R == 3 and S == 3 and stride_w == 1:
                        inner_row(image, target, h0, w0, 3, 3, 1, full)
                        q = inner_end
                        continue
                w0 = q * stride_w - pad_w
                s0, s1 = max(0, -w0), min(S, W - w0)
                total = zero
                for r in range(r0, r1):
                    for s in range(s0, s1):
                        total += image[h0 + r, w0 + s]
                divisor = override
                if divisor == 0:
                    divisor = count(h0, H, R, pad_h, count_pad) * count(w0, W, S, pad_w, count_pad)
                y[plane, p, q] = total / x.dtype.type(divisor)
                q += 1


@numba.njit(parallel=True, cache=True)
def avg_pool2d_forward_channels_last(x, y, R, S, stride_h, stride_w, pad_h, pad_w, count_pad, override):
    # x [N, H, W, C]; y [N, P, Q, C]; override is 0 for none
    N, H, W, C = x.shape
    P, Q = y.shape[1:3]
    for row in numba.prange(N * P):
        n, p = row // P, row % P
        h0 = p * stride_h - pad_h
        r0, r1 = max(0, -h0), min(R, H - h0)
        for q in range(Q):
            w0 = q * stride_w - pad_w
            s0, s1 = max(0, -w0), min(S, W - w0)
            total = y[n, p, q]
            total[:] = 0
            for r in range(r0, r1):
                for s in range(s0, s1):
                    source = x[n, h0 + r, w0 + s]
                    for c in range(C):
                        total[c] += source[c]
            divisor = override
            if divisor == 0:
                divisor = count(h0, H, R, pad_h, count_pad) * count(w0, W, S, pad_w, count_pad)
            d = x.dtype.type(divisor)
            for c in range(C):
                total[c] /= d


@numba.njit(parallel=True, cache=True)
def avg_pool2d_backward(dy, dx, R, S, stride_h, stride_w, pad_h, pad_w, count_pad, override):
    # dy [N*C, P, Q]; dx [N*C, H, W]. A plane belongs to one thread: the sums have one order
    planes, P, Q = dy.shape
    H, W = dx.shape[1:]
    inner_begin, inner_end = inner_columns(W, Q, S, stride_w, pad_w)
    full = dx.dtype.type(override if override != 0 else R * S)
    for plane in numba.prange(planes):
        image = dx[plane]
        image[:] = 0
        for p in range(P):
            h0 = p * stride_h - pad_h
            r0, r1 = max(0, -h0), min(R, H - h0)
            q = 0
            while q < Q:
                if q == inner_begin and inner_begin < inner_end and r0 == 0 and r1 == R:
                    source, w0 = dy[plane, p, inner_begin:inner_end], inner_begin * stride_w - pad_w
                    if R == 2 and S == 2 and stride_w == 2:
                        inner_row_backward(image, source, h0, w0, 2, 2, 2, full)
                        q = inner_end
                        continue
                    if R == 3 and S == 3 and stride_w == 2:
                        inner_row_backward(image, source, h0, w0, 3, 3, 2, full)
                        q = inner_end
                        continue
                    if R == 3 and S == 3 and stride_w == 1:
                        inner_row_backward(image, source, h0, w0, 3, 3, 1, full)
                        q = inner_end
                        continue
                w0 = q * stride_w - pad_w
                s0, s1 = max(0, -w0), min(S, W - w0)
                divisor = override
                if divisor == 0:
                    divisor = count(h0, H, R, pad_h, count_pad) * count(w0, W, S, pad_w, count_pad)
                g = dy[plane, p, q] / dx.dtype.type(divisor)
                for r in range(r0, r1):
                    for s in range(s0, s1):
                        image[h0 + r, w0 + s] += g
                q += 1


@numba.njit(parallel=True, cache=True)
def avg_pool2d_backward_channels_last(dy, dx, R, S, stride_h, stride_w, pad_h, pad_w, count_pad, override):
    # dy [N, P, Q, C]; dx [N, H, W, C]. Each row of dx gathers from the windows over it
    N, P, Q, C = dy.shape
    H, W = dx.shape[1:3]
    for row in numba.prange(N * H):
        n, h = row // H, row % H
        target = dx[n, h]
        target[:] = 0
        first = max(0, (h + pad_h - R + stride_h) // stride_h)
        last = min(P - 1, (h + pad_h) // stride_h)
        for p in range(first, last + 1):
            h0 = p * stride_h - pad_h
            for q in range(Q):
                w0 = q * stride_w - pad_w
                divisor = override
                if divisor == 0:
                    divisor = count(h0, H, R, pad_h, count_pad) * count(w0, W, S, pad_w, count_pad)
                d = dx.dtype.type(divisor)
                source = dy[n, p, q]
                for w in range(max(0, w0), min(W, w0 + S)):
                    pixel = target[w]
                    for c in range(C):
                        pixel[c] += source[c] / d
