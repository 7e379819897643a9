"""Depthwise convolution on CPU, fp32 and fp64: forward, and both gradients in one pass over memory.

A task is a range of channels, of images and of rows. The rows that the window touches go through a ring that the caches
hold: there a row is [columns][channels], whole vectors of them per pixel, with zeros where padding is. What is to
be done to an image on load is done once, on the way in. All layouts end there: the loops over taps know only rings, and
every tensor is read once. Results leave by a row of the same form. The inner loops keep vectors in registers, as sums
of GROUP pixels (convolve_row) or of TAPS taps (correlate_row), each in a fixed order.

Sums over pixels (gradients of weights and of vectors, statistics) are taken in the dtype of the tensors over about RUN
pixels, then in fp64, in parts whose number depends on the shape alone: any number of threads gives the same bits.

Channels count in the order of the convolution, where shuffle has taken place; `sources` are those of the input. Tuples
of ints say what to do: geometry (N, C, M, H, W, P, Q, R, S, then two each of stride, padding and dilation, shuffle),
plan (channels of a task, tasks along the images, tasks along the rows), and of an image its address, size and strides.
"""

import numba
import numpy as np

from fastcnn.kernels.cpu import pending
from fastcnn.kernels.cpu.chain import set_threads, there
from fastcnn.kernels.cpu.common import array_at
from fastcnn.kernels.cpu.tasks import as_float, integers, run
from fastcnn.kernels.cpu.vector import add, add_wide, fence, fma, lanes, load, prefetch, store, stream, subtract, zeros

GROUP = 7  # pixels or taps that are summed at a time: sizes of images are often multiples of it
TAPS = 9
RUN = 256

inline = numba.njit(error_model="numpy")
call = numba.njit(cache=True, error_model="numpy")
DOUBLE = np.empty(0)


@inline
def up(n, unit):
    """The least multiple of unit that is not below n."""
    return (n + unit - 1) // unit * unit


@inline
def aligned_zeros(size, like):
    """Zeros, at an address that no vector straddles cache lines from."""
    numbers = np.zeros(size + lanes(like), like.dtype)
    skip = (-numbers.ctypes.data % 64) // like.itemsize
    return numbers[skip : skip + size]


