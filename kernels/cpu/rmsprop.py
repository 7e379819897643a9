"""RMSprop on many arrays at once, given by their addresses. Formulas: kernels/triton/rmsprop.py."""

import numba
import numpy as np

from fastcnn.kernels.cpu.common import array_at
from fastcnn.kernels.cpu.multi_tensor import (
    LIKE_SCALAR,
    decayed_gradient,
    finish,
    gradient_of,
    interpolate,
)


@numba.njit(error_model="numpy")
def _plain(p, g, s, sign, l2, alpha, weight, eps, lr):
    for i in range(p.size):
        g_i = decayed_gradient(g[i], p[i], sign, l2)
        s_i = alpha * s[i] + weight * g_i * g_i
        s[i] = s_i
        p[i] -= lr * (g_i / (np.sqrt(s_i) + eps))


@numba.njit(error_model="numpy")
def _momentum(p, g, s, b, sign, l2, alpha, weight, eps, lr, momentum):
    for i in range(p.size):
        g_i = decayed_gradient(g[i], p[i], sign, l2)
        s_i = alpha * s[i] + weight * g_i * g_i
        s[i] = s_i
        b_i = momentum * b[i] + g_i / (np.sqrt(s_i) + eps)
        b[i] = b_i
        p[i] -= lr * b_i


@numba.njit(error_model="numpy")
def _centered(p, g, s, a, sign, l2, alpha, weight, eps, lr):
    for i in range(p.size):
        g_i = decayed_gradient(g[i], p[i], sign, l2)
        s_i = alpha * s[i] + weight * g_i * g_i
        a_i = interpolate(a[i], g_i, weight, alpha)
        s[i] = s_i
        a[i] = a_i
        p[i] -= lr * (g_i / (np.sqrt(s_i - a_i * a_i) + eps))


@numba.njit(error_model="numpy")
def _centered_momentum(p, g, s, b, a, sign, l2, alpha, weight, eps, lr, momentum):
    for i in range(p.size):
        g_i = decayed_gradient(g[i], p[i], sign, l2)
        s_i = alpha * s[i] + weight * g_i * g_i
        a_i = interpolate(a[i], g_i, weight, alpha)
        s[i] = s_i
        a[i] = a_i
        b_i = momentum * b[i] + g_i / (np.sqrt(s_i - a_i * a_i) + eps)
        b[i] = b_i
        p[i] -= lr * b_i


@numba.njit(parallel=True, cache=True, error_model="numpy")
def rmsprop(addresses, chunks, like, options, maximize, weight_decay, lr, momentum, centered, alpha, eps):
    """One step for every tensor of the table.

    Args:
        addresses: int64 (rows, tensors), see kernels/triton/rmsprop.py.
        chunks: int64 (chunks, 3): tensor, first element, number of elements.
        like: an empty array with the dtype of the tensors.
        options: of `multi_tensor.finish`.
    """
    real = like.dtype.type
    for t in range(addresses.shape[1]):
        array_at(addresses[addresses.shape[0] - 1, t], 1, LIKE_SCALAR)[0] += 1
    sign = -1 if maximize else 1
    for k in numba.prange(chunks.shape[0]):
        t, start, n = chunks[k, 0], chunks[k, 1], chunks[k, 2]
        offset = start * like.itemsize
        p = array_at(addresses[0, t] + offset, n, like)
        g = gradient_of(addresses, t, start, n, like, sign, options)
        s = array_at(addresses[2, t] + offset, n, like)
        sgn, l2, al, w, e, rate = real(sign), real(weight_decay), real(alpha), real(1 - alpha), real(eps), real(lr)
        if momentum == 0 and not centered:
            _plain(p, g, s, sgn, l2, al, w, e, rate)
        elif not centered:
            b = array_at(addresses[3, t] + offset, n, like)
            _momentum(p, g, s, b, sgn, l2, al, w, e, rate, real(momentum))
        elif momentum == 0:
            a = array_at(addresses[3, t] + offset, n, like)
            _centered(p, g, s, a, sgn, l2, al, w, e, rate)
        else:
            b = array_at(addresses[3, t] + offset, n, like)
            a = array_at(addresses[4, t] + offset, n, like)
            _centered_momentum(p, g, s, b, a, sgn, l2, al, w, e, rate, real(momentum))
        finish(addresses, t, start, n, like, options)
