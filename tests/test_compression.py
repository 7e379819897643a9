"""Pruning, weight sharing and coding: sizes, exactness, training in between, and damaged content."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from fastcnn import compression
from fastcnn.data.digits import load_digits
from fastcnn.models import create_model


def weights_of(model):
    kinds = (nn.Conv2d, nn.Linear)
    return {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, kinds)}


def test_squeezenet_takes_less_than_half_a_megabyte():
    torch.manual_seed(0)
    model = create_model("squeezenet1_0")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # fresh ones are 0 and cost nothing
            nn.init.normal_(parameter, std=0.1)
    before = copy.deepcopy(model.state_dict())
    content = compression.compress(model, density=0.33, bits=6)
    # the paper: 0.47 MB. Fresh weights are uniform: no others have more to tell
    assert 0.45e6 < len(content) < 0.48e6
    assert 4 * 60_965_224 / len(content) > 510  # AlexNet, as the paper's table counts it
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    again = compression.decompress(content, create_model("squeezenet1_0"))
    assert torch.equal(again.features[3].expand1x1.bias, model.features[3].expand1x1.bias)
    compression.prune(model, 0.33)
    compression.share(model, 6)
    decoded = weights_of(again)
    for name, weight in weights_of(model).items():
        assert torch.equal(decoded[name], weight), name
        assert weight.unique().numel() <= 65 and (weight != 0).double().mean() == pytest.approx(0.33, abs=1e-3)
        kept, full = weight != 0, before[f"{name}.weight"]
        assert full[kept].abs().min() >= full[~kept].abs().max()
        # k-means is no worse than the values at equal distances that it starts from
        distance = (full.max() - full.min()) / 63
        assert (full - weight)[kept].square().mean() <= distance**2 / 12
    table = compression.report(content).splitlines()
    assert len(table) == 1 + 26 + 1 and table[-1].split()[1:3] == ["4,993,696", f"{len(content):,}"]
    assert table[1].split()[:5] == ["features.0.weight", "14,112", "33.0%", "64", "56,448"]


def train(model, data, epochs, lr=3e-3):
    images, labels = data
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def accuracy(model, data):
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).double().mean())


def test_accuracy_on_digits_is_kept():
    torch.manual_seed(0)
    digits = load_digits()
    parts = [(part.images.float() / 255 - 0.3, part.labels) for part in (digits.train, digits.test)]
    model = create_model("lenet5")
    train(model, parts[0], 6)
    whole = accuracy(model, parts[1])
    assert whole > 0.93
    compression.prune(model, 0.25)
    assert accuracy(model, parts[1]) < whole - 0.05  # training is what mends it
    train(model, parts[0], 2, 2e-3)
    masks = {name: weight == 0 for name, weight in weights_of(model).items()}
    assert masks["fc1"].double().mean() == pytest.approx(0.75, abs=1e-3)
    compression.share(model, 5)
    train(model, parts[0], 1, 1e-3)
    content = compression.compress(model)
    again = compression.decompress(content, create_model("lenet5"))
    for name, weight in weights_of(again).items():
        assert torch.equal(weight, weights_of(model)[name]) and weight.unique().numel() <= 33
        assert not weight[masks[name]].any()
    assert accuracy(again, parts[1]) >= whole - 0.01
    assert len(content) < 4 * 61_706 / 14


def test_values_have_the_gradients_of_what_shares_them():
    layer = nn.Conv2d(2, 3, 3)
    compression.prune(layer, 0.7)
    compression.share(layer, 2)
    shared = layer.parametrizations.weight
    images = torch.randn(2, 2, 5, 5)
    layer(images).square().sum().backward()
    plain = nn.Conv2d(2, 3, 3)
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    plain(images).square().sum().backward()
    clusters = shared[0].clusters
    assert set(clusters.unique().tolist()) == {0, 1, 2, 3, 4}
    expected = torch.stack([plain.weight.grad[clusters == i].sum() for i in range(1, 5)])
    torch.testing.assert_close(shared.original.grad, expected)


def test_pruned_again_by_the_weights_of_now():
    layer = nn.Linear(10, 10)
    compression.prune(layer, 0.5)
    before = layer.weight != 0
    compression.prune(layer, 0.2)
    assert int((layer.weight != 0).sum()) == 20 and not (layer.weight != 0)[~before].any()
    layer.weight_orig.data.mul_(2.0)  # as an optimizer would, without a forward pass
    again = compression.decompress(compression.compress(layer, bits=8), nn.Linear(10, 10))
    assert torch.equal(again.weight, layer.weight_orig * layer.weight_mask)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.004])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip(density, dtype):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.Linear(500, 30, bias=False)).to(dtype)
    model.register_buffer("flags", torch.tensor([True, False]))
    compression.prune(model, density)
    compression.share(model, 8)
    content = compression.compress(model)
    fresh = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.Linear(500, 30, bias=False)).to(dtype)
    fresh.register_buffer("flags", torch.tensor([False, False]))
    fresh[1].running_mean.fill_(5.0)
    compression.decompress(content, fresh)
    for i in (0, 2):
        assert torch.equal(fresh[i].weight, model[i].weight)
    assert torch.equal(fresh[0].bias, model[0].bias) and not fresh[1].running_mean.any() and fresh.flags[0]


def test_layers_with_nothing_or_few_values():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 600, bias=False), nn.Linear(1, 1))
    nn.init.zeros_(model[0].weight)
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(2400).reshape(600, 4) % 5 - 2)
    again = compression.decompress(compression.compress(model, 1.0, 3), copy.deepcopy(model))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_long_gaps():
    for positions in ([0], [254], [255], [256, 257], [0, 255, 511, 767], [3, 5000], list(range(0, 9000, 509))):
        coded = np.frombuffer(compression._gaps(np.array(positions)), np.uint8).astype(np.int64)
        assert compression._positions(coded).tolist() == positions


def test_damaged_content():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    content = compression.compress(model)
    target = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    before = copy.deepcopy(target.state_dict())
    random.seed(0)
    bits = [random.randrange(8 * len(content)) for _ in range(60)]
    broken = [b"", b"x" * 100, content[:-1], content[:20], content[: len(content) // 2], content + b"\0"]
    for bit in bits:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        broken.append(bytes(flipped))
    for wrong in broken:
        with pytest.raises(ValueError, match="the compressed content (is damaged or truncated|does not begin)"):
            compression.decompress(wrong, target)
        with pytest.raises(ValueError, match="the compressed content"):
            compression.report(wrong)
    with pytest.raises(ValueError, match="content does not fit a Sequential: .* another shape of 0.weight"):
        compression.decompress(content, nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match="content does not fit a Sequential: .* unknown 1.bias"):
        compression.decompress(content, nn.Sequential(nn.Conv2d(2, 4, 3)))
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda layer: compression.prune(layer, 0), "density must be above 0 and at most 1, got 0"),
        (lambda layer: compression.prune(layer, 1.5), "density must be above 0 and at most 1, got 1.5"),
        (lambda layer: compression.share(layer, 9), "bits must be an int of 1 to 8, got 9"),
        (lambda layer: compression.compress(layer, bits=0.5), "bits must be an int of 1 to 8, got 0.5"),
        (lambda layer: compression.compress(layer, density="1"), "density must be above 0 and at most 1, got '1'"),
        (lambda layer: (compression.share(layer), compression.prune(layer)), "prune before share"),
        (lambda layer: (nn.init.constant_(layer.weight, torch.nan), compression.compress(layer)), "not finite"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(nn.Linear(5, 5))
