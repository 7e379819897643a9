"""Group norm: y = (x - mean) * rstd * weight + bias, mean and rstd of each group of channels of each image.

Both layouts are one view: pixel s of channel c of image n lies at n * stride_n + s * stride_s + c * stride_c, with
stride_c = 1 in channels_last and stride_s = 1 in contiguous memory. D = C / G channels make a group. fp32 inside (fp64
for fp64). Instance norm has G = C; layer norm of long rows has N rows of S elements in one channel, and weights per
element (PER_PIXEL).

Where a group fits one program, a fused kernel reads it once. Else an image is split into strips of pixels: partial
sums per channel go to memory, a second kernel merges them in fixed order (same bits on every run), a third applies.
Sums of squares are taken about a pivot near the mean: E[x^2] - E[x]^2 has no correct digit at mean 1e4, sigma 1.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator


@triton.jit
def near(mean):
    """The mean as a pivot: 0 where it is NaN or infinite, so that subtracting it makes no new NaN."""
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit
def strip_of(S, strips, tiles_per_strip, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Image n, first and last tile, and channels of this program; programs are (n, strip) by blocks of channels."""
    n = tl.program_id(0) // strips
    begin = tl.program_id(0) % strips * tiles_per_strip
    end = tl.minimum(begin + tiles_per_strip, tl.cdiv(S, BLOCK_S))
    return n, begin, end, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def pixels_of(n, s, c, C, S, stride_n, stride_s, stride_c, INT64: tl.constexpr):
    """Offsets and mask [BLOCK_S, BLOCK_C] of the pixels s and channels c of image n."""
    inside = (s < S)[:, None] & (c < C)[None, :]
    if INT64:
        n, s, c = n.to(tl.int64), s.to(tl.int64), c.to(tl.int64)
    return n * stride_n + (s * stride_s)[:, None] + (c * stride_c)[None, :], inside


@triton.jit
def parameter(ptr, s, c, C, S, default, like, PER_PIXEL: tl.constexpr):
    """weight or bias, broadcastable to [BLOCK_S, BLOCK_C]; `default` where there is none."""
    if ptr is None:
        return tl.full([1, 1], default, like.dtype)
    elif PER_PIXEL:
        return accumulator(tl.load(ptr + s, mask=s < S, other=0.0)).to(like.dtype)[:, None]
    else:
        return accumulator(tl.load(ptr + c, mask=c < C, other=0.0)).to(like.dtype)[None, :]


