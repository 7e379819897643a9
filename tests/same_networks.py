"""What every network with a stock counterpart is asked: is it the same one?"""

import copy

import torch
from torch import nn

from fastcnn.testing import assert_close_to_truth


def assert_same_layers(mine, theirs, parameters):
    """Keys, shapes and dtypes, the number of parameters, and the options of convolutions and batch norms."""
    shapes = lambda model: [(key, tensor.shape, tensor.dtype) for key, tensor in model.state_dict().items()]
    assert shapes(mine) == shapes(theirs)
    assert sum(p.numel() for p in mine.parameters()) == parameters
    options = lambda model: [
        (m.eps, m.momentum) if isinstance(m, nn.BatchNorm2d) else (m.stride, m.padding, m.groups)
        for m in model.modules()
        if isinstance(m, (nn.BatchNorm2d, nn.Conv2d))
    ]
    assert options(mine) == options(theirs)


def assert_same_under_autocast(mine, theirs):
    """The evaluated output in bf16 autocast; both networks in fp32, with the same weights."""
    truth = copy.deepcopy(theirs).double().eval()
    mine.eval(), theirs.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = mine(images), theirs(images)
    assert found.dtype == expected.dtype == torch.bfloat16
    true = truth(images.double()).detach()
    assert_close_to_truth("output", found.detach(), expected.detach(), true, torch.bfloat16)
