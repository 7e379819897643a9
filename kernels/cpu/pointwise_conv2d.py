"""1x1 convolution of an expression (pending.py) on rows of channels, in pieces that stay in a core's cache.

    z = out(f(x * scale + shift) * gate + (right * right_scale + right_shift))      y [M, K] = z [M, C] @ weight.T

A thread makes a piece of z, multiplies it, and finishes the result (statistics of y; activation's gradient and the sums
of batch norm) before the piece leaves the cache: memory sees every tensor once. Matrix multiplication is that of a BLAS
library, one thread each. Rows are pixels, arrays flat, vectors [C], gate [N * C]; what is not there is empty. A task is
a strip of pieces; both depend on the shape alone, and so does the order of additions.
"""

import numba
import numpy as np

from fastcnn.kernels.cpu import batch_norm, pending
from fastcnn.kernels.cpu.batch_norm import RUN, add_moments
from fastcnn.kernels.cpu.blas import gemm, set_threads
from fastcnn.kernels.cpu.chain import call, there
from fastcnn.kernels.cpu.chain import set_threads as set_pool
from fastcnn.kernels.cpu.pending import inline, jit, spread

BLOCK = 4096  # elements of a weight's gradient that are added up at once


@inline
def strip(M, tasks, task):
    """The rows of a task."""
    each = (M + tasks - 1) // tasks
    begin = min(task * each, M)
    return begin, min(begin + each, M)


@inline
def segment(at, stop, length, per_image, gate, gates, C):
    """Where the segment from here ends; with a gate within the image whose values are then in gates."""
    end = min(at + length, stop)
    if gate.size > 0:
        image = at // per_image
        end = min(end, (image + 1) * per_image)
        pending.fill(gate[image * C : (image + 1) * C], True, 1, gates)
    return end


@inline
def transform(
    x, scales, shifts, kind, slope, gate, gates, right, right_scales, right_shifts, relu, C, length, per_image, begin,
    stop, z,
):  # fmt: skip
    """z of x[begin:stop]."""
    at = begin
    while at < stop:
        end = segment(at, stop, length, per_image, gate, gates, C)
        y = z[at - begin : end - begin]
        pending.affine(x[at:end], scales, shifts, y)
        pending.activate(y, kind, slope)
        if gate.size > 0:
            pending.multiply(y, gates)
        if right.size > 0:
            pending.add_right(y, right[at:end], right_scales, right_shifts, relu)
        at = end


@inline
def measure(y, K, length, pivots, run1, run2, total1, total2):
    """Add the moments of a piece about the pivots."""
    segments = y.size // length
    for segment in range(0, segments, RUN):
        add_moments(y, segment * length, length, min(RUN, segments - segment), length, pivots, run1, run2)
        pending.flush(run1, total1)
        pending.flush(run2, total2)
    rest = y.size % length
    add_moments(y, y.size - rest, length, 1, rest, pivots, run1, run2)
    pending.flush(run1, total1)
    pending.flush(run2, total2)


@inline
def add_rows(y, row):
    """y += row, again and again."""
    for begin in range(0, y.size, row.size):
        part = y[begin : begin + row.size]
        for j in range(part.size):
            part[j] += row[j]


@inline
def correct(grad, y, a, b, c, dy):
    """dy = grad * a + b * y + c, or grad * a."""
    for begin in range(0, dy.size, a.size):
        end = min(begin + a.size, dy.size)
        if y.size > 0:
            pending.combine(grad[begin:end], y[begin:end], a, b, c, dy[begin:end])
        else:
            pending.copy(grad[begin:end], dy[begin:end])
            pending.multiply(dy[begin:end], a)


