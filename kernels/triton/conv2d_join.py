"""A residual join and the 1x1 convolution of stride 1 that reads it first, in one pass over both sides.

Pixels are rows, so with left and right (M pixels x C), w the weight (K x C)

    z = out(left * scale + shift + (right * right_scale + right_shift))        y = z @ w.T

z is made block by block in registers, rounded, multiplied and stored: who reads it later, or in backward, finds it in
memory, and this convolution does not read it at all. More filters than a tile has are split over programs, all of which
read both sides. The product is computed transposed: so z is its right side, which tensor cores read from shared memory;
as the left one it would be computed twice, once in the registers of the product and once in those of the store.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.conv2d import channel_vector, multiples
from fastcnn.kernels.triton.conv_fusion import store_sums


@triton.jit(do_not_specialize=["M"])
def conv2d_join_kernel(
    left_ptr,  # [M, C], as right and z
    scale_ptr,
    shift_ptr,
    right_ptr,
    right_scale_ptr,
    right_shift_ptr,
    z_ptr,
    w_ptr,  # [K, C]
    y_ptr,  # [M, K]
    pivot_ptr,
    sums_ptr,  # [tiles of M, 2, K]
    M,
    C,
    K,
    OUT: tl.constexpr,  # activation of z
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    # one program computes BLOCK_M pixels of y x BLOCK_N filters; of those that share the pixels the first stores z
    C, K, _ = multiples(C, K, 0, 8)
    columns = tl.cdiv(K, BLOCK_N)
    tile_m = tl.program_id(0) // columns
    column = tl.program_id(0) % columns
    k = column * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    m0 = tile_m * BLOCK_M
    inside = (m0 + row < M)[:, None]
    kept = (m0 + row < tl.where(column == 0, M, 0))[:, None]
    if INT64:
        m0 = m0.to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    # stages given to the loop count for all its loads, not only for what is multiplied
    for c0 in tl.range(0, C, BLOCK_K, num_stages=STAGES):
        c = c0 + tl.arange(0, BLOCK_K)
        read = inside & (c < C)[None, :]
        offsets = row[:, None] * C + c[None, :]
        left = tl.load(left_ptr + m0 * C + offsets, mask=read, other=0.0)  # [BLOCK_M, BLOCK_K]
        right = tl.load(right_ptr + m0 * C + offsets, mask=read, other=0.0).to(tl.float32)
        w = tl.load(  # [BLOCK_N, BLOCK_K]
            w_ptr + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & (c < C)[None, :], other=0.0
        )
        # channels past the end stay zero: so are their vectors
        scale = channel_vector(scale_ptr, c, C)[None, :]
        shift = channel_vector(shift_ptr, c, C)[None, :]
        if right_scale_ptr is not None:
            right_scale = channel_vector(right_scale_ptr, c, C)[None, :]
            right = right * right_scale + channel_vector(right_shift_ptr, c, C)[None, :]
        z = left.to(tl.float32) * scale + shift + right
        if OUT != "none":
            z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        z = z.to(left.dtype)
        tl.store(z_ptr + m0 * C + offsets, z, mask=kept & (c < C)[None, :])
        acc = tl.dot(w, tl.trans(z), acc, out_dtype=tl.float32)
    stored = inside & (k < K)[None, :]
    y = tl.trans(acc).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m0 * K + row[:, None] * K + k[None, :], y, mask=stored)
    if pivot_ptr is not None:
        centred = tl.where(inside, y.to(tl.float32) - channel_vector(pivot_ptr, k, K)[None, :], 0.0)
        sums_row = sums_ptr + tile_m.to(m0.dtype) * 2 * K
        store_sums(sums_row, tl.sum(centred, axis=0), tl.sum(centred * centred, axis=0), k, k < K, K)
