"""EfficientNet B0 to B7 (Tan and Le: EfficientNet: rethinking model scaling for convolutional neural networks, 2019).

The parameter names are those of torchvision.models.efficientnet_b0 to b7, whose weights load unchanged; `pretrained`
also takes files of timm's efficientnet_b0 to b4.
"""

import math
from functools import partial

from fastcnn import nn
from fastcnn.models.network import Entry, MobileNetwork, check_multiplier, last_of_each_size, round_channels
from fastcnn.nn.mobile_blocks import MBConv, SqueezeExcite

# table 1 of the paper: expansion, kernel, stride of the first, output channels, blocks
STAGES = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)  # fmt: skip


class EfficientNet(MobileNetwork):
    """EfficientNet: a 3x3 convolution, inverted residuals with squeeze-excite, a 1x1 convolution, the mean, one linear
    layer. B0, on images of 224x224:

        features.0   3x3, /2                       32x112x112
        features.1   1 block, 3x3                  16x112x112
        features.2   2 blocks, 3x3, /2             24x56x56
        features.3   2 blocks, 5x5, /2             40x28x28
        features.4   3 blocks, 3x3, /2             80x14x14
        features.5   3 blocks, 5x5                112x14x14
        features.6   4 blocks, 5x5, /2            192x7x7
        features.7   1 block, 3x3                 320x7x7
        features.8   1x1                         1280x7x7
        classifier   mean, dropout, fc           1000

    Width, depth and the images' size grow together from B0 to B7, about as 1.1, 1.2 and 1.15 to the power of a number
    that doubles the work with every step. For 1000 classes 5,288,548 parameters (B0), 7,794,184, 9,109,994, 12,233,232,
    19,341,616, 30,389,784, 43,040,704 and 66,347,960 (B7). As in torchvision the batch norms of B5 to B7 have eps 0.001
    and momentum 0.01, the others PyTorch's defaults; timm's B5 to B7 have the defaults too and are other networks, as
    are its tf_efficientnet, which pad otherwise: nothing in their files tells it.

    The decks show the paper's plot of accuracy against parameters on ImageNet (Tan and Le, ICML 2019).

        >>> model = create_model("efficientnet_b0", num_classes=10)
        >>> model(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        width_mult: channels are multiplied with it and rounded to multiples of 8.
        depth_mult: the blocks of a stage are multiplied with it and rounded up.
        dropout: probability before the linear layer.
        stochastic_depth_prob: with which training drops an image's branch in the last block; it rises
            linearly to there.
        norm_layer: makes a batch norm of so many channels.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    def __init__(
        self, num_classes=1000, in_chans=3, width_mult=1.0, depth_mult=1.0, dropout=0.2, stochastic_depth_prob=0.2,
        norm_layer=nn.BatchNorm2d,
    ):  # fmt: skip
        check_multiplier("depth_mult", depth_mult)
        if not 0 <= stochastic_depth_prob <= 1:
            raise ValueError(f"stochastic_depth_prob must be between 0 and 1, got {stochastic_depth_prob!r}")
        channels = round_channels(32, width_mult)
        stem = nn.ConvBNAct(in_chans, channels, 3, 2, norm_layer=norm_layer, activation_layer=nn.SiLU)
        counts = [math.ceil(count * depth_mult) for *_, count in STAGES]
        features, made = [stem], 0
        for (expansion, kernel, stride, width, _), count in zip(STAGES, counts, strict=True):
            width, blocks = round_channels(width, width_mult), []
            for i in range(count):
                blocks.append(
                    MBConv(
                        channels, channels * expansion, width, kernel, stride if i == 0 else 1,
                        partial(SqueezeExcite, squeeze_channels=max(1, channels // 4), activation=nn.SiLU),
                        p=stochastic_depth_prob * made / sum(counts), norm_layer=norm_layer,
                    )
                )  # fmt: skip
                channels, made = width, made + 1
            features.append(nn.ChainSequential(*blocks))
        last = round_channels(1280, width_mult)
        features.append(nn.ConvBNAct(channels, last, 1, norm_layer=norm_layer, activation_layer=nn.SiLU))
        classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        bound = 1 / math.sqrt(num_classes)
        uniform = partial(nn.init.uniform_, a=-bound, b=bound)
        super().__init__(num_classes, in_chans, nn.ChainSequential(*features), classifier, uniform)
        # without the last 1x1 convolution, which widens for the classifier
        strides = [2, *(stride for _, _, stride, *_ in STAGES)]
        self.feature_stages = tuple(f"features.{i}" for i in last_of_each_size(strides))

    def names_elsewhere(self):
        # elsewhere batch norm has PyTorch's eps
        if self.features[0][1].eps != nn.BatchNorm2d(1).eps:
            return {}
        return self.names_in_timm([len(stage) for stage in self.features[1:-1]], squeezed=True)


def _entry(width_mult, depth_mult, dropout, image_size, **options):
    options |= dict(width_mult=width_mult, depth_mult=depth_mult, dropout=dropout)
    return Entry(partial(EfficientNet, **options), 2019, image_size)


_NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
MODELS = {
    "efficientnet_b0": _entry(1.0, 1.0, 0.2, 224),
    "efficientnet_b1": _entry(1.0, 1.1, 0.2, 240),
    "efficientnet_b2": _entry(1.1, 1.2, 0.3, 260),
    "efficientnet_b3": _entry(1.2, 1.4, 0.3, 300),
    "efficientnet_b4": _entry(1.4, 1.8, 0.4, 380),
    "efficientnet_b5": _entry(1.6, 2.2, 0.4, 456, norm_layer=_NORM),
    "efficientnet_b6": _entry(1.8, 2.6, 0.5, 528, norm_layer=_NORM),
    "efficientnet_b7": _entry(2.0, 3.1, 0.5, 600, norm_layer=_NORM),
}
