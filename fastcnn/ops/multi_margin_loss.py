"""Multi-class hinge (SVM) loss of a row: w[t] / C * sum over c != t of max(0, margin - x[t] + x[c]) ** p.

x [N, C], [C], or [] for one class. "mean" divides by the rows; of no rows it is NaN, where PyTorch's is not set. Saved
for backward: x, target, weight. Torch counterpart:
torch.nn.functional.multi_margin_loss. Source: Weston and Watkins 1999.

A target that is no class raises on CPU. A GPU could only report it by stopping for it: there the row's loss and
gradient are NaN, and Triton's debug mode (TRITON_DEBUG=1) stops the kernel with an assertion.
"""

import math
import numbers

import torch
import torch.nn.functional as F
from torch.nn import _reduction as _Reduction

from fastcnn.backends import Op, current_backend
from fastcnn.ops import common
from fastcnn.ops.cross_entropy import FINALIZE_BLOCK, REDUCTIONS, TargetError

TILE = 2048  # elements per program at a time, a quarter in fp64: half would spill registers in Triton 3.6
BELOW = 2**16  # elements from which the CPU kernel is faster


def multi_margin_loss_reference(x, target, weight, p, margin, reduction, dtype):
    """The loss in plain PyTorch, computed and returned in `dtype`."""
    weight = None if weight is None else weight.to(dtype)
    return F.multi_margin_loss(x.to(dtype), target, p, margin, weight, reduction=reduction)


def _why_not(backend, x, target, weight, dtype):
    if x.dtype not in common.FLOATS:
        return f"multi_margin_loss has kernels for floating-point tensors and got {x.dtype}"
    if weight is not None and weight.requires_grad:
        return "multi_margin_loss has no kernel for the gradient of the weight"
    if backend == "cpu":
        if x.dtype not in (torch.float32, torch.float64) or dtype != x.dtype:
            return f"the CPU kernel of multi_margin_loss takes float32 and float64 and got {x.dtype}"
        if current_backend() == "auto" and x.numel() < BELOW:
            return f"PyTorch is faster on CPU below {BELOW:,} elements"
    return None


