"""Passes over a pending activation: z = out(f(x * scale + shift) * gate + (right * right_scale + right_shift)).

What is None is left out. fp32 inside (fp64 for fp64). Tensors are rows by channels, tiles and strips as in batch_norm:
with a gate the images are the outer index, so that a tile has one row of the gate. Sums go strip by strip to memory and
are added in the order of the strips: same bits on every run.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.activation import activate, activate_backward
from fastcnn.kernels.triton.batch_norm import tile_of
from fastcnn.kernels.triton.common import accumulator


@triton.jit
def vector(ptr, c, C, DTYPE: tl.constexpr):
    """The channels c of a vector [C], zeros without one."""
    if ptr is None:
        return tl.zeros([c.shape[0]], DTYPE)
    else:
        return accumulator(tl.load(ptr + c, mask=c < C, other=0.0))


@triton.jit
def gate_of(gate_ptr, tile, c, C, inner, ONE_GATE: tl.constexpr, INT64: tl.constexpr, BLOCK_I: tl.constexpr):
    """What a tile's image multiplies its channels by: [1, BLOCK_C], or [1, 1] where one number is for all of them."""
    o = tile // tl.cdiv(inner, BLOCK_I)
    if INT64:
        o = o.to(tl.int64)
    if ONE_GATE:
        return accumulator(tl.load(gate_ptr + o + tl.zeros([1, 1], tl.int32)))
    else:
        return accumulator(tl.load(gate_ptr + o * C + c, mask=c < C, other=0.0))[None, :]


