"""MobileNet v3, large and small (Howard et al.: Searching for MobileNetV3, 2019).

The parameter names are those of torchvision.models.mobilenet_v3_large and mobilenet_v3_small, whose weights load
unchanged.
"""

from functools import partial

from fastcnn import nn
from fastcnn.models.network import Entry, MobileNetwork, last_of_each_size, round_channels
from fastcnn.nn.mobile_blocks import MBConv, SqueezeExcite

# tables 1 and 2 of the paper: kernel, expanded channels, output channels, squeeze-excite, activation, stride
RE, HS = nn.ReLU, nn.Hardswish
LARGE = (
    (3, 16, 16, False, RE, 1), (3, 64, 24, False, RE, 2), (3, 72, 24, False, RE, 1), (5, 72, 40, True, RE, 2),
    (5, 120, 40, True, RE, 1), (5, 120, 40, True, RE, 1), (3, 240, 80, False, HS, 2), (3, 200, 80, False, HS, 1),
    (3, 184, 80, False, HS, 1), (3, 184, 80, False, HS, 1), (3, 480, 112, True, HS, 1), (3, 672, 112, True, HS, 1),
    (5, 672, 160, True, HS, 2), (5, 960, 160, True, HS, 1), (5, 960, 160, True, HS, 1),
)  # fmt: skip
SMALL = (
    (3, 16, 16, True, RE, 2), (3, 72, 24, False, RE, 2), (3, 88, 24, False, RE, 1), (5, 96, 40, True, HS, 2),
    (5, 240, 40, True, HS, 1), (5, 240, 40, True, HS, 1), (5, 120, 48, True, HS, 1), (5, 144, 48, True, HS, 1),
    (5, 288, 96, True, HS, 2), (5, 576, 96, True, HS, 1), (5, 576, 96, True, HS, 1),
)  # fmt: skip


class MobileNetV3(MobileNetwork):
    """MobileNet v3: a 3x3 convolution, 15 or 11 inverted residuals, a 1x1 convolution, the mean, two linear layers.

        large                                     small
        features.0      3x3, /2        16x112x112     features.0      3x3, /2       16x112x112
        features.1      1 block        16x112x112     features.1      1 block, /2   16x56x56
        features.2-3    2 blocks, /2   24x56x56       features.2-3    2 blocks, /2  24x28x28
        features.4-6    3 blocks, /2   40x28x28       features.4-6    3 blocks, /2  40x14x14
        features.7-10   4 blocks, /2   80x14x14       features.7-8    2 blocks      48x14x14
        features.11-12  2 blocks      112x14x14       features.9-11   3 blocks, /2  96x7x7
        features.13-15  3 blocks, /2  160x7x7         features.12     1x1          576x7x7
        features.16     1x1           960x7x7         classifier      mean, fc 1024, fc 1000
        classifier      mean, fc 1280, fc 1000

    5,483,032 (large) and 2,542,856 (small) parameters for 1000 classes: torchvision's, whose batch norms have eps 0.001
    and momentum 0.01. timm's mobilenetv3_large_100 has eps 0.00001: the same layers, but another network, whose files
    are refused. The decks name MobileNet without its third version.

        >>> model = create_model("mobilenet_v3_small", num_classes=10, features_only=True)
        >>> [stage["reduction"] for stage in model.feature_info()]
        [2, 4, 8, 16, 32]

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        width_mult: channels are multiplied with it and rounded to multiples of 8.
        dropout: probability before the last linear layer.
        blocks: (kernel, expanded channels, outputs, whether it has squeeze-excite, activation, stride) of each block.
        last: outputs of the first linear layer.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    def __init__(self, num_classes=1000, in_chans=3, width_mult=1.0, dropout=0.2, blocks=LARGE, last=1280):
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
        channels = round_channels(16, width_mult)
        features = [nn.ConvBNAct(in_chans, channels, 3, 2, norm_layer=norm, activation_layer=HS)]
        for kernel, expanded, width, squeezed, activation, stride in blocks:
            expanded, width = round_channels(expanded, width_mult), round_channels(width, width_mult)
            block = MBConv(
                channels, expanded, width, kernel, stride, _squeeze_excite if squeezed else None, activation,
                norm_layer=norm,
            )  # fmt: skip
            features.append(block)
            channels = width
        features.append(nn.ConvBNAct(channels, 6 * channels, 1, norm_layer=norm, activation_layer=HS))
        last = round_channels(last, width_mult)
        classifier = nn.Sequential(
            nn.Linear(6 * channels, last), HS(), nn.Dropout(dropout), nn.Linear(last, num_classes)
        )
        normal = partial(nn.init.normal_, std=0.01)
        super().__init__(num_classes, in_chans, nn.ChainSequential(*features), classifier, normal)
        strides = [2, *(stride for *_, stride in blocks), 1]
        self.feature_stages = tuple(f"features.{i}" for i in last_of_each_size(strides))


def _squeeze_excite(channels):
    return SqueezeExcite(channels, round_channels(channels // 4), nn.ReLU, nn.Hardsigmoid)


MODELS = {
    "mobilenet_v3_large": Entry(MobileNetV3, 2019),
    "mobilenet_v3_small": Entry(partial(MobileNetV3, blocks=SMALL, last=1024), 2019),
}
