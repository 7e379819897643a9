"""Inception-ResNet v2 (Szegedy, Ioffe, Vanhoucke and Alemi: Inception-v4, Inception-ResNet and the impact of residual
connections on learning, 2016).

The parameter names are those of timm's inception_resnet_v2, whose weights load unchanged.
"""

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network, check_layers
from fastcnn.nn.blocks import call, is_plain, shared
from fastcnn.nn.inception_blocks import BasicConv2d, Branches, Convolutions


class InceptionResidual(Branches):
    """x + scale * (1x1 convolution, with bias, of the branches of x), then ReLU.

    Args:
        make: a fastcnn.nn.inception_blocks.Convolutions.
        inputs: channels of x and of the output.
        branches: dicts as of Branches.
        width: channels of all branches together.
        scale: factor of the branches: without one, the paper found, wide networks died early in training.
        relu: whether there is a ReLU.
    """

    def __init__(self, make, inputs, *branches, width, scale, relu=True):
        super().__init__(*branches)
        self.scale = scale
        self.conv2d = nn.Conv2d(make.channels(width), make.channels(inputs), 1)
        self.act = nn.ReLU() if relu else nn.Identity()

    def values(self, x):
        x = shared(self, x)
        out = super().values(x)
        plain = is_plain(self.conv2d)
        out = chain.conv(out, self.conv2d, factor=self.scale) if plain else call(self.conv2d, out) * self.scale
        return call(self.act, chain.add(shared(self, out), x))


def _module_5b(make):
    pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    return Branches(
        {"branch0": make.one(192, 96)},
        {"branch1": make.chain(192, (48, 1), (64, 5))},
        {"branch2": make.chain(192, (64, 1), (96, 3), (96, 3))},
        {"branch3": nn.ChainSequential(pool, make.one(192, 64))},
    )


def _residual_35(make):
    return InceptionResidual(
        make,
        320,
        {"branch0": make.one(320, 32)},
        {"branch1": make.chain(320, (32, 1), (32, 3))},
        {"branch2": make.chain(320, (32, 1), (48, 3), (64, 3))},
        width=128,
        scale=0.17,
    )


def _reduction_a(make):
    return Branches(
        {"branch0": make.one(320, 384, 3, 2)},
        {"branch1": make.chain(320, (256, 1), (256, 3), (384, 3, 2))},
        {"branch2": nn.MaxPool2d(3, 2)},
    )


def _residual_17(make):
    return InceptionResidual(
        make,
        1088,
        {"branch0": make.one(1088, 192)},
        {"branch1": make.chain(1088, (128, 1), (160, (1, 7)), (192, (7, 1)))},
        width=384,
        scale=0.10,
    )


def _reduction_b(make):
    return Branches(
        {"branch0": make.chain(1088, (256, 1), (384, 3, 2))},
        {"branch1": make.chain(1088, (256, 1), (288, 3, 2))},
        {"branch2": make.chain(1088, (256, 1), (288, 3), (320, 3, 2))},
        {"branch3": nn.MaxPool2d(3, 2)},
    )


def _residual_8(make, scale=0.20, relu=True):
    return InceptionResidual(
        make,
        2080,
        {"branch0": make.one(2080, 192)},
        {"branch1": make.chain(2080, (192, 1), (224, (1, 3)), (256, (3, 1)))},
        width=448,
        scale=scale,
        relu=relu,
    )