@triton.jit
def group_norm_statistics_kernel(
    x_ptr, partial_ptr, C, S, strips, tiles_per_strip, stride_n, stride_s, stride_c,
    INT64: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program reduces a strip of BLOCK_C channels to pivot, mean - pivot and sum of squared deviations of each
    n, begin, end, c = strip_of(S, strips, tiles_per_strip, BLOCK_S, BLOCK_C)
    s = begin * BLOCK_S + tl.arange(0, BLOCK_S)
    offset, inside = pixels_of(n, s, c, C, S, stride_n, stride_s, stride_c, INT64)
    x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
    pivot = near(tl.sum(x, axis=0) / tl.minimum(S - begin * BLOCK_S, BLOCK_S))
    s1 = tl.zeros_like(x)  # [BLOCK_S, BLOCK_C]
    s2 = tl.zeros_like(x)
    for tile in range(begin, end):
        s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        offset, inside = pixels_of(n, s, c, C, S, stride_n, stride_s, stride_c, INT64)
        x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
        d = tl.where(inside, x - pivot[None, :], 0.0)
        s1 += d
        s2 += d * d
    s1 = tl.sum(s1, axis=0)
    s2 = tl.sum(s2, axis=0)
    count = tl.minimum(S, end * BLOCK_S) - begin * BLOCK_S
    # pivot and distance stay apart: their sum would be rounded before the strips are compared
    partial_ptr += tl.program_id(0).to(tl.int64) * 3 * C + c
    tl.store(partial_ptr, pivot, mask=c < C)
    tl.store(partial_ptr + C, s1 / count, mask=c < C)
    tl.store(partial_ptr + 2 * C, s2 - s1 * s1 / count, mask=c < C)


@triton.jit
def group_norm_finalize_kernel(
    partial_ptr, mean_ptr, rstd_ptr, C, G, D, S, strips, rows_per_strip,
    EPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    # one program merges the channels and strips of BLOCK_G groups of an image (Chan et al.)
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    partial_ptr += n * strips * 3 * C
    # everything is measured from the first pivot of the group
    first = tl.load(partial_ptr + g * D, mask=g < G, other=0.0)
    total = tl.zeros([BLOCK_G, BLOCK_T], first.dtype)
    for begin in range(0, D * strips, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        inside = (g < G)[:, None] & (t < D * strips)[None, :]
        from_ptr = partial_ptr + (t // D * 3 * C + t % D)[None, :] + (g * D)[:, None]
        count = tl.minimum(S - t // D * rows_per_strip, rows_per_strip)[None, :]
        d = tl.load(from_ptr, mask=inside, other=0.0) - first[:, None] + tl.load(from_ptr + C, mask=inside, other=0.0)
        total += tl.where(inside, count * d, 0.0)
    shift = tl.sum(total, axis=1) / D / S
    squares = tl.zeros_like(total)
    for begin in range(0, D * strips, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        inside = (g < G)[:, None] & (t < D * strips)[None, :]
        from_ptr = partial_ptr + (t // D * 3 * C + t % D)[None, :] + (g * D)[:, None]
        count = tl.minimum(S - t // D * rows_per_strip, rows_per_strip)[None, :]
        d = tl.load(from_ptr, mask=inside, other=0.0) - first[:, None] + tl.load(from_ptr + C, mask=inside, other=0.0)
        d -= shift[:, None]
        squares += tl.where(inside, tl.load(from_ptr + 2 * C, mask=inside, other=0.0) + count * d * d, 0.0)
    var = tl.sum(squares, axis=1) / D / S
    var = tl.where(var < 0, 0.0, var)  # of a constant channel rounding can leave less than nothing
    tl.store(mean_ptr + n * G + g, first + shift, mask=g < G)
    tl.store(rstd_ptr + n * G + g, 1.0 / tl.sqrt(var + EPS), mask=g < G)


@triton.jit
def group_norm_apply_kernel(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    C, G, D, S, strips, tiles_per_strip, stride_n, stride_s, stride_c,
    PER_PIXEL: tl.constexpr, INT64: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program normalises a strip of BLOCK_C channels
    n, begin, end, c = strip_of(S, strips, tiles_per_strip, BLOCK_S, BLOCK_C)
    g = n.to(tl.int64) * G + c // D
    mean = tl.load(mean_ptr + g, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + g, mask=c < C, other=0.0)
    for tile in range(begin, end):
        # from the end: it is what the statistics pass left in the cache
        s = (begin + end - 1 - tile) * BLOCK_S + tl.arange(0, BLOCK_S)
        offset, inside = pixels_of(n, s, c, C, S, stride_n, stride_s, stride_c, INT64)
        x = accumulator(tl.load(x_ptr + offset, mask=inside))
        weight = parameter(weight_ptr, s, c, C, S, 1.0, mean, PER_PIXEL)
        y = (x - mean[None, :]) * (rstd[None, :] * weight) + parameter(bias_ptr, s, c, C, S, 0.0, mean, PER_PIXEL)
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def group_norm_backward_reduce_kernel(
    dy_ptr, x_ptr, mean_ptr, weight_ptr, partial_ptr,
    C, G, D, S, strips, tiles_per_strip, stride_n, stride_s, stride_c,
    PER_PIXEL: tl.constexpr, INT64: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program reduces a strip of BLOCK_C channels to the sums of dy and of dy * (x - mean); PER_PIXEL: dy * weight
    n, begin, end, c = strip_of(S, strips, tiles_per_strip, BLOCK_S, BLOCK_C)
    mean = tl.load(mean_ptr + n.to(tl.int64) * G + c // D, mask=c < C, other=0.0)
    s1 = tl.zeros([BLOCK_S, BLOCK_C], mean.dtype)
    s2 = tl.zeros_like(s1)
    for tile in range(begin, end):
        s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        offset, inside = pixels_of(n, s, c, C, S, stride_n, stride_s, stride_c, INT64)
        dy = accumulator(tl.load(dy_ptr + offset, mask=inside, other=0.0))
        x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
        if PER_PIXEL:
            dy *= parameter(weight_ptr, s, c, C, S, 1.0, mean, PER_PIXEL)
        s1 += dy
        s2 += dy * (x - mean[None, :])  # where there is no pixel dy is 0
    partial_ptr += tl.program_id(0).to(tl.int64) * 2 * C + c
    tl.store(partial_ptr, tl.sum(s1, axis=0), mask=c < C)
    tl.store(partial_ptr + C, tl.sum(s2, axis=0), mask=c < C)


@triton.jit
def group_norm_backward_finalize_kernel(
    partial_ptr, rstd_ptr, weight_ptr, along_one_ptr, along_xhat_ptr, C, G, D, S, strips,
    PER_PIXEL: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    # one program computes the means of dy * weight and of dy * weight * xhat over BLOCK_G groups of an image
    n = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    partial_ptr += n * strips * 2 * C
    s1 = tl.zeros([BLOCK_G, BLOCK_T], partial_ptr.dtype.element_ty)
    s2 = tl.zeros_like(s1)
    for begin in range(0, D * strips, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        inside = (g < G)[:, None] & (t < D * strips)[None, :]
        c = (g * D)[:, None] + (t % D)[None, :]
        from_ptr = partial_ptr + (t // D * 2 * C)[None, :] + c
        a = tl.load(from_ptr, mask=inside, other=0.0)
        b = tl.load(from_ptr + C, mask=inside, other=0.0)
        if weight_ptr is not None and not PER_PIXEL:
            weight = accumulator(tl.load(weight_ptr + c, mask=inside, other=0.0))
            a *= weight
            b *= weight
        s1 += a
        s2 += b
    rstd = tl.load(rstd_ptr + n * G + g, mask=g < G, other=0.0)
    tl.store(along_one_ptr + n * G + g, tl.sum(s1, axis=1) / D / S, mask=g < G)
    tl.store(along_xhat_ptr + n * G + g, tl.sum(s2, axis=1) * rstd / D / S, mask=g < G)


@triton.jit
def group_norm_parameters_kernel(
    partial_ptr, rstd_ptr, dweight_ptr, dbias_ptr, rows, strips, C, G, D, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    # one program adds the rows of partial sums of BLOCK_C channels, in fixed order: dbias and dweight
    # rows are (n, strip); rstd scales the second sums and is None where they are scaled already
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    s1 = tl.zeros([BLOCK_R, BLOCK_C], partial_ptr.dtype.element_ty)
    s2 = tl.zeros_like(s1)
    for begin in range(0, rows, BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (c < C)[None, :]
        from_ptr = partial_ptr + (row.to(tl.int64) * 2 * C)[:, None] + c[None, :]
        s1 += tl.load(from_ptr, mask=inside, other=0.0)
        b = tl.load(from_ptr + C, mask=inside, other=0.0)
        if rstd_ptr is not None:
            b *= tl.load(rstd_ptr + (row // strips * G)[:, None] + (c // D)[None, :], mask=inside, other=0.0)
        s2 += b
    tl.store(dbias_ptr + c, tl.sum(s1, axis=0).to(dbias_ptr.dtype.element_ty), mask=c < C)
    tl.store(dweight_ptr + c, tl.sum(s2, axis=0).to(dweight_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def group_norm_backward_apply_kernel(
    dy_ptr, x_ptr, dx_ptr, mean_ptr, rstd_ptr, weight_ptr, along_one_ptr, along_xhat_ptr,
    C, G, D, S, strips, tiles_per_strip, stride_n, stride_s, stride_c,
    PER_PIXEL: tl.constexpr, INT64: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program computes dx of a strip of BLOCK_C channels
    n, begin, end, c = strip_of(S, strips, tiles_per_strip, BLOCK_S, BLOCK_C)
    g = n.to(tl.int64) * G + c // D
    mean = tl.load(mean_ptr + g, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + g, mask=c < C, other=0.0)
    # mean and variance depend on x, too: what they pass on is the part of dy along 1 and along xhat
    along_one = tl.load(along_one_ptr + g, mask=c < C, other=0.0)
    along_xhat = tl.load(along_xhat_ptr + g, mask=c < C, other=0.0)
    for tile in range(begin, end):
        # from the end: it is what the reduction left in the cache
        s = (begin + end - 1 - tile) * BLOCK_S + tl.arange(0, BLOCK_S)
        offset, inside = pixels_of(n, s, c, C, S, stride_n, stride_s, stride_c, INT64)
        dy = accumulator(tl.load(dy_ptr + offset, mask=inside))
        x = accumulator(tl.load(x_ptr + offset, mask=inside))
        xhat = (x - mean[None, :]) * rstd[None, :]
        dx = dy * parameter(weight_ptr, s, c, C, S, 1.0, mean, PER_PIXEL)
        dx = (dx - along_one[None, :] - xhat * along_xhat[None, :]) * rstd[None, :]
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def whole_groups(
    C, G, S, stride_n, stride_s, stride_c,
    D: tl.constexpr, INT64: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Image n, groups g [BLOCK_G], channels c [BLOCK_C] and whether they exist, offsets and mask [BLOCK_S, BLOCK_C]."""
    blocks = tl.cdiv(G, BLOCK_G)
    n = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_G
    j = tl.arange(0, BLOCK_G * BLOCK_D)
    if D == BLOCK_D:
        c = first * D + j
        exists = c < C
    else:
        c = (first + j // BLOCK_D) * D + j % BLOCK_D
        exists = (j % BLOCK_D < D) & (c < C)
    offset, inside = pixels_of(n, tl.arange(0, BLOCK_S), c, C, S, stride_n, stride_s, stride_c, INT64)
    return n, first + tl.arange(0, BLOCK_G), c, exists, offset, inside & exists[None, :]


@triton.jit
def group_sum(values, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums over the channels of each group, [BLOCK_G * BLOCK_D] -> [BLOCK_G]."""
    return tl.sum(tl.reshape(values, [BLOCK_G, BLOCK_D]), axis=1)


@triton.jit
def per_channel(values, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """A group's value for each of its channels, [BLOCK_G] -> [1, BLOCK_G * BLOCK_D]."""
    return tl.reshape(tl.broadcast_to(values[:, None], [BLOCK_G, BLOCK_D]), [1, BLOCK_G * BLOCK_D])


@triton.jit
def group_norm_fused_kernel(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, C, G, S, stride_n, stride_s, stride_c,
    D: tl.constexpr, EPS: tl.constexpr, INT64: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program computes statistics and y of BLOCK_G whole groups of an image
    n, g, c, exists, offset, inside = whole_groups(
        C, G, S, stride_n, stride_s, stride_c, D, INT64, BLOCK_S, BLOCK_G, BLOCK_D
    )
    x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
    mean = group_sum(tl.sum(x, axis=0), BLOCK_G, BLOCK_D) / D / S
    d = tl.where(inside, x - per_channel(mean, BLOCK_G, BLOCK_D), 0.0)
    # what rounding took from the mean; 0 unless the mean is far from 0
    rest = group_sum(tl.sum(d, axis=0), BLOCK_G, BLOCK_D) / D / S
    d = tl.where(inside, d - per_channel(rest, BLOCK_G, BLOCK_D), 0.0)
    rstd = 1.0 / tl.sqrt(group_sum(tl.sum(d * d, axis=0), BLOCK_G, BLOCK_D) / D / S + EPS)
    y = d * per_channel(rstd, BLOCK_G, BLOCK_D)
    if weight_ptr is not None:
        y *= accumulator(tl.load(weight_ptr + c, mask=exists, other=0.0))[None, :]
    if bias_ptr is not None:
        y += accumulator(tl.load(bias_ptr + c, mask=exists, other=0.0))[None, :]
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + n.to(tl.int64) * G + g, mean + rest, mask=g < G)
    tl.store(rstd_ptr + n.to(tl.int64) * G + g, rstd, mask=g < G)


@triton.jit
def group_norm_fused_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, mean_ptr, rstd_ptr, weight_ptr, partial_ptr, C, G, S, stride_n, stride_s, stride_c,
    D: tl.constexpr, INT64: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # one program computes dx, and per channel the sums of dy and of dy * xhat, of BLOCK_G whole groups of an image;
    # partial or dx is None where not wanted
    n, g, c, exists, offset, inside = whole_groups(
        C, G, S, stride_n, stride_s, stride_c, D, INT64, BLOCK_S, BLOCK_G, BLOCK_D
    )
    dy = accumulator(tl.load(dy_ptr + offset, mask=inside, other=0.0))
    x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
    mean = tl.load(mean_ptr + n.to(tl.int64) * G + g, mask=g < G, other=0.0)
    rstd = tl.load(rstd_ptr + n.to(tl.int64) * G + g, mask=g < G, other=0.0)
    rstds = per_channel(rstd, BLOCK_G, BLOCK_D)
    xhat = tl.where(inside, (x - per_channel(mean, BLOCK_G, BLOCK_D)) * rstds, 0.0)
    s1 = tl.sum(dy, axis=0)
    s2 = tl.sum(dy * xhat, axis=0)
    if partial_ptr is not None:
        partial_ptr += n.to(tl.int64) * 2 * C + c
        tl.store(partial_ptr, s1, mask=exists)
        tl.store(partial_ptr + C, s2, mask=exists)
    if dx_ptr is not None:
        if weight_ptr is not None:
            weight = accumulator(tl.load(weight_ptr + c, mask=exists, other=0.0))
            s1 *= weight
            s2 *= weight
            dy *= weight[None, :]
        along_one = per_channel(group_sum(s1, BLOCK_G, BLOCK_D) / D / S, BLOCK_G, BLOCK_D)
        along_xhat = per_channel(group_sum(s2, BLOCK_G, BLOCK_D) / D / S, BLOCK_G, BLOCK_D)
        dx = (dy - along_one - xhat * along_xhat) * rstds
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
