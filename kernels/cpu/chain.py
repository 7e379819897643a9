"""What the fused chain calls on CPU: the passes of pending.py, and batch norm's, on tensors given by their addresses.

A step makes hundreds of calls, on small images for less work than an array per tensor takes the host: an address costs
it next to nothing. Address 0: not there. Images lie flat in the layout that `rows`, N and C tell (pending.py), vectors
are [C], all of the dtype of the array `like`. `threads`: how many run, as PyTorch would.
"""

import numba
import numpy as np
from numba import types

from fastcnn.kernels.cpu import batch_norm, pending
from fastcnn.kernels.cpu.common import array_at

call = numba.njit(cache=True, error_model="numpy")
set_threads = types.ExternalFunction("set_num_threads", types.void(types.intc))  # numba's own checks cost more than it


@numba.njit(inline="always")
def there(address, size, like):
    return array_at(address, size if address != 0 else 0, like)


@call
def forward(
    like, threads, rows, N, C, size, x, scale, shift, kind, slope, gate, right, right_scale, right_shift, relu, z
):  # fmt: skip
    """z of pending.forward; gate [N, C]."""
    set_threads(threads)
    pending.forward(
        there(x, size, like), there(scale, C, like), there(shift, C, like), kind, slope, there(gate, N * C, like),
        there(right, size, like), there(right_scale, C, like), there(right_shift, C, like), relu, rows, N, C,
        there(z, size, like),
    )  # fmt: skip


@call
def backward(
    like, threads, rows, N, C, size, grad, add, x, scale, shift, kind, slope, gate, join, right, z, scaled,
    grad_x, grad_right, sums, right_sums, grad_gate,
):  # fmt: skip
    """grad_x, grad_right, sums, right_sums [2, C] and grad_gate [N, C] of pending.backward; right: for its sums."""
    set_threads(threads)
    total, right_total = np.zeros((2, C if sums != 0 else 0)), np.zeros((2, C if right_sums != 0 else 0))
    gate_total = np.zeros(N * C if grad_gate != 0 else 0)
    pending.backward(
        there(grad, size, like), there(add, size, like), there(x, size, like), there(scale, C, like),
        there(shift, C, like), kind, slope, there(gate, N * C, like), join, there(right, size, like), right != 0,
        there(z, size, like), scaled, rows, N, C, there(grad_x, size, like), there(grad_right, size, like),
        total, right_total, gate_total,
    )  # fmt: skip
    pending.copy(total.ravel(), there(sums, 2 * C, like))
    pending.copy(right_total.ravel(), there(right_sums, 2 * C, like))
    pending.copy(gate_total, there(grad_gate, N * C, like))


