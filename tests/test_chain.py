"""fastcnn.chain: networks of its functions, drawn at random, against the same networks of torch's functions in fp64.

Values have several readers, of every kind and in any order, which is where gradients get lost or counted twice.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRET
from torch import nn

import fastcnn
from fastcnn import chain
from fastcnn.ops.activation import activation_reference

LANES = ("triton", "cpu")
N, C, H, W = 3, 6, 5, 4
SLOPE = 0.3
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic.*")


class Plain:
    """The functions of fastcnn.chain in torch's."""

    @staticmethod
    def conv_batch_norm(x, conv, bn):
        return bn(conv(x))

    @staticmethod
    def batch_norm(x, bn):
        return bn(x)

    @staticmethod
    def conv(x, conv, factor=1.0):
        return conv(x) * factor

    @staticmethod
    def activate(x, kind, slope):
        return activation_reference(x, kind, slope)

    @staticmethod
    def add(a, b):
        return a + b

    @staticmethod
    def multiply(a, b):
        return a * b

    @staticmethod
    def max_pool2d(x, *window):
        return F.max_pool2d(x, *window)

    @staticmethod
    def avg_pool2d(x, *window):
        return F.avg_pool2d(x, *window, count_include_pad=False)

    @staticmethod
    def mean(x, keepdim):
        return x.mean((2, 3), keepdim=keepdim)

    @staticmethod
    def cat(values):
        return torch.cat(values, 1)

    @staticmethod
    def materialize(x):
        return x


class Random(nn.Module):
    """A network of `steps` random steps, each of which reads any of the images before it."""

    def __init__(self, seed, steps):
        super().__init__()
        draw = random.Random(seed)
        self.layers, self.steps = nn.ModuleList(), []
        kinds = ["conv_batch_norm"] * 4 + ["activate"] * 4 + ["add"] * 3
        kinds += ["batch_norm", "conv", "multiply", "drop_path", "max_pool2d", "avg_pool2d", "cat", "materialize"]
        for step in range(steps):
            kind = "conv_batch_norm" if step == 0 else draw.choice(kinds)
            layers, name = [], None
            if kind in ("conv_batch_norm", "conv", "cat"):
                wide = 2 if kind == "cat" else 1
                groups = draw.choice([1, 1, 2, C]) if kind != "cat" else 1
                kernel, bias = draw.choice([1, 3]), draw.random() < 0.3
                layers.append(nn.Conv2d(wide * C, C, kernel, padding=kernel // 2, groups=groups, bias=bias))
            if kind in ("conv_batch_norm", "batch_norm"):
                layers.append(nn.BatchNorm2d(C, momentum=draw.choice([0.1, None]), affine=draw.random() < 0.8))
                layers[-1].train(draw.random() < 0.8)  # the others are frozen
            if kind == "activate":
                name = draw.choice(["relu", "relu", "silu", "leaky_relu", "hardswish", "sigmoid"])
            self.steps.append((kind, name, *self.recent(step, draw), len(self.layers)))
            self.layers.extend(layers)
        for tensor in [*self.parameters(), *(m.running_mean for m in self.layers if isinstance(m, nn.BatchNorm2d))]:
            tensor.data.add_(torch.randn(tensor.shape) * 0.3)
        for bn in self.layers:
            if isinstance(bn, nn.BatchNorm2d) and bn.weight is not None:
                bn.weight.data[0] = 0.0  # nothing may divide by the scale

    @staticmethod
    def recent(step, draw):
        return [max(0, step - draw.choice([0, 0, 0, 1, 1, 2, 3])) for _ in range(2)]

    def forward(self, x, api):
        images = [x]
        for kind, name, a, b, layer in self.steps:
            a, b = images[a], images[b]
            parts = list(self.layers[layer : layer + 2])
            factor = (1.0, 0.7)[layer % 2]
            if kind == "conv_batch_norm":
                z = api.conv_batch_norm(a, *parts)
            elif kind == "batch_norm":
                z = api.batch_norm(a, parts[0])
            elif kind == "conv":
                z = api.conv(a, parts[0], factor=factor)
            elif kind == "activate":
                z = api.activate(a, name, SLOPE)
            elif kind == "add":
                z = api.add(a, b)
            elif kind == "multiply":  # squeeze-excite
                z = api.multiply(a, torch.sigmoid(api.mean(b, True)))
            elif kind == "drop_path":
                z = api.multiply(torch.tensor([2.0, 0.0, 1.0], dtype=x.dtype, device=x.device).view(N, 1, 1, 1), a)
            elif kind == "max_pool2d":
                z = api.max_pool2d(a, 3, 1, 1)
            elif kind == "avg_pool2d":
                z = api.avg_pool2d(a, 3, 1, 1) if api is Plain else api.avg_pool2d(a, 3, 1, 1, count_include_pad=False)
            elif kind == "cat":
                z = api.conv(api.cat([a, b]), parts[0], factor=factor)
            else:
                z = api.materialize(a)
            images.append(z)
        last = [api.materialize(image) for image in images[-3:]]
        return sum(image.square().mean() * weight for image, weight in zip(last, (1.0, 0.5, 0.25), strict=True))


def run(seed, steps, api, device, channels_last, grad=True):
    """The loss, all gradients and all buffers after two training steps."""
    torch.manual_seed(seed)
    model = Random(seed, steps).double().to(device)
    generator = torch.Generator().manual_seed(seed)
    results = []
    for _ in range(2):
        x = torch.randn(N, C, H, W, dtype=torch.float64, generator=generator).to(device)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        loss = model(x.requires_grad_(), api)
        if grad:
            loss.backward()
            results.append(x.grad)
        results.append(loss.detach())
    results += [p.grad for p in model.parameters()] + list(model.buffers())
    return results


SEEDS = range(6 if INTERPRET else 30)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_networks_have_the_gradients_of_torchs(lane, seed):
    steps = 8 if INTERPRET else 16
    ours = run(seed, steps, chain, lane.device, channels_last=seed % 2 == 0)
    expected = run(seed, steps, Plain, lane.device, channels_last=seed % 2 == 0)
    assert any(t is not None and t.abs().sum() > 0 for t in expected)
    for a, b in zip(ours, expected, strict=True):
        if b is None or a is None:
            assert all(t is None or not t.any() for t in (a, b))
        else:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_random_networks_without_kernels(seed):
    if INTERPRET:
        pytest.skip("PyTorch alone runs in the CPU lane")
    with fastcnn.backend("torch"):
        ours = run(seed, 16, chain, "cpu", channels_last=False)
    expected = run(seed, 16, Plain, "cpu", channels_last=False)
    for a, b in zip(ours, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-9, atol=1e-11)
