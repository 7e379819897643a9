"""The functional API: fastcnn's ops under torch.nn.functional's names, arguments and defaults.

Names that fastcnn does not have come from torch.nn.functional, so `import fastcnn.functional as F` is a drop-in swap.
"""

import torch.nn.functional

from fastcnn.ops.activation import gelu, hardswish, leaky_relu, relu, relu6, sigmoid, silu, tanh
from fastcnn.ops.adaptive_avg_pool2d import adaptive_avg_pool2d
from fastcnn.ops.avg_pool2d import avg_pool2d
from fastcnn.ops.batch_norm import batch_norm
from fastcnn.ops.conv2d import conv2d
from fastcnn.ops.conv_transpose2d import conv_transpose2d
from fastcnn.ops.cross_entropy import cross_entropy
from fastcnn.ops.drop_connect import drop_connect_conv2d, drop_connect_linear
from fastcnn.ops.dropout import dropout
from fastcnn.ops.feature_dropout import dropout1d, dropout2d, dropout3d
from fastcnn.ops.linear import linear
from fastcnn.ops.max_pool2d import max_pool2d
from fastcnn.ops.stochastic_depth import stochastic_depth

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "conv2d",
    "conv_transpose2d",
    "cross_entropy",
    "drop_connect_conv2d",
    "drop_connect_linear",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "gelu",
    "hardswish",
    "leaky_relu",
    "linear",
    "max_pool2d",
    "relu",
    "relu6",
    "sigmoid",
    "silu",
    "stochastic_depth",
    "tanh",
]


def __getattr__(name):
    return getattr(torch.nn.functional, name)
