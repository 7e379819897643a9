"""torch.nn with fastcnn's modules in place of torch's: `from fastcnn import nn` instead of `import torch.nn as nn`.

The modules of `fastcnn.nn.modules` are ours; every other name is torch.nn's own.
"""

from torch.nn import *  # noqa: F403
from torch.nn import Module, Parameter, init, parallel, parameter, utils  # noqa: F401

from fastcnn import functional  # noqa: F401
from fastcnn.nn.modules import (  # noqa: F401
    GELU,
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Conv2d,
    ConvTranspose2d,
    CrossEntropyLoss,
    Dropout,
    Hardswish,
    LeakyReLU,
    Linear,
    MaxPool2d,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Tanh,
)
