"""Cross entropy on numpy arrays, what kernels/triton/cross_entropy.py computes, in two layouts.

rows: x [rows, C], a row's classes side by side. planes: x [N, C, S], where loops run over pixels, a block at a time.
Sums over a row are taken in lanes and sums over rows block by block, merged in order in fp64: the same bits whatever
the number of threads. Targets that are no class are reported, not computed.
"""

import numba
import numpy as np

from fastcnn.kernels.cpu.elementary import exp_down, log_up

LANES = 64  # sums side by side
BLOCK = 16384  # logits per task of the rows kernels
PIXELS = 512  # pixels per task of the planes kernels

jit = numba.njit(parallel=True, cache=True, error_model="numpy")
inline = numba.njit(error_model="numpy")


@inline
def row_maximum(row, lanes):
    """The largest element that is no NaN, -inf if there is none."""
    whole = row.size // LANES * LANES
    lanes[:] = -np.inf
    for start in range(0, whole, LANES):
        for j in range(LANES):
            lanes[j] = row[start + j] if row[start + j] > lanes[j] else lanes[j]
    for j in range(row.size - whole):
        lanes[j] = row[whole + j] if row[whole + j] > lanes[j] else lanes[j]
    top = lanes[0]
    for j in range(1, LANES):
        top = lanes[j] if lanes[j] > top else top
    return top


@inline
def lanes_sum(lanes):
    # pairs first: as exact as lanes allow
    width = LANES // 2
    while width > 0:
        for j in range(width):
            lanes[j] += lanes[j + width]
        width //= 2
    return lanes[0]


@inline
def row_exp_sum(row, shift, lanes):
    """Sum of exp(row - shift)."""
    whole = row.size // LANES * LANES
    lanes[:] = 0
    for start in range(0, whole, LANES):
        for j in range(LANES):
            lanes[j] += exp_down(row[start + j] - shift)
    for j in range(row.size - whole):
        lanes[j] += exp_down(row[whole + j] - shift)
    return lanes_sum(lanes)


@inline
def row_spread(row, p, weight, keep, even, top, log_total, lanes, lanes2):
    """(sum of q * (logsumexp - x), sum of q) with q = weight * (keep * p + even); p empty: q = weight * even."""
    lanes[:] = 0
    lanes2[:] = 0
    for start in range(0, row.size, LANES):
        n = min(LANES, row.size - start)
        if p.size > 0:
            for j in range(n):
                q = weight[start + j] * (keep * p[start + j] + even)
                lanes2[j] += q
                lanes[j] += q * ((top - row[start + j]) + log_total)
        else:
            for j in range(n):
                q = weight[start + j] * even
                lanes2[j] += q
                lanes[j] += q * ((top - row[start + j]) + log_total)
    return lanes_sum(lanes), lanes_sum(lanes2)


