"""Backward of squeeze-excite's passes over images: z = f(u) * gate, u = x * scale + shift, both layouts (pending.py).

`sums` and `gradient` are called with addresses, as chain.py's functions are.
"""

import numba
import numpy as np

from fastcnn.kernels.cpu.chain import call, set_threads, there
from fastcnn.kernels.cpu.pending import (
    NONE,
    RUN,
    SILU,
    activate,
    add_product,
    add_products,
    affine,
    copy,
    differentiate,
    fill,
    flush,
    fold,
    inline,
    jit,
    plan,
    share,
    sigmoid,
    spread,
)


@inline
def silu_and_slope(dz, u, f, du):
    """f = silu(u), du = dz * silu'(u), then u = silu'(u), with one sigmoid for all."""
    t = u.dtype.type
    zero, one = t(0), t(1)
    for j in range(u.size):
        v = u[j]
        s = sigmoid(v, zero, one)
        derivative = s * (one + v * (one - s))
        f[j] = v * s
        du[j] = dz[j] * derivative
        u[j] = derivative


@inline
def value_and_slope(dz, u, f, du, kind, slope):
    """f = f(u), du = dz * f'(u), zero where f' is, then u = f'(u)."""
    copy(dz, du)
    differentiate(du, u, kind, slope)
    derivative = np.ones(u.size, u.dtype)
    differentiate(derivative, u, kind, slope)
    copy(u, f)
    activate(f, kind, slope)
    copy(derivative, u)


@jit
def image_products(dz, x, scale, shift, kind, slope, rows, N, C, sums):
    """sums [5, N * C], which start at zero: of dz * f(u), dz * f'(u) * x, dz * f'(u), f'(u) * x and f'(u)."""
    slope = x.dtype.type(slope)
    length, each, tasks, strips = plan(rows, N, C, x.size, True)
    partial = np.zeros((5, tasks if rows else 0, C))
    for task in numba.prange(tasks):
        c, channels, first, chunk, chunks, stride = share(rows, N, C, x.size, length, each, tasks, strips, task)
        scales, shifts = spread(scale, c, channels, rows, each, length), spread(shift, c, channels, rows, each, length)
        buffers = np.empty((3, length), x.dtype)
        runs, totals = np.zeros((5, length), x.dtype), np.zeros((5, length))
        for n in range(chunks):
            full = 0
            for a in range(first + n * stride, first + n * stride + chunk, length):
                b = min(a + length, first + n * stride + chunk)
                u, f, du = buffers[0, : b - a], buffers[1, : b - a], buffers[2, : b - a]
                affine(x[a:b], scales, shifts, u)
                if kind == SILU:
                    silu_and_slope(dz[a:b], u, f, du)
                else:
                    value_and_slope(dz[a:b], u, f, du, kind, slope)
                add_product(dz[a:b], f, runs[0])
                add_products(du, x[a:b], runs[1], runs[2])
                add_products(u, x[a:b], runs[3], runs[4])
                full += 1
                if full % RUN == 0:
                    for k in range(5):
                        flush(runs[k], totals[k])
            for k in range(5):
                flush(runs[k], totals[k])
                fold(totals[k], rows, each, partial[k, task] if rows else sums[k, n * C + c : n * C + c + channels])
            totals[:] = 0
    if rows:
        for task in range(tasks):
            for k in range(5):
                for c in range(C):
                    sums[k, task // strips * C + c] += partial[k, task, c]


@inline
def gated(dz, gate, add, d):
    """d = dz * gate + add."""
    for j in range(d.size):
        d[j] = dz[j] * gate[j] + add[j]


@jit
def image_gradient(dz, x, scale, shift, kind, slope, gate, add, rows, N, C, du):
    """du = (dz * gate + add) * f'(u); gate, add [N * C]."""
    slope = x.dtype.type(slope)
    length, each, tasks, strips = plan(rows, N, C, x.size, True)
    for task in numba.prange(tasks):
        c, channels, first, chunk, chunks, stride = share(rows, N, C, x.size, length, each, tasks, strips, task)
        scales, shifts = spread(scale, c, channels, rows, each, length), spread(shift, c, channels, rows, each, length)
        gates, adds, inner = np.zeros(length, x.dtype), np.zeros(length, x.dtype), np.empty(length, x.dtype)
        for n in range(chunks):
            image = task // strips if rows else n
            fill(gate[image * C + c : image * C + c + channels], rows, each, gates)
            fill(add[image * C + c : image * C + c + channels], rows, each, adds)
            for a in range(first + n * stride, first + n * stride + chunk, length):
                b = min(a + length, first + n * stride + chunk)
                gated(dz[a:b], gates, adds, du[a:b])
                if kind > NONE:
                    u = inner[: b - a]
                    affine(x[a:b], scales, shifts, u)
                    differentiate(du[a:b], u, kind, slope)


@call
def sums(like, threads, rows, N, C, size, dz, x, scale, shift, kind, slope, out):
    """out [5, N, C] of image_products."""
    set_threads(threads)
    total = np.zeros((5, N * C))
    image_products(
        there(dz, size, like), there(x, size, like), there(scale, C, like), there(shift, C, like), kind, slope, rows,
        N, C, total,
    )  # fmt: skip
    copy(total.ravel(), there(out, 5 * N * C, like))


@call
def gradient(like, threads, rows, N, C, size, dz, x, scale, shift, kind, slope, gate, add, du):
    """du of image_gradient."""
    set_threads(threads)
    image_gradient(
        there(dz, size, like), there(x, size, like), there(scale, C, like), there(shift, C, like), kind, slope,
        there(gate, N * C, like), there(add, N * C, like), rows, N, C, there(du, size, like),
    )  # fmt: skip
