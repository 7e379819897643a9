"""Dropout of whole channels: y[n, c] = x[n, c] / (1 - p) or 0 * x[n, c], each with probability p; x [N, C, ...].

Saved for backward: the seed, eight bytes. Torch counterparts: torch.nn.functional.dropout1d, dropout2d and dropout3d,
with other random numbers. Source: Tompson et al. 2015 (SpatialDropout).

The host functions drop units: the tensors x[i] for every index i of the leading dimensions. Unit u, counted row-major,
is dropped where dropout (ops/dropout.py) with the same seed drops element u of a tensor of as many elements as there
are units. Two leading dimensions are channels, one is the samples of stochastic depth, none is the whole batch.
"""

import math
import warnings

import torch
import torch.nn.functional as F

from fastcnn.backends import Op
from fastcnn.ops import common
from fastcnn.ops.dropout import check_p_and_flags, draw_seed, factors_reference, threshold_and_scale

TILE = 2048  # elements of a tile: 16 per thread of 4 warps
BLOCK_C = 64
PROGRAMS = 1024  # from here on a program takes more tiles: eight programs per multiprocessor of an H100


def feature_dropout_reference(x, residual, seed, p, leading):
    """y for this seed (int64 tensor of one element) in plain PyTorch."""
    units = x.shape[:leading]
    factors = factors_reference(math.prod(units), seed, p).reshape(*units, *[1] * (x.dim() - leading)).to(x.dtype)
    return x * factors if residual is None else residual + x * factors


def why_not(backend, x, leading, inplace=False):
    """None, or the sentence why our kernel cannot drop units of this tensor."""
    if x.dtype not in common.FLOATS:
        return f"dropout of whole channels and samples has kernels for fp16, bf16, fp32 and fp64 and got {x.dtype}"
    if backend == "cpu" and x.dtype not in (torch.float32, torch.float64):
        return f"dropout of whole channels and samples on CPU takes float32 and float64 and got {x.dtype}"
    if inplace and (not common.is_dense(x) or _layout(x, leading) is None):
        return f"dropout in place needs contiguous or channels_last memory, got strides {x.stride()}"
    return None


def _layout(x, leading):
    """(units, inner) if each unit of a dense x is one piece of memory; (N, P, C) of channels_last memory; or None."""
    dims = [d for d in range(x.dim()) if x.shape[d] != 1]
    order = sorted(dims, key=lambda d: -x.stride(d))
    outer = [d for d in dims if d < leading]
    if order[: len(outer)] == outer:
        return math.prod(x.shape[:leading]), math.prod(x.shape[leading:])
    if leading == 2 and order[-1] == 1 and 0 not in order[1:]:
        return x.shape[0], math.prod(x.shape[2:]), x.shape[1]
    return None


def feature_dropout_forward(x, residual, seed, p, leading, backend):
    """Launch the kernel; returns y in the memory order of x. Of a gradient it returns the gradient of the input."""
    y = torch.empty_like(x)  # dense, also where x is not
    residual = None if residual is None else common.with_strides_of(residual, y)
    _launch(common.with_strides_of(x, y), residual, y, seed, p, leading, backend)
    return y


def feature_dropout_forward_(x, seed, p, leading, backend):
    """The same, written over x."""
    _launch(x, None, x, seed, p, leading, backend)


def _launch(x, residual, y, seed, p, leading, backend):
    if x.numel() == 0:
        return
    layout = _layout(y, leading)
    if layout is None:
        contiguous = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        residual = None if residual is None else residual.contiguous()
        _launch(x.contiguous(), residual, contiguous, seed, p, leading, backend)
        y.copy_(contiguous)
    elif backend == "cpu":
        _launch_cpu(x, residual, y, seed, p, layout)
    else:
        _launch_triton(x, residual, y, seed, p, layout)


