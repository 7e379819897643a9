"""DistributedDataParallel over two gloo processes equals one process on the whole batch."""

import copy

import processes
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import fastcnn
from fastcnn import nn, optim

STEPS = 4


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 1, bias=False),  # 1x1: the layout of its gradient must be the parameter's
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
    )


def data(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 10, (8,), generator=generator)


def train(model, part):
    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        images, labels = data(step)
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(model(images[part]), labels[part]).backward()
        optimizer.step()


def worker(rank, path, channels_last):
    fastcnn.backend("cpu")
    model = build().to(memory_format=torch.channels_last if channels_last else torch.preserve_format)
    # a bucket smaller than one layer, and gradients as views of the buckets
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.001, gradient_as_bucket_view=True)
    train(ddp, slice(rank * 4, rank * 4 + 4))
    torch.save(model.state_dict(), f"{path}/{rank}.pt")


@pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))
def test_two_processes_equal_one(tmp_path, channels_last):
    processes.run(worker, tmp_path, channels_last)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = copy.deepcopy(build())
    train(alone, slice(None))
    for name, expected in alone.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], expected, rtol=1e-4, atol=1e-5)
