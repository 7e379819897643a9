"""Residual networks for 32x32 images: plain-N and ResNet-N of section 4.2 of He, Zhang, Ren and Sun (Deep residual
learning for image recognition, 2015), the same with stochastic depth (Huang, Sun, Liu, Sedra and Weinberger: Deep
networks with stochastic depth, 2016), and ResNeXt-29 (Xie, Girshick, Dollar, Tu and He 2017).
"""

from functools import partial

import torch

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network, check_layers, he_normal
from fastcnn.models.resnet import projection
from fastcnn.names import check_name
from fastcnn.nn.blocks import Block, call, conv_norm, shared


class ZeroPaddedShortcut(Block):
    """Every stride-th row and column of the image, and zeros for the channels it lacks: option A of He et al. 2016a.

    Args:
        inputs, outputs: channels; the zeros come after the image's own.
        stride: between the rows and columns that are kept.
    """

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.added, self.stride = outputs - inputs, stride

    def values(self, x):
        x = chain.materialize(x)[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.added))


class PlainBlock(nn.BasicBlock):
    """The layers of a BasicBlock, and no shortcut."""

    def values(self, x):
        out = call(self.relu, conv_norm(x, self.conv1, self.bn1))
        return call(self.relu, conv_norm(out, self.conv2, self.bn2))


class StochasticBlock(nn.BasicBlock):
    """A BasicBlock whose convolutions are dropped with probability p in training and multiplied by 1 - p in evaluation.

    The paper's form, in which training scales nothing; torchvision's StochasticDepth divides by 1 - p in training
    instead. The input is another block's output, so that what is left of a dropped block, its shortcut, needs no ReLU.

    Args:
        inplanes, planes, stride, downsample: as of BasicBlock.
        p: probability of being dropped.
        mode: "batch" drops the block for all images of a batch, without its being computed: its parameters get no
            gradients and its batch norms see nothing. Under torch.compile, whose graph has no such branch, it is
            computed and multiplied by 0; a CUDA graph, always the same, cannot have it. "row" draws for every image:
            for training on several GPUs, which would each drop other blocks.
    """

    def __init__(self, inplanes, planes, stride=1, downsample=None, p=0.5, mode="batch"):
        super().__init__(inplanes, planes, stride, downsample)
        self.p, self.mode = p, mode

    def values(self, x):
        x = shared(self, x)
        kept = self._kept(x)
        if kept is False:
            return x if self.downsample is None else call(self.downsample, x)
        out = call(self.relu, conv_norm(x, self.conv1, self.bn1))
        out = conv_norm(out, self.conv2, self.bn2)
        if kept is not True:
            out = chain.multiply(out, kept)
        shortcut = x if self.downsample is None else call(self.downsample, x)
        return call(self.relu, chain.add(out, shortcut))

    def _kept(self, x):
        """Whether the branch is computed and added as it is, or what it is multiplied with."""
        image = chain.likeness(x)
        if self.p == 0:
            return True
        if not self.training:
            return image.new_full((image.shape[0], 1, 1, 1), 1 - self.p)
        if self.mode == "row":
            return chain.row_noise(x, self.p, scaled=False)
        if torch.compiler.is_compiling():
            return (torch.rand((), device=image.device) >= self.p).to(image.dtype)
        if image.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph would drop the same blocks in every step; use stochastic_depth_mode='row'")
        return float(torch.rand(())) >= self.p

    def extra_repr(self):
        return f"p={self.p}, mode={self.mode}"


