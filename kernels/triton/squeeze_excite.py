"""Squeeze-excite: z = f(u) * gate, u = x * scale + shift, gate = g(w2 @ h(w1 @ mean of f(u) + b1) + b2) per image.

Three parts: sums over the pixels of an image, forward of f(u), backward of five products; what is between the sums and
the gate, which is small: a program per image, forward and backward, and one that adds up the images; and the gradient
of u where who made x does not compute it on load. fp32 inside (fp64 for fp64). Tiles are those of pending.py: each
lies within one image. Every sum has a fixed order.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.activation import activate, activate_backward, zero_to_six
from fastcnn.kernels.triton.batch_norm import tile_of
from fastcnn.kernels.triton.common import accumulator
from fastcnn.kernels.triton.pending import gate_of, vector


@triton.jit
def small_activate(t, KIND: tl.constexpr):
    """An activation of the two small layers; leaky_relu with PyTorch's slope."""
    if KIND == "hardsigmoid":
        return zero_to_six(t + 3.0) / 6.0
    else:
        return activate(t, 0.01, KIND)


@triton.jit
def small_activate_backward(grad, t, KIND: tl.constexpr):
    """Its gradient at t."""
    if KIND == "hardsigmoid":
        return tl.where((t > -3) & (t < 3), grad / 6.0, 0.0)
    elif KIND == "sigmoid" or KIND == "tanh":  # the others take their input
        return activate_backward(grad, activate(t, 0.0, KIND), 0.0, KIND)
    else:
        return activate_backward(grad, t, 0.01, KIND)


@triton.jit
def differentiate(grad, u, f, SLOPE: tl.constexpr, ACTIVATION: tl.constexpr):
    """grad * f'(u), given f(u), too."""
    if ACTIVATION == "none":
        return grad
    elif ACTIVATION == "sigmoid" or ACTIVATION == "tanh":
        return activate_backward(grad, f, SLOPE, ACTIVATION)
    else:
        return activate_backward(grad, u, SLOPE, ACTIVATION)


