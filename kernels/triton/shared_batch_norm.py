"""Vectors [C] of a batch norm whose statistics other layers use, too. fp32 inside (fp64 for fp64)."""

import triton
import triton.language as tl

from fastcnn.kernels.triton.batch_norm_affine import added, store_affine
from fastcnn.kernels.triton.batch_statistics import statistics


@triton.jit(do_not_specialize=["M", "P", "Q", "slabs"])
def shared_batch_norm_kernel(
    y_ptr,  # the images whose channels are new, and what batch_statistics_kernel takes with them
    sums_ptr,
    pivot_ptr,
    mean_ptr,  # [known + made]: read, and written from known on
    var_ptr,
    weight_ptr,  # [known + made], these and those below, but for numbers: see store_affine
    bias_ptr,
    scale_ptr,  # None: only the statistics are asked for
    shift_ptr,
    invstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    M,
    P,
    Q,
    made,
    known,
    slabs,
    stride_n,
    stride_c,
    stride_p,
    stride_q,
    momentum,
    momentum_rest,
    EPS: tl.constexpr,
    FAR: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    # one program computes the vectors of BLOCK_C channels: the first ones of new channels, whose statistics they take
    pid = tl.program_id(0)
    of_new = tl.cdiv(made, BLOCK_C)
    if pid < of_new:
        c = pid * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = c < made
        mean, var, _ = statistics(
            y_ptr, sums_ptr, pivot_ptr, c, inside, M, P, Q, made, slabs, stride_n, stride_c, stride_p, stride_q,
            FAR, INT64, BLOCK_M, BLOCK_C, AT_ONCE,
        )  # fmt: skip
        tl.store(mean_ptr + known + c, mean, mask=inside)
        tl.store(var_ptr + known + c, var, mask=inside)
        c += known
    else:
        c = (pid - of_new) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = c < known
        mean = tl.load(mean_ptr + c, mask=inside, other=0.0)
        var = tl.load(var_ptr + c, mask=inside, other=1.0)
    if scale_ptr is not None:
        store_affine(
            c, inside, mean, var, M.to(mean.dtype), weight_ptr, bias_ptr, scale_ptr, shift_ptr, invstd_ptr,
            running_mean_ptr, running_var_ptr, None, batches_ptr, momentum, momentum_rest, EPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "parts"])
def shared_batch_norm_backward_kernel(
    dscale_ptr,  # [C], in parts; None: no batch norm, the statistics' gradients are as given
    dshift_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    dweight_ptr,
    dbias_ptr,
    given_mean_ptr,  # [C], gradients of the statistics that are added; None for zeros
    given_var_ptr,
    dmean_ptr,  # [C], their sums, may be the same memory; None where the statistics are constants
    dvar_ptr,
    b_ptr,  # [C], what they come to: dx = ... + b * x + c; None where nobody asks
    c_ptr,
    C,
    rows,  # values of a channel
    parts,
    stride,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    # one program computes BLOCK channels
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    mean = tl.load(mean_ptr + channel, mask=inside, other=0.0)
    dmean = tl.zeros_like(mean)
    dvar = tl.zeros_like(mean)
    if given_mean_ptr is not None:
        dmean += tl.load(given_mean_ptr + channel, mask=inside, other=0.0)
    if given_var_ptr is not None:
        dvar += tl.load(given_var_ptr + channel, mask=inside, other=0.0)
    if dscale_ptr is not None:
        dscale = added(dscale_ptr, channel, inside, parts, stride, AT_ONCE, BLOCK)
        dshift = added(dshift_ptr, channel, inside, parts, stride, AT_ONCE, BLOCK)
        invstd = tl.load(invstd_ptr + channel, mask=inside, other=0.0)
        scale = invstd
        if weight_ptr is not None:
            scale = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(mean.dtype) * invstd
        dweight = (dscale - mean * dshift) * invstd
        tl.store(dweight_ptr + channel, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)
        tl.store(dbias_ptr + channel, dshift.to(dbias_ptr.dtype.element_ty), mask=inside)
        dmean -= scale * dshift
        dvar -= 0.5 * scale * invstd * dweight
    if dmean_ptr is not None:
        tl.store(dmean_ptr + channel, dmean, mask=inside)
        tl.store(dvar_ptr + channel, dvar, mask=inside)
    if b_ptr is not None:
        n = rows.to(mean.dtype)
        b = dvar * (2.0 / n)
        tl.store(b_ptr + channel, b, mask=inside)
        tl.store(c_ptr + channel, dmean / n - b * mean, mask=inside)
