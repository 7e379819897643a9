"""What drops at random: torch.nn's modules on fastcnn's ops, of which only `forward` differs."""

from torch import nn

from fastcnn import functional as F


class Dropout(nn.Dropout):
    """torch.nn.Dropout on fastcnn.functional.dropout."""

    def forward(self, input):
        return F.dropout(input, self.p, self.training, self.inplace)
