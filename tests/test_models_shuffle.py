"""ShuffleNet v1 and v2 against torchvision's, and the paper's in plain PyTorch, with the same weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRET
from same_networks import assert_same_under_autocast
from test_architectures import assert_same, hostile, step
from test_chain_bytes import saved_bytes
from torch import nn

import fastcnn
from fastcnn import chain
from fastcnn.benchmarks import networks
from fastcnn.benchmarks.training_step import errors
from fastcnn.models import create_model
from fastcnn.models.shufflenet_v1 import WIDTHS
from fastcnn.testing import FLOORS

LANES = ("triton", "cpu")
try:
    models = networks.import_torchvision().models
except ImportError:
    pytest.skip("torchvision is not installed", allow_module_level=True)
# of version 1 by groups, with the multiply-adds that table 1 of the paper gives in millions
OF_GROUPS = {1: (1_531_936, 143), 2: (1_733_848, 140), 3: (1_865_728, 137), 4: (1_968_344, 133), 8: (2_434_768, 137)}


class Plain(nn.Module):
    """ShuffleNet v1 as the paper's figure 2 draws it, with the layers of a model."""

    def __init__(self, model):
        super().__init__()
        for name, child in copy.deepcopy(model).named_children():
            self.add_module(name, child)

    def forward(self, x):
        x = self.conv1[2](self.conv1[1](self.conv1[0](x)))
        x = F.max_pool2d(x, 3, 2, 1)
        for unit in (*self.stage2, *self.stage3, *self.stage4):
            y = F.relu(unit.bn1(unit.conv1(x)))
            n, c, h, w = y.shape
            y = y.view(n, unit.groups, c // unit.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
            y = unit.bn3(unit.conv3(unit.bn2(unit.conv2(y))))
            x = F.relu(y + x if unit.stride == 1 else torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1))
        return self.fc(x.mean((2, 3)))


def pair(name, dtype=torch.float64, **options):
    """Ours and theirs, with the same weights, loaded by their names."""
    mine = create_model(name, num_classes=5, **options)
    theirs = Plain(mine) if name == "shufflenet_v1" else models.get_model(name, weights=None, num_classes=5)
    mine.load_state_dict(hostile(theirs).state_dict())
    return mine.to(dtype), theirs.to(dtype)


def small(name, monkeypatch, dtype=torch.float32):
    """The same network of few channels and units."""
    if name == "shufflenet_v1":
        monkeypatch.setitem(WIDTHS, 3, (48, 72, 96))
        return pair(name, dtype, layers=(2, 1, 1))
    theirs = hostile(models.ShuffleNetV2([3, 1, 1], [24, 12, 16, 24, 20], num_classes=5))
    mine = create_model(name, num_classes=5, widths=(12, 16, 24, 20), layers=(3, 1, 1))
    mine.load_state_dict(theirs.state_dict())
    return mine.to(dtype), theirs.to(dtype)


def test_initialisation_is_torchvisions():
    torch.manual_seed(3)
    mine = create_model("shufflenet_v2_x0_5", num_classes=7).state_dict()
    torch.manual_seed(3)
    for key, tensor in models.shufflenet_v2_x0_5(num_classes=7).state_dict().items():
        assert torch.equal(mine[key], tensor), key


@pytest.mark.parametrize("groups", OF_GROUPS)
def test_version_1_has_the_papers_multiply_adds(groups):
    parameters, millions = OF_GROUPS[groups]
    with torch.device("meta"):
        model = create_model("shufflenet_v1", groups=groups)
    assert sum(p.numel() for p in model.parameters()) == parameters
    products = []

    def count(module, inputs, output):
        products.append(module.weight.numel() * (output[0, 0].numel() if output.dim() == 4 else 1))

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    # the paper counts neither the last layer nor, it seems, everything of the case with 8 groups
    assert sum(products) / 1e6 == pytest.approx(millions, rel=0.12)


