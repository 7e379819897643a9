"""Blocks of convolutional networks on the fused chain (fastcnn.chain): no normalised activation is stored.

Parameters, initialisation and state_dict keys are those of the same block in plain PyTorch, to which it is numerically
equal in every mode; the layers in it are torch's modules (or ours), so whatever converts, shares or freezes them works.
A layer that the chain does not know, or that has hooks or a forward of its own, is called as it is.

    block(x)           tensor in, tensor out
    block.values(x)    tensor or value of the chain in, value out: the next block reads it without its being stored

A block's `values` is written with these: `shared(self, x)` for what several layers read, `conv_norm(x, conv, bn)`,
`conv_act(x, conv, act)`, `call(module, x)` for any module, `in_turn(modules, x)`, and the functions of fastcnn.chain
(`add`, `cat`, `mean`, ...).
"""

import torch
from torch import nn

from fastcnn import chain
from fastcnn.nn.activation import GELU, Hardswish, LeakyReLU, ReLU, ReLU6, Sigmoid, SiLU, Tanh
from fastcnn.nn.conv import Conv2d
from fastcnn.nn.dropout import Dropout
from fastcnn.nn.norms import BatchNorm2d, SyncBatchNorm
from fastcnn.nn.pooling import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d

_CONVOLUTIONS = {nn.Conv2d, Conv2d}
_NORMS = {nn.BatchNorm2d, BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm}
_ACTIVATIONS = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.LeakyReLU: "leaky_relu", nn.SiLU: "silu", nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh", nn.Hardswish: "hardswish", nn.GELU: "gelu",
    ReLU: "relu", ReLU6: "relu6", LeakyReLU: "leaky_relu", SiLU: "silu", Sigmoid: "sigmoid",
    Tanh: "tanh", Hardswish: "hardswish", GELU: "gelu",
}  # fmt: skip


# in a module: true if it was asked to run by itself; false once `fastcnn.convert` has fused it after all
UNFUSED = "_fastcnn_unfused"


def unfuse(model):
    """Have the blocks of a model call their layers one by one, as PyTorch would, in place; returns the model."""
    for module in model.modules():
        module.__dict__[UNFUSED] = True
    return model


def is_plain(module):
    """Whether a call of the module runs its class's forward and nothing else, and need not be seen by torch.export."""
    return not (
        module.__dict__.get(UNFUSED)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or nn.modules.module._has_any_global_hook()
        or torch.compiler.is_exporting()
    )


def _is_fusible_pair(conv, bn):
    return (
        type(conv) in _CONVOLUTIONS
        and type(bn) in _NORMS
        and conv.padding_mode == "zeros"
        and conv.out_channels == bn.num_features
        and is_plain(conv)
        and is_plain(bn)
    )


def conv_norm(x, conv, bn, out=None):
    """bn(conv(x)); the chain's convolution writes into the fastcnn.ops.concatenate.Slot `out`."""
    if _is_fusible_pair(conv, bn):
        return chain.conv_batch_norm(x, conv, bn, out)
    return call(bn, call(conv, x))


def conv_act(x, conv, act, out=None):
    """act(conv(x)), in training a value: whoever reads it applies the activation; `out` as of conv_norm."""
    in_slot = out is not None and type(conv) in _CONVOLUTIONS and conv.padding_mode == "zeros" and is_plain(conv)
    x = shared(conv, chain.conv(x, conv, out=out) if in_slot else call(conv, x))
    return act(x) if isinstance(x, torch.Tensor) or not is_plain(act) else _activation(act, x)


def _activation(module, x):
    kind = _ACTIVATIONS[type(module)]
    if kind == "leaky_relu":
        return chain.activate(x, kind, module.negative_slope)
    return chain.activate(x, "gelu_tanh" if kind == "gelu" and module.approximate == "tanh" else kind)


def _pooled(module, x):
    kind = type(module)
    if kind in (nn.MaxPool2d, MaxPool2d):
        window = module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode
        return chain.max_pool2d(x, *window)
    if kind in (nn.AvgPool2d, AvgPool2d):
        window = module.kernel_size, module.stride, module.padding, module.ceil_mode
        return chain.avg_pool2d(x, *window, module.count_include_pad, module.divisor_override)
    return chain.adaptive_avg_pool2d(x, module.output_size)


