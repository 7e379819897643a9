"""Losses that compare two tensors element by element: mse_loss, l1_loss, smooth_l1_loss, huber_loss,
binary_cross_entropy_with_logits.

loss = w * f(x, t), any shape; with d = x - t: d^2; |d|; d^2 / 2 beta inside |d| < beta, else |d| - beta / 2; beta times
that (huber); (1 - t) x + (1 + (p - 1) t) log(1 + exp(-x)). "mean" divides by the elements; weighted mse and l1 by the
sum of the weights. Saved for backward: x, t, the weights as they came, and of a weighted mean its divisor.
Torch counterparts: torch.nn.functional, same names. Source of smooth l1: Girshick 2015 (Fast R-CNN).
"""

import math
import numbers

import torch
import torch.nn.functional as F
from torch.nn import _reduction as _Reduction

from fastcnn.backends import Op, current_backend
from fastcnn.ops import common

BLOCK = 1024
PROGRAMS = 1024  # of a sum, at most: enough to fill a GPU, and one step of the finalize kernel
REDUCTIONS = ("none", "mean", "sum")
CPU_KINDS = {"mse": 0, "smooth_l1": 1, "huber": 2, "bce": 3}
# elements from which the CPU kernels are faster, forward and backward together; half as many in channels_last
BELOW = {
    "mse_loss": 2**21,
    "l1_loss": 2**18,
    "smooth_l1_loss": 2**21,
    "huber_loss": 2**21,
    "binary_cross_entropy_with_logits": 2**20,
}


def elementwise_loss_reference(x, target, weight, pos_weight, kind, beta, reduction, dtype):
    """The loss in plain PyTorch, computed and returned in `dtype`; kind "smooth_l1" with beta 0 is l1."""
    x, target = x.to(dtype), target.to(dtype)
    weight, pos_weight = (None if w is None else w.to(dtype) for w in (weight, pos_weight))
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(x, target, weight, pos_weight=pos_weight, reduction=reduction)
    if kind == "mse":
        return F.mse_loss(x, target, weight=weight, reduction=reduction)
    if kind == "huber":
        return F.huber_loss(x, target, weight=weight, reduction=reduction, delta=beta)
    if beta == 0:
        return F.l1_loss(x, target, weight=weight, reduction=reduction)
    return F.smooth_l1_loss(x, target, reduction=reduction, beta=beta)


def _why_not(backend, name, x, target, weights, dtype):
    tensors = [x, target, *(w for w in weights if w is not None)]
    for tensor in tensors:
        if tensor.dtype not in common.FLOATS:
            return f"{name} has kernels for floating-point tensors and got {tensor.dtype}"
    if x.shape != target.shape:
        return f"{name} has no kernel that broadcasts, and got shapes {tuple(x.shape)} and {tuple(target.shape)}"
    if len({t.dtype == torch.float64 for t in tensors} | {dtype == torch.float64}) > 1:
        return f"{name} has no kernel for float64 beside other dtypes"
    if any(w is not None and w.requires_grad for w in weights):
        return f"{name} has no kernel for the gradient of a weight"
    if name == "huber_loss" and x.dtype != target.dtype:
        return "huber_loss has no kernel for two dtypes"
    if backend == "cpu":
        if any(t.dtype != dtype for t in tensors) or dtype not in (torch.float32, torch.float64):
            return f"the CPU kernel of {name} takes float32 or float64 and got {[str(t.dtype) for t in tensors]}"
        below = BELOW[name] if x.is_contiguous() else BELOW[name] // 2
        if current_backend() == "auto" and x.numel() < below:
            return f"PyTorch is faster on CPU below {below:,} elements"
    return None


def _divides_by_weight(weight, kind, reduction):
    # torch's rule: mse and l1, but not huber and bce
    return weight is not None and reduction == "mean" and kind in ("mse", "smooth_l1")


