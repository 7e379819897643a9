"""Batch norm on numpy arrays, two layouts: planes [N, C, S] (contiguous) and rows, C values per pixel (channels_last).

y = f(z), z = (x - mean) * invstd * weight + bias + residual, with f as two bounds: low where z <= low, high where
z >= high; NaN is a bound that nothing reaches. Arrays come flat; what is not there is empty.

Both layouts are worked in segments of about LENGTH consecutive elements, several pixels or planes in one, with a row of
each per-channel value repeated to that length: loops over few channels would not vectorise. Sums are taken in fp32 over
RUN segments, about a pivot near the mean, and added up in fp64. A thread of the planes kernels owns whole channels, so
the second pass over a channel finds it in the cache.

The order of every addition is written down, in loops that vectorise as they stand. With fastmath the compiler would
choose it, and chose otherwise in the process that compiled than in those that load the compiled code: results would
differ in the last bit.
"""

import numba
import numpy as np

from fastcnn.kernels.cpu.bit_mask import gate_by_mask, store_mask

LENGTH = 1024  # elements of a segment, about; a multiple of 8
FOUR = 4  # segments read side by side in a reduction
RUN = 64  # segments per fp32 sum; a multiple of FOUR
STRIPS = 16  # partial sums of the rows kernels; fixed, so that the number of threads does not change the result

jit = numba.njit(parallel=True, cache=True, error_model="numpy")
inline = numba.njit(error_model="numpy")


# one segment; the rows of per-channel values may be longer


