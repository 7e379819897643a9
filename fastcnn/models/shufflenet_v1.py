"""ShuffleNet v1 (Zhang, Zhou, Lin and Sun: ShuffleNet: an extremely efficient CNN for mobile devices, 2018)."""

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network, check_layers, check_multiplier
from fastcnn.nn.blocks import Block, call, conv_norm, shared

# channels of stages 2, 3 and 4 by the groups of the 1x1 convolutions: table 1 of the paper
WIDTHS = {
    1: (144, 288, 576), 2: (200, 400, 800), 3: (240, 480, 960), 4: (272, 544, 1088), 8: (384, 768, 1536),
}  # fmt: skip


class GroupedShuffleUnit(Block):
    """Grouped 1x1, shuffle of the channels, depthwise 3x3, grouped 1x1, and a shortcut: figure 2 of the paper.

    The shortcut is added, or with stride 2 pooled and put before the unit's own channels. The depthwise convolution
    reads the channels where they lie.

    Args:
        inputs, outputs: channels. stride: 1 (outputs equal to inputs) or 2.
        groups: of the 1x1 convolutions. first_groups: of the first of them.
    """

    def __init__(self, inputs, outputs, stride, groups, first_groups):
        super().__init__()
        middle = outputs // 4
        if stride > 1:
            outputs -= inputs
        self.groups, self.stride = first_groups, stride
        self.conv1 = nn.Conv2d(inputs, middle, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def values(self, x):
        x = shared(self, x)
        out = call(self.relu, conv_norm(x, self.conv1, self.bn1))
        out = conv_norm(chain.channel_shuffle(out, self.groups), self.conv2, self.bn2)
        out = conv_norm(out, self.conv3, self.bn3)
        if self.stride == 1:
            return call(self.relu, chain.add(out, x))
        return call(self.relu, chain.cat([chain.avg_pool2d(x, 3, 2, 1), out]))


class ShuffleNetV1(Network):
    """ShuffleNet v1: a 3x3 convolution, a max pool, 16 units in three stages, the mean, one linear layer.

        conv1     3x3, /2            24x112x112
        maxpool   3x3, /2            24x56x56
        stage2    4 units, /2       240x28x28
        stage3    8 units, /2       480x14x14
        stage4    4 units, /2       960x7x7
        fc        mean, fc         1000

    1,865,728 parameters with 3 groups, of which the table speaks; 1,531,936, 1,733,848, 1,968,344 and 2,434,768 with 1,
    2, 4 and 8. The first 1x1 convolution of stage 2, which has few inputs, has one group. The shuffle between the
    grouped convolutions lets every group see the others.

    The decks name it beside MobileNet: after ResNet the focus shifted to "Efficient Networks: MobileNet, ShuffleNet".

        >>> model = create_model("shufflenet_v1", num_classes=10, groups=8)
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        groups: 1, 2, 3, 4 or 8, of the 1x1 convolutions; with more of them there are more channels.
        width_mult: all channels are multiplied with it (the paper's 0.25x, 0.5x, 1x, 1.5x, 2x).
        layers: units of the three stages.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    body = ("conv1", "maxpool", "stage2", "stage3", "stage4")
    feature_stages = ("conv1", "maxpool", "stage2", "stage3", "stage4")
    heads = ("fc",)

    def __init__(self, num_classes=1000, in_chans=3, groups=3, width_mult=1.0, layers=(4, 8, 4)):
        super().__init__(num_classes, in_chans)
        check_layers(layers, 3)
        if groups not in WIDTHS:
            raise ValueError(f"groups must be one of {', '.join(map(str, WIDTHS))}, got {groups!r}")
        check_multiplier("width_mult", width_mult)
        scaled = [width * width_mult for width in (24, *WIDTHS[groups])]
        channels, *widths = map(int, scaled)
        if [channels, *widths] != scaled or channels % groups or any(width % (4 * groups) for width in widths):
            raise ValueError(
                f"width_mult must leave every group a whole number of channels, as 1 and 2 do, got {width_mult!r} with "
                f"{groups} groups"
            )
        self.conv1 = nn.ConvBNAct(in_chans, channels, 3, 2)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for i, (outputs, count) in enumerate(zip(widths, layers, strict=True)):
            units = [GroupedShuffleUnit(channels, outputs, 2, groups, 1 if i == 0 else groups)]
            units += [GroupedShuffleUnit(outputs, outputs, 1, groups, groups) for _ in range(count - 1)]
            self.add_module(f"stage{i + 2}", nn.ChainSequential(*units))
            channels = outputs
        self.fc = nn.Linear(channels, num_classes)

    def classify(self, x):
        return self.fc(chain.mean(x))


MODELS = {"shufflenet_v1": Entry(ShuffleNetV1, 2018)}