def _launch_triton(x, residual, y, seed, p, layout):
    from fastcnn.kernels.triton.feature_dropout import channel_dropout_kernel, unit_dropout_kernel

    draw = threshold_and_scale(p)
    int64 = common.exceeds_int32(x)
    with common.device_guard(x):
        if len(layout) == 2:
            units, inner = layout
            block_i = min(_power_of_two(inner), TILE)
            block_u = TILE // block_i
            unit_dropout_kernel[(_cdiv(units, block_u) * _cdiv(inner, block_i),)](
                x, residual, y, seed, units, inner, *draw, INT64=int64, BLOCK_U=block_u, BLOCK_I=block_i
            )
        else:
            N, P, C = layout
            block_c = max(4, min(_power_of_two(C), BLOCK_C))
            block_p = TILE // block_c
            c_blocks = _cdiv(C, block_c)
            strips = min(_cdiv(P, block_p), _cdiv(PROGRAMS, N * c_blocks))
            channel_dropout_kernel[(N * strips, c_blocks)](
                x, y, seed, P, C, strips, *draw, QUADS=C % 4 == 0, INT64=int64, BLOCK_P=block_p, BLOCK_C=block_c
            )


def _launch_cpu(x, residual, y, seed, p, layout):
    # the factors are dropout's own of as many ones; PyTorch multiplies by them as fast as memory allows
    from fastcnn.ops.dropout import dropout_forward

    x, y = x.detach(), y.detach()
    if len(layout) == 2:
        units, inner = layout
        shape, strides = (units, inner), (inner, 1)
        factors = dropout_forward(torch.ones(units, 1, dtype=x.dtype), seed, p, "cpu")
    else:
        N, P, C = layout
        shape, strides = (N, P, C), (P * C, C, 1)
        factors = dropout_forward(torch.ones(N, 1, C, dtype=x.dtype), seed, p, "cpu")
    x, y = x.as_strided(shape, strides), y.as_strided(shape, strides)
    if residual is None:
        torch.mul(x, factors, out=y)
    else:
        torch.addcmul(residual.detach().as_strided(shape, strides), x, factors, out=y)


def _cdiv(a, b):
    return -(-a // b)


def _power_of_two(n):
    return 1 << (n - 1).bit_length()


_forward = common.register(
    "feature_dropout(Tensor input, Tensor? residual, Tensor seed, float p, int leading, str backend) -> Tensor",
    feature_dropout_forward,
    lambda x, *_: torch.empty_like(x),
)
_forward_ = common.register(
    "feature_dropout_(Tensor(a!) input, Tensor seed, float p, int leading, str backend) -> ()",
    feature_dropout_forward_,
    lambda *_: None,
)


class FeatureDropoutFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, seed, p, leading, inplace, backend):
        ctx.save_for_backward(seed)
        ctx.arguments = (p, leading, backend, common.is_channels_last(x))
        if inplace:
            _forward_(x, seed, p, leading, backend)
            ctx.mark_dirty(x)
            return x
        return _forward(x, residual, seed, p, leading, backend)

    @staticmethod
    def backward(ctx, grad_output):
        (seed,) = ctx.saved_tensors
        p, leading, backend, channels_last = ctx.arguments
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad = grad_output.contiguous(memory_format=torch.channels_last) if channels_last else grad_output
            # linear in x: the gradient is the same op, and so is the gradient's gradient
            if torch.is_grad_enabled():
                grad_input = FeatureDropoutFunction.apply(grad, None, seed, p, leading, False, backend)
            else:
                grad_input = _forward(grad, None, seed, p, leading, backend)
        return grad_input, grad_output if ctx.needs_input_grad[1] else None, *[None] * 5


_ops = {
    name: Op(
        name,
        cpu_kernel=True,
        cpu_auto=False,
        why="the product takes both as long, and PyTorch starts fewer kernels",
    )
    for name in ("dropout1d", "dropout2d", "dropout3d")
}


