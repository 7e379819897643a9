"""Pre-activation ResNet (He, Zhang, Ren and Sun: Identity mappings in deep residual networks, 2016).

The parameter names are those of timm's resnetv2_50, whose weights load unchanged.
"""

from collections import OrderedDict
from functools import partial

import torch

from fastcnn import chain, nn
from fastcnn.models.cifar_resnet import ZeroPaddedShortcut
from fastcnn.models.network import Entry, Network, check_layers
from fastcnn.names import check_name

BLOCKS = {"basic": nn.PreActBlock, "bottleneck": nn.PreActBottleneck}


class PreActResNet(Network):
    """A convolution, stages of pre-activation blocks, batch norm and ReLU, the mean over the image, a linear layer.

        part       resnetv2_50                         of 224x224   preact_resnet110, 164, 1001_cifar    of 32x32
        stem       7x7, 64 channels, stride 2          112x112      3x3, 16 channels                     32x32
                   maximum of 3x3, stride 2            56x56
        stages.0   [1x1, 64; 3x3, 64; 1x1, 256] * 3    56x56        110: [3x3, 16; 3x3, 16] * n          32x32
        stages.1   [.. 128, 128, 512 ..] * 4           28x28        [.. 32, 32 ..] * n                   16x16
        stages.2   [.. 256, 256, 1024 ..] * 6          14x14        [.. 64, 64 ..] * n                   8x8
        stages.3   [.. 512, 512, 2048 ..] * 3          7x7          164, 1001: bottlenecks of those, times 4
        norm       batch norm, ReLU                    7x7                                               8x8
        head       mean, 2048 to 1000                  1            mean, 64 or 256 to 10                1

    Batch norm and ReLU stand before every convolution and nothing comes after the sum, y = x + F(x): the decks' "more
    direct path for propagating information throughout network (moves activation to residual mapping pathway)". The
    first block of a stage takes its shortcut, too, from its first activation.

        network                   blocks           parameters   the paper's
        resnetv2_50               3, 4, 6, 3       25,549,352
        preact_resnet110_cifar    18, 18, 18       1,727,962    1.7M
        preact_resnet164_cifar    18, 18, 18       1,703,258    1.7M
        preact_resnet1001_cifar   111, 111, 111    10,327,706   10.2M

    The 110 layers have zero-padded shortcuts where the shape changes, the others 1x1 convolutions. The stride of a
    bottleneck is in its 3x3 convolution, as in timm; the paper has it in the first 1x1. The linear layer is a 1x1
    convolution of the mean, timm's form.

        >>> model = create_model("preact_resnet164_cifar", layers=(1, 1, 1))
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Args:
        layers: blocks of the stages, three or four.
        num_classes: number of outputs.
        in_chans: channels of the images.
        block: "basic", two 3x3 convolutions, or "bottleneck".
        width: channels of the 3x3 convolutions in the first stage, which double in every further one.
        stem: channels of the first convolution.
        small_images: the first convolution is 3x3 at stride 1, without the pooling.
        shortcut: "projection", a 1x1 convolution where the shape changes, or "zeros", option A of CifarResNet, for
            basic blocks.
        dropout: probability of dropping what the second convolution of a basic block reads.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].

    Raises:
        ValueError: an argument is none of these.
    """

    body = ("stem", "stages", "norm", "relu")
    heads = ("head.fc",)

    def __init__(
        self, layers, num_classes=1000, in_chans=3, block="bottleneck", width=64, stem=64, small_images=False,
        shortcut="projection", dropout=0.0,
    ):  # fmt: skip
        super().__init__(num_classes, in_chans)
        check_layers(layers, 3 if small_images else 4)
        check_name("block", block, BLOCKS)
        check_name("shortcut", shortcut, ("projection", "zeros"))
        if block == "bottleneck" and (shortcut != "projection" or dropout != 0):
            raise ValueError(
                f"bottlenecks have shortcut = 'projection' and dropout = 0, got {shortcut!r} and {dropout!r}"
            )
        make = BLOCKS[block] if block == "bottleneck" else partial(nn.PreActBlock, dropout=dropout)
        if small_images:
            first = [("conv", nn.Conv2d(in_chans, stem, 3, 1, 1, bias=False))]
        else:
            first = [("conv", nn.Conv2d(in_chans, stem, 7, 2, 3, bias=False)), ("pool", nn.MaxPool2d(3, 2, 1))]
        self.stem = nn.ChainSequential(OrderedDict(first))
        stages, channels = [], stem
        for stage, count in enumerate(layers):
            planes, stride = width * 2**stage, 1 if stage == 0 else 2
            outputs, blocks = planes * BLOCKS[block].expansion, []
            for i in range(count):
                around = _around(channels, outputs, stride, shortcut) if i == 0 else None
                blocks.append(make(channels, planes, stride if i == 0 else 1, around))
                channels = outputs
            stages.append(nn.ChainSequential(OrderedDict(blocks=nn.ChainSequential(*blocks))))
        self.stages = nn.ChainSequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Sequential(OrderedDict(fc=nn.Conv2d(channels, num_classes, 1)))
        self.feature_stages = ("stem.conv", *(f"stages.{i}" for i in range(len(layers))))
        for module in (*self.stem.modules(), *self.stages.modules()):
            if isinstance(module, torch.nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.head.fc.weight, std=0.01)
        nn.init.zeros_(self.head.fc.bias)

    def classify(self, x):
        return self.head(chain.mean(x, keepdim=True)).flatten(1)


def _around(inputs, outputs, stride, shortcut):
    """The shortcut of a stage's first block, which reads the activation."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if shortcut == "zeros":
        return ZeroPaddedShortcut(inputs, outputs, stride)
    return nn.ChainSequential(OrderedDict(conv=nn.Conv2d(inputs, outputs, 1, stride, bias=False)))


_cifar = partial(PreActResNet, num_classes=10, width=16, stem=16, small_images=True)

MODELS = {
    "resnetv2_50": Entry(partial(PreActResNet, layers=(3, 4, 6, 3)), 2016),
    "preact_resnet110_cifar": Entry(partial(_cifar, layers=(18, 18, 18), block="basic", shortcut="zeros"), 2016, 32),
    "preact_resnet164_cifar": Entry(partial(_cifar, layers=(18, 18, 18)), 2016, 32),
    "preact_resnet1001_cifar": Entry(partial(_cifar, layers=(111, 111, 111)), 2016, 32),
}
