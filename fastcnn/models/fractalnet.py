"""FractalNet (Larsson, Maire and Shakhnarovich: FractalNet: ultra-deep neural networks without residuals, 2017)."""

from functools import partial

import torch

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network
from fastcnn.nn.blocks import Block, call, shared

ALONE = 0.5  # share of the images that see a single column of the network in training (global drop-path)


class FractalBlock(Block):
    """Columns of 3x3 convolutions (batch norm, ReLU) of different depth, joined by the mean; then a 2x2 max pool.

    With three columns, layers from top to bottom:

        column 0   column 1   column 2
        conv
        conv       conv
        ------join------
        conv
        conv       conv       conv
        -----------join-----------

    Column k has a layer every 2^k rows; where several columns end in a row, all of them go on from the mean.

    Args:
        inputs, outputs: channels.
        columns: how many; the deepest, column 0, has 2 ** (columns - 1) layers.
        dropout: probability after every layer.

    Shape: x [N, inputs, H, W], shares [joins, columns, N] (the factors of every join's inputs) -> [N, outputs, H / 2,
    W / 2].
    """

    def __init__(self, inputs, outputs, columns, dropout=0.0):
        super().__init__()
        self.columns = nn.ModuleList()
        for k in range(columns):
            layers = nn.ModuleList()
            for i in range(2 ** (columns - 1 - k)):
                layers.append(nn.ConvBNAct(inputs if i == 0 else outputs, outputs).append(nn.Dropout(dropout)))
            self.columns.append(layers)
        self.pool = nn.MaxPool2d(2)

    def values(self, x, shares):
        x = shared(self, x)
        read = [x for _ in self.columns]
        for row, ending in enumerate(_rows(len(self.columns)), 1):
            made = [call(self.columns[k][row // 2**k - 1], read[k]) for k in ending]
            x = made[0] if len(made) == 1 else shared(self, _join(made, shares[row // 2 - 1]))
            for k in ending:
                read[k] = x
        return call(self.pool, x)


def _rows(columns):
    # of every row of a block the columns that end there
    return [[k for k in range(columns) if row % 2**k == 0] for row in range(1, 2 ** (columns - 1) + 1)]


def _join(values, shares):
    total = None
    for value, share in zip(values, shares, strict=False):
        part = chain.multiply(value, share.to(chain.likeness(value).dtype).view(-1, 1, 1, 1))
        total = part if total is None else chain.add(total, part)
    return total


class FractalNet(Network):
    """FractalNet for images of 32x32, as fractalnet20_cifar:

                    output      columns of 4, 2 and 1 convolutions 3x3, joined; max pool 2x2
        block1      64x16x16
        block2      128x8x8
        block3      256x4x4
        block4      512x2x2
        block5      512x1x1
        fc          10          the mean over the image (one pixel), one linear layer

    No shortcut leads past the convolutions. It is 20 layers deep and has 33,724,618 parameters for ten classes; the
    paper says 38.6 million, which its channels do not give. fractalnet40_cifar has four columns of half as many
    channels, 40 layers and 19,040,714 parameters: by construction, as the paper's network of 40 layers (22.9 million,
    columns of different widths, some 1x1 filters) is told in a footnote that leaves its layers open. The decks: both
    shallow and deep paths lead to the output, training drops sub-paths, and the full network is used at test time.

    Drop-path, in training, draws for every image by itself (the authors' released layer draws for a whole batch): half
    of the images see local drop-path, in which every join drops each input, but never all of them; the other half see
    one column alone, the same in the whole network. A join is the mean of what is left. All columns are computed, and
    their batch norms see all images, so there is no branch: the random factors are tensors. The weights are drawn after
    Glorot and Bengio 2010.

        >>> model = create_model("fractalnet20_cifar", channels=(8, 16, 16))
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> [len(column) for column in model.block1.columns]
        [4, 2, 1]
        >>> model.column(0)(torch.zeros(2, 3, 32, 32)).shape  # the deepest column alone, 12 layers
        torch.Size([2, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        channels: of every block.
        columns: of every block.
        dropout: probability after every layer of each block.
        drop_path: probability that a join drops an input (local drop-path); 0 for no drop-path at all.

    Raises:
        ValueError: columns is no positive int, dropout and channels are not of one length, or drop_path is no
            probability.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    heads = ("fc",)

    def __init__(
        self, num_classes=10, in_chans=3, channels=(64, 128, 256, 512, 512), columns=3, dropout=None, drop_path=0.15
    ):  # fmt: skip
        super().__init__(num_classes, in_chans)
        dropout = [0.1 * i for i in range(len(channels))] if dropout is None else dropout
        if not isinstance(columns, int) or columns < 1:
            raise ValueError(f"columns must be a positive int, got {columns!r}")
        if len(dropout) != len(channels):
            raise ValueError(f"dropout must be one probability for each of {len(channels)} blocks, got {dropout!r}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {drop_path!r}")
        self.body = self.feature_stages = tuple(f"block{i}" for i in range(1, len(channels) + 1))
        self.min_size = 2 ** len(channels)
        self.drop_prob = drop_path
        inputs = in_chans
        for name, outputs, p in zip(self.body, channels, dropout, strict=True):
            self.add_module(name, FractalBlock(inputs, outputs, columns, p))
            inputs = outputs
        self.fc = nn.Linear(inputs, num_classes)
        joins = [[k in ending for k in range(columns)] for ending in _rows(columns) if len(ending) > 1]
        self.register_buffer("joins", torch.tensor(joins).view(-1, columns, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, (torch.nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(self.fc.bias)

    def run(self, x, taps=()):
        tapped = {}
        for name, shares in zip(self.body, self.shares(x), strict=True):
            x = call(self.get_submodule(name), x, shares)
            if name in taps:
                x = tapped[name] = chain.materialize(x)
        return x, tapped

    def shares(self, images):
        """Of every block the factors [joins, columns, N] with which its joins add their inputs, drawn in training."""
        shape = (len(self.body), *self.joins.shape[:2], len(images))
        kept = self.joins.expand(shape)
        if self.training and self.drop_prob > 0:
            luck = torch.rand(shape, device=images.device).where(kept, -1.0)
            local = (luck >= self.drop_prob) | (luck == luck.amax(2, keepdim=True))
            chosen = torch.randint(shape[2], (len(images),), device=images.device)
            column = kept & (torch.arange(shape[2], device=images.device)[:, None] == chosen)
            alone = torch.rand(len(images), device=images.device) < ALONE
            # what a join of other columns alone gives, nobody of the chosen column reads
            kept = torch.where(alone & column.any(2, keepdim=True), column, kept & local)
        return (kept.to(images.dtype) / kept.sum(2, keepdim=True)).contiguous()

    def column(self, index):
        """The plain network of one column of every block, 0 the deepest: it shares its layers with this network.

        Raises:
            ValueError: there is no such column.
        """
        blocks = [getattr(self, name) for name in self.body]
        if index not in range(len(blocks[0].columns)):
            raise ValueError(f"index must be of 0 to {len(blocks[0].columns) - 1}, got {index!r}")
        layers = [module for block in blocks for module in (*block.columns[index], block.pool)]
        return nn.ChainSequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.fc)

    def classify(self, x):
        return self.fc(chain.mean(x))


MODELS = {
    "fractalnet20_cifar": Entry(FractalNet, 2017, 32),
    "fractalnet40_cifar": Entry(partial(FractalNet, channels=(32, 64, 128, 256, 256), columns=4), 2017, 32),
}
