"""Cross entropy of logits, loss = sum over classes of q * (logsumexp(x) - x). fp32 inside (fp64 for fp64).

q is the target as a distribution, class weights and smoothing included: for a class index t it is
(1 - smoothing) * weight at t plus smoothing / C * weight everywhere, for class probabilities p it is
weight * (p * (1 - smoothing) + smoothing / C). dloss/dx = mass * softmax(x) - q with mass = sum of q.

Row r = (n, s) of class c lies at n * stride_n + s * stride_s + c * stride_c; a tile is [BLOCK_R rows, BLOCK_C classes].
C, stride_n and stride_s arrive divided by VEC, which tells the compiler how many classes one access may take.
Sums over rows go program by program to memory and are merged in order: same bits on every run.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.loss_reduction import store_reduced


@triton.jit
def rows_of(inner, stride_n, stride_s, INT64: tl.constexpr, BLOCK_R: tl.constexpr):
    """Numbers of this program's rows, and where they begin."""
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    r = pid * BLOCK_R + tl.arange(0, BLOCK_R)
    return r, (r // inner) * stride_n + (r % inner) * stride_s


@triton.jit
def class_weight(weight_ptr, c, inside, like):
    """weight[c], 1 without weights, 0 outside."""
    if weight_ptr is not None:
        return accumulator(tl.load(weight_ptr + c, mask=inside, other=0.0))
    else:
        return tl.where(inside, tl.zeros_like(like) + 1.0, 0.0)


@triton.jit
def class_index(target_ptr, r, rows, C, ignore_index):
    """Target of each row, whether it counts, and whether it is a class at all."""
    t = tl.load(target_ptr + r, mask=r < rows, other=0).to(tl.int64)
    counts = (t != ignore_index) & (r < rows)
    known = (t >= 0) & (t < C)
    tl.device_assert(known | (t == ignore_index), "cross_entropy: target is no class and not ignore_index")
    return t, counts, known


@triton.jit
def cross_entropy_forward_kernel(
    x_ptr, target_ptr, weight_ptr, loss_ptr, total_ptr, lse_ptr, mass_ptr,
    rows, C, inner, stride_n, stride_s, stride_c, ignore_index, smoothing, smoothing_rest,
    REDUCTION: tl.constexpr, SOFT: tl.constexpr, SMOOTH: tl.constexpr, INT64: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program computes the losses of BLOCK_R rows; REDUCTION "partial": their sums for the finalize kernel
    C, stride_n, stride_s = C * VEC, stride_n * VEC, stride_s * VEC
    r, row = rows_of(inner, stride_n, stride_s, INT64, BLOCK_R)
    exists = r < rows

    # logsumexp in one walk: the sum is scaled down whenever the maximum grows
    top = tl.zeros([BLOCK_R], lse_ptr.dtype.element_ty) - float("inf")
    total = tl.zeros_like(top)
    for begin in range(0, C, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        if INT64:
            c = c.to(tl.int64)
        inside = exists[:, None] & (c < C)[None, :]
        x = accumulator(tl.load(x_ptr + row[:, None] + (c * stride_c)[None, :], mask=inside, other=-float("inf")))
        new_top = tl.maximum(top, tl.max(x, axis=1))
        # all -inf so far: nothing to subtract. NaN is dropped by the maximum and caught by the sum
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)
        top = new_top
    # logsumexp = top + log_total; added up, the digits that matter would be rounded off where logits are large
    log_total = tl.log(total)

    if SOFT:
        counts = exists
        divisor = tl.where(exists, tl.zeros_like(top) + 1.0, 0.0)
        loss = tl.zeros_like(top)
        mass = tl.zeros_like(top)
    else:
        t, counts, known = class_index(target_ptr, r, rows, C, ignore_index)
        at_target = accumulator(tl.load(x_ptr + row + t * stride_c, mask=counts & known, other=0.0))
        divisor = class_weight(weight_ptr, t, counts & known, top)
        # no class: NaN, for a kernel cannot raise
        divisor = tl.where(known, divisor, float("nan"))
        mass = divisor
        if SMOOTH:
            mass *= 1.0 - (tl.zeros_like(top) + smoothing + smoothing_rest)
        loss = mass * (top - at_target + log_total)

    if SOFT or SMOOTH:
        for begin in range(0, C, BLOCK_C):
            c = begin + tl.arange(0, BLOCK_C)
            if INT64:
                c = c.to(tl.int64)
            inside = exists[:, None] & (c < C)[None, :]
            offset = row[:, None] + (c * stride_c)[None, :]
            x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
            q = tl.zeros_like(x)
            if SMOOTH:
                even = tl.zeros_like(x) + smoothing + smoothing_rest
                q += even / C
            if SOFT:
                p = accumulator(tl.load(target_ptr + offset, mask=inside, other=0.0)).to(x.dtype)
                q += p * (1.0 - even) if SMOOTH else p
            if weight_ptr is not None:
                q *= accumulator(tl.load(weight_ptr + c, mask=c < C, other=0.0))[None, :]
            mass += tl.sum(tl.where(inside, q, 0.0), axis=1)
            loss += tl.sum(tl.where(inside, q * (top[:, None] - x + log_total[:, None]), 0.0), axis=1)

    # ignored rows: 0 whatever their logits
    loss = tl.where(counts, loss, 0.0)
    mass = tl.where(counts, mass, 0.0)
    divisor = tl.where(counts, divisor, 0.0)
    tl.store(lse_ptr + r, top, mask=exists)
    tl.store(lse_ptr + rows + r, log_total, mask=exists)
    tl.store(mass_ptr + r, mass, mask=exists)
    if REDUCTION == "none":
        tl.store(loss_ptr + r, loss.to(loss_ptr.dtype.element_ty), mask=exists)
    else:
        # partial sums lie side by side, (loss, divisor) per program
        at = tl.program_id(0) * 2 if REDUCTION == "partial" else 0
        store_reduced(loss_ptr + at, total_ptr + at, tl.sum(loss, axis=0), tl.sum(divisor, axis=0), REDUCTION)


@triton.jit
def cross_entropy_backward_kernel(
    grad_ptr, x_ptr, target_ptr, weight_ptr, lse_ptr, mass_ptr, total_ptr, dx_ptr,
    rows, C, inner, stride_n, stride_s, stride_c, ignore_index, smoothing, smoothing_rest,
    REDUCTION: tl.constexpr, SOFT: tl.constexpr, SMOOTH: tl.constexpr, INT64: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program computes dx of BLOCK_R rows and BLOCK_C classes
    C, stride_n, stride_s = C * VEC, stride_n * VEC, stride_s * VEC
    r, row = rows_of(inner, stride_n, stride_s, INT64, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = r < rows
    if INT64:
        c = c.to(tl.int64)
    offset = row[:, None] + (c * stride_c)[None, :]
    inside = exists[:, None] & (c < C)[None, :]
    top = tl.load(lse_ptr + r, mask=exists, other=0.0)
    log_total = tl.load(lse_ptr + rows + r, mask=exists, other=0.0)
    mass = tl.load(mass_ptr + r, mask=exists, other=0.0)
    if REDUCTION == "none":
        grad = accumulator(tl.load(grad_ptr + r, mask=exists, other=0.0)).to(top.dtype)
    else:
        grad = tl.zeros_like(top) + accumulator(tl.load(grad_ptr))
        if REDUCTION == "mean":
            grad /= tl.load(total_ptr)
    x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
    q = tl.zeros_like(x)
    if SMOOTH:
        even = tl.zeros_like(x) + smoothing + smoothing_rest
        q += even / C
    if SOFT:
        p = accumulator(tl.load(target_ptr + offset, mask=inside, other=0.0)).to(x.dtype)
        q += p * (1.0 - even) if SMOOTH else p
    else:
        t, counts, known = class_index(target_ptr, r, rows, C, ignore_index)
        one = t[:, None] == c[None, :]
        q += tl.where(one, 1.0 - even if SMOOTH else tl.zeros_like(x) + 1.0, 0.0)
        q = tl.where(counts[:, None], q, 0.0)
        # an ignored row has no gradient, also where the mean divides by 0
        grad = tl.where(counts, grad, 0.0)
    if weight_ptr is not None:
        q *= accumulator(tl.load(weight_ptr + c, mask=c < C, other=0.0))[None, :]
    dx = grad[:, None] * (mass[:, None] * tl.exp(x - top[:, None] - log_total[:, None]) - q)
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
