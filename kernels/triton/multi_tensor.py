"""What the multi-tensor kernels share: many tensors in one launch, by a table of addresses and a list of chunks.

table: int64 [rows, T], the addresses of T tensors in each row, and in its last row their numbers of elements.
chunks: int32 [programs, 2], the tensor and the chunk of it that a program takes. A chunk is BLOCK elements, so the work
of a program does not depend on the sizes of the tensors.
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
