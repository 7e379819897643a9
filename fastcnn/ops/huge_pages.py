"""Large CPU outputs on huge pages.

A tensor of tens of megabytes is fresh memory each time, and the kernel hands it out page by page at the first write: in
pages of 4 KiB that takes longer than the pooling itself. Linux gives pages of 2 MiB to whoever asks for them (its usual
setting, "madvise"); elsewhere nothing happens.
"""

import ctypes
import functools
import sys

LEAST = 2**25  # bytes: above 32 MiB the C library returns what is freed to the system at once
PAGE = 4096
MADV_HUGEPAGE = 14


@functools.cache
def _madvise():
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def advise(tensor):
    """The tensor itself, fresh from torch.empty: if it is large and on CPU, its memory will come in huge pages."""
    size = tensor.numel() * tensor.element_size()
    if size >= LEAST and tensor.device.type == "cpu":
        madvise = _madvise()
        if madvise is not None:
            begin = -(-tensor.data_ptr() // PAGE) * PAGE
            # advice: where the kernel declines it, everything is as before
            madvise(begin, size - (begin - tensor.data_ptr()), MADV_HUGEPAGE)
    return tensor
