"""Batch norm: y = f(z), z = (x - mean) / sqrt(var + eps) * weight + bias + residual; x [N, C, ...], per channel c.

f is the identity or an activation, residual a tensor like x or absent. In training mean and var (biased) are those of
the batch, and the running statistics move towards them in place: running += momentum * (batch - running), with the
unbiased variance. In evaluation the running statistics are used.

Saved for backward: x, weight, bias, and mean and 1 / sqrt(var + eps) (training) or the running statistics (evaluation).
f needs z, which backward computes again from x. A residual is kept for that, unless f is relu, relu6 or leaky_relu:
then one bit per element says which of its two slopes f had.
Torch counterpart: torch.nn.functional.batch_norm. Source: Ioffe and Szegedy 2015; add and ReLU, He et al. 2015.
"""

import math

import torch
import torch.nn.functional as F

from fastcnn.backends import Op, current_backend
from fastcnn.ops import batch_norm_passes as passes
from fastcnn.ops import common
from fastcnn.ops.activation import activation_reference

ACTIVATIONS = ("gelu", "gelu_tanh", "hardswish", "leaky_relu", "relu", "relu6", "sigmoid", "silu", "tanh")
# where our CPU kernels win, in elements; measured with PyTorch's ops in between, whose threads leave the cores slowly
CPU_SMALLEST = 2**20
CPU_FEW_CHANNELS = 16  # channels_last of fewer channels than this, over which torch loops one by one,
CPU_SMALLEST_FEW = 2**17  # from here on


def batch_norm_reference(x, weight, bias, running_mean, running_var, training, eps, activation=None, residual=None):
    """Batch norm in plain PyTorch; leaves the running statistics alone."""
    if training:
        running_mean = running_var = None
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, 0.0, eps)
    return finished(z, activation, residual)


def finished(z, activation, residual):
    """f(z + residual)."""
    z = z if residual is None else z + residual
    return z if activation is None else activation_reference(z, activation)


def cannot(backend, x, parameters, activation):
    """None, or the sentence why our kernels cannot take these tensors."""
    if x.dtype not in common.FLOATS:
        return f"batch_norm has kernels for floating-point tensors and got {x.dtype}"
    if not all(t is None or t.is_contiguous() for t in parameters):
        return "batch_norm has kernels for contiguous weight, bias and running statistics"
    if backend == "cpu" and x.dtype not in (torch.float32, torch.float64):
        return f"batch_norm on CPU has kernels for float32 and float64 and got {x.dtype}"
    if backend == "cpu" and activation not in passes.BOUNDS:
        return f"batch_norm on CPU has kernels with relu, relu6 or no activation and got {activation}"
    return None


def _why_not(backend, x, parameters, training, activation, residual):
    reason = cannot(backend, x, parameters, activation)
    if reason is None and backend == "cpu" and current_backend() == "auto":
        if not training and residual is None:
            return "PyTorch's batch_norm is as fast on CPU in evaluation"
        small = x.dim() <= 2 or x.numel() < CPU_SMALLEST_FEW
        if not small and x.numel() < CPU_SMALLEST:
            rows = passes.view_of(x.shape, passes.memory_format(x)).stride_c == 1
            small = not (rows and training and x.shape[1] < CPU_FEW_CHANNELS)
        if small:
            return "PyTorch's batch_norm is as fast on CPU on tensors of this size"
    return reason


def batch_norm_forward(
    x, weight, bias, running_mean, running_var, residual, momentum, eps, activation, need_mask, backend
):  # fmt: skip
    """Training: (y, mean, invstd, mask), the mask empty unless needed. Updates the running statistics, if any."""
    y, mean, invstd, mask = allocate_forward(x, need_mask)
    if x.numel() == 0:
        return y, mean.zero_(), invstd.zero_(), mask
    x, residual, view, C = as_views(x, residual)
    into = mask if need_mask else None
    if backend == "cpu":
        passes.run_on_cpu(
            "forward", view, C, (x, residual), (y,), into, (weight, bias, mean, invstd, running_mean, running_var),
            passes.no_record(), True, momentum, eps, *passes.BOUNDS[activation],
        )  # fmt: skip
        return y, mean, invstd, mask
    with common.device_guard(x):
        records = passes.strip_records(x, view)
        passes.merge(records, mean, invstd, running_mean, running_var, momentum, eps)
        passes.apply(x, residual, y, into, view, passes.Affine(mean, invstd, weight, bias, True, eps), activation)
    return y, mean, invstd, mask


