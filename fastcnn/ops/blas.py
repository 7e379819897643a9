"""Where PyTorch's own matrix multiplication lies in memory, for CPU kernels that call it from their threads.

Builds of PyTorch with MKL export it; with another library, or none, there is nothing here, and whoever asks has to do
without.
"""

import ctypes
import functools

import torch

NAMES = {torch.float32: "sgemm_", torch.float64: "dgemm_"}


@functools.cache
def addresses(dtype):
    """(of gemm with Fortran's interface, of MKL_Set_Num_Threads_Local), or None."""
    if dtype not in NAMES or not torch.backends.mkl.is_available():
        return None
    library = ctypes.CDLL(torch._C.__file__)  # a look-up in it goes through all that it was linked with
    functions = (getattr(library, name, None) for name in (NAMES[dtype], "MKL_Set_Num_Threads_Local"))
    found = [function and ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    return None if None in found else tuple(found)
