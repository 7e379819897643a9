"""Matrix multiplication of a BLAS library, called at its address (fastcnn/ops/blas.py) by each thread for itself."""

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

INT = ir.IntType(32)
CHAR = ir.IntType(8)


def _data(context, builder, signature, args, position):
    return context.make_array(signature.args[position])(context, builder, args[position]).data


def _by_reference(builder, value):
    place = cgutils.alloca_once(builder, value.type)  # once per function, not per call in a loop
    builder.store(value, place)
    return place


@intrinsic
def _gemm(typingctx, address, transpose_a, transpose_b, m, n, k, a, lda, b, ldb, beta, c, ldc):
    def codegen(context, builder, signature, args):
        address, transpose_a, transpose_b, m, n, k, _, lda, _, ldb, beta, _, ldc = args
        element = context.get_value_type(c.dtype)
        number = lambda value: _by_reference(builder, builder.trunc(value, INT))
        letter = lambda value: _by_reference(builder, builder.trunc(value, CHAR))
        array = lambda position: _data(context, builder, signature, args, position)
        values = [
            letter(transpose_a), letter(transpose_b), number(m), number(n), number(k),
            _by_reference(builder, ir.Constant(element, 1.0)), array(6), number(lda), array(8), number(ldb),
            _by_reference(builder, beta), array(11), number(ldc),
        ]  # fmt: skip
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.inttoptr(address, kind.as_pointer()), values)
        return context.get_dummy_value()

    count = types.int64
    return types.void(count, count, count, count, count, count, a, count, b, count, c.dtype, c, count), codegen


@numba.njit(inline="always")
def gemm(address, transpose_a, transpose_b, m, n, k, a, lda, b, ldb, beta, c, ldc):
    """c = op(a) @ op(b) + beta * c with columns that lie one behind the other, at c [m, n], op(a) [m, k]."""
    _gemm(
        address, 84 if transpose_a else 78, 84 if transpose_b else 78, m, n, k, a, lda, b, ldb, c.dtype.type(beta), c,
        ldc,
    )  # fmt: skip


@intrinsic
def set_threads(typingctx, address, threads):
    """Let MKL, called by this thread, use so many (0: as many as it wants); what was set before."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(INT, [INT])
        function = builder.inttoptr(args[0], kind.as_pointer())
        return builder.sext(builder.call(function, [builder.trunc(args[1], INT)]), ir.IntType(64))

    return types.int64(types.int64, types.int64), codegen
