"""Activations: relu, relu6, leaky_relu, silu, sigmoid, tanh, hardswish, gelu. y = f(x), elementwise, any shape.

Saved for backward: y for relu, sigmoid and tanh, x for the others. Torch counterparts: torch.nn.functional, same names.
Sources: silu, Elfwing et al. 2017; hardswish, Howard et al. 2019 (MobileNetV3); gelu, Hendrycks and Gimpel 2016.
"""

import torch
import torch.nn.functional as F

from fastcnn.backends import Op
from fastcnn.ops import common

BLOCK = 1024  # one launch for every shape: the kernel only streams memory
SAVES_OUTPUT = ("relu", "sigmoid", "tanh")


def activation_reference(x, kind, slope=0.01):
    """f(x) in plain PyTorch; kind is a function name above or "gelu_tanh"."""
    if kind == "leaky_relu":
        return F.leaky_relu(x, slope)
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return getattr(torch if kind in ("sigmoid", "tanh") else F, kind)(x)


def _why_not(kind, x):
    if x.dtype not in common.FLOATS:
        return f"{kind} has kernels for floating-point tensors and got {x.dtype}"
    return None


def activation_forward(x, kind, slope, backend):
    """Launch the kernel on a dense tensor; returns y in the memory order of x."""
    from fastcnn.kernels.triton.activation import activation_forward_kernel

    x = x if common.is_dense(x) else x.contiguous()
    y = torch.empty_like(x)
    _launch(activation_forward_kernel, (x, y), slope, kind)
    return y


def activation_forward_(x, kind, slope, backend):
    """The same, written over a dense x."""
    from fastcnn.kernels.triton.activation import activation_forward_kernel

    _launch(activation_forward_kernel, (x, x), slope, kind)


def activation_backward(grad_output, saved, kind, slope, backend):
    """grad_input in the memory order of what was saved."""
    from fastcnn.kernels.triton.activation import activation_backward_kernel

    saved = saved if common.is_dense(saved) else saved.contiguous()
    grad_input = torch.empty_like(saved)
    _launch(activation_backward_kernel, (common.with_strides_of(grad_output, saved), saved, grad_input), slope, kind)
    return grad_input


