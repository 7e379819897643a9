"""What the pooling kernels share: the tile of one program, the parts of adaptive pooling.

Dense tensors are seen as [rows, columns]: channels_last as [N*P*Q, C], contiguous as [N*C, P*Q]. So columns run along
memory in both, and element (row, column) of the tile lies at row * columns + column.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.activation import activate


@triton.jit
def pixel_tile(
    rows,
    columns,
    C,
    P,
    Q,
    CHANNELS_LAST: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """n, c, p, q of this program's elements, each broadcastable to [BLOCK_A, BLOCK_B]; their offset; which exist."""
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    blocks = tl.cdiv(columns, BLOCK_B)
    a = pid // blocks * BLOCK_A + tl.arange(0, BLOCK_A)[:, None]
    b = pid % blocks * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    if CHANNELS_LAST:
        n, p, q, c = a // (P * Q), a // Q % P, a % Q, b
    else:
        n, c, p, q = a // C, a % C, b // Q, b % Q
    return n, c, p, q, a * columns + b, (a < rows) & (b < columns)


@triton.jit
def part_start(i, size_from, size_to):
    """Where the i-th of size_from equal parts begins in size_to pixels; its end is part_end."""
    return i * size_to // size_from


@triton.jit
def part_end(i, size_from, size_to):
    return ((i + 1) * size_to + size_from - 1) // size_from


@triton.jit
def take(best, tap, x, t):
    """Maximum so far and its tap, after a look at x, which lies at tap t."""
    # the first of equals wins; of NaNs the last, as in torch; `!=` because compiled maximum drops NaN
    better = (x > best) | (x != x)
    return tl.where(better, x, best), tl.where(better, t, tap)


@triton.jit
def transformed(x, scale, shift, SLOPE: tl.constexpr, ACTIVATION: tl.constexpr):
    """The pending activation of loaded x."""
    u = x * scale + shift
    if ACTIVATION == "none":
        return u
    else:
        return activate(u, SLOPE, ACTIVATION)
