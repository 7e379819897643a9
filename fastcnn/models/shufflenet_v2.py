"""ShuffleNet v2 (Ma, Zhang, Zheng and Sun: ShuffleNet V2: practical guidelines for efficient CNN design, 2018).

The parameter names are those of torchvision.models.shufflenet_v2_x1_0, whose weights load unchanged.
"""

from functools import partial

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network, check_layers
from fastcnn.nn.blocks import Block, call, shared

# channels of stages 2, 3 and 4 and of the last convolution: table 5 of the paper
WIDTHS = {
    "x0_5": (48, 96, 192, 1024), "x1_0": (116, 232, 464, 1024), "x1_5": (176, 352, 704, 1024),
    "x2_0": (244, 488, 976, 2048),
}  # fmt: skip


def _depthwise(channels, stride):
    return [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)]


def _pointwise(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class ShuffleUnit(Block):
    """Two branches side by side, their channels then shuffled: torchvision's InvertedResidual of ShuffleNet v2.

    With stride 1 each branch gets half of the channels, and the first is none: these channels stay where they lie,
    across units, until a convolution reads them.

    Args:
        inputs, outputs: channels. stride: 1 (outputs equal to inputs) or 2.
    """

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        half = outputs // 2
        self.stride = stride
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(*_depthwise(inputs, stride), *_pointwise(inputs, half))
        self.branch2 = nn.Sequential(
            *_pointwise(inputs if stride > 1 else half, half), *_depthwise(half, stride), *_pointwise(half, half)
        )

    def values(self, x):
        # depthwise convolutions want the channels in their order, and others then find them so
        left, right = chain.chunk(x, 2) if self.stride == 1 else [shared(self, x)] * 2
        left = call(self.branch1, left)
        return chain.channel_shuffle([left, call(self.branch2, right)], 2)


class ShuffleNetV2(Network):
    """ShuffleNet v2: a 3x3 convolution, a max pool, 16 units in three stages, a 1x1 convolution, one linear layer.

        conv1     3x3, /2            24x112x112
        maxpool   3x3, /2            24x56x56
        stage2    4 units, /2       116x28x28
        stage3    8 units, /2       232x14x14
        stage4    4 units, /2       464x7x7
        conv5     1x1              1024x7x7
        fc        mean, fc         1000

    The table is of x1_0. 1,366,792 parameters as x0_5, 2,278,604 as x1_0, 3,503,624 as x1_5, 7,393,996 as x2_0.

    The decks name ShuffleNet beside MobileNet among the efficient networks; this is its second version, after the
    guidelines of its paper: equally wide layers, no grouped 1x1 convolutions, nothing added.

        >>> model = create_model("shufflenet_v2_x0_5", num_classes=10)
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        widths: channels of stages 2, 3 and 4, even numbers, and of the last convolution.
        layers: units of the three stages.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    body = ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5")
    feature_stages = ("conv1", "maxpool", "stage2", "stage3", "stage4")
    heads = ("fc",)

    def __init__(self, num_classes=1000, in_chans=3, widths=WIDTHS["x1_0"], layers=(4, 8, 4)):
        super().__init__(num_classes, in_chans)
        check_layers(layers, 3)
        *widths, last = widths
        channels = 24
        self.conv1 = nn.ConvBNAct(in_chans, channels, 3, 2)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for i, (outputs, count) in enumerate(zip(widths, layers, strict=True)):
            units = [ShuffleUnit(channels, outputs, 2)]
            units += [ShuffleUnit(outputs, outputs, 1) for _ in range(count - 1)]
            self.add_module(f"stage{i + 2}", nn.ChainSequential(*units))
            channels = outputs
        self.conv5 = nn.ConvBNAct(channels, last, 1)
        self.fc = nn.Linear(last, num_classes)

    def classify(self, x):
        return self.fc(chain.mean(x))


MODELS = {f"shufflenet_v2_{name}": Entry(partial(ShuffleNetV2, widths=widths), 2018) for name, widths in WIDTHS.items()}
