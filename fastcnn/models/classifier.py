"""What the classifiers of images share: last layers, initialisation, rounded widths, the check of images."""

import math

from torch import nn

from fastcnn import chain
from fastcnn.nn.blocks import Block, _call


def round_channels(channels, width_mult=1.0, divisor=8):
    """channels * width_mult as a multiple of divisor, no less than nine tenths of it.

    Raises:
        ValueError: width_mult is no positive number.
    """
    if isinstance(width_mult, bool) or not isinstance(width_mult, (int, float)) or not 0 < width_mult < math.inf:
        raise ValueError(f"width_mult must be a positive number, got {width_mult!r}")
    wanted = channels * width_mult
    rounded = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * wanted else rounded


def check_images(model, x, in_chans):
    """Raise ValueError unless x is [N, in_chans, H, W]."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"{type(model).__name__} takes images of shape [N, {in_chans}, H, W], got {list(x.shape)}")


class Classifier(Block):
    """A classifier of the mean over the image of what features returns: torchvision's mobile networks and their keys.

    Convolutions start normally distributed with the variance 2 / (outputs * filter's size) (He et al. 2015), linear
    layers as `linear` says, all biases at 0.

    Args:
        features: ChainSequential whose first layer's first convolution reads the images.
        classifier: module that takes [N, C].
        linear: function that initialises the weight of a linear layer.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    def __init__(self, features, classifier, linear):
        super().__init__()
        self.features = features
        self.classifier = classifier
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                linear(module.weight)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def values(self, x):
        check_images(self, x, self.features[0][0].in_channels)
        return self.classifier(chain.mean(_call(self.features, x)))
