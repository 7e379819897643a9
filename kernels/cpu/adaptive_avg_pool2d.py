"""The backward of global average pooling on CPU, fp32 and fp64: every pixel of a plane gets the same share.

There is no forward: PyTorch's mean reads memory as fast as it can be read.
"""

import numba
import numpy as np


@numba.njit(parallel=True, cache=True)
def global_avg_pool2d_backward(dy, dx):
    # dy [N*C, 1, 1]; dx [N*C, H, W]
    planes, H, W = dx.shape
    pixels = dx.dtype.type(H * W)
    for plane in numba.prange(planes):
        dx[plane] = dy[plane, 0, 0] / pixels


@numba.njit(parallel=True, cache=True)
def global_avg_pool2d_backward_channels_last(dy, dx):
    # dy [N, 1, 1, C]; dx [N, H, W, C]
    N, H, W, C = dx.shape
    pixels = dx.dtype.type(H * W)
    for row in numba.prange(N * H):
        n, h = row // H, row % H
        share = np.empty(C, dx.dtype)
        for c in range(C):
            share[c] = dy[n, 0, 0, c] / pixels
        for w in range(W):
            dx[n, h, w] = share
