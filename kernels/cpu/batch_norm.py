"""Batch norm on numpy arrays, two layouts: planes x[N, C, S] (contiguous) and rows, x flat with C values per pixel.

Sums are taken in fp32 over short runs, about a pivot near the mean, and added up in fp64. A thread of the planes
kernels owns whole channels, so the second pass over a channel finds it in the cache. The rows kernels fold several
pixels into one long row of at least FOLD values: loops over few channels would not vectorise.

The order of every addition is written down, in lanes that vectorise as they stand. With fastmath the compiler would
choose it, and chose otherwise in the process that compiled than in those that load the compiled code: results would
differ in the last bit.
"""

import numba
import numpy as np

FOLD = 256  # values of a folded row at least
LANES = 64  # sums side by side in a plane
RUN = 64  # folded rows per fp32 run
STRIPS = 16  # partial sums of the rows kernels; fixed, so that the number of threads does not change the result

jit = numba.njit(parallel=True, cache=True, error_model="numpy")
inline = numba.njit(error_model="numpy")


@inline
def finalize(c, count, pivot, s1, s2, mean, invstd, running_mean, running_var, momentum, eps):
    """Statistics of channel c from the sums of x - pivot and its square; updates the running ones unless empty."""
    m = pivot + s1 / count
    squares = s2 - s1 * s1 / count
    if squares < 0.0:
        squares = 0.0
    mean[c] = m
    invstd[c] = 1.0 / np.sqrt(squares / count + eps)
    if running_mean.size > 0:
        running_mean[c] = (1.0 - momentum) * running_mean[c] + momentum * m
        running_var[c] = (1.0 - momentum) * running_var[c] + momentum * (squares / (count - 1.0))


@inline
def sum_lanes(lanes):
    total = 0.0
    for j in range(LANES):
        total += lanes[j]
    return total


@inline
def plane_pivot(plane):
    """Mean of a plane, 0 where it is not finite."""
    run = np.zeros(LANES, plane.dtype)
    whole = plane.size // LANES * LANES
    for start in range(0, whole, LANES):
        for j in range(LANES):
            run[j] += plane[start + j]
    for j in range(plane.size - whole):
        run[j] += plane[whole + j]
    pivot = plane.dtype.type(sum_lanes(run) / plane.size)
    return pivot if np.isfinite(pivot) else plane.dtype.type(0)


@inline
def add_plane_moments(x, n, c, pivot, run1, run2, s1, s2):
    """Add the sums of x[n, c] - pivot and of its square to the lanes s1 and s2, in fp64."""
    whole = x.shape[2] // LANES * LANES
    run1[:] = 0
    run2[:] = 0
    for start in range(0, whole, LANES):
        for j in range(LANES):
            d = x[n, c, start + j] - pivot
            run1[j] += d
            run2[j] += d * d
    for j in range(x.shape[2] - whole):
        d = x[n, c, whole + j] - pivot
        run1[j] += d
        run2[j] += d * d
    for j in range(LANES):
        s1[j] += run1[j]
        s2[j] += run2[j]


@inline
def add_plane_products(dy, x, n, c, mean, run1, run2, s1, s2):
    """Add the sums of dy and of dy * (x - mean) over plane [n, c] to the lanes s1 and s2, in fp64."""
    whole = x.shape[2] // LANES * LANES
    run1[:] = 0
    run2[:] = 0
    for start in range(0, whole, LANES):
        for j in range(LANES):
            run1[j] += dy[n, c, start + j]
            run2[j] += dy[n, c, start + j] * (x[n, c, start + j] - mean)
    for j in range(x.shape[2] - whole):
        run1[j] += dy[n, c, whole + j]
        run2[j] += dy[n, c, whole + j] * (x[n, c, whole + j] - mean)
    for j in range(LANES):
        s1[j] += run1[j]
        s2[j] += run2[j]


@jit
def planes_forward(x, y, weight, bias, mean, invstd, running_mean, running_var, momentum, eps):
    """y, mean, invstd of the batch and the running statistics; weight, bias and running statistics may be empty."""
    N, C, S = x.shape
    for c in numba.prange(C):
        zero = x.dtype.type(0)
        pivot = plane_pivot(x[0, c])
        run1, run2 = np.empty(LANES, x.dtype), np.empty(LANES, x.dtype)
        lanes1, lanes2 = np.zeros(LANES), np.zeros(LANES)
        for n in range(N):
            add_plane_moments(x, n, c, pivot, run1, run2, lanes1, lanes2)
        s1, s2 = sum_lanes(lanes1), sum_lanes(lanes2)
        finalize(c, N * S, pivot, s1, s2, mean, invstd, running_mean, running_var, momentum, eps)
        m = mean[c]
        scale = invstd[c] * weight[c] if weight.size > 0 else invstd[c]
        shift = bias[c] if bias.size > 0 else zero
        for n in range(N):
            for s in range(S):
                y[n, c, s] = (x[n, c, s] - m) * scale + shift


