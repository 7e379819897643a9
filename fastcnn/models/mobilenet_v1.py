"""MobileNet v1.

Source: Howard et al.: MobileNets: efficient convolutional neural networks for mobile vision applications, 2017. The
parameter names are those of timm's mobilenetv1_100 (width_mult 1) and mobilenetv1_125, whose weights load unchanged.
"""

import math

import torch

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network, round_channels
from fastcnn.nn.mobile_blocks import DepthwiseSeparable

# outputs of the blocks, by stage; the first block of every stage but the first has stride 2
STAGES = ((64,), (128, 128), (256, 256), (512,) * 6, (1024, 1024))


class MobileNetV1(Network):
    """MobileNet v1: a 3x3 convolution, 13 depthwise-separable ones, the mean over the image, one linear layer.

        stem       3x3, stride 2      32 channels
        blocks.0   1 block            64
        blocks.1   2 blocks, /2      128
        blocks.2   2 blocks, /2      256
        blocks.3   6 blocks, /2      512
        blocks.4   2 blocks, /2     1024

    4,231,976 parameters for 1000 classes. The activation is ReLU6, as in the networks that were published with the
    paper, which says ReLU.

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        width_mult: all channels are multiplied with it, and rounded to multiples of 8.
        dropout: probability before the linear layer.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    body = ("conv_stem", "bn1", "act", "blocks")
    stages = ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4")
    heads = ("classifier",)

    def __init__(self, num_classes=1000, in_chans=3, width_mult=1.0, dropout=0.0):
        super().__init__(num_classes, in_chans)
        channels = round_channels(32, width_mult)
        self.conv_stem = nn.Conv2d(in_chans, channels, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU6()
        stages = []
        for i, widths in enumerate(STAGES):
            blocks = []
            for j, width in enumerate(widths):
                width = round_channels(width, width_mult)
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
