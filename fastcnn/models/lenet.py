"""LeNet-5 (LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998)."""

from fastcnn import nn
from fastcnn.names import check_name

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


class LeNet5(nn.Module):
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

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        activation: "relu", "tanh" or "sigmoid" (the paper's family is tanh).
        pool: "max" or "avg" (the paper's family is avg).

    Shape: images [N, in_chans, 32, 32] -> logits [N, num_classes].
    """

    def __init__(self, num_classes=10, in_chans=1, activation="relu", pool="max"):
        super().__init__()
        check_name("activation", activation, list(ACTIVATIONS))
        check_name("pool", pool, list(POOLS))
        self.conv1 = nn.Conv2d(in_chans, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)
        self.act = ACTIVATIONS[activation]()
        self.pool = POOLS[pool](2)

    def forward(self, x):
        if x.ndim != 4 or x.shape[1] != self.conv1.in_channels or x.shape[2:] != (32, 32):
            expected = f"[N, {self.conv1.in_channels}, 32, 32]"
            raise ValueError(f"LeNet5 takes images of shape {expected}, got {list(x.shape)}")
        x = self.pool(self.act(self.conv1(x)))
        x = self.pool(self.act(self.conv2(x)))
        x = self.act(self.fc1(x.flatten(1)))
        x = self.act(self.fc2(x))
        return self.fc3(x)
