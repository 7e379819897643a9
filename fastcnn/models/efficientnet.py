"""EfficientNet B0 to B7 (Tan and Le: EfficientNet: rethinking model scaling for convolutional neural networks, 2019).

The parameter names are those of torchvision.models.efficientnet_b0 to b7, whose weights load unchanged.
"""

import math
from functools import partial

from fastcnn import nn
from fastcnn.models.network import Entry, MobileNetwork, round_channels
from fastcnn.nn.mobile_blocks import MBConv, SqueezeExcite

# table 1 of the paper: expansion, kernel, stride of the first, output channels, blocks
STAGES = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)  # fmt: skip
# width, depth, dropout
SCALES = {
    "b0": (1.0, 1.0, 0.2), "b1": (1.0, 1.1, 0.2), "b2": (1.1, 1.2, 0.3), "b3": (1.2, 1.4, 0.3),
    "b4": (1.4, 1.8, 0.4), "b5": (1.6, 2.2, 0.4), "b6": (1.8, 2.6, 0.5), "b7": (2.0, 3.1, 0.5),
}  # fmt: skip


class EfficientNet(MobileNetwork):
    """EfficientNet: a 3x3 convolution, inverted residuals with squeeze-excite, a 1x1 convolution, the mean, one linear
    layer.

    For 1000 classes 5,288,548 parameters (B0), 7,794,184, 9,109,994, 12,233,232, 19,341,616, 30,389,784, 43,040,704
    and 66,347,960 (B7). The batch norms of B5 to B7 have eps 0.001 and momentum 0.01, the others PyTorch's defaults.

    Args:
        scale: "b0" to "b7".
        num_classes: number of outputs.
        in_chans: channels of the images.
        dropout: probability before the linear layer; None for the paper's.
        stochastic_depth_prob: with which training drops an image's branch in the last block; it rises
            linearly to there.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    def __init__(self, scale, num_classes=1000, in_chans=3, dropout=None, stochastic_depth_prob=0.2):
        if not 0 <= stochastic_depth_prob <= 1:
            raise ValueError(f"stochastic_depth_prob must be between 0 and 1, got {stochastic_depth_prob!r}")
        width_mult, depth_mult, usual_dropout = SCALES[scale]
        dropout = usual_dropout if dropout is None else dropout
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01) if scale in ("b5", "b6", "b7") else nn.BatchNorm2d
        channels = round_channels(32, width_mult)
        stem = nn.ConvBNAct(in_chans, channels, 3, 2, norm_layer=norm, activation_layer=nn.SiLU)
        counts = [math.ceil(count * depth_mult) for *_, count in STAGES]
        features, made = [stem], 0
        for (expansion, kernel, stride, width, _), count in zip(STAGES, counts, strict=True):
            width, blocks = round_channels(width, width_mult), []
            for i in range(count):
                blocks.append(
                    MBConv(
                        channels, channels * expansion, width, kernel, stride if i == 0 else 1,
                        partial(SqueezeExcite, squeeze_channels=max(1, channels // 4), activation=nn.SiLU),
                        p=stochastic_depth_prob * made / sum(counts), norm_layer=norm,
                    )
                )  # fmt: skip
                channels, made = width, made + 1
            features.append(nn.ChainSequential(*blocks))
        last = round_channels(1280, width_mult)
        features.append(nn.ConvBNAct(channels, last, 1, norm_layer=norm, activation_layer=nn.SiLU))
        classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        bound = 1 / math.sqrt(num_classes)
        uniform = partial(nn.init.uniform_, a=-bound, b=bound)
        super().__init__(num_classes, in_chans, nn.ChainSequential(*features), classifier, uniform)


# the sizes of the images that the paper trains them on
SIZES = {"b0": 224, "b1": 240, "b2": 260, "b3": 300, "b4": 380, "b5": 456, "b6": 528, "b7": 600}
MODELS = {f"efficientnet_{scale}": Entry(partial(EfficientNet, scale), 2019, SIZES[scale]) for scale in SCALES}
