"""SE-ResNet, SE-ResNeXt and SENet-154 (Hu, Shen, Albanie, Sun and Wu: Squeeze-and-excitation networks, 2018).

The parameter names are those of timm's networks of the same names, whose weights load unchanged.
"""

from functools import partial

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network, check_layers
from fastcnn.nn.blocks import Block, call, conv_norm, shared
from fastcnn.nn.mobile_blocks import SqueezeExcite

REDUCTION = 16  # channels of the block by those between the two layers that make its gate


class SEBottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions, squeeze-excite of the last, and a shortcut; timm's keys.

    Args:
        inputs: input channels. planes: a quarter of the output's.
        stride, cardinality: stride and groups of the 3x3 convolution. base_width: its channels per group, were planes
            64.
        downsample: module on the shortcut, which gives it the output's shape; None for the input itself.
        reduce_first: the 3x3 convolution has this many times fewer inputs than outputs.
    """

    expansion = 4

    def __init__(self, inputs, planes, stride=1, downsample=None, cardinality=1, base_width=64, reduce_first=1):
        super().__init__()
        width, outputs = planes * base_width // 64 * cardinality, planes * self.expansion
        first = width // reduce_first
        self.conv1 = nn.Conv2d(inputs, first, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, width, 3, stride, 1, groups=cardinality, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.se = SqueezeExcite(outputs, outputs // REDUCTION)
        self.act = nn.ReLU(inplace=True)
        self.downsample = downsample

    def values(self, x):
        x = shared(self, x)
        out = call(self.act, conv_norm(x, self.conv1, self.bn1))
        out = call(self.act, conv_norm(out, self.conv2, self.bn2))
        out = call(self.se, conv_norm(out, self.conv3, self.bn3))
        shortcut = x if self.downsample is None else call(self.downsample, x)
        return call(self.act, chain.add(out, shortcut))


class SENet(Network):
    """A stem, four stages of SEBottleneck, the mean, one linear layer.

        conv1      7x7, /2                    64x112x112
        maxpool    3x3, /2                    64x56x56
        layer1     3 blocks                  256x56x56
        layer2     4 blocks, /2              512x28x28
        layer3     6 blocks, /2             1024x14x14
        layer4     3 blocks, /2             2048x7x7
        fc         mean, fc                 1000

    The table is of SE-ResNet-50, with 28,088,024 parameters; 49,326,872 as SE-ResNet-101, 66,821,848 as SE-ResNet-152,
    27,559,896 as SE-ResNeXt-50 (32x4d), 48,955,416 as SE-ResNeXt-101 (32x4d), 115,088,984 as SENet-154.

    The decks: a module that learns to weigh the feature maps anew, from global information (a global average pool) by
    two fully connected layers; winner of the classification challenge of ILSVRC 2017 "using ResNeXt-152 as a base
    architecture". The paper calls that network SENet-154: ResNeXt-152 (64x4d) with half as many inputs of the 3x3
    convolutions, a stem of three 3x3 convolutions, 3x3 convolutions on the shortcuts, and dropout of 0.2, which timm
    and so this one leave at 0 unless asked.

        >>> model = create_model("seresnet50", num_classes=10, layers=(1, 1, 1, 1))
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        layers: blocks of the four stages.
        cardinality, base_width, reduce_first: as of SEBottleneck.
        deep_stem: three 3x3 convolutions in place of the 7x7.
        down_kernel_size: 1 or 3, of the shortcuts' convolutions with a stride.
        dropout: probability before the linear layer.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    body = ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4")
    feature_stages = ("act1", "layer1", "layer2", "layer3", "layer4")
    heads = ("fc",)

    def __init__(
        self, num_classes=1000, in_chans=3, layers=(3, 4, 6, 3), cardinality=1, base_width=64, reduce_first=1,
        deep_stem=False, down_kernel_size=1, dropout=0.0,
    ):  # fmt: skip
        super().__init__(num_classes, in_chans)
        check_layers(layers, 4)
        channels = 128 if deep_stem else 64
        if deep_stem:
            self.conv1 = nn.Sequential(
                *(nn.Conv2d(in_chans, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)),
                *(nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)),
                nn.Conv2d(64, channels, 3, 1, 1, bias=False),
            )
        else:
            self.conv1 = nn.Conv2d(in_chans, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for stage, count in enumerate(layers):
            planes, blocks = 64 * 2**stage, []
            outputs = planes * SEBottleneck.expansion
            for i in range(count):
                stride, downsample = 2 if stage > 0 and i == 0 else 1, None
                if i == 0:
                    size = 1 if stride == 1 else down_kernel_size
                    conv = nn.Conv2d(channels, outputs, size, stride, size // 2, bias=False)
                    downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))
                blocks.append(SEBottleneck(channels, planes, stride, downsample, cardinality, base_width, reduce_first))
                channels = outputs
            self.add_module(f"layer{stage + 1}", nn.ChainSequential(*blocks))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, SEBottleneck):
                nn.init.zeros_(module.bn3.weight)  # a block starts as its shortcut

    def classify(self, x):
        return self.fc(self.dropout(chain.mean(x)))


_OF_154 = dict(cardinality=64, base_width=4, reduce_first=2, deep_stem=True, down_kernel_size=3)
MODELS = {
    "seresnet50": Entry(SENet, 2018),
    "seresnet101": Entry(partial(SENet, layers=(3, 4, 23, 3)), 2018),
    "seresnet152": Entry(partial(SENet, layers=(3, 8, 36, 3)), 2018),
    "seresnext50_32x4d": Entry(partial(SENet, cardinality=32, base_width=4), 2018),
    "seresnext101_32x4d": Entry(partial(SENet, layers=(3, 4, 23, 3), cardinality=32, base_width=4), 2018),
    "senet154": Entry(partial(SENet, layers=(3, 8, 36, 3), **_OF_154), 2018),
}
