"""OverFeat (Sermanet, Eigen, Zhang, Mathieu, Fergus and LeCun: OverFeat: integrated recognition, localization and
detection using convolutional networks, 2014): AlexNet without normalisation, made to slide.

No library has this network; the layers and the numbers of parameters are those of the paper's tables 1, 3 and 4.
"""

from functools import partial

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network

# outputs, kernel size, stride, padding, size of the max pool that follows (its stride, too) or None
FAST = (
    (96, 11, 4, 0, 2), (256, 5, 1, 0, 2), (512, 3, 1, 1, None), (1024, 3, 1, 1, None), (1024, 3, 1, 1, 2),
)  # fmt: skip
ACCURATE = (
    (96, 7, 2, 0, 3), (256, 7, 1, 0, 2), (512, 3, 1, 1, None), (512, 3, 1, 1, None), (1024, 3, 1, 1, None),
    (1024, 3, 1, 1, 3),
)  # fmt: skip


class OverFeat(Network):
    """Five convolutions (the accurate model: six) and three linear layers, which slide as convolutions.

        image            3x231x231
        conv 11x11 / 4   96x56x56       34,944 parameters
        max pool 2x2     96x28x28
        conv 5x5         256x24x24     614,656
        max pool 2x2     256x12x12
        conv 3x3         512x12x12   1,180,160
        conv 3x3         1024x12x12  4,719,616
        conv 3x3         1024x12x12  9,438,208
        max pool 2x2     1024x6x6
        linear           3072      113,249,280
        linear           4096       12,587,008
        linear           1000        4,097,000

    That is the fast model with 145,920,872 parameters ("145 million" in table 4); the accurate one of 221x221 images
    has 144,656,488 ("144 million"). The paper counts 2810 and 5369 million connections, these layers make 2801 and 5355
    million multiply-adds. After every layer but the last comes ReLU, before the last two linear layers dropout.

    The decks show what it is for: "sliding window with ConvNet", feature maps of 256 channels, class maps of C=1000,
    and a regression network that gives [X, Y, W, H] (here the features have 1024 channels):

        >>> small = create_model("overfeat", widths=(8, 8, 8, 8, 8), hidden=(16, 16), image_size=103, num_classes=5)
        >>> slid = fastcnn.models.to_fully_convolutional(small, image_size=103)
        >>> slid(torch.zeros(1, 3, 167, 135)).shape, slid.stride
        (torch.Size([1, 5, 3, 2]), (32, 32))
        >>> scores, boxes = fastcnn.models.Detector(slid, hidden=(16, 8))(torch.zeros(1, 3, 167, 135))
        >>> boxes.shape
        torch.Size([1, 4, 3, 2])

    The paper's windows lie closer together: it pools the last layer at every offset; here they are as far apart as the
    network's stride, 32 pixels (36 in the accurate model).

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        layers: (outputs, kernel size, stride, padding, max pool or None) of the convolutions.
        widths: their outputs; None for those of layers.
        hidden: outputs of the first two linear layers.
        image_size: height and width of the images.
        dropout: probability before the second and third linear layer.
        std: standard deviation of the first weights, 0.01 in the paper: too little for narrow layers. Biases are 0.

    Shape: images [N, in_chans, image_size, image_size] -> logits [N, num_classes].
    """

    body = ("features",)
    heads = ("classifier.6",)

    def __init__(
        self, num_classes=1000, in_chans=3, layers=FAST, widths=None, hidden=(3072, 4096), image_size=231, dropout=0.5,
        std=0.01,
    ):  # fmt: skip
        super().__init__(num_classes, in_chans)
        widths = [layer[0] for layer in layers] if widths is None else widths
        if len(widths) != len(layers) or len(hidden) != 2:
            raise ValueError(f"widths must have {len(layers)} numbers and hidden 2, got {widths!r} and {hidden!r}")
        self.image_size = size = image_size
        features, channels, stages = [], in_chans, []
        for width, (_, kernel, stride, padding, pool) in zip(widths, layers, strict=True):
            features += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU(inplace=True)]
            size, channels = (size + 2 * padding - kernel) // stride + 1, width
            if pool:
                features.append(nn.MaxPool2d(pool))
                size //= pool
            stages.append(f"features.{len(features) - 1}")
        if size < 1:
            raise ValueError(f"image_size is too small for these layers: {image_size}")
        self.feature_stages = tuple(stages)
        self.features = nn.ChainSequential(*features)
        self.classifier = nn.Sequential(
            *(nn.Linear(channels * size * size, hidden[0]), nn.ReLU(inplace=True), nn.Dropout(dropout)),
            *(nn.Linear(hidden[0], hidden[1]), nn.ReLU(inplace=True), nn.Dropout(dropout)),
            nn.Linear(hidden[1], num_classes),
        )
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=std)
            else:
                nn.init.zeros_(parameter)

    def check_images(self, x):
        if x.ndim != 4 or x.shape[1] != self.in_chans or x.shape[2:] != (self.image_size, self.image_size):
            size = f"{self.image_size}, {self.image_size}"
            raise ValueError(
                f"OverFeat takes images of shape [N, {self.in_chans}, {size}], got {list(x.shape)}; "
                "larger ones: fastcnn.models.to_fully_convolutional"
            )

    def classify(self, x):
        return self.classifier(chain.materialize(x).flatten(1))


MODELS = {
    "overfeat": Entry(OverFeat, 2014, 231),
    "overfeat_accurate": Entry(partial(OverFeat, layers=ACCURATE, hidden=(4096, 4096), image_size=221), 2014, 221),
}
