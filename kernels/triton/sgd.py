"""SGD for many tensors in one launch. fp32 inside (fp64 for fp64).

    g = sign * gradient / grad_scale + weight_decay * p
    b = momentum * b + (1 - dampening) * g     (b = g at the first step), with momentum only
    p = p - lr * (g + momentum * b if nesterov, b with momentum, else g)

Source of the momentum forms: Sutskever et al. 2013, as torch.optim.SGD writes them.
"""

import triton
import triton.language as tl

from fastcnn.kernels.triton.multi_tensor import divide, load, scalar, store, tensor_at


@triton.jit
def _update(
    p_ptr,
    g_ptr,
    b_ptr,
    last,
    first,
    rate,
    grad_scale_ptr,
    sign,
    momentum,
    dampening,
    weight_decay,
    DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    DTYPE: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one tensor; `last` elements of it exist."""
    i = tl.arange(0, BLOCK)
    p = load(p_ptr, i, last, FULL)
    g = load(g_ptr, i, last, FULL)
    REAL: tl.constexpr = p.dtype
    if grad_scale_ptr is not None:
        g = divide(g, scalar(tl.load(grad_scale_ptr), REAL))
        store(g_ptr, i, last, g, DTYPE, FULL)
    g = g * scalar(sign, REAL)
    if DECAY:
        g += scalar(weight_decay, REAL) * p
    if MOMENTUM:
        b = load(b_ptr, i, last, FULL)
        b = tl.where(first, g, scalar(momentum, REAL) * b + scalar(1.0 - dampening, REAL) * g)
        store(b_ptr, i, last, b, DTYPE, FULL)
        if NESTEROV:
            g += scalar(momentum, REAL) * b
        else:
            g = b
    p = p - rate.to(REAL) * g
    store(p_ptr, i, last, p, DTYPE, FULL)


@triton.jit(do_not_specialize=["T"])
def sgd_kernel(
    table_ptr,  # rows: parameter, gradient, momentum buffer if MOMENTUM, 1 where that holds nothing yet
    chunks_ptr,
    T,
    lr: tl.float64,
    lr_ptr,  # the learning rate on the device, or None
    grad_scale_ptr,  # or None
    found_inf_ptr,  # or None
    sign: tl.float64,
    momentum: tl.float64,
    dampening: tl.float64,
    weight_decay: tl.float64,
    DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
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
    B: tl.constexpr = 2 if MOMENTUM else 1  # without MOMENTUM a stand-in
    last = tl.load(table_ptr + (B + 2) * T + t) - start
    first = tl.load(table_ptr + (B + 1) * T + t) != 0
    if lr_ptr is not None:
        rate = scalar(tl.load(lr_ptr), tl.float64)
    else:
        rate = scalar(lr, tl.float64)
    p = tensor_at(table_ptr, 0, T, t, start, DTYPE, ALIGNED)
    g = tensor_at(table_ptr, 1, T, t, start, DTYPE, ALIGNED)
    b = tensor_at(table_ptr, B, T, t, start, DTYPE, ALIGNED)
    # fmt: off
    if last >= BLOCK:
        _update(p, g, b, last, first, rate, grad_scale_ptr, sign, momentum, dampening, weight_decay, DECAY, MOMENTUM,
                NESTEROV, DTYPE, True, BLOCK)
    else:
        _update(p, g, b, last, first, rate, grad_scale_ptr, sign, momentum, dampening, weight_decay, DECAY, MOMENTUM,
                NESTEROV, DTYPE, False, BLOCK)
    # fmt: on