@jit
def forward_pieces(
    multiply, limit, x, scale, shift, kind, slope, gate, right, right_scale, right_shift, relu, weight, bias, N, C, K,
    tasks, piece, z, y, records,
):  # fmt: skip
    """y, and z and records [tasks, 4, K] of y (count, pivot, mean - pivot, squares about the mean), unless empty."""
    slope = x.dtype.type(slope)
    M = x.size // C
    per_image = M // N * C
    length, long = C * max(1, pending.LENGTH // C), K * max(1, pending.LENGTH // K)
    plain = scale.size == 0 and kind == pending.NONE and gate.size == 0 and right.size == 0
    for task in numba.prange(tasks):
        before = set_threads(limit, 1)
        first, last = strip(M, tasks, task)
        scales, shifts = spread(scale, 0, C, True, 1, length), spread(shift, 0, C, True, 1, length)
        right_scales = spread(right_scale, 0, C, True, 1, length)
        right_shifts = spread(right_shift, 0, C, True, 1, length)
        gates, biases = np.empty(length if gate.size > 0 else 0, x.dtype), spread(bias, 0, K, True, 1, long)
        buffer = np.empty(0 if plain or z.size > 0 else piece * C, x.dtype)
        pivot, pivots = np.empty(0, x.dtype), np.empty(0, x.dtype)
        run1, run2 = np.zeros(long, x.dtype), np.zeros(long, x.dtype)
        total1, total2 = np.zeros(long), np.zeros(long)
        for begin in range(first, last, piece):
            rows = min(piece, last - begin)
            source, result = x[begin * C : (begin + rows) * C], y[begin * K : (begin + rows) * K]
            if not plain:
                source = buffer[: rows * C] if z.size == 0 else z[begin * C : (begin + rows) * C]
                transform(
                    x, scales, shifts, kind, slope, gate, gates, right, right_scales, right_shifts, relu, C, length,
                    per_image, begin * C, (begin + rows) * C, source,
                )  # fmt: skip
            gemm(multiply, True, False, K, rows, C, weight, C, source, C, 0, result, K)
            if bias.size > 0:
                add_rows(result, biases)
            if records.size > 0:
                if begin == first:
                    pivot = batch_norm.rows_pivot(result, K)
                    pivots = batch_norm.tiled(pivot, long, result[0])
                measure(result, K, long, pivots, run1, run2, total1, total2)
        if records.size > 0 and last > first:
            sum1, sum2 = np.zeros(K), np.zeros(K)
            pending.fold(total1, True, 1, sum1)
            pending.fold(total2, True, 1, sum2)
            for k in range(K):
                distance = sum1[k] / (last - first)
                records[task, 0, k], records[task, 1, k], records[task, 2, k] = last - first, pivot[k], distance
                records[task, 3, k] = sum2[k] - sum1[k] * distance
        set_threads(limit, before)


@inline
def merge(records, mean, var):
    """Mean and biased variance of all rows from the tasks' records; Chan, Golub and LeVeque."""
    tasks, _, K = records.shape
    for k in range(K):
        count, center, squares = 0.0, 0.0, 0.0
        for task in range(tasks):
            if records[task, 0, k] > 0:
                of_task, other = records[task, 0, k], records[task, 1, k] + records[task, 2, k]
                apart = other - center
                total = count + of_task
                squares += records[task, 3, k] + apart * apart * (count * of_task / total)
                center += apart * (of_task / total)
                count = total
        mean[k], var[k] = center, (0.0 if squares < 0.0 else squares) / count


@call
def forward(
    blas, like, threads, N, C, K, M, tasks, piece, x, scale, shift, kind, slope, gate, right, right_scale, right_shift,
    relu, weight, bias, z, y, mean, var,
):  # fmt: skip
    """forward_pieces of what lies at these addresses; mean and var [K] unless 0."""
    set_pool(threads)
    records = np.zeros((tasks if mean != 0 else 0, 4, K))
    forward_pieces(
        *blas, there(x, M * C, like), there(scale, C, like), there(shift, C, like), kind, slope,
        there(gate, N * C, like), there(right, M * C, like), there(right_scale, C, like), there(right_shift, C, like),
        relu, there(weight, K * C, like), there(bias, K, like), N, C, K, tasks, piece, there(z, M * C, like),
        there(y, M * K, like), records,
    )  # fmt: skip
    if mean != 0:
        merge(records, there(mean, K, like), there(var, K, like))


@jit
def backward_pieces(
    multiply, limit, grad, y, a, b, c, x, scale, shift, kind, slope, gate, z, finish, add, join, right, out_z, scaled,
    weight, N, C, K, tasks, piece, grad_x, grad_right, sums, right_sums, grad_weights,
):  # fmt: skip
    """grad_x, grad_right and the sums of pending.backward, and grad_weights [tasks, K * C]; each unless empty.

    The gradient of the convolution's output is grad * a + b * y + c; a, or y, b and c, may not be there. z: where it
    was stored. finish: whether grad_x is that of the expression's x, as pending.backward has it, else of z, plus add.
    right and out_z: as its right and z.
    """
    t = weight.dtype.type
    slope = t(slope)
    zero, one = t(0), t(1)
    none = np.empty(0, weight.dtype)
    M = max(grad_x.size, x.size, z.size) // C
    per_image = M // N * C
    length, long = C * max(1, pending.LENGTH // C), K * max(1, pending.LENGTH // K)
    plain = scale.size == 0 and kind == pending.NONE and gate.size == 0
    corrected, weighted = a.size > 0, grad_weights.size > 0
    make = weighted and not plain and z.size == 0
    right_at = 2 if scale.size > 0 else 0
    count = right_at + (2 if right.size > 0 else 0) if finish else 0
    partial = np.zeros((count, tasks, C))
    for task in numba.prange(tasks):
        before = set_threads(limit, 1)
        first, last = strip(M, tasks, task)
        scales, shifts = spread(scale, 0, C, True, 1, length), spread(shift, 0, C, True, 1, length)
        of_grad, of_y, constant = (
            spread(a, 0, K, True, 1, long),
            spread(b, 0, K, True, 1, long),
            spread(c, 0, K, True, 1, long),
        )
        gates = np.empty(length if gate.size > 0 else 0, weight.dtype)
        dy_buffer = np.empty(piece * K if corrected else 0, weight.dtype)
        z_buffer = np.empty(piece * C if make else 0, weight.dtype)
        buffer = np.empty(length if finish else 0, weight.dtype)
        inner = np.empty(length if finish and (kind > pending.RELU or gate.size > 0) else 0, weight.dtype)
        runs, totals = np.zeros((count, length), weight.dtype), np.zeros((count, length))
        full = 0
        if weighted and first == last:
            grad_weights[task] = zero
        for begin in range(first, last, piece):
            rows = min(piece, last - begin)
            x_begin, x_end, y_begin, y_end = begin * C, (begin + rows) * C, begin * K, (begin + rows) * K
            dy = grad[y_begin:y_end]
            if corrected:
                dy = dy_buffer[: rows * K]
                correct(grad[y_begin:y_end], y[y_begin:y_end], of_grad, of_y, constant, dy)
            if weighted:
                source = z[x_begin:x_end] if z.size > 0 else x[x_begin:x_end]
                if make:
                    source = z_buffer[: rows * C]
                    transform(
                        x, scales, shifts, kind, slope, gate, gates, none, none, none, False, C, length, per_image,
                        x_begin, x_end, source,
                    )  # fmt: skip
                beta = zero if begin == first else one
                gemm(multiply, False, True, C, K, rows, source, C, dy, K, beta, grad_weights[task], C)
            if grad_x.size > 0:
                dz = grad_x[x_begin:x_end]
                gemm(multiply, False, False, C, rows, K, weight, C, dy, K, zero, dz, C)
                if finish:
                    at = x_begin
                    while at < x_end:
                        end = segment(at, x_end, length, per_image, gate, gates, C)
                        pending.gradient(
                            grad_x[at:end], add[at:end], x[at:end], scales, shifts, kind, slope, gates, join,
                            right[at:end], out_z[at:end], scaled, buffer[: end - at], inner[: end - at], runs,
                            right_at, count, grad_x[at:end], grad_right[at:end],
                        )  # fmt: skip
                        at = end
                        full += 1
                        if full % pending.RUN == 0:
                            for k in range(count):
                                pending.flush(runs[k], totals[k])
                elif add.size > 0:
                    add_rows(dz, add[x_begin:x_end])
        for k in range(count):
            pending.flush(runs[k], totals[k])
            pending.fold(totals[k], True, 1, partial[k, task])
        set_threads(limit, before)
    for k in range(count):
        target = sums if k < right_at else right_sums
        for task in range(tasks):
            for j in range(C):
                target[k % 2, j] += partial[k, task, j]


@jit
def add_parts(parts, total):
    """Sum of parts [tasks, elements], in their order."""
    blocks = (total.size + BLOCK - 1) // BLOCK
    for block in numba.prange(blocks):
        begin = block * BLOCK
        result = total[begin : begin + BLOCK]
        pending.copy(parts[0, begin : begin + BLOCK], result)
        for task in range(1, len(parts)):
            add_rows(result, parts[task, begin : begin + BLOCK])


@call
def backward(
    blas, like, threads, N, C, K, M, tasks, piece, grad, y, a, b, c, x, scale, shift, kind, slope, gate, z, finish, add,
    join, right, out_z, scaled, weight, grad_x, grad_right, sums, right_sums, parts, grad_weight,
):  # fmt: skip
    """backward_pieces of what lies at these addresses; sums, right_sums [2, C], parts [tasks, K, C], grad_weight."""
    set_pool(threads)
    total, right_total = np.zeros((2, C if sums != 0 else 0)), np.zeros((2, C if right_sums != 0 else 0))
    of_tasks = there(parts, tasks * K * C, like).reshape(tasks if parts != 0 else 0, K * C)
    backward_pieces(
        *blas, there(grad, M * K, like), there(y, M * K, like), there(a, K, like), there(b, K, like), there(c, K, like),
        there(x, M * C, like), there(scale, C, like), there(shift, C, like), kind, slope, there(gate, N * C, like),
        there(z, M * C, like), finish, there(add, M * C, like), join, there(right, M * C, like),
        there(out_z, M * C, like), scaled, there(weight, K * C, like), N, C, K, tasks, piece,
        there(grad_x, M * C, like), there(grad_right, M * C, like), total, right_total, of_tasks,
    )  # fmt: skip
    pending.copy(total.ravel(), there(sums, 2 * C, like))
    pending.copy(right_total.ravel(), there(right_sums, 2 * C, like))
    if parts != 0:
        add_parts(of_tasks, there(grad_weight, K * C, like))
