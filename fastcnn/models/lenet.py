"""LeNet-5 (LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998)."""

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network
from fastcnn.names import check_name

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


class LeNet5(Network):
    """LeNet-5 for 32x32 images, in the form that is taught today.

        image 1x32x32
        C1    conv 5x5         6x28x28      156 parameters
        S2    pool 2x2         6x14x14
        C3    conv 5x5        16x10x10    2,416
        S4    pool 2x2        16x5x5
        C5    fully connected  120       48,120
        F6    fully connected   84       10,164
              fully connected   10          850

    That is 61,706 parameters for ten classes and one channel. C5 covers its whole input, so as a fully connected layer
    it is the paper's convolution. Where the paper differs: S2 and S4 there have a trainable gain and bias per map, C3
    sees only a chosen subset of the maps of S2, the activation is 1.7159 tanh(2x/3), and the output layer measures
    distances to fixed codes (RBF) instead of giving logits.

    The decks: about 60 000 parameters (against the 397 510 of an MLP), 5x5 filters at stride 1, subsampling 2x2 at
    stride 2, CONV-POOL-CONV-POOL-FC-FC, "7 layers (5 excluding subsampling)" of which C1, C3 and C5 convolve.

        >>> model = create_model("lenet5", activation="tanh", pool="avg")
        >>> sum(p.numel() for p in model.parameters()), model(torch.zeros(2, 1, 32, 32)).shape
        (61706, torch.Size([2, 10]))

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        activation: "relu", "tanh" or "sigmoid" (the paper's family is tanh).
        pool: "max" or "avg" (the paper's family is avg).

    Shape: images [N, in_chans, 32, 32] -> logits [N, num_classes].
    """

    body = ("conv1", "act1", "pool1", "conv2", "act2", "pool2")
    feature_stages = ("pool1", "pool2")
    heads = ("fc3",)

    def __init__(self, num_classes=10, in_chans=1, activation="relu", pool="max"):
        super().__init__(num_classes, in_chans)
        check_name("activation", activation, list(ACTIVATIONS))
        check_name("pool", pool, list(POOLS))
        self.conv1, self.act1, self.pool1 = nn.Conv2d(in_chans, 6, 5), ACTIVATIONS[activation](), POOLS[pool](2)
        self.conv2, self.act2, self.pool2 = nn.Conv2d(6, 16, 5), ACTIVATIONS[activation](), POOLS[pool](2)
        self.fc1, self.act3 = nn.Linear(16 * 5 * 5, 120), ACTIVATIONS[activation]()
        self.fc2, self.act4 = nn.Linear(120, 84), ACTIVATIONS[activation]()
        self.fc3 = nn.Linear(84, num_classes)

    def check_images(self, x):
        if x.ndim != 4 or x.shape[1] != self.in_chans or x.shape[2:] != (32, 32):
            raise ValueError(f"LeNet5 takes images of shape [N, {self.in_chans}, 32, 32], got {list(x.shape)}")

    def classify(self, x):
        x = self.act3(self.fc1(chain.materialize(x).flatten(1)))
        return self.fc3(self.act4(self.fc2(x)))


MODELS = {"lenet5": Entry(LeNet5, 1998, 32)}
