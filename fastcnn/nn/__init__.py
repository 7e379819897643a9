"""torch.nn with fastcnn's modules in place of torch's: `from fastcnn import nn` instead of `import torch.nn as nn`.

The modules of this package are ours; every other name is torch.nn's own.
"""

from torch.nn import *  # noqa: F403
from torch.nn import Module, Parameter, init, parallel, parameter, utils  # noqa: F401

from fastcnn import functional  # noqa: F401
from fastcnn.nn.activation import GELU, Hardswish, LeakyReLU, ReLU, ReLU6, Sigmoid, SiLU, Tanh  # noqa: F401
from fastcnn.nn.blocks import Block, ChainSequential, ConvBNAct  # noqa: F401
from fastcnn.nn.conv import Conv2d, ConvTranspose2d, Linear  # noqa: F401
from fastcnn.nn.dense_blocks import DenseBlock, DenseLayer  # noqa: F401
from fastcnn.nn.dropout import (  # noqa: F401
    DropConnectConv2d,
    DropConnectLinear,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    PlainDropout,
    StochasticDepth,
)
from fastcnn.nn.inception_blocks import BasicConv2d, Branches  # noqa: F401
from fastcnn.nn.losses import (  # noqa: F401
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    HuberLoss,
    L1Loss,
    MSELoss,
    MultiMarginLoss,
    SmoothL1Loss,
)
from fastcnn.nn.mobile_blocks import DepthwiseSeparable, InvertedResidual, MBConv, SqueezeExcite  # noqa: F401
from fastcnn.nn.norms import (  # noqa: F401
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    DecorrelatedBatchNorm2d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LocalResponseNorm,
    SyncBatchNorm,
)
from fastcnn.nn.pooling import (  # noqa: F401
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool2d,
    FractionalMaxPool2d,
    LPPool2d,
    MaxPool2d,
)
from fastcnn.nn.residual_blocks import BasicBlock, Bottleneck, PreActBlock, PreActBottleneck  # noqa: F401
from fastcnn.nn.separable import SeparableConv2d  # noqa: F401
