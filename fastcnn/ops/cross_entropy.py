"""Cross entropy: loss = -sum over classes of q * log_softmax(x), x [C], [N, C] or [N, C, ...].

The target is a class index per row (q one-hot) or a distribution over the classes; class weights, label smoothing, an
index to ignore. "mean" divides by the weights of the targets that count (class indices) or by the rows (distributions).
Saved for backward: x, target, weight, and per row logsumexp(x) and the sum of q: no tensor of the size of x is added.
Backward computes from x again, two reads and a write of its size in all: a gradient written in forward and scaled in
backward would be two of each. Torch counterpart: torch.nn.functional.cross_entropy. Source of label smoothing:
Szegedy et al. 2015 (Inception v3).

A target that is no class raises on CPU. A GPU could only report it by stopping for it: there the row's loss
and gradient are NaN, and Triton's debug mode (TRITON_DEBUG=1) stops the kernel with an assertion.
"""

import math
import struct

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn import _reduction as _Reduction

from fastcnn.backends import Op, current_backend
from fastcnn.ops import common

BELOW = 2**20  # logits from which the CPU kernels are faster, twice as many for smoothed targets and probabilities
TILE = 2048  # logits per program at a time, half as many in fp64: more would spill registers
FINALIZE_BLOCK = 1024
REDUCTIONS = ("none", "mean", "sum")


def cross_entropy_reference(x, target, weight, reduction, ignore_index, label_smoothing, dtype):
    """Cross entropy in plain PyTorch, computed and returned in `dtype`."""
    weight = None if weight is None else weight.to(dtype)
    return F.cross_entropy(
        x.to(dtype), target, weight, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing
    )


def _why_not(backend, x, target, weight, label_smoothing, dtype):
    if x.dtype not in common.FLOATS:
        return f"cross_entropy has kernels for floating-point tensors and got {x.dtype}"
    if dtype == torch.float64 and x.dtype != torch.float64:
        return f"cross_entropy has no kernel that computes in float64 from an input in {x.dtype}"
    if target.requires_grad:
        return "cross_entropy has no kernel for the gradient of the target"
    if weight is not None and weight.requires_grad:
        return "cross_entropy has no kernel for the gradient of the weight"
    if _classes(x) == 0:
        return "cross_entropy has kernels for one class or more"
    if backend == "cpu":
        if x.dtype not in (torch.float32, torch.float64):
            return f"the CPU kernel of cross_entropy takes float32 and float64 and got {x.dtype}"
        if dtype != x.dtype or (target.is_floating_point() and target.dtype != dtype):
            return f"the CPU kernel of cross_entropy computes in the dtype of its input and got {x.dtype} and {dtype}"
        if weight is not None and weight.dtype != dtype:
            return f"the CPU kernel of cross_entropy takes weights in {dtype} and got {weight.dtype}"
        if current_backend() == "auto":
            return _why_pytorch_is_faster(x, 2 * BELOW if target.is_floating_point() or label_smoothing > 0 else BELOW)
    return None


def _why_pytorch_is_faster(x, below):
    if not (x.requires_grad and torch.is_grad_enabled()):
        return "PyTorch is faster on CPU without a backward pass"
    if x.numel() < below:
        return f"PyTorch is faster on CPU below {below:,} logits"
    if _classes_adjoin(x) and _classes(x) < 256:
        return "PyTorch is faster on CPU where fewer than 256 classes lie side by side in memory"
    return None


def _classes_adjoin(x):
    return x.dim() < 3 or math.prod(x.shape[2:]) == 1 or _memory_format(x) != torch.contiguous_format


