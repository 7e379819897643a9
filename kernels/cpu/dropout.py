"""Dropout on numpy arrays: the stream of kernels/triton/dropout.py, bit for bit.

Philox runs in 64-bit lanes (a 32 x 32 bit product needs them); blocks small enough for the cache hold its verdicts,
because the loops over Philox and over memory each vectorise alone and not together.
"""

import numba
import numpy as np

BLOCK = 2048  # elements per block of verdicts, a multiple of 4
BLOCK_C = 64  # channels per block where memory is channels last
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


@numba.njit(inline="always")
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of a counter and a key; every argument and result is a uint64 below 2^32."""
    for _ in range(10):
        a = np.uint64(0xD2511F53) * c0
        b = np.uint64(0xCD9E8D57) * c2
        c0 = (b >> HALF) ^ c1 ^ k0
        c1 = b & LOW
        c2 = (a >> HALF) ^ c3 ^ k1
        c3 = a & LOW
        k0 = (k0 + np.uint64(0x9E3779B9)) & LOW
        k1 = (k1 + np.uint64(0xBB67AE85)) & LOW
    return c0, c1, c2, c3


@numba.njit
def fill_verdicts(kept, first_group, groups, seed, threshold):
    """kept[4 * g + j] = 1 if word j of group first_group + g says keep, else 0."""
    key0 = np.uint64(seed) & LOW
    key1 = np.uint64(seed) >> HALF
    zero = np.uint64(0)
    for g in range(groups):
        counter = np.uint64(first_group + g)
        a, b, c, d = philox(counter & LOW, counter >> HALF, zero, zero, key0, key1)
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
    zero = x.dtype.type(0)
    for block in numba.prange((x.size + BLOCK - 1) // BLOCK):
        start = block * BLOCK
        count = min(BLOCK, x.size - start)
        kept = np.empty(BLOCK, np.uint8)
        fill_verdicts(kept, start // 4, (count + 3) // 4, seed, threshold)
        for i in range(count):
            y[start + i] = x[start + i] * (scale if kept[i] else zero)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def dropout_channels_last(x, y, seed, threshold, scale):
    """The same for x and y of shape (N, pixels, C), whose logical order is (N, C, pixels)."""
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
