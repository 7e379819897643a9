"""What the multi-tensor kernels share: many tensors in one launch, by a table of addresses and a list of chunks.

table: int64 [rows, T], the addresses of T tensors in each row: parameter, gradient, the state of the rule, the average
of the parameter if EMA, its bf16 copy if BF16, scalars of the rule; and in the last row their numbers of elements.
chunks: int32 [programs, 2], the tensor and the chunk of it that a program takes. A chunk is BLOCK elements, so the work
of a program does not depend on the sizes of the tensors.

Every kernel updates by

    g = sign * clip * gradient / grad_scale  (+ weight_decay * p if DECAY is "l2")  (+ l1 * sign(p) if L1)
    p = p * (1 - lr * weight_decay) if DECAY is "decoupled"
    its rule                                                                  p, state = rule(p, g, state)
    average = average + ema_weight * (p - average) if EMA; copy = bf16(p) if BF16
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.common import accumulator


@triton.jit
def tensor_at(table_ptr, row, T, t, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `start` of tensor t of a row."""
    pointer = tl.load(table_ptr + row * T + t).to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        # an address from memory says nothing about its alignment, and without it loads are scalar
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def scalar_at(table_ptr, row, T, t):
    """The fp32 number of tensor t in a row of scalars, in fp64."""
    return tl.load(tensor_at(table_ptr, row, T, t, 0, tl.float32, False)).to(tl.float64)


@triton.jit
def learning_rate(lr, lr_ptr):
    """lr in fp64: of the device, or of the host where lr_ptr is None."""
    if lr_ptr is not None:
        return scalar(tl.load(lr_ptr), tl.float64)
    else:
        return scalar(lr, tl.float64)


@triton.jit
def scalar(value, DTYPE: tl.constexpr):
    """An fp64 number as a block of one element of DTYPE."""
    return tl.full([1], value, DTYPE)


@triton.jit
def divide(a, b):
    """a / b rounded to nearest: the compiled `/` of fp32 is not."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def square_root(x):
    """sqrt rounded to nearest, denormals kept: the compiled tl.sqrt of fp32 is an approximation that flushes them."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def load(pointer, i, last, FULL: tl.constexpr):
    """Elements i of a tensor in the dtype we compute in. A full chunk needs no mask, and so gets 16-byte loads."""
    if FULL:
        return accumulator(tl.load(pointer + i))
    else:
        return accumulator(tl.load(pointer + i, mask=i < last, other=0.0))


@triton.jit
def store(pointer, i, last, value, DTYPE: tl.constexpr, FULL: tl.constexpr):
    """The same for storing."""
    if FULL:
        tl.store(pointer + i, value.to(DTYPE))
    else:
        tl.store(pointer + i, value.to(DTYPE), mask=i < last)


@triton.jit
def interpolate(a, b, weight):
    """a + weight * (b - a) for an fp64 weight, from the nearer end, as torch.lerp."""
    REAL: tl.constexpr = a.dtype
    near = a + scalar(weight, REAL) * (b - a)
    far = b - scalar(1.0 - weight, REAL) * (b - a)
    return tl.where(scalar(weight, REAL) < 0.5, near, far)


@triton.jit
def gradient(g_ptr, p, i, last, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, DECAY: tl.constexpr,
             L1: tl.constexpr, DTYPE: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """The gradient that a rule sees. Unscaled, it goes back to memory: GradScaler.unscale_ leaves it there."""
    g = load(g_ptr, i, last, FULL)
    REAL: tl.constexpr = g.dtype
    if grad_scale_ptr is not None:
        g = divide(g, scalar(tl.load(grad_scale_ptr), REAL))
        store(g_ptr, i, last, g, DTYPE, FULL)
    if clip_ptr is not None:
        g = g * scalar(tl.load(clip_ptr), REAL)
    g = g * scalar(sign, REAL)
    if DECAY == "l2":
        g += scalar(weight_decay, REAL) * p
    if L1:
        g += tl.where(p > 0, scalar(l1, REAL), tl.where(p < 0, scalar(-l1, REAL), scalar(0.0, REAL)))
    return g


@triton.jit
def decayed(p, rate, weight_decay, DECAY: tl.constexpr):
    """p after decoupled weight decay."""
    if DECAY == "decoupled":
        return p * (1.0 - rate * weight_decay).to(p.dtype)
    else:
        return p


@triton.jit
def finish(p_ptr, p, table_ptr, row, T, t, start, i, last, ema_weight, EMA: tl.constexpr, BF16: tl.constexpr,
           DTYPE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """Store the parameter, and what is kept of it: its average in row `row`, its bf16 copy in the row after that."""
    REAL: tl.constexpr = p.dtype
    store(p_ptr, i, last, p, DTYPE, FULL)
    if EMA:
        average_ptr = tensor_at(table_ptr, row, T, t, start, REAL, ALIGNED)
        average = load(average_ptr, i, last, FULL)
        average += scalar(ema_weight, REAL) * (p.to(DTYPE).to(REAL) - average)
        store(average_ptr, i, last, average, REAL, FULL)
    if BF16:
        copy_ptr = tensor_at(table_ptr, row + EMA, T, t, start, tl.bfloat16, ALIGNED)
        store(copy_ptr, i, last, p, tl.bfloat16, FULL)