@triton.jit
def pending_forward_kernel(
    x_ptr, scale_ptr, shift_ptr, gate_ptr, right_ptr, right_scale_ptr, right_shift_ptr, z_ptr,
    C, inner, tiles, tiles_per_strip, stride_o, stride_i, stride_c,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ONE_GATE: tl.constexpr, OUT: tl.constexpr,
    BY_CHANNEL: tl.constexpr, ALIGN: tl.constexpr, INT64: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program computes z of a strip of BLOCK_C channels
    DTYPE: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.program_id(0) * tiles_per_strip
    end = tl.minimum(begin + tiles_per_strip, tiles)
    scale = vector(scale_ptr, c, C, DTYPE)
    shift = vector(shift_ptr, c, C, DTYPE)
    right_scale = vector(right_scale_ptr, c, C, DTYPE)
    right_shift = vector(right_shift_ptr, c, C, DTYPE)
    for tile in range(begin, end):
        offset, inside, _ = tile_of(tile, c, C, inner, stride_o, stride_i, stride_c, BY_CHANNEL, ALIGN, INT64, BLOCK_I)
        z = accumulator(tl.load(x_ptr + offset, mask=inside))
        if scale_ptr is not None:
            z = z * scale[None, :] + shift[None, :]
        if ACTIVATION != "none":
            z = activate(z, SLOPE, ACTIVATION)
        if gate_ptr is not None:
            z *= gate_of(gate_ptr, tile, c, C, inner, ONE_GATE, INT64, BLOCK_I)
        if right_ptr is not None:
            right = accumulator(tl.load(right_ptr + offset, mask=inside))
            if right_scale_ptr is not None:
                right = right * right_scale[None, :] + right_shift[None, :]
            z += right
        if OUT != "none":
            z = activate(z, 0.0, OUT)
        tl.store(z_ptr + offset, z.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def pending_backward_kernel(
    dz_ptr, add_ptr, x_ptr, scale_ptr, shift_ptr, gate_ptr, right_ptr, z_ptr,
    dx_ptr, dright_ptr, partial_ptr, dgate_ptr,
    C, inner, tiles, tiles_per_strip, stride_o, stride_i, stride_c,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ONE_GATE: tl.constexpr,
    JOIN: tl.constexpr, SCALED: tl.constexpr, LEFT_SUMS: tl.constexpr, RIGHT_SUMS: tl.constexpr,
    BY_CHANNEL: tl.constexpr, ALIGN: tl.constexpr, INT64: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program reads everything of a strip of BLOCK_C channels once. It writes the gradients dx and dright, sums of
    # du * x and du (LEFT_SUMS), then of dm * right and dm (RIGHT_SUMS), and per tile those of dm * f (dgate).
    # dm is the gradient before `out`, whose result z is; du that at u = x * scale + shift
    DTYPE: tl.constexpr = tl.float64 if dz_ptr.dtype.element_ty == tl.float64 else tl.float32
    strip = tl.program_id(0)
    if INT64:
        strip = strip.to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = strip * tiles_per_strip
    end = tl.minimum(begin + tiles_per_strip, tiles)
    scale = vector(scale_ptr, c, C, DTYPE)
    shift = vector(shift_ptr, c, C, DTYPE)
    left_1 = tl.zeros([BLOCK_I, BLOCK_C], DTYPE)
    left_x = tl.zeros_like(left_1)
    right_1 = tl.zeros_like(left_1)
    right_x = tl.zeros_like(left_1)
    for tile in range(begin, end):
        offset, inside, _ = tile_of(tile, c, C, inner, stride_o, stride_i, stride_c, BY_CHANNEL, ALIGN, INT64, BLOCK_I)
        dm = accumulator(tl.load(dz_ptr + offset, mask=inside, other=0.0))
        if add_ptr is not None and JOIN:
            dm += accumulator(tl.load(add_ptr + offset, mask=inside, other=0.0))
        if z_ptr is not None:
            z = accumulator(tl.load(z_ptr + offset, mask=inside, other=0.0))
            dm = tl.where(z <= 0, 0.0, dm)
        if RIGHT_SUMS:
            right_1 += dm
            right_x += dm * accumulator(tl.load(right_ptr + offset, mask=inside, other=0.0))
        if dright_ptr is not None:
            tl.store(dright_ptr + offset, dm.to(dright_ptr.dtype.element_ty), mask=inside)
        du = dm
        if x_ptr is not None:
            x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
            u = x
            if scale_ptr is not None:
                u = x * scale[None, :] + shift[None, :]
            f = u
            if ACTIVATION != "none":
                f = activate(u, SLOPE, ACTIVATION)
            if dgate_ptr is not None:
                tl.store(dgate_ptr + tile * C + c, tl.sum(tl.where(inside, dm * f, 0.0), axis=0), mask=c < C)
            if gate_ptr is not None:
                du = dm * gate_of(gate_ptr, tile, c, C, inner, ONE_GATE, INT64, BLOCK_I)
            if ACTIVATION == "sigmoid" or ACTIVATION == "tanh":
                du = activate_backward(du, f, SLOPE, ACTIVATION)
            elif ACTIVATION != "none":
                du = activate_backward(du, u, SLOPE, ACTIVATION)
            if LEFT_SUMS:
                # rows that do not exist have a u, too: that of x = 0
                du = tl.where(inside, du, 0.0)
                left_1 += du
                left_x += du * x
        if dx_ptr is not None:
            dx = du
            if SCALED:
                dx *= scale[None, :]
            if add_ptr is not None and not JOIN:
                dx += accumulator(tl.load(add_ptr + offset, mask=inside, other=0.0))
            tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    SUMS: tl.constexpr = 2 * LEFT_SUMS + 2 * RIGHT_SUMS
    if SUMS > 0:
        partial_ptr += strip * SUMS * C + c
    if LEFT_SUMS:
        tl.store(partial_ptr, tl.sum(left_x, axis=0), mask=c < C)
        tl.store(partial_ptr + C, tl.sum(left_1, axis=0), mask=c < C)
    if RIGHT_SUMS:
        partial_ptr += (SUMS - 2) * C
        tl.store(partial_ptr, tl.sum(right_x, axis=0), mask=c < C)
        tl.store(partial_ptr + C, tl.sum(right_1, axis=0), mask=c < C)


@triton.jit(do_not_specialize=["parts"])
def pending_sums_kernel(
    partial_ptr, sums_ptr, columns, parts, INT64: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    # one program adds the parts of BLOCK_C columns of one group: partial [groups, parts, columns]
    group = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if INT64:
        group = group.to(tl.int64)
    sums = tl.zeros([BLOCK_P, BLOCK_C], partial_ptr.dtype.element_ty)
    partial_ptr += group * parts * columns
    for begin in range(0, parts, BLOCK_P):
        part = begin + tl.arange(0, BLOCK_P)
        inside = (part < parts)[:, None] & (c < columns)[None, :]
        sums += tl.load(partial_ptr + (part * columns)[:, None] + c[None, :], mask=inside, other=0.0)
    tl.store(sums_ptr + group * columns + c, tl.sum(sums, axis=0).to(sums_ptr.dtype.element_ty), mask=c < columns)
