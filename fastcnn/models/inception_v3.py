"""Inception v3 (Szegedy, Vanhoucke, Ioffe, Shlens and Wojna: Rethinking the Inception architecture, 2015).

The parameter names are those of torchvision.models.inception_v3, whose weights load unchanged.
"""

from collections import namedtuple

import torch

from fastcnn import chain, nn
from fastcnn.models.inception import AuxiliaryNetwork
from fastcnn.models.network import Entry
from fastcnn.nn.blocks import Block, call
from fastcnn.nn.inception_blocks import BasicConv2d, Branches, Convolutions

# of the 35x35 modules: outputs after the pool; of the 17x17 ones: channels between their 7x1 and 1x7 convolutions
POOLED = (32, 64, 64)
BETWEEN = (128, 160, 160, 192)

InceptionOutputs = namedtuple("InceptionOutputs", ["logits", "aux_logits"])


def _module_35(make, inputs, pooled):
    return Branches(
        {"branch1x1": make.one(inputs, 64)},
        make.named("branch5x5", inputs, (48, 1), (64, 5)),
        make.named("branch3x3dbl", inputs, (64, 1), (96, 3), (96, 3)),
        {"avgpool": nn.AvgPool2d(3, 1, 1), "branch_pool": make.one(inputs, pooled)},
    )


def _reduction_a(make, inputs):
    return Branches(
        {"branch3x3": make.one(inputs, 384, 3, 2)},
        make.named("branch3x3dbl", inputs, (64, 1), (96, 3), (96, 3, 2)),
        {"maxpool": nn.MaxPool2d(3, 2)},
    )


def _module_17(make, inputs, between):
    c, wide, tall = between, (1, 7), (7, 1)
    return Branches(
        {"branch1x1": make.one(inputs, 192)},
        make.named("branch7x7", inputs, (c, 1), (c, wide), (192, tall)),
        make.named("branch7x7dbl", inputs, (c, 1), (c, tall), (c, wide), (c, tall), (192, wide)),
        {"avgpool": nn.AvgPool2d(3, 1, 1), "branch_pool": make.one(inputs, 192)},
    )


