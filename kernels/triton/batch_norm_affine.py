"""Batch norm's vectors [C]: from the statistics to scale and shift, and back. fp32 inside (fp64 for fp64)."""

import triton
import triton.language as tl


@triton.jit
def store_affine(
    c, inside, mean, var, n, weight_ptr, bias_ptr, scale_ptr, shift_ptr, invstd_ptr,
    running_mean_ptr, running_var_ptr, offset_ptr, batches_ptr, momentum, momentum_rest, EPS: tl.constexpr,
):  # fmt: skip
    """Scale, shift and invstd of the channels c, from mean and var of n values; moves the running statistics, if any.

    The first program also counts the batch in batches, if there is a counter.
    """
    invstd = 1.0 / tl.sqrt(var + EPS)
    scale = invstd
    if weight_ptr is not None:
        scale = tl.load(weight_ptr + c, mask=inside, other=0.0).to(mean.dtype) * invstd
    shift = -mean * scale
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + c, mask=inside, other=0.0).to(mean.dtype) - mean * scale
    tl.store(scale_ptr + c, scale, mask=inside)
    tl.store(shift_ptr + c, shift, mask=inside)
    tl.store(invstd_ptr + c, invstd, mask=inside)
    if running_mean_ptr is not None:
        # the pivot of the sums may be this running mean: all threads have read theirs before one writes
        tl.debug_barrier()
        # a float argument arrives in fp32: the second one holds what rounding took
        momentum = tl.zeros_like(mean) + momentum + momentum_rest
        if offset_ptr is not None:
            mean += tl.load(offset_ptr + c, mask=inside, other=0.0).to(mean.dtype)
        running = tl.load(running_mean_ptr + c, mask=inside, other=0.0).to(mean.dtype)
        running = (1.0 - momentum) * running + momentum * mean
        tl.store(running_mean_ptr + c, running.to(running_mean_ptr.dtype.element_ty), mask=inside)
        running = tl.load(running_var_ptr + c, mask=inside, other=0.0).to(mean.dtype)
        running = (1.0 - momentum) * running + momentum * (var * (n / (n - 1.0)))
        tl.store(running_var_ptr + c, running.to(running_var_ptr.dtype.element_ty), mask=inside)
    if batches_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit(do_not_specialize=["rows"])
def batch_norm_affine_kernel(
    mean_ptr, var_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, invstd_ptr,
    running_mean_ptr, running_var_ptr, offset_ptr, batches_ptr, rows_ptr, C, rows, momentum, momentum_rest,
    EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program computes scale, shift and invstd of BLOCK channels and moves their running statistics, if any
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < C
    mean = tl.load(mean_ptr + c, mask=inside, other=0.0)
    var = tl.load(var_ptr + c, mask=inside, other=1.0)
    if rows_ptr is not None:
        n = tl.load(rows_ptr).to(mean.dtype)
    else:
        n = rows.to(mean.dtype)
    store_affine(
        c, inside, mean, var, n, weight_ptr, bias_ptr, scale_ptr, shift_ptr, invstd_ptr,
        running_mean_ptr, running_var_ptr, offset_ptr, batches_ptr, momentum, momentum_rest, EPS,
    )  # fmt: skip


@triton.jit
def added(ptr, c, inside, parts, stride, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """The channels c of a vector that comes in parts, so far apart; AT_ONCE = 1: in one."""
    if AT_ONCE == 1:
        return tl.load(ptr + c, mask=inside, other=0.0)
    else:
        part = tl.arange(0, AT_ONCE)
        sums = tl.zeros((AT_ONCE, BLOCK), dtype=ptr.dtype.element_ty)
        for start in range(0, parts, AT_ONCE):
            there = (start + part < parts)[:, None] & inside[None, :]
            sums += tl.load(ptr + ((start + part) * stride)[:, None] + c[None, :], mask=there, other=0.0)
        return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["rows", "parts"])
def batch_norm_affine_backward_kernel(
    dscale_ptr, dshift_ptr, mean_ptr, invstd_ptr, weight_ptr, a_ptr, b_ptr, c_ptr, dweight_ptr, dbias_ptr,
    first_ptr, second_ptr, C, rows, parts, stride, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program computes the gradients of BLOCK channels' weight and bias, and a, b, c: dx = a * du + b * x + c;
    # without b_ptr and c_ptr the statistics were constants, and dx = a * du. first, second: the sums of dscale, dshift
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    dscale = added(dscale_ptr, channel, inside, parts, stride, AT_ONCE, BLOCK)
    dshift = added(dshift_ptr, channel, inside, parts, stride, AT_ONCE, BLOCK)
    mean = tl.load(mean_ptr + channel, mask=inside, other=0.0)
    invstd = tl.load(invstd_ptr + channel, mask=inside, other=0.0)
    a = invstd
    if weight_ptr is not None:
        a = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(mean.dtype) * invstd
    dweight = (dscale - mean * dshift) * invstd
    if first_ptr is not None:
        tl.store(first_ptr + channel, dscale, mask=inside)
        tl.store(second_ptr + channel, dshift, mask=inside)
    tl.store(a_ptr + channel, a, mask=inside)
    if b_ptr is not None:
        n = rows.to(mean.dtype)
        b = -a * invstd * dweight / n
        tl.store(b_ptr + channel, b, mask=inside)
        tl.store(c_ptr + channel, -a * dshift / n - b * mean, mask=inside)
    tl.store(dweight_ptr + channel, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)
    tl.store(dbias_ptr + channel, dshift.to(dbias_ptr.dtype.element_ty), mask=inside)