def _memory_format(x):
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def _launch_plan(x, memory_format):
    """Rows, and what both passes are launched with: where row (n, s) of class c lies, and the tile."""
    N, C = x.shape[:2] if x.dim() > 1 else (1, x.shape[0])
    inner = math.prod(x.shape[2:])
    if memory_format == torch.contiguous_format and inner > 1:
        strides = (C * inner, 1, inner)
        block_c = min(_power_of_two(C), 32)
    else:
        strides = (C * inner, C, 1)
        block_c = min(_power_of_two(C), 1024)
    tile = TILE // 2 if x.dtype == torch.float64 else TILE
    # a row of 1000 classes begins at every multiple of 8, of which Triton, which asks for 16, would know nothing
    vec = math.gcd(C, 8) if strides[2] == 1 else 1
    how = dict(INT64=common.exceeds_int32(x), VEC=vec, BLOCK_R=tile // block_c, BLOCK_C=block_c)
    return N * inner, (C // vec, inner, strides[0] // vec, strides[1] // vec, strides[2]), how


def _classes(x):
    return x.shape[min(1, x.dim() - 1)]


def _cdiv(a, b):
    return -(-a // b)


def _power_of_two(n):
    return 1 << (n - 1).bit_length()


def _two_floats(value):
    # a float argument reaches a kernel in fp32; fp64 kernels add what rounding took
    (high,) = struct.unpack("f", struct.pack("f", value))
    return high, value - high


class TargetError(IndexError, ValueError):
    """A target that is no class: the IndexError that torch raises, and the ValueError of any bad argument of ours."""


def _check_classes(target, classes, ignore_index):
    """Raise TargetError for the first target that is no class. For CPU tensors: a GPU's answer takes a wait."""
    target = target.long()  # as uint8, ignore_index would wrap around
    bad = (target < 0) | (target >= classes)
    bad &= target != ignore_index
    if bad.any():
        value = int(target[bad].flatten()[0])
        raise TargetError(f"target must be in [0, {classes}) or ignore_index ({ignore_index}), got {value}")


def cross_entropy_forward(x, target, weight, reduction, ignore_index, label_smoothing, dtype, backend):
    """(loss, logsumexp per row in two parts [2, rows], sum of q per row, what the mean divides by)."""
    if backend == "cpu":
        return _forward_cpu(x, target, weight, reduction, ignore_index, label_smoothing)
    loss, lse, mass, total = _allocate_forward(x, target, reduction, dtype)
    memory_format = _memory_format(x)
    x = x.contiguous(memory_format=memory_format)
    rows, where, how = _launch_plan(x, memory_format)
    soft = target.is_floating_point()
    if soft:
        target = target.contiguous(memory_format=memory_format)
    else:
        target = target.contiguous()
        if target.device.type == "cpu":
            _check_classes(target, _classes(x), ignore_index)
    if rows == 0:
        return loss.fill_(math.nan if reduction == "mean" else 0.0), lse, mass, total.zero_()
    from fastcnn.kernels.triton import cross_entropy as kernels
    from fastcnn.kernels.triton.loss_reduction import loss_finalize_kernel

    programs = _cdiv(rows, how["BLOCK_R"])
    step, out, divisor = reduction, loss, total
    if reduction != "none" and programs > 1:
        partial = torch.empty((programs, 2), dtype=lse.dtype, device=x.device)
        step, out, divisor = "partial", partial, partial.view(-1)[1:]
    with common.device_guard(x):
        kernels.cross_entropy_forward_kernel[(programs,)](
            x, target, None if weight is None else weight.contiguous(), out, divisor, lse, mass,
            rows, *where, ignore_index, *_two_floats(label_smoothing),
            REDUCTION=step, SOFT=soft, SMOOTH=label_smoothing > 0, **how,
        )  # fmt: skip
        if step == "partial":
            loss_finalize_kernel[(1,)](partial, loss, total, programs, REDUCTION=reduction, BLOCK=FINALIZE_BLOCK)
    return loss, lse, mass, total


def cross_entropy_backward(
    grad_output, x, target, weight, lse, mass, total, reduction, ignore_index, label_smoothing, backend
):
    """grad_input in the dtype and layout of x."""
    if backend == "cpu":
        return _backward_cpu(grad_output, x, target, weight, lse, mass, total, reduction, ignore_index, label_smoothing)
    memory_format = _memory_format(x)
    x = x.contiguous(memory_format=memory_format)
    grad_input = torch.empty_like(x)
    rows, where, how = _launch_plan(x, memory_format)
    if rows == 0:
        return grad_input
    soft = target.is_floating_point()
    from fastcnn.kernels.triton import cross_entropy as kernels

    with common.device_guard(x):
        kernels.cross_entropy_backward_kernel[(_cdiv(rows, how["BLOCK_R"]), _cdiv(_classes(x), how["BLOCK_C"]))](
            grad_output.contiguous(),
            x, target.contiguous(memory_format=memory_format) if soft else target.contiguous(),
            None if weight is None else weight.contiguous(), lse, mass, total, grad_input,
            rows, *where, ignore_index, *_two_floats(label_smoothing),
            REDUCTION=reduction, SOFT=soft, SMOOTH=label_smoothing > 0, **how,
        )  # fmt: skip
    return grad_input


def _cpu_views(x, target, weight, tensors, ignore_index, label_smoothing):
    """What the CPU kernels of a layout take: (is it planes, x in it, targets, scalars, numpy views of the tensors)."""
    memory_format = _memory_format(x)
    x = x.contiguous(memory_format=memory_format)
    C, inner = _classes(x), math.prod(x.shape[2:])
    planes = not _classes_adjoin(x)
    shape = (-1, C, inner) if planes else (-1, C)
    per_row = (-1, inner) if planes else (-1,)

    def flat(tensor):
        # the classes of channels_last memory lie side by side
        if memory_format != torch.contiguous_format:
            tensor = tensor.movedim(1, -1)
        return tensor.detach().numpy().reshape(shape)

    like = x.detach().numpy().dtype.type
    if target.is_floating_point():
        target, p = np.empty((0,) * len(per_row), np.int64), flat(target.contiguous(memory_format=memory_format))
    else:
        target, p = target.long().contiguous().numpy().reshape(per_row), np.empty((1,) * len(per_row) + (0,), like)
    weight = np.ones(C, like) if weight is None else weight.detach().contiguous().numpy()
    smoothing = like(1 - label_smoothing), like(label_smoothing / C)
    common.cpu_threads(x.numel())
    return (
        planes,
        flat(x),
        (target, p, weight),
        (ignore_index, *smoothing),
        [t.detach().numpy().reshape(per_row) for t in tensors],
    )


def _forward_cpu(x, target, weight, reduction, ignore_index, label_smoothing):
    from fastcnn.kernels.cpu import cross_entropy as kernels

    loss, lse, mass, total = _allocate_forward(x, target, reduction, x.dtype)
    if mass.numel() == 0:
        return loss.fill_(math.nan if reduction == "mean" else 0.0), lse, mass, total.zero_()
    losses = loss if reduction == "none" else torch.empty_like(mass)
    planes, data, targets, how, rows = _cpu_views(
        x, target, weight, (*lse, mass, losses), ignore_index, label_smoothing
    )
    kernel = kernels.planes_forward if planes else kernels.rows_forward
    loss_sum, divisor, no_class = kernel(data, *targets, *rows, *how)
    if no_class >= 0:
        _check_classes(target, data.shape[1], ignore_index)
    if reduction == "mean":
        loss_sum = loss_sum / divisor if divisor else loss_sum * math.inf
    if reduction != "none":
        loss.fill_(loss_sum)
        total.fill_(divisor)
    return loss, lse, mass, total


def _backward_cpu(grad_output, x, target, weight, lse, mass, total, reduction, ignore_index, label_smoothing):
    from fastcnn.kernels.cpu import cross_entropy as kernels

    grad_input = torch.empty_like(x.contiguous(memory_format=_memory_format(x)))
    if mass.numel() == 0:
        return grad_input
    grad = grad_output / total if reduction == "mean" else grad_output
    grad = grad.expand(mass.shape).contiguous()
    planes, data, targets, how, rows = _cpu_views(x, target, weight, (*lse, mass, grad), ignore_index, label_smoothing)
    out = grad_input if grad_input.is_contiguous() else grad_input.movedim(1, -1)
    kernel = kernels.planes_backward if planes else kernels.rows_backward
    kernel(out.numpy().reshape(data.shape), data, *targets, *rows, *how)
    return grad_input


def _allocate_forward(x, target, reduction, dtype):
    row_shape = (x.shape[0], *x.shape[2:]) if x.dim() > 1 else ()
    inside = torch.float64 if x.dtype == torch.float64 else torch.float32
    loss = x.new_empty(row_shape if reduction == "none" else (), dtype=dtype)
    total = x.new_empty((0,) if reduction == "none" else (), dtype=inside)
    return loss, x.new_empty((2, *row_shape), dtype=inside), x.new_empty(row_shape, dtype=inside), total


_forward = common.register(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight, str reduction, int ignore_index, "
    "float label_smoothing, ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    cross_entropy_forward,
    lambda x, target, weight, reduction, ignore_index, label_smoothing, dtype, backend: _allocate_forward(
        x, target, reduction, dtype
    ),
)
_backward = common.register(
    "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor lse, Tensor mass, "
    "Tensor total, str reduction, int ignore_index, float label_smoothing, str backend) -> Tensor",
    cross_entropy_backward,
    lambda grad_output, x, *_: torch.empty_like(x.contiguous(memory_format=_memory_format(x))),
)


class CrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, weight, reduction, ignore_index, label_smoothing, dtype, backend):
        loss, lse, mass, total = _forward(x, target, weight, reduction, ignore_index, label_smoothing, dtype, backend)
        ctx.save_for_backward(x, target, weight, lse, mass, total)
        ctx.arguments = (reduction, ignore_index, label_smoothing, dtype, backend)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        x, target, weight, lse, mass, total = ctx.saved_tensors
        reduction, ignore_index, label_smoothing, dtype, backend = ctx.arguments
        if torch.is_grad_enabled():
            (grad,) = common.differentiable_grads(
                lambda x: cross_entropy_reference(x, target, weight, reduction, ignore_index, label_smoothing, dtype),
                (x,), grad_output, (True,),
            )  # fmt: skip
        else:
            grad = _backward(
                grad_output, x, target, weight, lse, mass, total, reduction, ignore_index, label_smoothing, backend
            )
        return grad, *[None] * 7


_op = Op(
    "cross_entropy",
    cpu_kernel=True,
    cpu_auto=True,
    why=f"forward and backward at 1.3 to 2.2x PyTorch's speed from {BELOW:,} logits; PyTorch below",
)


def _pytorchs(input, target, weight=None, *deprecated, label_smoothing=0.0, **others):
    # PyTorch takes NaN for no smoothing
    if label_smoothing != label_smoothing:
        raise ValueError
    return F.cross_entropy(input, target, weight, *deprecated, label_smoothing=label_smoothing, **others)


@_op.torch_first(_pytorchs, BELOW)
def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    """Cross entropy between logits and a target. As torch.nn.functional.cross_entropy.

    Args:
        input: floating-point logits [C], [N, C] or [N, C, d1, ...].
        target: class indices (int64 or uint8) of shape [], [N] or [N, d1, ...], or probabilities of the shape of input.
        weight: [C] or None, a factor per class.
        size_average, reduce: deprecated in torch; override reduction.
        ignore_index: class index that adds nothing to loss, gradient and mean.
        reduction: "none", "mean" or "sum".
        label_smoothing: in [0, 1], the share of a uniform distribution in the target.

    Returns:
        loss in the dtype of input (float32 under autocast): a scalar, or with "none" one value per row.

    Raises:
        TypeError, ValueError: arguments that do not go together.
        TargetError: an IndexError and ValueError: a target that is no class, for CPU tensors. On a GPU the loss of such
            a row is NaN.
    """
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    reduction = REDUCTIONS[_Reduction.get_enum(reduction)]
    dtype = _check(input, target, weight, ignore_index, label_smoothing)
    backend = _op.route(input, lambda backend: _why_not(backend, input, target, weight, label_smoothing, dtype))
    if backend == "torch":
        try:
            return F.cross_entropy(
                input, target, weight, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing
            )
        except IndexError:
            # torch has looked at every target already: only its sentence is poor
            _check_classes(target, _classes(input), ignore_index)
            raise
    return CrossEntropyFunction.apply(
        input, target, weight, reduction, ignore_index, float(label_smoothing), dtype, backend
    )


def _check(input, target, weight, ignore_index, label_smoothing):
    """Raise unless the arguments go together; the dtype of the loss."""
    common.check_tensor("input", input)
    common.check_tensor("target", target)
    common.check_float("input", input)
    common.check_alike("target", target, "input", input, dtype=False)
    if input.dim() == 0:
        raise ValueError("input must have at least 1 dimension, [C], [N, C] or [N, C, ...], got a scalar")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing must be a number, got {label_smoothing!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")
    C = _classes(input)
    # as torch: a target of the shape of input holds probabilities, any other class indices
    soft = target.shape == input.shape
    if soft:
        if not target.is_floating_point():
            raise TypeError(
                f"target has the shape of input, so it must hold floating-point probabilities, got {target.dtype}"
            )
        if ignore_index >= 0:
            raise ValueError(f"ignore_index is for class indices and target holds probabilities, got {ignore_index}")
    else:
        wanted = (input.shape[0], *input.shape[2:]) if input.dim() > 1 else ()
        if target.shape != wanted and not (input.dim() == 1 and target.shape == (1,)):
            raise ValueError(
                f"target must have shape {tuple(wanted)} (class indices) or {tuple(input.shape)} (probabilities) "
                f"for input of shape {tuple(input.shape)}, got {tuple(target.shape)}"
            )
        if target.dtype not in (torch.int64, torch.uint8):
            raise TypeError(f"target must hold class indices in torch.int64 or torch.uint8, got {target.dtype}")
    # autocast computes losses in float32
    autocast = common.autocast_enabled(input)

    def computed(dtype):
        return torch.float32 if autocast and dtype in (torch.float16, torch.bfloat16) else dtype

    dtype = computed(input.dtype)
    if soft:
        dtype = torch.promote_types(dtype, computed(target.dtype))
    if weight is not None:
        common.check_tensor("weight", weight)
        common.check_alike("weight", weight, "input", input, dtype=False)
        if weight.shape != (C,):
            raise ValueError(f"weight must have one value for each of {C} classes, got shape {tuple(weight.shape)}")
        if soft:
            dtype = torch.promote_types(dtype, computed(weight.dtype))
        elif computed(weight.dtype) != dtype:
            raise TypeError(f"weight must have the dtype of input ({input.dtype}), got {weight.dtype}")
    return dtype
