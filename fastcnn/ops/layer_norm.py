"""Layer norm: y = (x - mean) / sqrt(var + eps) * weight + bias, over the trailing dimensions `normalized_shape`.

mean and var (biased) are those of one row: all elements that share the leading indices. weight and bias have the shape
normalized_shape. A channels_last tensor seen as (N, H, W, C) is contiguous: ConvNeXt's norm runs without a copy.
Saved for backward: x, weight, and mean and 1 / sqrt(var + eps), one of each per row.
Torch counterpart: torch.nn.functional.layer_norm. Source: Ba, Kiros and Hinton 2016.
"""

import math

import torch
import torch.nn.functional as F

from fastcnn.backends import Op
from fastcnn.ops import common
from fastcnn.ops import group_norm as groups

TILE = 2048  # elements of a tile of short rows: 16 per thread of 4 warps
LONGEST = 8192  # elements of a row that one tile holds; half as many in fp64
PROGRAMS = 1056  # of the backward of short rows: eight per multiprocessor of an H100


def layer_norm_reference(x, normalized_shape, weight, bias, eps):
    """Layer norm in plain PyTorch."""
    return F.layer_norm(x, normalized_shape, weight, bias, eps)


def _rows(x, normalized_shape):
    """Rows and elements of a row."""
    D = math.prod(normalized_shape)
    return x.numel() // D, D


