"""The second pass of every loss's sum: partial sums of all programs, added in order. Same bits on every run."""

import triton
import triton.language as tl


@triton.jit
def store_reduced(loss_ptr, total_ptr, loss, divisor, REDUCTION: tl.constexpr):
    """Store the loss, divided for the mean, and what it was divided by."""
    if REDUCTION == "mean":
        loss = loss / divisor
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    tl.store(total_ptr, divisor)


@triton.jit
def loss_finalize_kernel(partial_ptr, loss_ptr, total_ptr, programs, REDUCTION: tl.constexpr, BLOCK: tl.constexpr):
    # one program adds the partial sums of all, pairs (loss, divisor)
    loss = tl.zeros([BLOCK], partial_ptr.dtype.element_ty)
    divisor = tl.zeros_like(loss)
    for begin in range(0, programs, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        loss += tl.load(partial_ptr + 2 * i, mask=i < programs, other=0.0)
        divisor += tl.load(partial_ptr + 2 * i + 1, mask=i < programs, other=0.0)
    store_reduced(loss_ptr, total_ptr, tl.sum(loss, axis=0), tl.sum(divisor, axis=0), REDUCTION)
