"""linear: y = x @ w^T + bias, as the convolution of images of one pixel with filters of one tap, on conv2d's kernels.

x [..., in], w [out, in], bias [out], y [..., out]. Saved for backward: x and w. Torch counterpart:
torch.nn.functional.linear.
"""

import torch.nn.functional as F

from fastcnn.backends import Op
from fastcnn.ops import common
from fastcnn.ops.conv2d import Conv2dFunction, among_vendors, check_operands, compute_dtype

_op = Op(
    "linear",
    cpu_kernel=False,
    cpu_auto=False,
    why="PyTorch's BLAS runs matrix products near the multiply-add peak of the CPU; numba has no GEMM to match",
)


def linear_reference(input, weight, bias=None):
    """The same in plain PyTorch."""
    return F.linear(input, weight, bias)


def _why_not(backend, input, weight, bias):
    if input.dtype not in common.FLOATS:
        return f"the linear kernels take floating-point tensors and got {input.dtype}"
    if weight.dim() == 1:
        return "a weight vector asks for a dot product, which is not worth a kernel"
    if weight.numel() == 0:
        return "the linear kernels need at least one input and one output feature"
    if bias is not None and bias.dim() > 1:
        return f"the linear kernels take one bias per output feature and got shape {tuple(bias.shape)}"
    return None


def check_linear(input, weight, bias):
    """Raise unless linear can take these arguments."""
    common.check_tensor("input", input)
    if input.dim() == 0:
        raise ValueError("input must have at least 1 dimension, got a scalar")
    check_operands(input, weight, bias, (1, 2))
    features = weight.shape[-1]
    if input.shape[-1] != features:
        raise ValueError(f"input must have weight.shape[-1] = {features} features, got {input.shape[-1]}")
    if bias is not None:
        if weight.dim() == 1:
            raise ValueError("bias must be None when weight is 1-D")
        wanted = (*input.shape[:-1], weight.shape[0])
        if bias.dim() > len(wanted) or any(
            size not in (1, want) for size, want in zip(reversed(bias.shape), reversed(wanted), strict=False)
        ):
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


@_op.torch_first(F.linear)
def linear(input, weight, bias=None):
    """Affine map of the last dimension, as torch.nn.functional.linear.

    Args:
        input: [..., in], any strides; fp16, bf16, fp32, fp64 (others run on PyTorch).
        weight: [out, in] or [in], of input's dtype.
        bias: [out] or None; also what broadcasts to it.

    Returns:
        [..., out], contiguous; [...] for a weight [in].

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, its value and what is right.
    """
    check_linear(input, weight, bias)
    backend = among_vendors(_op.route(input, lambda backend: _why_not(backend, input, weight, bias)), input)
    if backend == "torch":
        return F.linear(input, weight, bias)
    if bias is not None:
        bias = bias.to(compute_dtype(bias)).expand(weight.shape[0])
    rows = input.to(compute_dtype(input)).reshape(-1, weight.shape[1])[:, :, None, None]
    filters = weight.to(compute_dtype(weight))[:, :, None, None]
    one = (1, 1)
    y = Conv2dFunction.apply(rows, filters, bias, one, one, (0, 0), one, 1, "matmul", backend)
    return y.view(*input.shape[:-1], weight.shape[0])