class SmallImageResNet(Network):
    """A 3x3 convolution, three stages of blocks, the mean over the image, a linear layer.

    Args:
        stages: the blocks of each stage.
        stem: channels of the first convolution. outputs: of the last block.
        num_classes, in_chans: as of Network.
    """

    body = ("conv1", "bn1", "relu", "layer1", "layer2", "layer3")
    feature_stages = ("layer1", "layer2", "layer3")
    heads = ("fc",)

    def __init__(self, stages, stem, outputs, num_classes, in_chans):
        super().__init__(num_classes, in_chans)
        self.conv1 = nn.Conv2d(in_chans, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        for i, blocks in enumerate(stages):
            self.add_module(f"layer{i + 1}", nn.ChainSequential(*blocks))
        self.fc = nn.Linear(outputs, num_classes)
        he_normal(self)

    def classify(self, x):
        return self.fc(chain.mean(x))


class CifarResNet(SmallImageResNet):
    """ResNet-N for CIFAR, N = 6 n + 2 layers with weights; plain-N is the same without shortcuts.

        part     of 32x32
        conv1    3x3, 16 channels              32x32
        layer1   [3x3, 16; 3x3, 16] * n        32x32
        layer2   [3x3, 32; 3x3, 32] * n        16x16
        layer3   [3x3, 64; 3x3, 64] * n        8x8
        fc       mean, 64 to 10                1

    Batch norm after every convolution, ReLU after the sum. Where a stage halves the image the shortcut takes every
    second pixel and pads the new channels with zeros (option A), so that plain-N has exactly the parameters of
    ResNet-N. The stem's and the blocks' names are those of torchvision's ResNet.

        N                  20        32        44        56        110         1202
        blocks n           3         5         7         9         18          200
        parameters         269,722   464,154   658,586   853,018   1,727,962   19,421,274
        the paper's        0.27M     0.46M     0.66M     0.85M     1.7M        19.4M

    The decks ask what is strange about plain-20 and plain-56: "the 56-layer model performs worse on both training and
    test error", which is no overfitting but harder optimisation, and residual blocks mend it; "able to train very deep
    networks without degrading (152 layers on ImageNet, 1202 on Cifar)". resnet110_stodepth_cifar drops residual
    branches in training, "use full deep network at test time": block l of L with the probability 0.5 l / L.

        >>> model = create_model("resnet20_cifar", in_chans=1)
        >>> model(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 10])
        >>> shortened = create_model("resnet110_stodepth_cifar", layers=(1, 1, 2))
        >>> [block.p for block in shortened.layer3]
        [0.375, 0.5]

    Args:
        layers: blocks of the three stages.
        num_classes: number of outputs.
        in_chans: channels of the images.
        shortcut: "zeros" (option A), "projection" (a 1x1 convolution with batch norm where the shape changes, option
            B) or "none" (plain).
        stochastic_depth: probability of dropping the last block; it grows linearly from the first.
        stochastic_depth_mode: "batch", the paper's, drops a block for the whole batch, "row" for every image.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].

    Raises:
        ValueError: an argument is none of these, or stochastic depth without shortcuts.
    """

    def __init__(
        self, layers, num_classes=10, in_chans=3, shortcut="zeros", stochastic_depth=0.0, stochastic_depth_mode="batch"
    ):  # fmt: skip
        check_layers(layers, 3)
        check_name("shortcut", shortcut, SHORTCUTS)
        check_name("stochastic_depth_mode", stochastic_depth_mode, ("batch", "row"))
        if not 0 <= stochastic_depth < 1:
            raise ValueError(f"stochastic_depth must be at least 0 and less than 1, got {stochastic_depth!r}")
        if stochastic_depth > 0 and shortcut == "none":
            raise ValueError("stochastic_depth needs shortcuts: a plain network without a layer is cut in two")
        block = PlainBlock if shortcut == "none" else nn.BasicBlock
        if stochastic_depth > 0:
            block = partial(StochasticBlock, mode=stochastic_depth_mode)
        stages, channels, done = [], 16, 0
        for stage, count in enumerate(layers):
            stages.append([])
            for i in range(count):
                stride, planes = 2 if stage > 0 and i == 0 else 1, 16 * 2**stage
                downsample = SHORTCUTS[shortcut](channels, planes, stride) if stride != 1 else None
                done += 1
                chance = {"p": stochastic_depth * done / sum(layers)} if stochastic_depth > 0 else {}
                stages[-1].append(block(channels, planes, stride, downsample, **chance))
                channels = planes
        super().__init__(stages, 16, channels, num_classes, in_chans)


SHORTCUTS = {"zeros": ZeroPaddedShortcut, "projection": projection, "none": lambda *shape: None}


class CifarResNeXt(SmallImageResNet):
    """ResNeXt for CIFAR: nine bottlenecks whose 3x3 convolution is split into groups; ResNet's depth for width.

        part     of 32x32, C groups of d channels
        conv1    3x3, 64 channels                          32x32
        layer1   [1x1, C d; 3x3, C d; 1x1, 256] * 3        32x32
        layer2   [1x1, 2 C d; 3x3, 2 C d; 1x1, 512] * 3    16x16
        layer3   [1x1, 4 C d; 3x3, 4 C d; 1x1, 1024] * 3   8x8
        fc       mean, 1024 to 10                          1

    Shortcuts are 1x1 convolutions with batch norm where the shape changes. 34,426,698 parameters for 8 groups of 64
    (the paper: 34.4M) and 68,155,210 for 16 (68.1M). The decks: "multiple parallel pathways (cardinality)".

        >>> model = create_model("resnext29_8x64d_cifar", layers=(1, 1, 1), groups=2, width_per_group=8)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Args:
        layers: blocks of the three stages.
        num_classes: number of outputs.
        in_chans: channels of the images.
        groups: C.
        width_per_group: d, in the first stage.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].

    Raises:
        ValueError: layers are not three positive ints.
    """

    def __init__(self, layers=(3, 3, 3), num_classes=10, in_chans=3, groups=8, width_per_group=64):
        check_layers(layers, 3)
        stages, channels = [], 64
        for stage, count in enumerate(layers):
            planes, stride = 64 * 2**stage, 2 if stage > 0 else 1
            outputs = planes * nn.Bottleneck.expansion
            block = partial(nn.Bottleneck, groups=groups, base_width=width_per_group)
            first = block(channels, planes, stride, projection(channels, outputs, stride))
            stages.append([first, *(block(outputs, planes) for _ in range(count - 1))])
            channels = outputs
        super().__init__(stages, 64, channels, num_classes, in_chans)


def _entry(n, year=2015, **options):
    return Entry(partial(CifarResNet, layers=(n, n, n), **options), year, 32)


MODELS = {
    **{f"plain{6 * n + 2}_cifar": _entry(n, shortcut="none") for n in (3, 5, 7, 9)},
    **{f"resnet{6 * n + 2}_cifar": _entry(n) for n in (3, 5, 7, 9, 18, 200)},
    "resnet110_stodepth_cifar": _entry(18, 2016, stochastic_depth=0.5),
    "resnext29_8x64d_cifar": Entry(partial(CifarResNeXt, groups=8), 2017, 32),
    "resnext29_16x64d_cifar": Entry(partial(CifarResNeXt, groups=16), 2017, 32),
}
