"""exp and log for numba loops that vectorise, in fp32 and fp64, within 2 ulp of the exact values.

numba's own call the C library once per element unless Intel's SVML is installed. These are branch-free polynomials.
"""

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

# Taylor coefficients 1/k! from the highest: with |r| <= log(2)/2 the next term is below half an ulp
EXP32 = tuple(np.float32(1.0 / np.prod(np.arange(1.0, k + 1))) for k in range(7, -1, -1))
EXP64 = tuple(float(1.0 / np.prod(np.arange(1.0, k + 1))) for k in range(13, -1, -1))
# of atanh(s)/s = 1 + s^2/3 + s^4/5 + ...: s^2 <= 1/9
ATANH32 = tuple(np.float32(1.0 / (2 * k + 1)) for k in range(7, -1, -1))
ATANH64 = tuple(1.0 / (2 * k + 1) for k in range(17, -1, -1))
LOG2 = 0.693147180559945309


def exp_down(x):
    """exp(x) for x <= 0; 0 where it would be denormal, NaN of NaN."""
    raise NotImplementedError("for numba")


def log_up(x):
    """log(x) for finite x >= 1; -inf of 0, NaN of NaN."""
    raise NotImplementedError("for numba")


def log1p_unit(u):
    """log(1 + u) for u in [0, 1]; NaN of NaN."""
    raise NotImplementedError("for numba")


@overload(exp_down)
def _exp_down(x):
    if x == types.float32:
        magic, bits, bias, mantissa, dtype, integer = 12582912.0, 0x4B400000, 127, 23, np.float32, np.int32
        low, log2e, ln2_high, ln2_low = -87.0, 1.44269504088896341, 0.693359375, -2.12194440e-4
        coefficients = EXP32
    else:
        magic, bits, bias, mantissa, dtype, integer = (
            6755399441055744.0,
            0x4338000000000000,
            1023,
            52,
            np.float64,
            np.int64,
        )
        low, log2e, ln2_high, ln2_low = -708.0, 1.44269504088896341, 6.93145751953125e-1, 1.42860682030941723212e-6
        coefficients = EXP64
    zero, magic, low, log2e, ln2_high, ln2_low = (dtype(v) for v in (0, magic, low, log2e, ln2_high, ln2_low))
    offset, mantissa = integer(bias - bits), integer(mantissa)
    if x == types.float32:
        c7, c6, c5, c4, c3, c2, c1, c0 = coefficients

        def exp_down(x):
            tiny = x < low
            y = low if tiny else x  # NaN stays
            t = np.float32(y * log2e + magic)  # its low bits are the integer nearest to y / log(2)
            n = t - magic
            r = (y - n * ln2_high) - n * ln2_low
            p = ((((((c7 * r + c6) * r + c5) * r + c4) * r + c3) * r + c2) * r + c1) * r + c0
            scale = np.int32(np.int32(t.view(np.int32) + offset) << mantissa).view(np.float32)
            return zero if tiny else p * scale

    else:
        d13, d12, d11, d10, d9, d8, d7, d6, d5, d4, d3, d2, d1, d0 = coefficients

        def exp_down(x):
            tiny = x < low
            y = low if tiny else x
            t = np.float64(y * log2e + magic)
            n = t - magic
            r = (y - n * ln2_high) - n * ln2_low
            p = (((((((d13 * r + d12) * r + d11) * r + d10) * r + d9) * r + d8) * r + d7) * r + d6) * r + d5
            p = ((((p * r + d4) * r + d3) * r + d2) * r + d1) * r + d0
            scale = np.int64((t.view(np.int64) + offset) << mantissa).view(np.float64)
            return zero if tiny else p * scale

    return exp_down


def _two_atanh(x):
    # 2 * atanh(s), |s| <= 1/3, for the dtype of the argument x
    if x == types.float32:
        b7, b6, b5, b4, b3, b2, b1, b0 = (np.float32(2) * c for c in ATANH32)

        @register_jitable
        def two_atanh(s):
            z = s * s
            return s * (((((((b7 * z + b6) * z + b5) * z + b4) * z + b3) * z + b2) * z + b1) * z + b0)

    else:
        e17, e16, e15, e14, e13, e12, e11, e10, e9, e8, e7, e6, e5, e4, e3, e2, e1, e0 = (2 * c for c in ATANH64)

        @register_jitable
        def two_atanh(s):
            z = s * s
            p = ((((((e17 * z + e16) * z + e15) * z + e14) * z + e13) * z + e12) * z + e11) * z + e10
            p = (((((p * z + e9) * z + e8) * z + e7) * z + e6) * z + e5) * z + e4
            return s * ((((p * z + e3) * z + e2) * z + e1) * z + e0)

    return two_atanh


@overload(log1p_unit)
def _log1p_unit(u):
    two_atanh = _two_atanh(u)
    two = np.float32(2) if u == types.float32 else 2.0

    def log1p_unit(u):
        return two_atanh(u / (two + u))

    return log1p_unit


@overload(log_up)
def _log_up(x):
    two_atanh = _two_atanh(x)
    if x == types.float32:
        dtype, integer, shift, bias, keep, one_bits = np.float32, np.int32, 23, 127, 0x007FFFFF, 0x3F800000
    else:
        dtype, integer, shift, bias, keep, one_bits = np.float64, np.int64, 52, 1023, (1 << 52) - 1, 1023 << 52
    shift, bias, keep, one_bits = (integer(v) for v in (shift, bias, keep, one_bits))
    one, half, root2, log2, zero = (dtype(v) for v in (1, 0.5, 1.41421356237309505, LOG2, 0))
    minus_inf = dtype(-np.inf)

    def log_up(x):
        x_bits = dtype(x).view(integer)
        exponent = dtype(integer(x_bits >> shift) - bias)
        m = integer((x_bits & keep) | one_bits).view(dtype)
        above = m > root2
        m = m * half if above else m
        exponent = exponent + one if above else exponent
        result = exponent * log2 + two_atanh((m - one) / (m + one))
        return result if x > zero else (minus_inf if x == zero else x)

    return log_up
