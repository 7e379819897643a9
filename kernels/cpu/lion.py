"""Lion on many arrays at once, given by their addresses. Formulas: kernels/triton/lion.py."""

import numba

from fastcnn.kernels.cpu.common import array_at
from fastcnn.kernels.cpu.multi_tensor import finish, gradient_of, interpolate


@numba.njit(error_model="numpy")
def _update(p, g, m, sign, keep, weight1, beta1, weight2, beta2, lr):
    zero = p.dtype.type(0)
    for i in range(p.size):
        g_i = sign * g[i]
        direction = interpolate(m[i], g_i, weight1, beta1)
        m[i] = interpolate(m[i], g_i, weight2, beta2)
        p[i] = keep * p[i] - (lr if direction > zero else (-lr if direction < zero else zero))


@numba.njit(parallel=True, cache=True, error_model="numpy")
def lion(addresses, chunks, like, options, maximize, weight_decay, lr, beta1, beta2):
    """One step for every tensor of the table.

    Args:
        addresses: int64 (rows, tensors), see kernels/triton/lion.py.
        chunks: int64 (chunks, 3): tensor, first element, number of elements.
        like: an empty array with the dtype of the tensors.
        options: of `multi_tensor.finish`.
    """
    real = like.dtype.type
    sign = -1 if maximize else 1
    keep = 1 - lr * weight_decay
    for k in numba.prange(chunks.shape[0]):
        t, start, n = chunks[k, 0], chunks[k, 1], chunks[k, 2]
        p = array_at(addresses[0, t] + start * like.itemsize, n, like)
        m = array_at(addresses[2, t] + start * like.itemsize, n, like)
        g = gradient_of(addresses, t, start, n, like, sign, options)
        _update(p, g, m, real(sign), real(keep), real(1 - beta1), real(beta1), real(1 - beta2), real(beta2), real(lr))
        finish(addresses, t, start, n, like, options)
