"""Residual blocks on the fused chain, as those of blocks.py: of ResNet, its wide and grouped kin, and pre-activation.

Sources: He, Zhang, Ren and Sun: Deep residual learning for image recognition, 2016a; Identity mappings in deep residual
networks, 2016b.
"""

from torch import nn

from fastcnn import chain
from fastcnn.nn.blocks import Block, call, conv_norm, shared
from fastcnn.nn.dropout import Dropout


def square_convolution(inputs, outputs, size, stride=1, groups=1, dilation=1):
    """A convolution of 1x1 or 3x3 without bias, which keeps the image's size at stride 1."""
    padding = dilation if size == 3 else 0
    return nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False, dilation=dilation)


class BasicBlock(Block):
    """Two 3x3 convolutions and a shortcut: torchvision's BasicBlock. Source: He et al. 2016a.

    Args:
        inplanes, planes: channels of input and output.
        stride: of the first convolution.
        downsample: module on the shortcut, which gives it the output's shape; None for the input itself.
        groups, base_width, dilation: 1, 64, 1; torchvision.models.ResNet passes them.
        norm_layer: makes a batch norm of so many channels; None for torch.nn.BatchNorm2d.
    """

    expansion = 1

    def __init__(
        self, inplanes, planes, stride=1, downsample=None, groups=1, base_width=64, dilation=1, norm_layer=None
    ):  # fmt: skip
        super().__init__()
        if (groups, base_width, dilation) != (1, 64, 1):
            raise ValueError(
                "BasicBlock has groups = 1, base_width = 64 and dilation = 1, got "
                f"groups = {groups}, base_width = {base_width}, dilation = {dilation}"
            )
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = square_convolution(inplanes, planes, 3, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = square_convolution(planes, planes, 3)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def values(self, x):
        x = shared(self, x)
        out = call(self.relu, conv_norm(x, self.conv1, self.bn1))
        out = conv_norm(out, self.conv2, self.bn2)
        shortcut = x if self.downsample is None else call(self.downsample, x)
        return call(self.relu, chain.add(out, shortcut))


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: torchvision's Bottleneck (ResNet, ResNeXt, Wide ResNet).

    The stride is in the 3x3 convolution. Source: He et al. 2016a.

    Args:
        inplanes: input channels. planes: a quarter of the output's.
        stride, groups, dilation: of the 3x3 convolution. base_width: its channels per group, were planes 64.
        downsample: module on the shortcut, which gives it the output's shape; None for the input itself.
        norm_layer: makes a batch norm of so many channels; None for torch.nn.BatchNorm2d.
    """

    expansion = 4

    def __init__(
        self, inplanes, planes, stride=1, downsample=None, groups=1, base_width=64, dilation=1, norm_layer=None
    ):  # fmt: skip
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64)) * groups
        self.conv1 = square_convolution(inplanes, width, 1)
        self.bn1 = norm_layer(width)
        self.conv2 = square_convolution(width, width, 3, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = square_convolution(width, planes * self.expansion, 1)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def values(self, x):
        x = shared(self, x)
        out = call(self.relu, conv_norm(x, self.conv1, self.bn1))
        out = call(self.relu, conv_norm(out, self.conv2, self.bn2))
        out = conv_norm(out, self.conv3, self.bn3)
        shortcut = x if self.downsample is None else call(self.downsample, x)
        return call(self.relu, chain.add(out, shortcut))


class PreActBlock(Block):
    """Batch norm and ReLU before each of two 3x3 convolutions, a shortcut around all. Source: He et al. 2016b.

    Args:
        inplanes, planes: channels of input and output.
        stride: of the first convolution.
        downsample: module on the shortcut, None for the input itself. It reads what the first convolution reads, the
            activation, as the paper has it for the first block of a stage.
        norm_layer: makes a batch norm of so many channels; None for torch.nn.BatchNorm2d.
        dropout: probability of dropping what the second convolution reads, as in wide residual networks (Zagoruyko and
            Komodakis 2016).
    """

    expansion = 1

    def __init__(self, inplanes, planes, stride=1, downsample=None, norm_layer=None, dropout=0.0):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        self.bn1 = norm_layer(inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = square_convolution(inplanes, planes, 3, stride)
        self.bn2 = norm_layer(planes)
        self.dropout = nn.Identity() if dropout == 0 else Dropout(dropout)
        self.conv2 = square_convolution(planes, planes, 3)
        self.downsample = downsample
        self.stride = stride

    def values(self, x):
        # its first reader is a batch norm, which needs the tensor
        out = call(self.relu, call(self.bn1, x))
        shortcut = x if self.downsample is None else call(self.downsample, out)
        out = call(self.relu, conv_norm(out, self.conv1, self.bn2))
        out = call(self.conv2, call(self.dropout, out))
        return chain.add(shared(self, out), shortcut)


class PreActBottleneck(Block):
    """Batch norm and ReLU before each of a 1x1, a 3x3 and a 1x1 convolution, a shortcut around all; timm's keys.

    The stride is in the 3x3 convolution. Source: He et al. 2016b, which has it in the first 1x1.

    Args:
        inplanes: input channels. planes: a quarter of the output's.
        stride, downsample, norm_layer: as of PreActBlock.
    """

    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None, norm_layer=None):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        self.downsample = downsample
        self.norm1 = norm_layer(inplanes)
        self.conv1 = square_convolution(inplanes, planes, 1)
        self.norm2 = norm_layer(planes)
        self.conv2 = square_convolution(planes, planes, 3, stride)
        self.norm3 = norm_layer(planes)
        self.conv3 = square_convolution(planes, planes * self.expansion, 1)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride

    def values(self, x):
        out = call(self.relu, call(self.norm1, x))
        shortcut = x if self.downsample is None else call(self.downsample, out)
        out = call(self.relu, conv_norm(out, self.conv1, self.norm2))
        out = call(self.relu, conv_norm(out, self.conv2, self.norm3))
        out = call(self.conv3, out)
        return chain.add(shared(self, out), shortcut)