def _in_place_weight(weight, like):
    """(flat weight, inner, size) such that the i-th element of `like` in memory has weight[i // inner % size]."""
    if weight is None:
        return None, 1, 1
    weight = weight.contiguous()
    weight = weight.view((1,) * (like.dim() - weight.dim()) + weight.shape)
    order = sorted((d for d in range(like.dim()) if like.shape[d] != 1), key=lambda d: -like.stride(d))
    own = [i for i, d in enumerate(order) if weight.shape[d] != 1]
    if not own:
        return weight.reshape(1), 1, 1
    if own[-1] - own[0] + 1 > len(own):
        # its dimensions lie apart: one value for every element
        return torch.empty_like(like, dtype=weight.dtype).copy_(weight), 1, like.numel()
    ones = [d for d in range(like.dim()) if d not in order]
    flat = weight.permute(ones + order).contiguous()
    inner = math.prod(like.shape[d] for d in order[own[-1] + 1 :])
    return flat, inner, math.prod(like.shape[order[i]] for i in own)


def elementwise_loss_forward(x, target, weight, pos_weight, kind, beta, reduction, dtype, backend):
    """(loss, what a weighted mean divides by: a scalar, else empty)."""
    loss, total = _allocate_forward(x, target, weight, pos_weight, kind, beta, reduction, dtype)
    x = x if common.is_dense(x) else x.contiguous()
    target = _like(target, x)
    if x.numel() == 0:
        return loss.fill_(math.nan if reduction == "mean" else 0.0), total.zero_()
    if backend == "cpu":
        _forward_cpu(x, target, weight, pos_weight, loss, total, kind, beta, reduction)
        return loss, total
    from fastcnn.kernels.triton.elementwise_loss import elementwise_loss_forward_kernel
    from fastcnn.kernels.triton.loss_reduction import loss_finalize_kernel

    blocks = 1 if reduction == "none" else -(-x.numel() // (BLOCK * PROGRAMS))
    programs = -(-x.numel() // (BLOCK * blocks))
    step, out, divisor = reduction, loss, total
    if reduction != "none":
        inside = torch.float64 if x.dtype == torch.float64 else torch.float32
        divisor = total if total.numel() else torch.empty((), dtype=inside, device=x.device)
        if programs > 1:
            partial = torch.empty((programs, 2), dtype=inside, device=x.device)
            step, out, first_divisor = "partial", partial, partial.view(-1)[1:]
    with common.device_guard(x):
        weights = [_in_place_weight(w, x) for w in (weight, pos_weight)]
        elementwise_loss_forward_kernel[(programs,)](
            x, target, weights[0][0], weights[1][0], out, first_divisor if step == "partial" else divisor,
            x.numel(), blocks, *weights[0][1:], *weights[1][1:],
            KIND=kind, BETA=beta, REDUCTION=step, DIVIDE_BY_WEIGHT=_divides_by_weight(weight, kind, reduction),
            **_how(x, weights),
        )  # fmt: skip
        if step == "partial":
            loss_finalize_kernel[(1,)](partial, loss, divisor, programs, REDUCTION=reduction, BLOCK=PROGRAMS)
    return loss, total


def elementwise_loss_backward(
    grad_output, x, target, weight, pos_weight, total, kind, beta, reduction, need_input, need_target, backend
):
    """(gradient of x, gradient of target), in the memory order of x; empty where not needed."""
    grad_input, grad_target = _allocate_backward(x, target, need_input, need_target)
    x = x if common.is_dense(x) else x.contiguous()
    target = _like(target, x)
    if x.numel() == 0:
        return grad_input, grad_target
    if reduction == "none":
        grad_output = _like(grad_output, x)
    if backend == "cpu":
        _backward_cpu(grad_output, x, target, weight, pos_weight, total, grad_input, grad_target, kind, beta, reduction)
        return grad_input, grad_target
    from fastcnn.kernels.triton.elementwise_loss import elementwise_loss_backward_kernel

    with common.device_guard(x):
        weights = [_in_place_weight(w, x) for w in (weight, pos_weight)]
        elementwise_loss_backward_kernel[(-(-x.numel() // BLOCK),)](
            grad_output, x, target, weights[0][0], weights[1][0], total if total.numel() else None,
            grad_input if need_input else None, grad_target if need_target else None,
            x.numel(), *weights[0][1:], *weights[1][1:],
            KIND=kind, BETA=beta, REDUCTION=reduction, **_how(x, weights),
        )  # fmt: skip
    return grad_input, grad_target


def _like(tensor, x):
    # an expanded gradient may have the strides of x and less memory
    return common.with_strides_of(tensor, x)


def _how(x, weights):
    full = [size == x.numel() for _, _, size in weights]
    return dict(WEIGHT_FULL=full[0], POS_FULL=full[1], INT64=common.exceeds_int32(x), BLOCK=BLOCK)


def _flat(tensor, like):
    """numpy view of a tensor in memory order; a weight is brought to the shape and order of `like` first."""
    if tensor is None or tensor.numel() == 0:
        return like.detach().new_empty(0).numpy()
    if tensor.stride() != like.stride() or tensor.shape != like.shape:
        tensor = torch.empty_like(like).copy_(tensor)
    return tensor.detach().as_strided((like.numel(),), (1,)).numpy()


def _forward_cpu(x, target, weight, pos_weight, loss, total, kind, beta, reduction):
    from fastcnn.kernels.cpu.elementwise_loss import forward

    common.cpu_threads(x.numel())
    tensors = [_flat(t, x) for t in (x, target, weight, pos_weight)]
    out = _flat(loss if reduction == "none" else None, x)
    value, divisor = forward(*tensors, out, CPU_KINDS[kind], out.dtype.type(beta))
    if total.numel():
        total.fill_(divisor)
    else:
        divisor = x.numel()
    if reduction == "mean":
        value = value / divisor if divisor else value * math.inf
    if reduction != "none":
        loss.fill_(value)


def _backward_cpu(grad_output, x, target, weight, pos_weight, total, grad_input, grad_target, kind, beta, reduction):
    from fastcnn.kernels.cpu.elementwise_loss import backward

    common.cpu_threads(x.numel())
    tensors = [_flat(t, x) for t in (x, target, weight, pos_weight, grad_input, grad_target)]
    scale, per_element = 0.0, None
    if reduction == "none":
        per_element = grad_output
    else:
        scale = grad_output.item()
        if reduction == "mean":
            divisor = total.item() if total.numel() else x.numel()
            scale = scale / divisor if divisor else scale * math.inf
    like = tensors[0].dtype.type
    backward(like(scale), _flat(per_element, x), *tensors, CPU_KINDS[kind], like(beta))


def _allocate_forward(x, target, weight, pos_weight, kind, beta, reduction, dtype, backend=None):
    if reduction == "none":
        loss = torch.empty_like(x if common.is_dense(x) else x.contiguous(), dtype=dtype)
    else:
        loss = x.new_empty((), dtype=dtype)
    inside = torch.float64 if x.dtype == torch.float64 else torch.float32
    return loss, x.new_empty(() if _divides_by_weight(weight, kind, reduction) else (0,), dtype=inside)


def _allocate_backward(x, target, need_input, need_target):
    x = x if common.is_dense(x) else x.contiguous()
    return (
        torch.empty_like(x) if need_input else x.new_empty(0),
        torch.empty_like(x, dtype=target.dtype) if need_target else target.new_empty(0),
    )


_forward = common.register(
    "elementwise_loss(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, str kind, float beta, "
    "str reduction, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    elementwise_loss_forward,
    _allocate_forward,
)
_backward = common.register(
    "elementwise_loss_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, "
    "Tensor total, str kind, float beta, str reduction, bool need_input, bool need_target, str backend) "
    "-> (Tensor, Tensor)",
    elementwise_loss_backward,
    lambda grad_output, x, target, weight, pos_weight, total, kind, beta, reduction, need_input, need_target, backend: (
        _allocate_backward(x, target, need_input, need_target)
    ),
)


class ElementwiseLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, weight, pos_weight, kind, beta, reduction, dtype, backend):
        loss, total = _forward(x, target, weight, pos_weight, kind, beta, reduction, dtype, backend)
        ctx.save_for_backward(x, target, weight, pos_weight, total)
        ctx.arguments = (kind, beta, reduction, dtype, backend)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        x, target, weight, pos_weight, total = ctx.saved_tensors
        kind, beta, reduction, dtype, backend = ctx.arguments
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            grads = common.differentiable_grads(
                lambda x, target: elementwise_loss_reference(
                    x, target, weight, pos_weight, kind, beta, reduction, dtype
                ),
                (x, target), grad_output, needs,
            )  # fmt: skip
        else:
            grads = _backward(grad_output, x, target, weight, pos_weight, total, kind, beta, reduction, *needs, backend)
            grads = (g if need else None for g, need in zip(grads, needs, strict=True))
        return *grads, *[None] * 7


def _declare(name):
    why = f"forward and backward in one pass each over memory; PyTorch is faster below {BELOW[name]:,} elements"
    return Op(name, cpu_kernel=True, cpu_auto=True, why=why)


_ops = {name: _declare(name) for name in BELOW}


def _loss(name, kind, fallback, input, target, weight, pos_weight, reduction, beta=0.0):
    dtype = _check(name, kind, input, target, weight, pos_weight)
    weights = (weight, pos_weight)
    backend = _ops[name].route(input, lambda backend: _why_not(backend, name, input, target, weights, dtype))
    if backend == "torch":
        return fallback()
    return ElementwiseLossFunction.apply(
        input, target, weight, pos_weight, kind, float(beta), reduction, dtype, backend
    )


def _reduction(size_average, reduce, reduction):
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    return REDUCTIONS[_Reduction.get_enum(reduction)]


def _check(name, kind, input, target, weight, pos_weight):
    """Raise unless the arguments go together; the dtype of the loss."""
    common.check_tensor("input", input)
    common.check_tensor("target", target)
    common.check_alike("target", target, "input", input, dtype=False)
    if kind == "bce" and target.shape != input.shape:
        raise ValueError(f"target must have the shape of input ({tuple(input.shape)}), got {tuple(target.shape)}")
    # autocast computes losses in float32
    autocast = common.autocast_enabled(input)

    def computed(dtype):
        return torch.float32 if autocast and dtype in (torch.float16, torch.bfloat16) else dtype

    dtype = torch.promote_types(computed(input.dtype), computed(target.dtype))
    for what, w in (("weight", weight), ("pos_weight", pos_weight)):
        if w is None:
            continue
        common.check_tensor(what, w)
        common.check_alike(what, w, "input", input, dtype=False)
        if kind != "bce":
            if w.shape != input.shape:
                raise ValueError(f"{what} must have the shape of input ({tuple(input.shape)}), got {tuple(w.shape)}")
            dtype = torch.promote_types(dtype, computed(w.dtype))
        elif w.dim() > input.dim() or any(
            size not in (1, wanted) for size, wanted in zip(reversed(w.shape), reversed(input.shape), strict=False)
        ):
            raise ValueError(
                f"{what} must broadcast to the shape of input ({tuple(input.shape)}), got {tuple(w.shape)}"
            )
    return dtype


def _check_number(name, value, low, strictly):
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (value > low if strictly else value >= low):
        raise ValueError(f"{name} must be {'more than' if strictly else 'at least'} {low}, got {value}")


@_ops["mse_loss"].torch_first(F.mse_loss, BELOW["mse_loss"] // 2)
def mse_loss(input, target, size_average=None, reduce=None, reduction="mean", weight=None):
    """Squared difference, as torch.nn.functional.mse_loss. Gradients for input and target.

    Args:
        input, target: floating-point tensors of one shape (PyTorch runs, and warns, where they broadcast).
        size_average, reduce: deprecated in torch; override reduction.
        reduction: "none", "mean" or "sum".
        weight: a factor per element, of the shape of input, or None; the mean divides by its sum.

    Returns:
        a scalar, or with "none" a loss per element in the layout of input.

    Raises:
        TypeError, ValueError: arguments that do not go together.
    """
    reduction = _reduction(size_average, reduce, reduction)
    fallback = lambda: F.mse_loss(input, target, reduction=reduction, weight=weight)
    return _loss("mse_loss", "mse", fallback, input, target, weight, None, reduction)


@_ops["l1_loss"].torch_first(F.l1_loss, BELOW["l1_loss"] // 2)
def l1_loss(input, target, size_average=None, reduce=None, reduction="mean", weight=None):
    """Absolute difference, as torch.nn.functional.l1_loss. Arguments, result and errors: as for mse_loss."""
    reduction = _reduction(size_average, reduce, reduction)
    fallback = lambda: F.l1_loss(input, target, reduction=reduction, weight=weight)
    return _loss("l1_loss", "smooth_l1", fallback, input, target, weight, None, reduction)


@_ops["smooth_l1_loss"].torch_first(F.smooth_l1_loss, BELOW["smooth_l1_loss"] // 2)
def smooth_l1_loss(input, target, size_average=None, reduce=None, reduction="mean", beta=1.0):
    """Squared difference over 2 beta where below beta, else the absolute one less beta / 2; beta 0 is l1_loss.

    As torch.nn.functional.smooth_l1_loss. Other arguments, result and errors: as for mse_loss.
    """
    reduction = _reduction(size_average, reduce, reduction)
    _check_number("beta", beta, 0, strictly=False)
    fallback = lambda: F.smooth_l1_loss(input, target, reduction=reduction, beta=beta)
    return _loss("smooth_l1_loss", "smooth_l1", fallback, input, target, None, None, reduction, beta)


@_ops["huber_loss"].torch_first(F.huber_loss, BELOW["huber_loss"] // 2)
def huber_loss(input, target, reduction="mean", delta=1.0, weight=None):
    """delta times smooth_l1_loss with beta = delta, which is more than 0. As torch.nn.functional.huber_loss.

    Other arguments, result and errors: as for mse_loss; but the mean of weighted losses divides by the elements.
    """
    reduction = _reduction(None, None, reduction)
    _check_number("delta", delta, 0, strictly=True)
    fallback = lambda: F.huber_loss(input, target, reduction=reduction, delta=delta, weight=weight)
    return _loss("huber_loss", "huber", fallback, input, target, weight, None, reduction, delta)


@_ops["binary_cross_entropy_with_logits"].torch_first(
    F.binary_cross_entropy_with_logits, BELOW["binary_cross_entropy_with_logits"] // 2
)
def binary_cross_entropy_with_logits(
    input, target, weight=None, size_average=None, reduce=None, reduction="mean", pos_weight=None
):
    """Binary cross entropy of logits, as torch.nn.functional.binary_cross_entropy_with_logits.

    Args:
        input: logits of any shape.
        target: probabilities of the same shape.
        weight, pos_weight: factors of the loss and of its positive part, or None; they broadcast to input.
        size_average, reduce, reduction: as for mse_loss.

    Returns:
        a scalar, or with "none" a loss per element in the layout of input.

    Raises:
        TypeError, ValueError: arguments that do not go together.
    """
    reduction = _reduction(size_average, reduce, reduction)
    fallback = lambda: F.binary_cross_entropy_with_logits(
        input, target, weight, pos_weight=pos_weight, reduction=reduction
    )
    return _loss("binary_cross_entropy_with_logits", "bce", fallback, input, target, weight, pos_weight, reduction)
