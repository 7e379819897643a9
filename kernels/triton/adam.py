"""Adam, AMSGrad and AdamW for many tensors in one launch. fp32 inside (fp64 for fp64).

    g = sign * gradient / grad_scale      (+ weight_decay * p for L2 decay)
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g^2     (amsgrad: w = max(w, v), and w below in place of v)
    p = keep * p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

with keep = 1 - lr * weight_decay if decoupled, else 1.

Sources: Kingma and Ba 2015; Reddi et al. 2018 (AMSGrad); Loshchilov and Hutter 2019 (AdamW).
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.multi_tensor import divide, load, scalar, square_root, store, tensor_at


@triton.jit
def _update(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    w_ptr,
    last,
    step,
    rate,
    grad_scale_ptr,
    sign,
    beta1,
    log_beta1,
    beta2,
    log_beta2,
    eps,
    weight_decay,
    DECAY: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DTYPE: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one tensor; `last` elements of it exist."""
    i = tl.arange(0, BLOCK)
    p = load(p_ptr, i, last, FULL)
    g = load(g_ptr, i, last, FULL)
    m = load(m_ptr, i, last, FULL)
    v = load(v_ptr, i, last, FULL)
    REAL: tl.constexpr = p.dtype

    if grad_scale_ptr is not None:
        g = divide(g, scalar(tl.load(grad_scale_ptr), REAL))
        store(g_ptr, i, last, g, DTYPE, FULL)
    g = g * scalar(sign, REAL)
    if DECAY == "l2":
        g += scalar(weight_decay, REAL) * p
    if DECAY == "decoupled":
        p = p * (1.0 - rate * weight_decay).to(REAL)

    # interpolation from the nearer end, as torch.lerp
    near = m + scalar(1.0 - beta1, REAL) * (g - m)
    far = g - scalar(beta1, REAL) * (g - m)
    m = tl.where(scalar(beta1, REAL) > 0.5, near, far)
    v = scalar(beta2, REAL) * v + scalar(1.0 - beta2, REAL) * g * g
    store(m_ptr, i, last, m, DTYPE, FULL)
    store(v_ptr, i, last, v, DTYPE, FULL)
    if AMSGRAD:
        w = load(w_ptr, i, last, FULL)
        # a NaN in either stays, as in torch.maximum
        v = tl.where((v > w) | (v != v), v, w)
        store(w_ptr, i, last, v, DTYPE, FULL)

    # in fp64: 1 - 0.999^t loses half its digits in fp32 at the first steps
    step_size = rate / (1.0 - tl.exp(step * log_beta1))
    root = tl.sqrt(1.0 - tl.exp(step * log_beta2))
    denominator = divide(square_root(v), scalar(root, REAL)) + scalar(eps, REAL)
    p = p - step_size.to(REAL) * divide(m, denominator)
    store(p_ptr, i, last, p, DTYPE, FULL)


@triton.jit(do_not_specialize=["T"])
def adam_kernel(
    table_ptr,  # rows: parameter, gradient, exp_avg, exp_avg_sq, max_exp_avg_sq if AMSGRAD, step (fp32)
    chunks_ptr,
    T,
    lr: tl.float64,
    lr_ptr,  # the learning rate on the device, or None
    grad_scale_ptr,  # or None
    found_inf_ptr,  # or None
    sign: tl.float64,
    beta1: tl.float64,
    log_beta1: tl.float64,
    beta2: tl.float64,
    log_beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    DECAY: tl.constexpr,  # "none", "l2" or "decoupled"
    AMSGRAD: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program updates one chunk of one tensor
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            return
    pid = tl.program_id(0)
    t = tl.load(chunks_ptr + 2 * pid)
    start = tl.load(chunks_ptr + 2 * pid + 1).to(tl.int64) * BLOCK
    W: tl.constexpr = 4 if AMSGRAD else 3  # without AMSGRAD a stand-in
    last = tl.load(table_ptr + (W + 2) * T + t) - start
    step = tl.load(tensor_at(table_ptr, W + 1, T, t, 0, tl.float32, False)).to(tl.float64) + 1.0
    if lr_ptr is not None:
        rate = scalar(tl.load(lr_ptr), tl.float64)
    else:
        rate = scalar(lr, tl.float64)
    p = tensor_at(table_ptr, 0, T, t, start, DTYPE, ALIGNED)
    g = tensor_at(table_ptr, 1, T, t, start, DTYPE, ALIGNED)
    m = tensor_at(table_ptr, 2, T, t, start, DTYPE, ALIGNED)
    v = tensor_at(table_ptr, 3, T, t, start, DTYPE, ALIGNED)
    w = tensor_at(table_ptr, W, T, t, start, DTYPE, ALIGNED)
    # fmt: off
    if last >= BLOCK:
        _update(p, g, m, v, w, last, step, rate, grad_scale_ptr, sign, beta1, log_beta1, beta2, log_beta2, eps,
                weight_decay, DECAY, AMSGRAD, DTYPE, True, BLOCK)
    else:
        _update(p, g, m, v, w, last, step, rate, grad_scale_ptr, sign, beta1, log_beta1, beta2, log_beta2, eps,
                weight_decay, DECAY, AMSGRAD, DTYPE, False, BLOCK)
    # fmt: on
