"""MobileNet v1.

Source: Howard et al.: MobileNets: efficient convolutional neural networks for mobile vision applications, 2017. The
parameter names are those of timm's mobilenetv1_100 (width_mult 1) and mobilenetv1_125, whose weights load unchanged.
"""

import math

import torch

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network, check_layers, round_channels
from fastcnn.nn.mobile_blocks import DepthwiseSeparable

# outputs of the blocks, by stage; the first block of every stage but the first has stride 2
WIDTHS = (64, 128, 256, 512, 1024)


class MobileNetV1(Network):
    """MobileNet v1: a 3x3 convolution, 13 depthwise-separable ones, the mean over the image, one linear layer.

        conv_stem   3x3, /2          32x112x112
        blocks.0    1 block          64x112x112
        blocks.1    2 blocks, /2    128x56x56
        blocks.2    2 blocks, /2    256x28x28
        blocks.3    6 blocks, /2    512x14x14
        blocks.4    2 blocks, /2   1024x7x7
        classifier  mean, fc       1000

    4,231,976 parameters for 1000 classes. The activation is ReLU6, as in the networks that were published with the
    paper, which says ReLU.

    The decks count what a block replaces: M channels to N by KxK filters take O(MK^2 N) parameters, filters of one
    channel each and 1x1 filters after them O(MK^2 + MN), in their example 4*3*3 + 4*2 = 44 against 4*3*3*2 = 72.

        >>> model = create_model("mobilenet_v1", num_classes=10, width_mult=0.25)
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
        >>> block = nn.DepthwiseSeparable(4, 2)
        >>> block.conv_dw.weight.numel() + block.conv_pw.weight.numel(), nn.Conv2d(4, 2, 3, bias=False).weight.numel()
        (44, 72)

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        width_mult: all channels are multiplied with it, and rounded to multiples of 8.
        dropout: probability before the linear layer.
        layers: blocks of the five stages.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    body = ("conv_stem", "bn1", "act", "blocks")
    feature_stages = ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4")
    heads = ("classifier",)

    def __init__(self, num_classes=1000, in_chans=3, width_mult=1.0, dropout=0.0, layers=(1, 2, 2, 6, 2)):
        super().__init__(num_classes, in_chans)
        check_layers(layers, len(WIDTHS))
        channels = round_channels(32, width_mult)
        self.conv_stem = nn.Conv2d(in_chans, channels, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU6()
        stages = []
        for i, (width, count) in enumerate(zip(WIDTHS, layers, strict=True)):
            width, blocks = round_channels(width, width_mult), []
            for j in range(count):
                blocks.append(DepthwiseSeparable(channels, width, 2 if i > 0 and j == 0 else 1))
                channels = width
            stages.append(nn.ChainSequential(*blocks))
        self.blocks = nn.ChainSequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
        nn.init.uniform_(self.classifier.weight, -1 / math.sqrt(num_classes), 1 / math.sqrt(num_classes))
        nn.init.zeros_(self.classifier.bias)

    def classify(self, x):
        return self.classifier(self.dropout(chain.mean(x)))


MODELS = {"mobilenet_v1": Entry(MobileNetV1, 2017)}
