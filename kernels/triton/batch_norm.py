"""Batch norm, y = f(z), z = (x - mean) * invstd * weight + bias + residual per channel. fp32 inside (fp64 for fp64).

Both layouts are one view, rows by channels: row (o, i) of channel c lies at o * stride_o + i * stride_i + c * stride_c.
channels_last has one outer index, all pixels inner and stride_c = 1; contiguous has the images outer, the pixels of an
image inner and stride_i = 1. A tile is [BLOCK_I, BLOCK_C] within one outer index; a strip is a run of tiles.

KIND names f (None: y = z). Backward needs f'(z): it computes z again from x, or, where a residual belongs to z and f'
takes two values, reads one bit of mask per element. A byte of the mask holds 8 neighbours: channels of a pixel in
channels_last, else pixels of a plane; rows end with a byte of their own, so that no two tiles share one.

Every reduction goes strip by strip to memory and is merged in the order of the strips: same bits on every run.
Sums of squares are taken about a pivot near the mean: E[x^2] - E[x]^2 has no correct digit at mean 1e4, sigma 1.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.activation import activate, activate_backward
from fastcnn.kernels.triton.common import accumulator


@triton.jit
def tile_of(
    tile, c, C, inner, stride_o, stride_i, stride_c,
    BY_CHANNEL: tl.constexpr, ALIGN: tl.constexpr, INT64: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Offsets and mask [BLOCK_I, BLOCK_C] of one tile of the channels c, and how many of its rows exist.

    ALIGN divides the length of a memory row: multiples of 16 the compiler knows by itself, these it does not.
    """
    if ALIGN > 1:
        if BY_CHANNEL:
            C = C // ALIGN * ALIGN
            stride_i = stride_i // ALIGN * ALIGN
        else:
            inner = inner // ALIGN * ALIGN
            stride_o = stride_o // ALIGN * ALIGN
            stride_c = stride_c // ALIGN * ALIGN
    tiles_inner = tl.cdiv(inner, BLOCK_I)
    o = tile // tiles_inner
    first = (tile % tiles_inner) * BLOCK_I
    i = first + tl.arange(0, BLOCK_I)
    inside = (i < inner)[:, None] & (c < C)[None, :]
    if INT64:
        o, i, c = o.to(tl.int64), i.to(tl.int64), c.to(tl.int64)
    offset = o * stride_o + (i * stride_i)[:, None] + (c * stride_c)[None, :]
    return offset, inside, tl.minimum(inner - first, BLOCK_I)


@triton.jit
def near(mean):
    """The mean as a pivot: 0 where it is NaN or infinite, so that subtracting it makes no new NaN."""
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit
def inverse_std(spread, EPS: tl.constexpr, TRAINING: tl.constexpr):
    """invstd from what was saved: invstd itself in training, the running variance in evaluation."""
    if TRAINING:
        return spread
    else:
        return 1.0 / tl.sqrt(spread + EPS)


