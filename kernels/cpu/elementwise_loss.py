"""Losses that compare element by element, on flat numpy arrays in one order: kernels/triton/elementwise_loss.py.

A block of losses is computed into a buffer in the cache, then weighted and added up: loops with one job vectorise.
Sums are taken in lanes within a block and block by block in fp64: the same bits whatever the number of threads.
"""

import numba
import numpy as np

from fastcnn.kernels.cpu.elementary import exp_down, log1p_unit

BLOCK = 4096  # elements per task
LANES = 64
MSE, SMOOTH_L1, HUBER, BCE = range(4)

jit = numba.njit(parallel=True, cache=True, error_model="numpy")
inline = numba.njit(error_model="numpy")


@inline
def softplus_of_minus(x):
    """log(1 + exp(-x))."""
    zero = type(x)(0)
    return (-x if x < zero else zero) + log1p_unit(exp_down(-abs(x)))


@inline
def sigmoid(x):
    one = type(x)(1)
    e = exp_down(-abs(x))
    return (one if x >= type(x)(0) else e) / (one + e)


@inline
def block_losses(out, x, t, pos, kind, beta):
    one, half = x.dtype.type(1), x.dtype.type(0.5)
    if kind == MSE:
        for i in range(x.size):
            out[i] = (x[i] - t[i]) * (x[i] - t[i])
    elif kind == BCE and pos.size > 0:
        for i in range(x.size):
            out[i] = (one - t[i]) * x[i] + (one + (pos[i] - one) * t[i]) * softplus_of_minus(x[i])
    elif kind == BCE:
        for i in range(x.size):
            out[i] = (one - t[i]) * x[i] + softplus_of_minus(x[i])
    else:
        # smooth_l1 is huber over beta; l1 is smooth_l1 with beta 0, whose inner branch is never taken
        inner = half / beta if kind == SMOOTH_L1 else half
        outer = one if kind == SMOOTH_L1 else beta
        offset = half * beta
        for i in range(x.size):
            d = abs(x[i] - t[i])
            out[i] = inner * d * d if d < beta else outer * (d - offset)


@inline
def block_slopes(out, x, t, pos, kind, beta):
    """Derivatives by x."""
    one, zero = x.dtype.type(1), x.dtype.type(0)
    if kind == MSE:
        for i in range(x.size):
            d = x[i] - t[i]
            out[i] = d + d
    elif kind == BCE and pos.size > 0:
        for i in range(x.size):
            out[i] = (one - t[i]) - (one + (pos[i] - one) * t[i]) * sigmoid(-x[i])
    elif kind == BCE:
        for i in range(x.size):
            out[i] = sigmoid(x[i]) - t[i]
    else:
        inner = one / beta if kind == SMOOTH_L1 and beta > zero else one
        outer = one if kind == SMOOTH_L1 else beta
        for i in range(x.size):
            d = x[i] - t[i]
            far = outer if d > zero else -outer
            out[i] = far if abs(d) > beta else inner * d


@inline
def block_slopes_of_target(out, x, pos):
    """Derivatives of bce by the target; those of the others are the negative ones by x."""
    one = x.dtype.type(1)
    if pos.size > 0:
        for i in range(x.size):
            out[i] = (pos[i] - one) * softplus_of_minus(x[i]) - x[i]
    else:
        for i in range(x.size):
            out[i] = -x[i]


@inline
def block_sum(values, count, lanes):
    whole = count // LANES * LANES
    lanes[:] = 0
    for start in range(0, whole, LANES):
        for j in range(LANES):
            lanes[j] += values[start + j]
    for j in range(count - whole):
        lanes[j] += values[whole + j]
    total = 0.0
    for j in range(LANES):
        total += lanes[j]
    return total


@jit
def forward(x, t, weight, pos, out, kind, beta):
    """(sum of the losses, sum of the weights); writes the losses if `out` is not empty.

    Args:
        x, t: flat arrays of one dtype. weight, pos: likewise, or empty. beta: of their dtype.
    """
    blocks = (x.size + BLOCK - 1) // BLOCK
    sums = np.zeros((blocks, 2))
    for block in numba.prange(blocks):
        begin, end = block * BLOCK, min(x.size, (block + 1) * BLOCK)
        lanes, values = np.empty(LANES, x.dtype), np.empty(BLOCK, x.dtype)
        block_losses(values, x[begin:end], t[begin:end], pos[begin:end], kind, beta)
        if weight.size > 0:
            for i in range(end - begin):
                values[i] *= weight[begin + i]
            sums[block, 1] = block_sum(weight[begin:end], end - begin, lanes)
        if out.size > 0:
            out[begin:end] = values[: end - begin]
        else:
            sums[block, 0] = block_sum(values, end - begin, lanes)
    loss, total = 0.0, 0.0
    for block in range(blocks):
        loss += sums[block, 0]
        total += sums[block, 1]
    return loss, total


@jit
def backward(grad, grads, x, t, weight, pos, dx, dtarget, kind, beta):
    """dx and dtarget, those that are not empty; the gradient is grads per element, or grad where that is empty."""
    for block in numba.prange((x.size + BLOCK - 1) // BLOCK):
        begin, end = block * BLOCK, min(x.size, (block + 1) * BLOCK)
        scale, slopes = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
        if grads.size > 0:
            scale[: end - begin] = grads[begin:end]
        else:
            scale[:] = grad
        if weight.size > 0:
            for i in range(end - begin):
                scale[i] *= weight[begin + i]
        if dx.size > 0 or kind != BCE:
            block_slopes(slopes, x[begin:end], t[begin:end], pos[begin:end], kind, beta)
        if dx.size > 0:
            for i in range(end - begin):
                dx[begin + i] = scale[i] * slopes[i]
        if dtarget.size > 0:
            if kind == BCE:
                block_slopes_of_target(slopes, x[begin:end], pos[begin:end])
                for i in range(end - begin):
                    dtarget[begin + i] = scale[i] * slopes[i]
            else:
                for i in range(end - begin):
                    dtarget[begin + i] = -(scale[i] * slopes[i])
