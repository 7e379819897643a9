"""Adagrad on many arrays at once, given by their addresses. Formulas: kernels/triton/adagrad.py."""

import numba
import numpy as np

from fastcnn.kernels.cpu.common import array_at
from fastcnn.kernels.cpu.multi_tensor import LIKE_SCALAR, decayed_gradient, finish, gradient_of


@numba.njit(error_model="numpy")
def _update(p, g, s, sign, l2, eps, lr):
    for i in range(p.size):
        g_i = decayed_gradient(g[i], p[i], sign, l2)
        s_i = s[i] + g_i * g_i
        s[i] = s_i
        p[i] -= lr * (g_i / (np.sqrt(s_i) + eps))


@numba.njit(parallel=True, cache=True, error_model="numpy")
def adagrad(addresses, chunks, like, options, maximize, weight_decay, lr, lr_decay, eps):
    """One step for every tensor of the table.

    Args:
        addresses: int64 (rows, tensors), see kernels/triton/adagrad.py.
        chunks: int64 (chunks, 3): tensor, first element, number of elements.
        like: an empty array with the dtype of the tensors.
        options: of `multi_tensor.finish`.
    """
    real = like.dtype.type
    rates = np.empty(addresses.shape[1])
    for t in range(addresses.shape[1]):
        step = array_at(addresses[addresses.shape[0] - 1, t], 1, LIKE_SCALAR)
        rates[t] = lr / (1 + np.float64(step[0]) * lr_decay)
        step[0] += 1
    sign = -1 if maximize else 1
    for k in numba.prange(chunks.shape[0]):
        t, start, n = chunks[k, 0], chunks[k, 1], chunks[k, 2]
        p = array_at(addresses[0, t] + start * like.itemsize, n, like)
        s = array_at(addresses[2, t] + start * like.itemsize, n, like)
        g = gradient_of(addresses, t, start, n, like, sign, options)
        _update(p, g, s, real(sign), real(weight_decay), real(eps), real(rates[t]))
        finish(addresses, t, start, n, like, options)
