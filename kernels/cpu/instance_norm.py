"""Instance norm on numpy arrays, two layouts: planes x[N, C, S] (contiguous) and rows x[N, S, C] (channels_last).

Sums are taken in the dtype of x over short runs, about a pivot near the mean, in lanes that vectorise as they stand,
and added up in fp64. A task of the planes kernels owns whole planes; one of the rows kernels a strip of the pixels of
an image, with every channel. Strips and the order of additions depend on the shape alone: any number of threads gives
the same bits. mean and rstd are [N, C]; weight, bias and whatever is not wanted may be empty.
"""

import numba
import numpy as np

LANES = 64  # sums side by side in a plane
RUN = 64  # times LANES elements of a plane, and quadruples of pixels, per run
STRIP = 65536  # elements of a strip: what a core's cache holds

jit = numba.njit(parallel=True, cache=True, error_model="numpy")
inline = numba.njit(error_model="numpy")


@inline
def finite(value):
    return value if np.isfinite(value) else 0.0


@inline
def sum_lanes(lanes):
    total = 0.0
    for j in range(LANES):
        total += lanes[j]
    return total


@inline
def plane_pivot(plane):
    """Mean of the first elements, 0 where it is not finite."""
    count = min(plane.size, 64)
    total = 0.0
    for s in range(count):
        total += plane[s]
    return plane.dtype.type(finite(total / count))


@inline
def statistics(pivot, s1, s2, count, eps):
    """Mean and 1 / sqrt(var + eps) from the sums of x - pivot and of its square."""
    squares = s2 - s1 * s1 / count
    if squares < 0.0:
        squares = 0.0
    return pivot + s1 / count, 1.0 / np.sqrt(squares / count + eps)


@jit
def planes_forward(x, y, weight, bias, mean, rstd, eps):
    """y, mean and rstd."""
    N, C, S = x.shape
    for task in numba.prange(N * C):
        n = task // C
        c = task - n * C
        pivot = plane_pivot(x[n, c])
        run1, run2 = np.empty(LANES, x.dtype), np.empty(LANES, x.dtype)
        s1 = s2 = 0.0
        for start in range(0, S, LANES * RUN):
            run1[:] = 0
            run2[:] = 0
            end = min(start + LANES * RUN, S)
            whole = start + (end - start) // LANES * LANES
            for at in range(start, whole, LANES):
                for j in range(LANES):
                    d = x[n, c, at + j] - pivot
                    run1[j] += d
                    run2[j] += d * d
            for j in range(end - whole):
                d = x[n, c, whole + j] - pivot
                run1[j] += d
                run2[j] += d * d
            s1 += sum_lanes(run1)
            s2 += sum_lanes(run2)
        mean[n, c], rstd[n, c] = statistics(pivot, s1, s2, S, eps)
        centre = mean[n, c]
        scale = rstd[n, c] * weight[c] if weight.size > 0 else rstd[n, c]
        shift = bias[c] if bias.size > 0 else x.dtype.type(0)
        for s in range(S):
            y[n, c, s] = (x[n, c, s] - centre) * scale + shift


@inline
def sum_images(s1, s2, rstd, dweight, dbias):
    """dweight and dbias from the sums [N, C] of dy and of dy * (x - mean)."""
    for c in range(dweight.size):
        total1 = total2 = 0.0
        for n in range(s1.shape[0]):
            total1 += s1[n, c]
            total2 += s2[n, c] * rstd[n, c]
        dbias[c] = total1
        dweight[c] = total2


@jit
def planes_backward(dy, x, dx, weight, mean, rstd, dweight, dbias):
    """dx, dweight and dbias, each unless empty."""
    N, C, S = x.shape
    sums1, sums2 = np.empty((N, C)), np.empty((N, C))
    for task in numba.prange(N * C):
        n = task // C
        c = task - n * C
        centre, r = mean[n, c], rstd[n, c]
        run1, run2 = np.empty(LANES, x.dtype), np.empty(LANES, x.dtype)
        s1 = s2 = 0.0
        for start in range(0, S, LANES * RUN):
            run1[:] = 0
            run2[:] = 0
            end = min(start + LANES * RUN, S)
            whole = start + (end - start) // LANES * LANES
            for at in range(start, whole, LANES):
                for j in range(LANES):
                    run1[j] += dy[n, c, at + j]
                    run2[j] += dy[n, c, at + j] * (x[n, c, at + j] - centre)
            for j in range(end - whole):
                run1[j] += dy[n, c, whole + j]
                run2[j] += dy[n, c, whole + j] * (x[n, c, whole + j] - centre)
            s1 += sum_lanes(run1)
            s2 += sum_lanes(run2)
        sums1[n, c] = s1
        sums2[n, c] = s2
        if dx.size > 0:
            along_one = x.dtype.type(s1 / S)
            along_x = x.dtype.type(s2 / S * r * r)
            scale = r * weight[c] if weight.size > 0 else r
            for s in range(S):
                dx[n, c, s] = (dy[n, c, s] - along_one - (x[n, c, s] - centre) * along_x) * scale
    sum_images(sums1, sums2, rstd, dweight, dbias)


