"""DenseNet (Huang, Liu, van der Maaten and Weinberger: Densely connected convolutional networks, 2017).

Every layer of a dense block reads the channels of the block's input and of all layers before it, and adds a few of its
own. The parameter names are those of torchvision.models.densenet121, 161, 169 and 201, whose weights load unchanged.
"""

import re
from collections import OrderedDict
from functools import partial

import torch

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network
from fastcnn.nn.blocks import call


class DenseNet(Network):
    """DenseNet for images of about 224x224, as densenet121:

                        output      layers
        conv0           64x112x112  7x7, stride 2; batch norm, ReLU
        pool0           64x56x56    max pool 3x3, stride 2
        denseblock1     256x56x56   6 layers (1x1 to 128 channels, 3x3 to 32)
        transition1     128x28x28   1x1 to half the channels, average pool 2x2
        denseblock2     512x28x28   12 layers
        transition2     256x14x14
        denseblock3     1024x14x14  24 layers
        transition3     512x7x7
        denseblock4     1024x7x7    16 layers
        norm5           1024x7x7    batch norm, ReLU
        classifier      1000        mean over the image, one linear layer

    Batch norm and ReLU come before every convolution but the first (pre-activation). 7,978,856 parameters for 1000
    classes; 28,681,000 as densenet161 (48 channels a layer), 14,149,480 as densenet169, 20,013,928 as densenet201. That
    is the paper's DenseNet-BC: B for the 1x1 convolution of every layer, C for the halved channels of a transition.
    The decks show the block (each layer connected to every other layer in feed-forward fashion: a weaker vanishing
    gradient, features passed on and used again) and name torchvision's densenet161. Unlike the paper's table, in
    which there is none, torchvision's form ends in a last batch norm, norm5, as the authors' code does.

    A dense block is one step of the chain: its layers write into one tensor, and every channel's batch statistics are
    taken once.

        >>> model = create_model("densenet121", num_classes=10).eval()
        >>> model(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        growth_rate: channels that every layer adds, k in the paper.
        block_config: layers of every dense block.
        num_init_features: channels of conv0.
        bn_size: the 1x1 convolution of a layer has bn_size * growth_rate outputs; None for layers without it.
        drop_rate: probability that training drops a number that a layer adds, as in torchvision. (The paper's 0.2 for
            small images that are not augmented is after every convolution but the first.)
        compression: a transition's outputs by its inputs.
        small: the form for images of 32x32: conv0 is 3x3 with stride 1, and nothing else comes before the first block.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    body = ("features",)
    heads = ("classifier",)

    def __init__(
        self, num_classes=1000, in_chans=3, growth_rate=32, block_config=(6, 12, 24, 16), num_init_features=64,
        bn_size=4, drop_rate=0.0, compression=0.5, small=False,
    ):  # fmt: skip
        super().__init__(num_classes, in_chans)
        channels = num_init_features
        if small:
            layers = [("conv0", nn.Conv2d(in_chans, channels, 3, padding=1, bias=False))]
        else:
            layers = [
                ("conv0", nn.Conv2d(in_chans, channels, 7, 2, 3, bias=False)),
                ("norm0", nn.BatchNorm2d(channels)),
                ("relu0", nn.ReLU(inplace=True)),
                ("pool0", nn.MaxPool2d(3, 2, 1)),
            ]
        for i, count in enumerate(block_config, 1):
            layers.append((f"denseblock{i}", nn.DenseBlock(count, channels, bn_size, growth_rate, drop_rate)))
            channels += count * growth_rate
            if i < len(block_config):
                layers.append((f"transition{i}", _transition(channels, int(channels * compression))))
                channels = int(channels * compression)
        layers.append(("norm5", nn.BatchNorm2d(channels)))
        self.features = nn.ChainSequential(OrderedDict(layers))
        self.classifier = nn.Linear(channels, num_classes)
        self.relu = nn.ReLU(inplace=True)
        blocks = [f"features.denseblock{i}" for i in range(1, len(block_config))]
        self.feature_stages = (*([] if small else ["features.relu0"]), *blocks, "features.norm5")
        # every transition needs two pixels; before them conv0 and pool0 halve, rounding up
        pixels = 2 ** (len(block_config) - 1)
        self.min_size = pixels if small else 4 * pixels - 3
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def classify(self, x):
        return self.classifier(chain.mean(call(self.relu, x)))

    def names_elsewhere(self):
        # torchvision's files have the names of its first DenseNet: norm.1 for norm1
        layers = [name for name, _ in self.named_modules() if ".denselayer" in name]
        return {re.sub(r"(norm|conv)([12])$", r"\1.\2", name): name for name in layers}


def _transition(inputs, outputs):
    return nn.ChainSequential(
        OrderedDict(
            norm=nn.BatchNorm2d(inputs),
            relu=nn.ReLU(inplace=True),
            conv=nn.Conv2d(inputs, outputs, 1, bias=False),
            pool=nn.AvgPool2d(2, 2),
        )
    )


def _small(depth, growth_rate, bottleneck=True):
    # the paper's network of so many layers for 32x32 images: DenseNet-BC, or without bottleneck and compression
    if bottleneck:
        options = dict(num_init_features=2 * growth_rate)
    else:
        options = dict(num_init_features=16, bn_size=None, compression=1.0)
    count = (depth - 4) // (6 if bottleneck else 3)
    return partial(DenseNet, num_classes=10, growth_rate=growth_rate, block_config=(count,) * 3, small=True, **options)


MODELS = {
    "densenet121": Entry(DenseNet, 2017),
    "densenet161": Entry(partial(DenseNet, growth_rate=48, block_config=(6, 12, 36, 24), num_init_features=96), 2017),
    "densenet169": Entry(partial(DenseNet, block_config=(6, 12, 32, 32)), 2017),
    "densenet201": Entry(partial(DenseNet, block_config=(6, 12, 48, 32)), 2017),
    "densenet40_12_cifar": Entry(_small(40, 12, bottleneck=False), 2017, 32),
    "densenet_bc100_12_cifar": Entry(_small(100, 12), 2017, 32),
    "densenet_bc190_40_cifar": Entry(_small(190, 40), 2017, 32),
    "densenet_bc250_24_cifar": Entry(_small(250, 24), 2017, 32),
}
