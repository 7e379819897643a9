"""Inception v4 (Szegedy, Ioffe, Vanhoucke and Alemi: Inception-v4, Inception-ResNet and the impact of residual
connections on learning, 2016).

The parameter names are those of timm's inception_v4, whose weights load unchanged.
"""

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network, check_layers
from fastcnn.nn.inception_blocks import BasicConv2d, Branches, Convolutions

WIDE, TALL = (1, 7), (7, 1)


def _pooled(make, inputs, outputs):
    return nn.ChainSequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), make.one(inputs, outputs))


def _stem(make):
    # three concatenations, 73x73x160, 71x71x192 and 35x35x384
    return [
        Branches({"maxpool": nn.MaxPool2d(3, 2)}, {"conv": make.one(64, 96, 3, 2)}),
        Branches(
            {"branch0": nn.ChainSequential(make.one(160, 64), make.one(64, 96, 3, padding=0))},
            {
                "branch1": nn.ChainSequential(
                    *make.chain(160, (64, 1), (64, WIDE), (64, TALL)), make.one(64, 96, 3, padding=0)
                )
            },
        ),
        Branches({"conv": make.one(192, 192, 3, 2)}, {"maxpool": nn.MaxPool2d(3, 2)}),
    ]


def _module_a(make):
    return Branches(
        {"branch0": make.one(384, 96)},
        {"branch1": make.chain(384, (64, 1), (96, 3))},
        {"branch2": make.chain(384, (64, 1), (96, 3), (96, 3))},
        {"branch3": _pooled(make, 384, 96)},
    )


def _reduction_a(make):
    return Branches(
        {"branch0": make.one(384, 384, 3, 2)},
        {"branch1": make.chain(384, (192, 1), (224, 3), (256, 3, 2))},
        {"branch2": nn.MaxPool2d(3, 2)},
    )


def _module_b(make):
    return Branches(
        {"branch0": make.one(1024, 384)},
        {"branch1": make.chain(1024, (192, 1), (224, WIDE), (256, TALL))},
        {"branch2": make.chain(1024, (192, 1), (192, TALL), (224, WIDE), (224, TALL), (256, WIDE))},
        {"branch3": _pooled(make, 1024, 128)},
    )


def _reduction_b(make):
    return Branches(
        {"branch0": make.chain(1024, (192, 1), (192, 3, 2))},
        {"branch1": make.chain(1024, (256, 1), (256, WIDE), (320, TALL), (320, 3, 2))},
        {"branch2": nn.MaxPool2d(3, 2)},
    )


def _module_c(make):
    def fork(name, inputs):
        return {f"{name}a": make.one(inputs, 256, (1, 3)), f"{name}b": make.one(inputs, 256, (3, 1))}

    return Branches(
        {"branch0": make.one(1536, 256)},
        {"branch1_0": make.one(1536, 384), "fork": fork("branch1_1", 384)},
        {
            "branch2_0": make.one(1536, 384),
            "branch2_1": make.one(384, 448, (3, 1)),
            "branch2_2": make.one(448, 512, (1, 3)),
            "fork": fork("branch2_3", 512),
        },
        {"branch3": _pooled(make, 1536, 256)},
    )


class InceptionV4(Network):
    """Inception v4: a stem with branches, fourteen modules, two reductions, the mean, one linear layer.

        ==================  ==============================================================  ==============
        for 299x299 images  layers                                                          output
        ==================  ==============================================================  ==============
        stem                3x3 of stride 2, 3x3, 3x3                                       147 x 147 x 64
                            max pool of stride 2 | 3x3 of stride 2                          73 x 73 x 160
                            1x1, 3x3 | 1x1, 1x7, 7x1, 3x3                                   71 x 71 x 192
                            3x3 of stride 2 | max pool of stride 2                          35 x 35 x 384
        4 Inception A       1x1 | 1x1, 3x3 | 1x1, 3x3, 3x3 | average pool, 1x1              35 x 35 x 384
        Reduction A         3x3 of stride 2 | 1x1, 3x3, 3x3 of stride 2 | max pool          17 x 17 x 1024
        7 Inception B       1x1 | 1x1, 1x7, 7x1 | 1x1, 7x1, 1x7, 7x1, 1x7 | average pool,   17 x 17 x 1024
                            1x1
        Reduction B         1x1, 3x3 of stride 2 | 1x1, 1x7, 7x1, 3x3 of stride 2 |         8 x 8 x 1536
                            max pool
        3 Inception C       1x1 | 1x1, then 1x3 | 3x1 | 1x1, 3x1, 1x3, then 1x3 | 3x1 |     8 x 8 x 1536
                            average pool, 1x1
        head                mean, dropout, linear layer                                     1000
        ==================  ==============================================================  ==============

    The decks call it "ResNet + Inception"; the paper's residual networks are Inception-ResNet (InceptionResNetV2 here),
    and Inception v4 has no shortcuts. This is timm's network, 42,679,816 parameters, and the paper's.

        >>> model = create_model("inception_v4", num_classes=10, layers=(1, 1, 1))
        >>> model(torch.zeros(2, 3, 75, 75)).shape
        torch.Size([2, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        layers: how many modules A, B and C.
        dropout: probability before the linear layer; 0.2 in the paper, 0 in timm.
        width_mult: all channels are multiplied by it, a multiple of 1/16.

    Shape: images [N, in_chans, H, W] of at least 75x75 -> logits [N, num_classes].
    """

    body = ("features",)
    heads = ("last_linear",)
    min_size = 75

    def __init__(self, num_classes=1000, in_chans=3, layers=(4, 7, 3), dropout=0.0, width_mult=1.0):
        super().__init__(num_classes, in_chans)
        check_layers(layers, 3)
        make = Convolutions(width_mult)
        modules = [
            BasicConv2d(in_chans, make.channels(32), 3, 2),
            make.one(32, 32, 3, padding=0),
            make.one(32, 64, 3),
            *_stem(make),
        ]
        modules += [_module_a(make) for _ in range(layers[0])] + [_reduction_a(make)]
        modules += [_module_b(make) for _ in range(layers[1])] + [_reduction_b(make)]
        modules += [_module_c(make) for _ in range(layers[2])]
        self.features = nn.ChainSequential(*modules)
        ends = (5 + layers[0], 6 + layers[0] + layers[1], len(modules) - 1)
        self.feature_stages = tuple(f"features.{i}" for i in (2, 3, *ends))
        self.dropout = nn.Dropout(dropout)
        self.last_linear = nn.Linear(make.channels(1536), num_classes)

    def classify(self, x):
        return self.last_linear(self.dropout(chain.mean(x)))


MODELS = {"inception_v4": Entry(InceptionV4, 2016, 299)}
