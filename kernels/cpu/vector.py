"""Vectors of 64 bytes as values in numba functions: what LLVM's own vectorisation would not keep in registers.

A vector has the dtype of the array it was loaded from. LLVM makes two or four of one where registers are narrower.
"""

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

BYTES = 64


class Vector(types.Type):
    def __init__(self, dtype):
        self.dtype, self.lanes = dtype, BYTES * 8 // dtype.bitwidth
        super().__init__(f"Vector({self.lanes} x {dtype})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        element = ir.FloatType() if kind.dtype == types.float32 else ir.DoubleType()
        super().__init__(manager, kind, ir.VectorType(element, kind.lanes))


def _pointer(context, builder, signature, args, position, vector):
    # where an array's elements from args[position + 1] on lie, as one vector
    array = context.make_array(signature.args[position])(context, builder, args[position])
    return builder.bitcast(cgutils.gep(builder, array.data, args[position + 1]), vector.as_pointer())


@numba.njit(inline="always")
def lanes(array):
    """Elements of a vector of this array's dtype."""
    return 64 // array.itemsize


@intrinsic
def load(typingctx, array, at):
    kind = Vector(array.dtype)

    def codegen(context, builder, signature, args):
        vector = context.get_value_type(kind)
        return builder.load(_pointer(context, builder, signature, args, 0, vector), align=4)

    return kind(array, types.intp), codegen


@intrinsic
def store(typingctx, array, at, value):
    def codegen(context, builder, signature, args):
        builder.store(args[2], _pointer(context, builder, signature, args, 0, args[2].type), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def stream(typingctx, array, at, value):
    """A store past the caches; the address must be a multiple of 64. `fence` before others read."""

    def codegen(context, builder, signature, args):
        written = builder.store(args[2], _pointer(context, builder, signature, args, 0, args[2].type), align=BYTES)
        written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def fence(typingctx):
    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def zeros(typingctx, array):
    kind = Vector(array.dtype)
    return kind(array), lambda context, builder, signature, args: ir.Constant(context.get_value_type(kind), None)


@intrinsic
def add(typingctx, a, b):
    return a(a, b), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def subtract(typingctx, a, b):
    return a(a, b), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, rounded once."""

    def codegen(context, builder, signature, args):
        vector = args[0].type
        name = f"llvm.fma.v{a.lanes}f{a.dtype.bitwidth}"
        return builder.call(
            cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name), args
        )

    return a(a, b, c), codegen


@intrinsic
def add_wide(typingctx, totals, at, value):
    """totals[at : at + lanes] += value, in fp64."""

    def codegen(context, builder, signature, args):
        wide = ir.VectorType(ir.DoubleType(), value.lanes)
        pointer = _pointer(context, builder, signature, args, 0, wide)
        widened = args[2] if args[2].type == wide else builder.fpext(args[2], wide)
        builder.store(builder.fadd(builder.load(pointer, align=8), widened), pointer, align=8)
        return context.get_dummy_value()

    return types.void(totals, types.intp, value), codegen


@intrinsic
def prefetch(typingctx, array, at):
    """Ask for the cache line of this element, which need not exist."""

    def codegen(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        flag = ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag]), "llvm.prefetch.p0"
        )
        pointer = builder.bitcast(_pointer(context, builder, signature, args, 0, ir.FloatType()), byte)
        builder.call(function, [pointer, flag(0), flag(3), flag(1)])  # to read, into every cache, data
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen
