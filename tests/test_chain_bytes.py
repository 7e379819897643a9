"""What the fused chain keeps and moves, of whole networks: bytes saved for backward, and the page of launches."""

from pathlib import Path

import pytest
import torch
from conftest import INTERPRET

import fastcnn
from fastcnn.benchmarks import networks, predict_chain
from fastcnn.study import launches

RESULTS = Path(__file__).parent.parent / "benchmarks/results"
# bytes saved for backward, of PyTorch's own at most
BARS = {
    "resnet50": 0.80,
    "densenet121": 0.25,
    "mobilenet_v2": 0.40,
    "efficientnet_b0": 0.40,
    "vgg16_bn": 0.45,
    "googlenet": 0.32,
}
pytestmark = pytest.mark.skipif(INTERPRET, reason="counts bytes, not what kernels compute")


def saved_bytes(model, images):
    """Bytes of distinct storages that a forward keeps, but for parameters, buffers and the images."""
    free = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), images)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in free:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive: its address must not be given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)
    assert output is not None
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", BARS)
def test_saved_bytes_of_networks(name):
    model = networks.build(f"torchvision:{name}").to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    eager = saved_bytes(model, images)
    fastcnn.convert(model)
    share = saved_bytes(model, images) / eager
    assert share <= BARS[name], f"{share:.3f} of PyTorch's saved bytes"


def test_the_committed_page_is_what_is_launched():
    committed = (RESULTS / predict_chain.PAGE).read_text()
    assert committed == predict_chain.page(), "run `make results` and commit what it writes"


def test_resnet50_moves_what_the_ledger_says():
    moved = sum(launch.bytes for made in predict_chain.counted("resnet50") for launch in made)
    assert moved / predict_chain.BATCH / 1e6 <= 1.05 * sum(predict_chain.expected("resnet50"))


def test_launches_by_hand():
    x = torch.empty(4, 8, 2, 2, dtype=torch.bfloat16, device="meta")
    with launches.recorded() as made:
        y = x + x  # the same tensor twice is one
        torch.zeros_like(y)
        y.view(-1)
        fastcnn.functional.max_pool2d(x, 2)
    x_bytes = 2 * x.numel()
    assert [(launch.name, launch.bytes) for launch in made[:2]] == [
        ("aten::add", 2 * x_bytes),
        ("aten::zeros_like", x_bytes),
    ]
    # the output and, without gradients, no taps
    assert [launch.bytes for launch in made[2:]] == [x_bytes + x_bytes // 4]


def test_a_slice_counts_its_own_elements_and_an_expanded_one_those_it_has():
    x = torch.empty(4, 8, 2, 2, device="meta")
    with launches.recorded() as made:
        x[:, :2] * x.new_empty(8, 1, 1).expand(4, 8, 2, 2)[:, :2]
    assert [launch.bytes for launch in made] == [4 * (32 + 2 + 32)]
