"""The passes over pending activations on numpy arrays, two layouts: planes (contiguous) and rows (channels_last).

    z = out(f(x * scale + shift) * gate + (right * right_scale + right_shift))

Arrays come flat and in one layout; vectors [C], gate [N * C]; what is not there is empty. Each kernel reads every array
once: a segment of about LENGTH elements goes through all the steps while it is in the cache, each step a loop that
vectorises, with a row of every per-channel value repeated to that length. A task is a strip of rows (of one image, if
there is a gate) or a block of channels of planes. Sums are taken in the dtype of x over RUN segments, then in fp64.
Tasks and the order of additions depend on the shape alone: any number of threads gives the same bits.
"""

import numba
import numpy as np

from fastcnn.kernels.cpu.elementary import exp_down

LENGTH = 1024  # elements of a segment, about
RUN = 16  # segments per sum in the dtype of x
STRIPS = 32  # tasks of the rows kernels at most, where there are fewer images

# the activations
NONE, RELU, RELU6, LEAKY_RELU, SIGMOID, SILU, HARDSWISH = range(7)

jit = numba.njit(parallel=True, cache=True, error_model="numpy")
inline = numba.njit(error_model="numpy")


# which elements a task works on


@inline
def plan(rows, N, C, size, by_image):
    """(elements of a segment, those of a channel in it, tasks, tasks of an image)."""
    if rows:
        images = N if by_image else 1
        length = C * max(1, LENGTH // C)
        segments = (size // images + length - 1) // length
        strips = max(1, min(STRIPS // images, segments // 8))
        return length, 1, images * strips, strips
    S = size // (N * C)
    together = max(1, LENGTH // S)
    each = min(S, LENGTH)
    return together * each, each, (C + together - 1) // together, 1


@inline
def share(rows, N, C, size, length, each, tasks, strips, task):
    """A task's (first channel, channels, first element, elements of a chunk, chunks, distance of chunks)."""
    if rows:
        part = size // (tasks // strips)
        segments = (part + length - 1) // length
        per_strip = (segments + strips - 1) // strips * length
        begin = min(task % strips * per_strip, part)
        return 0, C, task // strips * part + begin, min(per_strip, part - begin), 1, 0
    S = size // (N * C)
    together = length // each
    c = task * together
    channels = min(together, C - c)
    return c, channels, c * S, channels * S, N, C * S


@inline
def fill(values, rows, each, row):
    """Write a task's values per channel along a segment."""
    if rows:
        for start in range(0, row.size, values.size):
            row[start : start + values.size] = values
    else:
        for k in range(values.size):
            row[k * each : (k + 1) * each] = values[k]


@inline
def spread(vector, c, channels, rows, each, length):
    """A task's part of a vector along a segment; empty if there is none."""
    if vector.size == 0:
        return vector
    row = np.zeros(length, vector.dtype)
    fill(vector[c : c + channels], rows, each, row)
    return row


@inline
def fold(row, rows, each, totals):
    """Add the sums along a segment, which are lost, to their channels' totals."""
    C = totals.size
    if rows:
        for start in range(0, row.size, C):
            for c in range(C):
                totals[c] += row[start + c]
    else:
        for k in range(C):
            of_channel = row[k * each : (k + 1) * each]
            left = each
            while left > 1:  # halves on top of each other: a loop along the row would not vectorise
                half = (left + 1) // 2
                for j in range(left - half):
                    of_channel[j] += of_channel[half + j]
                left = half
            totals[k] += of_channel[0]


@inline
def flush(run, total):
    """Add a run to its fp64 total and start it again."""
    for j in range(run.size):
        total[j] += run[j]
        run[j] = 0


# one segment; rows of per-channel values may be longer


@inline
def copy(x, y):
    for j in range(y.size):
        y[j] = x[j]


@inline
def affine(x, scale, shift, y):
    if scale.size == 0:
        copy(x, y)
    else:
        for j in range(y.size):
            y[j] = x[j] * scale[j] + shift[j]


@inline
def multiply(y, factor):
    for j in range(y.size):
        y[j] *= factor[j]


@inline
def sigmoid(u, zero, one):
    e = exp_down(-abs(u))
    return (one if u >= zero else e) / (one + e)


@inline
def activate(u, kind, slope):
    """f(u), over u."""
    t = u.dtype.type
    zero, one, three, six = t(0), t(1), t(3), t(6)
    if kind == RELU:
        for j in range(u.size):
            u[j] = zero if u[j] <= zero else u[j]
    elif kind == RELU6:
        for j in range(u.size):
            v = zero if u[j] <= zero else u[j]
            u[j] = six if v >= six else v
    elif kind == LEAKY_RELU:
        for j in range(u.size):
            v = u[j] * slope
            u[j] = u[j] if u[j] > zero else v
    elif kind == SIGMOID:
        for j in range(u.size):
            u[j] = sigmoid(u[j], zero, one)
    elif kind == SILU:
        for j in range(u.size):
            u[j] = u[j] * sigmoid(u[j], zero, one)
    elif kind == HARDSWISH:
        for j in range(u.size):
            v = u[j] + three
            v = zero if v <= zero else v
            u[j] = u[j] * (six if v >= six else v) / six


@inline
def differentiate(d, u, kind, slope):
    """d *= f'(u), zero where f' is."""
    t = d.dtype.type
    zero, half, one, three, six = t(0), t(0.5), t(1), t(3), t(6)
    if kind == RELU:
        for j in range(d.size):
            g, v = d[j], u[j]
            d[j] = zero if v <= zero else g
    elif kind == RELU6:
        for j in range(d.size):
            g, v = d[j], u[j]
            g = g if v > zero else zero  # zero of NaN, as PyTorch
            d[j] = g if v < six else zero
    elif kind == LEAKY_RELU:
        for j in range(d.size):
            g, v = d[j], u[j]
            low = g * slope
            d[j] = g if v > zero else low
    elif kind == SIGMOID:
        for j in range(d.size):
            g, s = d[j], sigmoid(u[j], zero, one)
            d[j] = g * (one - s) * s
    elif kind == SILU:
        for j in range(d.size):
            g, v = d[j], u[j]
            s = sigmoid(v, zero, one)
            d[j] = g * s * (one + v * (one - s))
    elif kind == HARDSWISH:
        for j in range(d.size):
            g, v = d[j], u[j]
            inside = g * (v / three + half)
            inside = zero if v <= -three else inside
            d[j] = g if v >= three else inside


@inline
def gated_silu_gradient(d, u, gate, run):
    """Add d * f(u) to the run, then d *= gate * f'(u), with one sigmoid for both."""
    t = d.dtype.type
    zero, one = t(0), t(1)
    for j in range(d.size):
        g, v = d[j], u[j]
        s = sigmoid(v, zero, one)
        run[j] += g * (v * s)
        d[j] = g * gate[j] * s * (one + v * (one - s))


@inline
def add_right(y, right, right_scale, right_shift, relu):
    """y = out(y + right * right_scale + right_shift)."""
    zero = y.dtype.type(0)
    if right_scale.size > 0 and relu:
        for j in range(y.size):
            v = y[j] + (right[j] * right_scale[j] + right_shift[j])
            y[j] = zero if v <= zero else v
    elif right_scale.size > 0:
        for j in range(y.size):
            y[j] += right[j] * right_scale[j] + right_shift[j]
    elif relu:
        for j in range(y.size):
            v = y[j] + right[j]
            y[j] = zero if v <= zero else v
    else:
        for j in range(y.size):
            y[j] += right[j]


@inline
def load_gradient(grad, add, z, d):
    """d = grad + add where z is above zero, or not there; grad that is not there is one."""
    zero, one = d.dtype.type(0), d.dtype.type(1)
    if grad.size == 0:
        for j in range(d.size):
            d[j] = one
    elif z.size > 0 and add.size > 0:
        for j in range(d.size):
            v = grad[j] + add[j]
            d[j] = zero if z[j] <= zero else v
    elif z.size > 0:
        for j in range(d.size):
            v = grad[j]
            d[j] = zero if z[j] <= zero else v
    elif add.size > 0:
        for j in range(d.size):
            d[j] = grad[j] + add[j]
    else:
        copy(grad, d)


@inline
def relu_gradient(d, x, scale, shift, run1, run2):
    """d = 0 where x * scale + shift is not above zero; add d * x and d to the runs."""
    zero = d.dtype.type(0)
    for j in range(d.size):
        v = d[j]
        v = zero if x[j] * scale[j] + shift[j] <= zero else v
        d[j] = v
        run1[j] += v * x[j]
        run2[j] += v


@inline
def relu6_gradient(d, x, scale, shift, run1, run2):
    """The same where it is not between 0 and 6."""
    zero, six = d.dtype.type(0), d.dtype.type(6)
    for j in range(d.size):
        v, u = d[j], x[j] * scale[j] + shift[j]
        v = v if u > zero else zero
        v = v if u < six else zero
        d[j] = v
        run1[j] += v * x[j]
        run2[j] += v


@inline
def add_products(d, x, run1, run2):
    """Add d * x and d to the runs."""
    for j in range(d.size):
        run1[j] += d[j] * x[j]
        run2[j] += d[j]


@inline
def add_product(d, x, run):
    for j in range(d.size):
        run[j] += d[j] * x[j]


@inline
def store(d, scale, add, y):
    """y = d * scale + add."""
    if scale.size > 0 and add.size > 0:
        for j in range(y.size):
            y[j] = d[j] * scale[j] + add[j]
    elif scale.size > 0:
        for j in range(y.size):
            y[j] = d[j] * scale[j]
    elif add.size > 0:
        for j in range(y.size):
            y[j] = d[j] + add[j]
    else:
        copy(d, y)


@inline
def combine(grad, y, a, b, c, dy):
    """dy = grad * a + b * y + c."""
    for j in range(dy.size):
        dy[j] = grad[j] * a[j] + (b[j] * y[j] + c[j])


@inline
def gradient(
    grad, add, x, scales, shifts, kind, slope, gates, join, right, z, scaled, d, inner, runs, right_at, gate_at,
    grad_x, grad_right,
):  # fmt: skip
    """grad_x and grad_right of one segment, each unless empty; adds to the runs what `backward` sums.

    right_at, gate_at: the run of the right side's products, of the gate's; len(runs): there is none. gates are empty
    where there is no gate. d and inner, empty without gate and activation but relu: room for a segment.
    """
    none = d[:0]
    load_gradient(grad, add if join else none, z, d)
    if grad_right.size > 0:
        copy(d, grad_right)
    if right_at < len(runs):
        add_products(d, right, runs[right_at], runs[right_at + 1])
    if kind == RELU and gates.size == 0 and scales.size > 0:
        relu_gradient(d, x, scales, shifts, runs[0], runs[1])
    elif kind == RELU6 and gates.size == 0 and scales.size > 0:
        relu6_gradient(d, x, scales, shifts, runs[0], runs[1])
    else:
        if kind > NONE or gates.size > 0:
            u = inner if inner.size > 0 else x
            if inner.size > 0:
                affine(x, scales, shifts, u)
            if kind == SILU and gate_at < len(runs):
                gated_silu_gradient(d, u, gates, runs[gate_at])
            else:
                if gate_at < len(runs):
                    copy(u, grad_x)
                    activate(grad_x, kind, slope)
                    add_product(d, grad_x, runs[gate_at])
                if gates.size > 0:
                    multiply(d, gates)
                differentiate(d, u, kind, slope)
        if scales.size > 0:
            add_products(d, x, runs[0], runs[1])
    if grad_x.size > 0:
        store(d, scales if scaled else none, none if join else add, grad_x)


# the passes


@jit
def forward(x, scale, shift, kind, slope, gate, right, right_scale, right_shift, relu, rows, N, C, z):
    """z; relu: whether out is."""
    slope = x.dtype.type(slope)
    length, each, tasks, strips = plan(rows, N, C, x.size, gate.size > 0)
    for task in numba.prange(tasks):
        c, channels, first, chunk, chunks, stride = share(rows, N, C, x.size, length, each, tasks, strips, task)
        scales, shifts = spread(scale, c, channels, rows, each, length), spread(shift, c, channels, rows, each, length)
        right_scales = spread(right_scale, c, channels, rows, each, length)
        right_shifts = spread(right_shift, c, channels, rows, each, length)
        gates = np.zeros(length if gate.size > 0 else 0, x.dtype)
        for n in range(chunks):
            if gate.size > 0:
                image = task // strips if rows else n
                fill(gate[image * C + c : image * C + c + channels], rows, each, gates)
            for a in range(first + n * stride, first + n * stride + chunk, length):
                b = min(a + length, first + n * stride + chunk)
                y = z[a:b]
                affine(x[a:b], scales, shifts, y)
                activate(y, kind, slope)
                if gate.size > 0:
                    multiply(y, gates)
                if right.size > 0:
                    add_right(y, right[a:b], right_scales, right_shifts, relu)


@jit
def backward(
    grad, add, x, scale, shift, kind, slope, gate, join, right, has_right_scale, z, scaled, rows, N, C,
    grad_x, grad_right, sums, right_sums, grad_gate,
):  # fmt: skip
    """grad_x, which may be grad's memory; grad_right, the gradient of the sum; sums [2, C] of both, grad_gate [N * C].

    Each unless empty; the sums start at zero. grad that is empty is one everywhere: with a gate, a gradient [N, C].
    """
    slope = x.dtype.type(slope)
    size = max(grad.size, x.size)
    length, each, tasks, strips = plan(rows, N, C, size, gate.size > 0)
    right_at = 2 if scale.size > 0 else 0
    gate_at = right_at + (2 if has_right_scale else 0)
    count = gate_at + (1 if grad_gate.size > 0 else 0)
    partial = np.zeros((gate_at, tasks if rows else 0, C))
    partial_gate = np.zeros((tasks if rows and grad_gate.size > 0 else 0, C))
    for task in numba.prange(tasks):
        c, channels, first, chunk, chunks, stride = share(rows, N, C, size, length, each, tasks, strips, task)
        scales, shifts = spread(scale, c, channels, rows, each, length), spread(shift, c, channels, rows, each, length)
        gates = np.zeros(length if gate.size > 0 else 0, grad.dtype)
        buffer = np.empty(length, grad.dtype)
        inner = np.empty(length if kind > RELU or gate.size > 0 else 0, grad.dtype)
        # products and sums of the left side, of the right side, products with the gate's factor
        runs, totals = np.zeros((count, length), grad.dtype), np.zeros((count, length))
        full = 0
        for n in range(chunks):
            if gate.size > 0:
                image = task // strips if rows else n
                fill(gate[image * C + c : image * C + c + channels], rows, each, gates)
            for a in range(first + n * stride, first + n * stride + chunk, length):
                b = min(a + length, first + n * stride + chunk)
                gradient(
                    grad[a:b], add[a:b], x[a:b], scales, shifts, kind, slope, gates, join, right[a:b], z[a:b], scaled,
                    buffer[: b - a], inner[: b - a], runs, right_at if has_right_scale else count, gate_at,
                    grad_x[a:b], grad_right[a:b],
                )  # fmt: skip
                full += 1
                if full % RUN == 0:
                    for k in range(count):
                        flush(runs[k], totals[k])
            if grad_gate.size > 0:
                flush(runs[gate_at], totals[gate_at])
                if rows:
                    fold(totals[gate_at], rows, each, partial_gate[task])
                else:
                    fold(totals[gate_at], rows, each, grad_gate[n * C + c : n * C + c + channels])
                totals[gate_at] = 0
        for k in range(gate_at):
            flush(runs[k], totals[k])
            target = sums if k < right_at else right_sums
            fold(totals[k], rows, each, partial[k, task] if rows else target[k % 2, c : c + channels])
    if rows:
        for task in range(tasks):
            for k in range(gate_at):
                target = sums if k < right_at else right_sums
                for c in range(C):
                    target[k % 2, c] += partial[k, task, c]
            if grad_gate.size > 0:
                for c in range(C):
                    grad_gate[task // strips * C + c] += partial_gate[task, c]


@jit
def image_sums(x, scale, shift, kind, slope, rows, N, C, sums):
    """sums [N * C], which start at zero, of z over the pixels of every image."""
    slope = x.dtype.type(slope)
    length, each, tasks, strips = plan(rows, N, C, x.size, True)
    partial = np.zeros((tasks if rows else 0, C))
    for task in numba.prange(tasks):
        c, channels, first, chunk, chunks, stride = share(rows, N, C, x.size, length, each, tasks, strips, task)
        scales, shifts = spread(scale, c, channels, rows, each, length), spread(shift, c, channels, rows, each, length)
        buffer, run, total = np.empty(length, x.dtype), np.zeros(length, x.dtype), np.zeros(length)
        for n in range(chunks):
            full = 0
            for a in range(first + n * stride, first + n * stride + chunk, length):
                b = min(a + length, first + n * stride + chunk)
                z = buffer[: b - a]
                affine(x[a:b], scales, shifts, z)
                activate(z, kind, slope)
                for j in range(z.size):
                    run[j] += z[j]
                full += 1
                if full % RUN == 0:
                    flush(run, total)
            flush(run, total)
            fold(total, rows, each, partial[task] if rows else sums[n * C + c : n * C + c + channels])
            total[:] = 0
    if rows:
        for task in range(tasks):
            for c in range(C):
                sums[task // strips * C + c] += partial[task, c]


@jit
def correct(grad, y, a, b, c, rows, N, C, dy):
    """dy = grad * a + b * y + c."""
    length, each, tasks, strips = plan(rows, N, C, y.size, False)
    for task in numba.prange(tasks):
        k, channels, first, chunk, chunks, stride = share(rows, N, C, y.size, length, each, tasks, strips, task)
        of_grad = spread(a, k, channels, rows, each, length)
        of_y = spread(b, k, channels, rows, each, length)
        constant = spread(c, k, channels, rows, each, length)
        for n in range(chunks):
            for begin in range(first + n * stride, first + n * stride + chunk, length):
                end = min(begin + length, first + n * stride + chunk)
                combine(grad[begin:end], y[begin:end], of_grad, of_y, constant, dy[begin:end])
