"""Device helpers that two or more numba kernels use."""

import numba
from numba import types
from numba.extending import intrinsic


@intrinsic
def _pointer(typingctx, address, like):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), codegen


@numba.njit(inline="always")
def array_at(address, numel, like):
    """The array of `numel` elements at this address (int64), with the dtype of the array `like`."""
    return numba.carray(_pointer(address, like), (numel,))
