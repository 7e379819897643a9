"""The multi-layer perceptron that the decks compare LeNet-5 with (Rumelhart, Hinton and Williams 1986)."""

from fastcnn import nn
from fastcnn.models.network import Entry, Network


class MLP(Network):
    """A multi-layer perceptron: every unit reads all of the layer before it, the first layer all pixels.

        image   1x28x28
        hidden  784 -> 500    784 * 500 + 500 = 392,500 parameters
        fc      500 -> 10     500 * 10 + 10   =   5,010

    397,510 parameters for ten classes and one channel: the decks' figure, beside LeNet-5's 60 thousand. They give the
    number alone; 500 hidden units is what leads to it.

        >>> model = create_model("mlp")
        >>> sum(p.numel() for p in model.parameters())
        397510
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        image_size: height and width of the images.
        hidden: units of each hidden layer.

    Shape: images [N, in_chans, image_size, image_size] -> logits [N, num_classes]; the features are the hidden
    layers, [N, units].

    Raises:
        ValueError: hidden is empty.
    """

    body = ("hidden",)
    heads = ("fc",)

    def __init__(self, num_classes=10, in_chans=1, image_size=28, hidden=(500,)):
        super().__init__(num_classes, in_chans)
        if not hidden:
            raise ValueError(f"hidden must give the units of at least one layer, got {hidden!r}")
        self.image_size = image_size
        layers, units = [nn.Flatten()], in_chans * image_size**2
        for width in hidden:
            layers += [nn.Linear(units, width), nn.ReLU(inplace=True)]
            units = width
        self.hidden = nn.Sequential(*layers)
        self.feature_stages = tuple(f"hidden.{2 * i + 2}" for i in range(len(hidden)))
        self.fc = nn.Linear(units, num_classes)

    def check_images(self, x):
        shape = [self.in_chans, self.image_size, self.image_size]
        if x.ndim != 4 or list(x.shape[1:]) != shape:
            raise ValueError(f"MLP takes images of shape [N, {', '.join(map(str, shape))}], got {list(x.shape)}")

    def classify(self, x):
        return self.fc(x)


MODELS = {"mlp": Entry(MLP, 1986, 28)}
