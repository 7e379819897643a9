"""NASNet-A (Zoph, Vasudevan, Shlens and Le: Learning transferable architectures for scalable image recognition, 2018).

A controller searched on CIFAR-10 for the best two cells; networks of any size stack them. The parameter names are those
of timm's nasnetalarge, whose weights load unchanged.
"""

from collections import OrderedDict
from functools import partial

from torch.nn import functional as F

from fastcnn import chain, functional, nn
from fastcnn.models.network import Entry, Network
from fastcnn.nn.blocks import Block, call, conv_norm, is_plain, shared

CELLS = 6  # the names of a stage's cells start at a multiple of it
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
            return functional.conv2d(x, self.weight, self.bias, self.stride, most, groups=self.groups)
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
    return nn.ChainSequential(OrderedDict(act=nn.ReLU(), conv=_conv(inputs, outputs), bn=_batch_norm(outputs)))


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
            self.path_1 = nn.ChainSequential(OrderedDict(avgpool=pool, conv=half))
            self.path_2 = nn.ChainSequential(OrderedDict(conv=_conv(previous, channels // 2)))
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


class NASNet(Network):
    """NASNet-A (6 @ 4032), timm's nasnetalarge, for images of 331x331:

                                        output
        conv0                           96x165x165   3x3, stride 2, no padding; batch norm
        cell_stem_0, cell_stem_1        168x83x83, 336x42x42   reduction cells
        cell_0 to cell_5                1008x42x42   normal cells, 168 channels in each of their parts
        reduction_cell_0                1344x21x21
        cell_6 to cell_11               2016x21x21
        reduction_cell_1                2688x11x11
        cell_12 to cell_17              4032x11x11
        last_linear                     1000         ReLU, mean over the image, one linear layer

    Every cell reads the outputs of the two cells before it. 6 is the number of normal cells of a stage, 4032 the number
    of channels before the mean. 88,753,150 parameters for 1000 classes. nasnet_mobile (4 @ 1056) has 5,289,978, with
    the names of its cells as they are in other libraries: cell_0 to 3, 6 to 9, 12 to 15; nasnet_a_cifar (6 @ 768) has
    3,328,234 for ten classes, conv0 at full size and no stem cells. In the mobile and the small network the cell after
    a reduction reads the reduction's own input, in the large one the map before that (skip_reduction). The decks: the
    best cell is searched on CIFAR-10, the architecture then transferred to ImageNet. Of the paper's training the
    auxiliary classifier and ScheduledDropPath are not here; timm has neither.

        >>> model = create_model("nasnet_mobile", num_classes=10, filters=8, stem_size=8, cells=(1, 1))
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        filters: channels in the parts of the first stage's cells, a multiple of 4; every further stage has twice as
            many.
        cells: normal cells of every stage.
        stem_size: channels of conv0.
        stem_cells: whether two reduction cells come before the first stage, and conv0 has a stride of 2.
        skip_reduction: what the cell after a reduction reads beside it: True the map before the reduction's input.
        dropout: probability before the linear layer (the paper: 0.5).

    Raises:
        ValueError: filters is no multiple of 4.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    heads = ("last_linear",)

    def __init__(
        self, num_classes=1000, in_chans=3, filters=168, cells=(6, 6, 6), stem_size=96, stem_cells=True,
        skip_reduction=True, dropout=0.0,
    ):  # fmt: skip
        super().__init__(num_classes, in_chans)
        if filters < 4 or filters % 4:
            raise ValueError(f"filters must be a positive multiple of 4, got {filters!r}")
        self.skip_reduction = skip_reduction
        stride, padding = (2, 0) if stem_cells else (1, 1)
        conv = nn.Conv2d(in_chans, stem_size, 3, stride, padding, bias=False)
        modules = OrderedDict(conv0=nn.ChainSequential(OrderedDict(conv=conv, bn=_batch_norm(stem_size))))
        stages = ["conv0"]
        previous = inputs = stem_size
        if stem_cells:
            modules["cell_stem_0"] = first = ReductionCell(stem_size, None, filters // 4)
            modules["cell_stem_1"] = second = ReductionCell(first.out_channels, stem_size, filters // 2, larger=True)
            previous, inputs = first.out_channels, second.out_channels
            stages.append("cell_stem_0")
        for stage, count in enumerate(cells):
            channels = filters * 2**stage
            if stage > 0:
                modules[f"reduction_cell_{stage - 1}"] = cell = ReductionCell(inputs, previous, channels)
                previous, inputs = previous if skip_reduction else inputs, cell.out_channels
            for i in range(count):
                name = f"cell_{stage * max(CELLS, *cells) + i}"
                larger = i == 0 and (stage > 0 or stem_cells)
                modules[name] = cell = NormalCell(inputs, previous, channels, larger)
                previous, inputs = inputs, cell.out_channels
            if count and stage < len(cells) - 1:
                stages.append(name)
        modules["act"] = nn.ReLU()
        for name, module in modules.items():
            self.add_module(name, module)
        self.body, self.stages = tuple(modules), (*stages, "act")
        # the smallest map that a cell halves must have two pixels
        least = 2 ** (len(cells) - 1)
        self.min_size = 4 * least + 3 if stem_cells else least // 2 + 1
        self.head_drop = nn.Dropout(dropout)
        self.last_linear = nn.Linear(inputs, num_classes)

    def run(self, x, taps=()):
        """As of Network; the maps of cells among the taps are those after the ReLU that their readers begin with."""
        tapped, previous = {}, None
        for name in self.body:
            module = self.get_submodule(name)
            if isinstance(module, Cell):
                out = call(module, x, x if previous is None else previous)
            else:
                out = call(module, x)
            if name in taps:
                tapped[name] = chain.materialize(call(self.act, out) if isinstance(module, Cell) else out)
            if not (self.skip_reduction and name.startswith("reduction")):
                previous = x if name != "conv0" else None
            x = out
        return x, tapped

    def classify(self, x):
        return self.last_linear(self.head_drop(chain.mean(x)))


MODELS = {
    "nasnetalarge": Entry(NASNet, 2018, 331),
    "nasnet_mobile": Entry(partial(NASNet, filters=44, cells=(4, 4, 4), stem_size=32, skip_reduction=False), 2018),
    "nasnet_a_cifar": Entry(
        partial(NASNet, num_classes=10, filters=32, stem_cells=False, skip_reduction=False), 2018, 32
    ),
}