def batch_norm_forward_eval(
    x, weight, bias, running_mean, running_var, residual, eps, activation, need_mask, backend
):  # fmt: skip
    """Evaluation: (y, mask) from the running statistics."""
    y, mask = _allocate_output(x), _allocate_mask(x, need_mask)
    if x.numel() == 0:
        return y, mask
    x, residual, view, C = as_views(x, residual)
    into = mask if need_mask else None
    affine = passes.Affine(running_mean, running_var, weight, bias, False, eps)
    if backend == "cpu":
        passes.run_on_cpu(
            "forward", view, C, (x, residual), (y,), into, (*affine.on_cpu(), None, None),
            passes.no_record(), False, 0.0, eps, *passes.BOUNDS[activation],
        )  # fmt: skip
        return y, mask
    with common.device_guard(x):
        passes.apply(x, residual, y, into, view, affine, activation)
    return y, mask


def batch_norm_backward(
    grad_output, x, weight, bias, mean, spread, residual, mask, training, eps, activation,
    need_input, need_params, need_residual, backend,
):  # fmt: skip
    """Gradients of input, weight, bias and residual, the middle two in the dtype of weight; empty where not needed.

    mean and spread are what was saved: the batch's mean and invstd in training, else the running mean and variance.
    """
    grads = allocate_backward(x, weight, need_input, need_params, need_residual)
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    layout = passes.memory_format(x)
    x, residual, view, C = as_views(x, residual)
    grad_output = grad_output.contiguous(memory_format=layout)
    grad_input, grad_weight, grad_bias, grad_residual = (
        grad if need else None
        for grad, need in zip(grads, (need_input, need_params, need_params, need_residual), strict=True)
    )
    affine = passes.Affine(mean, spread, weight, bias, training, eps)
    reduce, rows = training or need_params, view.outer * view.inner
    if backend == "cpu":
        sums = torch.empty((2, C), dtype=torch.float64)
        passes.run_on_cpu(
            "backward", view, C, (grad_output, x), (grad_input, grad_residual), mask, affine.on_cpu(),
            sums.numpy(), reduce, training, rows, *passes.BOUNDS[activation],
        )  # fmt: skip
        if need_params:
            grad_bias.copy_(sums[0])
            grad_weight.copy_(sums[1])
        return grads
    sums = None
    with common.device_guard(x):
        if reduce:
            sums = passes.backward_sums(
                grad_output, x, residual, mask, view, affine, activation, grad_weight, grad_bias
            )  # fmt: skip
        if need_input or need_residual:
            passes.backward_apply(
                grad_output, x, residual, mask, grad_input, grad_residual, view, affine, activation, sums, rows
            )  # fmt: skip
    return grads


def as_views(x, residual):
    layout = passes.memory_format(x)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    return x.contiguous(memory_format=layout), residual, passes.view_of(x.shape, layout), passes.channels(x)


def _allocate_output(x):
    return torch.empty_like(x, memory_format=passes.memory_format(x))


def _allocate_mask(x, need_mask):
    return x.new_empty(passes.mask_shape(x) if need_mask else (0,), dtype=torch.uint8)


def allocate_forward(x, need_mask):
    mean = x.new_empty(passes.channels(x), dtype=passes.statistics_dtype(x))
    return _allocate_output(x), mean, torch.empty_like(mean), _allocate_mask(x, need_mask)


def allocate_backward(x, weight, need_input, need_params, need_residual):
    dense = x.contiguous(memory_format=passes.memory_format(x))
    like_x = lambda need: torch.empty_like(dense) if need else x.new_empty(0)
    like = x if weight is None else weight
    sizes = (passes.channels(x),) if need_params else (0,)
    return like_x(need_input), like.new_empty(sizes), like.new_empty(sizes), like_x(need_residual)


