"""One bit per element that says whether a gradient passes, eight to a byte, for numba kernels.

Eight elements and their byte are one vector instruction each way, which loops over single bits do not become.
"""

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

inline = numba.njit(error_model="numpy")


def _eight(context, builder, array_type, array, at):
    # pointer to eight elements from `at`, as one vector
    pointer = cgutils.gep(builder, context.make_array(array_type)(context, builder, array).data, at)
    vector = ir.VectorType(pointer.type.pointee, 8)
    return builder.bitcast(pointer, vector.as_pointer()), vector


def _splat(builder, vector, scalar):
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


@intrinsic
def passing8(typingctx, y, at, low, high):
    """A byte: which of y[at : at + 8] lie beyond neither bound."""

    def codegen(context, builder, signature, args):
        pointer, vector = _eight(context, builder, signature.args[0], args[0], args[1])
        value = builder.load(pointer, align=4)
        above = builder.fcmp_unordered(">", value, _splat(builder, vector, args[2]))
        below = builder.fcmp_unordered("<", value, _splat(builder, vector, args[3]))
        return builder.bitcast(builder.and_(above, below), ir.IntType(8))

    return types.uint8(y, types.intp, y.dtype, y.dtype), codegen


@intrinsic
def gate8(typingctx, dy, at, byte, dz):
    """dz[at : at + 8] = dy where the byte has a one, else 0."""

    def codegen(context, builder, signature, args):
        source, vector = _eight(context, builder, signature.args[0], args[0], args[1])
        target, _ = _eight(context, builder, signature.args[3], args[3], args[1])
        bits = builder.bitcast(args[2], ir.VectorType(ir.IntType(1), 8))
        zeros = ir.Constant(vector, [0.0] * 8)
        builder.store(builder.select(bits, builder.load(source, align=4), zeros), target, align=4)
        return context.get_dummy_value()

    return types.void(dy, types.intp, types.uint8, dz), codegen


@inline
def store_mask(y, low, high, mask, period):
    """Bits of one segment; a byte never spans two of its periods."""
    row = (period + 7) // 8
    whole = period // 8
    for p in range(y.size // period):
        of_y = y[p * period : (p + 1) * period]
        of_mask = mask[p * row : (p + 1) * row]
        for b in range(whole):
            of_mask[b] = passing8(of_y, 8 * b, low, high)
        if row > whole:
            byte = 0
            for j in range(8 * whole, period):
                if not (of_y[j] <= low or of_y[j] >= high):
                    byte |= 1 << (j - 8 * whole)
            of_mask[whole] = byte


@inline
def gate_by_mask(dy, mask, dz, period):
    """dz = dy where the mask has a one, else 0, of one segment."""
    row = (period + 7) // 8
    whole = period // 8
    for p in range(dy.size // period):
        of_dy = dy[p * period : (p + 1) * period]
        of_dz = dz[p * period : (p + 1) * period]
        of_mask = mask[p * row : (p + 1) * row]
        for b in range(whole):
            gate8(of_dy, 8 * b, of_mask[b], of_dz)
        for j in range(8 * whole, period):
            of_dz[j] = of_dy[j] if (of_mask[whole] >> (j - 8 * whole)) & 1 else dy.dtype.type(0)
