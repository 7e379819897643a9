"""SE-ResNet-50, SE-ResNeXt-50 and SENet-154 against timm's with the same weights."""

import copy

import pytest
import torch
from conftest import INTERPRET
from same_networks import assert_same_layers
from test_chain_bytes import saved_bytes
from test_models_mobile import assert_same, hostile, step, timm
from torch import nn

import fastcnn
from fastcnn import chain
from fastcnn.benchmarks.training_step import errors
from fastcnn.models import SENet, create_model
from fastcnn.models.senet import SEBottleneck
from fastcnn.testing import FLOORS

LANES = ("triton", "cpu")
PARAMETERS = {"seresnet50": 28_088_024, "seresnext50_32x4d": 27_559_896, "senet154": 115_088_984}


def pair(name, dtype=torch.float64, layers=(1, 1, 1, 1)):
    """Ours and timm's of so many blocks, with the same weights, loaded by their names."""
    theirs = hostile(timm.create_model(name, num_classes=5, layers=list(layers)))
    mine = create_model(name, num_classes=5, layers=layers)
    mine.load_state_dict(theirs.state_dict())
    return mine.to(dtype), theirs.to(dtype)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_timms(name):
    with torch.device("meta"):
        mine, theirs = create_model(name), timm.create_model(name)
        assert mine(torch.empty(2, 3, 64, 32)).shape == (2, 1000)
    assert_same_layers(mine, theirs, PARAMETERS[name])


def test_initialisation():
    model = SENet((1, 1, 1, 1), num_classes=7)
    assert not model.layer2[0].bn3.weight.any()
    assert float(model.layer3[0].conv2.weight.detach().std()) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)


def test_a_network_in_fp64():
    mine, theirs = pair("seresnet50", layers=(2, 2, 1, 1))
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with fastcnn.backend("torch"):
        assert_same(step(mine, images), step(theirs, images))
        mine.eval(), theirs.eval()
        with torch.no_grad():
            torch.testing.assert_close(mine(images), theirs(images))
        assert_same(step(mine, images[:1]), step(theirs, images[:1]))


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_in_fp32(lane, name):
    if INTERPRET:
        pytest.skip("whole networks take minutes in the interpreter; a block runs there")
    mine, theirs = pair(name, torch.float32)
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    results = []
    with fastcnn.strict(False):  # theirs, and the linear layer
        for model, batch in ((mine, images), (theirs, images), (copy.deepcopy(theirs).double(), images.double())):
            found = step(model, batch)
            output = found.pop("output")
            results.append((output.square().sum(), {key: found[key] for key, _ in model.named_parameters()}))
    (loss, relative), (stock_loss, stock_relative) = (errors(result, results[2]) for result in results[:2])
    # rounding grows through the network: a tensor's error is measured by the largest of PyTorch's
    assert loss <= 2 * stock_loss + FLOORS[torch.float32] * (1 + float(results[2][0]))
    worst = max(relative, key=relative.get)
    assert relative[worst] <= 2 * max(stock_relative.values()) + FLOORS[torch.float32], worst


def downsample():
    return nn.Sequential(nn.Conv2d(24, 128, 3, 2, 1, bias=False), nn.BatchNorm2d(128))


@pytest.mark.parametrize("of_senet154", [False, True])
def test_blocks_on_our_kernels(lane, of_senet154):
    if of_senet154:
        options = dict(stride=2, cardinality=8, base_width=4, reduce_first=2)
        mine = SEBottleneck(24, 32, downsample=downsample(), **options)
        theirs = timm.models.resnet.Bottleneck(24, 32, downsample=downsample(), attn_layer="se", **options)
        images = torch.randn(2, 24, 5, 4, dtype=torch.float64)
    else:
        mine = SEBottleneck(128, 32)
        theirs = timm.models.resnet.Bottleneck(128, 32, attn_layer="se")
        images = torch.randn(2, 128, 3, 4, dtype=torch.float64)
    mine.load_state_dict(hostile(theirs).state_dict())
    images = images.to(memory_format=torch.channels_last)
    with fastcnn.strict(False):  # theirs
        found = step(mine.double().to(lane.device), images.to(lane.device))
        expected = step(theirs.double(), images)
    assert_same({key: tensor.cpu() for key, tensor in found.items()}, expected)


def test_values_pass_between_blocks():
    model = SENet((1, 1, 1, 1))
    assert isinstance(model.layer1.values(torch.randn(1, 64, 8, 8)), chain.Join)


def test_values_are_not_stored():
    images = torch.randn(2, 3, 64, 64)
    mine, theirs = pair("seresnet50", torch.float32, (2, 2, 2, 2))
    assert saved_bytes(mine, images) <= 0.7 * saved_bytes(theirs, images)


def test_images_of_another_shape():
    with pytest.raises(ValueError, match=r"images of shape \[N, 3, H, W\], got \[2, 1, 32, 32\]"):
        SENet((1, 1, 1, 1))(torch.zeros(2, 1, 32, 32))
