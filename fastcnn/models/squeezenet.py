"""SqueezeNet (Iandola, Han, Moskewicz, Ashraf, Dally and Keutzer: SqueezeNet: AlexNet-level accuracy with 50x fewer
parameters and <0.5MB model size, 2016).

The parameter names are those of torchvision.models.squeezenet1_0 and squeezenet1_1, whose weights load unchanged.
"""

from functools import partial

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network
from fastcnn.nn.blocks import Block, call, conv_act, shared
from fastcnn.ops.concatenate import Buffer

# of each fire module (channels of squeeze, of each half of expand), "pool" where one stands between them
FIRES = {
    "1_0": ((16, 64), (16, 64), (32, 128), "pool", (32, 128), (48, 192), (48, 192), (64, 256), "pool", (64, 256)),
    "1_1": ((16, 64), (16, 64), "pool", (32, 128), (32, 128), "pool", (48, 192), (48, 192), (64, 256), (64, 256)),
}


class Fire(Block):
    """A fire module: 1x1 filters to few channels, then 1x1 and 3x3 filters of these, side by side. torchvision's keys.

    In training both halves are written into one memory before their ReLU, which the next layer applies.

    Args:
        inputs: input channels.
        squeezed: channels between.
        expanded: output channels of the 1x1 filters, and of the 3x3 ones.
    """

    def __init__(self, inputs, squeezed, expanded):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def values(self, x):
        x = shared(self, conv_act(x, self.squeeze, self.squeeze_activation))
        first = self.expand1x1.out_channels
        buffer = Buffer(first + self.expand3x3.out_channels)
        ones = conv_act(x, self.expand1x1, self.expand1x1_activation, buffer.slot(0))
        threes = conv_act(x, self.expand3x3, self.expand3x3_activation, buffer.slot(first))
        return chain.cat([ones, threes])


class SqueezeNet(Network):
    """SqueezeNet: fire modules, three pools, no fully connected layer: the last layer has one map per class, whose mean
    is the class's score.

        squeezenet1_0                           squeezenet1_1
        image     3x224x224                     image    3x224x224
        conv 7x7, stride 2    96x109x109        conv 3x3, stride 2    64x111x111
        pool 3x3, stride 2    96x54x54          pool 3x3, stride 2    64x55x55
        2 fires 16 -> 128    128x54x54          2 fires 16 -> 128    128x55x55
        fire 32 -> 256       256x54x54          pool                 128x27x27
        pool                 256x27x27          2 fires 32 -> 256    256x27x27
        fire 32 -> 256       256x27x27          pool                 256x13x13
        2 fires 48 -> 384    384x27x27          2 fires 48 -> 384    384x13x13
        fire 64 -> 512       512x27x27          2 fires 64 -> 512    512x13x13
        pool                 512x13x13          dropout, 1x1 conv   1000x13x13
        fire 64 -> 512       512x13x13          mean                1000
        dropout, 1x1 conv   1000x13x13
        mean                1000

    1,248,424 parameters (1.0) and 1,235,496 (1.1, with 2.4 times fewer operations). The decks: "50x fewer parameters"
    than AlexNet, of whose 60,965,224 they are 1 / 49, and "510x smaller" (0.5 MB) after pruning and coding of the
    weights. This is the paper's network without the shortcuts that it also tries.

        >>> model = create_model("squeezenet1_1", num_classes=10)
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])

    Args:
        version: "1_0", the paper's, or "1_1".
        num_classes: number of outputs.
        in_chans: channels of the images.
        dropout: probability before the last convolution.

    Shape: images [N, in_chans, H, W] with H, W of at least 21 (1.0) or 17 (1.1) -> logits [N, num_classes].
    """

    body = ("features",)
    heads = ("classifier.1",)

    def __init__(self, version, num_classes=1000, in_chans=3, dropout=0.5):
        super().__init__(num_classes, in_chans)
        channels, size = {"1_0": (96, 7), "1_1": (64, 3)}[version]
        self.min_size = 14 + size
        pool = partial(nn.MaxPool2d, 3, 2, ceil_mode=True)
        layers = [nn.Conv2d(in_chans, channels, size, 2), nn.ReLU(inplace=True), pool()]
        stages = [1]
        for fire in FIRES[version]:
            if fire == "pool":
                stages.append(len(layers) - 1)
                layers.append(pool())
            else:
                squeezed, expanded = fire
                layers.append(Fire(channels, squeezed, expanded))
                channels = 2 * expanded
        self.feature_stages = tuple(f"features.{i}" for i in (*stages, len(layers) - 1))
        self.features = nn.ChainSequential(*layers)
        self.classifier = nn.ChainSequential(
            nn.Dropout(dropout), nn.Conv2d(channels, num_classes, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if module is self.classifier[1]:
                    nn.init.normal_(module.weight, std=0.01)
                else:
                    nn.init.kaiming_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def classify(self, x):
        return call(self.classifier, x).flatten(1)


MODELS = {f"squeezenet{version}": Entry(partial(SqueezeNet, version), 2016) for version in FIRES}
