"""Network in network (Lin, Chen and Yan: Network in network, 2014)."""

from functools import partial

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network, he_normal


class MlpConv(nn.ChainSequential):
    """A convolution and two 1x1 ones, each with a ReLU: at every place the same perceptron of three layers.

    Args:
        inputs: input channels.
        widths: output channels of the three.
        kernel_size, stride, padding: of the first.
    """

    def __init__(self, inputs, widths, kernel_size, stride=1, padding=0):
        a, b, c = widths
        super().__init__(
            *(nn.Conv2d(inputs, a, kernel_size, stride, padding), nn.ReLU(inplace=True)),
            *(nn.Conv2d(a, b, 1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(b, c, 1), nn.ReLU(inplace=True)),
        )


class NiN(Network):
    """Network in network: mlpconv layers, pools between them, and no fully connected layer: the last layer has one map
    per class, whose mean is the class's score.

        nin_cifar                                              nin
        image     3x32x32                                      image     3x224x224
        mlpconv1  5x5, pad 2; 192, 160, 96    96x32x32         mlpconv1  11x11, stride 4; 96, 96, 96     96x54x54
        pool1     max 3x3, stride 2           96x16x16         pool1     max 3x3, stride 2               96x27x27
        mlpconv2  5x5, pad 2; 192, 192, 192  192x16x16         mlpconv2  5x5, pad 2; 256, 256, 256      256x27x27
        pool2     mean 3x3, stride 2         192x8x8           pool2     max 3x3, stride 2              256x13x13
        mlpconv3  3x3, pad 1; 192, 192, 10    10x8x8           mlpconv3  3x3, pad 1; 384, 384, 384      384x13x13
        mean                                  10               pool3     max 3x3, stride 2              384x6x6
                                                               mlpconv4  3x3, pad 1; 1024, 1024, 1000  1000x6x6
                                                               mean                                    1000

    966,986 parameters for CIFAR's ten classes, 7,595,176 for ImageNet's thousand: the paper has three mlpconv layers
    and gives no widths, the numbers are those of its authors' published definitions. The decks describe the mlpconv
    layer ("micronetwork within each conv layer", 1x1 convolutions) and give no sizes. Pools count the pixels left over
    at the border; a dropout follows pool1 and pool2, in `nin` pool3 alone. He initialisation; the paper names none.

        >>> model = create_model("nin_cifar")
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Args:
        plan: of each mlpconv layer (kernel size, stride, padding, widths); the last width becomes num_classes.
        pools: "max" or "avg", of each pool, one between two layers.
        drops: whether a dropout follows each pool.
        num_classes: number of outputs.
        in_chans: channels of the images.
        dropout: its probability.

    Shape: images [N, in_chans, H, W] with H, W of at least 4 (nin_cifar) or 39 (nin) -> logits [N, num_classes].
    """

    def __init__(self, plan, pools, drops, num_classes, in_chans=3, dropout=0.5):
        super().__init__(num_classes, in_chans)
        body, stages, channels = [], [], in_chans
        for i, (kernel_size, stride, padding, widths) in enumerate(plan, 1):
            last = i == len(plan)
            widths = (*widths[:2], num_classes) if last else widths
            parts = {f"mlpconv{i}": MlpConv(channels, widths, kernel_size, stride, padding)}
            channels = widths[2]
            if not last:
                kind = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}[pools[i - 1]]
                parts[f"pool{i}"] = kind(3, 2, ceil_mode=True)
                if drops[i - 1]:
                    parts[f"drop{i}"] = nn.Dropout(dropout)
                stages.append(f"mlpconv{i}")
            for name, module in parts.items():
                self.add_module(name, module)
                body.append(name)
        self.min_size = _smallest(plan)
        self.body, self.feature_stages = tuple(body), (*stages, f"mlpconv{len(plan)}.3")
        self.heads = (f"mlpconv{len(plan)}.4",)
        he_normal(self)

    def classify(self, x):
        return chain.mean(x)


def _smallest(plan):
    # the images of which one pixel is left
    size = 1
    for i, (kernel_size, stride, padding, _) in enumerate(reversed(plan)):
        size = 2 * size if i else size  # a pool
        size = max(1, (size - 1) * stride + kernel_size - 2 * padding)
    return size


CIFAR = ((5, 1, 2, (192, 160, 96)), (5, 1, 2, (192, 192, 192)), (3, 1, 1, (192, 192, 10)))
IMAGENET = (
    (11, 4, 0, (96, 96, 96)), (5, 1, 2, (256, 256, 256)), (3, 1, 1, (384, 384, 384)), (3, 1, 1, (1024, 1024, 1000)),
)  # fmt: skip
MODELS = {
    "nin_cifar": Entry(partial(NiN, CIFAR, ("max", "avg"), (True, True), num_classes=10), 2014, 32),
    "nin": Entry(partial(NiN, IMAGENET, ("max",) * 3, (False, False, True), num_classes=1000), 2014),
}
