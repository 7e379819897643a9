"""Fused optimizers with torch.optim's constructors and state_dict.

Names that fastcnn does not have come from torch.optim, so `import fastcnn.optim as optim` is a drop-in swap.
"""

import torch.optim

from fastcnn.optim.adam import Adam, AdamW
from fastcnn.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]


def __getattr__(name):
    return getattr(torch.optim, name)