@jit
def planes_apply(x, y, weight, bias, mean, invstd):
    """y = (x - mean) * invstd * weight + bias; weight and bias may be empty."""
    N, C, S = x.shape
    for c in numba.prange(C):
        m = mean[c]
        scale = invstd[c] * weight[c] if weight.size > 0 else invstd[c]
        shift = bias[c] if bias.size > 0 else x.dtype.type(0)
        for n in range(N):
            for s in range(S):
                y[n, c, s] = (x[n, c, s] - m) * scale + shift


@jit
def planes_backward(dy, x, dx, weight, mean, invstd, dweight, dbias, training):
    """dx, dweight and dbias, each unless empty."""
    N, C, S = x.shape
    for c in numba.prange(C):
        zero = x.dtype.type(0)
        m = mean[c]
        scale = invstd[c] * weight[c] if weight.size > 0 else invstd[c]
        along_one = zero
        along_x = zero
        if training or dweight.size > 0:
            run1, run2 = np.empty(LANES, x.dtype), np.empty(LANES, x.dtype)
            lanes1, lanes2 = np.zeros(LANES), np.zeros(LANES)
            for n in range(N):
                add_plane_products(dy, x, n, c, m, run1, run2, lanes1, lanes2)
            s1, s2 = sum_lanes(lanes1), sum_lanes(lanes2)
            if dweight.size > 0:
                dweight[c] = s2 * invstd[c]
                dbias[c] = s1
            if training:
                along_one = x.dtype.type(s1 / (N * S))
                along_x = x.dtype.type(s2 * invstd[c] * invstd[c] / (N * S))
        if dx.size > 0:
            if training:
                for n in range(N):
                    for s in range(S):
                        dx[n, c, s] = (dy[n, c, s] - along_one - (x[n, c, s] - m) * along_x) * scale
            else:
                for n in range(N):
                    for s in range(S):
                        dx[n, c, s] = dy[n, c, s] * scale


@inline
def strip_bounds(strip, rows):
    """The folded rows of one strip."""
    per_strip = (rows + STRIPS - 1) // STRIPS
    begin = min(strip * per_strip, rows)
    return begin, min(begin + per_strip, rows)


