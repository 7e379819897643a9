"""Mean and variance of a batch per channel, from the sums that a convolution leaves: batch norm's statistics.

    d = y - pivot        mean = pivot + sum d / M        var = sum d^2 / M - (sum d / M)^2        M = N * P * Q

y [N, C, P, Q], any strides; pivot, mean, var [C] in fp32 (fp64 for fp64). conv2d_forward(pivot=) takes the sums while
it stores y. The difference cancels where the pivot is many standard deviations from the mean: there, which is rare with
running means as pivots, y is read again. Torch counterpart: torch.var_mean(correction=0). Source: Chan, Golub and
LeVeque, Algorithms for computing the sample variance, 1983 (shifted data).
"""

import torch

from fastcnn.ops import batch_norm_affine, common, conv_sums
from fastcnn.ops.conv2d_gather import kernel_strides, needs_int64

# (mean - pivot)^2 / var up to which the sums are used: the variance then loses 6 of fp32's 24 bits, which 16-bit images
# do not have, of fp32 images 2
FAR, FAR_OF_FP32 = 64.0, 4.0
BLOCK_M = 256


def batch_statistics_reference(y):
    """(mean, var) [C] in plain PyTorch, in the dtype of y."""
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    return mean, var


def from_sums(y, sums, pivot, backend="triton"):
    """(mean, var) [C] of y [N, C, P, Q], biased.

    Args:
        sums: [2, C] or, to be added up, [S, 2, C]: of y - pivot and of its square over everything but the channels.
        pivot: [C]; dtype of sums, mean and var.

    Raises:
        ValueError: sums or pivot do not have the channels of y.
    """
    _check(y, sums, pivot)
    if backend != "triton":
        return _torch(y, sums, pivot)
    mean, var = torch.empty_like(pivot), torch.empty_like(pivot)
    _launch(y, sums, pivot, mean, var)
    return mean, var


def affine_from_sums(y, sums, pivot, weight, bias, eps, backend="triton", running=None):
    """(mean, scale, shift, 1 / sqrt(var + eps)): from_sums and batch_norm_affine.affine, where possible in one launch.

    Args:
        running: the batch_norm_affine.Running that is moved, or None; its rows are those of y.
    """
    running = batch_norm_affine.Running() if running is None else running
    if backend != "triton" or not running.fits_kernels(y):
        mean, var = from_sums(y, sums, pivot, backend)
        return mean, *batch_norm_affine.affine(mean, var, weight, bias, eps, backend, running)
    _check(y, sums, pivot)
    mean, *vectors = (torch.empty_like(pivot) for _ in range(4))
    weight, bias = (None if vector is None else vector.contiguous() for vector in (weight, bias))
    moved, momentum = running.in_kernels()
    _launch(y, sums, pivot, mean, None, (weight, bias, *vectors, *moved), momentum, eps)
    running.changed()
    return mean, *vectors


def _check(y, sums, pivot):
    c = y.shape[1]
    if tuple(sums.shape[-2:]) != (2, c) or sums.dim() > 3 or tuple(pivot.shape) != (c,):
        raise ValueError(
            f"sums must have shape (2, {c}) or (S, 2, {c}) and pivot ({c},), as y has {c} channels, got "
            f"{tuple(sums.shape)} and {tuple(pivot.shape)}"
        )


def _far(y):
    return FAR_OF_FP32 if y.dtype == torch.float32 else FAR


def _launch(y, sums, pivot, mean, var, affine=(None,) * 9, momentum=(0.0, 0.0), eps=0.0):
    from fastcnn.kernels.triton.batch_statistics import batch_statistics_kernel

    n, c, p, q = y.shape
    with common.device_guard(y):
        batch_statistics_kernel[(-(-c // conv_sums.COLUMNS),)](
            *(y, sums.contiguous(), pivot.contiguous(), mean, var, *affine),
            *(n * p * q, p, q, c, sums.numel() // (2 * c)),
            *(*kernel_strides(y), *momentum),
            EPS=eps,
            **launch_options(y),
        )


def launch_options(y):
    """How kernels that call kernels/triton/batch_statistics.statistics of images y are compiled and launched."""
    return dict(
        FAR=_far(y),
        INT64=needs_int64(y.numel() // y.shape[1], y),
        BLOCK_M=BLOCK_M,
        BLOCK_C=conv_sums.COLUMNS,
        AT_ONCE=conv_sums.AT_ONCE,
        num_warps=conv_sums.WARPS,
        # left to itself, the assembler takes 64 or 80 and spills, for the sake of more programs than there are
        maxnreg=128,
    )


def _torch(y, sums, pivot):
    total, squares = sums if sums.dim() == 2 else sums.sum(0)
    rows = y.numel() // y.shape[1]
    distance = total / rows
    mean, var = pivot + distance, squares / rows - distance * distance
    far = total.isfinite() & squares.isfinite() & ~(distance * distance <= _far(y) * var)
    if far.any():
        exact = batch_statistics_reference(y[:, far].double())
        mean[far], var[far] = (t.to(mean.dtype) for t in exact)
    return mean, var
