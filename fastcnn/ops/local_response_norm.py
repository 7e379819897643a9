"""Local response norm: y[c] = x[c] / s[c]^beta, s[c] = k + alpha / size * sum of x^2 over `size` channels about c.

x is [N, C, ...]; the window of c is c - size // 2 to c + (size - 1) // 2, with nothing beyond the first and the last
channel. Saved for backward: x alone; s is computed again.
Torch counterpart: torch.nn.functional.local_response_norm. Source: Krizhevsky, Sutskever and Hinton 2012, section 3.3,
whose alpha is not divided by the size.
"""

import math
import numbers

import torch
import torch.nn.functional as F

from fastcnn.backends import Op, current_backend
from fastcnn.ops import common

RUNS = 128  # runs of eight channels of a program, channels_last: one per thread of 4 warps
BLOCK_C = 8  # channels of a program, contiguous: little beside them is read twice
BLOCK_S = 512  # and pixels at most; in fp64 half as many
CPU_SMALLEST = 8192  # elements from which our CPU kernels are faster
LARGEST = 9  # channels of a window: what the eight before and behind reach


def local_response_norm_reference(x, size, alpha, beta, k):
    """Local response norm in plain PyTorch."""
    return F.local_response_norm(x, size, alpha, beta, k)


def _memory_format(x):
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _output_dtype(x):
    # torch raises to the power in float32 under autocast
    return torch.float32 if x.is_cuda and common.autocast_dtype(x) and x.element_size() < 4 else x.dtype


def _why_not(backend, x, size, beta):
    if x.dtype not in common.FLOATS:
        return f"local_response_norm has kernels for floating-point tensors and got {x.dtype}"
    if backend == "cpu" and x.dtype not in (torch.float32, torch.float64):
        return f"local_response_norm on CPU has kernels for float32 and float64 and got {x.dtype}"
    if backend == "triton" and size > LARGEST:
        return f"local_response_norm has Triton kernels for windows of up to {LARGEST} channels and got {size}"
    if backend == "cpu" and current_backend() == "auto" and x.numel() < CPU_SMALLEST:
        return "PyTorch's local_response_norm is as fast on CPU on small tensors"
    return None


def _is_rows(x):
    """Whether the channels of a pixel are neighbours in memory."""
    return _memory_format(x) != torch.contiguous_format or math.prod(x.shape[2:]) == 1


