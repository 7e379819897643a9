"""NASNet-A (Zoph, Vasudevan, Shlens and Le: Learning transferable architectures for scalable image recognition, 2018).

A controller searched on CIFAR-10 for the best two cells; networks of any size stack them. The parameter names are those
of timm's nasnetalarge, whose weights load unchanged.
"""

from collections import OrderedDict
from functools import partial

from fastcnn import chain, nn
from fastcnn.models.network import Entry, Network
from fastcnn.nn.blocks import call
from fastcnn.nn.nasnet_blocks import Cell, NormalCell, ReductionCell

CELLS = 6  # the names of a stage's cells start at a multiple of it


class NASNet(Network):
    """NASNet-A (6 @ 4032), timm's nasnetalarge, for images of 331x331:

                                        output
        conv0                           96x165x165   3x3, stride 2, no padding; batch norm
        cell_stem_0, cell_stem_1        168x83x83, 336x42x42   reduction cells
        cell_0 to cell_5                1008x42x42   normal cells, 168 channels in each of their parts
        reduction_cell_0                1344x21x21
        cell_6 to cell_11               2016x21x21
        reduction_cell_1                2688x11x11
        cell_12 to cell_17              4032x11x11
        last_linear                     1000         ReLU, mean over the image, one linear layer

    Every cell reads the outputs of the two cells before it. 6 is the number of normal cells of a stage, 4032 the number
    of channels before the mean. 88,753,150 parameters for 1000 classes. nasnet_mobile (4 @ 1056) has 5,289,978, with
    the names of its cells as they are in other libraries: cell_0 to 3, 6 to 9, 12 to 15; nasnet_a_cifar (6 @ 768) has
    3,328,234 for ten classes, conv0 at full size and no stem cells. In the mobile and the small network the cell after
    a reduction reads the reduction's own input, in the large one the map before that (skip_reduction). The decks: the
    best cell is searched on CIFAR-10, the architecture then transferred to ImageNet. Of the paper's training the
    auxiliary classifier and ScheduledDropPath are not here; timm has neither.

        >>> model = create_model("nasnet_mobile", num_classes=10, filters=8, stem_size=8, cells=(1, 1))
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.
        filters: channels in the parts of the first stage's cells, a multiple of 4; every further stage has twice as
            many.
        cells: normal cells of every stage.
        stem_size: channels of conv0.
        stem_cells: whether two reduction cells come before the first stage, and conv0 has a stride of 2.
        skip_reduction: what the cell after a reduction reads beside it: True the map before the reduction's input.
        dropout: probability before the linear layer (the paper: 0.5).

    Raises:
        ValueError: filters is no multiple of 4.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes].
    """

    heads = ("last_linear",)

    def __init__(
        self, num_classes=1000, in_chans=3, filters=168, cells=(6, 6, 6), stem_size=96, stem_cells=True,
        skip_reduction=True, dropout=0.0,
    ):  # fmt: skip
        super().__init__(num_classes, in_chans)
        if filters < 4 or filters % 4:
            raise ValueError(f"filters must be a positive multiple of 4, got {filters!r}")
        self.skip_reduction = skip_reduction
        stride, padding = (2, 0) if stem_cells else (1, 1)
        conv = nn.Conv2d(in_chans, stem_size, 3, stride, padding, bias=False)
        modules = OrderedDict(conv0=nn.ChainSequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(stem_size, eps=1e-3))))
        stages = ["conv0"]
        previous = inputs = stem_size
        if stem_cells:
            modules["cell_stem_0"] = first = ReductionCell(stem_size, None, filters // 4)
            modules["cell_stem_1"] = second = ReductionCell(first.out_channels, stem_size, filters // 2, larger=True)
            previous, inputs = first.out_channels, second.out_channels
            stages.append("cell_stem_0")
        for stage, count in enumerate(cells):
            channels = filters * 2**stage
            if stage > 0:
                modules[f"reduction_cell_{stage - 1}"] = cell = ReductionCell(inputs, previous, channels)
                previous, inputs = previous if skip_reduction else inputs, cell.out_channels
            for i in range(count):
                name = f"cell_{stage * max(CELLS, *cells) + i}"
                larger = i == 0 and (stage > 0 or stem_cells)
                modules[name] = cell = NormalCell(inputs, previous, channels, larger)
                previous, inputs = inputs, cell.out_channels
            if count and stage < len(cells) - 1:
                stages.append(name)
        modules["act"] = nn.ReLU()
        for name, module in modules.items():
            self.add_module(name, module)
        self.body, self.feature_stages = tuple(modules), (*stages, "act")
        # the smallest map that a cell halves must have two pixels
        least = 2 ** (len(cells) - 1)
        self.min_size = 4 * least + 3 if stem_cells else least // 2 + 1
        self.head_drop = nn.Dropout(dropout)
        self.last_linear = nn.Linear(inputs, num_classes)

    def run(self, x, taps=()):
        """As of Network; the maps of cells among the taps are those after the ReLU that their readers begin with."""
        tapped, previous = {}, None
        for name in self.body:
            module = self.get_submodule(name)
            if isinstance(module, Cell):
                out = call(module, x, x if previous is None else previous)
            else:
                out = call(module, x)
            if name in taps:
                tapped[name] = chain.materialize(call(self.act, out) if isinstance(module, Cell) else out)
            if not (self.skip_reduction and name.startswith("reduction")):
                previous = x if name != "conv0" else None
            x = out
        return x, tapped

    def classify(self, x):
        return self.last_linear(self.head_drop(chain.mean(x)))


MODELS = {
    "nasnetalarge": Entry(NASNet, 2018, 331),
    "nasnet_mobile": Entry(partial(NASNet, filters=44, cells=(4, 4, 4), stem_size=32, skip_reduction=False), 2018),
    "nasnet_a_cifar": Entry(
        partial(NASNet, num_classes=10, filters=32, stem_cells=False, skip_reduction=False), 2018, 32
    ),
}