@jit
def rows_forward(x, target, p, weight, top, log_total, mass, loss, ignore_index, keep, even):
    """Statistics and loss of every row; (sum of the losses, of the divisors, the first row whose target is no class).

    Args:
        x: [rows, C]. target: [rows] class indices, or empty. p: [rows, C] probabilities, or empty.
        weight: [C]. top, log_total, mass, loss: [rows], written.
        keep: 1 - label smoothing. even: label smoothing / C, both of the dtype of x.
    """
    rows, C = x.shape
    per_task = max(1, BLOCK // C)
    tasks = (rows + per_task - 1) // per_task
    sums = np.zeros((tasks, 2))
    bad = np.full(tasks, -1)
    zero = x.dtype.type(0)
    soft = target.size == 0
    for task in numba.prange(tasks):
        lanes = np.empty(LANES, x.dtype)
        lanes2 = np.empty(LANES, x.dtype)
        for r in range(task * per_task, min(rows, (task + 1) * per_task)):
            row = x[r]
            t = -1 if soft else target[r]
            counts = soft or t != ignore_index
            if counts and not soft and (t < 0 or t >= C):
                bad[task] = r
                break
            top[r] = row_maximum(row, lanes)
            # all -inf: nothing to subtract
            log_total[r] = log_up(row_exp_sum(row, top[r] if top[r] > -np.inf else zero, lanes))
            if not counts:
                mass[r] = zero
                loss[r] = zero
                continue
            divisor = x.dtype.type(1)
            this_loss = zero
            this_mass = zero
            if not soft:
                divisor = weight[t]
                this_mass = keep * divisor
                this_loss = this_mass * ((top[r] - row[t]) + log_total[r])
            if soft or even > zero:
                spread, q = row_spread(
                    row, p[r] if soft else p[0], weight, keep, even, top[r], log_total[r], lanes, lanes2
                )
                this_loss += spread
                this_mass += q
            mass[r] = this_mass
            loss[r] = this_loss
            sums[task, 0] += this_loss
            sums[task, 1] += divisor
    return merged(sums, bad)


@inline
def merged(sums, bad):
    loss, divisor, first = 0.0, 0.0, -1
    for task in range(len(sums)):
        loss += sums[task, 0]
        divisor += sums[task, 1]
        if first < 0:
            first = bad[task]
    return loss, divisor, first


@jit
def rows_backward(dx, x, target, p, weight, top, log_total, mass, grad, ignore_index, keep, even):
    """dx = grad * (mass * softmax(x) - q), with grad [rows] for each row's loss."""
    rows, C = x.shape
    per_task = max(1, BLOCK // C)
    zero = x.dtype.type(0)
    soft = target.size == 0
    for task in numba.prange((rows + per_task - 1) // per_task):
        for r in range(task * per_task, min(rows, (task + 1) * per_task)):
            counts = soft or target[r] != ignore_index
            g = grad[r] if counts else zero
            scale = g * mass[r]
            row, out = x[r], dx[r]
            for c in range(C):
                out[c] = scale * exp_down((row[c] - top[r]) - log_total[r])
            if not counts:
                continue
            if soft:
                for c in range(C):
                    out[c] -= g * (weight[c] * (keep * p[r, c] + even))
            else:
                if even > zero:
                    for c in range(C):
                        out[c] -= g * (weight[c] * even)
                out[target[r]] -= g * (keep * weight[target[r]])


@jit
def planes_forward(x, target, p, weight, top, log_total, mass, loss, ignore_index, keep, even):
    """The same for x [N, C, S]; target, top, log_total, mass and loss [N, S]; p [N, C, S] or empty."""
    N, C, S = x.shape
    blocks = (S + PIXELS - 1) // PIXELS
    sums = np.zeros((N * blocks, 2))
    bad = np.full(N * blocks, -1)
    zero, one = x.dtype.type(0), x.dtype.type(1)
    soft = target.size == 0
    for task in numba.prange(N * blocks):
        n = task // blocks
        first = (task - n * blocks) * PIXELS
        count = min(PIXELS, S - first)
        m, total = np.full(PIXELS, -np.inf, x.dtype), np.zeros(PIXELS, x.dtype)
        losses, masses, divisors = np.zeros(PIXELS, x.dtype), np.zeros(PIXELS, x.dtype), np.zeros(PIXELS, x.dtype)
        for c in range(C):
            pixels = x[n, c, first : first + count]
            for i in range(count):
                m[i] = pixels[i] if pixels[i] > m[i] else m[i]
        for i in range(count):
            top[n, first + i] = m[i]
            m[i] = m[i] if m[i] > -np.inf else zero
        for c in range(C):
            pixels = x[n, c, first : first + count]
            for i in range(count):
                total[i] += exp_down(pixels[i] - m[i])
        for i in range(count):
            total[i] = log_up(total[i])
            log_total[n, first + i] = total[i]
            m[i] = top[n, first + i]
        if soft:
            divisors[:] = one
        else:
            for i in range(count):
                t = target[n, first + i]
                if t == ignore_index:
                    continue
                if t < 0 or t >= C:
                    bad[task] = n * S + first + i
                    break
                divisors[i] = weight[t]
                masses[i] = keep * weight[t]
                losses[i] = masses[i] * ((m[i] - x[n, t, first + i]) + total[i])
        if soft or even > zero:
            for c in range(C):
                pixels = x[n, c, first : first + count]
                if soft:
                    shares = p[n, c, first : first + count]
                    for i in range(count):
                        q = weight[c] * (keep * shares[i] + even)
                        masses[i] += q
                        losses[i] += q * ((m[i] - pixels[i]) + total[i])
                else:
                    q = weight[c] * even
                    for i in range(count):
                        masses[i] += q
                        losses[i] += q * ((m[i] - pixels[i]) + total[i])
        for i in range(count):
            counts = soft or target[n, first + i] != ignore_index
            loss[n, first + i] = losses[i] if counts else zero
            mass[n, first + i] = masses[i] if counts else zero
            sums[task, 0] += loss[n, first + i]
            sums[task, 1] += divisors[i]
    return merged(sums, bad)


@jit
def planes_backward(dx, x, target, p, weight, top, log_total, mass, grad, ignore_index, keep, even):
    """The same for dx and x [N, C, S]; grad [N, S]."""
    N, C, S = x.shape
    blocks = (S + PIXELS - 1) // PIXELS
    zero = x.dtype.type(0)
    soft = target.size == 0
    for task in numba.prange(N * blocks):
        n = task // blocks
        first = (task - n * blocks) * PIXELS
        count = min(PIXELS, S - first)
        g, scale = np.empty(PIXELS, x.dtype), np.empty(PIXELS, x.dtype)
        m, total = top[n, first : first + count], log_total[n, first : first + count]
        for i in range(count):
            counts = soft or target[n, first + i] != ignore_index
            g[i] = grad[n, first + i] if counts else zero
            scale[i] = g[i] * mass[n, first + i]
        for c in range(C):
            pixels, out = x[n, c, first : first + count], dx[n, c, first : first + count]
            even_c = weight[c] * even
            if soft:
                shares, keep_c = p[n, c, first : first + count], weight[c] * keep
                for i in range(count):
                    out[i] = scale[i] * exp_down((pixels[i] - m[i]) - total[i]) - g[i] * (keep_c * shares[i] + even_c)
            else:
                for i in range(count):
                    out[i] = scale[i] * exp_down((pixels[i] - m[i]) - total[i]) - g[i] * even_c
        if not soft:
            for i in range(count):
                t = target[n, first + i]
                if t != ignore_index:
                    dx[n, t, first + i] -= g[i] * (keep * weight[t])
