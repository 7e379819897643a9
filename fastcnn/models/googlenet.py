"""GoogLeNet, or Inception v1 (Szegedy et al.: Going deeper with convolutions, 2014; 2015 at CVPR).

The parameter names are those of torchvision.models.googlenet, whose weights load unchanged.
"""

from collections import namedtuple

import torch

from fastcnn import chain, nn
from fastcnn.models.inception import AuxiliaryNetwork
from fastcnn.models.network import Entry
from fastcnn.nn.blocks import Block, call
from fastcnn.nn.inception_blocks import BasicConv2d, Branches, Convolutions

# of the modules between the pools, table 1 of the paper: outputs of the 1x1 convolution, of that before the 3x3, of the
# 3x3, of that before the 5x5, of the 5x5, and of that after the pool
WIDTHS = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)  # fmt: skip

GoogLeNetOutputs = namedtuple("GoogLeNetOutputs", ["logits", "aux_logits2", "aux_logits1"])


class Inception(Branches):
    """The Inception module with dimension reduction: 1x1 | 1x1, 3x3 | 1x1, 5x5 | 3x3 max pool, 1x1, side by side.

    The decks' example, 28x28x256 in, has 128, 192 and 96 filters and reductions to 64: 28x28x480 out and 271 million
    multiply-adds, where the naive module has 28x28x672 and 854 million. (The decks add their six terms up to 358
    million, which has that of the 3x3 convolution, 87 million, twice.)

        >>> Inception(256, 128, 64, 192, 64, 96, 64)(torch.zeros(1, 256, 28, 28)).shape
        torch.Size([1, 480, 28, 28])

    Args:
        inputs: channels of the input.
        ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj: outputs of the convolutions, in the order above.
        large_kernel: 5 as in paper and decks, or 3.

    Shape: [N, inputs, H, W] -> [N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W].
    """

    def __init__(self, inputs, ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj, large_kernel=5):
        pool = nn.MaxPool2d(3, 1, 1, ceil_mode=True)
        super().__init__(
            {"branch1": BasicConv2d(inputs, ch1x1)},
            {"branch2": Convolutions().chain(inputs, (ch3x3red, 1), (ch3x3, 3))},
            {"branch3": Convolutions().chain(inputs, (ch5x5red, 1), (ch5x5, large_kernel))},
            {"branch4": nn.ChainSequential(pool, BasicConv2d(inputs, pool_proj))},
        )
        self.out_channels = ch1x1 + ch3x3 + ch5x5 + pool_proj


class NaiveInception(Branches):
    """The naive Inception module: 1x1 | 3x3 | 5x5 | 3x3 max pool, side by side.

    The pool hands all its channels on, so they can only become more from module to module.

        >>> NaiveInception(256, 128, 192, 96)(torch.zeros(1, 256, 28, 28)).shape
        torch.Size([1, 672, 28, 28])

    Args:
        inputs: channels of the input.
        ch1x1, ch3x3, ch5x5: outputs of the convolutions.
        large_kernel: 5 as in paper and decks, or 3.

    Shape: [N, inputs, H, W] -> [N, ch1x1 + ch3x3 + ch5x5 + inputs, H, W].
    """

    def __init__(self, inputs, ch1x1, ch3x3, ch5x5, large_kernel=5):
        super().__init__(
            {"branch1": BasicConv2d(inputs, ch1x1)},
            {"branch2": BasicConv2d(inputs, ch3x3, 3)},
            {"branch3": BasicConv2d(inputs, ch5x5, large_kernel)},
            {"branch4": nn.MaxPool2d(3, 1, 1, ceil_mode=True)},
        )
        self.out_channels = ch1x1 + ch3x3 + ch5x5 + inputs


class GoogLeNetAux(Block):
    """An auxiliary classifier: average pool to 4x4, 1x1 convolution, two linear layers.

    Args:
        inputs: channels of the feature map.
        num_classes: number of outputs.
        dropout: probability between the linear layers.
    """

    def __init__(self, inputs, num_classes, dropout):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(4)
        self.conv = BasicConv2d(inputs, 128)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(dropout)

    def values(self, x):
        x = chain.materialize(call(self.conv, call(self.avgpool, x)))
        return self.fc2(self.dropout(self.relu(self.fc1(x.flatten(1)))))


