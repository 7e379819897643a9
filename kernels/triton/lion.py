"""Lion for many tensors in one launch. fp32 inside (fp64 for fp64). Shared steps: multi_tensor.py.

    p = p - lr * sign(beta1 * m + (1 - beta1) * g)
    m = beta2 * m + (1 - beta2) * g

The sign of NaN is 0, as that of torch.sign. Source: Chen et al. 2023, algorithm 2.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.multi_tensor import (
    decayed,
    finish,
    gradient,
    interpolate,
    learning_rate,
    load,
    scalar,
    store,
    tensor_at,
)


# fmt: off
@triton.jit
def _update(
    table_ptr, T, t, start, last, rate, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, ema_weight,
    beta1, beta2,
    DECAY: tl.constexpr, L1: tl.constexpr, EMA: tl.constexpr, BF16: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):
    # fmt: on
    """One chunk of one tensor; `last` elements of it exist."""
    i = tl.arange(0, BLOCK)
    p_ptr = tensor_at(table_ptr, 0, T, t, start, DTYPE, ALIGNED)
    g_ptr = tensor_at(table_ptr, 1, T, t, start, DTYPE, ALIGNED)
    EXTRA: tl.constexpr = 3
    p = load(p_ptr, i, last, FULL)
    g = gradient(g_ptr, p, i, last, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, DECAY, L1, DTYPE, FULL)
    REAL: tl.constexpr = p.dtype
    m_ptr = tensor_at(table_ptr, 2, T, t, start, DTYPE, ALIGNED)
    m = load(m_ptr, i, last, FULL)
    p = decayed(p, rate, weight_decay, DECAY)
    direction = interpolate(m, g, 1.0 - beta1)
    store(m_ptr, i, last, interpolate(m, g, 1.0 - beta2), DTYPE, FULL)
    p = p - tl.where(direction > 0, rate.to(REAL), tl.where(direction < 0, -rate.to(REAL), scalar(0.0, REAL)))
    finish(p_ptr, p, table_ptr, EXTRA, T, t, start, i, last, ema_weight, EMA, BF16, DTYPE, ALIGNED, FULL)


@triton.jit(do_not_specialize=["T"])
def lion_kernel(
    table_ptr,  # state: exp_avg
    chunks_ptr,
    T,
    lr: tl.float64,
    lr_ptr,  # the learning rate on the device, or None
    grad_scale_ptr,  # or None
    found_inf_ptr,  # or None
    clip_ptr,  # or None
    sign: tl.float64,
    weight_decay: tl.float64,
    l1: tl.float64,
    ema_weight: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    DECAY: tl.constexpr,  # "none" or "decoupled"
    L1: tl.constexpr,
    EMA: tl.constexpr,
    BF16: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program updates one chunk of one tensor
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            return
    t = tl.load(chunks_ptr + 2 * tl.program_id(0))
    start = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    SIZES: tl.constexpr = 3 + EMA + BF16
    last = tl.load(table_ptr + SIZES * T + t) - start
    rate = learning_rate(lr, lr_ptr)
    # fmt: off
    if last >= BLOCK:
        _update(table_ptr, T, t, start, last, rate, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, ema_weight,
                beta1, beta2,
                DECAY, L1, EMA, BF16, DTYPE, ALIGNED, BLOCK, True)
    else:
        _update(table_ptr, T, t, start, last, rate, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, ema_weight,
                beta1, beta2,
                DECAY, L1, EMA, BF16, DTYPE, ALIGNED, BLOCK, False)
    # fmt: on