_forward = common.register(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor? residual, float momentum, float eps, str? activation, bool need_mask, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    batch_norm_forward,
    lambda x, weight, bias, running_mean, running_var, residual, momentum, eps, activation, need_mask, backend: (
        allocate_forward(x, need_mask)
    ),
)
_forward_eval = common.register(
    "batch_norm_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
    "Tensor? residual, float eps, str? activation, bool need_mask, str backend) -> (Tensor, Tensor)",
    batch_norm_forward_eval,
    lambda x, weight, bias, running_mean, running_var, residual, eps, activation, need_mask, backend: (
        _allocate_output(x), _allocate_mask(x, need_mask)
    ),
)  # fmt: skip
_backward = common.register(
    "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor spread, "
    "Tensor? residual, Tensor? mask, bool training, float eps, str? activation, bool need_input, bool need_params, "
    "bool need_residual, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    batch_norm_backward,
    lambda grad_output, x, weight, *arguments: allocate_backward(x, weight, *arguments[-4:-1]),
)


class BatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, residual, running_mean, running_var, training, momentum, eps, activation, graph, backend
    ):  # fmt: skip
        # graph: whether a backward may follow
        need_mask = graph and residual is not None and activation in passes.MASKED
        if training:
            y, mean, spread, mask = _forward(
                x, weight, bias, running_mean, running_var, residual, momentum, eps, activation, need_mask, backend
            )
        else:
            y, mask = _forward_eval(
                x, weight, bias, running_mean, running_var, residual, eps, activation, need_mask, backend
            )
            mean, spread = running_mean, running_var
        save(ctx, (x, weight, bias, mean, spread), residual, mask if need_mask else None, activation)
        ctx.arguments = (training, eps, activation, backend)
        return y

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, bias, mean, spread, residual, mask = ctx.saved_tensors
        training, eps, activation, backend = ctx.arguments
        need_input, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            grads = differentiable_backward(
                lambda x, weight, bias: batch_norm_reference(x, weight, bias, mean, spread, training, eps),
                grad_output, x, weight, bias, residual, mask, activation, ctx.needs_input_grad[:4],
            )  # fmt: skip
        else:
            # of a plain sum the gradient passes as it is
            passes_on = need_residual and activation is None
            grads = _backward(
                grad_output, x, weight, bias, mean, spread, residual, mask, training, eps, activation,
                need_input, need_weight or need_bias, need_residual and not passes_on, backend,
            )  # fmt: skip
            grads = (*grads[:3], grad_output if passes_on else grads[3])
        grads = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:4], strict=True))
        return *restrided(ctx, grads), *[None] * 8


def save(ctx, tensors, residual, mask, activation):
    """Keep the tensors, the mask, and the residual where backward computes z from it; and the residual's strides."""
    keep = activation is not None and mask is None
    ctx.save_for_backward(*tensors, residual if keep else None, mask)
    dense = residual is not None and common.is_dense(residual)
    ctx.residual_strides = residual.stride() if dense else None


def restrided(ctx, grads):
    """The gradients, that of the residual in the residual's strides if those are dense."""
    *others, grad = grads
    if grad is not None and ctx.residual_strides not in (None, grad.stride()):
        strided = torch.empty_strided(grad.shape, ctx.residual_strides, dtype=grad.dtype, device=grad.device)
        grad = strided.copy_(grad)
    return *others, grad


def differentiable_backward(plain, grad_output, x, weight, bias, residual, mask, activation, needs):
    """Gradients that autograd can differentiate again; plain(x, weight, bias) is batch norm in plain PyTorch."""
    if activation is None:  # the residual is not saved: its gradient is grad_output
        return *_grads_of(plain, (x, weight, bias), grad_output, needs[:3]), grad_output
    if mask is not None:
        grad = torch.where(passes.mask_values(mask, x), grad_output, grad_output * passes.slope(activation))
        return *_grads_of(plain, (x, weight, bias), grad, needs[:3]), grad
    function = lambda x, weight, bias, residual: finished(plain(x, weight, bias), activation, residual)
    return _grads_of(function, (x, weight, bias, residual), grad_output, needs)


def _grads_of(function, inputs, grad_output, needs):
    if not any(needs):
        return (None,) * len(inputs)
    return common.differentiable_grads(function, inputs, grad_output, needs)


_op = Op(
    "batch_norm",
    cpu_kernel=True,
    cpu_auto=True,
    why="numba trains from a million elements on at 1.0 to 1.7x PyTorch, with add and ReLU at 1.1 to 2x, channels_last "
    "of few channels at 2 to 13x",
)


