"""Norms of many tensors, always summed in the same order: the clipping coefficient and the ratios of LARS.

square_sums_kernel leaves one partial sum per chunk (table and chunks: multi_tensor.py), in fp64; then one launch of
clip_kernel or lars_kernel adds them up.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.multi_tensor import load, tensor_at


@triton.jit
def _square_sum(pointer, last, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if last >= BLOCK:
        x = load(pointer, i, last, True)
    else:
        x = load(pointer, i, last, False)
    return tl.sum(x * x, axis=0).to(tl.float64)


@triton.jit(do_not_specialize=["T", "count"])
def square_sums_kernel(
    table_ptr,
    chunks_ptr,
    T,
    count,  # chunks
    sums_ptr,  # fp64 [count] of the gradients; then, if PARAMETERS, [count] of the parameters
    PARAMETERS: tl.constexpr,
    SIZES: tl.constexpr,  # the row of the table that holds the numbers of elements
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program sums the squares of one chunk of one tensor
    pid = tl.program_id(0)
    t = tl.load(chunks_ptr + 2 * pid)
    start = tl.load(chunks_ptr + 2 * pid + 1).to(tl.int64) * BLOCK
    last = tl.load(table_ptr + SIZES * T + t) - start
    g_ptr = tensor_at(table_ptr, 1, T, t, start, DTYPE, ALIGNED)
    tl.store(sums_ptr + pid, _square_sum(g_ptr, last, BLOCK))
    if PARAMETERS:
        p_ptr = tensor_at(table_ptr, 0, T, t, start, DTYPE, ALIGNED)
        tl.store(sums_ptr + count + pid, _square_sum(p_ptr, last, BLOCK))


@triton.jit
def _total(sums_ptr, start, end, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for k in range(start, end, BLOCK):
        i = k + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + i, mask=i < end, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["count"])
def clip_kernel(sums_ptr, count, grad_scale_ptr, max_norm: tl.float64, clip_ptr, BLOCK: tl.constexpr):
    # one program: clip[0] is the factor that brings all gradients below max_norm, at most 1; clip[1] is their norm
    norm = tl.sqrt(_total(sums_ptr, 0, count, BLOCK))
    if grad_scale_ptr is not None:
        norm = norm / tl.load(grad_scale_ptr).to(tl.float64)
    factor = max_norm / (norm + 1e-6)
    tl.store(clip_ptr, tl.where(factor > 1.0, 1.0, factor))
    tl.store(clip_ptr + 1, norm)


@triton.jit(do_not_specialize=["count"])
def lars_kernel(
    sums_ptr,  # of square_sums_kernel with PARAMETERS
    starts_ptr,  # int32 [T + 1]: the first chunk of each tensor
    count,
    ratios_ptr,  # fp64 [T]
    grad_scale_ptr,  # or None
    clip_ptr,  # or None
    trust: tl.float64,
    weight_decay: tl.float64,
    eps: tl.float64,
    BLOCK: tl.constexpr,
):
    # one program computes the ratio of one tensor: trust * |p| / (|g| + weight_decay * |p| + eps), 1 where a norm is 0
    t = tl.program_id(0)
    start = tl.load(starts_ptr + t)
    end = tl.load(starts_ptr + t + 1)
    g = tl.sqrt(_total(sums_ptr, start, end, BLOCK))
    p = tl.sqrt(_total(sums_ptr + count, start, end, BLOCK))
    if grad_scale_ptr is not None:
        g = g / tl.load(grad_scale_ptr).to(tl.float64)
    if clip_ptr is not None:
        g = g * tl.load(clip_ptr)
    tl.store(ratios_ptr + t, tl.where((g == 0) | (p == 0), 1.0, trust * p / (g + weight_decay * p + eps)))
