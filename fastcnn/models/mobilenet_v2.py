"""MobileNet v2 (Sandler et al.: MobileNetV2: inverted residuals and linear bottlenecks, 2018).

The parameter names are those of torchvision.models.mobilenet_v2, whose weights load unchanged.
"""

from functools import partial

from fastcnn import nn
from fastcnn.models.network import Entry, MobileNetwork, round_channels
from fastcnn.nn.mobile_blocks import InvertedResidual

# expansion, output channels, blocks, stride of the first: table 2 of the paper
STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


class MobileNetV2(MobileNetwork):
    """MobileNet v2: a 3x3 convolution, 17 inverted residuals, a 1x1 convolution, the mean, one linear layer.

    3,504,872 parameters for 1000 classes.

        >>> model = create_model("mobilenet_v2", num_classes=10)
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        width_mult: channels are multiplied with it and rounded to multiples of 8; the last 1280 only if it is above 1.
        dropout: probability before the linear layer.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    stages = ("features.1", "features.3", "features.6", "features.13", "features.17")

    def __init__(self, num_classes=1000, in_chans=3, width_mult=1.0, dropout=0.2):
        channels = round_channels(32, width_mult)
        features = [nn.ConvBNAct(in_chans, channels, 3, 2, activation_layer=nn.ReLU6)]
        for expansion, width, count, stride in STAGES:
            width = round_channels(width, width_mult)
            for i in range(count):
                features.append(InvertedResidual(channels, width, stride if i == 0 else 1, expansion))
                channels = width
        last = round_channels(1280, max(1.0, width_mult))
        features.append(nn.ConvBNAct(channels, last, 1, activation_layer=nn.ReLU6))
        classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        normal = partial(nn.init.normal_, std=0.01)
        super().__init__(num_classes, in_chans, nn.ChainSequential(*features), classifier, normal)


MODELS = {"mobilenet_v2": Entry(MobileNetV2, 2018)}
