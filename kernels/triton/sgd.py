"""SGD and LARS for many tensors in one launch. fp32 inside (fp64 for fp64). Shared steps: multi_tensor.py.

    g = ratio * g                              (LARS: ratio of the tensor, multi_tensor_norm.py)
    b = momentum * b + (1 - dampening) * g     (b = g at the first step), with momentum only
    p = p - lr * (g + momentum * b if nesterov, b with momentum, else g)

Sources: Sutskever et al. 2013 for the momentum forms, as torch.optim.SGD writes them; You et al. 2017 (LARS).
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.multi_tensor import (
    finish,
    gradient,
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
    ratio_ptr, momentum, dampening,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, DECAY: tl.constexpr, L1: tl.constexpr, EMA: tl.constexpr,
    BF16: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):
    # fmt: on
    """One chunk of one tensor; `last` elements of it exist."""
    i = tl.arange(0, BLOCK)
    p_ptr = tensor_at(table_ptr, 0, T, t, start, DTYPE, ALIGNED)
    g_ptr = tensor_at(table_ptr, 1, T, t, start, DTYPE, ALIGNED)
    EXTRA: tl.constexpr = 3 if MOMENTUM else 2
    p = load(p_ptr, i, last, FULL)
    g = gradient(g_ptr, p, i, last, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, DECAY, L1, DTYPE, FULL)
    REAL: tl.constexpr = p.dtype
    if ratio_ptr is not None:
        g = g * tl.load(ratio_ptr + t).to(REAL)
    if MOMENTUM:
        b_ptr = tensor_at(table_ptr, 2, T, t, start, DTYPE, ALIGNED)
        b = load(b_ptr, i, last, FULL)
        first = tl.load(table_ptr + (EXTRA + EMA + BF16) * T + t) != 0
        b = tl.where(first, g, scalar(momentum, REAL) * b + scalar(1.0 - dampening, REAL) * g)
        store(b_ptr, i, last, b, DTYPE, FULL)
        if NESTEROV:
            g += scalar(momentum, REAL) * b
        else:
            g = b
    p = p - rate.to(REAL) * g
    finish(p_ptr, p, table_ptr, EXTRA, T, t, start, i, last, ema_weight, EMA, BF16, DTYPE, ALIGNED, FULL)


@triton.jit(do_not_specialize=["T"])
def sgd_kernel(
    table_ptr,  # state: momentum buffer if MOMENTUM; then 1 where that holds nothing yet
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
    ratio_ptr,  # one fp64 number per tensor, or None
    momentum: tl.float64,
    dampening: tl.float64,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAY: tl.constexpr,  # "none" or "l2"
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
    SIZES: tl.constexpr = (4 if MOMENTUM else 3) + EMA + BF16
    last = tl.load(table_ptr + SIZES * T + t) - start
    rate = learning_rate(lr, lr_ptr)
    # fmt: off
    if last >= BLOCK:
        _update(table_ptr, T, t, start, last, rate, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, ema_weight,
                ratio_ptr, momentum, dampening,
                MOMENTUM, NESTEROV, DECAY, L1, EMA, BF16, DTYPE, ALIGNED, BLOCK, True)
    else:
        _update(table_ptr, T, t, start, last, rate, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, ema_weight,
                ratio_ptr, momentum, dampening,
                MOMENTUM, NESTEROV, DECAY, L1, EMA, BF16, DTYPE, ALIGNED, BLOCK, False)
    # fmt: on
