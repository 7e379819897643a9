"""Population statistics against the formulas of Algorithm 2 (Ioffe and Szegedy 2015)."""

import pytest
import torch

from fastcnn import nn
from fastcnn.train import population_statistics


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 1),
        torch.nn.BatchNorm2d(5), torch.nn.InstanceNorm2d(5, track_running_stats=True),
    )  # fmt: skip


def batches(count=3):
    return [(torch.randn(6, 3, 8, 8) * (i + 1) + i, torch.zeros(6)) for i in range(count)]


def test_means_over_batches_of_means_and_unbiased_variances():
    net, data = model(), batches()
    population_statistics(net, data)
    inputs = [net[0](x).detach() for x, _ in data]
    for norm in (net[1], net[5]):
        m = inputs[0].numel() / inputs[0].shape[1]
        mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
        var = m / (m - 1) * torch.stack([x.var((0, 2, 3), unbiased=False) for x in inputs]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)
        if norm is net[1]:
            # the next norm sees batches that this one normalised with their own statistics; no dropout in between
            normalised = [torch.nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True) for x in inputs]
            inputs = [net[4](x.relu()).detach() for x in normalised]


def test_the_rest_stays_as_it_was():
    net = model()
    net[5].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    population_statistics(net, (x for x, _ in batches()))
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{i}.{name}" for i in (1, 5) for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert [m.training for m in net.modules()] == modes
    assert (net[1].momentum, net[5].momentum) == (0.3, 0.1)
    assert all(p.grad is None for p in net.parameters())


def test_modes_and_momenta_are_restored_after_an_exception():
    net = model()
    with pytest.raises(ValueError, match="channels"):
        population_statistics(net, [torch.randn(2, 7, 8, 8)])
    assert all(m.training for m in net.modules()) and net[1].momentum == 0.3


def test_no_batches():
    net = model()
    before = net[1].running_mean.fill_(3).clone()
    with pytest.raises(ValueError, match="at least one batch"):
        population_statistics(net, [])
    assert torch.equal(net[1].running_mean, before)
