"""Dropout on numpy arrays: the stream of kernels/triton/dropout.py, bit for bit.

Philox runs in 64-bit lanes (a 32 x 32 bit product needs them). Where four words belong to four neighbours, or to one
channel of four pixels, the loop over Philox also reads and writes memory, which hides behind the products; it then runs
at the rate of the 512-bit instructions, about 66 for 32 elements. Elsewhere blocks small enough for the cache hold the
verdicts.
"""

import numba
import numpy as np

BLOCK = 16384  # elements per task
BLOCK_C = 64  # channels per block of verdicts where memory is channels last
WIDE = 32  # channels from which a loop over them fills vector registers
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


@numba.njit(inline="always")
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of a counter and a key, uint64 below 2^32; so are the results."""
    for _ in range(10):
        # masked where they are multiplied, which costs nothing: the product of vectors reads the low halves alone
        a = np.uint64(0xD2511F53) * (c0 & LOW)
        b = np.uint64(0xCD9E8D57) * (c2 & LOW)
        c0 = (b >> HALF) ^ c1 ^ k0
        c1 = b
        c2 = (a >> HALF) ^ c3 ^ k1
        c3 = a
        k0 = k0 + np.uint64(0x9E3779B9)
        k1 = k1 + np.uint64(0xBB67AE85)
    return c0 & LOW, c1 & LOW, c2 & LOW, c3 & LOW


@numba.njit(inline="always")
def words_of(group, seed):
    """The four words of a group of the stream."""
    zero = np.uint64(0)
    return philox(group, group >> HALF, zero, zero, np.uint64(seed) & LOW, np.uint64(seed) >> HALF)


@numba.njit
def drop_groups(x, y, first_group, seed, threshold, scale):
    """y = x * (scale where kept, else 0) for contiguous x and y that begin with a group."""
    zero = x.dtype.type(0)
    for g in range(x.size // 4):
        a, b, c, d = words_of(np.uint64(first_group + g), seed)
        # a product, not a selection of zero: NaN and Inf stay visible where they are dropped, as in torch
        y[4 * g] = x[4 * g] * (scale if a >= threshold else zero)
        y[4 * g + 1] = x[4 * g + 1] * (scale if b >= threshold else zero)
        y[4 * g + 2] = x[4 * g + 2] * (scale if c >= threshold else zero)
        y[4 * g + 3] = x[4 * g + 3] * (scale if d >= threshold else zero)
    rest = x.size // 4 * 4
    if rest < x.size:
        words = words_of(np.uint64(first_group + rest // 4), seed)
        for j in range(x.size - rest):
            y[rest + j] = x[rest + j] * (scale if words[j] >= threshold else zero)


@numba.njit
def drop_quad(x, y, first_group, step, seed, threshold, scale):
    """The same for four pixels by channels: channel c has the words of group first_group + c * step."""
    zero = x.dtype.type(0)
    for i in range(x.shape[1]):
        a, b, c, d = words_of(np.uint64(first_group + i * step), seed)
        y[0, i] = x[0, i] * (scale if a >= threshold else zero)
        y[1, i] = x[1, i] * (scale if b >= threshold else zero)
        y[2, i] = x[2, i] * (scale if c >= threshold else zero)
        y[3, i] = x[3, i] * (scale if d >= threshold else zero)


@numba.njit
def fill_verdicts(kept, first_group, groups, seed, threshold):
    """kept[4 * g + j] = 1 if word j of group first_group + g says keep, else 0."""
    for g in range(groups):
        a, b, c, d = words_of(np.uint64(first_group + g), seed)
        kept[4 * g] = a >= threshold
        kept[4 * g + 1] = b >= threshold
        kept[4 * g + 2] = c >= threshold
        kept[4 * g + 3] = d >= threshold


@numba.njit(parallel=True, cache=True, error_model="numpy")
def dropout(x, y, seed, threshold, scale):
    """y = x * (scale where kept, else 0), for flat x and y in logical order.

    Args:
        seed: int64. threshold: uint64, dropped below it. scale: of the dtype of x.
    """
    for block in numba.prange((x.size + BLOCK - 1) // BLOCK):
        start = block * BLOCK
        stop = min(start + BLOCK, x.size)
        drop_groups(x[start:stop], y[start:stop], start // 4, seed, threshold, scale)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def dropout_quads(x, y, seed, threshold, scale):
    """The same for x and y of shape (N, pixels, C), whose logical order is (N, C, pixels); 4 divides pixels."""
    N, pixels, C = x.shape
    quads = pixels // 4
    for quad in numba.prange(N * quads):
        n = quad // quads
        q = quad - n * quads
        pixel = slice(4 * q, 4 * q + 4)
        drop_quad(x[n, pixel], y[n, pixel], n * C * quads + q, quads, seed, threshold, scale)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def dropout_channels_last(x, y, seed, threshold, scale):
    """The same for any number of pixels."""
    N, pixels, C = x.shape
    zero = x.dtype.type(0)
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    for block in numba.prange(N * blocks):
        n = block // blocks
        first_c = (block - n * blocks) * BLOCK_C
        channels = min(BLOCK_C, C - first_c)
        first = (n * C + first_c) * pixels
        skipped = first % 4
        groups = (skipped + channels * pixels + 3) // 4
        kept = np.empty(4 * groups, np.uint8)
        fill_verdicts(kept, first // 4, groups, seed, threshold)
        for i in range(pixels):
            for c in range(channels):
                factor = scale if kept[skipped + c * pixels + i] else zero
                y[n, i, first_c + c] = x[n, i, first_c + c] * factor
