"""Batch norm: y = (x - mean) / sqrt(var + eps) * weight + bias per channel, x [N, C, ...], the others [C].

In training mean and var (biased) are those of the batch, and the running statistics move towards them in place:
running += momentum * (batch - running), with the unbiased variance. In evaluation the running statistics are used.
Saved for backward: x, weight, and mean and 1 / sqrt(var + eps) (training) or the running statistics (evaluation).
Torch counterpart: torch.nn.functional.batch_norm. Source: Ioffe and Szegedy 2015.
"""

import math
import struct
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from fastcnn.backends import Op, current_backend
from fastcnn.ops import common

TILE = 2048  # elements of a tile: 16 per thread of 4 warps; twice as many spill where rows are short and ragged
PROGRAMS = 1024  # strips times channel blocks at most: eight programs per multiprocessor of an H100
FINALIZE = dict(BLOCK_S=64, BLOCK_C=16)
# where our CPU kernels win, measured with 70 microseconds of overhead per step
CPU_SMALLEST = 2**17  # elements, channels_last
CPU_CHANNELS = 16  # and fewer channels than this, over which torch loops one by one
CPU_SMALLEST_CONTIGUOUS = 2**20  # elements
CPU_PLANE = 1024  # and pixels at least: the sums of a plane cost a fixed time


def batch_norm_reference(x, weight, bias, running_mean, running_var, training, eps):
    """Batch norm in plain PyTorch; leaves the running statistics alone."""
    if training:
        running_mean = running_var = None
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, 0.0, eps)


class _View(NamedTuple):
    """A tensor as rows by channels: row (o, i) of channel c lies at o * stride_o + i * stride_i + c * stride_c."""

    outer: int
    inner: int
    stride_o: int
    stride_i: int
    stride_c: int


def _channels(x):
    # torch takes an empty 1-D tensor, too
    return x.shape[1] if x.dim() > 1 else 0


