"""SGD on many arrays at once, given by their addresses. Formulas: kernels/triton/sgd.py."""

import numba

from fastcnn.kernels.cpu.common import array_at


@numba.njit(error_model="numpy")
def _update(p, g, b, sign, lr, momentum, weight, weight_decay, nesterov, use_momentum, first):
    # every scalar has the dtype of the arrays: one Python number would make the whole loop run in fp64
    for i in range(p.size):
        gradient = sign * g[i]
        if weight_decay != 0:
            gradient += weight_decay * p[i]
        if use_momentum:
            b_i = gradient if first else momentum * b[i] + weight * gradient
            b[i] = b_i
            gradient = gradient + momentum * b_i if nesterov else b_i
        p[i] -= lr * gradient


@numba.njit(parallel=True, cache=True, error_model="numpy")
def sgd(addresses, chunks, like, lr, momentum, dampening, weight_decay, nesterov, maximize):
    """One step for every tensor of the table.

    Args:
        addresses: int64 (rows, tensors): parameter, gradient, momentum buffer if momentum is not 0, 1 where that holds
            nothing yet.
        chunks: int64 (chunks, 3): tensor, first element, number of elements.
        like: an empty array with the dtype of the tensors.
    """
    real = like.dtype.type
    use_momentum = momentum != 0
    for k in numba.prange(chunks.shape[0]):
        t, n = chunks[k, 0], chunks[k, 2]
        offset = chunks[k, 1] * like.itemsize
        _update(
            array_at(addresses[0, t] + offset, n, like),
            array_at(addresses[1, t] + offset, n, like),
            array_at(addresses[2 if use_momentum else 0, t] + offset, n, like),
            real(-1 if maximize else 1),
            real(lr),
            real(momentum),
            real(1 - dampening),
            real(weight_decay),
            nesterov,
            use_momentum,
            addresses[addresses.shape[0] - 1, t] != 0,
        )
