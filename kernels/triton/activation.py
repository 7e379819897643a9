"""The activation family, y = f(x), elementwise over memory of any dense layout. fp32 inside (fp64 for fp64).

`activate` and `activate_backward` are the formulas; other kernels call them in their epilogues.
Comparisons are written so that NaN falls through to x: `max` in compiled Triton drops it unless told otherwise.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator


@triton.jit
def one_over_sigmoid(x):
    # 1 + exp(-x), by a power of 2: tl.exp takes three instructions more, for denormals, which are lost beside 1. Where
    # it overflows, the reciprocal is the 0 that belongs there
    return 1.0 + tl.exp2(x * -1.4426950408889634)


@triton.jit
def sigmoid(x):
    return 1.0 / one_over_sigmoid(x)


@triton.jit
def sigmoid_factor(x):
    """sigmoid in half the instructions and fewer registers, to multiply with: it may be above 1 by a rounding."""
    r = tl.rsqrt(one_over_sigmoid(x))
    return r * r


@triton.jit
def zero_to_six(x):
    return tl.clamp(x, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(x):
    a = tl.abs(x)
    near = a < 0.625
    # near 0 the difference of exponentials cancels: Cephes' rational form there (Moshier, tanh.c), good to fp64
    z = tl.where(near, x * x, 0.0)
    p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
    q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
    e = tl.exp2(-2.8853900817779268 * a)  # exp(-2a)
    quotient = tl.where(near, x * z * p, 1.0 - e) / tl.where(near, q, 1.0 + e)
    return tl.where(near, x + quotient, tl.where(x < 0, -quotient, quotient))


@triton.jit
def gelu_tanh_inner(x):
    # twice tanh's argument, as 0.5 * (1 + tanh(v)) = sigmoid(2 * v), which does not cancel
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def activate(x, SLOPE: tl.constexpr, KIND: tl.constexpr):
    """f(x). SLOPE is the negative slope of leaky_relu, else 0: a constant, because a float argument would be fp32."""
    if KIND == "relu":
        return tl.where(x <= 0, 0.0, x)
    elif KIND == "relu6":
        return zero_to_six(x)
    elif KIND == "leaky_relu":
        return tl.where(x > 0, x, x * SLOPE)
    elif KIND == "silu":
        return x / one_over_sigmoid(x)
    elif KIND == "sigmoid":
        return sigmoid(x)
    elif KIND == "tanh":
        return tanh(x)
    elif KIND == "hardswish":
        return x * zero_to_six(x + 3.0) / 6.0
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(KIND == "gelu_tanh")
        return x / one_over_sigmoid(gelu_tanh_inner(x))


@triton.jit
def activate_backward(dy, saved, SLOPE: tl.constexpr, KIND: tl.constexpr):
    """dy * f'(x). saved is y for relu, sigmoid and tanh, and x for the others: what torch saves, too."""
    if KIND == "relu":
        return tl.where(saved <= 0, 0.0, dy)
    elif KIND == "relu6":
        return tl.where((saved <= 0) | (saved >= 6), 0.0, dy)
    elif KIND == "leaky_relu":
        return tl.where(saved > 0, dy, dy * SLOPE)
    elif KIND == "silu":
        e = tl.exp2(saved * -1.4426950408889634)
        r = tl.rsqrt(1.0 + e)
        s = r * r
        # 1 - s, which near s = 1 would be rounding and no more
        rest = tl.where(saved > 0, e * s, 1.0 - s)
        return dy * s * (1.0 + saved * rest)
    elif KIND == "sigmoid":
        return dy * saved * (1.0 - saved)
    elif KIND == "tanh":
        return dy * (1.0 - saved * saved)
    elif KIND == "hardswish":
        inner = dy * (saved / 3.0 + 0.5)
        return tl.where(saved <= -3, 0.0, tl.where(saved < 3, inner, dy))
    elif KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(saved * 0.7071067811865476))
        pdf = tl.exp2(-0.7213475204444817 * saved * saved) * 0.3989422804014327  # exp(-x*x/2)
        return dy * (cdf + saved * pdf)
    else:
        tl.static_assert(KIND == "gelu_tanh")
        s = sigmoid(gelu_tanh_inner(saved))
        slope_of_inner = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * saved * saved)
        return dy * s * (1.0 + saved * (1.0 - s) * slope_of_inner)


@triton.jit
def activation_forward_kernel(
    x_ptr, y_ptr, numel, SLOPE: tl.constexpr, KIND: tl.constexpr, INT64: tl.constexpr, BLOCK: tl.constexpr
):
    # one program computes BLOCK consecutive elements
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    x = accumulator(tl.load(x_ptr + i, mask=inside))
    tl.store(y_ptr + i, activate(x, SLOPE, KIND).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activation_backward_kernel(
    dy_ptr, saved_ptr, dx_ptr, numel, SLOPE: tl.constexpr, KIND: tl.constexpr, INT64: tl.constexpr, BLOCK: tl.constexpr
):
    # one program computes BLOCK consecutive elements
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    dy = accumulator(tl.load(dy_ptr + i, mask=inside))
    saved = accumulator(tl.load(saved_ptr + i, mask=inside))
    dx = activate_backward(dy, saved, SLOPE, KIND)
    tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty), mask=inside)
