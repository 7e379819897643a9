"""ZFNet (Zeiler and Fergus: Visualizing and understanding convolutional networks, 2014)."""

from fastcnn import nn
from fastcnn.models.alexnet import AlexNetLayers
from fastcnn.models.network import Entry, round_channels


class ZFNet(AlexNetLayers):
    """ZFNet: AlexNet whose first filters are smaller and denser, and whose last layers are wider.

        image                               3x224x224
        conv1  96 7x7, stride 2, pad 1     96x110x110      14,208 parameters
        pool1  3x3, stride 2; norm1        96x55x55
        conv2  256 5x5, stride 2          256x26x26       614,656
        pool2  3x3, stride 2; norm2       256x13x13
        conv3  512 3x3, pad 1             512x13x13     1,180,160
        conv4  1024 3x3, pad 1           1024x13x13     4,719,616
        conv5  512 3x3, pad 1             512x13x13     4,719,104
        pool3  3x3, stride 2              512x6x6
        fc6    4096                                    75,501,568
        fc7    4096                                    16,781,312
        fc8    1000 classes                             4,097,000

    107,627,624 parameters. The decks name two changes to AlexNet: conv1 is 7x7 with stride 2 in place of 11x11 with
    stride 4, and conv3, 4, 5 have 512, 1024, 512 filters in place of 384, 384, 256. The paper has the first in its
    figure 3, with a stride of 2 in conv2, too, which the decks do not mention and which the figure's sizes need; the
    second is its larger model of table 2. Pools count the pixels left over at the border, as the figure's 55, 13 and 6
    do. norm1 and norm2 are AlexNet's.

    Weights start as in the paper, N(0, 0.01^2), and in a narrower network so that its sums vary as much; biases at 0.

        >>> model = create_model("zfnet", num_classes=10, width_mult=0.125)
        >>> model(torch.zeros(2, 3, 224, 224)).shape
        torch.Size([2, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        width_mult: filters and hidden units are multiplied with it and rounded to multiples of 8.
        dropout: probability after fc6 and fc7.

    Shape: images [N, in_chans, 224, 224] -> logits [N, num_classes]. Images of another size, at least 47, are averaged
    to 6x6 after pool3.
    """

    min_size = 47

    def __init__(self, num_classes=1000, in_chans=3, width_mult=1.0, dropout=0.5):
        a, b, c, d, hidden = (round_channels(n, width_mult) for n in (96, 256, 512, 1024, 4096))
        convolutions = (
            nn.Conv2d(in_chans, a, 7, 2, padding=1),
            nn.Conv2d(a, b, 5, 2),
            nn.Conv2d(b, c, 3, padding=1),
            nn.Conv2d(c, d, 3, padding=1),
            nn.Conv2d(d, c, 3, padding=1),
        )
        std = 0.01 / width_mult**0.5
        super().__init__(num_classes, in_chans, convolutions, True, std, {}, 1, hidden, dropout)


MODELS = {"zfnet": Entry(ZFNet, 2014)}
