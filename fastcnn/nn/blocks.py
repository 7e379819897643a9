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

CONVOLUTIONS = {nn.Conv2d, Conv2d}
NORMS = {nn.BatchNorm2d, BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm}
ACTIVATIONS = {
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
        type(conv) in CONVOLUTIONS
        and type(bn) in NORMS
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
    in_slot = out is not None and type(conv) in CONVOLUTIONS and conv.padding_mode == "zeros" and is_plain(conv)
    x = shared(conv, chain.conv(x, conv, out=out) if in_slot else call(conv, x))
    return act(x) if isinstance(x, torch.Tensor) or not is_plain(act) else _activation(act, x)


def _activation(module, x):
    kind = ACTIVATIONS[type(module)]
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
    if kind in ACTIVATIONS:
        return _activation(module, x)
    if kind in NORMS:
        return chain.batch_norm(x, module)
    if kind in CONVOLUTIONS and module.padding_mode == "zeros":
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
        elif len(modules) > 1 and type(modules[0]) in CONVOLUTIONS and type(modules[1]) in ACTIVATIONS:
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
