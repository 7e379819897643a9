"""Sums in an order that never changes: over pixels (the gradient of a bias) and over the slabs that programs leave."""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator


@triton.jit(do_not_specialize=["M", "P", "Q", "share"])
def conv2d_backward_bias_kernel(
    dy_ptr,
    db_ptr,
    M,  # N * P * Q
    P,
    Q,
    K,
    share,  # pixels per program, a multiple of BLOCK_M
    stride_yn,
    stride_yk,
    stride_yp,
    stride_yq,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # one program sums its share of the pixels for BLOCK_N filters. db has one slab per share, as the weight's gradient
    ACC: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    k = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split = pid // tiles_n
    step = tl.arange(0, BLOCK_M)
    if INT64:
        step = step.to(tl.int64)
        k = k.to(tl.int64)
        split = split.to(tl.int64)
        M = M.to(tl.int64)
    start = split * share
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for m0 in range(start, tl.minimum(start + share, M), BLOCK_M):
        m = m0 + step
        n = m // (P * Q)
        p = m % (P * Q) // Q
        q = m % Q
        rows = dy_ptr + n * stride_yn + p * stride_yp + q * stride_yq
        pointers = rows[:, None] + (k * stride_yk)[None, :]
        acc += accumulator(tl.load(pointers, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0))
    tl.store(db_ptr + split * K + k, tl.sum(acc, axis=0).to(db_ptr.dtype.element_ty), mask=k < K)


@triton.jit(do_not_specialize=["slabs"])
def sum_slabs_kernel(
    slab_ptr, out_ptr, numel, slabs, INT64: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr = 8
):  # fmt: skip
    # one program sums BLOCK elements over all slabs, always in the same order
    pid = tl.program_id(0)
    slab = tl.arange(0, AT_ONCE)
    if INT64:
        pid = pid.to(tl.int64)
        slab = slab.to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    acc = tl.zeros((AT_ONCE, BLOCK), dtype=slab_ptr.dtype.element_ty)
    for first in range(0, slabs, AT_ONCE):
        acc += tl.load(
            slab_ptr + ((first + slab) * numel)[:, None] + i[None, :],
            mask=(first + slab < slabs)[:, None] & inside[None, :],
            other=0.0,
        )
    tl.store(out_ptr + i, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=inside)
