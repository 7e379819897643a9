"""Small networks for the tests of fastcnn.convert, and the comparison with what they were."""

import copy
import random

import torch
import torch.nn.functional as F
from torch import nn

import fastcnn


def conv_bn(c=4, k=3, **options):
    return nn.Sequential(nn.Conv2d(c, c, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(c))


class Block(nn.Module):
    """A residual block as people write it."""

    def __init__(self, c=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stem = conv_bn()
        self.blocks = nn.Sequential(*(blocks or (Block(), Block())))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.fc(self.blocks(x).mean((2, 3)))


def image(seed=0):
    return torch.randn(3, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(model, x, seed=5):
    torch.manual_seed(seed)
    random.seed(seed)
    x = x.clone().requires_grad_(torch.is_grad_enabled())
    output = model(x * 1)  # a tensor of the graph: some models write to it
    if not output.requires_grad:
        return [output]
    output.square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [output.detach(), x.grad, *grads]


def assert_same(model, stock, steps=2):
    """Both do the same, step after step: outputs, gradients, statistics, and the random numbers they leave."""
    for step in range(steps):
        mine = run(model, image(step))
        left = torch.rand(1)
        theirs = run(stock, image(step))
        assert torch.equal(left, torch.rand(1))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model.state_dict(), stock.state_dict())


def converted(model, **options):
    """(converted model, stock copy, report), with batch norms that are not the identity."""
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    stock = copy.deepcopy(model)
    return model, stock, fastcnn.convert(model, **options)