def _feature_dropout(name, input, leading, p, training, inplace):
    check_p_and_flags(p, training=training, inplace=inplace)
    if not training or p == 0 or input.numel() == 0:
        return input
    common.check_float("input", input)
    backend = _ops[name].route(input, lambda backend: why_not(backend, input, leading, inplace))
    if backend == "torch":
        batch = input if leading == 2 else input.unsqueeze(0)
        output = (torch.feature_dropout_ if inplace else torch.feature_dropout)(batch, p, True)
        return input if inplace else output if leading == 2 else output.squeeze(0)
    return FeatureDropoutFunction.apply(input, None, draw_seed(input), float(p), leading, inplace, backend)


def _pytorchs(torch_function):
    def checked(input, p=0.5, training=True, inplace=False):
        check_p_and_flags(p, training=training, inplace=inplace)
        return torch_function(input, p, training, inplace)

    return checked


@_ops["dropout1d"].torch_first(_pytorchs(F.dropout1d))
def dropout1d(input, p=0.5, training=True, inplace=False):
    """Zero each channel with probability p and scale the others by 1 / (1 - p); the identity in evaluation.

    As torch.nn.functional.dropout1d, with a random stream of its own and no mask kept for backward.

    Args:
        input: [N, C, L] or [C, L], floating-point, any layout.
        p: probability of dropping, between 0 and 1.
        training: False returns input itself.
        inplace: write over input and return it.

    Returns:
        tensor with the shape, dtype and layout of input.

    Raises:
        TypeError: input is no floating-point tensor, or another argument has the wrong type.
        ValueError: p is not between 0 and 1, or input has another number of dimensions.
    """
    common.check_tensor("input", input, (2, 3))
    return _feature_dropout("dropout1d", input, input.dim() - 1, p, training, inplace)


@_ops["dropout2d"].torch_first(_pytorchs(F.dropout2d))
def dropout2d(input, p=0.5, training=True, inplace=False):
    """Zero each channel with probability p and scale the others by 1 / (1 - p); the identity in evaluation.

    As torch.nn.functional.dropout2d, with a random stream of its own and no mask kept for backward.

    Args:
        input: [N, C, H, W], floating-point, any layout. Other numbers of dimensions are taken as [N, C, ...], with a
            warning, as torch does: three dimensions are no image without batch.
        p: probability of dropping, between 0 and 1.
        training: False returns input itself.
        inplace: write over input and return it.

    Returns:
        tensor with the shape, dtype and layout of input.

    Raises:
        TypeError: input is no floating-point tensor, or another argument has the wrong type.
        ValueError: p is not between 0 and 1, or input has fewer than two dimensions.
    """
    _warn_unless("dropout2d", input, (4,), "(N, C, ...)", 2)
    return _feature_dropout("dropout2d", input, 2, p, training, inplace)


@_ops["dropout3d"].torch_first(_pytorchs(F.dropout3d))
def dropout3d(input, p=0.5, training=True, inplace=False):
    """Zero each channel with probability p and scale the others by 1 / (1 - p); the identity in evaluation.

    As torch.nn.functional.dropout3d, with a random stream of its own and no mask kept for backward.

    Args:
        input: [N, C, D, H, W] or [C, D, H, W], floating-point, any layout. Other numbers of dimensions are taken as
            [C, ...], with a warning, as torch does.
        p: probability of dropping, between 0 and 1.
        training: False returns input itself.
        inplace: write over input and return it.

    Returns:
        tensor with the shape, dtype and layout of input.

    Raises:
        TypeError: input is no floating-point tensor, or another argument has the wrong type.
        ValueError: p is not between 0 and 1, or input has no dimension.
    """
    _warn_unless("dropout3d", input, (4, 5), "(C, ...)", 1)
    return _feature_dropout("dropout3d", input, 2 if input.dim() == 5 else 1, p, training, inplace)


def _warn_unless(name, input, ranks, meaning, least):
    common.check_tensor("input", input)
    if input.dim() < least:
        raise ValueError(f"input must have {least} or more dimensions, {meaning}, got shape {tuple(input.shape)}")
    if input.dim() not in ranks:
        warnings.warn(f"{name} takes an input of shape {tuple(input.shape)} as {meaning}", stacklevel=3)