def _reduction_b(make, inputs):
    return Branches(
        make.named("branch3x3", inputs, (192, 1), (320, 3, 2)),
        make.named("branch7x7x3", inputs, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
        {"maxpool": nn.MaxPool2d(3, 2)},
    )


def _module_8(make, inputs):
    def fork(name):
        return {f"{name}a": make.one(384, 384, (1, 3)), f"{name}b": make.one(384, 384, (3, 1))}

    return Branches(
        {"branch1x1": make.one(inputs, 320)},
        {**make.named("branch3x3", inputs, (384, 1)), "fork": fork("branch3x3_2")},
        {**make.named("branch3x3dbl", inputs, (448, 1), (384, 3)), "fork": fork("branch3x3dbl_3")},
        {"avgpool": nn.AvgPool2d(3, 1, 1), "branch_pool": make.one(inputs, 192)},
    )


class InceptionV3Aux(Block):
    """The auxiliary classifier: 5x5 average pool of stride 3, 1x1 and 5x5 convolution, the mean, one linear layer.

    Args:
        inputs: channels of the feature map, of at least 17x17.
        num_classes: number of outputs.
        make: a fastcnn.nn.inception_blocks.Convolutions.
    """

    def __init__(self, inputs, num_classes, make):
        super().__init__()
        self.avgpool = nn.AvgPool2d(5, 3)
        self.conv0 = make.one(inputs, 128)
        self.conv1 = make.one(128, 768, 5, padding=0)
        self.fc = nn.Linear(make.channels(768), num_classes)

    def values(self, x):
        x = call(self.conv1, call(self.conv0, call(self.avgpool, x)))
        return self.fc(chain.mean(x))


class InceptionV3(AuxiliaryNetwork):
    """Inception v3: a stem of five convolutions, eleven modules, the mean, one linear layer.

        ==================  ==============================================================  ==============
        for 299x299 images  layers                                                          output
        ==================  ==============================================================  ==============
        stem                3x3 of stride 2, 3x3, 3x3; 3x3 max pool of stride 2             73 x 73 x 64
                            1x1, 3x3; 3x3 max pool of stride 2                              35 x 35 x 192
        Mixed_5b to 5d      1x1 | 1x1, 5x5 | 1x1, 3x3, 3x3 | average pool, 1x1              35 x 35 x 288
        Mixed_6a            Reduction A: 3x3 of stride 2 | 1x1, 3x3, 3x3 of stride 2 |      17 x 17 x 768
                            max pool of stride 2
        Mixed_6b to 6e      1x1 | 1x1, 1x7, 7x1 | 1x1, 7x1, 1x7, 7x1, 1x7 | average pool,   17 x 17 x 768
                            1x1; auxiliary classifier after 6e
        Mixed_7a            Reduction B: 1x1, 3x3 of stride 2 | 1x1, 1x7, 7x1, 3x3 of       8 x 8 x 1280
                            stride 2 | max pool of stride 2
        Mixed_7b, 7c        1x1 | 1x1, then 1x3 | 3x1 | 1x1, 3x3, then 1x3 | 3x1 |          8 x 8 x 2048
                            average pool, 1x1
        head                mean, dropout, linear layer                                     1000
        ==================  ==============================================================  ==============

    The decks: "among the first to use batch normalization", 24 million parameters, Reduction A and B. This is
    torchvision's network: 23,834,568 parameters, and 27,161,264 with the auxiliary classifier. It follows the authors'
    code, which after the first pool has 1x1, 3x3 and a pool, where the paper's table has three 3x3 convolutions.

    In training it returns InceptionOutputs(logits, aux_logits), as torchvision's, whose loss is that of the logits plus
    aux_weight = 0.4 times that of the auxiliary ones; evaluated, the logits alone.

        >>> model = create_model("inception_v3", num_classes=10, aux_logits=False)
        >>> model(torch.zeros(2, 3, 75, 75)).shape
        torch.Size([2, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        aux_logits: whether there is an auxiliary classifier. In training it takes images of at least 299x299.
        transform_input: as of AuxiliaryNetwork: torchvision's trained weights want it.
        dropout: probability before the linear layer.
        layers: how many modules at 35x35, 17x17 and 8x8: the first of the three, four and two.
        width_mult: all channels are multiplied by it, a multiple of 1/16.

    Shape: images [N, in_chans, H, W] of at least 75x75 -> logits [N, num_classes], in training an InceptionOutputs.
    """

    heads = ("fc",)
    aux_weight = 0.4
    outputs = InceptionOutputs

    def __init__(
        self, num_classes=1000, in_chans=3, aux_logits=True, transform_input=False, dropout=0.5, layers=(3, 4, 2),
        width_mult=1.0,
    ):  # fmt: skip
        super().__init__(num_classes, in_chans, transform_input)
        if len(layers) != 3 or not all(1 <= count <= most for count, most in zip(layers, (3, 4, 2), strict=True)):
            raise ValueError(f"layers must be at least (1, 1, 1) and at most (3, 4, 2), got {tuple(layers)}")
        make = Convolutions(width_mult)
        self.Conv2d_1a_3x3 = BasicConv2d(in_chans, make.channels(32), 3, 2)
        self.Conv2d_2a_3x3 = make.one(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = make.one(32, 64, 3)
        self.maxpool1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = make.one(64, 80)
        self.Conv2d_4a_3x3 = make.one(80, 192, 3, padding=0)
        self.maxpool2 = nn.MaxPool2d(3, 2)
        channels = 192
        for letter, pooled in zip("bcd", POOLED[: layers[0]], strict=False):
            self.add_module(f"Mixed_5{letter}", _module_35(make, channels, pooled))
            channels = 64 + 64 + 96 + pooled
        self.Mixed_6a = _reduction_a(make, channels)
        channels += 384 + 96
        for letter, between in zip("bcde", BETWEEN[: layers[1]], strict=False):
            self.add_module(f"Mixed_6{letter}", _module_17(make, channels, between))
            channels = 4 * 192
        if aux_logits:
            self.AuxLogits = InceptionV3Aux(channels, num_classes, make)
            self.heads = ("fc", "AuxLogits.fc")
            self.auxiliary = ((f"Mixed_6{'abcde'[layers[1]]}", "AuxLogits"),)
        self.Mixed_7a = _reduction_b(make, channels)
        channels += 320 + 192
        for letter in "bc"[: layers[2]]:
            self.add_module(f"Mixed_7{letter}", _module_8(make, channels))
            channels = 320 + 4 * 384 + 192
        self.body = tuple(name for name, _ in self.named_children() if name != "AuxLogits")
        ends = (f"Mixed_{number}{'abcde'[count]}" for number, count in zip((5, 6, 7), layers, strict=True))
        self.feature_stages = ("Conv2d_2b_3x3", "Conv2d_4a_3x3", *ends)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(make.channels(channels), num_classes)
        for name, module in self.named_modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.001 if name == "AuxLogits.fc" else 0.1)

    @property
    def min_size(self):
        """Height and width of the smallest images: the auxiliary classifier needs 17x17 at Mixed_6e."""
        return 299 if self.training and self.auxiliary and not self.features_only else 75

    def classify(self, x):
        return self.fc(self.dropout(chain.mean(x)))


MODELS = {"inception_v3": Entry(InceptionV3, 2015, 299)}