def _memory_format(x):
    """The layout of the output: channels_last if x is, else contiguous; as torch."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _view(shape, memory_format):
    N, C = shape[:2]
    pixels = math.prod(shape[2:])
    if memory_format != torch.contiguous_format or pixels == 1:
        return _View(1, N * pixels, 0, C, 1)
    if C == 1:
        return _View(1, N * pixels, 0, 1, 0)
    return _View(N, pixels, C * pixels, 1, pixels)


def _launch_plan(x, view, C):
    """Grid, positional and keyword arguments of a launch: tiles of whole memory rows, strips enough to fill a GPU."""
    if view.stride_c == 1:
        block_c = min(_power_of_two(C), 64)
        block_i = TILE // block_c
    else:
        block_i = min(_power_of_two(view.inner), 1024, TILE)
        block_c = min(_power_of_two(C), TILE // block_i)
    tiles = view.outer * _cdiv(view.inner, block_i)
    c_blocks = _cdiv(C, block_c)
    tiles_per_strip = _cdiv(tiles, max(1, PROGRAMS // c_blocks))
    grid = (_cdiv(tiles, tiles_per_strip), c_blocks)
    where = (view.inner, tiles, tiles_per_strip, view.stride_o, view.stride_i, view.stride_c)
    return grid, where, dict(INT64=common.exceeds_int32(x), BLOCK_I=block_i, BLOCK_C=block_c)


def _cdiv(a, b):
    return -(-a // b)


def _power_of_two(n):
    return 1 << (n - 1).bit_length()


def _statistics_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _why_not(backend, x, parameters, training):
    if x.dtype not in common.FLOATS:
        return f"batch_norm has kernels for floating-point tensors and got {x.dtype}"
    if not all(t is None or t.is_contiguous() for t in parameters):
        return "batch_norm has kernels for contiguous weight, bias and running statistics"
    if backend == "cpu" and x.dtype not in (torch.float32, torch.float64):
        return f"batch_norm on CPU has kernels for float32 and float64 and got {x.dtype}"
    if backend == "cpu" and current_backend() == "auto":
        if not training or x.numel() < CPU_SMALLEST:
            return "PyTorch's batch_norm is as fast on CPU in evaluation and on small tensors"
        rows = _view(x.shape, _memory_format(x)).stride_c == 1
        small = x.numel() < CPU_SMALLEST_CONTIGUOUS or x.numel() < CPU_PLANE * x.shape[0] * x.shape[1]
        if x.dim() == 2 or (x.shape[1] >= CPU_CHANNELS if rows else small):
            return "PyTorch's batch_norm is as fast on CPU on tensors of this shape"
    return None


def batch_norm_forward(x, weight, bias, running_mean, running_var, momentum, eps, backend):
    """Training: returns (y, mean, invstd) and updates the running statistics, if any."""
    y, mean, invstd = _allocate_forward(x)
    if x.numel() == 0:
        return y, mean.zero_(), invstd.zero_()
    x, view, C = _as_view(x)
    if backend == "cpu":
        from fastcnn.kernels.cpu import batch_norm as kernels

        kernel = kernels.rows_forward if view.stride_c == 1 else kernels.planes_forward
        _run_on_cpu(kernel, view, C, (x, y), (weight, bias, mean, invstd, running_mean, running_var), momentum, eps)
        return y, mean, invstd
    from fastcnn.kernels.triton import batch_norm as kernels

    grid, where, how = _launch_plan(x, view, C)
    partial = torch.empty((grid[0], 4, C), dtype=mean.dtype, device=x.device)
    with common.device_guard(x):
        kernels.batch_norm_statistics_kernel[grid](x, partial, C, *where, **how)
        kernels.batch_norm_finalize_kernel[_finalize_grid(C)](
            partial, mean, invstd, running_mean, running_var, C, grid[0], *_two_floats(momentum), EPS=eps, **FINALIZE
        )
        kernels.batch_norm_apply_kernel[grid](
            x, y, mean, invstd, weight, bias, C, *where, EPS=eps, TRAINING=True, **how
        )
    return y, mean, invstd


def batch_norm_forward_eval(x, weight, bias, running_mean, running_var, eps, backend):
    """Evaluation: y from the running statistics."""
    y = _allocate_output(x)
    if x.numel() == 0:
        return y
    x, view, C = _as_view(x)
    if backend == "cpu":
        from fastcnn.kernels.cpu import batch_norm as kernels

        kernel = kernels.rows_apply if view.stride_c == 1 else kernels.planes_apply
        _run_on_cpu(kernel, view, C, (x, y), (weight, bias, running_mean, torch.rsqrt(running_var + eps)))
        return y
    from fastcnn.kernels.triton import batch_norm as kernels

    grid, where, how = _launch_plan(x, view, C)
    with common.device_guard(x):
        kernels.batch_norm_apply_kernel[grid](
            x, y, running_mean, running_var, weight, bias, C, *where, EPS=eps, TRAINING=False, **how
        )
    return y


def batch_norm_backward(grad_output, x, weight, mean, spread, training, eps, need_input, need_params, backend):
    """(grad_input, grad_weight, grad_bias), the latter two in the dtype of weight; empty where not needed.

    mean and spread are what was saved: the batch's mean and invstd in training, else the running mean and variance.
    """
    grads = _allocate_backward(x, weight, need_input, need_params)
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    memory_format = _memory_format(x)
    x, view, C = _as_view(x)
    grad_output = grad_output.contiguous(memory_format=memory_format)
    grad_input, grad_weight, grad_bias = grads
    if backend == "cpu":
        from fastcnn.kernels.cpu import batch_norm as kernels

        kernel = kernels.rows_backward if view.stride_c == 1 else kernels.planes_backward
        invstd = spread if training else torch.rsqrt(spread + eps)
        _run_on_cpu(
            kernel, view, C, (grad_output, x, grad_input), (weight, mean, invstd, grad_weight, grad_bias), training
        )
        return grads
    from fastcnn.kernels.triton import batch_norm as kernels

    grid, where, how = _launch_plan(x, view, C)
    sums = None
    with common.device_guard(x):
        if training or need_params:
            dtype = _statistics_dtype(x)
            partial = torch.empty((grid[0], 2, C), dtype=dtype, device=x.device)
            sums = torch.empty((2, C), dtype=dtype, device=x.device)
            kernels.batch_norm_backward_reduce_kernel[grid](grad_output, x, mean, partial, C, *where, **how)
            kernels.batch_norm_backward_finalize_kernel[_finalize_grid(C)](
                partial, spread, sums, grad_weight if need_params else None, grad_bias if need_params else None,
                C, grid[0], EPS=eps, TRAINING=training, **FINALIZE,
            )  # fmt: skip
        if need_input:
            kernels.batch_norm_backward_apply_kernel[grid](
                grad_output, x, grad_input, mean, spread, weight, sums,
                view.outer * view.inner, C, *where, EPS=eps, TRAINING=training, **how,
            )  # fmt: skip
    return grads


def _as_view(x):
    memory_format = _memory_format(x)
    return x.contiguous(memory_format=memory_format), _view(x.shape, memory_format), _channels(x)


def _run_on_cpu(kernel, view, C, tensors, parameters, *scalars):
    """Call a numba kernel; what is None or empty becomes an empty array of the right type."""
    common.cpu_threads(view.outer * view.inner * C)
    empty = np.empty(0, tensors[0].detach().numpy().dtype)
    shape = (view.outer * view.inner * C,) if view.stride_c == 1 else (view.outer, C, view.inner)
    strides = (1,) if view.stride_c == 1 else (C * view.inner, view.inner, 1)
    arrays = [t.detach().as_strided(shape if t.numel() else (0,) * len(shape), strides).numpy() for t in tensors]
    arrays += [empty if t is None else t.detach().numpy() for t in parameters]
    kernel(*arrays, *scalars)


def _finalize_grid(C):
    return (_cdiv(C, FINALIZE["BLOCK_C"]),)


def _two_floats(value):
    # a float argument reaches a kernel in fp32; fp64 kernels add what rounding took
    (high,) = struct.unpack("f", struct.pack("f", value))
    return high, value - high


def _allocate_output(x):
    return torch.empty_like(x, memory_format=_memory_format(x))


def _allocate_forward(x):
    mean = x.new_empty(_channels(x), dtype=_statistics_dtype(x))
    return _allocate_output(x), mean, torch.empty_like(mean)


def _allocate_backward(x, weight, need_input, need_params):
    grad_input = torch.empty_like(x.contiguous(memory_format=_memory_format(x))) if need_input else x.new_empty(0)
    like = x if weight is None else weight
    sizes = (_channels(x),) if need_params else (0,)
    return grad_input, like.new_empty(sizes), like.new_empty(sizes)


_forward = common.register(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "float momentum, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    batch_norm_forward,
    lambda x, *_: _allocate_forward(x),
)
_forward_eval = common.register(
    "batch_norm_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps, "
    "str backend) -> Tensor",
    batch_norm_forward_eval,
    lambda x, *_: _allocate_output(x),
)
_backward = common.register(
    "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor spread, bool training, "
    "float eps, bool need_input, bool need_params, str backend) -> (Tensor, Tensor, Tensor)",
    batch_norm_backward,
    lambda grad_output, x, weight, mean, spread, training, eps, need_input, need_params, backend: _allocate_backward(
        x, weight, need_input, need_params
    ),
)


class BatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, training, momentum, eps, backend):
        if training:
            y, mean, spread = _forward(x, weight, bias, running_mean, running_var, momentum, eps, backend)
        else:
            y = _forward_eval(x, weight, bias, running_mean, running_var, eps, backend)
            mean, spread = running_mean, running_var
        ctx.save_for_backward(x, weight, bias, mean, spread)
        ctx.arguments = (training, eps, backend)
        return y

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, bias, mean, spread = ctx.saved_tensors
        training, eps, backend = ctx.arguments
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            grads = common.differentiable_grads(
                lambda x, weight, bias: batch_norm_reference(x, weight, bias, mean, spread, training, eps),
                (x, weight, bias), grad_output, (need_input, need_weight, need_bias),
            )  # fmt: skip
        else:
            grads = _backward(
                grad_output, x, weight, mean, spread, training, eps, need_input, need_weight or need_bias, backend
            )
        grad_input, grad_weight, grad_bias = grads
        return (
            grad_input if need_input else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            *[None] * 6,
        )


_op = Op(
    "batch_norm",
    cpu_kernel=True,
    cpu_auto=True,
    why="numba trains contiguous planes from 56x56 at 1.2 to 1.5x PyTorch, channels_last of few channels at 10 to 17x",
)


def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """Batch norm of input [N, C, ...] over every dimension but the second. As torch.nn.functional.batch_norm.

    Args:
        input: floating-point tensor of two dimensions or more. The output has its dtype, and channels_last stays.
        running_mean, running_var: [C], both or neither; used in evaluation, updated in place in training.
        weight, bias: [C] or None. They and the running statistics share one dtype: that of input, or float32 for a
            float16 or bfloat16 input.
        training: normalise with the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance; positive in training.

    Raises:
        TypeError: an argument is no tensor, number or bool as it should be, or the dtypes do not go together.
        ValueError: wrong sizes or devices, no running statistics in evaluation, one value per channel in training, eps.
    """
    _check(input, running_mean, running_var, weight, bias, training, momentum, eps)
    backend = _op.route(
        input, lambda backend: _why_not(backend, input, (weight, bias, running_mean, running_var), training)
    )
    if backend == "torch":
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return BatchNormFunction.apply(
        input, weight, bias, running_mean, running_var, training, float(momentum), float(eps), backend
    )


def _check(input, running_mean, running_var, weight, bias, training, momentum, eps):
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
    C = _channels(input)
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
    if training and input.dim() > 1 and input.shape[0] * math.prod(input.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)}")