def call(module, x, *more):
    """module(x), where both may be values; a block gets what else it takes, too."""
    kind = type(module)
    if not is_plain(module):
        return module(*(v if isinstance(v, list) else chain.materialize(v) for v in (x, *more)))
    if isinstance(module, Block):
        return module.values(x, *more)
    if kind is nn.Sequential:
        return in_turn(list(module), x)
    if kind is nn.Identity or (kind in (nn.Dropout, Dropout) and not (module.training and module.p > 0)):
        return x
    if isinstance(x, torch.Tensor) and x.dim() != 4:  # nothing for the chain to do
        return module(x)
    if kind in _ACTIVATIONS:
        return _activation(module, x)
    if kind in _NORMS:
        return chain.batch_norm(x, module)
    if kind in _CONVOLUTIONS and module.padding_mode == "zeros":
        return chain.conv(x, module)
    pools = (nn.MaxPool2d, MaxPool2d, nn.AvgPool2d, AvgPool2d, nn.AdaptiveAvgPool2d, AdaptiveAvgPool2d)
    if kind in pools and not getattr(module, "return_indices", False):
        return _pooled(module, x)
    return module(chain.materialize(x))


def in_turn(modules, x):
    """The modules one after the other, each convolution together with a batch norm or an activation that follows."""
    while modules:
        if len(modules) > 1 and _is_fusible_pair(*modules[:2]):
            x = chain.conv_batch_norm(x, *modules[:2])
            modules = modules[2:]
        elif len(modules) > 1 and type(modules[0]) in _CONVOLUTIONS and type(modules[1]) in _ACTIVATIONS:
            x = conv_act(x, *modules[:2])
            modules = modules[2:]
        else:
            x = call(modules[0], x)
            modules = modules[1:]
    return x


def shared(block, x):
    """The tensor that several layers of a block read, as a value: their gradients are added where they are written."""
    if block.__dict__.get(UNFUSED) or torch.compiler.is_exporting():
        return x
    if not isinstance(x, torch.Tensor) or not torch.is_grad_enabled() or not x.requires_grad or x.dim() != 4:
        return x
    return x if torch._C._are_functorch_transforms_active() or x.numel() == 0 else chain.Pending(x, None, None)


class Block(nn.Module):
    """A module that takes and returns values of fastcnn.chain: a subclass defines `values`.

    Under torch.compile a call is one graph break, unless `unfuse` was called; torch.export sees the layers one by one.
    """

    def values(self, x):
        """The output for a tensor or value (some blocks take more than one), as a value or tensor."""
        raise NotImplementedError(f"{type(self).__name__} does not define values")

    def forward(self, *inputs):
        if not self.__dict__.get(UNFUSED) and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return _computed_uncompiled(self, *inputs)
        return chain.materialize(self.values(*inputs))


@torch._disable_dynamo
def _computed_uncompiled(block, *inputs):
    return chain.materialize(block.values(*inputs))


class ChainSequential(Block, nn.Sequential):
    """torch.nn.Sequential whose modules hand each other values: blocks, Conv2d with BatchNorm2d, activations, pools.

    Any other module gets a tensor.
    """

    def values(self, x):
        return in_turn(list(self), x)