@triton.jit
def mask_tile(
    tile, c, C, inner, BY_CHANNEL: tl.constexpr, INT64: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Offsets of the bytes of one tile's mask and which exist: [BLOCK_I, BLOCK_C / 8] or [BLOCK_I / 8, BLOCK_C]."""
    tiles_inner = tl.cdiv(inner, BLOCK_I)
    o = tile // tiles_inner
    first = tile % tiles_inner
    if INT64:
        o, first, c = o.to(tl.int64), first.to(tl.int64), c.to(tl.int64)
    if BY_CHANNEL:
        i = first * BLOCK_I + tl.arange(0, BLOCK_I)
        byte = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        row = tl.cdiv(C, 8)
        return (i * row)[:, None] + byte[None, :], (i < inner)[:, None] & (byte < row)[None, :]
    else:
        byte = first * (BLOCK_I // 8) + tl.arange(0, BLOCK_I // 8)
        row = tl.cdiv(inner, 8)
        return byte[:, None] + ((o * C + c) * row)[None, :], (byte < row)[:, None] & (c < C)[None, :]


@triton.jit
def packed(bit, BY_CHANNEL: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr):
    """Bytes of the bits [BLOCK_I, BLOCK_C] (int1)."""
    place = tl.arange(0, 8)
    bit = bit.to(tl.int32)
    if BY_CHANNEL:
        return tl.sum(tl.reshape(bit, [BLOCK_I, BLOCK_C // 8, 8]) << place[None, None, :], axis=2).to(tl.uint8)
    else:
        return tl.sum(tl.reshape(bit, [BLOCK_I // 8, 8, BLOCK_C]) << place[None, :, None], axis=1).to(tl.uint8)


@triton.jit
def unpacked(byte, BY_CHANNEL: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr):
    """Bits [BLOCK_I, BLOCK_C] of a tile's bytes, as int1."""
    place = tl.arange(0, 8)
    byte = byte.to(tl.int32)
    if BY_CHANNEL:
        bit = (byte[:, :, None] >> place[None, None, :]) & 1
    else:
        bit = (byte[:, None, :] >> place[None, :, None]) & 1
    return tl.reshape(bit, [BLOCK_I, BLOCK_C]) != 0


@triton.jit
def before_activation(
    dy, x, residual_ptr, mask_ptr, mean, scale, bias, tile, c, offset, inside, C, inner,
    KIND: tl.constexpr, SLOPE: tl.constexpr, BY_CHANNEL: tl.constexpr, INT64: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz = dy * f'(z) of one tile."""
    if KIND is None:
        return dy
    elif mask_ptr is not None:
        at, exists = mask_tile(tile, c, C, inner, BY_CHANNEL, INT64, BLOCK_I, BLOCK_C)
        kept = unpacked(tl.load(mask_ptr + at, mask=exists, other=0), BY_CHANNEL, BLOCK_I, BLOCK_C)
        return tl.where(kept, dy, dy * SLOPE if KIND == "leaky_relu" else 0.0)
    else:
        z = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        if residual_ptr is not None:
            z += accumulator(tl.load(residual_ptr + offset, mask=inside, other=0.0))
        if KIND == "sigmoid" or KIND == "tanh":
            z = activate(z, SLOPE, KIND)
        return activate_backward(dy, z, SLOPE, KIND)


@triton.jit
def affine(spread_ptr, weight_ptr, bias_ptr, c, C, EPS: tl.constexpr, TRAINING: tl.constexpr):
    """invstd, invstd * weight and bias of the channels c."""
    invstd = inverse_std(accumulator(tl.load(spread_ptr + c, mask=c < C, other=1.0)), EPS, TRAINING)
    scale = invstd
    if weight_ptr is not None:
        scale = invstd * accumulator(tl.load(weight_ptr + c, mask=c < C, other=0.0))
    bias = tl.zeros_like(invstd)
    if bias_ptr is not None:
        bias = accumulator(tl.load(bias_ptr + c, mask=c < C, other=0.0))
    return invstd, scale, bias


@triton.jit
def batch_norm_statistics_kernel(
    x_ptr, partial_ptr, C, inner, tiles, tiles_per_strip, stride_o, stride_i, stride_c,
    BY_CHANNEL: tl.constexpr, ALIGN: tl.constexpr, INT64: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program reduces a strip of BLOCK_C channels to count, pivot, mean - pivot and sum of squared deviations
    strip = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = strip * tiles_per_strip
    end = tl.minimum(begin + tiles_per_strip, tiles)
    offset, inside, count = tile_of(begin, c, C, inner, stride_o, stride_i, stride_c, BY_CHANNEL, ALIGN, INT64, BLOCK_I)
    x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
    pivot = near(tl.sum(x, axis=0) / count)
    s1 = tl.zeros_like(x)  # [BLOCK_I, BLOCK_C]
    s2 = tl.zeros_like(x)
    rows = 0
    for tile in range(begin, end):
        offset, inside, count = tile_of(
            tile, c, C, inner, stride_o, stride_i, stride_c, BY_CHANNEL, ALIGN, INT64, BLOCK_I
        )
        x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
        d = tl.where(inside, x - pivot[None, :], 0.0)
        s1 += d
        s2 += d * d
        rows += count
    s1 = tl.sum(s1, axis=0)
    s2 = tl.sum(s2, axis=0)
    # pivot and distance stay apart: their sum would be rounded before the strips are compared
    partial_ptr += strip * 4 * C + c
    tl.store(partial_ptr, tl.zeros_like(pivot) + rows, mask=c < C)
    tl.store(partial_ptr + C, pivot, mask=c < C)
    tl.store(partial_ptr + 2 * C, s1 / rows, mask=c < C)
    tl.store(partial_ptr + 3 * C, s2 - s1 * s1 / rows, mask=c < C)


@triton.jit
def batch_norm_finalize_kernel(
    partial_ptr, record_ptr, mean_ptr, invstd_ptr, running_mean_ptr, running_var_ptr,
    C, strips, momentum, momentum_rest,
    EPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program merges the strips of BLOCK_C channels (Chan et al.) and updates their running statistics, if any; with
    # record_ptr it stores their merger in the form of a strip instead
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    # everything is measured from the pivot of the first strip
    pivot = tl.load(partial_ptr + C + c, mask=c < C, other=0.0)
    rows = tl.zeros([BLOCK_S, BLOCK_C], pivot.dtype)
    s1 = tl.zeros_like(rows)
    s2 = tl.zeros_like(rows)
    for begin in range(0, strips, BLOCK_S):
        strip = begin + tl.arange(0, BLOCK_S)
        inside = (strip < strips)[:, None] & (c < C)[None, :]
        from_ptr = partial_ptr + (strip * 4 * C)[:, None] + c[None, :]
        n = tl.load(from_ptr, mask=inside, other=0.0)
        # masked lanes have n = 0
        d = tl.load(from_ptr + C, mask=inside, other=0.0) - pivot[None, :]
        d += tl.load(from_ptr + 2 * C, mask=inside, other=0.0)
        rows += n
        s1 += n * d
        s2 += tl.load(from_ptr + 3 * C, mask=inside, other=0.0) + n * d * d
    n = tl.sum(rows, axis=0)
    s1 = tl.sum(s1, axis=0)
    squares = tl.sum(s2, axis=0) - s1 * s1 / n
    squares = tl.where(squares < 0, 0.0, squares)
    if record_ptr is not None:
        tl.store(record_ptr + c, n, mask=c < C)
        tl.store(record_ptr + C + c, pivot, mask=c < C)
        tl.store(record_ptr + 2 * C + c, s1 / n, mask=c < C)
        tl.store(record_ptr + 3 * C + c, squares, mask=c < C)
    else:
        mean = pivot + s1 / n
        tl.store(mean_ptr + c, mean, mask=c < C)
        tl.store(invstd_ptr + c, 1.0 / tl.sqrt(squares / n + EPS), mask=c < C)
        if running_mean_ptr is not None:
            # an argument arrives in fp32: the second one holds what rounding took
            momentum = tl.zeros_like(mean) + momentum + momentum_rest
            running = accumulator(tl.load(running_mean_ptr + c, mask=c < C))
            running = (1.0 - momentum) * running + momentum * mean
            tl.store(running_mean_ptr + c, running.to(running_mean_ptr.dtype.element_ty), mask=c < C)
            running = accumulator(tl.load(running_var_ptr + c, mask=c < C))
            running = (1.0 - momentum) * running + momentum * (squares / (n - 1.0))
            tl.store(running_var_ptr + c, running.to(running_var_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def batch_norm_apply_kernel(
    x_ptr, residual_ptr, y_ptr, mask_ptr, mean_ptr, spread_ptr, weight_ptr, bias_ptr,
    C, inner, tiles, tiles_per_strip, stride_o, stride_i, stride_c,
    EPS: tl.constexpr, TRAINING: tl.constexpr, KIND: tl.constexpr, SLOPE: tl.constexpr,
    BY_CHANNEL: tl.constexpr, ALIGN: tl.constexpr, INT64: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program normalises a strip of BLOCK_C channels, adds the residual and applies the activation
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.program_id(0) * tiles_per_strip
    end = tl.minimum(begin + tiles_per_strip, tiles)
    mean = accumulator(tl.load(mean_ptr + c, mask=c < C, other=0.0))
    invstd, scale, bias = affine(spread_ptr, weight_ptr, bias_ptr, c, C, EPS, TRAINING)
    for step in range(begin, end):
        # from the end: it is what the statistics pass left in the cache
        tile = begin + end - 1 - step
        offset, inside, _ = tile_of(tile, c, C, inner, stride_o, stride_i, stride_c, BY_CHANNEL, ALIGN, INT64, BLOCK_I)
        x = accumulator(tl.load(x_ptr + offset, mask=inside))
        y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        if residual_ptr is not None:
            y += accumulator(tl.load(residual_ptr + offset, mask=inside))
        if mask_ptr is not None:
            at, exists = mask_tile(tile, c, C, inner, BY_CHANNEL, INT64, BLOCK_I, BLOCK_C)
            kept = activate_backward(tl.full([BLOCK_I, BLOCK_C], 1.0, tl.float32), y, 0.0, KIND) != 0
            tl.store(mask_ptr + at, packed(kept & inside, BY_CHANNEL, BLOCK_I, BLOCK_C), mask=exists)
        if KIND is not None:
            y = activate(y, SLOPE, KIND)
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def batch_norm_backward_reduce_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, mean_ptr, spread_ptr, weight_ptr, bias_ptr, partial_ptr,
    C, inner, tiles, tiles_per_strip, stride_o, stride_i, stride_c,
    EPS: tl.constexpr, TRAINING: tl.constexpr, KIND: tl.constexpr, SLOPE: tl.constexpr,
    BY_CHANNEL: tl.constexpr, ALIGN: tl.constexpr, INT64: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program reduces a strip of BLOCK_C channels to the sums of dz and of dz * (x - mean)
    strip = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = strip * tiles_per_strip
    end = tl.minimum(begin + tiles_per_strip, tiles)
    mean = accumulator(tl.load(mean_ptr + c, mask=c < C, other=0.0))
    invstd, scale, bias = affine(spread_ptr, weight_ptr, bias_ptr, c, C, EPS, TRAINING)
    s1 = tl.zeros([BLOCK_I, BLOCK_C], mean.dtype)
    s2 = tl.zeros_like(s1)
    for tile in range(begin, end):
        offset, inside, _ = tile_of(tile, c, C, inner, stride_o, stride_i, stride_c, BY_CHANNEL, ALIGN, INT64, BLOCK_I)
        dy = accumulator(tl.load(dy_ptr + offset, mask=inside, other=0.0))
        x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
        dz = before_activation(
            dy, x, residual_ptr, mask_ptr, mean, scale, bias, tile, c, offset, inside, C, inner,
            KIND, SLOPE, BY_CHANNEL, INT64, BLOCK_I, BLOCK_C,
        )  # fmt: skip
        s1 += dz
        s2 += tl.where(inside, dz * (x - mean[None, :]), 0.0)
    partial_ptr += strip * 2 * C + c
    tl.store(partial_ptr, tl.sum(s1, axis=0), mask=c < C)
    tl.store(partial_ptr + C, tl.sum(s2, axis=0), mask=c < C)


@triton.jit
def batch_norm_backward_finalize_kernel(
    partial_ptr, spread_ptr, sums_ptr, dweight_ptr, dbias_ptr, C, strips,
    EPS: tl.constexpr, TRAINING: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program adds the strips of BLOCK_C channels: sums of dz and of dz * xhat, which are dbias and dweight
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    s1 = tl.zeros([BLOCK_S, BLOCK_C], partial_ptr.dtype.element_ty)
    s2 = tl.zeros_like(s1)
    for begin in range(0, strips, BLOCK_S):
        strip = begin + tl.arange(0, BLOCK_S)
        inside = (strip < strips)[:, None] & (c < C)[None, :]
        from_ptr = partial_ptr + (strip * 2 * C)[:, None] + c[None, :]
        s1 += tl.load(from_ptr, mask=inside, other=0.0)
        s2 += tl.load(from_ptr + C, mask=inside, other=0.0)
    invstd = inverse_std(accumulator(tl.load(spread_ptr + c, mask=c < C, other=1.0)), EPS, TRAINING)
    sum_dy = tl.sum(s1, axis=0)
    sum_dy_xhat = tl.sum(s2, axis=0) * invstd
    tl.store(sums_ptr + c, sum_dy, mask=c < C)
    tl.store(sums_ptr + C + c, sum_dy_xhat, mask=c < C)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, sum_dy_xhat.to(dweight_ptr.dtype.element_ty), mask=c < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, sum_dy.to(dbias_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def batch_norm_backward_apply_kernel(
    dy_ptr, x_ptr, residual_ptr, mask_ptr, dx_ptr, dresidual_ptr, mean_ptr, spread_ptr, weight_ptr, bias_ptr, sums_ptr,
    rows, C, inner, tiles, tiles_per_strip, stride_o, stride_i, stride_c,
    EPS: tl.constexpr, TRAINING: tl.constexpr, KIND: tl.constexpr, SLOPE: tl.constexpr,
    BY_CHANNEL: tl.constexpr, ALIGN: tl.constexpr, INT64: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program computes dx and the residual's gradient dz, each unless None, of a strip of BLOCK_C channels
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.program_id(0) * tiles_per_strip
    end = tl.minimum(begin + tiles_per_strip, tiles)
    mean = accumulator(tl.load(mean_ptr + c, mask=c < C, other=0.0))
    invstd, scale, bias = affine(spread_ptr, weight_ptr, bias_ptr, c, C, EPS, TRAINING)
    if TRAINING:
        # mean and variance depend on x, too: what they pass on is the part of dz along 1 and along xhat
        along_one = tl.load(sums_ptr + c, mask=c < C, other=0.0) / rows
        along_xhat = tl.load(sums_ptr + C + c, mask=c < C, other=0.0) / rows
    for step in range(begin, end):
        # from the end: it is what the reduction left in the cache
        tile = begin + end - 1 - step
        offset, inside, _ = tile_of(tile, c, C, inner, stride_o, stride_i, stride_c, BY_CHANNEL, ALIGN, INT64, BLOCK_I)
        dy = accumulator(tl.load(dy_ptr + offset, mask=inside))
        if TRAINING or (KIND is not None and mask_ptr is None):
            x = accumulator(tl.load(x_ptr + offset, mask=inside))
        else:  # nobody reads it
            x = dy
        dz = before_activation(
            dy, x, residual_ptr, mask_ptr, mean, scale, bias, tile, c, offset, inside, C, inner,
            KIND, SLOPE, BY_CHANNEL, INT64, BLOCK_I, BLOCK_C,
        )  # fmt: skip
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offset, dz.to(dresidual_ptr.dtype.element_ty), mask=inside)
        if dx_ptr is not None:
            dx = dz
            if TRAINING:
                xhat = (x - mean[None, :]) * invstd[None, :]
                dx = dx - along_one[None, :] - xhat * along_xhat[None, :]
            dx *= scale[None, :]
            tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
