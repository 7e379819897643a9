"""Local response norm: y[c] = x[c] * s[c]^-BETA, s[c] = K + ALPHA * sum of x^2 over a window of SIZE channels about c.

The window of c is c - SIZE // 2 to c + (SIZE - 1) // 2; ALPHA is already divided by SIZE. A thread holds several
channels of a pixel and their neighbours, in registers, as a tuple of blocks of one channel each: roots are what is dear
here, and so it takes little more than one for a channel. Contiguous memory gives a block of pixels for each channel.
channels_last memory is read in whole vectors of eight channels: the own, those before and those behind.
fp32 inside (fp64 for fp64).
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator


@triton.jit
def powers(s, BETA: tl.constexpr):
    """s^-BETA and 1 / s."""
    if BETA == 0.75:
        root = tl.rsqrt(s)
        return root * tl.sqrt(root), root * root
    elif BETA == 0:  # 0^0 is 1 as in torch
        return tl.full(s.shape, 1.0, s.dtype), 1.0 / s
    else:
        return tl.exp2(-BETA * tl.log2(s)), 1.0 / s


@triton.jit
def window(xs, FIRST: tl.constexpr, SIZE: tl.constexpr, ALPHA: tl.constexpr, K: tl.constexpr):
    """s of the window that begins with channel FIRST of the tuple xs."""
    total = xs[FIRST] * xs[FIRST]
    for j in tl.static_range(1, SIZE):
        total += xs[FIRST + j] * xs[FIRST + j]
    return total * ALPHA + K


@triton.jit
def outputs(
    xs, FIRST: tl.constexpr, COUNT: tl.constexpr,
    SIZE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """y of COUNT channels of the tuple xs from FIRST on."""
    ys = ()
    for c in tl.static_range(COUNT):
        scale, _ = powers(window(xs, FIRST + c - SIZE // 2, SIZE, ALPHA, K), BETA)
        ys = ys + (xs[FIRST + c] * scale,)
    return ys


@triton.jit
def gradients(
    xs, dys, c0, C, FIRST: tl.constexpr, DY_FIRST: tl.constexpr, COUNT: tl.constexpr,
    SIZE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """dx of COUNT channels, xs[FIRST] and dys[DY_FIRST] being channel c0."""
    before: tl.constexpr = (SIZE - 1) // 2  # the windows that reach a channel begin here
    direct = ()
    ratios = ()  # dy * y / s, of every channel in whose window one of ours lies
    for j in tl.static_range(COUNT + SIZE - 1):
        scale, inverse = powers(window(xs, FIRST + j - before - SIZE // 2, SIZE, ALPHA, K), BETA)
        part = dys[DY_FIRST + j - before] * scale
        direct = direct + (part,)
        c = c0 + j - before
        # where there is no channel, s may be 0
        ratios = ratios + (tl.where((c >= 0) & (c < C), part * xs[FIRST + j - before] * inverse, 0.0),)
    dxs = ()
    for c in tl.static_range(COUNT):
        total = ratios[c]
        for j in tl.static_range(1, SIZE):
            total += ratios[c + j]
        dxs = dxs + (direct[c + before] - 2 * ALPHA * BETA * xs[FIRST + c] * total,)
    return dxs


@triton.jit
def planes_of(C, S, INT64: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Offset of the image, first channel and pixels of this program."""
    tiles, blocks = tl.cdiv(S, BLOCK_S), tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    n = pid // tiles // blocks
    c0 = pid // tiles % blocks * BLOCK_C
    s = pid % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    if INT64:
        return n.to(tl.int64) * C * S, c0, s
    else:
        return n * C * S, c0, s


@triton.jit
def load_planes(ptr, c0, s, C, S, COUNT: tl.constexpr):
    """Tuple of COUNT channels from c0 on, 0 where there is none."""
    values = ()
    for j in tl.static_range(COUNT):
        c = c0 + j
        pixels = tl.where((c >= 0) & (c < C), S, 0)
        values = values + (accumulator(tl.load(ptr + c * S + s, mask=s < pixels, other=0.0)),)
    return values


@triton.jit
def store_planes(ptr, values, c0, s, C, S, COUNT: tl.constexpr):
    for j in tl.static_range(COUNT):
        pixels = tl.where(c0 + j < C, S, 0)
        tl.store(ptr + (c0 + j) * S + s, values[j].to(ptr.dtype.element_ty), mask=s < pixels)


