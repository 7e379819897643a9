"""Fused optimizers with torch.optim's constructors and state_dict.

Names that fastcnn does not have come from torch.optim, so `import fastcnn.optim as optim` is a drop-in swap.
"""

import torch.optim

from fastcnn.optim import lr_scheduler  # noqa: F401
from fastcnn.optim.adam import Adam, AdamW, NAdam, RAdam
from fastcnn.optim.lion import Lion
from fastcnn.optim.rmsprop import Adagrad, RMSprop
from fastcnn.optim.sgd import LARS, SGD

__all__ = ["LARS", "SGD", "Adagrad", "Adam", "AdamW", "Lion", "NAdam", "RAdam", "RMSprop"]


def __getattr__(name):
    return getattr(torch.optim, name)
