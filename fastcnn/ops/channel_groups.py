"""Channels in groups: sums of products of the channels of a group over all pixels, and linear maps of them per pixel.

What decorrelated_batch_norm is made of. x [N, C, ...] is dense and contiguous or channels_last, a group has d = C / G
neighbouring channels, matrices are [G, d, d] and vectors [C], in fp64.
"""

import math

import torch

from fastcnn.ops import common

LARGEST = {2: 64, 4: 64, 8: 16}  # channels of a group, by bytes of an element; more of them spill in fp64
TILE = {2: 1024, 4: 512, 8: 512}  # elements of a tile: 128 bits per thread of 4 warps and load; more of them spill
PROGRAMS = 1024  # eight per multiprocessor of an H100


def wide_dtype(x):
    """The dtype in which kernels compute with x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rounded(mean, x):
    """The mean as kernels subtract it, finite, and what that leaves of it."""
    center = torch.where(mean.isfinite(), mean, 0.0).to(wide_dtype(x))
    return center, mean - center


def products_of(left, x, mean, group_size, backend):
    """Per group the sums of left (x - mean)^T [G, d, d] and of left [C], fp64; left None: left = x - mean."""
    center, rest = _rounded(mean, x)
    if backend == "triton":
        products, sums = launch_products(left, x, center, group_size)
    else:
        centred = _grouped(x, group_size) - center.view(-1, group_size, 1)
        left_groups = centred if left is None else _grouped(left, group_size).to(wide_dtype(x))
        products = (left_groups @ centred.mT).double().sum(0)
        sums = left_groups.sum(3).double().sum(0).view(-1)
    if left is None:
        pixels = x.numel() // x.shape[1]
        sums = sums - pixels * rest
        products = products - outer(sums, rest, group_size) - outer(rest, sums, group_size)
        return products - pixels * outer(rest, rest, group_size), sums
    return products - outer(sums, rest, group_size), sums


def outer(a, b, group_size):
    """a b^T per group."""
    return a.view(-1, group_size, 1) * b.view(-1, 1, group_size)


def map_channels(u, u_matrices, x, mean, x_matrices, shift, like, group_size, backend):
    """U^T u + X^T (x - mean) + shift per pixel, with the strides of like; u or x None leaves its term out.

    u_matrices, x_matrices [G, d, d], mean and shift [C], all fp64.
    """
    if x is not None:
        mean, rest = _rounded(mean, x)
        shift = shift - (x_matrices.mT @ rest.view(-1, group_size, 1)).view(-1)
    shift = shift.to(wide_dtype(like))
    if backend == "triton":
        y = torch.empty_like(like)
        launch_map(u, u_matrices, x, mean, x_matrices, shift, y, group_size)
        return y
    result = 0
    if u is not None:
        result = u_matrices.mT.to(shift.dtype) @ _grouped(u, group_size).to(shift.dtype)
    if x is not None:
        # 16-bit numbers less a mean of 32 bits are 32-bit numbers
        result = result + x_matrices.mT.to(shift.dtype) @ (_grouped(x, group_size) - mean.view(-1, group_size, 1))
    result += shift.view(-1, group_size, 1)
    if like.is_contiguous():
        return result.view(like.shape).to(like.dtype)
    y = torch.empty_like(like)
    _grouped(y, group_size).copy_(result)
    return y


def _grouped(x, group_size):
    """x [N, C, ...] as [outer, groups, group_size, pixels], a view; channels_last has one outer index."""
    if x.is_contiguous():
        return x.view(x.shape[0], -1, group_size, math.prod(x.shape[2:]))
    return x.movedim(1, -1).reshape(-1, x.shape[1] // group_size, group_size).permute(1, 2, 0)[None]


def _launch_plan(x, group_size):
    """Channels of a block, their number of blocks, strips, and the arguments of a launch."""
    N, C = x.shape[:2]
    per_block = max(1, 16 // group_size)
    D = per_block * group_size
    blocks = -(-C // D)
    pixels = math.prod(x.shape[2:])
    if x.is_contiguous() and pixels > 1:
        images, inner, strides = N, pixels, (C * pixels, 1, pixels)
    else:
        images, inner, strides = 1, N * pixels, (0, C, 1)
    block_d = max(16, _power_of_two(D))
    block_i = max(16, min(TILE[x.dtype.itemsize] // block_d, _power_of_two(inner)))
    tiles = images * -(-inner // block_i)
    strips = min(tiles, max(1, PROGRAMS // blocks))
    how = dict(
        PRECISION="ieee" if x.dtype == torch.float64 else "tf32x3",
        INT64=common.exceeds_int32(x),
        BLOCK_I=block_i,
        BLOCK_D=block_d,
    )
    return D, blocks, strips, (C, D, inner, tiles, strips, *strides), how


def launch_products(left, x, center, group_size):
    """The sums of products_of about a center of the kernel's dtype."""
    from fastcnn.kernels.triton.decorrelated_batch_norm import decorrelated_products_kernel

    D, blocks, strips, where, how = _launch_plan(x, group_size)
    C = x.shape[1]
    products = torch.empty((strips, blocks, D, D), dtype=center.dtype, device=x.device)
    sums = torch.empty((strips, C), dtype=center.dtype, device=x.device)
    with common.device_guard(x):
        decorrelated_products_kernel[(blocks, strips)](left, x, center, products, sums, *where, **how)
    products = products.sum(0, dtype=torch.float64)
    # the groups of a block stand on its diagonal
    products = products.view(blocks, D // group_size, group_size, D // group_size, group_size)
    products = products.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, group_size, group_size)
    return products[: C // group_size], sums.sum(0, dtype=torch.float64)


def launch_map(u, u_matrices, x, center, x_matrices, shift, y, group_size):
    """map_channels into y, with center and shift in the kernel's dtype."""
    from fastcnn.kernels.triton.decorrelated_batch_norm import decorrelated_map_kernel

    D, blocks, strips, where, how = _launch_plan(y, group_size)
    matrices = [None if m is None else _block_diagonal(m, blocks, D).to(shift.dtype) for m in (u_matrices, x_matrices)]
    with common.device_guard(y):
        decorrelated_map_kernel[(blocks, strips)](
            u, matrices[0], x, center if x is not None else None, matrices[1], shift, y, *where, **how
        )


def _block_diagonal(matrices, blocks, D):
    G, d = matrices.shape[:2]
    if d == D:
        return matrices.contiguous()
    result = matrices.new_zeros(blocks, D // d, d, D // d, d)
    padded = torch.cat([matrices, matrices.new_zeros(blocks * (D // d) - G, d, d)])
    result.diagonal(dim1=1, dim2=3).copy_(padded.view(blocks, D // d, d, d).permute(0, 2, 3, 1))
    return result.view(blocks, D, D)


def _power_of_two(n):
    return 1 << (n - 1).bit_length()
