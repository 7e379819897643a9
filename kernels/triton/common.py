"""Device helpers that two or more kernels use."""

import triton
import triton.language as tl


@triton.jit
def accumulator(x):
    """The dtype we compute in: fp64 for fp64, else fp32. Call it on a loaded block before any arithmetic."""
    if x.dtype == tl.float64:
        return x
    else:  # without it the compiler sees two return types
        return x.to(tl.float32)
