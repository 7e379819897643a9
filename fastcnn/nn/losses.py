"""Losses: torch.nn's modules on fastcnn's ops, of which only `forward` differs."""

from torch import nn

from fastcnn import functional as F


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on fastcnn.functional.cross_entropy."""

    def forward(self, input, target):
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