@inline
def add_moments(x, first, stride, count, length, pivot, run1, run2):
    """Add x - pivot and its square to the runs, of `count` segments from `first` on."""
    four = count // FOUR * FOUR
    for k in range(0, four, FOUR):  # four at once: the runs are loaded and stored once
        a = first + k * stride
        x0, x1 = x[a : a + length], x[a + stride : a + stride + length]
        x2, x3 = x[a + 2 * stride : a + 2 * stride + length], x[a + 3 * stride : a + 3 * stride + length]
        for j in range(length):
            d0, d1, d2, d3 = x0[j] - pivot[j], x1[j] - pivot[j], x2[j] - pivot[j], x3[j] - pivot[j]
            run1[j] += (d0 + d1) + (d2 + d3)
            run2[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
    for k in range(four, count):
        a = first + k * stride
        x0 = x[a : a + length]
        for j in range(length):
            d = x0[j] - pivot[j]
            run1[j] += d
            run2[j] += d * d


@inline
def add_products(dz, dz_first, dz_stride, x, first, stride, count, length, mean, run1, run2):
    """Add dz and dz * (x - mean) to the runs, of `count` segments."""
    four = count // FOUR * FOUR
    for k in range(0, four, FOUR):
        a, b = first + k * stride, dz_first + k * dz_stride
        x0, x1 = x[a : a + length], x[a + stride : a + stride + length]
        x2, x3 = x[a + 2 * stride : a + 2 * stride + length], x[a + 3 * stride : a + 3 * stride + length]
        z0, z1 = dz[b : b + length], dz[b + dz_stride : b + dz_stride + length]
        z2, z3 = dz[b + 2 * dz_stride : b + 2 * dz_stride + length], dz[b + 3 * dz_stride : b + 3 * dz_stride + length]
        for j in range(length):
            m = mean[j]
            run1[j] += (z0[j] + z1[j]) + (z2[j] + z3[j])
            run2[j] += (z0[j] * (x0[j] - m) + z1[j] * (x1[j] - m)) + (z2[j] * (x2[j] - m) + z3[j] * (x3[j] - m))
    for k in range(four, count):
        a, b = first + k * stride, dz_first + k * dz_stride
        x0, z0 = x[a : a + length], dz[b : b + length]
        for j in range(length):
            run1[j] += z0[j]
            run2[j] += z0[j] * (x0[j] - mean[j])


@inline
def flush(run, total):
    """Add an fp32 run to its fp64 total and start it again."""
    for j in range(run.size):
        total[j] += run[j]
        run[j] = 0


@inline
def normalise(x, residual, y, mean, scale, shift, low, high):
    """y = f((x - mean) * scale + shift + residual)."""
    if low == low:
        if residual.size > 0:
            for j in range(x.size):
                z = (x[j] - mean[j]) * scale[j] + shift[j] + residual[j]
                z = low if z <= low else z
                y[j] = high if z >= high else z
        else:
            for j in range(x.size):
                z = (x[j] - mean[j]) * scale[j] + shift[j]
                z = low if z <= low else z
                y[j] = high if z >= high else z
    elif residual.size > 0:
        for j in range(x.size):
            y[j] = (x[j] - mean[j]) * scale[j] + shift[j] + residual[j]
    else:
        for j in range(x.size):
            y[j] = (x[j] - mean[j]) * scale[j] + shift[j]


@inline
def gate(dy, x, mask, dz, mean, scale, shift, low, high, period):
    """dz = dy * f'(z), z from the mask or computed again."""
    if mask.size > 0:
        gate_by_mask(dy, mask, dz, period)
    else:
        zero = x.dtype.type(0)
        for j in range(x.size):
            z = (x[j] - mean[j]) * scale[j] + shift[j]
            d = zero if z <= low else dy[j]
            dz[j] = zero if z >= high else d


@inline
def add_gated_products(
    dy, x, first, stride, count, length, mask, mask_first, mask_stride, buffer, mean, scale, shift, low, high, period,
    run1, run2,
):  # fmt: skip
    """Add dz and dz * (x - mean) to the runs, of up to FOUR segments from `first` on."""
    if low == low:
        for k in range(count):
            a, m = first + k * stride, mask_first + k * mask_stride
            dz = buffer[k * length : (k + 1) * length]
            gate(dy[a : a + length], x[a : a + length], mask[m:], dz, mean, scale, shift, low, high, period)
        add_products(buffer, 0, length, x, first, stride, count, length, mean, run1, run2)
    else:
        add_products(dy, first, stride, x, first, stride, count, length, mean, run1, run2)


@inline
def input_gradient(dz, x, dx, mean, scale, along_one, along_x, training):
    """dx = (dz - along_one - (x - mean) * along_x) * scale in training, else dz * scale."""
    if training:
        for j in range(dx.size):
            dx[j] = (dz[j] - along_one[j] - (x[j] - mean[j]) * along_x[j]) * scale[j]
    else:
        for j in range(dx.size):
            dx[j] = dz[j] * scale[j]


# per channel


@inline
def finalize(c, count, pivot, s1, s2, record, mean, invstd, running_mean, running_var, momentum, eps):
    """Statistics of channel c from the sums of x - pivot and its square; updates the running ones unless empty."""
    distance = s1 / count
    squares = s2 - s1 * distance
    if squares < 0.0:
        squares = 0.0
    m = pivot + distance
    mean[c] = m
    invstd[c] = 1.0 / np.sqrt(squares / count + eps)
    if running_mean.size > 0:
        running_mean[c] = (1.0 - momentum) * running_mean[c] + momentum * m
        running_var[c] = (1.0 - momentum) * running_var[c] + momentum * (squares / (count - 1.0))
    if record.size > 0:
        record[0, c] = count
        record[1, c] = pivot
        record[2, c] = distance
        record[3, c] = squares


@inline
def tiled(values, length, absent):
    """The values again and again; `absent` where there are none."""
    row = np.full(length, absent, values.dtype)
    if values.size > 0:
        for start in range(0, length, values.size):
            row[start : start + values.size] = values
    return row


@inline
def stretched(values, each, length, absent):
    """Each of the values `each` times; `absent` where there are none."""
    row = np.full(length, absent, values.dtype)
    for k in range(values.size):
        row[k * each : (k + 1) * each] = values[k]
    return row


@inline
def scale_of(weight, invstd):
    return invstd * weight if weight.size > 0 else invstd.copy()


@inline
def mean_of(x):
    """Mean of a few elements, 0 where it is not finite."""
    total = 0.0
    for j in range(x.size):
        total += x[j]
    mean = total / x.size
    return mean if np.isfinite(mean) else 0.0


@inline
def segment_of_rows(seg, length, C, size):
    """Where a segment of rows begins and ends, and where its mask does."""
    row = (C + 7) // 8
    begin, end = seg * length, min((seg + 1) * length, size)
    return begin, end, begin // C * row, end // C * row


@inline
def strip_bounds(strip, segments):
    """The segments of one strip."""
    per_strip = (segments + STRIPS - 1) // STRIPS
    begin = min(strip * per_strip, segments)
    return begin, min(begin + per_strip, segments)


@inline
def merged(s, C):
    """Sum per channel of the strips' sums s [STRIPS, length]."""
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
def rows_pivot(x, C):
    """Mean of each channel over the first pixels, 0 where it is not finite."""
    pivot = np.zeros(C, x.dtype)
    for c in range(C):
        pivot[c] = mean_of(x[c : C * min(x.size // C, 16) : C])
    return pivot


@jit
def rows_forward(
    x, residual, y, mask, weight, bias, mean, invstd, running_mean, running_var, record, reduce, momentum, eps,
    low, high,
):  # fmt: skip
    """With reduce: mean, invstd and the record of the batch, and the running statistics. Then y and its mask."""
    C = mean.size
    one, zero = x.dtype.type(1), x.dtype.type(0)
    low, high = x.dtype.type(low), x.dtype.type(high)
    length = C * max(1, LENGTH // C)
    segments = (x.size + length - 1) // length
    if reduce:
        pivot = rows_pivot(x, C)
        pivots = tiled(pivot, length, zero)
        s1 = np.zeros((STRIPS, length))
        s2 = np.zeros((STRIPS, length))
        for strip in numba.prange(STRIPS):
            begin, end = strip_bounds(strip, x.size // length)
            run1, run2 = np.zeros(length, x.dtype), np.zeros(length, x.dtype)
            for seg in range(begin, end, RUN):
                add_moments(x, seg * length, length, min(RUN, end - seg), length, pivots, run1, run2)
                flush(run1, s1[strip])
                flush(run2, s2[strip])
        rest = x.size % length  # of the last segment, if short
        run1, run2 = np.zeros(length, x.dtype), np.zeros(length, x.dtype)
        add_moments(x, x.size - rest, length, 1, rest, pivots, run1, run2)
        flush(run1, s1[0])
        flush(run2, s2[0])
        sum1, sum2 = merged(s1, C), merged(s2, C)
        for c in range(C):
            finalize(
                c, x.size // C, pivot[c], sum1[c], sum2[c],
                record, mean, invstd, running_mean, running_var, momentum, eps,
            )  # fmt: skip
    if y.size > 0:
        means = tiled(mean, length, zero)
        scale = tiled(scale_of(weight, invstd), length, one)
        shift = tiled(bias, length, zero)
        for strip in numba.prange(STRIPS):
            begin, end = strip_bounds(strip, segments)
            for seg in range(begin, end):
                a, b, mask_a, mask_b = segment_of_rows(seg, length, C, x.size)
                normalise(x[a:b], residual[a:b], y[a:b], means, scale, shift, low, high)
                if mask.size > 0:
                    store_mask(y[a:b], low, high, mask[mask_a:mask_b], C)


@jit
def rows_backward(
    dy, x, dx, dresidual, mask, weight, bias, mean, invstd, sums, reduce, training, count, low, high
):  # fmt: skip
    """With reduce: the sums [2, C] of dz and of dz * xhat. Then dx and dresidual = dz, each unless empty."""
    C = mean.size
    one, zero = x.dtype.type(1), x.dtype.type(0)
    low, high = x.dtype.type(low), x.dtype.type(high)
    length = C * max(1, LENGTH // C)
    segments = (x.size + length - 1) // length
    means = tiled(mean, length, zero)
    scale = tiled(scale_of(weight, invstd), length, one)
    shift = tiled(bias, length, zero)
    if reduce:
        s1 = np.zeros((STRIPS, length))
        s2 = np.zeros((STRIPS, length))
        of_mask = length // C * ((C + 7) // 8)
        for strip in numba.prange(STRIPS):
            begin, end = strip_bounds(strip, x.size // length)
            run1, run2 = np.zeros(length, x.dtype), np.zeros(length, x.dtype)
            buffer = np.empty(FOUR * length, x.dtype)
            for seg in range(begin, end, FOUR):
                add_gated_products(
                    dy, x, seg * length, length, min(FOUR, end - seg), length, mask, seg * of_mask, of_mask, buffer,
                    means, scale, shift, low, high, C, run1, run2,
                )  # fmt: skip
                if (seg - begin + FOUR) % RUN == 0:
                    flush(run1, s1[strip])
                    flush(run2, s2[strip])
            flush(run1, s1[strip])
            flush(run2, s2[strip])
        rest = x.size % length
        run1, run2 = np.zeros(length, x.dtype), np.zeros(length, x.dtype)
        add_gated_products(
            dy, x, x.size - rest, length, 1, rest, mask, x.size // length * of_mask, of_mask, np.empty(rest, x.dtype),
            means, scale, shift, low, high, C, run1, run2,
        )  # fmt: skip
        flush(run1, s1[0])
        flush(run2, s2[0])
        sums[0] = merged(s1, C)
        sums[1] = merged(s2, C) * invstd
    if dx.size > 0 or dresidual.size > 0:
        along_one = tiled((sums[0] / count).astype(x.dtype), length, zero)
        along_x = tiled((sums[1] * invstd / count).astype(x.dtype), length, zero)
        for strip in numba.prange(STRIPS):
            begin, end = strip_bounds(strip, segments)
            buffer = np.empty(length, x.dtype)
            for seg in range(begin, end):
                a, b, mask_a, mask_b = segment_of_rows(seg, length, C, x.size)
                dz = dy[a:b]
                if low == low:
                    dz = dresidual[a:b] if dresidual.size > 0 else buffer[: b - a]
                    gate(dy[a:b], x[a:b], mask[mask_a:mask_b], dz, means, scale, shift, low, high, C)
                input_gradient(dz, x[a:b], dx[a:b], means, scale, along_one, along_x, training)


@jit
def planes_forward(
    x, residual, y, mask, weight, bias, mean, invstd, running_mean, running_var, N, record, reduce, momentum, eps,
    low, high,
):  # fmt: skip
    """With reduce: mean, invstd and the record of the batch, and the running statistics. Then y and its mask."""
    C = mean.size
    S = x.size // (N * C)
    one, zero = x.dtype.type(1), x.dtype.type(0)
    low, high = x.dtype.type(low), x.dtype.type(high)
    together = max(1, LENGTH // S)  # channels of a segment
    mask_row = (S + 7) // 8
    for block in numba.prange((C + together - 1) // together):
        c = block * together
        channels = min(together, C - c)
        span = channels * S
        length = min(span, LENGTH) if channels == 1 else span
        each = min(S, length)
        if reduce:
            pivot = np.empty(channels, x.dtype)
            for k in range(channels):
                pivot[k] = mean_of(x[(c + k) * S : (c + k) * S + min(S, LENGTH)])
            pivots = stretched(pivot, each, length, zero)
            run1, run2 = np.zeros(length, x.dtype), np.zeros(length, x.dtype)
            s1, s2 = np.zeros(length), np.zeros(length)
            full = 0
            for n in range(0, N, FOUR):
                base = (n * C + c) * S
                for start in range(0, span, length):
                    size = min(length, span - start)
                    add_moments(x, base + start, C * S, min(FOUR, N - n), size, pivots, run1, run2)
                    full += FOUR
                    if full % RUN == 0:
                        flush(run1, s1)
                        flush(run2, s2)
            flush(run1, s1)
            flush(run2, s2)
            for k in range(channels):
                finalize(
                    c + k, N * S, pivot[k], s1[k * each : (k + 1) * each].sum(), s2[k * each : (k + 1) * each].sum(),
                    record, mean, invstd, running_mean, running_var, momentum, eps,
                )  # fmt: skip
        if y.size > 0:
            means = stretched(mean[c : c + channels], each, length, zero)
            scale = stretched(scale_of(weight[c : c + channels], invstd[c : c + channels]), each, length, one)
            shift = stretched(bias[c : c + channels], each, length, zero)
            for n in range(N - 1, -1, -1):  # backwards: the end is in the cache
                base = (n * C + c) * S
                for start in range(0, span, length):
                    a, b = base + start, base + min(start + length, span)
                    normalise(x[a:b], residual[a:b], y[a:b], means, scale, shift, low, high)
                    if mask.size > 0:
                        mask_a = (n * C + c) * mask_row + start // 8
                        store_mask(y[a:b], low, high, mask[mask_a:], min(S, b - a))


@jit
def planes_backward(
    dy, x, dx, dresidual, mask, weight, bias, mean, invstd, N, sums, reduce, training, count, low, high
):  # fmt: skip
    """With reduce: the sums [2, C] of dz and of dz * xhat. Then dx and dresidual = dz, each unless empty."""
    C = mean.size
    S = x.size // (N * C)
    one, zero = x.dtype.type(1), x.dtype.type(0)
    low, high = x.dtype.type(low), x.dtype.type(high)
    together = max(1, LENGTH // S)
    mask_row = (S + 7) // 8
    for block in numba.prange((C + together - 1) // together):
        c = block * together
        channels = min(together, C - c)
        span = channels * S
        length = min(span, LENGTH) if channels == 1 else span
        each = min(S, length)
        means = stretched(mean[c : c + channels], each, length, zero)
        scale = stretched(scale_of(weight[c : c + channels], invstd[c : c + channels]), each, length, one)
        shift = stretched(bias[c : c + channels], each, length, zero)
        buffer = np.empty(FOUR * length, x.dtype)
        if reduce:
            run1, run2 = np.zeros(length, x.dtype), np.zeros(length, x.dtype)
            s1, s2 = np.zeros(length), np.zeros(length)
            full = 0
            for n in range(0, N, FOUR):
                base = (n * C + c) * S
                for start in range(0, span, length):
                    size = min(length, span - start)
                    add_gated_products(
                        dy, x, base + start, C * S, min(FOUR, N - n), size, mask, (n * C + c) * mask_row + start // 8,
                        C * mask_row, buffer, means, scale, shift, low, high, min(S, size), run1, run2,
                    )  # fmt: skip
                    full += FOUR
                    if full % RUN == 0:
                        flush(run1, s1)
                        flush(run2, s2)
            flush(run1, s1)
            flush(run2, s2)
            for k in range(channels):
                sums[0, c + k] = s1[k * each : (k + 1) * each].sum()
                sums[1, c + k] = s2[k * each : (k + 1) * each].sum() * invstd[c + k]
        if dx.size > 0 or dresidual.size > 0:
            along = sums[:, c : c + channels] / count
            along_one = stretched(along[0].astype(x.dtype), each, length, zero)
            along_x = stretched((along[1] * invstd[c : c + channels]).astype(x.dtype), each, length, zero)
            for n in range(N - 1, -1, -1):
                base = (n * C + c) * S
                for start in range(0, span, length):
                    a, b = base + start, base + min(start + length, span)
                    dz = dy[a:b]
                    if low == low:
                        dz = dresidual[a:b] if dresidual.size > 0 else buffer[: b - a]
                        mask_a = (n * C + c) * mask_row + start // 8
                        gate(dy[a:b], x[a:b], mask[mask_a:], dz, means, scale, shift, low, high, min(S, b - a))
                    input_gradient(dz, x[a:b], dx[a:b], means, scale, along_one, along_x, training)
