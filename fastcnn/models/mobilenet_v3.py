"""MobileNet v3, large and small (Howard et al.: Searching for MobileNetV3, 2019).

The parameter names are those of torchvision.models.mobilenet_v3_large and mobilenet_v3_small, whose weights load
unchanged.
"""

from functools import partial

from fastcnn import nn
from fastcnn.models.network import Entry, MobileNetwork, round_channels
from fastcnn.nn.mobile_blocks import MBConv, SqueezeExcite

# tables 1 and 2 of the paper: kernel, expanded channels, output channels, squeeze-excite, activation, stride
RE, HS = nn.ReLU, nn.Hardswish
BLOCKS = {
    "large": (
        (3, 16, 16, False, RE, 1), (3, 64, 24, False, RE, 2), (3, 72, 24, False, RE, 1), (5, 72, 40, True, RE, 2),
        (5, 120, 40, True, RE, 1), (5, 120, 40, True, RE, 1), (3, 240, 80, False, HS, 2), (3, 200, 80, False, HS, 1),
        (3, 184, 80, False, HS, 1), (3, 184, 80, False, HS, 1), (3, 480, 112, True, HS, 1), (3, 672, 112, True, HS, 1),
        (5, 672, 160, True, HS, 2), (5, 960, 160, True, HS, 1), (5, 960, 160, True, HS, 1),
    ),
    "small": (
        (3, 16, 16, True, RE, 2), (3, 72, 24, False, RE, 2), (3, 88, 24, False, RE, 1), (5, 96, 40, True, HS, 2),
        (5, 240, 40, True, HS, 1), (5, 240, 40, True, HS, 1), (5, 120, 48, True, HS, 1), (5, 144, 48, True, HS, 1),
        (5, 288, 96, True, HS, 2), (5, 576, 96, True, HS, 1), (5, 576, 96, True, HS, 1),
    ),
}  # fmt: skip
LAST = {"large": 1280, "small": 1024}  # outputs of the first linear layer


class MobileNetV3(MobileNetwork):
    """MobileNet v3: a 3x3 convolution, 15 or 11 inverted residuals, a 1x1 convolution, the mean, two linear layers.

    5,483,032 (large) and 2,542,856 (small) parameters for 1000 classes.

    Args:
        size: "large" or "small".
        num_classes: number of outputs.
        in_chans: channels of the images.
        width_mult: channels are multiplied with it and rounded to multiples of 8.
        dropout: probability before the last linear layer.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    def __init__(self, size, num_classes=1000, in_chans=3, width_mult=1.0, dropout=0.2):
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
        channels = round_channels(16, width_mult)
        features = [nn.ConvBNAct(in_chans, channels, 3, 2, norm_layer=norm, activation_layer=HS)]
        for kernel, expanded, width, squeezed, activation, stride in BLOCKS[size]:
            expanded, width = round_channels(expanded, width_mult), round_channels(width, width_mult)
            block = MBConv(
                channels, expanded, width, kernel, stride, _squeeze_excite if squeezed else None, activation,
                norm_layer=norm,
            )  # fmt: skip
            features.append(block)
            channels = width
        features.append(nn.ConvBNAct(channels, 6 * channels, 1, norm_layer=norm, activation_layer=HS))
        last = round_channels(LAST[size], width_mult)
        classifier = nn.Sequential(
            nn.Linear(6 * channels, last), HS(), nn.Dropout(dropout), nn.Linear(last, num_classes)
        )
        normal = partial(nn.init.normal_, std=0.01)
        super().__init__(num_classes, in_chans, nn.ChainSequential(*features), classifier, normal)


def _squeeze_excite(channels):
    return SqueezeExcite(channels, round_channels(channels // 4), nn.ReLU, nn.Hardsigmoid)


MODELS = {
    "mobilenet_v3_large": Entry(partial(MobileNetV3, "large"), 2019),
    "mobilenet_v3_small": Entry(partial(MobileNetV3, "small"), 2019),
}
