"""What a rewritten graph calls beside the functions of fastcnn/chain.py."""

import torch.nn.functional as F
from torch import nn

from fastcnn import chain
from fastcnn.chain import likeness


def attribute(x, name):
    """The shape, ndim, dtype or device of a tensor or value."""
    return getattr(likeness(x), name)


def size(x, dim=None):
    """x.size(dim) of a tensor or value."""
    return likeness(x).size() if dim is None else likeness(x).size(dim)


def own_tensor(x):
    """A value or tensor as a tensor that nobody else reads."""
    return chain.materialize(x).clone()


class NormAlone:
    """timm's batch norm without its activation, as the chain takes a batch norm."""

    def __init__(self, module):
        self.module = module
        self.base = nn.SyncBatchNorm if isinstance(module, nn.SyncBatchNorm) else nn.BatchNorm2d

    @property
    def __class__(self):
        return self.base

    def __getattr__(self, name):
        return getattr(self.module, name)

    def __call__(self, x):
        return self.base.forward(self.module, x)


def padded_same(x, conv):
    """x with the zeros that a convolution of TensorFlow's "SAME" padding wants; itself where it wants none."""
    pads = []
    sizes = zip(x.shape[-2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
    for size_, kernel, stride, dilation in reversed(list(sizes)):  # F.pad begins with the last dimension
        total = max((-(-size_ // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size_, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads) if any(pads) else x


class ConvAlone:
    """timm's convolution without its padding, as the chain takes a convolution."""

    def __init__(self, module):
        self.module = module

    @property
    def __class__(self):
        return nn.Conv2d

    def __getattr__(self, name):
        return getattr(self.module, name)

    def __call__(self, x):
        return nn.Conv2d.forward(self.module, x)
