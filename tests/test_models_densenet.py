"""What is DenseNet's own; the rest is in tests/test_architectures.py."""

import pytest
import torch
from conftest import INTERPRET
from test_chain_bytes import saved_bytes

from fastcnn import nn
from fastcnn.benchmarks import networks
from fastcnn.models import create_model
from fastcnn.models.densenet import DenseNet


def test_first_weights_are_torchvisions():
    torchvision = networks.import_torchvision()
    torch.manual_seed(0)
    theirs = torchvision.models.DenseNet(8, (2, 1), 16, num_classes=3)
    torch.manual_seed(0)
    mine = DenseNet(3, growth_rate=8, block_config=(2, 1), num_init_features=16)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[key], tensor), key


@pytest.mark.parametrize("name, depth, k", [("densenet_bc100_12_cifar", 100, 12), ("densenet_bc250_24_cifar", 250, 24)])
def test_parameters_of_the_papers_networks_for_small_images(name, depth, k):
    total, channels = 3 * 2 * k * 9, 2 * k
    for block in range(3):
        for _ in range((depth - 4) // 6):
            total += 2 * channels + channels * 4 * k + 2 * 4 * k + 4 * k * k * 9
            channels += k
        if block < 2:
            total += 2 * channels + channels * channels // 2
            channels //= 2
    total += 2 * channels + 10 * channels + 10
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name).parameters()) == total


def test_smallest_image():
    with torch.device("meta"):
        model = create_model("densenet121").eval()
        assert model(torch.empty(1, 3, 29, 29)).shape == (1, 1000)
        with pytest.raises(ValueError, match="at least 29"):
            model(torch.empty(1, 3, 29, 28))


@pytest.mark.parametrize("bn_size", [4, None])
def test_drop_rate_is_of_what_a_layer_adds(bn_size):
    block = nn.DenseBlock(3, 8, bn_size, 4, drop_rate=0.5)
    x = torch.randn(4, 8, 16, 16)
    y = block(x)
    assert torch.equal(y[:, :8], x)
    share = (y[:, 8:] == 0).float().mean()
    assert 0.4 < share < 0.6
    assert (block.eval()(x)[:, 8:] == 0).float().mean() < 0.01


@pytest.mark.skipif(INTERPRET, reason="counts bytes, not what kernels compute")
def test_saved_bytes():
    model = create_model("densenet121", fused=False).to(memory_format=torch.channels_last)
    images = torch.randn(1, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    eager = saved_bytes(model, images)
    fused = create_model("densenet121").to(memory_format=torch.channels_last)
    share = saved_bytes(fused, images) / eager
    assert share <= 0.23, f"{share:.3f} of PyTorch's saved bytes"