@inline
def strip_length(S, C):
    """Pixels of a strip."""
    return min(S, max(16, STRIP // C))


@inline
def add_moments(x, n, begin, end, pivot, s1, s2):
    """Add the sums of x - pivot and of its square over pixels of image n to s1 and s2, in fp64."""
    C = x.shape[2]
    run1, run2 = np.empty(C, x.dtype), np.empty(C, x.dtype)
    for start in range(begin, end, 4 * RUN):
        run1[:] = 0
        run2[:] = 0
        stop = min(start + 4 * RUN, end)
        whole = start + (stop - start) // 4 * 4
        for s in range(start, whole, 4):  # four pixels for each load and store of the sums
            for c in range(C):
                a = x[n, s, c] - pivot[c]
                b = x[n, s + 1, c] - pivot[c]
                d = x[n, s + 2, c] - pivot[c]
                e = x[n, s + 3, c] - pivot[c]
                run1[c] += (a + b) + (d + e)
                run2[c] += (a * a + b * b) + (d * d + e * e)
        for s in range(whole, stop):
            for c in range(C):
                a = x[n, s, c] - pivot[c]
                run1[c] += a
                run2[c] += a * a
        for c in range(C):
            s1[c] += run1[c]
            s2[c] += run2[c]


@inline
def add_products(dy, x, n, begin, end, centre, s1, s2):
    """Add the sums of dy and of dy * (x - centre) over pixels of image n to s1 and s2, in fp64."""
    C = x.shape[2]
    run1, run2 = np.empty(C, x.dtype), np.empty(C, x.dtype)
    for start in range(begin, end, 4 * RUN):
        run1[:] = 0
        run2[:] = 0
        stop = min(start + 4 * RUN, end)
        whole = start + (stop - start) // 4 * 4
        for s in range(start, whole, 4):
            for c in range(C):
                a, b, d, e = dy[n, s, c], dy[n, s + 1, c], dy[n, s + 2, c], dy[n, s + 3, c]
                run1[c] += (a + b) + (d + e)
                run2[c] += (a * (x[n, s, c] - centre[c]) + b * (x[n, s + 1, c] - centre[c])) + (
                    d * (x[n, s + 2, c] - centre[c]) + e * (x[n, s + 3, c] - centre[c])
                )
        for s in range(whole, stop):
            for c in range(C):
                run1[c] += dy[n, s, c]
                run2[c] += dy[n, s, c] * (x[n, s, c] - centre[c])
        for c in range(C):
            s1[c] += run1[c]
            s2[c] += run2[c]


@inline
def row_pivot(x, n):
    """Mean of each channel over the first pixels of image n, 0 where it is not finite."""
    pivot = np.zeros(x.shape[2], x.dtype)
    pixels = min(x.shape[1], 16)
    for s in range(pixels):
        for c in range(x.shape[2]):
            pivot[c] += x[n, s, c]
    for c in range(x.shape[2]):
        pivot[c] = finite(pivot[c] / x.dtype.type(pixels))
    return pivot


@inline
def merged(partial, n, strips):
    """Sum of the strips of image n of partial [N * strips, C]."""
    total = np.zeros(partial.shape[1])
    for strip in range(strips):
        for c in range(total.size):
            total[c] += partial[n * strips + strip, c]
    return total


@jit
def rows_forward(x, y, weight, bias, mean, rstd, eps):
    """y, mean and rstd."""
    N, S, C = x.shape
    length = strip_length(S, C)
    strips = (S + length - 1) // length
    partial1, partial2 = np.zeros((N * strips, C)), np.zeros((N * strips, C))
    for task in numba.prange(N * strips):
        n = task // strips
        begin = (task - n * strips) * length
        add_moments(x, n, begin, min(begin + length, S), row_pivot(x, n), partial1[task], partial2[task])
    for n in range(N):
        pivot = row_pivot(x, n)
        s1, s2 = merged(partial1, n, strips), merged(partial2, n, strips)
        for c in range(C):
            mean[n, c], rstd[n, c] = statistics(pivot[c], s1[c], s2[c], S, eps)
    for task in numba.prange(N * strips):
        n = task // strips
        begin = (task - n * strips) * length
        scale, shift = rstd[n].copy(), np.zeros(C, x.dtype)
        if weight.size > 0:
            scale *= weight
        if bias.size > 0:
            shift += bias
        for s in range(begin, min(begin + length, S)):
            for c in range(C):
                y[n, s, c] = (x[n, s, c] - mean[n, c]) * scale[c] + shift[c]


@jit
def rows_backward(dy, x, dx, weight, mean, rstd, dweight, dbias):
    """dx, dweight and dbias, each unless empty."""
    N, S, C = x.shape
    length = strip_length(S, C)
    strips = (S + length - 1) // length
    partial1, partial2 = np.zeros((N * strips, C)), np.zeros((N * strips, C))
    for task in numba.prange(N * strips):
        n = task // strips
        begin = (task - n * strips) * length
        add_products(dy, x, n, begin, min(begin + length, S), mean[n], partial1[task], partial2[task])
    sums1, sums2 = np.empty((N, C)), np.empty((N, C))
    for n in range(N):
        sums1[n] = merged(partial1, n, strips)
        sums2[n] = merged(partial2, n, strips)
    sum_images(sums1, sums2, rstd, dweight, dbias)
    if dx.size > 0:
        for task in numba.prange(N * strips):
            n = task // strips
            begin = (task - n * strips) * length
            along_one, along_x, scale = np.empty(C, x.dtype), np.empty(C, x.dtype), rstd[n].copy()
            for c in range(C):
                along_one[c] = sums1[n, c] / S
                along_x[c] = sums2[n, c] / S * rstd[n, c] * rstd[n, c]
            if weight.size > 0:
                scale *= weight
            for s in range(begin, min(begin + length, S)):
                for c in range(C):
                    dx[n, s, c] = (dy[n, s, c] - along_one[c] - (x[n, s, c] - mean[n, c]) * along_x[c]) * scale[c]
