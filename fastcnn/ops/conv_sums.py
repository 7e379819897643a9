"""Sums over partial results, always in the same order: gradients of bias and weight, sums per channel."""

import torch

from fastcnn.ops import common

PROGRAMS = 264  # two waves of an H100: a sum with fewer tiles is split over its rows
MIN_STEPS = 4  # steps of a block of rows that a split is worth
TILE = (64, 32)  # rows, columns
SUM_BLOCK = 256
# Rows of sums that one program adds, of so many columns (32 bytes, a sector of memory), without a launch before it that
# adds shares of them. An H100's SM reads about 64 bytes a clock from L2 and waits some 300 ns for the first: 512 rows
# of sums and of squares, 32 KB, take 0.6 us and FEW_ROWS 2.4; the launch costs 2 to 3: its start, end and that wait.
FEW_ROWS, COLUMNS, AT_ONCE, WARPS = 2048, 8, 512, 8


def accumulator_dtype(dtype):
    """The dtype sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shares(rows, tiles, block):
    """Split rows over programs: (number of shares, rows per share). The order of summation hangs on sizes only."""
    steps = -(-rows // block)
    count = max(1, min(-(-PROGRAMS // tiles), steps // MIN_STEPS))
    share = max(1, -(-steps // count)) * block
    return max(1, -(-rows // share)), share


def sum_slabs(slabs, out):
    """out = the sum of the slabs, which lie in out's memory order."""
    from fastcnn.kernels.triton.conv_sums import sum_slabs_kernel

    numel = out.numel()
    int64 = common.exceeds_int32(slabs)
    sum_slabs_kernel[(-(-numel // SUM_BLOCK),)](slabs, out, numel, slabs.shape[0], INT64=int64, BLOCK=SUM_BLOCK)


def sum_pixels(image, out):
    """out [C] = the sum of image [N, C, H, W], any strides, over everything but the channels."""
    parts = _sum_shares(image, out)
    if parts is not out:
        sum_slabs(parts, out)


def _sum_shares(image, out):
    """Sums [S, C] of shares of the pixels; where there is one share, it is written to out, and that is returned."""
    from fastcnn.kernels.triton.conv_sums import conv2d_backward_bias_kernel

    n, c, h, w = image.shape
    block_m, block_n = TILE
    pixels = n * h * w
    # strides of sizes of one mean nothing: zero lets the compiler see that rows are aligned
    strides = [0 if image.shape[d] == 1 and d != 1 else image.stride(d) for d in range(4)]
    tiles = -(-c // block_n)
    count, share = shares(pixels, tiles, block_m)
    part = out
    if count > 1:
        part = torch.empty((count, c), dtype=accumulator_dtype(image.dtype), device=image.device)
    conv2d_backward_bias_kernel[(tiles * count,)](
        *(image, part, pixels, h, w, c, share),
        *strides,
        INT64=common.exceeds_int32(image) or pixels >= 2**31 - 2**20,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
    )
    return part


def sum_parts(parts):
    """The sum [2, C] of parts [S, 2, C], which are few (sum_rows_in_parts)."""
    from fastcnn.kernels.triton.conv_sums import sum_slabs_kernel

    if len(parts) == 1:
        return parts[0]
    out = torch.empty_like(parts[0])
    numel, int64 = out.numel(), common.exceeds_int32(parts)
    with common.device_guard(parts):
        sum_slabs_kernel[(-(-numel // COLUMNS),)](
            parts, out, numel, len(parts), INT64=int64, BLOCK=COLUMNS, AT_ONCE=AT_ONCE, num_warps=WARPS
        )
    return out


def sum_rows_in_parts(partial):
    """[S, 2, C], at most FEW_ROWS rows with the sum of partial [rows, 2, C], for who adds them up itself."""
    rows, _, c = partial.shape
    if rows <= FEW_ROWS:
        return partial
    out = torch.empty((1, 2, c), dtype=partial.dtype, device=partial.device)
    return _sum_shares(partial.view(rows, 2 * c, 1, 1), out).view(-1, 2, c)
