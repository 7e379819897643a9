"""Wide residual networks for 32x32 images (Zagoruyko and Komodakis: Wide residual networks, 2016).

Those for ImageNet, wide_resnet50_2 and wide_resnet101_2, are in resnet.py.
"""

from functools import partial

from fastcnn.models.network import Entry
from fastcnn.models.preact_resnet import PreActResNet


class WideResNet(PreActResNet):
    """WRN-N-k: N = 6 n + 4 layers with weights, in pre-activation blocks k times as wide as those of ResNet-N.

        part       of 32x32
        stem       3x3, 16 channels                 32x32
        stages.0   [3x3, 16 k; 3x3, 16 k] * n       32x32
        stages.1   [3x3, 32 k; 3x3, 32 k] * n       16x16
        stages.2   [3x3, 64 k; 3x3, 64 k] * n       8x8
        norm       batch norm, ReLU                 8x8
        head       mean, 64 k to 10                 1

    Where the shape changes the shortcut is a 1x1 convolution of the block's first activation.

        network            n   k    parameters   the paper's
        wrn28_10_cifar     4   10   36,479,194   36.5M
        wrn40_4_cifar      6   4    8,949,210    8.9M
        wrn16_8_cifar      2   8    10,961,370   11.0M

    The decks: "residuals are the important factor, not depth", "F x k filters instead of F filters in each layer",
    "increasing width instead of depth more computationally efficient (parallelizable)".

        >>> model = create_model("wrn28_10_cifar", layers=(1, 1, 1), widen=2, dropout=0.3)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Args:
        layers: blocks of the three stages.
        num_classes: number of outputs.
        in_chans: channels of the images.
        widen: k.
        dropout: probability of dropping what a block's second convolution reads; 0.3 in the paper where it has any.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].

    Raises:
        ValueError: layers are not three positive ints, or widen is no positive int.
    """

    def __init__(self, layers, num_classes=10, in_chans=3, widen=1, dropout=0.0):
        if type(widen) is not int or widen < 1:
            raise ValueError(f"widen must be a positive int, got {widen!r}")
        options = dict(block="basic", width=16 * widen, stem=16, small_images=True, dropout=dropout)
        super().__init__(layers, num_classes, in_chans, **options)


def _entry(n, widen):
    return Entry(partial(WideResNet, layers=(n, n, n), widen=widen), 2016, 32)


MODELS = {"wrn16_8_cifar": _entry(2, 8), "wrn28_10_cifar": _entry(4, 10), "wrn40_4_cifar": _entry(6, 4)}
