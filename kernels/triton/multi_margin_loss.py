"""Multi-class hinge loss of a row, w[t] / C * sum over c != t of max(0, margin - x[t] + x[c]) ** P. fp32 inside.

x is [rows, C], contiguous. C arrives divided by VEC, which tells the compiler how many classes one access may take.
A tile is [BLOCK_R rows, BLOCK_C classes]. NaN is no violation, as in PyTorch.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.loss_reduction import store_reduced


@triton.jit
def rows_of(target_ptr, x_ptr, weight_ptr, rows, C, INT64: tl.constexpr, BLOCK_R: tl.constexpr):
    """This program's rows, where they begin, their targets, x[t], and w[t] / C, which is NaN where t is no class."""
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    r = pid * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = r < rows
    t = tl.load(target_ptr + r, mask=exists, other=0)
    known = (t >= 0) & (t < C)
    tl.device_assert(known, "multi_margin_loss: target is no class")
    at_target = accumulator(tl.load(x_ptr + r * C + t, mask=exists & known, other=0.0))
    share = tl.zeros_like(at_target) + 1.0
    if weight_ptr is not None:
        share = accumulator(tl.load(weight_ptr + t, mask=exists & known, other=0.0))
    # no class: NaN, for a kernel cannot raise
    return r, r * C, t, at_target, tl.where(known, share / C, float("nan"))


@triton.jit
def gaps(x_ptr, row, begin, t, at_target, exists, C, MARGIN: tl.constexpr, INT64: tl.constexpr, BLOCK_C: tl.constexpr):
    """margin - x[t] + x[c] of the tile where that is positive and c is not t, else 0; offsets, classes and mask."""
    c = begin + tl.arange(0, BLOCK_C)
    if INT64:
        c = c.to(tl.int64)
    inside = exists[:, None] & (c < C)[None, :]
    offset = row[:, None] + c[None, :]
    x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
    gap = MARGIN - at_target[:, None] + x
    violates = (gap > 0) & inside & (c[None, :] != t[:, None])
    return tl.where(violates, gap, 0.0), offset, c, inside


@triton.jit
def multi_margin_loss_forward_kernel(
    x_ptr, target_ptr, weight_ptr, loss_ptr, total_ptr, rows, C,
    P: tl.constexpr, MARGIN: tl.constexpr, REDUCTION: tl.constexpr, INT64: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program computes the losses of BLOCK_R rows; REDUCTION "partial": their sums for the finalize kernel
    C = C * VEC
    r, row, t, at_target, share = rows_of(target_ptr, x_ptr, weight_ptr, rows, C, INT64, BLOCK_R)
    exists = r < rows
    loss = tl.zeros_like(at_target)
    for begin in range(0, C, BLOCK_C):
        gap, _, _, _ = gaps(x_ptr, row, begin, t, at_target, exists, C, MARGIN, INT64, BLOCK_C)
        loss += tl.sum(gap * gap if P == 2 else gap, axis=1)
    loss *= share
    if REDUCTION == "none":
        tl.store(loss_ptr + r, loss.to(loss_ptr.dtype.element_ty), mask=exists)
    else:
        # partial sums lie side by side, (loss, rows) per program
        at = tl.program_id(0) * 2 if REDUCTION == "partial" else 0
        one = tl.where(exists, tl.zeros_like(loss) + 1.0, 0.0)
        loss = tl.sum(tl.where(exists, loss, 0.0), axis=0)
        store_reduced(loss_ptr + at, total_ptr + at, loss, tl.sum(one, axis=0), REDUCTION)


@triton.jit
def slope(gap, P: tl.constexpr):
    return 2.0 * gap if P == 2 else tl.where(gap > 0, gap * 0.0 + 1.0, 0.0)


@triton.jit
def multi_margin_loss_backward_kernel(
    grad_ptr, x_ptr, target_ptr, weight_ptr, dx_ptr, rows, C,
    P: tl.constexpr, MARGIN: tl.constexpr, REDUCTION: tl.constexpr, INT64: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program computes dx of BLOCK_R rows: the sum of a row's slopes, which is the target's gradient, then all
    C = C * VEC
    r, row, t, at_target, share = rows_of(target_ptr, x_ptr, weight_ptr, rows, C, INT64, BLOCK_R)
    exists = r < rows
    if REDUCTION == "none":
        grad = accumulator(tl.load(grad_ptr + r, mask=exists, other=0.0)).to(share.dtype)
    else:
        grad = tl.zeros_like(share) + accumulator(tl.load(grad_ptr))
        if REDUCTION == "mean":
            grad /= tl.zeros_like(share) + rows
    grad *= share
    at = tl.zeros_like(share)
    for begin in range(0, C, BLOCK_C):
        gap, _, _, _ = gaps(x_ptr, row, begin, t, at_target, exists, C, MARGIN, INT64, BLOCK_C)
        at += tl.sum(slope(gap, P), axis=1)
    for begin in range(0, C, BLOCK_C):
        gap, offset, c, inside = gaps(x_ptr, row, begin, t, at_target, exists, C, MARGIN, INT64, BLOCK_C)
        dx = tl.where(c[None, :] == t[:, None], -at[:, None], slope(gap, P)) * grad[:, None]
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
