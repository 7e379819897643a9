"""What drops at random: torch.nn's modules on fastcnn's ops, of which only `forward` differs, and what torch lacks."""

from torch import nn

from fastcnn import functional as F


class Dropout(nn.Dropout):
    """torch.nn.Dropout on fastcnn.functional.dropout."""

    def forward(self, input):
        return F.dropout(input, self.p, self.training, self.inplace)


class PlainDropout(nn.Dropout):
    """Dropout as of 2012: training leaves what is kept as it is, evaluation multiplies by 1 - p."""

    def forward(self, input):
        return F.dropout(input, self.p, self.training, self.inplace, inverted=False)


class Dropout1d(nn.Dropout1d):
    """torch.nn.Dropout1d on fastcnn.functional.dropout1d."""

    def forward(self, input):
        return F.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(nn.Dropout2d):
    """torch.nn.Dropout2d on fastcnn.functional.dropout2d."""

    def forward(self, input):
        return F.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(nn.Dropout3d):
    """torch.nn.Dropout3d on fastcnn.functional.dropout3d."""

    def forward(self, input):
        return F.dropout3d(input, self.p, self.training, self.inplace)


class StochasticDepth(nn.Module):
    """torchvision.ops.StochasticDepth on fastcnn.functional.stochastic_depth; timm's DropPath is mode "row".

    Args:
        p: probability of dropping a sample of the branch.
        mode: "row" draws for every sample, "batch" once for all.
    """

    def __init__(self, p, mode="row"):
        super().__init__()
        self.p = p
        self.mode = mode

    def forward(self, input, residual=None):
        """input, whole samples of it dropped; with residual the sum of both in one pass."""
        return F.stochastic_depth(input, self.p, self.mode, self.training, residual=residual)

    def extra_repr(self):
        return f"p={self.p}, mode={self.mode}"


class DropConnectLinear(nn.Linear):
    """torch.nn.Linear of which training drops weights: fastcnn.functional.drop_connect_linear.

    Args:
        args, kwargs: as of torch.nn.Linear.
        p: probability of dropping a weight.
    """

    def __init__(self, *args, p=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.p = p

    def forward(self, input):
        return F.drop_connect_linear(input, self.weight, self.bias, self.p, self.training)

    def extra_repr(self):
        return f"{super().extra_repr()}, p={self.p}"


class DropConnectConv2d(nn.Conv2d):
    """torch.nn.Conv2d of which training drops weights: fastcnn.functional.drop_connect_conv2d.

    Args:
        args, kwargs: as of torch.nn.Conv2d.
        p: probability of dropping a weight.
    """

    def __init__(self, *args, p=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.p = p

    def _conv_forward(self, input, weight, bias):
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        geometry = (self.stride, padding, self.dilation, self.groups)
        return F.drop_connect_conv2d(input, weight, bias, *geometry, self.p, self.training)

    def extra_repr(self):
        return f"{super().extra_repr()}, p={self.p}"
