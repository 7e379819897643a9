"""MobileNet v2 (Sandler et al.: MobileNetV2: inverted residuals and linear bottlenecks, 2018).

The parameter names are those of torchvision.models.mobilenet_v2, whose weights load unchanged; `pretrained` also takes
files of timm's mobilenetv2_100.
"""

from functools import partial

from fastcnn import nn
from fastcnn.models.network import Entry, MobileNetwork, check_layers, last_of_each_size, round_channels
from fastcnn.nn.mobile_blocks import InvertedResidual

# expansion, output channels, stride of the first block: table 2 of the paper
STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 2), (6, 64, 2), (6, 96, 1), (6, 160, 2), (6, 320, 1))


class MobileNetV2(MobileNetwork):
    """MobileNet v2: a 3x3 convolution, 17 inverted residuals, a 1x1 convolution, the mean, one linear layer.

        features.0        3x3, /2             32x112x112
        features.1        1 block             16x112x112
        features.2-3      2 blocks, /2        24x56x56
        features.4-6      3 blocks, /2        32x28x28
        features.7-10     4 blocks, /2        64x14x14
        features.11-13    3 blocks            96x14x14
        features.14-16    3 blocks, /2       160x7x7
        features.17       1 block            320x7x7
        features.18       1x1               1280x7x7
        classifier        mean, fc          1000

    3,504,872 parameters for 1000 classes. A block (but the first) widens its input six times, filters every channel by
    itself, and comes back to few channels without an activation; the shortcut joins these.

    The decks show this network as "MobileNet (2017)" (`torchvision.models.mobilenet_v2()`), count a depthwise separable
    convolution, 4*3*3 + 4*2 = 44 parameters against 4*3*3*2 = 72, and give over 100 frames a second on an iPhone 7 at
    about 70% top-1 and 90% top-5 accuracy. 2017 and the separable convolution are of MobileNet v1, from which inverted
    residuals and linear bottlenecks were made a year later.

        >>> model = create_model("mobilenet_v2", num_classes=10)
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        width_mult: channels are multiplied with it and rounded to multiples of 8; the last 1280 only if it is above 1.
        dropout: probability before the linear layer.
        layers: blocks of the seven stages.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    def __init__(
        self, num_classes=1000, in_chans=3, width_mult=1.0, dropout=0.2, layers=(1, 2, 3, 4, 3, 3, 1)
    ):  # fmt: skip
        check_layers(layers, len(STAGES))
        channels = round_channels(32, width_mult)
        features = [nn.ConvBNAct(in_chans, channels, 3, 2, activation_layer=nn.ReLU6)]
        strides = [2]
        for (expansion, width, stride), count in zip(STAGES, layers, strict=True):
            width = round_channels(width, width_mult)
            for i in range(count):
                strides.append(stride if i == 0 else 1)
                features.append(InvertedResidual(channels, width, strides[-1], expansion))
                channels = width
        last = round_channels(1280, max(1.0, width_mult))
        features.append(nn.ConvBNAct(channels, last, 1, activation_layer=nn.ReLU6))
        classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        normal = partial(nn.init.normal_, std=0.01)
        super().__init__(num_classes, in_chans, nn.ChainSequential(*features), classifier, normal)
        self.layers = tuple(layers)
        self.feature_stages = tuple(f"features.{i}" for i in last_of_each_size(strides))

    def names_elsewhere(self):
        return self.names_in_timm(self.layers, squeezed=False)


MODELS = {"mobilenet_v2": Entry(MobileNetV2, 2018)}
