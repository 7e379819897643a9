"""Instance norm: y = (x - mean) / sqrt(var + eps) * weight + bias per channel and image, x [N, C, ...].

Group norm with one channel to a group, on its kernels: channels_last stays, where PyTorch makes the output contiguous.
Running statistics, if any, move towards the means over the batch of mean and unbiased variance; without
use_input_stats they normalise, which is batch norm in evaluation. Saved for backward: as group norm.
Torch counterpart: torch.nn.functional.instance_norm. Source: Ulyanov, Vedaldi and Lempitsky 2016.
"""

import math

import torch
import torch.nn.functional as F

from fastcnn.backends import Op, current_backend
from fastcnn.ops import common
from fastcnn.ops import group_norm as groups
from fastcnn.ops.batch_norm import batch_norm

# where our CPU kernels win
CPU_SMALLEST = 2**18  # elements, channels_last
CPU_CHANNELS = 16  # and channels at least
CPU_SMALLEST_CONTIGUOUS = 2**20  # elements
CPU_PLANE = 4096  # and pixels at least


def instance_norm_reference(x, weight, bias, eps):
    """Instance norm in plain PyTorch, with the statistics of the input."""
    return F.instance_norm(x, weight=weight, bias=bias, eps=eps)


def _why_not(backend, x, weight, bias):
    reason = groups.why_not("instance_norm", backend, x, (weight, bias))
    if reason is None and backend == "cpu" and current_backend() == "auto":
        pixels = math.prod(x.shape[2:])
        rows = groups.memory_format(x) != torch.contiguous_format and x.shape[1] >= CPU_CHANNELS
        if x.numel() < (CPU_SMALLEST if rows else CPU_SMALLEST_CONTIGUOUS) or (not rows and pixels < CPU_PLANE):
            return "PyTorch's instance_norm is as fast on CPU on tensors of this shape"
    return reason


_op = Op(
    "instance_norm",
    cpu_kernel=True,
    cpu_auto=True,
    why="numba trains channels_last at 1.1 to 3.9x PyTorch's speed, contiguous planes from 64x64 at 1.1 to 1.3x",
)


def _torchs(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if input.dim() > 2 and input.shape[0] == 1:
        # the same, and right: PyTorch 2.13's instance_norm gets a channels_last gradient of one image wrong on CPU
        return F.batch_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


@_op.torch_first(_torchs, below=CPU_SMALLEST)
def instance_norm(
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    """Instance norm of input [N, C, ...] over the pixels of each channel of each image.

    As torch.nn.functional.instance_norm, but channels_last stays channels_last.

    Args:
        input: floating-point tensor of two dimensions or more, with two pixels or more if its statistics are used.
        running_mean, running_var: [C], both or neither; used without use_input_stats, else updated in place.
        weight, bias: [C] or None, of the dtype of input, or float32 for a float16 or bfloat16 input.
        use_input_stats: normalise with the statistics of the input.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.

    Returns:
        tensor with the shape, layout and dtype of input.

    Raises:
        TypeError: an argument is no tensor, number or bool as it should be, or the dtypes do not go together.
        ValueError: wrong sizes or devices, no running statistics without use_input_stats, one pixel.
    """
    _check(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    backend = _op.route(input, lambda backend: _why_not(backend, input, weight, bias))
    if backend == "torch":
        return _torchs(input, running_mean, running_var, weight, bias, True, momentum, eps)
    y, mean, rstd = groups.GroupNormFunction.apply(
        input, input.shape[1], weight, bias, float(eps), input.dtype, backend
    )
    if running_mean is not None and input.numel() > 0:
        pixels = math.prod(input.shape[2:])
        with torch.no_grad():
            var = (1.0 / rstd.square() - eps).clamp(min=0.0).mean(0) * (pixels / (pixels - 1))
            running_mean.lerp_(mean.mean(0).to(running_mean.dtype), momentum)
            running_var.lerp_(var.to(running_var.dtype), momentum)
    return y


def _check(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps):
    groups.check("instance_norm", input, weight, bias, eps)
    if not isinstance(use_input_stats, bool):
        raise TypeError(f"use_input_stats must be a bool, got {use_input_stats!r}")
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum must be a number, got {momentum!r}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be both tensors or both None")
    if not use_input_stats and running_mean is None:
        raise ValueError("running_mean and running_var must be defined without use_input_stats, got None")
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tensor is not None:
            common.check_tensor(name, tensor)
            common.check_alike(name, tensor, "input", input, dtype=False)
            if tensor.shape != input.shape[1:2]:
                raise ValueError(
                    f"{name} must have {input.shape[1]} elements, one per channel, got shape {tuple(tensor.shape)}"
                )
            if tensor.requires_grad:
                raise ValueError(f"{name} must not require a gradient")
    if use_input_stats and math.prod(input.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {tuple(input.shape)}")
