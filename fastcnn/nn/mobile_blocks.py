"""Blocks of the mobile networks on the fused chain, as those of blocks.py: MobileNet v1, v2 and v3, EfficientNet.

A depthwise convolution reads its input's activation on load, squeeze-excite multiplies with its gate, and stochastic
depth with a factor per image, without the branch's being stored.
"""

from torch import nn

from fastcnn import chain
from fastcnn.nn.activation import Hardswish, ReLU, ReLU6, Sigmoid, SiLU
from fastcnn.nn.blocks import Block, ConvBNAct, call, conv_norm, is_plain, shared
from fastcnn.nn.dropout import StochasticDepth
from fastcnn.nn.pooling import AdaptiveAvgPool2d

_SQUEEZED = {nn.ReLU: "relu", nn.SiLU: "silu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish"}
_SQUEEZED |= {ReLU: "relu", SiLU: "silu", ReLU6: "relu6", Hardswish: "hardswish"}
_GATES = {nn.Sigmoid: "sigmoid", Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid"}


def _check_stride(stride):
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride!r}")


class SqueezeExcite(Block):
    """z * g, where g = scale_activation(fc2(activation(fc1(mean of z over the image)))) is one number per image and
    channel: torchvision.ops.SqueezeExcitation, with its keys. Source: Hu, Shen, Albanie, Sun and Wu 2018.

    Args:
        input_channels: of z and g.
        squeeze_channels: between fc1 and fc2, which are 1x1 convolutions with bias.
        activation, scale_activation: classes or functions that make the modules.
    """

    def __init__(self, input_channels, squeeze_channels, activation=nn.ReLU, scale_activation=nn.Sigmoid):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def values(self, x):
        kind, gate_kind = _SQUEEZED.get(type(self.activation)), _GATES.get(type(self.scale_activation))
        pools = type(self.avgpool) in (nn.AdaptiveAvgPool2d, AdaptiveAvgPool2d)
        if kind and gate_kind and pools and all(is_plain(layer) for layer in self.children()):
            return chain.squeeze_excite(x, self.fc1, self.fc2, kind, gate_kind)
        x = shared(self, x)
        gate = call(self.avgpool, x)
        for layer in (self.fc1, self.activation, self.fc2, self.scale_activation):
            gate = layer(gate)
        return chain.multiply(x, gate)


def _dropped(module, x):
    """Stochastic depth of a branch; drawn as torchvision and timm draw it."""
    if type(module) is not StochasticDepth or module.mode != "row" or not is_plain(module):
        return module(chain.materialize(x))
    if not module.training or module.p == 0:
        return x
    return chain.multiply(x, chain.row_noise(x, module.p))


class DepthwiseSeparable(Block):
    """Depthwise 3x3 and 1x1 convolution, each with batch norm and activation; timm's keys. Source: Howard et al. 2017.

    Args:
        inputs, outputs: channels. stride: of the depthwise convolution.
        activation_layer: class or function that makes the activation of both.
        norm_layer: makes a batch norm of so many channels.
    """

    def __init__(self, inputs, outputs, stride=1, activation_layer=nn.ReLU6, norm_layer=nn.BatchNorm2d):
        super().__init__()
        self.conv_dw = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.bn1 = norm_layer(inputs)
        self.conv_pw = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = norm_layer(outputs)
        self.act = activation_layer()

    def values(self, x):
        x = call(self.act, conv_norm(x, self.conv_dw, self.bn1))
        return call(self.act, conv_norm(x, self.conv_pw, self.bn2))


class InvertedResidual(Block):
    """1x1 convolution to more channels, depthwise 3x3, linear 1x1 to few, and a shortcut: torchvision's block of
    MobileNetV2. Source: Sandler et al. 2018.

    Args:
        inp, oup: channels of input and output.
        stride: 1 or 2, of the depthwise convolution. Stride 1 with as many outputs as inputs has the shortcut.
        expand_ratio: channels of the depthwise convolution by those of the input; 1 leaves the first 1x1 out.
        norm_layer: makes a batch norm of so many channels; None for torch.nn.BatchNorm2d.
    """

    def __init__(self, inp, oup, stride, expand_ratio, norm_layer=None):
        super().__init__()
        _check_stride(stride)
        norm_layer = norm_layer or nn.BatchNorm2d
        expanded = round(inp * expand_ratio)
        layers = []
        if expand_ratio != 1:
            layers.append(ConvBNAct(inp, expanded, 1, norm_layer=norm_layer, activation_layer=nn.ReLU6))
        layers += [
            ConvBNAct(expanded, expanded, 3, stride, groups=expanded, norm_layer=norm_layer, activation_layer=nn.ReLU6),
            nn.Conv2d(expanded, oup, 1, bias=False),
            norm_layer(oup),
        ]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and inp == oup
        self.out_channels = oup

    def values(self, x):
        if not self.use_res_connect:
            return call(self.conv, x)
        x = shared(self, x)
        return chain.add(call(self.conv, x), x)


class MBConv(Block):
    """An inverted residual with squeeze-excite and stochastic depth: torchvision's block of MobileNetV3 (where it is
    called InvertedResidual) and EfficientNet. Sources: Howard et al. 2019; Tan and Le 2019.

    Args:
        inputs, expanded, outputs: channels of the input, the depthwise convolution and the output; expanded equal to
            inputs leaves the first 1x1 convolution out.
        kernel_size, stride: of the depthwise convolution. Stride 1 with as many outputs as inputs has the shortcut.
        squeeze_excite: function that makes a SqueezeExcite of so many channels, or None.
        activation_layer: class or function that makes the activation after the first two convolutions.
        p: probability that training drops an image's branch.
        norm_layer: makes a batch norm of so many channels; None for torch.nn.BatchNorm2d.
    """

    def __init__(
        self, inputs, expanded, outputs, kernel_size=3, stride=1, squeeze_excite=None, activation_layer=nn.SiLU, p=0.0,
        norm_layer=None,
    ):  # fmt: skip
        super().__init__()
        _check_stride(stride)
        if not 0 <= p <= 1:
            raise ValueError(f"p must be between 0 and 1, got {p!r}")
        layers = dict(norm_layer=norm_layer or nn.BatchNorm2d, activation_layer=activation_layer)
        block = [] if expanded == inputs else [ConvBNAct(inputs, expanded, 1, **layers)]
        block.append(ConvBNAct(expanded, expanded, kernel_size, stride, groups=expanded, **layers))
        if squeeze_excite is not None:
            block.append(squeeze_excite(expanded))
        block.append(ConvBNAct(expanded, outputs, 1, **(layers | dict(activation_layer=None))))
        self.block = nn.Sequential(*block)
        self.use_res_connect = stride == 1 and inputs == outputs
        self.stochastic_depth = StochasticDepth(p)
        self.out_channels = outputs

    def values(self, x):
        if not self.use_res_connect:
            return call(self.block, x)
        x = shared(self, x)
        return chain.add(_dropped(self.stochastic_depth, call(self.block, x)), x)