@call
def image_means(like, threads, rows, N, C, size, x, scale, shift, kind, slope, means):
    """means [N, C] of z over the pixels of every image."""
    set_threads(threads)
    sums = np.zeros(N * C)
    pending.image_sums(
        there(x, size, like), there(scale, C, like), there(shift, C, like), kind, slope, rows, N, C, sums
    )  # fmt: skip
    pending.copy(sums / (size // (N * C)), there(means, N * C, like))


@call
def correct(like, threads, rows, N, C, size, grad, y, a, b, c, dy):
    """dy of pending.correct."""
    set_threads(threads)
    pending.correct(
        there(grad, size, like), there(y, size, like), there(a, C, like), there(b, C, like), there(c, C, like),
        rows, N, C, there(dy, size, like),
    )  # fmt: skip


@call
def statistics(like, threads, rows, N, C, size, x, mean, var):
    """Mean and biased variance per channel."""
    set_threads(threads)
    record = np.empty((4, C))
    measure(there(x, size, like), rows, N, C, record, there(mean, C, like), there(var, C, like))
    pending.copy(record[3] / record[0], there(var, C, like))


@numba.njit
def measure(x, rows, N, C, record, mean, scratch):
    """batch_norm.py's record of x, and its mean."""
    none, no_mask, no_bound = np.empty(0, x.dtype), np.empty(0, np.uint8), np.nan
    if rows or C == 1:
        batch_norm.rows_forward(
            x, none, none, no_mask, none, none, mean, scratch, none, none, record, True, 0.0, 1.0, no_bound, no_bound
        )
    else:
        batch_norm.planes_forward(
            x, none, none, no_mask, none, none, mean, scratch, none, none, N, record, True, 0.0, 1.0, no_bound, no_bound
        )


@call
def normalise(
    like, threads, rows, N, C, size, y, weight, bias, eps, offset, running_mean, running_var, momentum,
    mean, scale, shift, invstd,
):  # fmt: skip
    """Batch norm of y as vectors: mean, scale, shift, invstd = 1 / sqrt(var + eps). Moves the running statistics.

    offset: what is missing in the mean of y, for the running one.
    """
    set_threads(threads)
    record = np.empty((4, C))
    measure(there(y, size, like), rows, N, C, record, there(mean, C, like), there(invstd, C, like))
    vectors(
        record[0, 0], record[1] + record[2], record[3] / record[0], there(weight, C, like), there(bias, C, like), eps,
        there(offset, C, like), there(running_mean, C, like), there(running_var, C, like), momentum,
        there(scale, C, like), there(shift, C, like), there(invstd, C, like),
    )  # fmt: skip


@call
def affine(
    like, C, count, mean, var, weight, bias, eps, offset, running_mean, running_var, momentum, scale, shift, invstd
):  # fmt: skip
    """The same, given mean and biased variance."""
    vectors(
        count, there(mean, C, like), there(var, C, like), there(weight, C, like), there(bias, C, like), eps,
        there(offset, C, like), there(running_mean, C, like), there(running_var, C, like), momentum,
        there(scale, C, like), there(shift, C, like), there(invstd, C, like),
    )  # fmt: skip


@numba.njit
def vectors(
    count, means, variances, weights, biases, eps, offsets, running_means, running_vars, momentum,
    scales, shifts, invstds,
):  # fmt: skip
    """scales, shifts and invstds of these statistics, and the running ones."""
    for c in range(means.size):
        exact, variance = float(means[c]), float(variances[c])
        inverse = 1.0 / np.sqrt(variance + eps)
        invstds[c] = inverse
        scales[c] = inverse * weights[c] if weights.size > 0 else inverse
        # of the scale as it was rounded
        shifts[c] = (biases[c] if biases.size > 0 else 0.0) - exact * scales[c]
        if running_means.size > 0:
            moved = exact + offsets[c] if offsets.size > 0 else exact
            running_means[c] = (1.0 - momentum) * running_means[c] + momentum * moved
            running_vars[c] = (1.0 - momentum) * running_vars[c] + momentum * (variance * count / (count - 1.0))


@call
def normalise_backward(
    like, threads, rows, N, C, size, grad, y, mean, invstd, weight, grad_scale, grad_shift, dy, grad_weight
):  # fmt: skip
    """dy and grad_weight of batch norm in training, given the sums of du * y and of du, where grad is du."""
    set_threads(threads)
    a, b, c = np.empty(C, like.dtype), np.empty(C, like.dtype), np.empty(C, like.dtype)
    coefficients(
        size // C, there(mean, C, like), there(invstd, C, like), there(weight, C, like), there(grad_scale, C, like),
        there(grad_shift, C, like), a, b, c, there(grad_weight, C, like),
    )  # fmt: skip
    pending.correct(there(grad, size, like), there(y, size, like), a, b, c, rows, N, C, there(dy, size, like))


@call
def correction(like, C, count, mean, invstd, weight, grad_scale, grad_shift, a, b, c, grad_weight):
    """a, b, c with which dy = grad * a + b * y + c, and grad_weight."""
    coefficients(
        count, there(mean, C, like), there(invstd, C, like), there(weight, C, like), there(grad_scale, C, like),
        there(grad_shift, C, like), there(a, C, like), there(b, C, like), there(c, C, like),
        there(grad_weight, C, like),
    )  # fmt: skip


@numba.njit
def coefficients(count, means, invstds, weights, products, sums, a, b, c, grad_weights):
    """a, b, c and grad_weights."""
    for k in range(means.size):
        inverse, total = float(invstds[k]), float(sums[k])
        of_weight = (float(products[k]) - float(means[k]) * total) * inverse
        scale = inverse * weights[k] if weights.size > 0 else inverse
        slope = -scale * inverse * of_weight / count
        a[k], b[k], c[k] = scale, slope, -scale * total / count - slope * means[k]
        grad_weights[k] = of_weight
