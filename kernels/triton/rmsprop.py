"""RMSprop for many tensors in one launch. fp32 inside (fp64 for fp64). Shared steps: multi_tensor.py.

    s = alpha * s + (1 - alpha) * g^2
    d = sqrt(s) + eps       (CENTERED: a = a + (1 - alpha) * (g - a), d = sqrt(s - a^2) + eps)
    p = p - lr * g / d      (MOMENTUM: b = momentum * b + g / d, p = p - lr * b)

Sources: Tieleman and Hinton 2012; Graves 2013 (centered), as torch.optim.RMSprop writes them.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.multi_tensor import (
    divide,
    finish,
    gradient,
    interpolate,
    learning_rate,
    load,
    scalar,
    square_root,
    store,
    tensor_at,
)


# fmt: off
@triton.jit
def _update(
    table_ptr, T, t, start, last, rate, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, ema_weight,
    alpha, eps, momentum,
    MOMENTUM: tl.constexpr, CENTERED: tl.constexpr, DECAY: tl.constexpr, L1: tl.constexpr, EMA: tl.constexpr,
    BF16: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):
    # fmt: on
    """One chunk of one tensor; `last` elements of it exist."""
    i = tl.arange(0, BLOCK)
    p_ptr = tensor_at(table_ptr, 0, T, t, start, DTYPE, ALIGNED)
    g_ptr = tensor_at(table_ptr, 1, T, t, start, DTYPE, ALIGNED)
    EXTRA: tl.constexpr = 3 + MOMENTUM + CENTERED
    p = load(p_ptr, i, last, FULL)
    g = gradient(g_ptr, p, i, last, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, DECAY, L1, DTYPE, FULL)
    REAL: tl.constexpr = p.dtype
    s_ptr = tensor_at(table_ptr, 2, T, t, start, DTYPE, ALIGNED)
    s = load(s_ptr, i, last, FULL)
    s = scalar(alpha, REAL) * s + scalar(1.0 - alpha, REAL) * g * g
    store(s_ptr, i, last, s, DTYPE, FULL)
    if CENTERED:
        a_ptr = tensor_at(table_ptr, EXTRA - 1, T, t, start, DTYPE, ALIGNED)
        a = interpolate(load(a_ptr, i, last, FULL), g, 1.0 - alpha)
        store(a_ptr, i, last, a, DTYPE, FULL)
        s = s - a * a
    g = divide(g, square_root(s) + scalar(eps, REAL))
    if MOMENTUM:
        b_ptr = tensor_at(table_ptr, 3, T, t, start, DTYPE, ALIGNED)
        g = scalar(momentum, REAL) * load(b_ptr, i, last, FULL) + g
        store(b_ptr, i, last, g, DTYPE, FULL)
    p = p - rate.to(REAL) * g
    finish(p_ptr, p, table_ptr, EXTRA, T, t, start, i, last, ema_weight, EMA, BF16, DTYPE, ALIGNED, FULL)


@triton.jit(do_not_specialize=["T"])
def rmsprop_kernel(
    table_ptr,  # state: square_avg, momentum_buffer if MOMENTUM, grad_avg if CENTERED; then step, which is not read
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
    alpha: tl.float64,
    eps: tl.float64,
    momentum: tl.float64,
    MOMENTUM: tl.constexpr,
    CENTERED: tl.constexpr,
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
    SIZES: tl.constexpr = 4 + MOMENTUM + CENTERED + EMA + BF16
    last = tl.load(table_ptr + SIZES * T + t) - start
    rate = learning_rate(lr, lr_ptr)
    # fmt: off
    if last >= BLOCK:
        _update(table_ptr, T, t, start, last, rate, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, ema_weight,
                alpha, eps, momentum,
                MOMENTUM, CENTERED, DECAY, L1, EMA, BF16, DTYPE, ALIGNED, BLOCK, True)
    else:
        _update(table_ptr, T, t, start, last, rate, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, ema_weight,
                alpha, eps, momentum,
                MOMENTUM, CENTERED, DECAY, L1, EMA, BF16, DTYPE, ALIGNED, BLOCK, False)
    # fmt: on
