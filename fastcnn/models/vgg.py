"""VGG (Simonyan and Zisserman: Very deep convolutional networks for large-scale image recognition, 2015).

The parameter names are those of torchvision.models.vgg11 to vgg19_bn, whose weights load unchanged; `pretrained` also
takes timm's files, where the linear layers are convolutions of the 7x7 map.
"""

from functools import partial

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network, check_layers, he_normal, round_channels
from fastcnn.names import check_name
from fastcnn.nn.blocks import UNFUSED, unfuse

WIDTHS = (64, 128, 256, 512, 512)
# 3x3 convolutions before each of the five pools: nets A, B, D and E of table 1 of the paper
LAYERS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


class VGG(Network):
    """VGG: 3x3 convolutions with stride 1 and pad 1, 2x2 max pools with stride 2, three linear layers; nothing else.

        image    3x224x224                           VGG-16, in the decks' table: numbers     weights
        conv3-64, conv3-64        64x224x224         3.2M each                         1,728 +    36,864
        pool                      64x112x112         800K
        conv3-128, conv3-128     128x112x112         1.6M each                        73,728 +   147,456
        pool                     128x56x56           400K
        conv3-256, three times   256x56x56           800K each                       294,912 + 2 * 589,824
        pool                     256x28x28           200K
        conv3-512, three times   512x28x28           400K each                     1,179,648 + 2 * 2,359,296
        pool                     512x14x14           100K
        conv3-512, three times   512x14x14           100K each                                 3 * 2,359,296
        pool                     512x7x7              25K
        FC 4096, FC 4096, FC 1000                                     102,760,448 + 16,777,216 + 4,096,000

    VGG-11, 13, 16 and 19 have 1, 2, 2, 2 convolutions in the first two stages and 2, 2, 3, 4 in the other three, each
    with its ReLU; with `_bn` batch norm, which is not the paper's, stands between the two. A dropout follows the ReLU
    of each of the first two linear layers. `grow` makes the next deeper one from a trained network.

        vgg11 132,863,336    vgg13 133,047,848    vgg16 138,357,544    vgg19 143,667,240 parameters
        _bn   132,868,840          133,053,736          138,365,992          143,678,248

    The decks say 138M (and 140M) parameters and 24M numbers, 96 MB, per image. Their own lines of numbers add up to
    15.2M (15,237,608), 61 MB in fp32.

    Three 3x3 convolutions in a row see 7x7 pixels, with 3 * 9 C^2 weights in place of 49 C^2 and two more ReLUs.

        >>> model = create_model("vgg11", num_classes=10, width_mult=0.125)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Args:
        layers: convolutions of each stage.
        num_classes: number of outputs.
        in_chans: channels of the images.
        batch_norm: whether batch norm follows each convolution.
        width_mult: filters and hidden units are multiplied with it and rounded to multiples of 8.
        dropout: probability before the second and the third linear layer.

    Shape: images [N, in_chans, H, W] with H, W of at least 32 -> logits [N, num_classes]; the last map is averaged to
    7x7, which at 224x224 it is.
    """

    body = ("features", "avgpool")
    heads = ("classifier.6",)
    min_size = 32

    def __init__(self, layers, num_classes=1000, in_chans=3, batch_norm=False, width_mult=1.0, dropout=0.5):
        super().__init__(num_classes, in_chans)
        check_layers(layers, len(WIDTHS))
        self.layers, self.batch_norm, self.width_mult = tuple(layers), batch_norm, width_mult
        features, stages, channels = [], [], in_chans
        for width, count in zip(WIDTHS, layers, strict=True):
            width = round_channels(width, width_mult)
            for _ in range(count):
                features += [nn.Conv2d(channels, width, 3, padding=1)]
                features += [nn.BatchNorm2d(width)] if batch_norm else []
                features += [nn.ReLU(inplace=True)]
                channels = width
            stages.append(f"features.{len(features) - 1}")
            features.append(nn.MaxPool2d(2, 2))
        self.feature_stages = (*stages, f"features.{len(features) - 1}")
        self.features = nn.ChainSequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        hidden = round_channels(4096, width_mult)
        self.classifier = nn.Sequential(
            *(nn.Linear(channels * 49, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)),
            *(nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)),
            nn.Linear(hidden, num_classes),
        )
        he_normal(self)
        for layer in (0, 3, 6):
            nn.init.normal_(self.classifier[layer].weight, std=0.01)

    def classify(self, x):
        return self.classifier(chain.materialize(x).flatten(1))

    def names_elsewhere(self):
        # timm's
        return {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}


def grow(model, name, first=4):
    """A deeper VGG that starts as the paper trained its own: with layers injected into a trained shallower one.

    The convolutions of a stage of `model` become the first ones of that stage, with their batch norms; its linear
    layers stay. The injected layers, and the convolutions beyond `first`, have fresh weights.

        >>> trained = create_model("vgg11", num_classes=10, width_mult=0.125)
        >>> model = fastcnn.models.grow(trained, "vgg13")
        >>> torch.equal(model.features[5].weight, trained.features[3].weight)
        True

    Args:
        model: VGG; it is left as it is.
        name: "vgg13", "vgg16" or "vgg19", deeper than the model. It has the model's batch norms, width, classes and
            dropout.
        first: how many of its convolutions, from the image on, are carried over: the paper's 4; None for all.

    Returns:
        VGG: on the model's device, in its dtype and mode.

    Raises:
        TypeError: model is no VGG.
        ValueError: it has no classifier, name is no deeper VGG, or first no number of the model's convolutions.
    """
    if not isinstance(model, VGG):
        raise TypeError(f"model must be a fastcnn.models.VGG, got {type(model).__name__}")
    if model.features_only or not model.num_classes:
        raise ValueError("model must have its classifier; it was made without, or lost it")
    check_name("VGG", name, list(LAYERS))
    counts = LAYERS[name]
    if counts == model.layers or any(old > new for old, new in zip(model.layers, counts, strict=True)):
        raise ValueError(f"name must be of a deeper network than the model with {model.layers}, got {name!r}")
    total = sum(model.layers)
    first = total if first is None else first
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first <= total:
        raise ValueError(f"first must be an int of 0 to {total}, or None, got {first!r}")
    options = dict(batch_norm=model.batch_norm, width_mult=model.width_mult, dropout=model.classifier[2].p)
    deeper = VGG(counts, model.num_classes, model.in_chans, **options)
    weight = model.classifier[0].weight
    deeper.to(weight.device, weight.dtype).train(model.training)
    stages = zip(_stages(model), _stages(deeper), strict=True)
    convolutions = [pair for old, new in stages for pair in zip(old, new, strict=False)]
    linear = [([model.classifier[i]], [deeper.classifier[i]]) for i in (0, 3, 6)]
    for old, new in convolutions[:first] + linear:
        for source, target in zip(old, new, strict=True):
            target.load_state_dict(source.state_dict())
    return unfuse(deeper) if model.__dict__.get(UNFUSED) else deeper


def _stages(model):
    # of each stage, of each of its convolutions, [convolution, or convolution and batch norm]
    stages, units = [], []
    for module in model.features:
        if isinstance(module, nn.Conv2d):
            units.append([module])
        elif isinstance(module, nn.BatchNorm2d):
            units[-1].append(module)
        elif isinstance(module, nn.MaxPool2d):
            stages.append(units)
            units = []
    return stages


MODELS = {
    f"{name}{'_bn' if batch_norm else ''}": Entry(partial(VGG, layers, batch_norm=batch_norm), 2014)
    for name, layers in LAYERS.items()
    for batch_norm in (False, True)
}