class InceptionResNetV2(Network):
    """Inception-ResNet v2: a stem, forty residual modules with two reductions between them, the mean, a linear layer.

        ==================  ==============================================================  ==============
        for 299x299 images  layers                                                          output
        ==================  ==============================================================  ==============
        stem                3x3 of stride 2, 3x3, 3x3; max pool of stride 2                 73 x 73 x 64
                            1x1, 3x3; max pool of stride 2                                  35 x 35 x 192
        mixed_5b            1x1 | 1x1, 5x5 | 1x1, 3x3, 3x3 | average pool, 1x1              35 x 35 x 320
        repeat              10 times x + 0.17 * 1x1 of (1x1 | 1x1, 3x3 | 1x1, 3x3, 3x3)     35 x 35 x 320
        mixed_6a            Reduction A: 3x3 of stride 2 | 1x1, 3x3, 3x3 of stride 2 |      17 x 17 x 1088
                            max pool
        repeat_1            20 times x + 0.10 * 1x1 of (1x1 | 1x1, 1x7, 7x1)                17 x 17 x 1088
        mixed_7a            Reduction B: 1x1, 3x3 of stride 2 | 1x1, 3x3 of stride 2 |      8 x 8 x 2080
                            1x1, 3x3, 3x3 of stride 2 | max pool
        repeat_2, block8    9 times x + 0.20 * 1x1 of (1x1 | 1x1, 1x3, 3x1), once with 1    8 x 8 x 2080
                            in place of 0.20 and without ReLU
        conv2d_7b           1x1                                                             8 x 8 x 1536
        head                mean, dropout, linear layer                                     1000
        ==================  ==============================================================  ==============

    The decks have it as "ResNet + Inception" and in the ensembles of 2016. This is timm's network, 55,843,464
    parameters. It follows the authors' code, which differs from the paper: a stem as that of Inception v3, 320, 1088
    and 2080 channels in place of 384, 1154 and 2048, and 10, 20 and 10 residual modules in place of 5, 10 and 5.

        >>> model = create_model("inception_resnet_v2", num_classes=10, layers=(1, 1, 1))
        >>> model(torch.zeros(2, 3, 75, 75)).shape
        torch.Size([2, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        layers: how many residual modules in repeat, repeat_1 and repeat_2.
        dropout: probability before the linear layer; 0.2 in the paper, 0 in timm.
        width_mult: all channels are multiplied by it, a multiple of 1/16.

    Shape: images [N, in_chans, H, W] of at least 75x75 -> logits [N, num_classes].
    """

    body = (
        "conv2d_1a", "conv2d_2a", "conv2d_2b", "maxpool_3a", "conv2d_3b", "conv2d_4a", "maxpool_5a", "mixed_5b",
        "repeat", "mixed_6a", "repeat_1", "mixed_7a", "repeat_2", "block8", "conv2d_7b",
    )  # fmt: skip
    feature_stages = ("conv2d_2b", "conv2d_4a", "repeat", "repeat_1", "conv2d_7b")
    heads = ("classif",)
    min_size = 75

    def __init__(self, num_classes=1000, in_chans=3, layers=(10, 20, 9), dropout=0.0, width_mult=1.0):
        super().__init__(num_classes, in_chans)
        check_layers(layers, 3)
        make = Convolutions(width_mult)
        self.conv2d_1a = BasicConv2d(in_chans, make.channels(32), 3, 2)
        self.conv2d_2a = make.one(32, 32, 3, padding=0)
        self.conv2d_2b = make.one(32, 64, 3)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = make.one(64, 80)
        self.conv2d_4a = make.one(80, 192, 3, padding=0)
        self.maxpool_5a = nn.MaxPool2d(3, 2)
        self.mixed_5b = _module_5b(make)
        self.repeat = nn.ChainSequential(*(_residual_35(make) for _ in range(layers[0])))
        self.mixed_6a = _reduction_a(make)
        self.repeat_1 = nn.ChainSequential(*(_residual_17(make) for _ in range(layers[1])))
        self.mixed_7a = _reduction_b(make)
        self.repeat_2 = nn.ChainSequential(*(_residual_8(make) for _ in range(layers[2])))
        self.block8 = _residual_8(make, scale=1.0, relu=False)
        self.conv2d_7b = make.one(2080, 1536)
        self.dropout = nn.Dropout(dropout)
        self.classif = nn.Linear(make.channels(1536), num_classes)

    def classify(self, x):
        return self.classif(self.dropout(chain.mean(x)))


MODELS = {"inception_resnet_v2": Entry(InceptionResNetV2, 2016, 299)}
