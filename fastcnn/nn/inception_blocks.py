"""Blocks of the Inception networks on the fused chain, as those of blocks.py: branches that read one input.

The branches' last convolutions write their raw outputs into one memory, so that the concatenation of the branches
copies nothing, and is read with its batch norms and activations as if one convolution had made it.
"""

from torch import nn

from fastcnn import chain
from fastcnn.nn.blocks import Block, ChainSequential, call, conv_norm, in_turn, is_plain, shared
from fastcnn.ops import pool_again
from fastcnn.ops.concatenate import Buffer


class BasicConv2d(Block):
    """Convolution without bias, batch norm, ReLU, with torchvision's and timm's keys of Inception, "conv" and "bn".

    Args:
        inputs, outputs: channels.
        kernel_size, stride: of the convolution, int or (height, width).
        padding: None keeps the image's size at stride 1, and is 0 at other strides.
    """

    def __init__(self, inputs, outputs, kernel_size=1, stride=1, padding=None):
        super().__init__()
        if padding is None:
            sizes = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
            padding = tuple(size // 2 if stride == 1 else 0 for size in sizes)
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)

    def values(self, x, out=None):
        """The output; its raw part in the fastcnn.ops.concatenate.Slot `out` where the chain computes it."""
        return call(self.relu, conv_norm(x, self.conv, self.bn, out))


class Convolutions:
    """Makes the convolutions of a network whose channels are all multiplied by width_mult.

    Raises:
        ValueError: width_mult is no positive multiple of 1/16: channels that are put together must remain whole.
    """

    def __init__(self, width_mult=1.0):
        if not isinstance(width_mult, (int, float)) or width_mult <= 0 or width_mult * 16 % 1:
            raise ValueError(f"width_mult must be a positive multiple of 1/16, got {width_mult!r}")
        self.width_mult = width_mult

    def channels(self, count):
        """So many channels, multiplied."""
        return int(count * self.width_mult)

    def one(self, inputs, outputs, *options, **more):
        """A BasicConv2d."""
        return BasicConv2d(self.channels(inputs), self.channels(outputs), *options, **more)

    def chain(self, inputs, *layers):
        """ChainSequential of BasicConv2d one after the other, each (outputs, kernel_size, ...)."""
        return ChainSequential(*self.named("", inputs, *layers).values())

    def named(self, name, inputs, *layers):
        """{name_1: BasicConv2d, name_2: ...} one after the other, each (outputs, kernel_size, ...)."""
        made = {}
        for number, (outputs, *options) in enumerate(layers, 1):
            made[f"{name}_{number}"] = self.one(inputs, outputs, *options)
            inputs = outputs
        return made


class Branches(Block):
    """Branches of one input, their outputs side by side along the channels: what Inception modules are.

    Args:
        branches: dicts {name: module} of one branch each: the modules that run in turn, which become this module's
            children of these names. Where a dict stands for the last of them, its modules all read what comes before.

    Shape: [N, C, H, W] -> [N, sum of the outputs' channels, H', W'].
    """

    def __init__(self, *branches):
        super().__init__()
        self.order = []
        for branch in branches:
            names = []
            for name, module in branch.items():
                forks = module if isinstance(module, dict) else {name: module}
                for inner, child in forks.items():
                    self.add_module(inner, child)
                names.append(tuple(forks))
            self.order.append(names)

    def values(self, x):
        value = shared(self, x)
        # a pool that backward makes again is known by its tensor alone
        x = x if value is not x and pool_again.recipe_of(x)[0] is not None else value
        slots = _slots([self.get_submodule(name) for *_, last in self.order for name in last])
        parts = []
        for *first, last in self.order:
            value = in_turn([self.get_submodule(name) for (name,) in first], x)
            value = shared(self, value) if len(last) > 1 else value
            parts += [_into(slots.pop(0), self.get_submodule(name), value) for name in last]
        return chain.cat(parts)


def _slots(ends):
    """Where in one memory each of the modules that end the branches is to write; of Nones if one does not compute."""
    channels = [_channels(end) for end in ends]
    if None in channels:
        return [None] * len(ends)
    buffer = Buffer(sum(channels))
    return [buffer.slot(sum(channels[:i])) for i in range(len(ends))]


def _channels(end):
    while is_plain(end) and isinstance(end, ChainSequential):
        end = end[-1]
    return end.conv.out_channels if is_plain(end) and isinstance(end, BasicConv2d) else None


def _into(slot, module, x):
    """call(module, x), whose last convolution writes into the slot."""
    if slot is None:
        return call(module, x)
    if isinstance(module, ChainSequential):
        *first, last = module
        return _into(slot, last, in_turn(first, x))
    return module.values(x, slot)
