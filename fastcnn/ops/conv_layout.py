"""What the host functions of all convolutions share: layouts, where results go, PyTorch's convolution as reference."""

import torch
import torch.nn.functional as F

from fastcnn.ops import common


def suggests_channels_last(tensor):
    """Whether torch reads these strides as channels_last, also where sizes of one leave it open.

    Strides must not fall from C over W and H to N; those that a contiguous tensor has, too, do not count.
    """
    strides, sizes = tensor.stride(), tensor.shape
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * max(sizes[d], 1)
    return True


def empty_image(like, channels, size, channels_last):
    """An output of like's batch, in the layout torch gives it."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (like.shape[0], channels, *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def empty_grad_weight(weight):
    """The parameter's own strides, so that the optimizer reads both alike; contiguous where its elements lie apart."""
    if common.is_dense(weight):
        return torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def output_of(out, like, channels, size, channels_last):
    """Where a result goes: out, or a new image."""
    if out is None:
        return empty_image(like, channels, size, channels_last)
    common.check_tensor("out", out)
    common.check_alike("out", out, "the convolution's tensors", like)
    shape = (like.shape[0], channels, *size)
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have the shape of the result, {shape}, got {tuple(out.shape)}")
    return out


def padded_reference(input, weight, bias, size, stride, padding, dilation, groups):
    """PyTorch's conv2d for the host functions' geometry. Negative padding at the far side crops what no tap reads."""
    far = [
        (size[d] - 1) * stride[d] + dilation[d] * (weight.shape[2 + d] - 1) + 1 - input.shape[2 + d] - padding[d]
        for d in (0, 1)
    ]
    padded = F.pad(input, (padding[1], far[1], padding[0], far[0]))
    return F.conv2d(padded, weight, bias, stride, 0, dilation, groups)
