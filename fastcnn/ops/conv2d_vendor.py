"""cuDNN (cuBLAS for linear layers) as one more family of convolution kernels, through PyTorch's own ops.

In backend "auto" it is a candidate like any other and wins where it was measured faster. Strict mode never comes here.
"""

import torch
import torch.nn.functional as F


def can(problem):
    """Whether PyTorch has this pass: it knows padding that is equal on both sides, and nothing on load or store."""
    sizes = zip(
        (problem.h, problem.w),
        (problem.p, problem.q),
        (problem.r, problem.s),
        problem.stride,
        problem.padding,
        problem.dilation,
        strict=True,
    )
    symmetric = all(p == (h + 2 * pad - dil * (r - 1) - 1) // stride + 1 for h, p, r, stride, pad, dil in sizes)
    return symmetric and not problem.fused


def forward(input, weight, bias, stride, padding, dilation, groups, tf32_switch):
    """The convolution."""
    if tf32_switch == "matmul":
        return F.linear(input.flatten(1), weight.flatten(1), bias)[:, :, None, None]
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def backward_input(grad_output, weight, bias, size, stride, padding, dilation, groups, tf32_switch):
    """The gradient of the input, or with a bias the transposed convolution."""
    if tf32_switch == "matmul":
        return (grad_output.flatten(1) @ weight.flatten(1))[:, :, None, None]
    # rows and columns at the far side that no tap reaches
    rest = [
        size[d]
        - ((grad_output.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (weight.shape[2 + d] - 1) + 1)
        for d in (0, 1)
    ]
    return F.conv_transpose2d(grad_output, weight, bias, stride, padding, rest, groups, dilation)


def backward_weight(grad_output, input, weight, stride, padding, dilation, groups, tf32_switch):
    """The gradient of the weight, whose values are not read."""
    if tf32_switch == "matmul":
        return (grad_output.flatten(1).T @ input.flatten(1))[:, :, None, None]
    wanted = [False, True, False]
    return torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
    )[1]
