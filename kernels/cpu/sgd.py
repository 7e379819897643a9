"""SGD and LARS on many arrays at once, given by their addresses. Formulas: kernels/triton/sgd.py."""

import numba

from fastcnn.kernels.cpu.common import array_at
from fastcnn.kernels.cpu.multi_tensor import decayed_gradient, finish, gradient_of


@numba.njit(error_model="numpy")
def _plain(p, g, sign, l2, ratio, lr):
    for i in range(p.size):
        p[i] -= lr * (ratio * decayed_gradient(g[i], p[i], sign, l2))


@numba.njit(error_model="numpy")
def _first(p, g, b, sign, l2, ratio, lr, along):
    for i in range(p.size):
        b[i] = ratio * decayed_gradient(g[i], p[i], sign, l2)
        p[i] -= lr * (along * b[i])


@numba.njit(error_model="numpy")
def _momentum(p, g, b, sign, l2, ratio, lr, momentum, weight):
    for i in range(p.size):
        b_i = momentum * b[i] + weight * (ratio * decayed_gradient(g[i], p[i], sign, l2))
        b[i] = b_i
        p[i] -= lr * b_i


@numba.njit(error_model="numpy")
def _nesterov(p, g, b, sign, l2, ratio, lr, momentum, weight):
    for i in range(p.size):
        g_i = ratio * decayed_gradient(g[i], p[i], sign, l2)
        b_i = momentum * b[i] + weight * g_i
        b[i] = b_i
        p[i] -= lr * (g_i + momentum * b_i)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def sgd(addresses, chunks, like, options, maximize, weight_decay, lr, ratios, momentum, dampening, nesterov):
    """One step for every tensor of the table.

    Args:
        addresses: int64 (rows, tensors), see kernels/triton/sgd.py.
        chunks: int64 (chunks, 3): tensor, first element, number of elements.
        like: an empty array with the dtype of the tensors.
        options: of `multi_tensor.finish`.
        ratios: fp64, one per tensor (LARS), or none.
    """
    real = like.dtype.type
    sign = -1 if maximize else 1
    for k in numba.prange(chunks.shape[0]):
        t, start, n = chunks[k, 0], chunks[k, 1], chunks[k, 2]
        p = array_at(addresses[0, t] + start * like.itemsize, n, like)
        g = gradient_of(addresses, t, start, n, like, sign, options)
        s, l2, ratio = real(sign), real(weight_decay), real(ratios[t] if ratios.size else 1.0)
        if momentum == 0:
            _plain(p, g, s, l2, ratio, real(lr))
        else:
            b = array_at(addresses[2, t] + start * like.itemsize, n, like)
            if addresses[addresses.shape[0] - 1, t] != 0:
                _first(p, g, b, s, l2, ratio, real(lr), real(1 + momentum if nesterov else 1.0))
            elif nesterov:
                _nesterov(p, g, b, s, l2, ratio, real(lr), real(momentum), real(1 - dampening))
            else:
                _momentum(p, g, b, s, l2, ratio, real(lr), real(momentum), real(1 - dampening))
        finish(addresses, t, start, n, like, options)
