"""AlexNet: the network of 2012, as the decks draw it and as its two towers, and torchvision's form of 2014.

Krizhevsky, Sutskever and Hinton: ImageNet classification with deep convolutional neural networks, 2012. Krizhevsky:
One weird trick for parallelizing convolutional neural networks, 2014. The parameter names of `alexnet` are those of
torchvision.models.alexnet, whose weights load unchanged.
"""

from functools import partial

import torch

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network, round_channels


class AlexNet(Network):
    """AlexNet in the form of 2014, torchvision's: one tower of fewer filters, no normalisation.

        image     3x224x224
        features  conv 11x11, stride 4, pad 2    64x55x55     pool 3x3, stride 2    64x27x27
                  conv 5x5                      192x27x27     pool 3x3, stride 2   192x13x13
                  conv 3x3                      384x13x13
                  conv 3x3                      256x13x13
                  conv 3x3                      256x13x13     pool 3x3, stride 2   256x6x6
        classifier  dropout, 4096; dropout, 4096; 1000 classes

    61,100,840 parameters. A ReLU follows every layer but the last; smaller and larger images are averaged to 6x6.

        >>> model = create_model("alexnet", num_classes=10, width_mult=0.125)
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        width_mult: filters and hidden units are multiplied with it and rounded to multiples of 8.
        dropout: probability before each of the two hidden layers of the classifier.

    Shape: images [N, in_chans, H, W] with H, W of at least 63 -> logits [N, num_classes].
    """

    body = ("features", "avgpool")
    feature_stages = ("features.1", "features.4", "features.11", "features.12")
    heads = ("classifier.6",)
    min_size = 63

    def __init__(self, num_classes=1000, in_chans=3, width_mult=1.0, dropout=0.5):
        super().__init__(num_classes, in_chans)
        a, b, c, d, hidden = (round_channels(n, width_mult) for n in (64, 192, 384, 256, 4096))
        relu, pool = partial(nn.ReLU, inplace=True), partial(nn.MaxPool2d, 3, 2)
        self.features = nn.ChainSequential(
            *(nn.Conv2d(in_chans, a, 11, 4, 2), relu(), pool()),
            *(nn.Conv2d(a, b, 5, padding=2), relu(), pool()),
            *(nn.Conv2d(b, c, 3, padding=1), relu()),
            *(nn.Conv2d(c, d, 3, padding=1), relu()),
            *(nn.Conv2d(d, d, 3, padding=1), relu(), pool()),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            *(nn.Dropout(dropout), nn.Linear(d * 36, hidden), relu()),
            *(nn.Dropout(dropout), nn.Linear(hidden, hidden), relu()),
            nn.Linear(hidden, num_classes),
        )

    def classify(self, x):
        return self.classifier(chain.materialize(x).flatten(1))


class TowerNorm(nn.Module):
    """Local response normalisation of the paper, in each of `groups` towers by itself: [N, C, H, W], the same out.

    Its alpha of 1e-4 is of the sum over n = 5 channels, torch's of the mean. k = 2, beta = 0.75.
    """

    def __init__(self, groups):
        super().__init__()
        self.groups = groups
        self.norm = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)

    def forward(self, x):
        if self.groups == 1:
            return self.norm(x)
        return torch.cat([self.norm(tower) for tower in x.chunk(self.groups, 1)], 1)


class AlexNetLayers(Network):
    """Five convolutions, pools after the first, second and fifth, norms after the first two pools, three linear layers.

    Args:
        num_classes, in_chans: as of Network.
        convolutions: the five, in order.
        ceil_mode: of the pools.
        std: standard deviation of the weights at the start.
        biases: {name of a layer: its biases at the start}; 0 for the others.
        groups: of TowerNorm.
        hidden: outputs of fc6 and fc7.
        dropout: probability after each of them.
    """

    body = (
        "conv1", "relu1", "pool1", "norm1", "conv2", "relu2", "pool2", "norm2", "conv3", "relu3", "conv4", "relu4",
        "conv5", "relu5", "pool3", "avgpool",
    )  # fmt: skip
    feature_stages = ("relu1", "relu2", "relu5", "pool3")
    heads = ("fc8",)

    def __init__(self, num_classes, in_chans, convolutions, ceil_mode, std, biases, groups, hidden, dropout):
        super().__init__(num_classes, in_chans)
        for i, convolution in enumerate(convolutions, 1):
            self.add_module(f"conv{i}", convolution)
            self.add_module(f"relu{i}", nn.ReLU(inplace=True))
        self.pool1, self.pool2, self.pool3 = (nn.MaxPool2d(3, 2, ceil_mode=ceil_mode) for _ in range(3))
        self.norm1, self.norm2 = TowerNorm(groups), TowerNorm(groups)
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        units = self.conv5.out_channels * 36
        self.fc6, self.relu6, self.drop6 = nn.Linear(units, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)
        self.fc7, self.relu7, self.drop7 = nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)
        self.fc8 = nn.Linear(hidden, num_classes)
        for name, module in self.named_children():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, std=std)
                nn.init.constant_(module.bias, biases.get(name, 0.0))

    def classify(self, x):
        x = self.drop6(self.relu6(self.fc6(chain.materialize(x).flatten(1))))
        return self.fc8(self.drop7(self.relu7(self.fc7(x))))


