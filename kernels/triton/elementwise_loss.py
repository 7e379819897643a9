"""Losses that compare element by element: mse, smooth_l1 (l1 with BETA 0), huber, bce of logits.

fp32 inside (fp64 for fp64).
x and target lie in one memory order of any dense layout. A weight that belongs to dimensions side by side in memory is
read in place: element i has weight[i // inner % size]. Sums: each program one run of blocks, then loss_finalize_kernel.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.activation import sigmoid
from fastcnn.kernels.triton.common import accumulator


@triton.jit
def softplus_of_minus(x):
    """log(1 + exp(-x)), with all digits where that is small."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    # log(u) is off by what rounding u took from e: the factor puts it back (Kahan)
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x < 0, -x, 0.0) + log1p


@triton.jit
def element_loss(x, t, pos, POS: tl.constexpr, BETA: tl.constexpr, KIND: tl.constexpr):
    """The loss of each element; pos is bce's weight of positive targets."""
    if KIND == "bce":
        factor = 1.0 + (pos - 1.0) * t if POS else 1.0
        return (1.0 - t) * x + factor * softplus_of_minus(x)
    d = x - t
    if KIND == "mse":
        return d * d
    else:
        # comparisons let NaN through to the last branch
        d = tl.abs(d)
        if BETA == 0:
            return d
        elif KIND == "smooth_l1":
            return tl.where(d < BETA, 0.5 * d * d / BETA, d - 0.5 * BETA)
        else:
            tl.static_assert(KIND == "huber")
            return tl.where(d < BETA, 0.5 * d * d, BETA * (d - 0.5 * BETA))


@triton.jit
def element_slope(x, t, pos, POS: tl.constexpr, BETA: tl.constexpr, KIND: tl.constexpr):
    """Its derivative by x."""
    if KIND == "bce":
        if POS:
            return (1.0 - t) - (1.0 + (pos - 1.0) * t) * sigmoid(-x)
        else:
            return sigmoid(x) - t
    d = x - t
    if KIND == "mse":
        return 2.0 * d
    else:
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
        if BETA == 0:
            return sign
        elif KIND == "smooth_l1":
            return tl.where(tl.abs(d) > BETA, sign, d / BETA)
        else:
            return tl.where(tl.abs(d) > BETA, BETA * sign, d)


@triton.jit
def weight_at(ptr, i, inside, inner, size, FULL: tl.constexpr):
    return accumulator(tl.load(ptr + (i if FULL else i // inner % size), mask=inside, other=0.0))


@triton.jit
def elementwise_loss_forward_kernel(
    x_ptr, target_ptr, weight_ptr, pos_ptr, loss_ptr, total_ptr,
    numel, blocks, weight_inner, weight_size, pos_inner, pos_size,
    KIND: tl.constexpr, BETA: tl.constexpr, REDUCTION: tl.constexpr, DIVIDE_BY_WEIGHT: tl.constexpr,
    WEIGHT_FULL: tl.constexpr, POS_FULL: tl.constexpr, INT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program computes `blocks` blocks one after another; REDUCTION "partial": their sums for the finalize kernel
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    inside_dtype = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    loss_sum = tl.zeros([BLOCK], inside_dtype)
    divisor_sum = tl.zeros([BLOCK], inside_dtype)
    for block in range(blocks):
        i = (pid * blocks + block) * BLOCK + tl.arange(0, BLOCK)
        inside = i < numel
        x = accumulator(tl.load(x_ptr + i, mask=inside, other=0.0))
        t = accumulator(tl.load(target_ptr + i, mask=inside, other=0.0))
        pos = x
        if pos_ptr is not None:
            pos = weight_at(pos_ptr, i, inside, pos_inner, pos_size, POS_FULL)
        loss = element_loss(x, t, pos, pos_ptr is not None, BETA, KIND)
        divisor = tl.zeros_like(loss) + 1.0
        if weight_ptr is not None:
            weight = weight_at(weight_ptr, i, inside, weight_inner, weight_size, WEIGHT_FULL)
            loss *= weight
            if DIVIDE_BY_WEIGHT:
                divisor = weight
        if REDUCTION == "none":
            tl.store(loss_ptr + i, loss.to(loss_ptr.dtype.element_ty), mask=inside)
        else:
            loss_sum += tl.where(inside, loss, 0.0)
            divisor_sum += tl.where(inside, divisor, 0.0)
    if REDUCTION != "none":
        total_loss = tl.sum(loss_sum, axis=0)
        divisor = tl.sum(divisor_sum, axis=0)
        # partial sums lie side by side, (loss, divisor) per program
        at = tl.program_id(0) * 2 if REDUCTION == "partial" else 0
        if REDUCTION == "mean":
            total_loss = total_loss / divisor
        tl.store(loss_ptr + at, total_loss.to(loss_ptr.dtype.element_ty))
        tl.store(total_ptr + at, divisor)


@triton.jit
def elementwise_loss_backward_kernel(
    grad_ptr, x_ptr, target_ptr, weight_ptr, pos_ptr, total_ptr, dx_ptr, dtarget_ptr,
    numel, weight_inner, weight_size, pos_inner, pos_size,
    KIND: tl.constexpr, BETA: tl.constexpr, REDUCTION: tl.constexpr,
    WEIGHT_FULL: tl.constexpr, POS_FULL: tl.constexpr, INT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program computes BLOCK consecutive elements of dx and dtarget
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    x = accumulator(tl.load(x_ptr + i, mask=inside, other=0.0))
    t = accumulator(tl.load(target_ptr + i, mask=inside, other=0.0))
    if REDUCTION == "none":
        grad = accumulator(tl.load(grad_ptr + i, mask=inside, other=0.0)).to(x.dtype)
    else:
        grad = tl.zeros_like(x) + accumulator(tl.load(grad_ptr))
        if REDUCTION == "mean":
            if total_ptr is not None:
                grad /= tl.load(total_ptr)
            else:
                grad /= tl.zeros_like(x) + numel
    if weight_ptr is not None:
        grad *= weight_at(weight_ptr, i, inside, weight_inner, weight_size, WEIGHT_FULL)
    pos = x
    if pos_ptr is not None:
        pos = weight_at(pos_ptr, i, inside, pos_inner, pos_size, POS_FULL)
    slope = element_slope(x, t, pos, pos_ptr is not None, BETA, KIND)
    if dx_ptr is not None:
        tl.store(dx_ptr + i, (grad * slope).to(dx_ptr.dtype.element_ty), mask=inside)
    if dtarget_ptr is not None:
        if KIND == "bce":
            slope = x
            if pos_ptr is not None:
                slope -= (pos - 1.0) * softplus_of_minus(x)
        tl.store(dtarget_ptr + i, (-grad * slope).to(dtarget_ptr.dtype.element_ty), mask=inside)
