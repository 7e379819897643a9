"""SE-ResNet, SE-ResNeXt and SENet-154, with few blocks, against timm's with the same weights."""

import pytest
import torch
from test_architectures import assert_same, hostile, step
from test_chain_bytes import saved_bytes
from torch import nn

import fastcnn
from fastcnn import chain
from fastcnn.benchmarks import networks
from fastcnn.models import SENet, create_model
from fastcnn.models.senet import SEBottleneck

LANES = ("triton", "cpu")
try:
    networks.import_torchvision()
except ImportError:
    pytest.skip("torchvision is not installed", allow_module_level=True)
timm = pytest.importorskip("timm")


def pair(name, dtype=torch.float64, layers=(1, 1, 1, 1), **options):
    """Ours and timm's of so many blocks, with the same weights, loaded by their names."""
    theirs = hostile(timm.create_model(name, num_classes=5, layers=list(layers), **options))
    mine = create_model(name, num_classes=5, layers=layers, **options)
    mine.load_state_dict(theirs.state_dict())
    return mine.to(dtype), theirs.to(dtype)


def test_initialisation():
    model = SENet(7, layers=(1, 1, 1, 1))
    assert not model.layer2[0].bn3.weight.any()
    assert float(model.layer3[0].conv2.weight.detach().std()) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    "name, options",
    [
        ("seresnet50", {"base_width": 16, "layers": (2, 1, 1, 1)}),
        ("seresnext50_32x4d", {"cardinality": 8}),
        ("senet154", {}),
    ],
)
def test_networks_in_fp64(name, options):
    mine, theirs = pair(name, **options)
    if name == "senet154":  # what the others lack is in its stem and second stage; the rest is large
        for model in (mine, theirs):
            model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(512, 5).double()
        mine.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with fastcnn.backend("torch"):
        assert_same(step(mine, images), step(theirs, images))
        mine.eval(), theirs.eval()
        with torch.no_grad():
            torch.testing.assert_close(mine(images), theirs(images))


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
    model = SENet(layers=(1, 1, 1, 1))
    assert isinstance(model.layer1.values(torch.randn(1, 64, 8, 8)), chain.Join)


def test_values_are_not_stored():
    images = torch.randn(2, 3, 64, 64)
    mine, theirs = pair("seresnet50", torch.float32, (2, 2, 2, 2))
    assert saved_bytes(mine, images) <= 0.7 * saved_bytes(theirs, images)