class GoogLeNet(AuxiliaryNetwork):
    """GoogLeNet: a stem of three convolutions, nine Inception modules, the mean, one linear layer.

        ==================  ==============================================================  ==============
        for 224x224 images  layers                                                          output
        ==================  ==============================================================  ==============
        stem                7x7 convolution, stride 2; 3x3 max pool, stride 2               56 x 56 x 64
                            1x1 and 3x3 convolution; 3x3 max pool, stride 2                 28 x 28 x 192
        inception3a, 3b     two modules; 3x3 max pool, stride 2                             14 x 14 x 480
        inception4a to 4e   five modules, classifiers after 4a and 4d; 2x2 max pool         7 x 7 x 832
        inception5a, 5b     two modules                                                     7 x 7 x 1024
        head                mean, dropout, linear layer                                     1000
        ==================  ==============================================================  ==============

    22 layers with weights (branches count once), "no FC layers" but the last, 6.7% top-5 error; the decks say "only 5
    million parameters, 12x less than AlexNet". This is torchvision's variant: 13,004,888 parameters, 6,624,904 without
    the auxiliary classifiers. It differs from the paper, and the decks, in three things: every convolution has a batch
    norm and no bias; the 5x5 convolutions are 3x3 (large_kernel=5 makes them 5x5); there is no local response
    normalisation. The stem is the decks' Conv-Pool-2xConv-Pool, an auxiliary classifier their
    AvgPool-1x1Conv-FC-FC-Softmax.

    In training it returns GoogLeNetOutputs(logits, aux_logits2, aux_logits1), as torchvision's, whose loss is that of
    the logits plus aux_weight = 0.3 times those of the auxiliary ones; evaluated, the logits alone.

    naive=True has the naive modules with the same filters and no reductions. A module's inputs are then among its
    outputs, so the channels grow from 192 over 832 (3b) and 3344 (4e) to 4944 (5b).

        >>> model = create_model("googlenet", num_classes=10)
        >>> model(torch.zeros(2, 3, 64, 64)).aux_logits1.shape
        torch.Size([2, 10])
        >>> model.eval()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        aux_logits: whether there are auxiliary classifiers.
        transform_input: as of AuxiliaryNetwork: torchvision's trained weights want it.
        dropout, dropout_aux: probability before the last linear layer, of the network and of the auxiliary classifiers.
        naive: whether the modules are NaiveInception.
        large_kernel: of the modules' third branch: 3, or 5 as in the paper.
        widths: of the modules in the three stages between the pools, for each of them what Inception takes. The
            auxiliary classifiers read the second stage's first module and its last but one.

    Shape: images [N, in_chans, H, W] of at least 15x15 -> logits [N, num_classes], in training a GoogLeNetOutputs.
    """

    heads = ("fc",)
    min_size = 15
    aux_weight = 0.3
    outputs = GoogLeNetOutputs

    def __init__(
        self, num_classes=1000, in_chans=3, aux_logits=True, transform_input=False, dropout=0.2, dropout_aux=0.7,
        naive=False, large_kernel=3, widths=WIDTHS,
    ):  # fmt: skip
        super().__init__(num_classes, in_chans, transform_input)
        if large_kernel not in (3, 5):
            raise ValueError(f"large_kernel must be 3 or 5, got {large_kernel!r}")
        if len(widths) != 3 or not all(widths) or any(len(row) != 6 for rows in widths for row in rows):
            raise ValueError(f"widths must be of three stages of at least one row of six numbers, got {widths!r}")
        self.conv1 = BasicConv2d(in_chans, 64, 7, 2, 3)
        self.maxpool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = BasicConv2d(64, 64)
        self.conv3 = BasicConv2d(64, 192, 3)
        self.maxpool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        channels, stages, body = 192, [], ["conv1", "maxpool1", "conv2", "conv3", "maxpool2"]
        for number, rows in enumerate(widths, 3):
            names = [f"inception{number}{chr(ord('a') + i)}" for i in range(len(rows))]
            for name, row in zip(names, rows, strict=True):
                if naive:
                    module = NaiveInception(channels, row[0], row[2], row[4], large_kernel)
                else:
                    module = Inception(channels, *row, large_kernel)
                self.add_module(name, module)
                channels = module.out_channels
            stages.append(names)
            body += names
            if number < 5:
                size = 3 if number == 3 else 2
                self.add_module(f"maxpool{number}", nn.MaxPool2d(size, 2, ceil_mode=True))
                body.append(f"maxpool{number}")
        self.body = tuple(body)
        self.feature_stages = ("conv1", "conv3", *(names[-1] for names in stages))
        if aux_logits:
            self.auxiliary = ((stages[1][0], "aux1"), (stages[1][-2:][0], "aux2"))
            for after, head in self.auxiliary:
                inputs = self.get_submodule(after).out_channels
                self.add_module(head, GoogLeNetAux(inputs, num_classes, dropout_aux))
            self.heads = ("fc", "aux1.fc2", "aux2.fc2")
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.01)

    def classify(self, x):
        return self.fc(self.dropout(chain.mean(x)))


MODELS = {"googlenet": Entry(GoogLeNet, 2014)}