def _on_torch(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, *,
    activation=None, residual=None,
):  # fmt: skip
    if activation is not None or residual is not None or type(training) is not bool:
        raise TypeError("left to the op below, which looks at every argument")
    for tensor in (running_mean, running_var, weight, bias):
        if tensor is not None and tensor.dim() != 1:
            raise ValueError("as above")
    if running_mean is not None and (running_mean.requires_grad or running_var.requires_grad):
        raise ValueError("as above")
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@_op.torch_first(_on_torch, below=CPU_SMALLEST_FEW)
def batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, *,
    activation=None, residual=None,
):  # fmt: skip
    """Batch norm of input [N, C, ...] over every dimension but the second. As torch.nn.functional.batch_norm.

    With activation and residual: activation(batch_norm(input) + residual) in the passes that batch norm takes alone.

    Args:
        input: floating-point tensor of two dimensions or more. The output has its dtype, and channels_last stays.
        running_mean, running_var: [C], both or neither; used in evaluation, updated in place in training.
        weight, bias: [C] or None. They and the running statistics share one dtype: that of input, or float32 for a
            float16 or bfloat16 input.
        training: normalise with the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance; positive in training.
        activation: None, "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "sigmoid", "tanh", "hardswish", "gelu" or
            "gelu_tanh".
        residual: tensor of the shape, dtype and device of input, in any layout, or None.

    Raises:
        TypeError: an argument is no tensor, number or bool as it should be, or the dtypes do not go together.
        ValueError: wrong sizes or devices, no running statistics in evaluation, one value per channel in training, eps,
            an unknown activation.
    """
    check(input, running_mean, running_var, weight, bias, training, momentum, eps)
    check_fused(input, activation, residual)
    parameters = (weight, bias, running_mean, running_var)
    backend = _op.route(input, lambda backend: _why_not(backend, input, parameters, training, activation, residual))
    if backend == "torch":
        z = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if activation == "relu":  # over what nobody else reads, as people write it
            return F.relu(z if residual is None else z + residual, inplace=True)
        return finished(z, activation, residual)
    tensors = (input, weight, bias, residual)
    graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return BatchNormFunction.apply(
        input, weight, bias, residual, running_mean, running_var, training, float(momentum), float(eps), activation,
        graph, backend,
    )  # fmt: skip


def check_fused(input, activation, residual):
    """Raise TypeError or ValueError unless activation and residual go with input."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if residual is not None:
        common.check_tensor("residual", residual)
        common.check_alike("residual", residual, "input", input)
        if residual.shape != input.shape:
            raise ValueError(f"residual must have the shape of input {tuple(input.shape)}, got {tuple(residual.shape)}")


def check(input, running_mean, running_var, weight, bias, training, momentum, eps, alone=True):
    """Raise TypeError or ValueError unless batch_norm takes this; alone: no other process adds to the batch."""
    common.check_tensor("input", input)
    if input.dim() < 2 and input.numel() > 0:
        raise ValueError(f"input must have at least 2 dimensions, [N, C, ...], got shape {tuple(input.shape)}")
    common.check_float("input", input)
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool, got {training!r}")
    for name, value in (("momentum", momentum), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if eps < 0 or (training and eps == 0):
        least = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm eps must be {least}, but got {eps}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be both tensors or both None")
    if not training and running_mean is None:
        raise ValueError("running_mean and running_var must be defined in evaluation mode, got None")
    C = passes.channels(input)
    parameters = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    parameters = {name: tensor for name, tensor in parameters.items() if tensor is not None}
    first = next(iter(parameters), None)
    for name, tensor in parameters.items():
        common.check_tensor(name, tensor)
        common.check_alike(name, tensor, "input", input, dtype=False)
        if tensor.shape != (C,):
            raise ValueError(f"{name} must have {C} elements, one per channel, got shape {tuple(tensor.shape)}")
        if tensor.dtype != input.dtype and not (
            tensor.dtype == torch.float32 and input.dtype in (torch.float16, torch.bfloat16)
        ):
            raise TypeError(f"{name} must have the dtype of input ({input.dtype}) or float32, got {tensor.dtype}")
        common.check_alike(name, tensor, first, parameters[first])
    for name in ("running_mean", "running_var"):
        if name in parameters and parameters[name].requires_grad:
            raise ValueError(f"{name} must not require a gradient")
    if training and alone and input.dim() > 1 and input.shape[0] * math.prod(input.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)}")