@triton.jit
def local_response_norm_planes_kernel(
    x_ptr, y_ptr, C, S,
    SIZE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
    INT64: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # one program computes BLOCK_S pixels of BLOCK_C channels of y, in contiguous memory
    image, c0, s = planes_of(C, S, INT64, BLOCK_C, BLOCK_S)
    xs = load_planes(x_ptr + image, c0 - SIZE // 2, s, C, S, BLOCK_C + SIZE - 1)
    store_planes(y_ptr + image, outputs(xs, SIZE // 2, BLOCK_C, SIZE, ALPHA, BETA, K), c0, s, C, S, BLOCK_C)


@triton.jit
def local_response_norm_planes_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, C, S,
    SIZE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
    INT64: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # one program computes BLOCK_S pixels of BLOCK_C channels of dx, in contiguous memory
    image, c0, s = planes_of(C, S, INT64, BLOCK_C, BLOCK_S)
    before: tl.constexpr = (SIZE - 1) // 2
    xs = load_planes(x_ptr + image, c0 - (SIZE - 1), s, C, S, BLOCK_C + 2 * (SIZE - 1))
    dys = load_planes(dy_ptr + image, c0 - before, s, C, S, BLOCK_C + SIZE - 1)
    dxs = gradients(xs, dys, c0, C, SIZE - 1, before, BLOCK_C, SIZE, ALPHA, BETA, K)
    store_planes(dx_ptr + image, dxs, c0, s, C, S, BLOCK_C)


@triton.jit
def rows_of(pixels, C, WHOLE: tl.constexpr, INT64: tl.constexpr, BLOCK: tl.constexpr):
    """First channels [BLOCK, 1], offsets [BLOCK, 8] and mask [BLOCK, 1] of this program's runs of eight channels."""
    runs = tl.cdiv(C, 8)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    if INT64:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    c0 = i % runs * 8
    if WHOLE:
        offset = i * 8 + tl.arange(0, 8)[None, :]
    else:
        offset = i // runs * C + c0 + tl.arange(0, 8)[None, :]
    return c0, offset, i // runs < pixels


@triton.jit
def load_run(ptr, offset, c0, C, inside, shift: tl.constexpr, WHOLE: tl.constexpr):
    """Tuple of eight channels, `shift` further; 0 where there is none."""
    c = c0 + shift
    if WHOLE:
        here = inside & (c >= 0) & (c < C)
    else:
        here = inside & (c >= 0) & (c + tl.arange(0, 8)[None, :] < C)
    values = accumulator(tl.load(ptr + offset + shift, mask=here, other=0.0))
    # a thread has all eight: taking them apart moves nothing
    even, odd = tl.split(tl.reshape(values, [values.shape[0], 2, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    v0, v4 = tl.split(a)
    v1, v5 = tl.split(b)
    v2, v6 = tl.split(c)
    v3, v7 = tl.split(d)
    return (v0, v1, v2, v3, v4, v5, v6, v7)


@triton.jit
def load_runs(ptr, offset, c0, C, inside, WHOLE: tl.constexpr):
    """Tuple of the own eight channels, the eight before and the eight behind."""
    before = load_run(ptr, offset, c0, C, inside, -8, WHOLE)
    own = load_run(ptr, offset, c0, C, inside, 0, WHOLE)
    return before + own + load_run(ptr, offset, c0, C, inside, 8, WHOLE)


@triton.jit
def store_run(ptr, v, offset, c0, C, inside, WHOLE: tl.constexpr):
    even = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
    odd = tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7]))
    values = tl.reshape(tl.join(even, odd), offset.shape)
    if not WHOLE:
        inside = inside & (c0 + tl.arange(0, 8)[None, :] < C)
    tl.store(ptr + offset, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def local_response_norm_rows_kernel(
    x_ptr, y_ptr, pixels, C,
    SIZE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
    WHOLE: tl.constexpr, INT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program computes BLOCK runs of eight channels of y, in channels_last memory; WHOLE: 8 divides C
    c0, offset, inside = rows_of(pixels, C, WHOLE, INT64, BLOCK)
    xs = load_runs(x_ptr, offset, c0, C, inside, WHOLE)
    store_run(y_ptr, outputs(xs, 8, 8, SIZE, ALPHA, BETA, K), offset, c0, C, inside, WHOLE)


@triton.jit
def local_response_norm_rows_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, pixels, C,
    SIZE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
    WHOLE: tl.constexpr, INT64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program computes BLOCK runs of eight channels of dx, in channels_last memory
    c0, offset, inside = rows_of(pixels, C, WHOLE, INT64, BLOCK)
    xs = load_runs(x_ptr, offset, c0, C, inside, WHOLE)
    dys = load_runs(dy_ptr, offset, c0, C, inside, WHOLE)
    dxs = gradients(xs, dys, tl.reshape(c0, [BLOCK]), C, 8, 8, 8, SIZE, ALPHA, BETA, K)
    store_run(dx_ptr, dxs, offset, c0, C, inside, WHOLE)
