"""The functional API: fastcnn's ops under torch.nn.functional's names, arguments and defaults.

Names that fastcnn does not have come from torch.nn.functional, so `import fastcnn.functional as F` is a drop-in swap.
"""

import torch.nn.functional

from fastcnn.ops.activation import gelu, hardswish, leaky_relu, relu, relu6, sigmoid, silu, tanh
from fastcnn.ops.adaptive_avg_pool2d import adaptive_avg_pool2d
from fastcnn.ops.adaptive_max_pool2d import adaptive_max_pool2d
from fastcnn.ops.avg_pool2d import avg_pool2d
from fastcnn.ops.batch_norm import batch_norm
from fastcnn.ops.conv2d import conv2d
from fastcnn.ops.conv_transpose2d import conv_transpose2d
from fastcnn.ops.cross_entropy import cross_entropy
from fastcnn.ops.decorrelated_batch_norm import decorrelated_batch_norm
from fastcnn.ops.drop_connect import drop_connect_conv2d, drop_connect_linear
from fastcnn.ops.dropout import dropout
from fastcnn.ops.elementwise_loss import (
    binary_cross_entropy_with_logits,
    huber_loss,
    l1_loss,
    mse_loss,
    smooth_l1_loss,
)
from fastcnn.ops.feature_dropout import dropout1d, dropout2d, dropout3d
from fastcnn.ops.fractional_max_pool2d import fractional_max_pool2d
from fastcnn.ops.group_norm import group_norm
from fastcnn.ops.instance_norm import instance_norm
from fastcnn.ops.layer_norm import layer_norm
from fastcnn.ops.linear import linear
from fastcnn.ops.local_response_norm import local_response_norm
from fastcnn.ops.lp_pool2d import lp_pool2d
from fastcnn.ops.max_pool2d import max_pool2d
from fastcnn.ops.multi_margin_loss import multi_margin_loss
from fastcnn.ops.separable_conv2d import separable_conv2d
from fastcnn.ops.stochastic_depth import stochastic_depth

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "batch_norm",
    "binary_cross_entropy_with_logits",
    "conv2d",
    "conv_transpose2d",
    "cross_entropy",
    "decorrelated_batch_norm",
    "drop_connect_conv2d",
    "drop_connect_linear",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "fractional_max_pool2d",
    "gelu",
    "group_norm",
    "hardswish",
    "huber_loss",
    "instance_norm",
    "l1_loss",
    "layer_norm",
    "leaky_relu",
    "linear",
    "local_response_norm",
    "lp_pool2d",
    "max_pool2d",
    "mse_loss",
    "multi_margin_loss",
    "relu",
    "relu6",
    "separable_conv2d",
    "sigmoid",
    "silu",
    "smooth_l1_loss",
    "stochastic_depth",
    "tanh",
]


def __getattr__(name):
    return getattr(torch.nn.functional, name)
