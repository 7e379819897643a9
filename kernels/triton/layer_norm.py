"""Layer norm of rows of D contiguous elements: y = (x - mean) * rstd * weight + bias. fp32 inside (fp64 for fp64).

A tile [BLOCK_M, BLOCK_D] holds whole rows and is read once. Rows too long for that go to group_norm.py's kernels; of
them only the gradients of weight and bias are computed here.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator


@triton.jit
def rows_of(first, M, D, INT64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows m, offsets and mask [BLOCK_M, BLOCK_D] of the tile that begins at row `first`."""
    m = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = (m < M)[:, None] & (d < D)[None, :]
    if INT64:
        return m, (m.to(tl.int64) * D)[:, None] + d[None, :], inside
    else:
        return m, (m * D)[:, None] + d[None, :], inside


@triton.jit
def layer_norm_kernel(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, M, D,
    EPS: tl.constexpr, INT64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program normalises BLOCK_M rows
    m, offset, inside = rows_of(tl.program_id(0) * BLOCK_M, M, D, INT64, BLOCK_M, BLOCK_D)
    d = tl.arange(0, BLOCK_D)
    x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
    mean = tl.sum(x, axis=1) / D
    x = tl.where(inside, x - mean[:, None], 0.0)
    # what rounding took from the mean; 0 unless the mean is far from 0
    rest = tl.sum(x, axis=1) / D
    x = tl.where(inside, x - rest[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + EPS)
    y = x * rstd[:, None]
    if weight_ptr is not None:
        y *= accumulator(tl.load(weight_ptr + d, mask=d < D, other=0.0))[None, :]
    if bias_ptr is not None:
        y += accumulator(tl.load(bias_ptr + d, mask=d < D, other=0.0))[None, :]
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + m, mean + rest, mask=m < M)
    tl.store(rstd_ptr + m, rstd, mask=m < M)


@triton.jit
def layer_norm_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, mean_ptr, rstd_ptr, weight_ptr, partial_ptr, M, D, tiles,
    INT64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program computes dx of every tl.num_programs-th tile, and over them the sums of dy and of dy * xhat;
    # partial or dx is None where not wanted
    d = tl.arange(0, BLOCK_D)
    if weight_ptr is not None:
        weight = accumulator(tl.load(weight_ptr + d, mask=d < D, other=0.0))
    s1 = tl.zeros([BLOCK_M, BLOCK_D], mean_ptr.dtype.element_ty)
    s2 = tl.zeros_like(s1)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, offset, inside = rows_of(tile * BLOCK_M, M, D, INT64, BLOCK_M, BLOCK_D)
        dy = accumulator(tl.load(dy_ptr + offset, mask=inside, other=0.0))
        x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
        mean = tl.load(mean_ptr + m, mask=m < M, other=0.0)
        rstd = tl.load(rstd_ptr + m, mask=m < M, other=0.0)
        xhat = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        if partial_ptr is not None:
            s1 += dy
            s2 += dy * xhat
        if dx_ptr is not None:
            if weight_ptr is not None:
                dy *= weight[None, :]
            along_one = tl.sum(dy, axis=1) / D
            along_xhat = tl.sum(dy * xhat, axis=1) / D
            dx = (dy - along_one[:, None] - xhat * along_xhat[:, None]) * rstd[:, None]
            tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        partial_ptr += tl.program_id(0).to(tl.int64) * 2 * D + d
        tl.store(partial_ptr, tl.sum(s1, axis=0), mask=d < D)
        tl.store(partial_ptr + D, tl.sum(s2, axis=0), mask=d < D)


@triton.jit
def layer_norm_parameters_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, partial_ptr, M, D, rows_per_strip,
    INT64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program sums dy and dy * xhat over a strip of rows, for BLOCK_D elements of long rows
    strip = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    s1 = tl.zeros([BLOCK_M, BLOCK_D], mean_ptr.dtype.element_ty)
    s2 = tl.zeros_like(s1)
    for begin in range(strip * rows_per_strip, tl.minimum((strip + 1) * rows_per_strip, M), BLOCK_M):
        m = begin + tl.arange(0, BLOCK_M)
        here = (m < M) & (m < (strip + 1) * rows_per_strip)
        inside = here[:, None] & (d < D)[None, :]
        if INT64:
            offset = (m.to(tl.int64) * D)[:, None] + d[None, :]
        else:
            offset = (m * D)[:, None] + d[None, :]
        dy = accumulator(tl.load(dy_ptr + offset, mask=inside, other=0.0))
        x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
        mean = tl.load(mean_ptr + m, mask=here, other=0.0)
        rstd = tl.load(rstd_ptr + m, mask=here, other=0.0)
        s1 += dy
        s2 += tl.where(inside, dy * (x - mean[:, None]) * rstd[:, None], 0.0)
    partial_ptr += strip.to(tl.int64) * 2 * D + d
    tl.store(partial_ptr, tl.sum(s1, axis=0), mask=d < D)
    tl.store(partial_ptr + D, tl.sum(s2, axis=0), mask=d < D)
