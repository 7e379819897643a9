"""The functional API: fastcnn's ops under torch.nn.functional's names, arguments and defaults.

Names that fastcnn does not have come from torch.nn.functional, so `import fastcnn.functional as F` is a drop-in swap.
"""

import torch.nn.functional

from fastcnn.ops.activation import gelu, hardswish, leaky_relu, relu, relu6, sigmoid, silu, tanh

__all__ = [
    "gelu",
    "hardswish",
    "leaky_relu",
    "relu",
    "relu6",
    "sigmoid",
    "silu",
    "tanh",
]


def __getattr__(name):
    return getattr(torch.nn.functional, name)
