"""ResNet (He, Zhang, Ren and Sun: Deep residual learning for image recognition, 2015), and what widens its blocks.

ResNeXt (Xie, Girshick, Dollar, Tu and He: Aggregated residual transformations for deep neural networks, 2017) splits
the 3x3 convolution into groups; Wide ResNet (Zagoruyko and Komodakis: Wide residual networks, 2016) doubles its
channels. The parameter names are those of torchvision's networks (resnet200: timm's), whose weights load unchanged.
"""

from functools import partial

import torch

from fastcnn import nn
from fastcnn.models.network import Entry, Network, check_layers
from fastcnn.names import check_name
from fastcnn.nn.blocks import call

BLOCKS = {"basic": nn.BasicBlock, "bottleneck": nn.Bottleneck}


class ResNet(Network):
    """A stem, four stages of residual blocks, the mean over the image, one linear layer.

        part      resnet18, 34                  resnet50, 101, 152, 200, ResNeXt, wide    of 224x224
        conv1     7x7, 64 channels, stride 2                                              112x112
        maxpool   3x3, stride 2                                                           56x56
        layer1    [3x3, 64; 3x3, 64] * n        [1x1, 64 w; 3x3, 64 w; 1x1, 256] * n      56x56
        layer2    [3x3, 128; 3x3, 128] * n      [1x1, 128 w; 3x3, 128 w; 1x1, 512] * n    28x28
        layer3    [3x3, 256; 3x3, 256] * n      [1x1, 256 w; 3x3, 256 w; 1x1, 1024] * n   14x14
        layer4    [3x3, 512; 3x3, 512] * n      [1x1, 512 w; 3x3, 512 w; 1x1, 2048] * n   7x7
        fc        mean, 512 or 2048 to 1000                                               1

    Every block is y = relu(F(x) + x), every convolution of F is followed by batch norm; where a stage changes the
    size, its first block's shortcut is a 1x1 convolution with batch norm (option B of the paper). The widening w is
    groups * width_per_group / 64.

        network             layers           parameters   network             layers           parameters
        resnet18            2, 2, 2, 2       11,689,512   resnext50_32x4d     3, 4, 6, 3       25,028,904
        resnet34            3, 4, 6, 3       21,797,672   resnext101_32x8d    3, 4, 23, 3      88,791,336
        resnet50            3, 4, 6, 3       25,557,032   resnext101_64x4d    3, 4, 23, 3      83,455,272
        resnet101           3, 4, 23, 3      44,549,160   wide_resnet50_2     3, 4, 6, 3       68,883,240
        resnet152           3, 8, 36, 3      60,192,808   wide_resnet101_2    3, 4, 23, 3      126,886,696
        resnet200           3, 24, 36, 3     64,673,832

    The decks print 3, 4, 23, 8 for the 101 layers, which would be 116; the paper's last stage has 3 blocks. They name
    "26 million parameters" for ResNet-50, batch norm after every convolution, He's initialisation, no dropout, SGD with
    momentum 0.9, a learning rate of 0.1 divided by 10 on a plateau, batches of 256 and a weight decay of 1e-5, which in
    the paper is 1e-4; "50-layer wide ResNet outperforms 152-layer original ResNet" is wide_resnet50_2. The stride of a
    bottleneck is in its 3x3 convolution, as in torchvision; the paper has it in the first 1x1. resnet200 is the depth
    of He et al. 2016b, here with the activation after the sum.

        >>> model = create_model("resnet18", num_classes=10)
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
        >>> [tuple(x.shape[1:]) for x in create_model("resnet18", features_only=True)(torch.zeros(1, 3, 64, 64))]
        [(64, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]

    Args:
        layers: blocks of the four stages.
        num_classes: number of outputs.
        in_chans: channels of the images.
        block: "basic", two 3x3 convolutions, or "bottleneck".
        groups: of a bottleneck's 3x3 convolution, its cardinality.
        width_per_group: channels of a group in the first stage, which doubles in every further one.
        zero_init_residual: whether the last batch norm of every block starts with weights of 0: the block as its
            shortcut.
        replace_stride_with_dilation: for the last three stages, whether filters are spread instead of the image's
            being halved; bottlenecks only.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].

    Raises:
        ValueError: an argument is none of these.
    """

    body = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    feature_stages = ("relu", "layer1", "layer2", "layer3", "layer4")
    heads = ("fc",)

    def __init__(
        self, layers, num_classes=1000, in_chans=3, block="bottleneck", groups=1, width_per_group=64,
        zero_init_residual=False, replace_stride_with_dilation=(False, False, False),
    ):  # fmt: skip
        super().__init__(num_classes, in_chans)
        check_layers(layers, 4)
        check_name("block", block, BLOCKS)
        if len(replace_stride_with_dilation) != 3:
            raise ValueError(
                "replace_stride_with_dilation must have 3 entries, for layer2 to layer4, got "
                f"{replace_stride_with_dilation!r}"
            )
        block = BLOCKS[block]
        self.conv1 = nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels, dilation = 64, 1
        for stage, (count, dilate) in enumerate(zip(layers, (False, *replace_stride_with_dilation), strict=True)):
            planes, stride, first = 64 * 2**stage, 1 if stage == 0 else 2, dilation
            if dilate:
                dilation, stride = 2 * dilation, 1
            outputs, blocks = planes * block.expansion, []
            downsample = projection(channels, outputs, stride) if stride != 1 or channels != outputs else None
            for i in range(count):
                shape = (channels, planes, stride, downsample) if i == 0 else (outputs, planes)
                blocks.append(
                    block(*shape, groups=groups, base_width=width_per_group, dilation=first if i == 0 else dilation)
                )
            self.add_module(f"layer{stage + 1}", nn.ChainSequential(*blocks))
            channels = outputs
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, block):
                nn.init.zeros_((module.bn2 if block is nn.BasicBlock else module.bn3).weight)

    def classify(self, x):
        return self.fc(call(self.avgpool, x).flatten(1))


def projection(inputs, outputs, stride):
    """A shortcut between other shapes: 1x1 convolution and batch norm, option B of the paper."""
    return nn.ChainSequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _entry(year, layers, **options):
    return Entry(partial(ResNet, layers=layers, **options), year)


MODELS = {
    "resnet18": _entry(2015, (2, 2, 2, 2), block="basic"),
    "resnet34": _entry(2015, (3, 4, 6, 3), block="basic"),
    "resnet50": _entry(2015, (3, 4, 6, 3)),
    "resnet101": _entry(2015, (3, 4, 23, 3)),
    "resnet152": _entry(2015, (3, 8, 36, 3)),
    "resnet200": _entry(2016, (3, 24, 36, 3)),
    "resnext50_32x4d": _entry(2017, (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": _entry(2017, (3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_64x4d": _entry(2017, (3, 4, 23, 3), groups=64, width_per_group=4),
    "wide_resnet50_2": _entry(2016, (3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": _entry(2016, (3, 4, 23, 3), width_per_group=128),
}
