"""Backward of pools that read a pending activation z = f(x * scale + shift): the gradient of z is not stored.

Tensors are channels_last, seen as rows by channels. One program computes a strip of tiles, so that batch norm's sums,
of du * x and of du, leave it once per strip; pending.pending_sums_kernel adds them in order. du is the gradient at
u = x * scale + shift.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.activation import activate, activate_backward
from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.max_pool2d import from_windows


@triton.jit
def _before(dz, x_ptr, offset, inside, scale, shift, SLOPE: tl.constexpr, ACTIVATION: tl.constexpr):
    """(du, du * x) from the gradient of z."""
    x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
    du = dz
    if ACTIVATION == "sigmoid" or ACTIVATION == "tanh":
        du = activate_backward(dz, activate(x * scale + shift, SLOPE, ACTIVATION), SLOPE, ACTIVATION)
    elif ACTIVATION != "none":
        du = activate_backward(dz, x * scale + shift, SLOPE, ACTIVATION)
    # elements that do not exist have a u, too
    du = tl.where(inside, du, 0.0)
    return du, du * x


@triton.jit
def _store(dx_ptr, add_ptr, offset, inside, du, scale, SCALED: tl.constexpr):
    if SCALED:
        du = du * scale
    if add_ptr is not None:
        du += accumulator(tl.load(add_ptr + offset, mask=inside, other=0.0))
    tl.store(dx_ptr + offset, du.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def max_pool2d_pending_backward_kernel(
    dy_ptr, tap_ptr, x_ptr, scale_ptr, shift_ptr, add_ptr, dx_ptr, partial_ptr,
    rows, C, H, W, P, Q, cells_h, cells_w, tiles, tiles_per_strip,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, BEFORE_H: tl.constexpr, BEFORE_W: tl.constexpr,
    AFTER_H: tl.constexpr, AFTER_W: tl.constexpr, SLOPE: tl.constexpr, ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr, INT64: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program: strips of BLOCK_A x BLOCK_B cells of STRIDE_H x STRIDE_W (1 or 2) input elements, as max_pool2d's
    DTYPE: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    strip = tl.program_id(0)
    if INT64:
        strip = strip.to(tl.int64)
    c = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B))[None, :]
    scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)
    shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)
    total = tl.zeros([BLOCK_A, BLOCK_B], DTYPE)
    total_x = tl.zeros([BLOCK_A, BLOCK_B], DTYPE)
    begin = strip * tiles_per_strip
    for tile in range(begin, tl.minimum(begin + tiles_per_strip, tiles)):
        row = tile * BLOCK_A + tl.arange(0, BLOCK_A)[:, None]
        n, a, b = row // (cells_h * cells_w), row // cells_w % cells_h, row % cells_w
        inside = (row < rows) & (c < C)
        h, w = a * STRIDE_H, b * STRIDE_W
        window = ((n * P + a) * Q + b) * C + c
        here = ((n * H + h) * W + w) * C + c
        right, below = here + C, here + W * C
        corner = below + C
        is_right, is_below = inside & (w + 1 < W), inside & (h + 1 < H)
        dz00 = from_windows(
            dy_ptr, tap_ptr, window, a, b, inside, C, P, Q, 0, 0, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
            BEFORE_H, BEFORE_W, AFTER_H, AFTER_W, True,
        )  # fmt: skip
        if STRIDE_W == 2:
            dz01 = from_windows(
                dy_ptr, tap_ptr, window, a, b, inside, C, P, Q, 0, 1, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
                BEFORE_H, BEFORE_W, AFTER_H, AFTER_W, True,
            )  # fmt: skip
        if STRIDE_H == 2:
            dz10 = from_windows(
                dy_ptr, tap_ptr, window, a, b, inside, C, P, Q, 1, 0, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
                BEFORE_H, BEFORE_W, AFTER_H, AFTER_W, True,
            )  # fmt: skip
        if STRIDE_H == 2 and STRIDE_W == 2:
            dz11 = from_windows(
                dy_ptr, tap_ptr, window, a, b, inside, C, P, Q, 1, 1, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
                BEFORE_H, BEFORE_W, AFTER_H, AFTER_W, True,
            )  # fmt: skip
        # all windows before the first store, which might change them for all that the compiler knows
        du, of_x = _before(dz00, x_ptr, here, inside, scale, shift, SLOPE, ACTIVATION)
        total += du
        total_x += of_x
        _store(dx_ptr, add_ptr, here, inside, du, scale, SCALED)
        if STRIDE_W == 2:
            du, of_x = _before(dz01, x_ptr, right, is_right, scale, shift, SLOPE, ACTIVATION)
            total += du
            total_x += of_x
            _store(dx_ptr, add_ptr, right, is_right, du, scale, SCALED)
        if STRIDE_H == 2:
            du, of_x = _before(dz10, x_ptr, below, is_below, scale, shift, SLOPE, ACTIVATION)
            total += du
            total_x += of_x
            _store(dx_ptr, add_ptr, below, is_below, du, scale, SCALED)
        if STRIDE_H == 2 and STRIDE_W == 2:
            du, of_x = _before(dz11, x_ptr, corner, is_right & is_below, scale, shift, SLOPE, ACTIVATION)
            total += du
            total_x += of_x
            _store(dx_ptr, add_ptr, corner, is_right & is_below, du, scale, SCALED)
    partial_ptr += strip * 2 * C
    tl.store(partial_ptr + c, tl.sum(total_x, axis=0)[None, :], mask=c < C)
    tl.store(partial_ptr + C + c, tl.sum(total, axis=0)[None, :], mask=c < C)


@triton.jit
def global_avg_pool2d_pending_backward_kernel(
    dy_ptr, x_ptr, scale_ptr, shift_ptr, add_ptr, dx_ptr, partial_ptr,
    rows, C, pixels, tiles, tiles_per_strip,
    SLOPE: tl.constexpr, ACTIVATION: tl.constexpr, SCALED: tl.constexpr, INT64: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program: strips of BLOCK_A pixels x BLOCK_B channels; an image has so many pixels
    DTYPE: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    strip = tl.program_id(0)
    if INT64:
        strip = strip.to(tl.int64)
    c = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B))[None, :]
    scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)
    shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)
    total = tl.zeros([BLOCK_A, BLOCK_B], DTYPE)
    total_x = tl.zeros([BLOCK_A, BLOCK_B], DTYPE)
    begin = strip * tiles_per_strip
    for tile in range(begin, tl.minimum(begin + tiles_per_strip, tiles)):
        row = tile * BLOCK_A + tl.arange(0, BLOCK_A)[:, None]
        inside = (row < rows) & (c < C)
        dz = accumulator(tl.load(dy_ptr + (row // pixels * C + c), mask=inside, other=0.0)) / pixels
        du, of_x = _before(dz, x_ptr, row * C + c, inside, scale, shift, SLOPE, ACTIVATION)
        total += du
        total_x += of_x
        _store(dx_ptr, add_ptr, row * C + c, inside, du, scale, SCALED)
    partial_ptr += strip * 2 * C
    tl.store(partial_ptr + c, tl.sum(total_x, axis=0)[None, :], mask=c < C)
    tl.store(partial_ptr + C + c, tl.sum(total, axis=0)[None, :], mask=c < C)
