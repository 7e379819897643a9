"""Chunks, concatenations and shuffles of channels in fastcnn.chain, whose order nobody makes, against torch's."""

import random

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRET
from torch import nn

import fastcnn
from fastcnn import chain
from fastcnn.benchmarks.training_step import errors
from fastcnn.ops import channel_order
from fastcnn.testing import FLOORS

LANES = ("triton", "cpu")


class Plain:
    """The functions of fastcnn.chain in torch's."""

    @staticmethod
    def conv_batch_norm(x, conv, bn):
        return bn(conv(x))

    @staticmethod
    def activate(x, kind):
        return F.relu(x)

    @staticmethod
    def chunk(x, chunks):
        return x.chunk(chunks, 1)

    @staticmethod
    def cat(values):
        return torch.cat(values, 1)

    @staticmethod
    def channel_shuffle(x, groups):
        return F.channel_shuffle(torch.cat(x, 1) if isinstance(x, list) else x, groups)

    @staticmethod
    def max_pool2d(x, *window):
        return F.max_pool2d(x, *window)

    @staticmethod
    def materialize(x):
        return x


@pytest.mark.parametrize("seed", range(100))
def test_runs_are_the_channels(seed):
    draw = random.Random(seed)
    parts = [torch.arange(100 * i, 100 * i + draw.choice([1, 2, 6, 12, 29])) for i in range(4)]
    values = [(part, channel_order.concatenated([[channel_order.Run(i, 0, len(part), 0, 1)]])) for i, part in
              enumerate(parts)]  # fmt: skip
    for _ in range(12):
        (a, runs), (b, more) = draw.choice(values), draw.choice(values)
        kind = draw.choice(["chunk", "cat", "shuffle"])
        if kind == "cat" and len(a) + len(b) < 200:
            values.append((torch.cat([a, b]), channel_order.concatenated([runs, more])))
        elif kind == "chunk":
            low = draw.randrange(len(a))
            high = draw.randint(low + 1, len(a))
            values.append((a[low:high], channel_order.chunk(runs, low, high)))
        else:
            groups = draw.choice([g for g in range(1, len(a) + 1) if len(a) % g == 0])
            values.append((a.view(groups, -1).t().flatten(), channel_order.shuffled(runs, groups)))
    for expected, runs in values:
        assert channel_order.channels_of(runs) == len(expected)
        runs = channel_order.by_memory(runs)
        numbers, pieces = channel_order.pieces_of(runs)
        found = torch.cat([parts[numbers[i]][first : first + count] for i, first, count in pieces])
        order = channel_order.positions(runs)
        assert torch.equal(expected[list(order)], found)
        assert torch.equal(found[list(channel_order.inverse(order))], expected)


class Random(nn.Module):
    """A network of random steps, of which every one may read several times what any of those before it made."""

    def __init__(self, seed, steps):
        super().__init__()
        draw = random.Random(seed)
        self.layers, self.steps = nn.ModuleList(), []
        channels = [draw.choice([4, 6, 12])]
        for step in range(steps):
            kinds = ["conv"] * 3 + ["depthwise"] * 3 + ["grouped", "chunk", "chunk", "cat", "cat", "shuffle", "shuffle"]
            kind = "conv" if step < 2 else draw.choice([*kinds, "shuffle list", "pool"])
            a, b = (draw.randrange(max(0, len(channels) - 6), len(channels)) for _ in range(2))
            c, layer, number = channels[a], len(self.layers), 1
            divisors = [g for g in (1, 2, 3, 4, 6, 8) if c % g == 0]
            if kind in ("conv", "depthwise", "grouped"):
                groups = {"conv": 1, "depthwise": c, "grouped": draw.choice(divisors)}[kind]
                out = c if kind == "depthwise" else groups * draw.choice([1, 2, 4])
                size = draw.choice([1, 3])
                self.layers.append(nn.Conv2d(c, out, size, padding=size // 2, groups=groups, bias=False))
                self.layers.append(nn.BatchNorm2d(out))
                channels.append(out)
            elif kind == "chunk":
                number = draw.choice([n for n in (1, 2, 3) if n <= c])
                channels += [len(part) for part in torch.arange(c).chunk(number)]
            elif kind in ("cat", "shuffle list"):
                channels.append(c + channels[b])
                number = draw.choice([g for g in range(1, channels[-1] + 1) if channels[-1] % g == 0][:4])
            else:
                number = draw.choice(divisors)
                channels.append(c)
            self.steps.append((kind, a, b, number, layer))
        self.channels = channels[0]
        for tensor in self.parameters():
            tensor.data.add_(torch.randn(tensor.shape) * 0.3)

    def forward(self, x, api):
        values = [x]
        for kind, a, b, number, layer in self.steps:
            a, b = values[a], values[b]
            if kind in ("conv", "depthwise", "grouped"):
                values.append(api.activate(api.conv_batch_norm(a, *self.layers[layer : layer + 2]), "relu"))
            elif kind == "chunk":
                values += api.chunk(a, number)
            elif kind == "cat":
                values.append(api.cat([a, b]))
            elif kind == "shuffle":
                values.append(api.channel_shuffle(a, number))
            elif kind == "shuffle list":
                values.append(api.channel_shuffle([a, b], number))
            else:
                values.append(api.max_pool2d(a, 3, 1, 1))
        last = [api.materialize(value) for value in values[-4:]]
        weights = torch.linspace(1.0, 2.0, sum(v.shape[1] for v in last), dtype=x.dtype, device=x.device)
        return (torch.cat(last, 1).square().mean((0, 2, 3)) * weights).sum()


def run(seed, steps, api, device, channels_last):
    torch.manual_seed(seed)
    model = Random(seed, steps).double().to(device)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, model.channels, 5, 4, dtype=torch.float64, generator=generator).to(device)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    loss = model(x.requires_grad_(), api)
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("seed", range(4 if INTERPRET else 30))
def test_random_networks_have_the_gradients_of_torchs(lane, seed):
    steps = 10 if INTERPRET else 24
    ours = run(seed, steps, chain, lane.device, channels_last=seed % 2 == 0)
    expected = run(seed, steps, Plain, lane.device, channels_last=seed % 2 == 0)
    for a, b in zip(ours, expected, strict=True):
        if b is None or a is None:
            assert all(t is None or not t.any() for t in (a, b))
        else:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seed", range(40))
def test_random_networks_without_kernels(seed):
    if INTERPRET:
        pytest.skip("PyTorch alone runs in the CPU lane")
    with fastcnn.backend("torch"):
        ours = run(seed, 24, chain, "cpu", channels_last=seed % 2 == 0)
    expected = run(seed, 24, Plain, "cpu", channels_last=seed % 2 == 0)
    for a, b in zip(ours, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-8, atol=1e-10)


class Unit(nn.Module):
    """ShuffleNet v2's unit with stride 1, several times; half the channels pass each one as they are."""

    def __init__(self, channels, depth):
        super().__init__()
        half = channels // 2
        self.first, self.norm = nn.Conv2d(3, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.units = nn.ModuleList(
            nn.ModuleList(
                [nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half),
                 nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half),
                 nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half)]
            ) for _ in range(depth)
        )  # fmt: skip

    def forward(self, x, api=chain):
        x = api.activate(api.conv_batch_norm(x, self.first, self.norm), "relu")
        for conv1, norm1, conv2, norm2, conv3, norm3 in self.units:
            kept, b = api.chunk(x, 2)
            b = api.conv_batch_norm(api.activate(api.conv_batch_norm(b, conv1, norm1), "relu"), conv2, norm2)
            b = api.activate(api.conv_batch_norm(b, conv3, norm3), "relu")
            x = api.channel_shuffle([kept, b], 2)
        return api.materialize(x)


