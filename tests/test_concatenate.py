"""Concatenations that convolutions write in place, pools that backward makes again, and both in converted networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcnn
from fastcnn import chain
from fastcnn.benchmarks.networks import import_torchvision
from fastcnn.ops.concatenate import Buffer
from fastcnn.testing import assert_close_to_truth, make_grad

LANES = ("triton", "cpu")
N, C, H, W = 3, 4, 5, 6
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic.*")


class Inception(nn.Module):
    """Pooled convolution; branches of it side by side, one of them a pool's; a convolution of all."""

    def __init__(self, widths=(3, 5, 2), activation="relu"):
        super().__init__()
        pair = lambda c, k, size: nn.ModuleList([nn.Conv2d(c, k, size, padding=size // 2), nn.BatchNorm2d(k)])
        self.stem, self.activation = pair(C, 6, 3), activation
        self.branches = nn.ModuleList(pair(6, k, 1 + 2 * (i % 2)) for i, k in enumerate(widths))
        self.head = nn.Conv2d(sum(widths), 3, 1)

    def forward(self, x):
        act = getattr(F, self.activation)
        conv, bn = self.stem
        x = F.max_pool2d(act(bn(conv(x))), 2, ceil_mode=True)
        inputs = [x] * (len(self.branches) - 1) + [F.max_pool2d(x, 3, 1, 1)]
        branches = [act(bn(conv(x))) for x, (conv, bn) in zip(inputs, self.branches, strict=True)]
        return self.head(torch.cat(branches, 1))

    def fused(self, x, slots=True):
        x = chain.max_pool2d(chain.activate(chain.conv_batch_norm(x, *self.stem), self.activation), 2, ceil_mode=True)
        inputs = [x] * (len(self.branches) - 1) + [chain.max_pool2d(x, 3, 1, 1)]
        buffer, values = Buffer(self.head.in_channels), []
        for x, (conv, bn) in zip(inputs, self.branches, strict=True):
            out = buffer.slot(sum(value.raw.shape[1] for value in values)) if slots else None
            values.append(chain.activate(chain.conv_batch_norm(x, conv, bn, out=out), self.activation))
        self.parts = [value.raw for value in values]
        self.cat = chain.cat(values)
        return chain.conv(self.cat, self.head)


def image(dtype=torch.float32, layout=torch.channels_last):
    return torch.randn(N, C, H, W, dtype=torch.float64).to(dtype).to(memory_format=layout).requires_grad_()


def gradients(network, forward, x, grad_output, twice=False):
    x = x.detach().requires_grad_()
    y = forward(x * 1)
    if twice:
        y.backward(grad_output.to(y.dtype), retain_graph=True)
    y.backward(grad_output.to(y.dtype))
    named = {name: p.grad for name, p in network.named_parameters()}
    return {"output": y.detach(), "x": x.grad, **named, **dict(network.named_buffers())}


def compare(network, x, device="cpu", twice=False, **options):
    with torch.no_grad():
        grad_output = make_grad(copy.deepcopy(network)(x))
    plain, true = copy.deepcopy(network), copy.deepcopy(network).double()
    expected = gradients(plain, plain.forward, x, grad_output, twice)
    truth = gradients(true, true.forward, x.double(), grad_output, twice)
    network = network.to(device)
    ours = gradients(network, lambda x: network.fused(x, **options), x.to(device), grad_output.to(device), twice)
    for name, tensor in ours.items():
        assert_close_to_truth(name, tensor.cpu().to(x.dtype), expected[name].to(x.dtype), truth[name].double(), x.dtype)


def lies_in(part, whole):
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["last", "contiguous"])
def test_parts_are_written_in_place(lane, layout):
    network = Inception()
    compare(network, image(layout=layout), lane.device)
    assert all(lies_in(part, network.cat.raw) for part in network.parts)


@pytest.mark.parametrize("slots", [True, False])
def test_in_fp64(slots):
    with fastcnn.backend("torch"):
        network = Inception(activation="silu").double()
        compare(network, image(torch.float64), slots=slots, twice=True)
    assert all(lies_in(part, network.cat.raw) is slots for part in network.parts)


def test_frozen_batch_norm():
    network = Inception().double()
    network.branches.eval()
    with fastcnn.backend("torch"):
        compare(network, image(torch.float64))


def test_slots_of_another_size_or_dtype_are_not_used():
    pairs = [(nn.Conv2d(C, 2, 1), nn.BatchNorm2d(2)) for _ in range(2)]
    buffer, x = Buffer(4), image()
    first = chain.conv_batch_norm(x, *pairs[0], out=buffer.slot(0))
    small = chain.conv_batch_norm(x[:, :, 1:], *pairs[1], out=buffer.slot(2))
    beyond = chain.conv_batch_norm(x, *pairs[1], out=buffer.slot(3))
    assert not lies_in(small.raw, first.raw) and not lies_in(beyond.raw, first.raw)
    z = chain.materialize(chain.cat([first, beyond]))
    with fastcnn.backend("torch"):
        truth = torch.cat([bn(conv(x)) for conv, bn in pairs], 1)
    torch.testing.assert_close(z, truth)


def test_different_activations_and_tensors_are_concatenated_as_tensors():
    x = image(torch.float64)
    conv, bn = nn.Conv2d(C, 2, 1).double(), nn.BatchNorm2d(2).double()
    with fastcnn.backend("torch"):
        value = chain.conv_batch_norm(x, conv, bn)
        z = chain.cat([chain.activate(value, "relu"), value, x])
        u = bn(conv(x))
    torch.testing.assert_close(z, torch.cat([u.relu(), u, x], 1))


def test_a_pool_that_was_written_to_is_kept_as_it_is():
    network = Inception().double()
    x = image(torch.float64)
    conv, bn = network.branches[0]
    with fastcnn.backend("torch"):
        pooled = chain.max_pool2d(chain.activate(chain.conv_batch_norm(x, *network.stem), "relu"), 2)
        pooled.mul_(2.0)
        y = chain.materialize(chain.conv_batch_norm(pooled, conv, bn))
        (ours,) = torch.autograd.grad(y.sin().sum(), conv.weight)
        stem, norm = network.stem
        y = bn(conv(F.max_pool2d(norm(stem(x)).relu(), 2) * 2.0))
        (truth,) = torch.autograd.grad(y.sin().sum(), conv.weight)
    torch.testing.assert_close(ours, truth)


def saved_bytes(model, x):
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    total = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in known)
    return total, y


@pytest.mark.parametrize("name, bar", [("googlenet", 0.32), ("densenet121", 0.25)])
def test_saved_bytes_of_converted_networks(name, bar):
    build = getattr(import_torchvision().models, name)
    options = dict(aux_logits=False, init_weights=True) if name == "googlenet" else {}
    model = build(num_classes=5, **options).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 96, 96).to(memory_format=torch.channels_last)
    eager, _ = saved_bytes(model, x)
    report = fastcnn.convert(model)
    assert not [row for row in report.rows if row.done == "kept"]
    ours, y = saved_bytes(model, x)
    assert ours <= bar * eager
    y.sum().backward()