@triton.jit
def squeeze_excite_sums_kernel(
    x_ptr, scale_ptr, shift_ptr, dz_ptr, sums_ptr,
    C, inner, tiles, shares, tiles_per_share, stride_o, stride_i, stride_c,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BY_CHANNEL: tl.constexpr, ALIGN: tl.constexpr, INT64: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program adds a share of the tiles of one image and BLOCK_C channels: of f(u); with dz of dz * f(u),
    # dz * f'(u) * x, dz * f'(u), f'(u) * x and f'(u), which go to sums [images, shares, 1 or 5, C]
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    image = tl.program_id(0) // shares
    begin = tl.program_id(0) % shares * tiles_per_share
    end = tl.minimum(begin + tiles_per_share, tiles)
    if INT64:
        image = image.to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = vector(scale_ptr, c, C, DTYPE)[None, :]
    shift = vector(shift_ptr, c, C, DTYPE)[None, :]
    of_f = tl.zeros([BLOCK_I, BLOCK_C], DTYPE)
    if dz_ptr is not None:
        of_du_x = tl.zeros_like(of_f)
        of_du = tl.zeros_like(of_f)
        of_slope_x = tl.zeros_like(of_f)
        of_slope = tl.zeros_like(of_f)
    for tile in range(image * tiles + begin, image * tiles + end):
        offset, inside, _ = tile_of(tile, c, C, inner, stride_o, stride_i, stride_c, BY_CHANNEL, ALIGN, INT64, BLOCK_I)
        x = accumulator(tl.load(x_ptr + offset, mask=inside, other=0.0))
        u = x * scale + shift
        f = u
        if ACTIVATION != "none":
            f = activate(u, SLOPE, ACTIVATION)
        # rows that do not exist have a u, too: that of x = 0
        if dz_ptr is None:
            of_f += tl.where(inside, f, 0.0)
        else:
            dz = accumulator(tl.load(dz_ptr + offset, mask=inside, other=0.0))
            of_f += tl.where(inside, dz * f, 0.0)
            du = tl.where(inside, differentiate(dz, u, f, SLOPE, ACTIVATION), 0.0)
            of_du += du
            of_du_x += du * x
            slope = tl.where(
                inside, differentiate(tl.full([BLOCK_I, BLOCK_C], 1.0, DTYPE), u, f, SLOPE, ACTIVATION), 0.0
            )
            of_slope += slope
            of_slope_x += slope * x
    out = sums_ptr + tl.program_id(0) * C + c
    if dz_ptr is None:
        tl.store(out, tl.sum(of_f, axis=0), mask=c < C)
    else:
        out = sums_ptr + tl.program_id(0) * (5 * C) + c
        tl.store(out, tl.sum(of_f, axis=0), mask=c < C)
        tl.store(out + C, tl.sum(of_du_x, axis=0), mask=c < C)
        tl.store(out + 2 * C, tl.sum(of_du, axis=0), mask=c < C)
        tl.store(out + 3 * C, tl.sum(of_slope_x, axis=0), mask=c < C)
        tl.store(out + 4 * C, tl.sum(of_slope, axis=0), mask=c < C)


@triton.jit
def squeeze_excite_gate_kernel(
    sums_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, squeezed_ptr, excited_ptr, gate_ptr,
    C, S, pixels, SQUEEZE: tl.constexpr, EXCITE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program computes the gate of an image, and what its two layers return before their activations:
    # squeezed [N, S], excited [N, C]. BLOCK_S is not below S
    DTYPE: tl.constexpr = sums_ptr.dtype.element_ty
    n = tl.program_id(0)
    s = tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S, BLOCK_C], DTYPE)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mean = tl.load(sums_ptr + n * C + c, mask=c < C, other=0.0) / pixels
        inside = (s < S)[:, None] & (c < C)[None, :]
        total += accumulator(tl.load(w1_ptr + s[:, None] * C + c[None, :], mask=inside, other=0.0)) * mean[None, :]
    t = tl.sum(total, axis=1) + vector(b1_ptr, s, S, DTYPE)
    tl.store(squeezed_ptr + n * S + s, t, mask=s < S)
    hidden = tl.where(s < S, small_activate(t, SQUEEZE), 0.0)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = (c < C)[:, None] & (s < S)[None, :]
        w = accumulator(tl.load(w2_ptr + c[:, None] * S + s[None, :], mask=inside, other=0.0))
        e = tl.sum(w * hidden[None, :], axis=1) + vector(b2_ptr, c, C, DTYPE)
        tl.store(excited_ptr + n * C + c, e, mask=c < C)
        tl.store(gate_ptr + n * C + c, small_activate(e, EXCITE).to(gate_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def squeeze_excite_gate_backward_kernel(
    sums_ptr, w1_ptr, w2_ptr, squeezed_ptr, excited_ptr, dsqueezed_ptr, dexcited_ptr, gate_ptr, add_ptr,
    C, S, pixels, SQUEEZE: tl.constexpr, EXCITE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program computes, of an image, the gradients of squeezed and excited, the gate again, and add [N, C], the
    # gradient of the mean over its pixels. sums [N, 5, C] as squeeze_excite_sums_kernel left them
    DTYPE: tl.constexpr = sums_ptr.dtype.element_ty
    n = tl.program_id(0)
    s = tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_C, BLOCK_S], DTYPE)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        dgate = tl.load(sums_ptr + n * (5 * C) + c, mask=c < C, other=0.0)
        e = tl.load(excited_ptr + n * C + c, mask=c < C, other=0.0)
        tl.store(gate_ptr + n * C + c, small_activate(e, EXCITE), mask=c < C)
        de = small_activate_backward(dgate, e, EXCITE)
        tl.store(dexcited_ptr + n * C + c, de, mask=c < C)
        inside = (c < C)[:, None] & (s < S)[None, :]
        total += accumulator(tl.load(w2_ptr + c[:, None] * S + s[None, :], mask=inside, other=0.0)) * de[:, None]
    t = tl.load(squeezed_ptr + n * S + s, mask=s < S, other=0.0)
    dt = tl.where(s < S, small_activate_backward(tl.sum(total, axis=0), t, SQUEEZE), 0.0)
    tl.store(dsqueezed_ptr + n * S + s, dt, mask=s < S)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = (s < S)[:, None] & (c < C)[None, :]
        w = accumulator(tl.load(w1_ptr + s[:, None] * C + c[None, :], mask=inside, other=0.0))
        tl.store(add_ptr + n * C + c, tl.sum(w * dt[:, None], axis=0) / pixels, mask=c < C)


@triton.jit
def squeeze_excite_parameters_kernel(
    sums_ptr, means_ptr, squeezed_ptr, dsqueezed_ptr, dexcited_ptr, gate_ptr, add_ptr,
    dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, dvectors_ptr,
    N, C, S, pixels, SQUEEZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program adds over all images the gradients of BLOCK_C channels x BLOCK_S hidden ones: of both weights, of the
    # biases, and dvectors [2, C], those of scale and shift. means: sums of f(u) [N, C]. None is what nobody wants
    DTYPE: tl.constexpr = sums_ptr.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    dw1 = tl.zeros([BLOCK_S, BLOCK_C], DTYPE)
    dw2 = tl.zeros([BLOCK_C, BLOCK_S], DTYPE)
    db1 = tl.zeros([BLOCK_N, BLOCK_S], DTYPE)
    db2 = tl.zeros([BLOCK_N, BLOCK_C], DTYPE)
    dscale = tl.zeros([BLOCK_N, BLOCK_C], DTYPE)
    dshift = tl.zeros([BLOCK_N, BLOCK_C], DTYPE)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        of_c = n[:, None] * C + c[None, :]
        of_s = n[:, None] * S + s[None, :]
        is_c = (n < N)[:, None] & (c < C)[None, :]
        is_s = (n < N)[:, None] & (s < S)[None, :]
        de = tl.load(dexcited_ptr + of_c, mask=is_c, other=0.0)
        dt = tl.load(dsqueezed_ptr + of_s, mask=is_s, other=0.0)
        db1 += dt
        db2 += de
        if dw1_ptr is not None:
            mean = tl.load(means_ptr + of_c, mask=is_c, other=0.0) / pixels
            dw1 = tl.dot(tl.trans(dt), mean, dw1, input_precision="ieee", out_dtype=DTYPE)
        if dw2_ptr is not None:
            t = tl.load(squeezed_ptr + of_s, mask=is_s, other=0.0)
            hidden = tl.where(is_s, small_activate(t, SQUEEZE), 0.0)
            dw2 = tl.dot(tl.trans(de), hidden, dw2, input_precision="ieee", out_dtype=DTYPE)
        if dvectors_ptr is not None:
            gate = tl.load(gate_ptr + of_c, mask=is_c, other=0.0)
            add = tl.load(add_ptr + of_c, mask=is_c, other=0.0)
            of_sums = n[:, None] * (5 * C) + c[None, :]
            dscale += gate * tl.load(sums_ptr + of_sums + C, mask=is_c, other=0.0)
            dshift += gate * tl.load(sums_ptr + of_sums + 2 * C, mask=is_c, other=0.0)
            dscale += add * tl.load(sums_ptr + of_sums + 3 * C, mask=is_c, other=0.0)
            dshift += add * tl.load(sums_ptr + of_sums + 4 * C, mask=is_c, other=0.0)
    if dw1_ptr is not None:
        inside = (s < S)[:, None] & (c < C)[None, :]
        tl.store(dw1_ptr + s[:, None] * C + c[None, :], dw1.to(dw1_ptr.dtype.element_ty), mask=inside)
    if dw2_ptr is not None:
        inside = (c < C)[:, None] & (s < S)[None, :]
        tl.store(dw2_ptr + c[:, None] * S + s[None, :], dw2.to(dw2_ptr.dtype.element_ty), mask=inside)
    # the same in all programs of these channels, or of these hidden ones: one of them writes it
    first_s = (tl.program_id(1) == 0) & (c < C)
    if db1_ptr is not None:
        written = (tl.program_id(0) == 0) & (s < S)
        tl.store(db1_ptr + s, tl.sum(db1, axis=0).to(db1_ptr.dtype.element_ty), mask=written)
    if db2_ptr is not None:
        tl.store(db2_ptr + c, tl.sum(db2, axis=0).to(db2_ptr.dtype.element_ty), mask=first_s)
    if dvectors_ptr is not None:
        tl.store(dvectors_ptr + c, tl.sum(dscale, axis=0), mask=first_s)
        tl.store(dvectors_ptr + C + c, tl.sum(dshift, axis=0), mask=first_s)


@triton.jit
def squeeze_excite_gradient_kernel(
    dz_ptr, x_ptr, scale_ptr, shift_ptr, gate_ptr, add_ptr, du_ptr,
    C, inner, tiles, tiles_per_strip, stride_o, stride_i, stride_c,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BY_CHANNEL: tl.constexpr, ALIGN: tl.constexpr, INT64: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program computes du = (dz * gate + add) * f'(u) of a strip of tiles and BLOCK_C channels
    DTYPE: tl.constexpr = gate_ptr.dtype.element_ty
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.program_id(0) * tiles_per_strip
    end = tl.minimum(begin + tiles_per_strip, tiles)
    scale = vector(scale_ptr, c, C, DTYPE)[None, :]
    shift = vector(shift_ptr, c, C, DTYPE)[None, :]
    for tile in range(begin, end):
        offset, inside, _ = tile_of(tile, c, C, inner, stride_o, stride_i, stride_c, BY_CHANNEL, ALIGN, INT64, BLOCK_I)
        grad = accumulator(tl.load(dz_ptr + offset, mask=inside))
        grad = grad * gate_of(gate_ptr, tile, c, C, inner, False, INT64, BLOCK_I)
        grad += gate_of(add_ptr, tile, c, C, inner, False, INT64, BLOCK_I)
        if ACTIVATION != "none":
            u = accumulator(tl.load(x_ptr + offset, mask=inside)) * scale + shift
            grad = differentiate(grad, u, activate(u, SLOPE, ACTIVATION), SLOPE, ACTIVATION)
        tl.store(du_ptr + offset, grad.to(du_ptr.dtype.element_ty), mask=inside)
