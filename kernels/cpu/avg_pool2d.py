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


@numba.njit(inline="always")
def inner_2x2(target, upper, lower, C, divisor):
    # windows inside the image, side by side in memory; upper, lower: the image's rows from the first window on
    n = len(target)
    a, b, c, d = upper[:n], upper[C : C + n], lower[:n], lower[C : C + n]
    for i in range(n):
        target[i] = (((a[i] + b[i]) + c[i]) + d[i]) / divisor


@numba.njit(inline="always")
def inner_3x3(target, upper, middle, lower, C, divisor):
    n = len(target)
    a, b, c = upper[:n], upper[C : C + n], upper[2 * C : 2 * C + n]
    d, e, f = middle[:n], middle[C : C + n], middle[2 * C : 2 * C + n]
    g, h, j = lower[:n], lower[C : C + n], lower[2 * C : 2 * C + n]
    for i in range(n):
        total = (((((((a[i] + b[i]) + c[i]) + d[i]) + e[i]) + f[i]) + g[i]) + h[i]) + j[i]
        target[i] = total / divisor


@numba.njit(parallel=True, cache=True)
def avg_pool2d_forward_channels_last(x, y, R, S, stride_h, stride_w, pad_h, pad_w, count_pad, override):
    # x [N, H, W, C]; y [N, P, Q, C]; override is 0 for none
    N, H, W, C = x.shape
    P, Q = y.shape[1:3]
    inner_begin, inner_end = inner_columns(W, Q, S, stride_w, pad_w)
    full = x.dtype.type(override if override != 0 else R * S)
    # at stride 1 windows side by side in the image are so in the output: one loop for all of them
    together = inner_end - inner_begin if stride_w == 1 else 1
    # short loops cost more than they save
    square = R if R == S and (R == 2 or R == 3) and together * C >= 32 else 0
    for row in numba.prange(N * P):
        n, p = row // P, row % P
        h0 = p * stride_h - pad_h
        r0, r1 = max(0, -h0), min(R, H - h0)
        whole = square if r0 == 0 and r1 == R else 0
        q = 0
        while q < Q:
            w0 = q * stride_w - pad_w
            if whole != 0 and inner_begin <= q and q < inner_end:
                target = y[n, p, q : q + together].reshape(-1)
                first, second = x[n, h0, w0:].reshape(-1), x[n, h0 + 1, w0:].reshape(-1)
                if whole == 2:
                    inner_2x2(target, first, second, C, full)
                else:
                    inner_3x3(target, first, second, x[n, h0 + 2, w0:].reshape(-1), C, full)
                q += together
                continue
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
            q += 1


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


@numba.njit(inline="always")
def from_one(target, dy, divisor, ADD):
    for c in range(len(target)):
        new = dy[c] / divisor
        target[c] = target[c] + new if ADD else new


@numba.njit(inline="always")
def from_two(target, dy, divisor, ADD):
    a, b = dy[0], dy[1]
    for c in range(len(target)):
        new = (a[c] + b[c]) / divisor
        target[c] = target[c] + new if ADD else new


@numba.njit(inline="always")
def from_three(target, dy, divisor, ADD):
    a, b, d = dy[0], dy[1], dy[2]
    for c in range(len(target)):
        new = ((a[c] + b[c]) + d[c]) / divisor
        target[c] = target[c] + new if ADD else new


@numba.njit(parallel=True, cache=True)
def avg_pool2d_backward_channels_last(dy, dx, R, S, stride_h, stride_w, pad_h, pad_w, count_pad, override):
    # dy [N, P, Q, C]; dx [N, H, W, C]. Each pixel of dx gathers from the windows over it
    N, P, Q, C = dy.shape
    H, W = dx.shape[1:3]
    full = dx.dtype.type(override if override != 0 else R * S)
    for row in numba.prange(N * H):
        n, h = row // H, row % H
        p0 = max(0, (h + pad_h - R + stride_h) // stride_h)
        p1 = min(P, (h + pad_h) // stride_h + 1)
        # whether the windows over this row, and further down those over a pixel, all count R x S pixels
        whole_rows = p0 < p1 and count(p0 * stride_h - pad_h, H, R, pad_h, count_pad) == R
        whole_rows = whole_rows and count((p1 - 1) * stride_h - pad_h, H, R, pad_h, count_pad) == R
        for w in range(W):
            target = dx[n, h, w]
            q0 = max(0, (w + pad_w - S + stride_w) // stride_w)
            q1 = min(Q, (w + pad_w) // stride_w + 1)
            if p0 >= p1 or q0 >= q1:
                target[:] = 0
                continue
            whole = whole_rows and count(q0 * stride_w - pad_w, W, S, pad_w, count_pad) == S
            whole = whole and count((q1 - 1) * stride_w - pad_w, W, S, pad_w, count_pad) == S
            if (whole or override != 0) and q1 - q0 <= 3:
                for p in range(p0, p1):
                    source = dy[n, p, q0:q1]
                    if q1 - q0 == 1:
                        if p == p0:
                            from_one(target, source[0], full, False)
                        else:
                            from_one(target, source[0], full, True)
                    elif q1 - q0 == 2:
                        if p == p0:
                            from_two(target, source, full, False)
                        else:
                            from_two(target, source, full, True)
                    elif p == p0:
                        from_three(target, source, full, False)
                    else:
                        from_three(target, source, full, True)
                continue
            target[:] = 0
            for p in range(p0, p1):
                for q in range(q0, q1):
                    divisor = override
                    if divisor == 0:
                        rows = count(p * stride_h - pad_h, H, R, pad_h, count_pad)
                        divisor = rows * count(q * stride_w - pad_w, W, S, pad_w, count_pad)
                    from_one(target, dy[n, p, q], dx.dtype.type(divisor), True)
