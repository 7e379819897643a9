"""Adam, AMSGrad and AdamW on many arrays at once, given by their addresses. Formulas: kernels/triton/adam.py."""

import numba
import numpy as np

from fastcnn.kernels.cpu.common import array_at


@numba.njit(error_model="numpy")
def _update(p, g, m, v, w, sign, step_size, inverse_root, beta1, weight1, beta2, weight2, eps, l2, keep, amsgrad):
    # every scalar has the dtype of the arrays: one Python number would make the whole loop run in fp64
    for i in range(p.size):
        gradient = sign * g[i]
        if l2 != 0:
            gradient += l2 * p[i]
        # interpolation from the nearer end, as torch.lerp
        if weight1 < 0.5:
            m_i = m[i] + weight1 * (gradient - m[i])
        else:
            m_i = gradient - beta1 * (gradient - m[i])
        v_i = beta2 * v[i] + weight2 * gradient * gradient
        m[i] = m_i
        v[i] = v_i
        if amsgrad:
            if v_i > w[i] or v_i != v_i:
                w[i] = v_i
            v_i = w[i]
        p[i] = keep * p[i] - step_size * (m_i / (np.sqrt(v_i) * inverse_root + eps))


@numba.njit(parallel=True, cache=True, error_model="numpy")
def adam(addresses, chunks, like, like_step, lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize):
    """One step for every tensor of the table.

    Args:
        addresses: int64 (rows, tensors): parameter, gradient, exp_avg, exp_avg_sq, max_exp_avg_sq if amsgrad, step.
        chunks: int64 (chunks, 3): tensor, first element, number of elements.
        like: an empty array with the dtype of the tensors; like_step: of the steps.
    """
    real = like.dtype.type
    tensors = addresses.shape[1]
    step_sizes = np.empty(tensors)
    inverse_roots = np.empty(tensors)
    for t in range(tensors):
        step = array_at(addresses[5 if amsgrad else 4, t], 1, like_step)
        step[0] += 1
        step_sizes[t] = lr / (1 - beta1 ** step[0])
        inverse_roots[t] = 1 / np.sqrt(1 - beta2 ** step[0])
    l2 = 0.0 if decoupled else weight_decay
    keep = 1 - lr * weight_decay if decoupled else 1.0
    for k in numba.prange(chunks.shape[0]):
        t, n = chunks[k, 0], chunks[k, 2]
        offset = chunks[k, 1] * like.itemsize
        _update(
            array_at(addresses[0, t] + offset, n, like),
            array_at(addresses[1, t] + offset, n, like),
            array_at(addresses[2, t] + offset, n, like),
            array_at(addresses[3, t] + offset, n, like),
            array_at(addresses[4 if amsgrad else 3, t] + offset, n, like),
            real(-1 if maximize else 1),
            real(step_sizes[t]),
            real(inverse_roots[t]),
            real(beta1),
            real(1 - beta1),
            real(beta2),
            real(1 - beta2),
            real(eps),
            real(l2),
            real(keep),
            amsgrad,
        )