class AlexNetLRN(AlexNetLayers):
    """AlexNet as the decks have it: 227x227 images, overlapping pools, local response normalisation, dropout.

        image                              3x227x227
        conv1  96 11x11, stride 4, pad 0   96x55x55       34,944 parameters: 11 * 11 * 3 * 96 = 34,848 weights
        pool1  3x3, stride 2; norm1        96x27x27
        conv2  256 5x5, pad 2             256x27x27      614,656   in two towers 307,456
        pool2  3x3, stride 2; norm2       256x13x13
        conv3  384 3x3, pad 1             384x13x13      885,120
        conv4  384 3x3, pad 1             384x13x13    1,327,488   in two towers 663,936
        conv5  256 3x3, pad 1             256x13x13      884,992   in two towers 442,624
        pool3  3x3, stride 2              256x6x6
        fc6    4096                                   37,752,832
        fc7    4096                                   16,781,312
        fc8    1000 classes                            4,097,000

    62,378,344 parameters as `alexnet_lrn`, 60,965,224 as `alexnet_towers`, the network that was trained on two GPUs of
    3 GB, half of the feature maps ([55x55x48]) on each: there conv2, conv4 and conv5 see the maps of their own GPU
    alone, which is a convolution in two groups, and conv3 and the fully connected layers see all. The decks say 60M,
    35K for conv1.

    Where the paper differs: its images are 224x224, which gives 55x55 only with a padding that it does not name; norm1
    and norm2 stand there before the pools. Biases are not counted in the decks' 35K.

    Weights start as in the paper, N(0, 0.01^2), and in a narrower network so that its sums vary as much; biases of
    conv2, conv4, conv5, fc6 and fc7 at 1, the others at 0.

        >>> model = create_model("alexnet_towers", num_classes=10, width_mult=0.125)
        >>> model(torch.zeros(2, 3, 227, 227)).shape
        torch.Size([2, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        groups: 1, or 2 for the two towers.
        width_mult: filters and hidden units are multiplied with it and rounded to multiples of 8.
        dropout: probability after fc6 and fc7.
        bias: of conv2, conv4, conv5, fc6 and fc7 at the start.

    Shape: images [N, in_chans, 227, 227] -> logits [N, num_classes]. Images of another size, at least 67, are averaged
    to 6x6 after pool3.

    Raises:
        ValueError: groups is not 1 or 2.
    """

    min_size = 67

    def __init__(self, num_classes=1000, in_chans=3, groups=1, width_mult=1.0, dropout=0.5, bias=1.0):
        if groups not in (1, 2):
            raise ValueError(f"groups must be 1 or 2, got {groups!r}")
        a, b, c, hidden = (round_channels(n, width_mult) for n in (96, 256, 384, 4096))
        convolutions = (
            nn.Conv2d(in_chans, a, 11, 4),
            nn.Conv2d(a, b, 5, padding=2, groups=groups),
            nn.Conv2d(b, c, 3, padding=1),
            nn.Conv2d(c, c, 3, padding=1, groups=groups),
            nn.Conv2d(c, b, 3, padding=1, groups=groups),
        )
        biases = dict.fromkeys(("conv2", "conv4", "conv5", "fc6", "fc7"), bias)
        std = 0.01 / width_mult**0.5
        super().__init__(num_classes, in_chans, convolutions, False, std, biases, groups, hidden, dropout)


MODELS = {
    "alexnet": Entry(AlexNet, 2014),
    "alexnet_lrn": Entry(AlexNetLRN, 2012, 227),
    "alexnet_towers": Entry(partial(AlexNetLRN, groups=2), 2012, 227),
}
