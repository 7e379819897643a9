"""Our optimizers on FSDP2's parameters: every process updates its own part."""

import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastcnn
from fastcnn import optim

SEVERAL = ("SGD", "NAdam", "Lion")


def build(name, params, **kwargs):
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    return getattr(optim, name)(params, lr=0.01, **momentum, **kwargs)


def network():
    torch.manual_seed(0)
    # 7 rows over two processes: one has 4 and the other 3; and a bias of one element
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=generator)).square().mean().backward()
        optimizer.step()


def worker(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2,))
    with fastcnn.backend("cpu"), fastcnn.strict():
        for name in SEVERAL:
            alone, shared = network(), network()
            fully_shard(shared, mesh=mesh)
            a = build(name, alone.parameters(), ema_decay=0.9)
            b = build(name, shared.parameters(), ema_decay=0.9)
            train(alone, a, 3)
            train(shared, b, 3)
            for p, q in zip(alone.parameters(), shared.parameters(), strict=True):
                assert isinstance(q, DTensor)
                torch.testing.assert_close(p.detach(), q.detach().full_tensor())
                assert set(a.state[p]) == set(b.state[q])
                for key, value in a.state[p].items():
                    if value.dim():
                        assert isinstance(b.state[q][key], DTensor)
                        torch.testing.assert_close(value, b.state[q][key].full_tensor())
            # a checkpoint continues
            c = build(name, shared.parameters(), ema_decay=0.9)
            c.load_state_dict(b.state_dict())
            train(alone, a, 2)
            train(shared, c, 2)
            for p, q in zip(alone.parameters(), shared.parameters(), strict=True):
                torch.testing.assert_close(p.detach(), q.detach().full_tensor())
        for refused in (build("SGD", shared.parameters(), max_grad_norm=1.0), optim.LARS(shared.parameters())):
            with pytest.raises(NotImplementedError, match="part of DTensor parameters"):
                refused.step()


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_parameters_of_fsdp2(tmp_path):
    processes.run(worker, tmp_path)
