"""Decorrelated batch norm: sums of products of the channels of a block, and an affine map of them per pixel.

A block holds D channels: one group of at least 16 channels or several smaller ones, whose matrices stand on the
diagonal of the block's. Both layouts are one view: pixel (o, i) of channel c lies at o * stride_o + i * stride_i +
c * stride_c; channels_last has one outer index and stride_c = 1, contiguous has the images outer and stride_i = 1.
A tile is [BLOCK_I, D] within one outer index; a strip is every strips-th tile. fp32 inside (fp64 for fp64): fp32
products on tensor cores as three TF32 ones (PRECISION "tf32x3"), whose error is that of fp32.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator


@triton.jit
def tile_of(
    tile, c, inside_c, inner, stride_o, stride_i, stride_c, INT64: tl.constexpr, BLOCK_I: tl.constexpr
):  # fmt: skip
    """Offsets and mask [BLOCK_I, BLOCK_D] of a tile of the channels c."""
    tiles_inner = tl.cdiv(inner, BLOCK_I)
    o = tile // tiles_inner
    i = tile % tiles_inner * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = (i < inner)[:, None] & inside_c[None, :]
    if INT64:
        o, i, c = o.to(tl.int64), i.to(tl.int64), c.to(tl.int64)
    return o * stride_o + (i * stride_i)[:, None] + (c * stride_c)[None, :], inside


@triton.jit
def decorrelated_products_kernel(
    left_ptr, x_ptr, center_ptr, products_ptr, sums_ptr,
    C, D, inner, tiles, strips, stride_o, stride_i, stride_c,
    PRECISION: tl.constexpr, INT64: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program sums left * (x - center)^T and left over a strip of a block; without left_ptr, left is x - center
    block = tl.program_id(0)
    strip = tl.program_id(1)
    k = tl.arange(0, BLOCK_D)
    c = block * D + k
    inside_c = (k < D) & (c < C)
    center = tl.load(center_ptr + c, mask=inside_c, other=0.0)
    products = tl.zeros([BLOCK_D, BLOCK_D], center.dtype)
    sums = tl.zeros([BLOCK_I, BLOCK_D], center.dtype)
    for tile in range(strip, tiles, strips):
        offset, inside = tile_of(tile, c, inside_c, inner, stride_o, stride_i, stride_c, INT64, BLOCK_I)
        x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
        x = tl.where(inside, x - center[None, :], 0.0)
        if left_ptr is None:
            left = x
        else:
            left = accumulator(tl.load(left_ptr + offset, mask=inside, other=0.0))
        products = tl.dot(left.T, x, products, input_precision=PRECISION, out_dtype=center.dtype)
        sums += left
    row = (strip * tl.num_programs(0) + block) * D + k
    inside = (k < D)[:, None] & (k < D)[None, :]
    tl.store(products_ptr + (row * D)[:, None] + k[None, :], products, mask=inside)
    tl.store(sums_ptr + strip * C + c, tl.sum(sums, axis=0), mask=inside_c)


@triton.jit
def _matrix(matrices_ptr, block, D, BLOCK_D: tl.constexpr):
    k = tl.arange(0, BLOCK_D)
    inside = (k < D)[:, None] & (k < D)[None, :]
    return tl.load(matrices_ptr + block * D * D + (k * D)[:, None] + k[None, :], mask=inside, other=0.0)


@triton.jit
def decorrelated_map_kernel(
    u_ptr, u_matrices_ptr, x_ptr, center_ptr, x_matrices_ptr, shift_ptr, y_ptr,
    C, D, inner, tiles, strips, stride_o, stride_i, stride_c,
    PRECISION: tl.constexpr, INT64: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program computes y = u @ U + (x - center) @ X + shift of a strip of a block; u or x may be missing
    block = tl.program_id(0)
    strip = tl.program_id(1)
    k = tl.arange(0, BLOCK_D)
    c = block * D + k
    inside_c = (k < D) & (c < C)
    shift = tl.load(shift_ptr + c, mask=inside_c, other=0.0)
    if u_ptr is not None:
        u_matrix = _matrix(u_matrices_ptr, block, D, BLOCK_D)
    if x_ptr is not None:
        x_matrix = _matrix(x_matrices_ptr, block, D, BLOCK_D)
        center = tl.load(center_ptr + c, mask=inside_c, other=0.0)
    for tile in range(strip, tiles, strips):
        # from the end: it is what the sums left in the cache
        offset, inside = tile_of(
            tiles - 1 - tile, c, inside_c, inner, stride_o, stride_i, stride_c, INT64, BLOCK_I
        )  # fmt: skip
        y = tl.zeros([BLOCK_I, BLOCK_D], shift.dtype)
        if u_ptr is not None:
            u = accumulator(tl.load(u_ptr + offset, mask=inside, other=0.0))
            y = tl.dot(u, u_matrix, y, input_precision=PRECISION, out_dtype=shift.dtype)
        if x_ptr is not None:
            x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
            # masked pixels are not stored; masked channels meet zeros of the matrix, and must be finite
            x = tl.where(inside, x - center[None, :], 0.0)
            y = tl.dot(x, x_matrix, y, input_precision=PRECISION, out_dtype=shift.dtype)
        y += shift[None, :]
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
