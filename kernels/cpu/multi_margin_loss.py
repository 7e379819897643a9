"""Multi-class hinge loss on numpy arrays [rows, C]: what kernels/triton/multi_margin_loss.py computes."""

import numba
import numpy as np

LANES = 64
BLOCK = 16384  # elements per task

jit = numba.njit(parallel=True, cache=True, error_model="numpy")
inline = numba.njit(error_model="numpy")


@inline
def row_sum(values, lanes):
    whole = values.size // LANES * LANES
    lanes[:] = 0
    for start in range(0, whole, LANES):
        for j in range(LANES):
            lanes[j] += values[start + j]
    for j in range(values.size - whole):
        lanes[j] += values[whole + j]
    total = 0.0
    for j in range(LANES):
        total += lanes[j]
    return total


@inline
def row_gaps(out, row, t, margin):
    """max(0, margin - row[t] + row[c]), 0 at the target and of NaN."""
    zero = row.dtype.type(0)
    shift = margin - row[t]
    for c in range(row.size):
        gap = shift + row[c]
        out[c] = gap if gap > zero else zero
    out[t] = zero


@jit
def forward(x, target, weight, loss, p, margin):
    """Losses of all rows; (their sum, the first row whose target is no class or -1)."""
    rows, C = x.shape
    per_task = max(1, BLOCK // C)
    tasks = (rows + per_task - 1) // per_task
    sums = np.zeros(tasks)
    bad = np.full(tasks, -1)
    for task in numba.prange(tasks):
        lanes, values = np.empty(LANES, x.dtype), np.empty(C, x.dtype)
        for r in range(task * per_task, min(rows, (task + 1) * per_task)):
            t = target[r]
            if t < 0 or t >= C:
                bad[task] = r
                break
            row_gaps(values, x[r], t, margin)
            if p == 2:
                for c in range(C):
                    values[c] *= values[c]
            this_loss = row_sum(values, lanes) * weight[t] / C
            loss[r] = this_loss
            sums[task] += this_loss
    total, first = 0.0, -1
    for task in range(tasks):
        total += sums[task]
        if first < 0:
            first = bad[task]
    return total, first


@jit
def backward(dx, x, target, weight, grad, p, margin):
    """dx, with grad [rows] for each row's loss."""
    rows, C = x.shape
    per_task = max(1, BLOCK // C)
    zero, one, two = x.dtype.type(0), x.dtype.type(1), x.dtype.type(2)
    for task in numba.prange((rows + per_task - 1) // per_task):
        lanes = np.empty(LANES, x.dtype)
        for r in range(task * per_task, min(rows, (task + 1) * per_task)):
            t, out = target[r], dx[r]
            row_gaps(out, x[r], t, margin)
            if p == 2:
                for c in range(C):
                    out[c] *= two
            else:
                for c in range(C):
                    out[c] = one if out[c] > zero else zero
            factor = x.dtype.type(grad[r] * weight[t] / C)
            at_target = x.dtype.type(row_sum(out, lanes))
            for c in range(C):
                out[c] *= factor
            out[t] = -at_target * factor
