"""Memory of the process on CPU."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory():
    """Let the C library keep memory that was freed, for all that this process does from now on.

    glibc gives blocks of more than 128 KiB to 32 MiB back to the system when they are freed, and the system fills them
    with zeros when they are asked for again: for activations, which come and go in every step, a second pass over
    memory. A small network on two cores trained 1.2 times as fast with this.

    Returns:
        whether it took effect: on Linux with glibc, whose malloc PyTorch uses unless another one was preloaded.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    return mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) == 1
