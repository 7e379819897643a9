"""What the convolution kernels do to a block on its way in or out: compile-time options, nothing where they are off.

In: a pending activation z = act(x * scale + shift), per channel, and the correction dy * a + b * y + c, which is how
the gradients of a batch's statistics reach that of y. Out: sums per channel, and the gradients of a pending activation
and of a join. The formulas work on fp32 (fp64 for fp64).
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.activation import activate, activate_backward, sigmoid_factor


@triton.jit
def pending_activation(
    x, scale, shift, SLOPE: tl.constexpr, ACTIVATION: tl.constexpr, MAXIMUM: tl.constexpr = True
):  # fmt: skip
    """z = act(x * scale + shift). ACTIVATION "none" leaves the affine map; MAXIMUM: how relu is computed."""
    u = x * scale + shift
    if ACTIVATION == "none":
        return u
    elif ACTIVATION == "relu" and MAXIMUM:
        # one instruction or, with the rounding to 16 bits, none; gathering fp32, Triton 3.6 spills with it
        return tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        # a quotient takes more registers, and spills
        return u * sigmoid_factor(u)
    else:
        return activate(u, SLOPE, ACTIVATION)


@triton.jit
def pending_activation_backward(dz, x, scale, shift, SLOPE: tl.constexpr, ACTIVATION: tl.constexpr):
    """du = dz * act'(u) at u = x * scale + shift; then dscale = sum of du * x, dshift = sum of du, dx = du * scale."""
    if ACTIVATION == "none":
        return dz
    else:
        u = x * scale + shift
        if ACTIVATION == "sigmoid" or ACTIVATION == "tanh":  # the others take x, and relu the sign of either
            u = activate(u, SLOPE, ACTIVATION)
        return activate_backward(dz, u, SLOPE, ACTIVATION)


@triton.jit
def corrected(dy, y, a, b, c):
    """The gradient of y, where dy is that of y * scale + shift: a is the scale, b and c come from the statistics."""
    return dy * a + (b * y + c)


@triton.jit
def store_sums(sums_ptr, first, second, columns, inside, stride):
    """One row of partial sums: [first | second], each `stride` long. A second kernel adds the rows in fixed order."""
    tl.store(sums_ptr + columns, first, mask=inside)
    tl.store(sums_ptr + stride + columns, second, mask=inside)