@inline
def folded(x, C):
    """Flat x as folded rows [rows, C * fold], and the pixels left over, as one row."""
    L = C * ((FOLD + C - 1) // C)
    rows = x.size // L
    return x[: rows * L].reshape(rows, L), x[rows * L :].reshape(1, -1)


@inline
def rows_pivot(x, C):
    """Mean of each channel over the first pixels, 0 where it is not finite."""
    pivot = np.zeros(C, x.dtype)
    pixels = min(x.size // C, 16)
    for p in range(pixels):
        for c in range(C):
            pivot[c] += x[p * C + c]
    for c in range(C):
        pivot[c] /= x.dtype.type(pixels)
        if not np.isfinite(pivot[c]):
            pivot[c] = x.dtype.type(0)
    return pivot


@inline
def repeated(per_channel, L):
    """A value per channel, repeated for the pixels of a folded row."""
    row = np.empty(L, per_channel.dtype)
    for j in range(L):
        row[j] = per_channel[j % per_channel.size]
    return row


@inline
def add_moments(x, pivot, s1, s2):
    """Add the sums of x - pivot and of its square over the rows of x [rows, L] to s1 and s2, in fp64."""
    L = x.shape[1]
    run1 = np.empty(L, x.dtype)
    run2 = np.empty(L, x.dtype)
    for start in range(0, x.shape[0], RUN):
        run1[:] = x.dtype.type(0)
        run2[:] = x.dtype.type(0)
        for row in range(start, min(start + RUN, x.shape[0])):
            for j in range(L):
                d = x[row, j] - pivot[j]
                run1[j] += d
                run2[j] += d * d
        for j in range(L):
            s1[j] += run1[j]
            s2[j] += run2[j]


@inline
def add_products(dy, x, mean, s1, s2):
    """Add the sums of dy and of dy * (x - mean) over the rows to s1 and s2, in fp64."""
    L = x.shape[1]
    run1 = np.empty(L, x.dtype)
    run2 = np.empty(L, x.dtype)
    for start in range(0, x.shape[0], RUN):
        run1[:] = x.dtype.type(0)
        run2[:] = x.dtype.type(0)
        for row in range(start, min(start + RUN, x.shape[0])):
            for j in range(L):
                run1[j] += dy[row, j]
                run2[j] += dy[row, j] * (x[row, j] - mean[j])
        for j in range(L):
            s1[j] += run1[j]
            s2[j] += run2[j]


@inline
def merged(s, C):
    """Sum per channel of the strips' sums s [STRIPS, L]."""
    row = np.zeros(s.shape[1])
    for strip in range(STRIPS):
        for j in range(s.shape[1]):
            row[j] += s[strip, j]
    total = np.zeros(C)
    for start in range(0, s.shape[1], C):
        for c in range(C):
            total[c] += row[start + c]
    return total


@inline
def normalise(x, y, mean, scale, shift):
    """y = (x - mean) * scale + shift for rows."""
    for row in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[row, j] = (x[row, j] - mean[j]) * scale[j] + shift[j]


@inline
def input_gradient(dy, x, dx, mean, scale, along_one, along_x, training):
    """dx for rows."""
    for row in range(x.shape[0]):
        if training:
            for j in range(x.shape[1]):
                dx[row, j] = (dy[row, j] - along_one[j] - (x[row, j] - mean[j]) * along_x[j]) * scale[j]
        else:
            for j in range(x.shape[1]):
                dx[row, j] = dy[row, j] * scale[j]


@jit
def rows_forward(x, y, weight, bias, mean, invstd, running_mean, running_var, momentum, eps):
    """y, mean, invstd of the batch and the running statistics; weight, bias and running statistics may be empty."""
    C = mean.size
    body, rest = folded(x, C)
    rows, L = body.shape
    pivot = rows_pivot(x, C)
    pivots = repeated(pivot, L)
    s1 = np.zeros((STRIPS, L))
    s2 = np.zeros((STRIPS, L))
    for strip in numba.prange(STRIPS):
        begin, end = strip_bounds(strip, rows)
        add_moments(body[begin:end], pivots, s1[strip], s2[strip])
    add_moments(rest, pivots, s1[0], s2[0])
    sum1 = merged(s1, C)
    sum2 = merged(s2, C)
    for c in range(C):
        finalize(c, x.size // C, pivot[c], sum1[c], sum2[c], mean, invstd, running_mean, running_var, momentum, eps)
    rows_apply(x, y, weight, bias, mean, invstd)


@jit
def rows_apply(x, y, weight, bias, mean, invstd):
    """y = (x - mean) * invstd * weight + bias; weight and bias may be empty."""
    C = mean.size
    body, rest = folded(x, C)
    body_y, rest_y = folded(y, C)
    rows, L = body.shape
    means = repeated(mean, L)
    scale = repeated(invstd * weight if weight.size > 0 else invstd, L)
    shift = repeated(bias, L) if bias.size > 0 else np.zeros(L, x.dtype)
    for strip in numba.prange(STRIPS):
        begin, end = strip_bounds(strip, rows)
        normalise(body[begin:end], body_y[begin:end], means, scale, shift)
    normalise(rest, rest_y, means, scale, shift)


@jit
def rows_backward(dy, x, dx, weight, mean, invstd, dweight, dbias, training):
    """dx, dweight and dbias, each unless empty."""
    C = mean.size
    body, rest = folded(x, C)
    body_dy, rest_dy = folded(dy, C)
    rows, L = body.shape
    means = repeated(mean, L)
    along_one = np.zeros(C, x.dtype)
    along_x = np.zeros(C, x.dtype)
    if training or dweight.size > 0:
        s1 = np.zeros((STRIPS, L))
        s2 = np.zeros((STRIPS, L))
        for strip in numba.prange(STRIPS):
            begin, end = strip_bounds(strip, rows)
            add_products(body_dy[begin:end], body[begin:end], means, s1[strip], s2[strip])
        add_products(rest_dy, rest, means, s1[0], s2[0])
        sum1 = merged(s1, C)
        sum2 = merged(s2, C)
        for c in range(C):
            if dweight.size > 0:
                dweight[c] = sum2[c] * invstd[c]
                dbias[c] = sum1[c]
            if training:
                along_one[c] = sum1[c] * C / x.size
                along_x[c] = sum2[c] * invstd[c] * invstd[c] * C / x.size
    if dx.size > 0:
        body_dx, rest_dx = folded(dx, C)
        scale = repeated(invstd * weight if weight.size > 0 else invstd, L)
        ones = repeated(along_one, L)
        xs = repeated(along_x, L)
        for strip in numba.prange(STRIPS):
            begin, end = strip_bounds(strip, rows)
            input_gradient(body_dy[begin:end], body[begin:end], body_dx[begin:end], means, scale, ones, xs, training)
        input_gradient(rest_dy, rest, rest_dx, means, scale, ones, xs, training)