def _on_gpu(direction, x, tensors, size, alpha, beta, k):
    """Launch a Triton kernel on dense tensors in the layout of x."""
    from fastcnn.kernels.triton import local_response_norm as kernels

    (N, C), S = x.shape[:2], math.prod(x.shape[2:])
    how = dict(SIZE=size, ALPHA=alpha / size, BETA=beta, K=k, INT64=common.exceeds_int32(x))
    with common.device_guard(x):
        if _is_rows(x):
            kernel = getattr(kernels, f"local_response_norm_rows_{direction}kernel")
            grid = (-(-N * S * -(-C // 8) // RUNS),)
            kernel[grid](*tensors, N * S, C, WHOLE=C % 8 == 0, BLOCK=RUNS, **how)
        else:
            kernel = getattr(kernels, f"local_response_norm_planes_{direction}kernel")
            block_s = BLOCK_S if x.element_size() < 8 else BLOCK_S // 2
            block_s = max(128, min(block_s, 1 << (S - 1).bit_length()))  # a pixel per thread at least
            grid = (N * -(-C // BLOCK_C) * -(-S // block_s),)
            kernel[grid](*tensors, C, S, BLOCK_C=BLOCK_C, BLOCK_S=block_s, **how)


def _on_cpu(direction, x, tensors, size, alpha, beta, k):
    """Call a numba kernel on dense tensors in the layout of x."""
    from fastcnn.kernels.cpu import local_response_norm as kernels

    (N, C), S, rows = x.shape[:2], math.prod(x.shape[2:]), _is_rows(x)
    common.cpu_threads(x.numel())
    arrays = [t.detach().as_strided((t.numel(),), (1,)).numpy() for t in tensors]
    scalars = [arrays[0].dtype.type(value) for value in (alpha / size, beta, k)]
    kernel = getattr(kernels, ("rows_" if rows else "planes_") + direction)
    kernel(*(a.reshape((N * S, C) if rows else (N, C, S)) for a in arrays), size, *scalars)


def local_response_norm_forward(x, size, alpha, beta, k, dtype, backend):
    """y in this dtype and the layout of x."""
    y = _allocate(x, dtype)
    if x.numel() == 0:
        return y
    x = x.contiguous(memory_format=_memory_format(x))
    if backend == "cpu":
        _on_cpu("forward", x, (x, y), size, alpha, beta, k)
    else:
        _on_gpu("", x, (x, y), size, alpha, beta, k)
    return y


def local_response_norm_backward(grad_output, x, size, alpha, beta, k, backend):
    """grad_input in the layout of x."""
    grad_input = _allocate(x, x.dtype)
    if x.numel() == 0:
        return grad_input
    memory_format = _memory_format(x)
    tensors = (grad_output.contiguous(memory_format=memory_format), x.contiguous(memory_format=memory_format))
    if backend == "cpu":
        _on_cpu("backward", tensors[1], (*tensors, grad_input), size, alpha, beta, k)
    else:
        _on_gpu("backward_", tensors[1], (*tensors, grad_input), size, alpha, beta, k)
    return grad_input


def _allocate(x, dtype):
    return torch.empty_like(x, dtype=dtype, memory_format=_memory_format(x))


_forward = common.register(
    "local_response_norm(Tensor input, int size, float alpha, float beta, float k, ScalarType dtype, str backend) "
    "-> Tensor",
    local_response_norm_forward,
    lambda x, size, alpha, beta, k, dtype, backend: _allocate(x, dtype),
)
_backward = common.register(
    "local_response_norm_backward(Tensor grad_output, Tensor input, int size, float alpha, float beta, float k, "
    "str backend) -> Tensor",
    local_response_norm_backward,
    lambda grad_output, x, *_: _allocate(x, x.dtype),
)


class LocalResponseNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size, alpha, beta, k, dtype, backend):
        ctx.save_for_backward(x)
        ctx.arguments = (size, alpha, beta, k)
        ctx.backend = backend
        return _forward(x, size, alpha, beta, k, dtype, backend)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            (grad_input,) = common.differentiable_grads(
                lambda x: local_response_norm_reference(x, *ctx.arguments), (x,), grad_output, (True,)
            )
        else:
            grad_input = _backward(grad_output, x, *ctx.arguments, ctx.backend)
        return grad_input, *[None] * 6


_op = Op(
    "local_response_norm",
    cpu_kernel=True,
    cpu_auto=True,
    why="numba runs forward and backward of AlexNet's layers at 4 to 12x PyTorch's speed, equal at 8,192 elements",
)


def _torchs(input, size, alpha=1e-4, beta=0.75, k=1.0):
    if not input.is_floating_point():  # PyTorch takes integers, too
        raise TypeError
    return F.local_response_norm(input, size, alpha, beta, k)


@_op.torch_first(_torchs, below=CPU_SMALLEST)
def local_response_norm(input, size, alpha=1e-4, beta=0.75, k=1.0):
    """Divide each element by a power of the squares of its neighbours in channel. As torch.nn.functional's.

    Args:
        input: floating-point tensor [N, C, ...] of three dimensions or more.
        size: channels of the window.
        alpha: factor of the mean of the squares over `size`.
        beta: exponent.
        k: constant added to it.

    Returns:
        tensor with the shape, layout and dtype of input (float32 under autocast on a GPU, as PyTorch's).

    Raises:
        TypeError: input is no floating-point tensor, size no int, or alpha, beta or k no number.
        ValueError: input has fewer than three dimensions, or size is not positive.
    """
    common.check_tensor("input", input)
    if input.dim() < 3:
        raise ValueError(f"input must have at least 3 dimensions, [N, C, ...], got shape {tuple(input.shape)}")
    common.check_float("input", input)
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size must be an int, got {size!r}")
    if size < 1:
        raise ValueError(f"size must be positive, got {size}")
    for name, value in (("alpha", alpha), ("beta", beta), ("k", k)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
    backend = _op.route(input, lambda backend: _why_not(backend, input, size, beta))
    if backend == "torch":
        return F.local_response_norm(input, size, alpha, beta, k)
    return LocalResponseNormFunction.apply(
        input, size, float(alpha), float(beta), float(k), _output_dtype(input), backend
    )
