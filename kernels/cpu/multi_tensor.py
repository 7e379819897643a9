"""What the multi-tensor kernels share. Formulas and the order of the rows: kernels/triton/multi_tensor.py.

A chunk of every tensor that takes part fits the L2 cache together. So what a step does besides its rule (clipping, L1,
the average, the bf16 copy) is a short loop over the chunk before or after it, which only those pay who ask for it.
"""

import numba
import numpy as np

from fastcnn.kernels.cpu.common import array_at

LIKE_SCALAR = np.empty(0, np.float32)  # step counts and the like
LIKE_INT32 = np.empty(0, np.uint32)
LIKE_INT16 = np.empty(0, np.uint16)


@numba.njit(inline="always")
def decayed_gradient(g, p, sign, l2):
    gradient = sign * g
    if l2 != 0:
        gradient += l2 * p
    return gradient


@numba.njit(inline="always")
def interpolate(a, b, weight, rest):
    """a + weight * (b - a) from the nearer end, as torch.lerp; rest is 1 - weight."""
    if weight < 0.5:
        return a + weight * (b - a)
    return b - rest * (b - a)


@numba.njit(error_model="numpy")
def _penalize(p, g, out, factor, l1):
    zero = p.dtype.type(0)
    for i in range(g.size):
        push = l1 if p[i] > zero else (-l1 if p[i] < zero else zero)
        out[i] = factor * g[i] + push


@numba.njit(error_model="numpy")
def _average(p, average, weight):
    for i in range(p.size):
        average[i] += weight * (p[i] - average[i])


@numba.njit(error_model="numpy")
def _round_to_bf16(bits, copy):
    for i in range(bits.size):
        b = bits[i]
        rounded = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        is_nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        copy[i] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)


@numba.njit
def gradient_of(addresses, t, offset, n, like, sign, options):
    """The gradient of a chunk: clipped, with the L1 penalty. A tuple `options`, see `finish`."""
    real = like.dtype.type
    g = array_at(addresses[1, t] + offset * like.itemsize, n, like)
    if options[0] == 1 and options[1] == 0:
        return g
    out = np.empty(n, like.dtype)
    p = array_at(addresses[0, t] + offset * like.itemsize, n, like)
    _penalize(p, g, out, real(options[0]), real(sign * options[1]))
    return out


@numba.njit
def finish(addresses, t, offset, n, like, options):
    """Update what is kept of the parameter.

    Args:
        options: (factor that clips the gradient, l1, row of the averages or 0, weight of the new value in them, row of
            the bf16 copies or 0).
    """
    real = like.dtype.type
    p = addresses[0, t] + offset * like.itemsize
    if options[2] != 0:
        average = array_at(addresses[options[2], t] + offset * like.itemsize, n, like)
        _average(array_at(p, n, like), average, real(options[3]))
    if options[4] != 0:
        copy = array_at(addresses[options[4], t] + offset * 2, n, LIKE_INT16)
        if like.itemsize == 8:
            _round_to_bf16(array_at(p, n, like).astype(np.float32).view(np.uint32), copy)
        else:
            _round_to_bf16(array_at(p, n, LIKE_INT32), copy)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def square_sums(addresses, chunks, like, row, sums):
    """The sum of squares of each chunk of a row, in fp64: sixteen sums side by side, added up in one order."""
    for k in numba.prange(chunks.shape[0]):
        t, n = chunks[k, 0], chunks[k, 2]
        x = array_at(addresses[row, t] + chunks[k, 1] * like.itemsize, n, like)
        lanes = np.zeros(16)
        whole = n - n % 16
        for i in range(0, whole, 16):
            for j in range(16):
                value = np.float64(x[i + j])
                lanes[j] += value * value
        total = lanes.sum()
        for i in range(whole, n):
            value = np.float64(x[i])
            total += value * value
        sums[k] = total
