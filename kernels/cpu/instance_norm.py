"""Instance norm on numpy arrays, two layouts: planes x[N, C, S] (contiguous), and x[N, S * C] (channels_last) in rows.

Sums are taken in the dtype of x over short runs, about a pivot near the mean, in lanes that vectorise as they stand,
and added up in fp64. A task of the planes kernels owns whole planes; one of the rows kernels a strip of the pixels of
an image, with every channel; a row is several pixels where channels are few, to fill vectors. Strips and the order of
additions depend on the shape alone: any number of threads gives the same bits. mean and rstd are [N, C]; weight, bias
and whatever is not wanted may be empty.
"""

import numba
import numpy as np

LANES = 64  # sums side by side in a plane
RUN = 64  # times LANES elements of a plane, and quadruples of rows, per run
FOLD = 64  # elements of a row at least
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
def row_length(C):
    """Elements of a row: as many whole pixels as fill vectors."""
    return C * ((FOLD + C - 1) // C)


@inline
def strip_length(rows, L):
    """Rows of a strip."""
    return min(rows, max(16, STRIP // L))


@inline
def repeated(per_channel, L, dtype):
    """A value per channel, repeated for the pixels of a row."""
    row = np.empty(L, dtype)
    for j in range(L):
        row[j] = per_channel[j % per_channel.size]
    return row


@inline
def add_moments(x, n, begin, end, pivot, s1, s2):
    """Add the sums of x - pivot and of its square over rows of image n to s1 and s2, in fp64."""
    L = pivot.size
    size = x.shape[1]
    run1, run2 = np.empty(L, x.dtype), np.empty(L, x.dtype)
    for start in range(begin, end, 4 * RUN):
        run1[:] = 0
        run2[:] = 0
        stop = min(start + 4 * RUN, end)
        whole = start + (min(stop, size // L) - start) // 4 * 4
        for row in range(start, whole, 4):  # four rows for each load and store of the sums
            i = row * L
            for j in range(L):
                a = x[n, i + j] - pivot[j]
                b = x[n, i + L + j] - pivot[j]
                c = x[n, i + 2 * L + j] - pivot[j]
                d = x[n, i + 3 * L + j] - pivot[j]
                run1[j] += (a + b) + (c + d)
                run2[j] += (a * a + b * b) + (c * c + d * d)
        for row in range(whole, stop):
            for j in range(min(L, size - row * L)):
                a = x[n, row * L + j] - pivot[j]
                run1[j] += a
                run2[j] += a * a
        for j in range(L):
            s1[j] += run1[j]
            s2[j] += run2[j]


@inline
def add_products(dy, x, n, begin, end, centre, s1, s2):
    """Add the sums of dy and of dy * (x - centre) over rows of image n to s1 and s2, in fp64."""
    L = centre.size
    size = x.shape[1]
    run1, run2 = np.empty(L, x.dtype), np.empty(L, x.dtype)
    for start in range(begin, end, 4 * RUN):
        run1[:] = 0
        run2[:] = 0
        stop = min(start + 4 * RUN, end)
        whole = start + (min(stop, size // L) - start) // 4 * 4
        for row in range(start, whole, 4):
            i = row * L
            for j in range(L):
                a, b, c, d = dy[n, i + j], dy[n, i + L + j], dy[n, i + 2 * L + j], dy[n, i + 3 * L + j]
                run1[j] += (a + b) + (c + d)
                run2[j] += (a * (x[n, i + j] - centre[j]) + b * (x[n, i + L + j] - centre[j])) + (
                    c * (x[n, i + 2 * L + j] - centre[j]) + d * (x[n, i + 3 * L + j] - centre[j])
                )
        for row in range(whole, stop):
            for j in range(min(L, size - row * L)):
                run1[j] += dy[n, row * L + j]
                run2[j] += dy[n, row * L + j] * (x[n, row * L + j] - centre[j])
        for j in range(L):
            s1[j] += run1[j]
            s2[j] += run2[j]


@inline
def pixel_pivot(x, n, C):
    """Mean of each channel over the first pixels of image n, 0 where it is not finite."""
    pivot = np.zeros(C, x.dtype)
    pixels = min(x.shape[1] // C, 16)
    for s in range(pixels):
        for c in range(C):
            pivot[c] += x[n, s * C + c]
    for c in range(C):
        pivot[c] = finite(pivot[c] / x.dtype.type(pixels))
    return pivot


@inline
def merged(partial, n, strips, C):
    """Sum per channel of the strips of image n of partial [N * strips, L]."""
    total = np.zeros(C)
    for strip in range(strips):
        for j in range(partial.shape[1]):
            total[j % C] += partial[n * strips + strip, j]
    return total


@jit
def rows_forward(x, y, weight, bias, mean, rstd, eps):
    """y, mean and rstd."""
    N, size = x.shape
    C = mean.shape[1]
    L = row_length(C)
    rows = (size + L - 1) // L
    length = strip_length(rows, L)
    strips = (rows + length - 1) // length
    partial1, partial2 = np.zeros((N * strips, L)), np.zeros((N * strips, L))
    for task in numba.prange(N * strips):
        n = task // strips
        begin = (task - n * strips) * length
        pivot = repeated(pixel_pivot(x, n, C), L, x.dtype)
        add_moments(x, n, begin, min(begin + length, rows), pivot, partial1[task], partial2[task])
    for n in range(N):
        pivot = pixel_pivot(x, n, C)
        s1, s2 = merged(partial1, n, strips, C), merged(partial2, n, strips, C)
        for c in range(C):
            mean[n, c], rstd[n, c] = statistics(pivot[c], s1[c], s2[c], size // C, eps)
    for task in numba.prange(N * strips):
        n = task // strips
        begin = (task - n * strips) * length
        centre = repeated(mean[n], L, x.dtype)
        scale = repeated(rstd[n] * weight if weight.size > 0 else rstd[n], L, x.dtype)
        shift = repeated(bias, L, x.dtype) if bias.size > 0 else np.zeros(L, x.dtype)
        for row in range(begin, min(begin + length, rows)):
            for j in range(min(L, size - row * L)):
                y[n, row * L + j] = (x[n, row * L + j] - centre[j]) * scale[j] + shift[j]


@jit
def rows_backward(dy, x, dx, weight, mean, rstd, dweight, dbias):
    """dx, dweight and dbias, each unless empty."""
    N, size = x.shape
    C = mean.shape[1]
    L = row_length(C)
    rows = (size + L - 1) // L
    length = strip_length(rows, L)
    strips = (rows + length - 1) // length
    partial1, partial2 = np.zeros((N * strips, L)), np.zeros((N * strips, L))
    for task in numba.prange(N * strips):
        n = task // strips
        begin = (task - n * strips) * length
        centre = repeated(mean[n], L, x.dtype)
        add_products(dy, x, n, begin, min(begin + length, rows), centre, partial1[task], partial2[task])
    sums1, sums2 = np.empty((N, C)), np.empty((N, C))
    for n in range(N):
        sums1[n] = merged(partial1, n, strips, C)
        sums2[n] = merged(partial2, n, strips, C)
    sum_images(sums1, sums2, rstd, dweight, dbias)
    if dx.size > 0:
        for task in numba.prange(N * strips):
            n = task // strips
            begin = (task - n * strips) * length
            centre = repeated(mean[n], L, x.dtype)
            scale = repeated(rstd[n] * weight if weight.size > 0 else rstd[n], L, x.dtype)
            along_one = repeated(sums1[n] * C / size, L, x.dtype)
            along_x = repeated(sums2[n] * rstd[n] * rstd[n] * C / size, L, x.dtype)
            for row in range(begin, min(begin + length, rows)):
                for j in range(min(L, size - row * L)):
                    i = row * L + j
                    dx[n, i] = (dy[n, i] - along_one[j] - (x[n, i] - centre[j]) * along_x[j]) * scale[j]
