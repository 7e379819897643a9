"""Adam and its kin for many tensors in one launch. fp32 inside (fp64 for fp64). Shared steps: multi_tensor.py.

    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g^2                       (AMSGRAD: w = max(w, v), and w below in place of v)

    "adam"   p = p - lr / c1 * m / d,  c1 = 1 - beta1^t, c2 = 1 - beta2^t, d = sqrt(v) / sqrt(c2) + eps
    "nadam"  p = p - lr * (1 - mu_t) / (1 - mu_1 ... mu_t) * g / d - lr * mu_t+1 / (1 - mu_1 ... mu_t+1) * m / d,
             mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2)
    "radam"  p = p - lr / c1 * m * r * sqrt(c2) / (sqrt(v) + eps)      without the factors from r on while rho <= 5;
             rho = rho_inf - 2 * t * beta2^t / c2, rho_inf = 2 / (1 - beta2) - 1,
             r = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))

Without bias correction c1 = c2 = 1: the caller passes logarithms of minus infinity.

Sources: Kingma and Ba 2015; Reddi et al. 2018 (AMSGrad); Loshchilov and Hutter 2019 (AdamW); Dozat 2016 (NAdam); Liu et
al. 2020 (RAdam).
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.multi_tensor import (
    decayed,
    divide,
    finish,
    gradient,
    interpolate,
    learning_rate,
    load,
    scalar,
    scalar_at,
    square_root,
    store,
    tensor_at,
)


@triton.jit
def nadam_mu(step, beta1, momentum_decay):
    return beta1 * (1.0 - 0.5 * tl.exp(step * momentum_decay * -0.040821994520255166))  # log(0.96)


# fmt: off
@triton.jit
def _update(
    table_ptr, T, t, start, last, rate, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, ema_weight,
    beta1, log_beta1, beta2, log_beta2, eps, momentum_decay,
    RULE: tl.constexpr, AMSGRAD: tl.constexpr, DECAY: tl.constexpr, L1: tl.constexpr, EMA: tl.constexpr,
    BF16: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):
    # fmt: on
    """One chunk of one tensor; `last` elements of it exist."""
    i = tl.arange(0, BLOCK)
    p_ptr = tensor_at(table_ptr, 0, T, t, start, DTYPE, ALIGNED)
    g_ptr = tensor_at(table_ptr, 1, T, t, start, DTYPE, ALIGNED)
    m_ptr = tensor_at(table_ptr, 2, T, t, start, DTYPE, ALIGNED)
    v_ptr = tensor_at(table_ptr, 3, T, t, start, DTYPE, ALIGNED)
    EXTRA: tl.constexpr = 5 if AMSGRAD else 4
    STEP: tl.constexpr = EXTRA + EMA + BF16
    p = load(p_ptr, i, last, FULL)
    g = gradient(g_ptr, p, i, last, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, DECAY, L1, DTYPE, FULL)
    m = load(m_ptr, i, last, FULL)
    v = load(v_ptr, i, last, FULL)
    REAL: tl.constexpr = p.dtype
    p = decayed(p, rate, weight_decay, DECAY)
    m = interpolate(m, g, 1.0 - beta1)
    v = scalar(beta2, REAL) * v + scalar(1.0 - beta2, REAL) * g * g
    store(m_ptr, i, last, m, DTYPE, FULL)
    store(v_ptr, i, last, v, DTYPE, FULL)
    if AMSGRAD:
        w_ptr = tensor_at(table_ptr, 4, T, t, start, DTYPE, ALIGNED)
        w = load(w_ptr, i, last, FULL)
        # a NaN in either stays, as in torch.maximum
        v = tl.where((v > w) | (v != v), v, w)
        store(w_ptr, i, last, v, DTYPE, FULL)

    # in fp64: 1 - 0.999^t loses half its digits in fp32 at the first steps
    step = scalar_at(table_ptr, STEP, T, t) + 1.0
    correction1 = 1.0 - tl.exp(step * log_beta1)
    correction2 = 1.0 - tl.exp(step * log_beta2)
    root = tl.sqrt(correction2)
    if RULE == "radam":
        rho_inf = 2.0 / (1.0 - beta2) - 1.0
        rho = rho_inf - 2.0 * step * (1.0 - correction2) / correction2
        squared = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
        rectified = rho > 5.0
        step_size = rate / correction1 * tl.where(rectified, tl.sqrt(squared) * root, 1.0)
        denominator = tl.where(rectified, square_root(v) + scalar(eps, REAL), scalar(1.0, REAL))
        p = p - step_size.to(REAL) * divide(m, denominator)
    else:
        denominator = divide(square_root(v), scalar(root, REAL)) + scalar(eps, REAL)
        if RULE == "nadam":
            mu = nadam_mu(step, beta1, momentum_decay)
            mu_next = nadam_mu(step + 1.0, beta1, momentum_decay)
            product = scalar_at(table_ptr, STEP + 1, T, t) * mu
            p = p - (rate * (1.0 - mu) / (1.0 - product)).to(REAL) * divide(g, denominator)
            p = p - (rate * mu_next / (1.0 - product * mu_next)).to(REAL) * divide(m, denominator)
        else:
            p = p - (rate / correction1).to(REAL) * divide(m, denominator)
    finish(p_ptr, p, table_ptr, EXTRA, T, t, start, i, last, ema_weight, EMA, BF16, DTYPE, ALIGNED, FULL)


@triton.jit(do_not_specialize=["T"])
def adam_kernel(
    table_ptr,  # state: exp_avg, exp_avg_sq, max_exp_avg_sq if AMSGRAD; scalars (fp32): step, mu_product of "nadam"
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
    log_beta1: tl.float64,
    beta2: tl.float64,
    log_beta2: tl.float64,
    eps: tl.float64,
    momentum_decay: tl.float64,
    RULE: tl.constexpr,  # "adam", "nadam" or "radam"
    AMSGRAD: tl.constexpr,
    DECAY: tl.constexpr,  # "none", "l2" or "decoupled"
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
    SIZES: tl.constexpr = (6 if AMSGRAD else 5) + EMA + BF16 + (1 if RULE == "nadam" else 0)
    last = tl.load(table_ptr + SIZES * T + t) - start
    rate = learning_rate(lr, lr_ptr)
    # fmt: off
    if last >= BLOCK:
        _update(table_ptr, T, t, start, last, rate, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, ema_weight,
                beta1, log_beta1, beta2, log_beta2, eps, momentum_decay,
                RULE, AMSGRAD, DECAY, L1, EMA, BF16, DTYPE, ALIGNED, BLOCK, True)
    else:
        _update(table_ptr, T, t, start, last, rate, grad_scale_ptr, clip_ptr, sign, weight_decay, l1, ema_weight,
                beta1, log_beta1, beta2, log_beta2, eps, momentum_decay,
                RULE, AMSGRAD, DECAY, L1, EMA, BF16, DTYPE, ALIGNED, BLOCK, False)
    # fmt: on


@triton.jit(do_not_specialize=["T", "row"])
def nadam_advance_kernel(
    table_ptr, T, row, found_inf_ptr, beta1: tl.float64, momentum_decay: tl.float64, BLOCK: tl.constexpr
):
    # one program advances step (in this row) and mu_product (in the next) of BLOCK tensors, after their update
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            return
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < T
    step_ptr = tl.load(table_ptr + row * T + t, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    product_ptr = tl.load(table_ptr + (row + 1) * T + t, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=inside, other=0.0).to(tl.float64) + 1.0
    product = tl.load(product_ptr, mask=inside, other=1.0).to(tl.float64) * nadam_mu(step, beta1, momentum_decay)
    tl.store(step_ptr, step.to(tl.float32), mask=inside)
    tl.store(product_ptr, product.to(tl.float32), mask=inside)