def _plan(x, M, D):
    """Tiles and keyword arguments of the kernels that hold whole rows, or None where rows are too long."""
    wide = x.element_size() == 8
    block_d = groups._power_of_two(D)
    if block_d > (LONGEST // 2 if wide else LONGEST):
        return None
    block_m = min(max(1, TILE // block_d), groups._power_of_two(M))
    how = dict(BLOCK_M=block_m, BLOCK_D=block_d, INT64=common.exceeds_int32(x))
    return groups._cdiv(M, block_m), dict(how, num_warps=max(4, min(16, block_m * block_d // (256 if wide else 512))))


def _long_view(M, D):
    # a row is an image of one channel, whose pixels go strip by strip
    return groups.View(M, 1, 1, D, D, 1, 0)


def layer_norm_forward(x, normalized_shape, weight, bias, eps, dtype, backend):
    """(y, mean, rstd): y contiguous in this dtype, the statistics with the leading dimensions of x."""
    y, mean, rstd = _allocate_forward(x, normalized_shape, dtype)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    from fastcnn.kernels.triton.layer_norm import layer_norm_kernel

    x = x.contiguous()
    M, D = _rows(x, normalized_shape)
    plan = _plan(x, M, D)
    with common.device_guard(x):
        if plan is None:
            groups.strips_forward(x, y, weight, bias, mean, rstd, _long_view(M, D), eps, per_pixel=True)
        else:
            tiles, how = plan
            layer_norm_kernel[(tiles,)](x, y, mean, rstd, weight, bias, M, D, EPS=eps, **how)
    return y, mean, rstd


def layer_norm_backward(
    grad_output, x, normalized_shape, weight, mean, rstd, need_input, need_params, backend
):  # fmt: skip
    """(grad_input, grad_weight, grad_bias), the latter two in the dtype of weight; empty where not needed."""
    grads = _allocate_backward(x, normalized_shape, weight, need_input, need_params)
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    from fastcnn.kernels.triton.layer_norm import layer_norm_backward_kernel

    x, grad_output = x.contiguous(), grad_output.contiguous()
    M, D = _rows(x, normalized_shape)
    plan = _plan(x, M, D)
    with common.device_guard(x):
        if plan is None:
            _long_backward(grad_output, x, weight, mean, rstd, grads, need_input, need_params)
        else:
            tiles, how = plan
            programs = min(tiles, PROGRAMS)
            partial = x.new_empty((programs, 2, D), dtype=mean.dtype) if need_params else None
            layer_norm_backward_kernel[(programs,)](
                grad_output, x, grads[0] if need_input else None, mean, rstd, weight, partial, M, D, tiles, **how
            )
            if need_params:
                groups.sum_parameters(partial, None, *grads[1:], 1, _long_view(M, D)._replace(C=D))
    return grads


def _long_backward(grad_output, x, weight, mean, rstd, grads, need_input, need_params):
    from fastcnn.kernels.triton.layer_norm import layer_norm_parameters_kernel

    M = mean.numel()
    D = x.numel() // M
    if need_input:
        groups.strips_backward(grad_output, x, weight, mean, rstd, grads, _long_view(M, D), True, False, per_pixel=True)
    if need_params:
        block_d = min(512, TILE)
        blocks = groups._cdiv(D, block_d)
        rows_per_strip = max(TILE // block_d, groups._cdiv(M, max(1, PROGRAMS // blocks)))
        strips = groups._cdiv(M, rows_per_strip)
        partial = x.new_empty((strips, 2, D), dtype=mean.dtype)
        layer_norm_parameters_kernel[(blocks, strips)](
            grad_output, x, mean, rstd, partial, M, D, rows_per_strip,
            INT64=common.exceeds_int32(x), BLOCK_M=TILE // block_d, BLOCK_D=block_d,
        )  # fmt: skip
        groups.sum_parameters(partial, None, *grads[1:], 1, _long_view(M, D)._replace(C=D))


def _allocate_forward(x, normalized_shape, dtype):
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    mean = x.new_empty(x.shape[: x.dim() - len(normalized_shape)], dtype=groups.statistics_dtype(x))
    return y, mean, torch.empty_like(mean)


def _allocate_backward(x, normalized_shape, weight, need_input, need_params):
    grad_input = torch.empty_like(x, memory_format=torch.contiguous_format) if need_input else x.new_empty(0)
    like = x if weight is None else weight
    sizes = normalized_shape if need_params else (0,)
    return grad_input, like.new_empty(sizes), like.new_empty(sizes)


_forward = common.register(
    "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, ScalarType dtype, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    layer_norm_forward,
    lambda x, normalized_shape, weight, bias, eps, dtype, backend: _allocate_forward(x, normalized_shape, dtype),
)
_backward = common.register(
    "layer_norm_backward(Tensor grad_output, Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor mean, "
    "Tensor rstd, bool need_input, bool need_params, str backend) -> (Tensor, Tensor, Tensor)",
    layer_norm_backward,
    lambda grad_output, x, normalized_shape, weight, mean, rstd, need_input, need_params, backend: _allocate_backward(
        x, normalized_shape, weight, need_input, need_params
    ),
)


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, normalized_shape, weight, bias, eps, dtype, backend):
        y, mean, rstd = _forward(x, normalized_shape, weight, bias, eps, dtype, backend)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.arguments = (normalized_shape, eps, backend)
        return y

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        normalized_shape, eps, backend = ctx.arguments
        need_input, _, need_weight, need_bias = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            grads = common.differentiable_grads(
                lambda x, weight, bias: layer_norm_reference(x, normalized_shape, weight, bias, eps),
                (x, weight, bias), grad_output, (need_input, need_weight, need_bias),
            )  # fmt: skip
        else:
            grads = _backward(
                grad_output, x, normalized_shape, weight, mean, rstd, need_input, need_weight or need_bias, backend
            )
        grad_input, grad_weight, grad_bias = grads
        return (
            grad_input if need_input else None,
            None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            *[None] * 3,
        )


_op = Op(
    "layer_norm",
    cpu_kernel=False,
    cpu_auto=False,
    why="PyTorch's layer_norm is vectorised and parallel; there is no CPU kernel of ours to measure against it",
)


@_op.torch_first(F.layer_norm)
def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """Layer norm of input over its trailing dimensions. As torch.nn.functional.layer_norm.

    Args:
        input: floating-point tensor whose trailing dimensions are normalized_shape; copied once if not contiguous.
        normalized_shape: sequence of one int or more.
        weight, bias: of shape normalized_shape or None, of the dtype of input, or float32 for a float16 or bfloat16
            input.
        eps: added to the variance.

    Returns:
        contiguous tensor with the shape and dtype of input (float32 under autocast on a GPU, as PyTorch's).

    Raises:
        TypeError: an argument is no tensor, number or sequence as it should be, or the dtypes do not go together.
        ValueError: wrong sizes or devices.
    """
    _check(input, normalized_shape, weight, bias, eps)
    backend = _op.route(input, lambda backend: groups.why_not("layer_norm", backend, input, (weight, bias)))
    if backend == "torch":
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return LayerNormFunction.apply(
        input, list(normalized_shape), weight, bias, float(eps), groups.output_dtype(input), backend
    )


def _check(input, normalized_shape, weight, bias, eps):
    common.check_tensor("input", input)
    common.check_float("input", input)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not isinstance(normalized_shape, (tuple, list)):
        raise TypeError(f"normalized_shape must be a sequence of ints, got {normalized_shape!r}")
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(f"normalized_shape must be the trailing sizes of input {tuple(input.shape)}, got {shape}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            common.check_tensor(name, tensor)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have the shape normalized_shape {shape}, got {tuple(tensor.shape)}")
            groups.check_parameter(name, tensor, input)
    if weight is not None and bias is not None:
        common.check_alike("bias", bias, "weight", weight)