def _launch(kernel, tensors, slope, kind):
    numel = tensors[0].numel()
    if numel == 0:
        return
    with common.device_guard(tensors[0]):
        kernel[(-(-numel // BLOCK),)](
            *tensors, numel, SLOPE=slope, KIND=kind, INT64=common.exceeds_int32(tensors[0]), BLOCK=BLOCK
        )


def _fake_like(x, *_):
    return torch.empty_like(x if common.is_dense(x) else x.contiguous())


_forward = common.register(
    "activation(Tensor input, str kind, float slope, str backend) -> Tensor", activation_forward, _fake_like
)
_forward_ = common.register(
    "activation_(Tensor(a!) input, str kind, float slope, str backend) -> ()", activation_forward_, lambda *_: None
)
_backward = common.register(
    "activation_backward(Tensor grad_output, Tensor saved, str kind, float slope, str backend) -> Tensor",
    activation_backward,
    lambda grad_output, saved, *_: _fake_like(saved),
)


class ActivationFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind, slope, inplace, backend):
        if inplace:
            saved = None if kind in SAVES_OUTPUT else x.clone()
            _forward_(x, kind, slope, backend)
            ctx.mark_dirty(x)
            y = x
        else:
            y, saved = _forward(x, kind, slope, backend), x
        ctx.save_for_backward(y if kind in SAVES_OUTPUT else saved)
        ctx.arguments = (kind, slope, backend)
        return y

    @staticmethod
    def backward(ctx, grad_output):
        (saved,) = ctx.saved_tensors
        kind, slope, backend = ctx.arguments
        if torch.is_grad_enabled():
            return _differentiable_backward(grad_output, saved, kind, slope), None, None, None, None
        return _backward(grad_output, saved, kind, slope, backend), None, None, None, None


def _differentiable_backward(grad_output, saved, kind, slope):
    # where y is saved, it still hangs in the graph: plain formulas in y differentiate through it
    if kind == "relu":
        return grad_output.masked_fill(saved <= 0, 0)
    if kind == "sigmoid":
        return grad_output * saved * (1 - saved)
    if kind == "tanh":
        return grad_output * (1 - saved * saved)
    reference = lambda x: activation_reference(x, kind, slope)
    return common.differentiable_grads(reference, (saved,), grad_output, (True,))[0]


def _declare(name):
    why = "one pass over memory, which PyTorch vectorises; there is no CPU kernel of ours"
    return Op(name, cpu_kernel=False, cpu_auto=False, why=why)


_ops = {
    name: _declare(name) for name in ("relu", "relu6", "leaky_relu", "silu", "sigmoid", "tanh", "hardswish", "gelu")
}


def _strictly(torch_function):
    """torch_function(input, inplace), but for an inplace that is no bool, where PyTorch takes "no" for yes."""

    def pytorchs(input, inplace=False):
        if inplace is not False and inplace is not True:
            raise TypeError
        return torch_function(input, inplace)

    return pytorchs


def _leaky_relu(input, negative_slope=0.01, inplace=False):
    if inplace is not False and inplace is not True:
        raise TypeError
    return F.leaky_relu(input, negative_slope, inplace)


def _activation(name, x, inplace, fallback, kind=None, slope=0.0):
    common.check_tensor("input", x)
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace must be a bool, got {inplace!r}")
    kind = kind or name

    def why_not(backend):
        if inplace and not common.is_dense(x):
            return f"{name} in place needs a tensor whose elements fill one block of memory, got strides {x.stride()}"
        return _why_not(name, x)

    backend = _ops[name].route(x, why_not)
    if backend == "torch":
        return fallback()
    return ActivationFunction.apply(x, kind, slope, inplace, backend)


@_ops["relu"].torch_first(_strictly(F.relu))
def relu(input, inplace=False):
    """max(input, 0). As torch.nn.functional.relu; NaN stays NaN."""
    return _activation("relu", input, inplace, lambda: F.relu(input, inplace))


@_ops["relu6"].torch_first(_strictly(F.relu6))
def relu6(input, inplace=False):
    """min(max(input, 0), 6). As torch.nn.functional.relu6."""
    return _activation("relu6", input, inplace, lambda: F.relu6(input, inplace))


@_ops["leaky_relu"].torch_first(_leaky_relu)
def leaky_relu(input, negative_slope=0.01, inplace=False):
    """input where positive, else negative_slope * input. As torch.nn.functional.leaky_relu."""
    return _activation(
        "leaky_relu",
        input,
        inplace,
        lambda: F.leaky_relu(input, negative_slope, inplace),
        slope=float(negative_slope),
    )


@_ops["silu"].torch_first(_strictly(F.silu))
def silu(input, inplace=False):
    """input * sigmoid(input), also called swish. As torch.nn.functional.silu."""
    return _activation("silu", input, inplace, lambda: F.silu(input, inplace))


@_ops["sigmoid"].torch_first(torch.sigmoid)
def sigmoid(input):
    """1 / (1 + exp(-input)). As torch.sigmoid."""
    return _activation("sigmoid", input, False, lambda: torch.sigmoid(input))


@_ops["tanh"].torch_first(torch.tanh)
def tanh(input):
    """Hyperbolic tangent. As torch.tanh."""
    return _activation("tanh", input, False, lambda: torch.tanh(input))


@_ops["hardswish"].torch_first(_strictly(F.hardswish))
def hardswish(input, inplace=False):
    """input * relu6(input + 3) / 6. As torch.nn.functional.hardswish."""
    return _activation("hardswish", input, inplace, lambda: F.hardswish(input, inplace))


@_ops["gelu"].torch_first(F.gelu)
def gelu(input, approximate="none"):
    """input * Phi(input), Phi the normal distribution function; approximate is "none" (exact) or "tanh"."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    kind = "gelu" if approximate == "none" else "gelu_tanh"
    return _activation("gelu", input, False, lambda: F.gelu(input, approximate=approximate), kind=kind)
