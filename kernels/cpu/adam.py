"""Adam and its kin on many arrays at once, given by their addresses. Formulas: kernels/triton/adam.py.

Every scalar of a loop has the dtype of the arrays: one Python number would make the whole loop run in fp64.
"""

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

ADAM, NADAM, RADAM = 0, 1, 2


@numba.njit(error_model="numpy")
def _adam(p, g, m, v, sign, l2, keep, weight1, beta1, weight2, beta2, a, root, eps):
    for i in range(p.size):
        g_i = decayed_gradient(g[i], p[i], sign, l2)
        m_i = interpolate(m[i], g_i, weight1, beta1)
        v_i = beta2 * v[i] + weight2 * g_i * g_i
        m[i] = m_i
        v[i] = v_i
        p[i] = keep * p[i] - a * (m_i / (np.sqrt(v_i) * root + eps))


@numba.njit(error_model="numpy")
def _amsgrad(p, g, m, v, w, sign, l2, keep, weight1, beta1, weight2, beta2, a, root, eps):
    for i in range(p.size):
        g_i = decayed_gradient(g[i], p[i], sign, l2)
        m_i = interpolate(m[i], g_i, weight1, beta1)
        v_i = beta2 * v[i] + weight2 * g_i * g_i
        m[i] = m_i
        v[i] = v_i
        w_i = w[i]
        if v_i > w_i or v_i != v_i:
            w_i = v_i
        w[i] = w_i
        p[i] = keep * p[i] - a * (m_i / (np.sqrt(w_i) * root + eps))


@numba.njit(error_model="numpy")
def _nadam(p, g, m, v, sign, l2, keep, weight1, beta1, weight2, beta2, a, b, root, eps):
    for i in range(p.size):
        g_i = decayed_gradient(g[i], p[i], sign, l2)
        m_i = interpolate(m[i], g_i, weight1, beta1)
        v_i = beta2 * v[i] + weight2 * g_i * g_i
        m[i] = m_i
        v[i] = v_i
        d = np.sqrt(v_i) * root + eps
        p[i] = keep * p[i] - b * (g_i / d) - a * (m_i / d)


@numba.njit(error_model="numpy")
def _unrectified(p, g, m, v, sign, l2, keep, weight1, beta1, weight2, beta2, a):
    for i in range(p.size):
        g_i = decayed_gradient(g[i], p[i], sign, l2)
        m_i = interpolate(m[i], g_i, weight1, beta1)
        v[i] = beta2 * v[i] + weight2 * g_i * g_i
        m[i] = m_i
        p[i] = keep * p[i] - a * m_i


@numba.njit(error_model="numpy")
def _advance(addresses, row, rule, lr, beta1, beta2, bias_correction, momentum_decay):
    """Count the step of each tensor; per tensor the factors of m and of g, and the one of sqrt(v), 0 for none."""
    tensors = addresses.shape[1]
    a, b, root = np.empty(tensors), np.zeros(tensors), np.empty(tensors)
    for t in range(tensors):
        step_at = array_at(addresses[row, t], 1, LIKE_SCALAR)
        step_at[0] += 1
        step = np.float64(step_at[0])
        correction1 = 1 - beta1**step if bias_correction else 1.0
        correction2 = 1 - beta2**step if bias_correction else 1.0
        a[t] = lr / correction1
        root[t] = 1 / np.sqrt(correction2)
        if rule == NADAM:
            product_at = array_at(addresses[row + 1, t], 1, LIKE_SCALAR)
            mu = beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
            mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
            product_at[0] *= mu
            product = np.float64(product_at[0])
            a[t] = lr * mu_next / (1 - product * mu_next)
            b[t] = lr * (1 - mu) / (1 - product)
        if rule == RADAM:
            rho_inf = 2 / (1 - beta2) - 1
            rho = rho_inf - 2 * step * beta2**step / correction2
            if rho > 5:
                squared = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
                a[t] *= np.sqrt(squared * correction2)
                root[t] = 1.0
            else:
                root[t] = 0.0
    return a, b, root


@numba.njit(parallel=True, cache=True, error_model="numpy")
def adam(
    addresses, chunks, like, options, maximize, weight_decay, decoupled, lr, rule, amsgrad, beta1, beta2, eps,
    bias_correction, momentum_decay,
):  # fmt: skip
    """One step for every tensor of the table.

    Args:
        addresses: int64 (rows, tensors), see kernels/triton/adam.py.
        chunks: int64 (chunks, 3): tensor, first element, number of elements.
        like: an empty array with the dtype of the tensors.
        options: of `multi_tensor.finish`.
        rule: ADAM, NADAM or RADAM.
    """
    real = like.dtype.type
    row = addresses.shape[0] - (2 if rule == NADAM else 1)
    a, b, root = _advance(addresses, row, rule, lr, beta1, beta2, bias_correction, momentum_decay)
    sign = -1 if maximize else 1
    l2 = 0.0 if decoupled else weight_decay
    keep = 1 - lr * weight_decay if decoupled else 1.0
    for k in numba.prange(chunks.shape[0]):
        t, start, n = chunks[k, 0], chunks[k, 1], chunks[k, 2]
        offset = start * like.itemsize
        p = array_at(addresses[0, t] + offset, n, like)
        g = gradient_of(addresses, t, start, n, like, sign, options)
        m = array_at(addresses[2, t] + offset, n, like)
        v = array_at(addresses[3, t] + offset, n, like)
        s, d, o = real(sign), real(l2), real(keep)
        w1, b1, w2, b2 = real(1 - beta1), real(beta1), real(1 - beta2), real(beta2)
        if rule == NADAM:
            _nadam(p, g, m, v, s, d, o, w1, b1, w2, b2, real(a[t]), real(b[t]), real(root[t]), real(eps))
        elif root[t] == 0:
            _unrectified(p, g, m, v, s, d, o, w1, b1, w2, b2, real(a[t]))
        elif amsgrad:
            w = array_at(addresses[4, t] + offset, n, like)
            _amsgrad(p, g, m, v, w, s, d, o, w1, b1, w2, b2, real(a[t]), real(root[t]), real(eps))
        else:
            _adam(p, g, m, v, s, d, o, w1, b1, w2, b2, real(a[t]), real(root[t]), real(eps))
        finish(addresses, t, start, n, like, options)