def _launch_plan(x):
    rows, C = x.shape
    block_c = min(1 << (C - 1).bit_length(), 1024)
    tile = TILE // 4 if x.dtype == torch.float64 else TILE
    # a row of 1000 classes begins at every multiple of 8, of which Triton, which asks for 16, would know nothing
    vec = math.gcd(C, 8)
    how = dict(INT64=common.exceeds_int32(x), VEC=vec, BLOCK_R=tile // block_c, BLOCK_C=block_c)
    return rows, -(-rows // how["BLOCK_R"]), C // vec, how


def _classes(x):
    return x.shape[-1] if x.dim() else 1


def _check_classes(target, row, classes):
    raise TargetError(f"target must be in [0, {classes}), got {int(target.reshape(-1)[row])}")


def multi_margin_loss_forward(x, target, weight, p, margin, reduction, dtype, backend):
    """The loss of x [N, C]."""
    loss = _allocate_forward(x, target, weight, p, margin, reduction, dtype)
    if len(x) == 0:
        return loss.fill_(math.nan if reduction == "mean" else 0.0)
    x, target = x.contiguous(), target.contiguous()
    weight = None if weight is None else weight.contiguous()
    if backend == "cpu":
        return _forward_cpu(x, target, weight, p, margin, reduction, loss)
    if target.device.type == "cpu":
        bad = ((target < 0) | (target >= x.shape[1])).nonzero()
        if len(bad):
            _check_classes(target, int(bad[0]), x.shape[1])
    from fastcnn.kernels.triton.loss_reduction import loss_finalize_kernel
    from fastcnn.kernels.triton.multi_margin_loss import multi_margin_loss_forward_kernel

    rows, programs, classes, how = _launch_plan(x)
    inside = torch.float64 if x.dtype == torch.float64 else torch.float32
    many = reduction != "none" and programs > 1
    partial = torch.empty((programs if many else 1, 2), dtype=inside, device=x.device)
    with common.device_guard(x):
        multi_margin_loss_forward_kernel[(programs,)](
            x, target, weight, partial if many else loss, partial.view(-1)[1:], rows, classes,
            P=p, MARGIN=margin, REDUCTION="partial" if many else reduction, **how,
        )  # fmt: skip
        if many:
            total = torch.empty((), dtype=inside, device=x.device)
            loss_finalize_kernel[(1,)](partial, loss, total, programs, REDUCTION=reduction, BLOCK=FINALIZE_BLOCK)
    return loss


def multi_margin_loss_backward(grad_output, x, target, weight, p, margin, reduction, backend):
    """The gradient of x [N, C], contiguous."""
    grad_input = torch.empty_like(x, memory_format=torch.contiguous_format)
    if len(x) == 0:
        return grad_input
    x, target, grad_output = x.contiguous(), target.contiguous(), grad_output.contiguous()
    weight = None if weight is None else weight.contiguous()
    if backend == "cpu":
        _backward_cpu(grad_output, x, target, weight, p, margin, reduction, grad_input)
        return grad_input
    from fastcnn.kernels.triton.multi_margin_loss import multi_margin_loss_backward_kernel

    rows, programs, classes, how = _launch_plan(x)
    with common.device_guard(x):
        multi_margin_loss_backward_kernel[(programs,)](
            grad_output, x, target, weight, grad_input, rows, classes,
            P=p, MARGIN=margin, REDUCTION=reduction, **how,
        )  # fmt: skip
    return grad_input


def _numpy(tensors, x):
    # no weights: ones
    return [(x.new_ones(x.shape[1]) if t is None else t.detach()).numpy() for t in tensors]


def _forward_cpu(x, target, weight, p, margin, reduction, loss):
    from fastcnn.kernels.cpu.multi_margin_loss import forward

    common.cpu_threads(x.numel())
    losses = loss if reduction == "none" else x.new_empty(len(x))
    arrays = _numpy((x, target, weight, losses), x)
    value, bad = forward(*arrays, p, arrays[0].dtype.type(margin))
    if bad >= 0:
        _check_classes(target, bad, x.shape[1])
    if reduction != "none":
        loss.fill_(value / len(x) if reduction == "mean" else value)
    return loss


def _backward_cpu(grad_output, x, target, weight, p, margin, reduction, grad_input):
    from fastcnn.kernels.cpu.multi_margin_loss import backward

    common.cpu_threads(x.numel())
    grad = grad_output / len(x) if reduction == "mean" else grad_output
    grad = grad.expand(len(x)).contiguous()
    arrays = _numpy((grad_input, x, target, weight, grad), x)
    backward(*arrays, p, arrays[0].dtype.type(margin))


def _allocate_forward(x, target, weight, p, margin, reduction, dtype, backend=None):
    return x.new_empty((len(x),) if reduction == "none" else (), dtype=dtype)


_forward = common.register(
    "multi_margin_loss(Tensor input, Tensor target, Tensor? weight, int p, float margin, str reduction, "
    "ScalarType dtype, str backend) -> Tensor",
    multi_margin_loss_forward,
    _allocate_forward,
)
_backward = common.register(
    "multi_margin_loss_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, int p, float margin, "
    "str reduction, str backend) -> Tensor",
    multi_margin_loss_backward,
    lambda grad_output, x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
)


class MultiMarginLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, weight, p, margin, reduction, dtype, backend):
        ctx.save_for_backward(x, target, weight)
        ctx.arguments = (p, margin, reduction, dtype, backend)
        return _forward(x, target, weight, p, margin, reduction, dtype, backend)

    @staticmethod
    def backward(ctx, grad_output):
        x, target, weight = ctx.saved_tensors
        p, margin, reduction, dtype, backend = ctx.arguments
        if torch.is_grad_enabled():
            (grad,) = common.differentiable_grads(
                lambda x: _differentiable(x, target, weight, p, margin, reduction, dtype), (x,), grad_output, (True,)
            )
        else:
            grad = _backward(grad_output, x, target, weight, p, margin, reduction, backend)
        return grad, *[None] * 7


def _differentiable(x, target, weight, p, margin, reduction, dtype):
    # PyTorch's own has neither second derivatives nor forward mode, and no backward for the meta device
    x = x.to(dtype)
    gap = (margin - x.gather(1, target[:, None]) + x).clamp(min=0) ** p
    gap = gap.masked_fill(torch.arange(x.shape[1], device=x.device) == target[:, None], 0)
    loss = gap.sum(1) / x.shape[1]
    if weight is not None:
        loss = loss * weight.to(dtype)[target]
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


_op = Op(
    "multi_margin_loss",
    cpu_kernel=True,
    cpu_auto=True,
    why=f"PyTorch's loops are not vectorised; below {BELOW:,} elements it is faster all the same",
)


def _pytorchs(input, *arguments, **named):
    # of no rows PyTorch returns memory that it did not set
    if input.numel() == 0:
        raise ValueError
    return F.multi_margin_loss(input, *arguments, **named)


@_op.torch_first(_pytorchs, BELOW)
def multi_margin_loss(input, target, p=1, margin=1.0, weight=None, size_average=None, reduce=None, reduction="mean"):
    """Multi-class hinge loss between scores and class indices. As torch.nn.functional.multi_margin_loss.

    Args:
        input: floating-point scores [N, C] or [C].
        target: int64 class indices [N], or one of them for [C].
        p: 1, or 2 for the squared hinge.
        margin: by how much the target's score must exceed every other's.
        weight: [C] or None, a factor per class of the target.
        size_average, reduce: deprecated in torch; override reduction.
        reduction: "none", "mean" or "sum".

    Returns:
        a scalar, or with "none" [N], in the dtype of input (float32 under autocast).

    Raises:
        TypeError, ValueError: arguments that do not go together.
        TargetError: an IndexError and ValueError: a target that is no class, for CPU tensors. On a GPU the loss is NaN.
    """
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    reduction = REDUCTIONS[_Reduction.get_enum(reduction)]
    dtype = _check(input, target, p, margin, weight)
    backend = _op.route(input, lambda backend: _why_not(backend, input, target, weight, dtype))
    if backend == "torch":
        if input.numel() == 0 and reduction != "none":
            return input.sum() * math.nan if reduction == "mean" else input.sum()
        try:
            if input.is_meta:
                raise NotImplementedError
            return F.multi_margin_loss(input, target, p, margin, weight, reduction=reduction)
        except NotImplementedError:  # forward-mode gradients, gradients of tensors without data
            batch = input if input.dim() == 2 else input.reshape(1, -1)
            loss = _differentiable(batch, target.reshape(-1), weight, p, margin, reduction, dtype)
            return loss.reshape(target.shape) if reduction == "none" else loss
        except RuntimeError:
            # torch has looked at every target already: only its sentence is poor
            bad = ((target < 0) | (target >= _classes(input))).reshape(-1).nonzero()
            if input.is_cpu and len(bad):
                _check_classes(target, int(bad[0]), _classes(input))
            raise
    batch = input if input.dim() == 2 else input.reshape(1, -1)
    loss = MultiMarginLossFunction.apply(
        batch, target.reshape(-1), weight, int(p), float(margin), reduction, dtype, backend
    )
    # of scores [C] torch returns a scalar for a target [], else [1]
    return loss.reshape(target.shape) if reduction == "none" else loss


def _check(input, target, p, margin, weight):
    """Raise unless the arguments go together; the dtype of the loss."""
    common.check_tensor("input", input, (0, 1, 2))
    common.check_float("input", input)
    common.check_tensor("target", target)
    common.check_alike("target", target, "input", input, dtype=False)
    classes = _classes(input)
    if classes == 0:
        raise ValueError(f"input must have one class or more, got shape {tuple(input.shape)}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must hold class indices in torch.int64, got {target.dtype}")
    if input.dim() == 2 and target.shape != input.shape[:1] or input.dim() < 2 and target.shape not in ((), (1,)):
        wanted = tuple(input.shape[:-1])
        raise ValueError(
            f"target must have shape {wanted} for input of shape {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    if isinstance(p, bool) or not isinstance(p, numbers.Real):
        raise TypeError(f"p must be 1 or 2, got {p!r}")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")
    if isinstance(margin, bool) or not isinstance(margin, numbers.Real):
        raise TypeError(f"margin must be a number, got {margin!r}")
    # autocast computes losses in float32
    autocast = common.autocast_enabled(input) and input.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if autocast else input.dtype
    if weight is not None:
        common.check_tensor("weight", weight, (1,))
        common.check_alike("weight", weight, "input", input, dtype=False)
        if weight.shape != (classes,):
            raise ValueError(
                f"weight must have one value for each of {classes} classes, got shape {tuple(weight.shape)}"
            )
        if weight.dtype != dtype and not autocast:
            raise TypeError(f"weight must have the dtype of input ({input.dtype}), got {weight.dtype}")
    return dtype