class ConvBNAct(ChainSequential):
    """Convolution, batch norm, activation: torchvision.ops.Conv2dNormActivation, with its keys "0" and "1".

    Args:
        padding: None keeps the image's size at stride 1.
        norm_layer, activation_layer: classes or functions that make the module; activation_layer None for none.
        The others as of torch.nn.Conv2d, which has no bias.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size=3, stride=1, padding=None, groups=1, norm_layer=nn.BatchNorm2d,
        activation_layer=nn.ReLU, dilation=1,
    ):  # fmt: skip
        if padding is None:
            sizes, steps = (v if isinstance(v, (tuple, list)) else (v, v) for v in (kernel_size, dilation))
            padding = tuple((size - 1) // 2 * step for size, step in zip(sizes, steps, strict=True))
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=False
        )
        layers = [conv, norm_layer(out_channels)]
        if activation_layer is not None:
            layers.append(activation_layer())
        super().__init__(*layers)
        self.out_channels = out_channels


def _conv(inputs, outputs, size, stride=1, groups=1, dilation=1):
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
        self.conv1 = _conv(inplanes, planes, 3, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(planes, planes, 3)
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
        self.conv1 = _conv(inplanes, width, 1)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv(width, width, 3, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = _conv(width, planes * self.expansion, 1)
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
        self.conv1 = _conv(inplanes, planes, 3, stride)
        self.bn2 = norm_layer(planes)
        self.dropout = nn.Identity() if dropout == 0 else Dropout(dropout)
        self.conv2 = _conv(planes, planes, 3)
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
        self.conv1 = _conv(inplanes, planes, 1)
        self.norm2 = norm_layer(planes)
        self.conv2 = _conv(planes, planes, 3, stride)
        self.norm3 = norm_layer(planes)
        self.conv3 = _conv(planes, planes * self.expansion, 1)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride

    def values(self, x):
        out = call(self.relu, call(self.norm1, x))
        shortcut = x if self.downsample is None else call(self.downsample, out)
        out = call(self.relu, conv_norm(out, self.conv1, self.norm2))
        out = call(self.relu, conv_norm(out, self.conv2, self.norm3))
        out = call(self.conv3, out)
        return chain.add(shared(self, out), shortcut)


class DenseLayer(Block):
    """Batch norm, ReLU, 1x1 and again batch norm, ReLU, 3x3: torchvision's _DenseLayer. Source: Huang et al. 2017.

    Args:
        num_input_features: input channels.
        growth_rate: output channels.
        bn_size: the 1x1 convolution has bn_size * growth_rate outputs.
        drop_rate: probability that training drops a number of the output.
    """

    def __init__(self, num_input_features, growth_rate, bn_size=4, drop_rate=0.0):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = _conv(num_input_features, bn_size * growth_rate, 1)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = _conv(bn_size * growth_rate, growth_rate, 3)
        self.dropout = Dropout(drop_rate)

    def values(self, x):
        """The layer's own channels for a tensor or value, or for a list of them side by side."""
        x = chain.cat(x) if isinstance(x, (list, tuple)) else x
        out = call(self.relu1, call(self.norm1, x))
        out = call(self.relu2, conv_norm(out, self.conv1, self.norm2))
        return call(self.dropout, call(self.conv2, out))


class DenseLayerWithoutBottleneck(Block):
    """Batch norm, ReLU and 3x3: the dense layer before the paper puts a 1x1 convolution into it.

    Args:
        num_input_features: input channels.
        growth_rate: output channels.
        drop_rate: probability that training drops a number of the output.
    """

    def __init__(self, num_input_features, growth_rate, drop_rate=0.0):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = _conv(num_input_features, growth_rate, 3)
        self.dropout = Dropout(drop_rate)

    def values(self, x):
        """The layer's own channels for a tensor or value, or for a list of them side by side."""
        x = chain.cat(x) if isinstance(x, (list, tuple)) else x
        return call(self.dropout, call(self.conv1, call(self.relu1, call(self.norm1, x))))


class DenseBlock(Block):
    """Dense layers, each of which reads the block's input and all layers before it: torchvision's _DenseBlock.

    Args:
        num_layers: how many.
        num_input_features, growth_rate, drop_rate: as of DenseLayer; every layer has growth_rate more inputs.
        bn_size: as of DenseLayer; None for layers without the 1x1 convolution.

    Returns of a call: input and all layers' outputs along the channels.
    """

    def __init__(self, num_layers, num_input_features, bn_size, growth_rate, drop_rate=0.0):
        super().__init__()
        for i in range(num_layers):
            inputs = num_input_features + i * growth_rate
            if bn_size is None:
                layer = DenseLayerWithoutBottleneck(inputs, growth_rate, drop_rate)
            else:
                layer = DenseLayer(inputs, growth_rate, bn_size, drop_rate)
            self.add_module(f"denselayer{i + 1}", layer)

    def values(self, x):
        layers = list(self.children())
        if all(_is_known_dense_layer(layer) for layer in layers):
            return chain.dense_block(x, [(layer.norm1, layer.conv1, layer.norm2, layer.conv2) for layer in layers])
        features = [chain.materialize(x)]
        for layer in layers:
            features.append(chain.materialize(call(layer, features)))
        return chain.cat(features)


def _is_known_dense_layer(layer):
    parts = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")
    if type(layer) is not DenseLayer or not all(is_plain(m) for m in (layer, *layer.children())):
        return False
    if type(layer.dropout) not in (nn.Dropout, Dropout) or (layer.dropout.training and layer.dropout.p > 0):
        return False
    kinds = [type(layer.get_submodule(name)) for name in parts]
    relus = {nn.ReLU, ReLU}
    sets = (_NORMS, relus, _CONVOLUTIONS, _NORMS, relus, _CONVOLUTIONS)
    return all(kind in known for kind, known in zip(kinds, sets, strict=True))
