"""Mean and variance per channel from sums about a pivot, exact also where the pivot was far from the mean.

With scale_ptr also batch norm's vectors, the running statistics and the count of batches, in the same launch.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.batch_norm_affine import store_affine
from fastcnn.kernels.triton.common import accumulator


@triton.jit
def statistics(
    y_ptr, sums_ptr, pivot_ptr, c, inside, M, P, Q, C, slabs, stride_n, stride_c, stride_p, stride_q,
    FAR: tl.constexpr, INT64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """mean, var and M in their dtype, of the channels c: see batch_statistics_kernel."""
    slab = tl.arange(0, AT_ONCE)
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    first = tl.zeros((AT_ONCE, BLOCK_C), dtype=ACC)
    second = tl.zeros((AT_ONCE, BLOCK_C), dtype=ACC)
    for start in range(0, slabs, AT_ONCE):
        rows = sums_ptr + ((start + slab) * (2 * C))[:, None] + c[None, :]
        there = (start + slab < slabs)[:, None] & inside[None, :]
        first += tl.load(rows, mask=there, other=0.0)
        second += tl.load(rows + C, mask=there, other=0.0)
    count = M.to(ACC)
    total = tl.sum(first, axis=0)
    squares = tl.sum(second, axis=0)
    distance = total / count
    mean = tl.load(pivot_ptr + c, mask=inside, other=0.0) + distance
    var = squares / count - distance * distance
    # also where rounding or overflow made the variance negative or NaN; not where y itself holds Inf or NaN
    finite = (tl.abs(total) < float("inf")) & (tl.abs(squares) < float("inf"))
    far = finite & inside & ~(distance * distance <= FAR * var)
    if tl.max(far.to(tl.int32), axis=0) > 0:
        columns = c
        step = tl.arange(0, BLOCK_M)
        end = M
        if INT64:
            columns = c.to(tl.int64)
            step = step.to(tl.int64)
            end = M.to(tl.int64)
        # about the mean that the sums gave, in fp64: rare, and right however long the sums are
        about = mean.to(tl.float64)[None, :]
        first_again = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float64)
        second_again = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float64)
        for m0 in range(0, end, BLOCK_M):
            m = m0 + step
            rows = y_ptr + m // (P * Q) * stride_n + m % (P * Q) // Q * stride_p + m % Q * stride_q
            mask = (m < end)[:, None] & inside[None, :]
            y = accumulator(tl.load(rows[:, None] + (columns * stride_c)[None, :], mask=mask, other=0.0))
            d = tl.where(mask, y.to(tl.float64) - about, 0.0)
            first_again += d
            second_again += d * d
        rest = tl.sum(first_again, axis=0) / count
        exact = tl.sum(second_again, axis=0) / count - rest * rest
        mean = tl.where(far, (mean.to(tl.float64) + rest).to(ACC), mean)
        var = tl.where(far, tl.where(exact < 0.0, 0.0, exact).to(ACC), var)
    return mean, var, count


@triton.jit(do_not_specialize=["M", "P", "Q", "slabs"])
def batch_statistics_kernel(
    y_ptr,
    sums_ptr,  # [slabs, 2, C]: of y - pivot, and of its square
    pivot_ptr,
    mean_ptr,
    var_ptr,  # or None
    weight_ptr,  # this one and those below, but for numbers: see store_affine
    bias_ptr,
    scale_ptr,
    shift_ptr,
    invstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    offset_ptr,
    batches_ptr,
    M,  # N * P * Q
    P,
    Q,
    C,
    slabs,
    stride_n,
    stride_c,
    stride_p,
    stride_q,
    momentum,
    momentum_rest,
    EPS: tl.constexpr,
    FAR: tl.constexpr,  # (mean - pivot)^2 / variance from which the sums are not trusted
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    # one program computes BLOCK_C channels; only where one of them had a bad pivot does it read their pixels again
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    mean, var, count = statistics(
        y_ptr, sums_ptr, pivot_ptr, c, inside, M, P, Q, C, slabs, stride_n, stride_c, stride_p, stride_q,
        FAR, INT64, BLOCK_M, BLOCK_C, AT_ONCE,
    )  # fmt: skip
    tl.store(mean_ptr + c, mean, mask=inside)
    if var_ptr is not None:
        tl.store(var_ptr + c, var, mask=inside)
    if scale_ptr is not None:
        store_affine(
            c, inside, mean, var, count, weight_ptr, bias_ptr, scale_ptr, shift_ptr, invstd_ptr,
            running_mean_ptr, running_var_ptr, offset_ptr, batches_ptr, momentum, momentum_rest, EPS,
        )  # fmt: skip
