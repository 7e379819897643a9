"""The cells of NASNet-A on the fused chain, as the blocks of blocks.py; timm's keys.

A depthwise convolution applies the ReLU before it while it reads. Every cell applies it once to what several read.
Source: Zoph, Vasudevan, Shlens and Le 2018, figure 4.
"""

from collections import OrderedDict
from functools import partial

from torch import nn
from torch.nn import functional as F

from fastcnn import chain
from fastcnn.nn.blocks import Block, ChainSequential, call, conv_norm, is_plain, shared

_batch_norm = partial(nn.BatchNorm2d, eps=0.001)


class SameConv2d(nn.Conv2d):
    """Conv2d with a stride of 2, an odd filter, and zeros around the image such that every second pixel is a centre.

    The last pixel is a centre, so an image of even size gets one row and column less at the top and left ("same"
    padding of TensorFlow). Its attribute padding is 0, as in timm.
    """

    def forward(self, x):
        most = self.kernel_size[0] // 2
        top, left = (most - 1 + size % 2 for size in x.shape[2:])
        if top == left == most:
            return F.conv2d(x, self.weight, self.bias, self.stride, most, groups=self.groups)
        return super().forward(F.pad(x, (left, most, top, most)))


def _conv(inputs, outputs, size=1, stride=1, groups=1):
    kind, padding = (nn.Conv2d, size // 2) if stride == 1 else (SameConv2d, 0)
    return kind(inputs, outputs, size, stride, padding, groups=groups, bias=False)


def _depthwise(x, conv):
    # the depthwise convolution applies the activation while it reads, but where it must pad one side more
    size, stride = conv.kernel_size[0], conv.stride[0]
    if type(conv) is SameConv2d and is_plain(conv) and all(n % stride for n in chain.likeness(x).shape[2:]):
        return chain.conv(x, conv, padding=size // 2)
    return call(conv, x)


def _separable(inputs, outputs, size, stride=1):
    depthwise, pointwise = _conv(inputs, inputs, size, stride, inputs), _conv(inputs, outputs)
    return nn.Sequential(OrderedDict(depthwise_conv2d=depthwise, pointwise_conv2d=pointwise))


class Separable(Block):
    """Depthwise and 1x1 convolution with batch norm, ReLU, and the same again; timm's keys.

    The cell applies the ReLU before it, once for all that read it.

    Args:
        inputs, outputs: channels. size: of the depthwise filters. stride: of the first of them, 1 or 2.
    """

    def __init__(self, inputs, outputs, size, stride=1):
        super().__init__()
        self.separable_1 = _separable(inputs, outputs, size, stride)
        self.bn_sep_1 = _batch_norm(outputs)
        self.act_2 = nn.ReLU()
        self.separable_2 = _separable(outputs, outputs, size)
        self.bn_sep_2 = _batch_norm(outputs)

    def values(self, x):
        x = _depthwise(x, self.separable_1.depthwise_conv2d)
        x = call(self.act_2, conv_norm(x, self.separable_1.pointwise_conv2d, self.bn_sep_1))
        x = _depthwise(x, self.separable_2.depthwise_conv2d)
        return conv_norm(x, self.separable_2.pointwise_conv2d, self.bn_sep_2)


def _act_conv_bn(inputs, outputs):
    return ChainSequential(OrderedDict(act=nn.ReLU(), conv=_conv(inputs, outputs), bn=_batch_norm(outputs)))


class Cell(Block):
    """What the two cells share: their two inputs, brought to one size and number of channels.

    Args:
        inputs: channels of the last cell's output.
        previous: channels of the output of the cell before that; None if it is read as it is.
        channels: that everything in the cell has.
        larger: whether that output has twice the height and width; it is then halved: every second pixel through one
            1x1 convolution, those between through another. Else it goes through a 1x1 convolution.

    Shape: x [N, inputs, H, W], previous [N, previous, H, W] or larger -> [N, outputs, H', W'].
    """

    def __init__(self, inputs, previous, channels, larger):
        super().__init__()
        if previous is not None and not larger:
            self.conv_prev_1x1 = _act_conv_bn(previous, channels)
        self.conv_1x1 = _act_conv_bn(inputs, channels)
        self.act = nn.ReLU()
        self.larger, self.as_it_is = larger, previous is None
        if larger:
            pool = nn.AvgPool2d(1, 2)  # takes every second pixel
            half = _conv(previous, channels // 2)
            self.path_1 = ChainSequential(OrderedDict(avgpool=pool, conv=half))
            self.path_2 = ChainSequential(OrderedDict(conv=_conv(previous, channels // 2)))
            self.final_path_bn = _batch_norm(channels)
        self.mean = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def adjusted(self, previous):
        """The output of the cell before the last as this cell reads it."""
        previous = shared(self, previous)
        if not self.larger:
            return previous if self.as_it_is else call(self.conv_prev_1x1, previous)
        rows, columns = chain.likeness(previous).shape[2:]
        even = call(self.path_1, call(self.act, previous))
        odd = call(self.path_2, call(self.act, _between(previous)))
        # zeros where the image ends with a pixel of the even ones
        odd = F.pad(chain.materialize(odd), (0, columns % 2, 0, rows % 2))
        return call(self.final_path_bn, chain.cat([chain.materialize(even), odd]))


def _between(x):
    # the second pixel and from there every second
    if isinstance(x, chain.Pending):
        return x.now_with(raw=x.raw[:, :, 1::2, 1::2])
    return chain.materialize(x)[:, :, 1::2, 1::2]


class NormalCell(Cell):
    """NASNet-A's normal cell: six times as many channels, the same size.

    With h the last cell's output and p the one before (figure 4 of the paper), the six side by side:

        p
        separable 5x5 of h     +  separable 3x3 of p
        separable 5x5 of p     +  separable 3x3 of p
        mean 3x3 of h          +  p
        mean 3x3 of p          +  mean 3x3 of p
        separable 3x3 of h     +  h
    """

    def __init__(self, inputs, previous, channels, larger=False):
        super().__init__(inputs, previous, channels, larger)
        self.comb_iter_0_left = Separable(channels, channels, 5)
        self.comb_iter_0_right = Separable(channels, channels, 3)
        self.comb_iter_1_left = Separable(channels, channels, 5)
        self.comb_iter_1_right = Separable(channels, channels, 3)
        self.comb_iter_4_left = Separable(channels, channels, 3)
        self.out_channels = 6 * channels

    def values(self, x, previous):
        p, h = self.adjusted(previous), call(self.conv_1x1, shared(self, x))
        read_p, read_h = call(self.act, p), call(self.act, h)
        p_mean = call(self.mean, p)
        parts = [
            p,
            chain.add(call(self.comb_iter_0_left, read_h), call(self.comb_iter_0_right, read_p)),
            chain.add(call(self.comb_iter_1_left, read_p), call(self.comb_iter_1_right, read_p)),
            chain.add(p, call(self.mean, h)),
            chain.add(p_mean, p_mean),
            chain.add(call(self.comb_iter_4_left, read_h), h),
        ]
        return chain.cat(parts)


class ReductionCell(Cell):
    """NASNet-A's reduction cell: four times as many channels, half the size.

    With h the last cell's output and p the one before (figure 4 of the paper), b to e side by side:

        a  separable 5x5, stride 2, of h  +  separable 7x7, stride 2, of p
        b  maximum 3x3, stride 2, of h    +  separable 7x7, stride 2, of p
        c  mean 3x3, stride 2, of h       +  separable 5x5, stride 2, of p
        d  mean 3x3 of a                  +  b
        e  separable 3x3 of a             +  maximum 3x3, stride 2, of h

    The mean with a stride is timm's: beyond the image there are zeros, which count. In the first cell of the stem p is
    x, as it is (previous=None).
    """

    def __init__(self, inputs, previous, channels, larger=False):
        super().__init__(inputs, previous, channels, larger)
        right = inputs if previous is None else channels
        self.comb_iter_0_left = Separable(channels, channels, 5, 2)
        self.comb_iter_0_right = Separable(right, channels, 7, 2)
        self.comb_iter_1_right = Separable(right, channels, 7, 2)
        self.comb_iter_2_right = Separable(right, channels, 5, 2)
        self.comb_iter_4_left = Separable(channels, channels, 3)
        self.out_channels = 4 * channels

    def values(self, x, previous):
        p, h = self.adjusted(previous), call(self.conv_1x1, shared(self, x))
        p, read_h = call(self.act, p), call(self.act, h)
        window = 3, 2, [n % 2 for n in chain.likeness(h).shape[2:]]
        most = chain.max_pool2d(h, *window, ceil_mode=True)
        mean = chain.avg_pool2d(h, *window, ceil_mode=True, divisor_override=9)
        a = chain.add(call(self.comb_iter_0_left, read_h), call(self.comb_iter_0_right, p))
        a = shared(self, chain.materialize(a))
        b = chain.materialize(chain.add(most, call(self.comb_iter_1_right, p)))
        c = chain.add(mean, call(self.comb_iter_2_right, p))
        d = chain.add(call(self.mean, a), b)
        e = chain.add(call(self.comb_iter_4_left, call(self.act, a)), most)
        return chain.cat([b, c, d, e])
