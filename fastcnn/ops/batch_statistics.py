"""Mean and variance of a batch per channel, from the sums that a convolution leaves: batch norm's statistics.

    d = y - pivot        mean = pivot + sum d / M        var = sum d^2 / M - (sum d / M)^2        M = N * P * Q

y [N, C, P, Q], any strides; pivot, mean, var [C] in fp32 (fp64 for fp64). conv2d_forward(pivot=) takes the sums while
it stores y. The difference cancels where the pivot is many standard deviations from the mean: there, which is rare with
running means as pivots, y is read again. Torch counterpart: torch.var_mean(correction=0). Source: Chan, Golub and
LeVeque, Algorithms for computing the sample variance, 1983 (shifted data).
"""

import torch

from fastcnn.ops import common
from fastcnn.ops.conv2d_gather import kernel_strides, needs_int64

# (mean - pivot)^2 / var up to which the sums are used: the variance then loses 6 of fp32's 24 bits, which 16-bit images
# do not have, of fp32 images 2
FAR, FAR_OF_FP32 = 64.0, 4.0
BLOCK_M, BLOCK_C = 128, 16


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
    c = y.shape[1]
    if tuple(sums.shape[-2:]) != (2, c) or sums.dim() > 3 or tuple(pivot.shape) != (c,):
        raise ValueError(
            f"sums must have shape (2, {c}) or (S, 2, {c}) and pivot ({c},), as y has {c} channels, got "
            f"{tuple(sums.shape)} and {tuple(pivot.shape)}"
        )
    return (_triton if backend == "triton" else _torch)(y, sums.contiguous(), pivot.contiguous())


def _far(y):
    return FAR_OF_FP32 if y.dtype == torch.float32 else FAR


def _triton(y, sums, pivot):
    from fastcnn.kernels.triton.batch_statistics import batch_statistics_kernel

    n, c, p, q = y.shape
    mean, var = torch.empty_like(pivot), torch.empty_like(pivot)
    with common.device_guard(y):
        batch_statistics_kernel[(-(-c // BLOCK_C),)](
            *(y, sums, pivot, mean, var, n * p * q, p, q, c, sums.numel() // (2 * c)),
            *kernel_strides(y),
            FAR=_far(y),
            INT64=needs_int64(n * p * q, y),
            BLOCK_M=BLOCK_M,
            BLOCK_C=BLOCK_C,
        )
    return mean, var


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
