"""Tasks that numba's threads share, as C functions: what `prange` calls by itself is compiled three times over.

A task gets its number, an array of integers (sizes, addresses, flags, bits of floats), which says everything, and an
empty array of the dtype that it is for.
"""

import functools

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@functools.cache
def address(function, dtype):
    """The C function `function(task, numbers, like)` for fp32 or fp64, compiled once and cached."""
    like = types.CPointer(types.float32 if dtype.itemsize == 4 else types.float64)
    signature = types.void(types.intp, types.CPointer(types.int64), like)
    compiled = numba.cfunc(signature, cache=True, error_model="numpy")(function)
    _kept.append(compiled)
    return compiled.address


_kept = []


@intrinsic
def _call(typingctx, address, task, numbers, like):
    def codegen(context, builder, signature, args):
        arrays = [context.make_array(signature.args[i])(context, builder, args[i]).data for i in (2, 3)]
        kind = ir.FunctionType(ir.VoidType(), [args[1].type, *(a.type for a in arrays)])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], *arrays])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, numbers, like), codegen


@numba.njit(parallel=True, cache=True)
def run(address, tasks, numbers, like):
    """Call the function at this address with every task."""
    for task in numba.prange(tasks):
        _call(address, task, numbers, like)


@intrinsic(prefer_literal=True)
def integers(typingctx, pointer, count):
    """The first so many integers from a pointer, as a tuple."""
    result = types.UniTuple(types.int64, count.literal_value)

    def codegen(context, builder, signature, args):
        return builder.load(builder.bitcast(args[0], context.get_value_type(result).as_pointer()), align=8)

    return result(pointer, count), codegen


@intrinsic
def as_float(typingctx, bits):
    """The fp64 number of these bits."""
    return types.float64(types.int64), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.DoubleType()
    )
