"""Local response norm on numpy arrays, two layouts: planes x[N, C, S] (contiguous), rows x[pixels, C] (channels_last).

y = x * s^-beta, s = k + alpha * sum of x^2 over a window of `size` channels; alpha is already divided by the size. A
task takes a block of pixels small enough for the cache, with every channel. alpha, beta and k have the dtype of x.
"""

import numba
import numpy as np

BLOCK = 32768  # elements of a block of planes
ROWS = 4096  # elements of a block of rows

jit = numba.njit(parallel=True, cache=True, error_model="numpy")
inline = numba.njit(error_model="numpy")


@inline
def powers(s, scale, inverse, beta):
    """scale = s^-beta and inverse = 1 / s; s is lost."""
    one = s.dtype.type(1)
    if beta == 0.75:
        for i in range(s.size):
            root = one / np.sqrt(s[i])
            scale[i] = root * np.sqrt(root)
            inverse[i] = root * root
    else:
        for i in range(s.size):
            scale[i] = s[i] ** -beta
            inverse[i] = one / s[i]


@inline
def add(x, total):
    for i in range(x.size):
        total[i] += x[i]


@inline
def plane_window(x, n, c, begin, size, alpha, k, s):
    """s of channel c of image n, for s.size pixels from `begin`."""
    s[:] = 0
    for j in range(max(c - size // 2, 0), min(c + (size - 1) // 2 + 1, x.shape[1])):
        for i in range(s.size):
            s[i] += x[n, j, begin + i] * x[n, j, begin + i]
    for i in range(s.size):
        s[i] = s[i] * alpha + k


@inline
def pixels_per_block(C):
    """Pixels of a block of planes: a multiple of 16, for the vectors."""
    return max(16, min(512, BLOCK // C // 16 * 16))


@jit
def planes_forward(x, y, size, alpha, beta, k):
    """y."""
    N, C, S = x.shape
    step = pixels_per_block(C)
    blocks = (S + step - 1) // step
    for task in numba.prange(N * blocks):
        n = task // blocks
        begin = (task - n * blocks) * step
        s = np.empty(min(step, S - begin), x.dtype)
        scale, inverse = np.empty_like(s), np.empty_like(s)
        for c in range(C):
            plane_window(x, n, c, begin, size, alpha, k, s)
            powers(s, scale, inverse, beta)
            for i in range(s.size):
                y[n, c, begin + i] = x[n, c, begin + i] * scale[i]


@jit
def planes_backward(dy, x, dx, size, alpha, beta, k):
    """dx."""
    N, C, S = x.shape
    step = pixels_per_block(C)
    blocks = (S + step - 1) // step
    factor = x.dtype.type(2) * alpha * beta
    for task in numba.prange(N * blocks):
        n = task // blocks
        begin = (task - n * blocks) * step
        s = np.empty(min(step, S - begin), x.dtype)
        scale, inverse = np.empty_like(s), np.empty_like(s)
        ratio = np.empty((C, s.size), x.dtype)  # dy * y / s
        for c in range(C):
            plane_window(x, n, c, begin, size, alpha, k, s)
            powers(s, scale, inverse, beta)
            for i in range(s.size):
                direct = dy[n, c, begin + i] * scale[i]
                dx[n, c, begin + i] = direct
                ratio[c, i] = direct * x[n, c, begin + i] * inverse[i]
        for c in range(C):
            s[:] = 0
            # the channels in whose windows c lies
            for j in range(max(c - (size - 1) // 2, 0), min(c + size // 2 + 1, C)):
                add(ratio[j], s)
            for i in range(s.size):
                dx[n, c, begin + i] -= factor * x[n, c, begin + i] * s[i]


@inline
def sum_windows(padded, size, s):
    """s[i] = sum of padded[i : i + size], over several pixels at once: zeros between them keep them apart."""
    s[:] = 0
    count = s.size - size + 1
    for j in range(size):
        add(padded[j : j + count], s[:count])


@inline
def row_windows(x, size, alpha, k, padded, s):
    """s [pixels, C + size - 1] of the rows x [pixels, C], the columns past C being of no use; fills padded."""
    C, L, before = x.shape[1], x.shape[1] + size - 1, size // 2
    for row in range(x.shape[0]):
        for c in range(C):
            padded[row * L + before + c] = x[row, c] * x[row, c]
    sum_windows(padded, size, s)
    for i in range(s.size):
        s[i] = s[i] * alpha + k


@jit
def rows_forward(x, y, size, alpha, beta, k):
    """y."""
    rows, C = x.shape
    L = C + size - 1
    step = max(1, ROWS // L)
    for task in numba.prange((rows + step - 1) // step):
        block, out = x[task * step : task * step + step], y[task * step : task * step + step]
        padded = np.zeros(block.shape[0] * L, x.dtype)
        s = np.empty_like(padded)
        scale, inverse = np.empty_like(s), np.empty_like(s)
        row_windows(block, size, alpha, k, padded, s)
        powers(s, scale, inverse, beta)
        for row in range(block.shape[0]):
            for c in range(C):
                out[row, c] = block[row, c] * scale[row * L + c]


@jit
def rows_backward(dy, x, dx, size, alpha, beta, k):
    """dx."""
    rows, C = x.shape
    L, before = C + size - 1, (size - 1) // 2
    step = max(1, ROWS // L)
    factor = x.dtype.type(2) * alpha * beta
    for task in numba.prange((rows + step - 1) // step):
        begin = task * step
        block, grad, out = x[begin : begin + step], dy[begin : begin + step], dx[begin : begin + step]
        padded = np.zeros(block.shape[0] * L, x.dtype)
        s = np.empty_like(padded)
        scale, inverse = np.empty_like(s), np.empty_like(s)
        row_windows(block, size, alpha, k, padded, s)
        powers(s, scale, inverse, beta)
        # now dy * y / s, with as many zeros before a pixel as its windows reach back
        padded[:] = 0
        for row in range(block.shape[0]):
            for c in range(C):
                direct = grad[row, c] * scale[row * L + c]
                out[row, c] = direct
                padded[row * L + before + c] = direct * block[row, c] * inverse[row * L + c]
        sum_windows(padded, size, s)
        for row in range(block.shape[0]):
            for c in range(C):
                out[row, c] -= factor * block[row, c] * s[row * L + c]