def grads_of(model, x, api):
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(leaf, api)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape))
    return [y.detach(), leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("channels, depth", [(4, 2), (10, 2)] if INTERPRET else [(2, 5), (10, 4), (58, 7)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_units(lane, channels, depth, channels_last):
    if INTERPRET and channels_last != (channels > 4):
        pytest.skip("the CPU lane has both")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(3, 3, 4, 5, device=lane.device).contiguous(memory_format=layout)
    results = []
    for api, dtype in ((chain, torch.float32), (Plain, torch.float32), (chain, torch.float64), (Plain, torch.float64)):
        torch.manual_seed(0)
        y, *found = grads_of(Unit(channels, depth).to(lane.device, dtype), x.to(dtype), api)
        results.append((y.square().sum(), {str(i): t for i, t in enumerate(found) if t.is_floating_point()}))
        assert y.is_contiguous(memory_format=layout) or api is Plain
    *results, truth = results
    torch.testing.assert_close(results.pop(), truth, rtol=1e-8, atol=1e-9)
    if channels == 2:
        return  # batch norm of a scaled channel alone: every gradient before it is zero, and all that there is rounding
    (loss, relative), (stock_loss, stock_relative) = (errors(result, truth) for result in results)
    # rounding grows through the units: a tensor's error is measured by the largest of PyTorch's
    assert loss <= 2 * stock_loss + FLOORS[torch.float32] * float(truth[0])
    assert max(relative.values()) <= 2 * max(stock_relative.values()) + FLOORS[torch.float32]


def test_units_copy_what_they_read_and_nothing_else(monkeypatch):
    # per unit the channels that its first convolution reads; the identity half stays where it was written
    real, copied = torch.cat, []

    def cat(tensors, *dim):
        whole = real(tensors, *dim)
        if whole.dim() == 4:
            copied.append((len(tensors), whole.shape[1]))
        return whole

    monkeypatch.setattr(torch, "cat", cat)
    with fastcnn.backend("cpu"):
        Unit(32, 4)(torch.randn(2, 3, 4, 4))
    assert copied == [(2, 16), (3, 16), (4, 16), (5, 32)]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_of_tensors(layout):
    x = torch.randn(2, 12, 3, 5).contiguous(memory_format=layout)
    y = chain.channel_shuffle(x, 3)
    assert torch.equal(y, F.channel_shuffle(x, 3)) and y.is_contiguous(memory_format=layout)
    assert all(torch.equal(a, b) for a, b in zip(chain.chunk(x, 5), x.chunk(5, 1), strict=True))
    with pytest.raises(ValueError, match="groups must divide the number of channels, 12, got 5"):
        chain.channel_shuffle(x, 5)


def test_a_permuted_weight_has_its_gradient_and_layout():
    order = (2, 0, 3, 1)
    for layout in (torch.channels_last, torch.contiguous_format):
        weight = torch.randn(3, 4, 3, 3).contiguous(memory_format=layout).requires_grad_()
        result = channel_order.PermuteFunction.apply(weight, order)
        assert torch.equal(result, weight[:, list(order)]) and result.is_contiguous(memory_format=layout)
        grad = torch.randn(result.shape)
        result.backward(grad)
        assert torch.equal(weight.grad[:, list(order)], grad)
        assert weight.grad.stride() == weight.stride()