def test_widths_of_version_1():
    for width, channels in ((0.25, 6), (0.5, 12), (2, 48)):
        model = create_model("shufflenet_v1", num_classes=2, width_mult=width)
        assert model.conv1[0].out_channels == channels and model.fc.in_features == 960 * width
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 2)
    for bad, message in (
        (dict(groups=5), "groups must be one of 1, 2, 3, 4, 8, got 5"),
        (dict(groups=8, width_mult=0.5), "whole number of channels, as 1 and 2 do, got 0.5 with 8 groups"),
        (dict(width_mult="1"), "width_mult must be a positive number, got '1'"),
        (dict(width_mult=0), "width_mult must be a positive number, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model("shufflenet_v1", **bad)


def test_images_of_another_shape():
    for name in ("shufflenet_v1", "shufflenet_v2_x0_5"):
        with pytest.raises(ValueError, match=r"images of shape \[N, 1, H, W\], got \[2, 3, 32, 32\]"):
            create_model(name, in_chans=1)(torch.zeros(2, 3, 32, 32))


CASES = [("shufflenet_v2_x0_5", {}), ("shufflenet_v1", {"width_mult": 0.5})]


@pytest.mark.parametrize("name, options", CASES)
def test_networks_in_fp64(name, options):
    mine, theirs = pair(name, **options)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with fastcnn.backend("torch"):
        assert_same(step(mine, images), step(theirs, images))
        mine.eval(), theirs.eval()
        with torch.no_grad():
            torch.testing.assert_close(mine(images), theirs(images))
        assert_same(step(mine, images[:1]), step(theirs, images[:1]))


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "shufflenet_v1"])
def test_small_networks_on_our_kernels(lane, name, monkeypatch):
    mine, theirs = small(name, monkeypatch, torch.float64)
    images = torch.randn(2, 3, 33, 34, dtype=torch.float64).to(memory_format=torch.channels_last)
    with fastcnn.strict(False):  # theirs, and the linear layer
        found, expected = step(mine.to(lane.device), images.to(lane.device)), step(theirs, images)
    assert_same({key: tensor.cpu() for key, tensor in found.items()}, expected)


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "shufflenet_v1"])
def test_networks_in_fp32(lane, name):
    if INTERPRET:
        pytest.skip("whole networks take minutes in the interpreter; small ones run there")
    worst = []
    for seed in range(3):
        torch.manual_seed(seed)
        mine, theirs = pair(name, torch.float32)
        truth = copy.deepcopy(theirs).double()
        images = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
        results = []
        with fastcnn.strict(False):
            for model, batch in ((mine, images), (theirs, images), (truth, images.double())):
                found = step(model, batch)
                output = found.pop("output 0")
                results.append((output.square().sum(), {key: found[key] for key, _ in model.named_parameters()}))
        for found in results[:2]:
            loss, relative = errors(found, results[2])
            # rounding grows through the network: a tensor's error is measured by the largest of PyTorch's
            worst.append((float(loss) / (1 + float(results[2][0])), max(relative.values())))
    # a number next to zero may come out on the other side of a ReLU, in ours as in PyTorch's: the best of three draws
    ours, stock = (list(map(min, zip(*worst[i::2], strict=True))) for i in (0, 1))
    assert all(mine <= 2 * theirs + FLOORS[torch.float32] for mine, theirs in zip(ours, stock, strict=True))


def test_values_pass_between_units():
    images = torch.randn(2, 3, 32, 32)
    model = create_model("shufflenet_v2_x0_5")
    assert isinstance(model.stage2.values(model.maxpool(model.conv1(images))), chain.Channels)
    model = create_model("shufflenet_v1")
    assert isinstance(model.stage2.values(model.maxpool(model.conv1(images))), chain.Join)


def test_values_are_not_stored():
    # of version 2 also weights whose columns stand in another order, which larger batches make little of
    images = torch.randn(4, 3, 128, 128)
    for name in ("shufflenet_v2_x0_5", "shufflenet_v1"):
        mine, theirs = pair(name, torch.float32)
        assert saved_bytes(mine, images) <= 0.75 * saved_bytes(theirs, images), name


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "shufflenet_v1"])
def test_autocast(name):
    assert_same_under_autocast(*pair(name, torch.float32))


def test_some_layers_frozen():
    mine, theirs = pair("shufflenet_v2_x0_5")
    for model in (mine, theirs):
        model.stage2.requires_grad_(False)
        model.stage3[1:4].requires_grad_(False)
        model.stage3[2:].eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with fastcnn.backend("torch"):
        results = []
        for model in (mine, theirs):
            model(images).square().sum().backward()
            results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert_same(*results)


def test_two_backwards_through_one_forward():
    mine, theirs = pair("shufflenet_v2_x0_5")
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with fastcnn.backend("torch"):
        for model in (mine, theirs):
            loss = model(images).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        assert_same(*({n: p.grad for n, p in model.named_parameters()} for model in (mine, theirs)))