@inline
def source(c, C, shuffle):
    """Which channel of the input this channel of the convolution is."""
    return c % shuffle * (C // shuffle) + c // shuffle


@inline
def places_of(first, count, C, shuffle, step):
    """Where these channels lie in a pixel whose channels are step apart."""
    places = np.empty(count, np.int64)
    for c in range(count):
        places[c] = source(first + c, C, shuffle) * step
    return places


@inline
def ordered(vector, first, count, shuffle):
    """A part of a vector of the input's channels, in the order of the convolution's."""
    if vector.size == 0 or shuffle == 1:
        return vector[min(first, vector.size) : first + count]
    result = np.empty(count, vector.dtype)
    for c in range(count):
        result[c] = vector[source(first + c, vector.size, shuffle)]
    return result


@inline
def pack(weight, strides, K, R, S, bias, packed, biases):
    """weight as [blocks][R * S][lanes], bias as [blocks][lanes], with zeros at the end."""
    V = lanes(weight)
    taps = R * S
    packed[packed.size - taps * V :] = 0
    biases[:] = 0
    for k in range(K):
        at = k // V * taps * V + k % V
        for r in range(R):
            for s in range(S):
                packed[at + (r * S + s) * V] = weight[k * strides[0] + r * strides[1] + s * strides[2]]
    for k in range(bias.size):
        biases[k] = bias[k]


# the loops over taps


@inline
def convolve_row(
    x, offsets, places, taps, weights, start, weight_pitch, bias, bias_at, count, blocks, step, y, y_at, y_step, past,
    later, later_at, later_lines,
):  # fmt: skip
    """y[j] = bias + sum over taps of x[j * step + offset] * weight, for GROUPs of j; a weight lies at its place.

    Meanwhile so many cache lines of `later` are fetched with every vector of sums.
    """
    V = lanes(x)
    for j in range(0, count, GROUP):
        for b in range(blocks):
            for i in range(later_lines):
                prefetch(later, later_at + i * V)
            later_at += later_lines * V
            a0 = a1 = a2 = a3 = a4 = a5 = a6 = load(bias, bias_at + b * V)
            from_x = j * step + b * V
            from_weights = start + b * weight_pitch
            for k in range(taps):
                w = load(weights, from_weights + places[k])
                here = from_x + offsets[k]
                a0 = fma(load(x, here), w, a0)
                a1 = fma(load(x, here + step), w, a1)
                a2 = fma(load(x, here + 2 * step), w, a2)
                a3 = fma(load(x, here + 3 * step), w, a3)
                a4 = fma(load(x, here + 4 * step), w, a4)
                a5 = fma(load(x, here + 5 * step), w, a5)
                a6 = fma(load(x, here + 6 * step), w, a6)
            to = y_at + j * y_step + b * V
            if past:
                stream(y, to, a0)
                stream(y, to + y_step, a1)
                stream(y, to + 2 * y_step, a2)
                stream(y, to + 3 * y_step, a3)
                stream(y, to + 4 * y_step, a4)
                stream(y, to + 5 * y_step, a5)
                stream(y, to + 6 * y_step, a6)
            else:
                store(y, to, a0)
                store(y, to + y_step, a1)
                store(y, to + 2 * y_step, a2)
                store(y, to + 3 * y_step, a3)
                store(y, to + 4 * y_step, a4)
                store(y, to + 5 * y_step, a5)
                store(y, to + 6 * y_step, a6)


@inline
def correlate_row(x, offsets, at, taps, dy, dy_at, pitch, count, step, sums, sums_at, later, later_at, later_step):
    """sums[tap] += sum over j of dy[j] * x[j * step + offset]; taps are a multiple of TAPS.

    dy[j] lie pitch apart. Meanwhile what lies from later_at on, later_step apart, is fetched.
    """
    V = lanes(x)
    for k in range(0, taps, TAPS):
        o0, o1, o2 = at + offsets[k], at + offsets[k + 1], at + offsets[k + 2]
        o3, o4, o5 = at + offsets[k + 3], at + offsets[k + 4], at + offsets[k + 5]
        o6, o7, o8 = at + offsets[k + 6], at + offsets[k + 7], at + offsets[k + 8]
        to = sums_at + k * V
        a0, a1, a2 = load(sums, to), load(sums, to + V), load(sums, to + 2 * V)
        a3, a4, a5 = load(sums, to + 3 * V), load(sums, to + 4 * V), load(sums, to + 5 * V)
        a6, a7, a8 = load(sums, to + 6 * V), load(sums, to + 7 * V), load(sums, to + 8 * V)
        for j in range(count):
            d = load(dy, dy_at + j * pitch)
            here = j * step
            a0 = fma(d, load(x, o0 + here), a0)
            a1 = fma(d, load(x, o1 + here), a1)
            a2 = fma(d, load(x, o2 + here), a2)
            a3 = fma(d, load(x, o3 + here), a3)
            a4 = fma(d, load(x, o4 + here), a4)
            a5 = fma(d, load(x, o5 + here), a5)
            a6 = fma(d, load(x, o6 + here), a6)
            a7 = fma(d, load(x, o7 + here), a7)
            a8 = fma(d, load(x, o8 + here), a8)
            prefetch(later, later_at + j * later_step)
        store(sums, to, a0)
        store(sums, to + V, a1)
        store(sums, to + 2 * V, a2)
        store(sums, to + 3 * V, a3)
        store(sums, to + 4 * V, a4)
        store(sums, to + 5 * V, a5)
        store(sums, to + 6 * V, a6)
        store(sums, to + 7 * V, a7)
        store(sums, to + 8 * V, a8)


@inline
def sum_row(x, at, pitch, count, sums, sums_at):
    """sums += sum over j of x[j], which lie pitch apart."""
    total = load(sums, sums_at)
    for j in range(count):
        total = add(total, load(x, at + j * pitch))
    store(sums, sums_at, total)


@inline
def moments_row(x, at, pitch, count, pivot, pivot_at, sums, squares):
    """sums += sum over j of x[j] - pivot, squares of its square."""
    middle = load(pivot, pivot_at)
    total, square = load(sums, pivot_at), load(squares, pivot_at)
    for j in range(count):
        d = subtract(load(x, at + j * pitch), middle)
        total = add(total, d)
        square = fma(d, d, square)
    store(sums, pivot_at, total)
    store(squares, pivot_at, square)


@inline
def flush(sums, totals):
    """Add sums to their fp64 totals and start them again."""
    V = lanes(sums)
    zero = zeros(sums)
    for at in range(0, sums.size, V):
        add_wide(totals, at, load(sums, at))
        store(sums, at, zero)


# rows of an image, on their way in and out


@inline
def gather(x, at, places, step, count, row):
    """row [count][channels]: the pixels of a row whose channels lie at these places, `step` apart."""
    channels = places.size
    for c in range(channels):
        start = at + places[c]
        for j in range(count):
            row[j * channels + c] = x[start + j * step]


@inline
def scatter(row, pitch, places, step, count, x, at):
    """The way back, of pixels pitch apart."""
    for c in range(places.size):
        start = at + places[c]
        for j in range(count):
            x[start + j * step] = row[j * pitch + c]


@inline
def pitch_of(channels, V):
    """How far pixels of a ring lie apart: whole vectors, not where few sets of a cache would hold a column."""
    vectors = (channels + V - 1) // V
    return (vectors + (vectors % 8 == 0)) * V


@inline
def segment(channels, step, pitch):
    """Pixels that go through the steps together: those that are one piece of memory in the image and in the ring."""
    return max(1, pending.LENGTH // channels) if step == channels and pitch == channels else 1


@inline
def load_row(x, at, step, count, channels, M, scale, shift, kind, slope, buffer, ring, to, pitch):
    """A row of the input, whose pixels are step apart, into the ring, each channel M times; vectors per segment."""
    pixels = segment(channels, step, pitch)
    for j in range(0, count, pixels):
        size = min(pixels, count - j) * channels
        target = to + j * pitch
        z = ring[target : target + size] if M == 1 else buffer[:size]
        pending.affine(x[at + j * step : at + j * step + size], scale, shift, z)
        if scale.size > 0:
            pending.activate(z, kind, slope)
        if M > 1:
            for k in range(channels * M):
                ring[target + k] = z[k // M]


@inline
def load_gradient_row(
    g, y, at, step, count, channels, a, b, c, gate, gate_add, scale, shift, kind, slope, inner, ring, to, pitch
):  # fmt: skip
    """A row of the gradient of the output, whose pixels are step apart, into the ring; vectors per segment."""
    pixels = segment(channels, step, pitch)
    for j in range(0, count, pixels):
        size = min(pixels, count - j) * channels
        begin, target = at + j * step, to + j * pitch
        d = ring[target : target + size]
        given = g[begin : begin + size]
        if gate.size > 0:
            u = inner[:size]
            pending.affine(y[begin : begin + size], scale, shift, u)
            pending.affine(given, gate, gate_add, d)
            pending.differentiate(d, u, kind, slope)
            given = d
        if b.size > 0:
            pending.combine(given, y[begin : begin + size], a, b, c, d)
        elif a.size > 0:
            for i in range(size):
                d[i] = given[i] * a[i]
        elif gate.size == 0:
            pending.copy(given, d)


@inline
def spread(vector, first, channels, length):
    """A task's part of a vector along a segment."""
    return pending.spread(vector, first, channels, True, 1, length)


@inline
def put_pixels(row, at, pitch, count, channels, x, to, step, past):
    """Pixels pitch apart to where they lie step apart, past: past the caches."""
    V = lanes(x)
    whole = channels // V
    for j in range(count):
        here, start = at + j * pitch, to + j * step
        if past:
            for b in range(whole):
                stream(x, start + b * V, load(row, here + b * V))
        else:
            for b in range(whole):
                store(x, start + b * V, load(row, here + b * V))
        for c in range(whole * V, channels):
            x[start + c] = row[here + c]


@inline
def moments_of(moments, size, first, count):
    """A task's pivots, sums and sums of squares about them in a part's record: a count, then each of all channels."""
    a, b, c = 1 + first, 1 + size + first, 1 + 2 * size + first
    return moments[a : a + count], moments[b : b + count], moments[c : c + count]


@inline
def range_of(part, parts, count):
    """(first, end) of a part of so many."""
    return part * count // parts, (part + 1) * count // parts


# tasks


@inline
def forward_task(
    task, geometry, plan, x, xs, scale, shift, kind, slope, packed, biases, y, ys, past, record
):  # fmt: skip
    N, C, M, H, W, P, Q, R, S, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, shuffle = geometry
    chunk, groups, strips = plan
    chunks = (C + chunk - 1) // chunk
    part, c0 = task // chunks, task % chunks * chunk
    n0, n1 = range_of(part // strips, groups, N)
    p0, p1 = range_of(part % strips, strips, P)
    V, taps = lanes(x), R * S
    channels = min(chunk, C - c0)
    K, k0, ks = C * M, c0 * M, channels * M
    blocks = (ks + V - 1) // V

    reach = (R - 1) * dil_h + 1
    width = max(W + pad_w, (up(Q, GROUP) - 1) * stride_w + (S - 1) * dil_w + 1)
    pitch = pitch_of(ks, V)
    slot = width * pitch
    ring = aligned_zeros((reach + 1) * slot, x)  # the last is the rows outside the image
    out = aligned_zeros(up(Q, GROUP) * pitch, x)
    offsets, places = np.empty(taps, np.int64), np.arange(taps) * V

    direct = xs[1] == 1 and shuffle == 1
    step = xs[3] if direct else channels
    pixels = segment(channels, step, pitch)
    row = np.empty(0 if direct else W * channels, x.dtype)
    from_x = places_of(c0, 0 if direct else channels, C, shuffle, xs[1])
    to_y = places_of(k0, 0 if ys[1] == 1 else ks, K, 1, ys[1])
    buffer = np.empty(pixels * channels if M > 1 else 0, x.dtype)
    scales = spread(ordered(scale, c0, channels, shuffle), 0, channels, pixels * channels)
    shifts = spread(ordered(shift, c0, channels, shuffle), 0, channels, pixels * channels)

    measure = record.size > 0
    straight = ys[1] == 1 and not measure and ks % V == 0  # sums go from the registers to y
    sums_of_row = blocks * (up(Q, GROUP) // GROUP)
    lines_later = (stride_h * W * channels // V + sums_of_row - 1) // sums_of_row if direct and step == channels else 0
    moments = record[part * (1 + 3 * up(K, V)) :]
    pivots, sums, squares = moments_of(moments, up(K, V), k0, blocks * V if measure else 0)
    pivots[:], sums[:], squares[:] = 0, 0, 0
    pivot = aligned_zeros(blocks * V if measure else 0, x)
    total, square = aligned_zeros(pivot.size, x), aligned_zeros(pivot.size, x)
    since = 0
    for n in range(n0, n1):
        following = 0
        for p in range(p0, p1):
            top = p * stride_h - pad_h
            for h in range(max(following, top, 0), min(H, top + reach)):
                at = n * xs[0] + h * xs[2]
                if not direct:
                    gather(x, at, from_x, xs[3], W, row)
                load_row(
                    x if direct else row, at + c0 if direct else 0, step, W, channels, M, scales, shifts, kind, slope,
                    buffer, ring, h % reach * slot + pad_w * pitch, pitch,
                )  # fmt: skip
            following = max(following, min(H, top + reach))
            for r in range(R):
                h = top + r * dil_h
                at = (h % reach if h >= 0 and h < H else reach) * slot
                for s in range(S):
                    offsets[r * S + s] = at + s * dil_w * pitch
            at = n * ys[0] + p * ys[2]
            whole = Q // GROUP * GROUP if straight else 0
            if whole > 0:
                convolve_row(
                    ring, offsets, places, taps, packed, k0 * taps, taps * V, biases, k0, whole, blocks,
                    stride_w * pitch, y, at + k0, ys[3], past, x, n * xs[0] + following * xs[2] + c0, lines_later,
                )  # fmt: skip
            if whole == Q:
                continue
            for i in range(taps):
                offsets[i] += whole * stride_w * pitch
            convolve_row(
                ring, offsets, places, taps, packed, k0 * taps, taps * V, biases, k0, Q - whole, blocks,
                stride_w * pitch, out, 0, pitch, False, x, n * xs[0] + following * xs[2] + c0, lines_later,
            )  # fmt: skip
            if measure:
                if n == n0 and p == p0:
                    for b in range(blocks):
                        sum_row(out, b * V, pitch, Q, pivot, b * V)
                    for i in range(pivot.size):
                        pivot[i] /= Q
                for b in range(blocks):
                    moments_row(out, b * V, pitch, Q, pivot, b * V, total, square)
                since += Q
                if since >= RUN:
                    flush(total, sums)
                    flush(square, squares)
                    since = 0
            if ys[1] == 1:
                put_pixels(out, 0, pitch, Q - whole, ks, y, at + k0 + whole * ys[3], ys[3], past)
            else:
                scatter(out, pitch, to_y, ys[3], Q, y, at)
    if measure:
        flush(total, sums)
        flush(square, squares)
        for i in range(pivot.size):
            pivots[i] = pivot[i]
        moments[0] = (n1 - n0) * (p1 - p0) * Q
    fence()


def forward_tasks(task, numbers, like_at):
    """forward_task, as a C function."""
    like = numba.carray(like_at, 0)
    n = integers(numbers, 40)
    C, K, size = n[1], n[1] * n[2], up(n[1] * n[2], lanes(like))
    forward_task(
        task, n[:16], n[16:19], array_at(n[19], n[20], like), n[21:25], there(n[31], C, like), there(n[32], C, like),
        n[33], like.dtype.type(as_float(n[34])), array_at(n[35], size * n[7] * n[8], like), array_at(n[36], size, like),
        array_at(n[25], n[26], like), n[27:31], n[37] != 0,
        there(n[38], n[17] * n[18] * (1 + 3 * up(K, lanes(like))), DOUBLE),
    )  # fmt: skip


@call
def forward(like, threads, task, numbers, weight_at, bias_at, mean_at, var_at):
    """y, and with addresses for them the mean and the biased variance of y per channel.

    task: the address of forward_tasks. numbers: geometry, plan, x, y, then addresses and numbers: scale, shift, kind,
    slope, packed weight, bias, whether the stores go past the caches, record of statistics or 0.
    """
    set_threads(threads)
    C, M, R, S = numbers[1], numbers[2], numbers[7], numbers[8]
    K, parts = C * M, numbers[17] * numbers[18]
    size = up(K, lanes(like))
    pack(
        array_at(weight_at[0], weight_at[1], like), weight_at[2:], K, R, S, there(bias_at, K, like),
        array_at(numbers[35], size * R * S, like), array_at(numbers[36], size, like),
    )  # fmt: skip
    run(task, parts * ((C + numbers[16] - 1) // numbers[16]), np.array(numbers), like)
    if numbers[38] != 0:
        merge(
            array_at(numbers[38], parts * (1 + 3 * size), DOUBLE), parts, size, array_at(mean_at, K, like),
            array_at(var_at, K, like),
        )  # fmt: skip


@inline
def merge(record, parts, size, mean, var):
    """Mean and biased variance of the parts of a record (Chan, Golub and LeVeque 1979)."""
    for k in range(mean.size):
        count, middle, squares = 0.0, 0.0, 0.0
        for part in range(parts):
            moments = record[part * (1 + 3 * size) :]
            more = moments[0]
            if more > 0:
                off = moments[1 + size + k] / more
                difference = moments[1 + k] + off - middle
                squares += moments[1 + 2 * size + k] - moments[1 + size + k] * off
                squares += difference * difference * (count * more / (count + more))
                count += more
                middle += difference * more / count
        mean[k] = middle
        var[k] = 0.0 if squares < 0 else squares / count


@inline
def backward_task(
    task, geometry, plan, x, xs, scale, shift, kind, slope, scaled, packed, zero_bias,
    g, y, gs, a, b, c, gate, gate_add, gated_scale, gated_shift, gated_kind, gated_slope, more, dx, dxs, past,
    grad_weight, grad_bias, sums,
):  # fmt: skip
    N, C, M, H, W, P, Q, R, S, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, shuffle = geometry
    chunk, groups, strips = plan
    chunks = (C + chunk - 1) // chunk
    part, c0 = task // chunks, task % chunks * chunk
    n0, n1 = range_of(part // strips, groups, N)
    # a step reads a row of dy and writes stride_h rows of dx: those that have no row of dy further down
    p0, p1 = range_of(part % strips, strips, max(P, (H + pad_h + stride_h - 1) // stride_h))
    V, taps = lanes(x), R * S
    channels = min(chunk, C - c0)
    K, k0, ks = C * M, c0 * M, channels * M
    blocks = (ks + V - 1) // V
    needs_input, needs_weight, needs_bias = dx.size > 0, grad_weight.size > 0, grad_bias.size > 0

    # rows of z
    reach = (R - 1) * dil_h + 1
    width = max(W + pad_w, (Q - 1) * stride_w + (S - 1) * dil_w + 1)
    pitch = pitch_of(ks, V)
    slot = width * pitch
    ring = aligned_zeros((reach + 1) * slot if needs_weight else 0, x)
    padded = up(taps, TAPS)
    offsets, places = np.zeros(padded, np.int64), np.zeros(taps, np.int64)
    total = aligned_zeros(blocks * padded * V if needs_weight else 0, x)
    bias_total = aligned_zeros(blocks * V if needs_bias else 0, x)
    size = up(K, V)
    begin = (part * size + k0) * padded if needs_weight else 0
    weights = grad_weight[begin : begin + total.size]
    begin = part * size + k0 if needs_bias else 0
    biases = grad_bias[begin : begin + bias_total.size]
    weights[:], biases[:] = 0, 0
    since = 0
    # rows of dy
    behind = (R - 1) * dil_h // stride_h + 1
    left = max(0, ((S - 1) * dil_w - pad_w + stride_w - 1) // stride_w)
    across = up((W + stride_w - 1) // stride_w, GROUP)
    dy_width = left + max(Q, across + (stride_w - 1 + pad_w) // stride_w + 1)
    dy_slot = dy_width * pitch
    dy_ring = aligned_zeros(behind * dy_slot, x)
    # a row of dz
    out = aligned_zeros(across * stride_w * pitch if needs_input else 0, x)

    direct = xs[1] == 1 and shuffle == 1
    step = xs[3] if direct else channels
    pixels = segment(channels, step, pitch)
    length = pixels * channels
    row = np.empty(0 if direct else W * channels, x.dtype)
    from_x = places_of(c0, 0 if direct else channels, C, shuffle, xs[1])
    scales = spread(ordered(scale, c0, channels, shuffle), 0, channels, length)
    shifts = spread(ordered(shift, c0, channels, shuffle), 0, channels, length)
    buffer, inner = np.empty(length, x.dtype), np.empty(length, x.dtype)
    products, plus = np.zeros(length), np.zeros(length)
    product_run, plus_run = np.zeros(length, x.dtype), np.zeros(length, x.dtype)
    segments = 0
    # dx may lie in other strides than x: with the table
    dx_direct = direct and dxs[1] == 1
    dx_row = np.empty(0 if dx_direct else W * channels, x.dtype)
    more_row = np.empty(dx_row.size if more.size > 0 else 0, x.dtype)
    to_dx = places_of(c0, 0 if dx_direct else channels, C, shuffle, dxs[1])
    # sums go from the registers to dx
    straight = dx_direct and scale.size == 0 and more.size == 0 and M == 1 and channels % V == 0
    sums_of_row = blocks * stride_w * ((W + stride_w * GROUP - 1) // (stride_w * GROUP))
    lines_later = (W * channels // V + sums_of_row - 1) // sums_of_row if direct and step == channels else 0

    g_direct = gs[1] == 1
    g_step = gs[3] if g_direct else ks
    g_pixels = segment(ks, g_step, pitch)
    g_row = np.empty(0 if g_direct else Q * ks, x.dtype)
    y_row = np.empty(0 if g_direct or y.size == 0 else Q * ks, x.dtype)
    from_g = places_of(k0, 0 if g_direct else ks, K, 1, gs[1])
    g_length = g_pixels * ks
    of_g, of_y, constant = spread(a, k0, ks, g_length), spread(b, k0, ks, g_length), spread(c, k0, ks, g_length)
    gated_scales, gated_shifts = spread(gated_scale, k0, ks, g_length), spread(gated_shift, k0, ks, g_length)
    gates = np.empty(g_length if gate.size > 0 else 0, x.dtype)
    gate_adds = np.empty(gates.size, x.dtype)
    g_inner = np.empty(g_length, x.dtype)

    for n in range(n0, n1):
        if gate.size > 0:
            pending.fill(gate[n * K + k0 : n * K + k0 + ks], True, 1, gates)
            pending.fill(gate_add[n * K + k0 : n * K + k0 + ks], True, 1, gate_adds)
        following, p_following = 0, 0
        for p in range(p0, p1):
            top = p * stride_h - pad_h
            for q in range(max(p_following, p - behind + 1 if needs_input else p, 0), min(P, p + 1)):
                at = n * gs[0] + q * gs[2]
                if not g_direct:
                    gather(g, at, from_g, gs[3], Q, g_row)
                    if y.size > 0:
                        gather(y, at, from_g, gs[3], Q, y_row)
                load_gradient_row(
                    g if g_direct else g_row, y if g_direct else y_row, at + k0 if g_direct else 0, g_step, Q, ks,
                    of_g, of_y, constant, gates, gate_adds, gated_scales, gated_shifts, gated_kind, gated_slope,
                    g_inner, dy_ring, q % behind * dy_slot + left * pitch, pitch,
                )  # fmt: skip
            p_following = min(P, p + 1)
            if p < P and needs_bias:
                for block in range(blocks):
                    sum_row(dy_ring, p % behind * dy_slot + left * pitch + block * V, pitch, Q, bias_total, block * V)
            if p < P and needs_weight:
                for h in range(max(following, top, 0), min(H, top + reach)):
                    at = n * xs[0] + h * xs[2]
                    if not direct:
                        gather(x, at, from_x, xs[3], W, row)
                    load_row(
                        x if direct else row, at + c0 if direct else 0, step, W, channels, M, scales, shifts, kind,
                        slope, buffer, ring, h % reach * slot + pad_w * pitch, pitch,
                    )  # fmt: skip
                following = max(following, min(H, top + reach))
                for r in range(R):
                    h = top + r * dil_h
                    at = (h % reach if h >= 0 and h < H else reach) * slot
                    for s in range(S):
                        offsets[r * S + s] = at + s * dil_w * pitch
                for k in range(taps, padded):
                    offsets[k] = 0
                for block in range(blocks):
                    correlate_row(
                        ring, offsets, block * V, padded, dy_ring, p % behind * dy_slot + left * pitch + block * V,
                        pitch, Q, stride_w * pitch, total, block * padded * V,
                        g, n * gs[0] + (p + 1) * gs[2] + k0 + block * V if g_direct else 0, gs[3] if g_direct else 0,
                    )  # fmt: skip
            if p < P:
                since += Q
                if since >= RUN:
                    if needs_weight:
                        flush(total, weights)
                    if needs_bias:
                        flush(bias_total, biases)
                    since = 0
            if not needs_input:
                continue
            fetched = 0
            for h in range(max(top, 0), min(H, top + stride_h)):
                to = n * dxs[0] + h * dxs[2]
                for phase in range(min(stride_w, W)):
                    count = 0
                    for r in range(R):
                        above = h + pad_h - r * dil_h
                        q = above // stride_h
                        if above % stride_h != 0 or q < 0 or q >= P:
                            continue
                        for s in range(S):
                            aside = phase + pad_w - s * dil_w
                            if aside % stride_w == 0:
                                offsets[count] = q % behind * dy_slot + (left + aside // stride_w) * pitch
                                places[count] = (r * S + s) * V
                                count += 1
                    columns = (W - phase + stride_w - 1) // stride_w
                    whole = columns // GROUP * GROUP if straight else 0
                    if whole > 0:
                        convolve_row(
                            dy_ring, offsets, places, count, packed, k0 * taps, taps * V, zero_bias, k0, whole, blocks,
                            pitch, dx, to + c0 + phase * dxs[3], stride_w * dxs[3], past,
                            x, n * xs[0] + following * xs[2] + c0 + fetched, lines_later,
                        )  # fmt: skip
                        fetched += whole // GROUP * blocks * lines_later * V
                    if whole == columns:
                        continue
                    for i in range(count):
                        offsets[i] += whole * pitch
                    convolve_row(
                        dy_ring, offsets, places, count, packed, k0 * taps, taps * V, zero_bias, k0, columns - whole,
                        blocks, pitch, out, (phase + whole * stride_w) * pitch, stride_w * pitch, False,
                        x, n * xs[0] + following * xs[2] + c0 + fetched, lines_later,
                    )  # fmt: skip
                    fetched += (columns - whole + GROUP - 1) // GROUP * blocks * lines_later * V
                    if straight:
                        for j in range(whole, columns):
                            at = phase + j * stride_w
                            put_pixels(out, at * pitch, pitch, 1, ks, dx, to + c0 + at * dxs[3], dxs[3], past)
                if straight:
                    continue
                at = n * xs[0] + h * xs[2] + c0
                if not direct and scale.size > 0:
                    gather(x, at - c0, from_x, xs[3], W, row)
                if not dx_direct and more.size > 0:
                    gather(more, to, to_dx, dxs[3], W, more_row)
                for j in range(0, W, pixels):
                    number = min(pixels, W - j)
                    size = number * channels
                    d = out[j * pitch : j * pitch + size] if M == 1 else buffer[:size]
                    if M > 1:
                        for k in range(channels):
                            d[k] = 0
                            for i in range(k * M, k * M + M):
                                d[k] += out[j * pitch + i]
                    if scale.size > 0:
                        xj = x[at + j * step : at + j * step + size] if direct else row[j * step : j * step + size]
                        if kind == pending.RELU:
                            pending.relu_gradient(d, xj, scales, shifts, product_run, plus_run)
                        elif kind == pending.RELU6:
                            pending.relu6_gradient(d, xj, scales, shifts, product_run, plus_run)
                        else:
                            u = inner[:size]
                            pending.affine(xj, scales, shifts, u)
                            pending.differentiate(d, u, kind, slope)
                            pending.add_products(d, xj, product_run, plus_run)
                        segments += 1
                        if segments % pending.RUN == 0:
                            pending.flush(product_run, products)
                            pending.flush(plus_run, plus)
                        if scaled:
                            pending.multiply(d, scales)
                    if more.size > 0:
                        begin = to + c0 + j * dxs[3] if dx_direct else j * channels
                        source = more if dx_direct else more_row
                        for i in range(size):
                            d[i] += source[begin + i]
                    if dx_direct:
                        put_pixels(d, 0, channels, number, channels, dx, to + c0 + j * dxs[3], dxs[3], past)
                    else:
                        dx_row[j * channels : j * channels + size] = d
                if not dx_direct:
                    scatter(dx_row, channels, to_dx, dxs[3], W, dx, to)
    if needs_weight:
        flush(total, weights)
    if needs_bias:
        flush(bias_total, biases)
    if sums.size > 0:
        pending.flush(product_run, products)
        pending.flush(plus_run, plus)
        begin = part * 2 * C + c0
        sums[begin : begin + channels], sums[begin + C : begin + C + channels] = 0, 0
        pending.fold(products, True, 1, sums[begin : begin + channels])
        pending.fold(plus, True, 1, sums[begin + C : begin + C + channels])
    fence()


def backward_tasks(task, numbers, like_at):
    """backward_task, as a C function."""
    like = numba.carray(like_at, 0)
    n = integers(numbers, 59)
    N, C, K, parts, size = n[0], n[1], n[1] * n[2], n[17] * n[18], up(n[1] * n[2], lanes(like))
    taps, t = n[7] * n[8], like.dtype.type
    backward_task(
        task, n[:16], n[16:19], array_at(n[19], n[20], like), n[21:25], there(n[31], C, like), there(n[32], C, like),
        n[33], t(as_float(n[34])), n[39] != 0, array_at(n[35], size * taps, like), array_at(n[36], size, like),
        array_at(n[25], n[26], like), there(n[40], n[26], like), n[27:31],
        there(n[41], K, like), there(n[42], K, like), there(n[43], K, like),
        there(n[44], N * K, like), there(n[45], N * K, like), there(n[46], K, like), there(n[47], K, like),
        n[48], t(as_float(n[49])), there(n[50], n[52], like), there(n[51], n[52], like), n[53:57], n[37] != 0,
        there(n[38], parts * size * up(taps, TAPS), DOUBLE), there(n[57], parts * size, DOUBLE),
        there(n[58], parts * 2 * C, DOUBLE),
    )  # fmt: skip


@call
def backward(like, threads, task, numbers, weight_at, grad_weight_at, grad_bias_at, sums_at):
    """dx, grad_weight and grad_bias, each unless its address is 0; with sums_at those of du * x and of du [2, C].

    task: the address of backward_tasks. numbers: geometry, plan, x, grad_output, then addresses and numbers: scale,
    shift, kind, slope, packed weight, zeros, whether the stores go past the caches, parts of grad_weight, scaled, y,
    a, b, c, gate, its add, scale, shift, kind and slope, what is added to dx, dx, parts of grad_bias and of the sums.
    y has the strides of grad_output, what is added those of dx.
    """
    set_threads(threads)
    C, M, R, S = numbers[1], numbers[2], numbers[7], numbers[8]
    K, parts, padded = C * M, numbers[17] * numbers[18], up(R * S, TAPS)
    V = lanes(like)
    size = up(K, V)
    pack(
        array_at(weight_at[0], weight_at[1], like), weight_at[2:], K, R, S, there(0, K, like),
        array_at(numbers[35], size * R * S, like), array_at(numbers[36], size, like),
    )  # fmt: skip
    run(task, parts * ((C + numbers[16] - 1) // numbers[16]), np.array(numbers), like)
    if grad_weight_at[0] != 0:
        grad_weight, strides = array_at(grad_weight_at[0], grad_weight_at[1], like), grad_weight_at[2:]
        total = sum_parts(array_at(numbers[38], parts * size * padded, DOUBLE), parts)
        for k in range(K):
            for r in range(R):
                for s in range(S):
                    value = total[(k // V * padded + r * S + s) * V + k % V]
                    grad_weight[k * strides[0] + r * strides[1] + s * strides[2]] = value
    if grad_bias_at != 0:
        pending.copy(sum_parts(array_at(numbers[57], parts * size, DOUBLE), parts), array_at(grad_bias_at, K, like))
    if sums_at != 0:
        total, sums = sum_parts(array_at(numbers[58], parts * 2 * C, DOUBLE), parts), array_at(sums_at, 2 * C, like)
        for c in range(C):
            to = source(c, C, numbers[15])
            sums[to], sums[C + to] = total[c], total[C + c]


@inline
def sum_parts(record, parts):
    """The sum of the parts, in the first one's place."""
    size = record.size // parts
    for part in range(1, parts):
        for i in range(size):
            record[i] += record[part * size + i]
    return record[:size]
