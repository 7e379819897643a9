"""SyncBatchNorm over two gloo processes equals batch norm of one process on the whole batch."""

import copy
import os

import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fastcnn
from fastcnn import nn
from fastcnn.ops.batch_norm import finished
from fastcnn.ops.batch_norm_sync import sync_batch_norm

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# rows of the first process (of 5), shape of a row, layout, activation, residual, dtype
CASES = {
    "contiguous": (3, (4, 3, 5), torch.contiguous_format, None, False, torch.float32),
    "channels_last, add, relu": (2, (16, 3, 5), torch.channels_last, "relu", True, torch.float32),
    "relu": (1, (5, 4, 4), torch.contiguous_format, "relu", False, torch.float32),
    "fp64, add": (4, (3, 4, 4), torch.channels_last, None, True, torch.float64),
    "first process empty": (0, (4, 3, 5), torch.contiguous_format, "relu", True, torch.float32),
    "second process empty": (5, (4, 3, 5), torch.channels_last, None, True, torch.float32),
    "bf16": (2, (4, 3, 5), torch.contiguous_format, "silu", True, torch.bfloat16),  # on CPU the reference
}


def data(case):
    _, shape, layout, _, _, dtype = CASES[case]
    generator = torch.Generator().manual_seed(0)
    # a mean far from zero, another one in each row: merged about the wrong pivot, nothing would be left
    x, r, grad = torch.randn(3, 5, *shape, generator=generator)
    x = x + torch.arange(5.0).view(5, 1, 1, 1) + (1000 if dtype == torch.float32 else 0)
    return [t.to(dtype).contiguous(memory_format=layout) for t in (x, r, grad)]


def module(case):
    C, dtype = CASES[case][1][0], CASES[case][5]
    norm = torch.nn.BatchNorm2d(C, momentum=0.3, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, C))
        norm.bias.copy_(torch.linspace(1, -1, C))
    return norm


def run(norm, case, rows, wide=False):
    """Output, gradients and buffers of these rows; in fp64 if wide."""
    _, _, _, activation, residual, _ = CASES[case]
    x, r, grad = (t[rows].detach().to(torch.float64 if wide else t.dtype) for t in data(case))
    x.requires_grad_(), r.requires_grad_()
    if isinstance(norm, nn.SyncBatchNorm):
        y = norm(x, activation=activation, residual=r if residual else None)
    else:
        y = finished(norm(x), activation, r if residual else None)
    leaves = (x, *norm.parameters(), *([r] if residual else []))
    names = ("input", "weight", "bias", "residual")
    grads = dict(zip(names, torch.autograd.grad(y, leaves, grad), strict=False))
    return {"output": y.detach(), **grads, **{k: v.clone() for k, v in norm.named_buffers()}}


def double_backward(norm):
    x = torch.arange(24.0, dtype=torch.float64).sin().view(4, 2, 3, 1)
    x = x[dist.get_rank() * 2 :][:2].clone().requires_grad_() if dist.is_initialized() else x.requires_grad_()
    y = norm(x)
    (grad,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0]


def worker(rank, path):
    if INTERPRET:
        import interpreter_repairs  # noqa: F401
    fastcnn.backend("triton" if INTERPRET else "cpu")
    results = {}
    for case, (first, *_, dtype) in CASES.items():
        norm = nn.SyncBatchNorm.convert_sync_batchnorm(module(case))
        with fastcnn.strict(INTERPRET or dtype != torch.bfloat16):
            results[case] = run(norm, case, slice(0, first) if rank == 0 else slice(first, None))
    results["double backward"] = double_backward(nn.SyncBatchNorm(2, dtype=torch.float64))
    torch.save(results, f"{path}/{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("sync")
    processes.run(worker, path)
    return [torch.load(path / f"{rank}.pt") for rank in range(processes.WORLD)]


@pytest.mark.interpret
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(results, case):
    parts = [result[case] for result in results]
    expected = run(module(case).double(), case, slice(None), wide=True)
    tolerance = dict(rtol=3e-2, atol=3e-2) if CASES[case][5] == torch.bfloat16 else dict(rtol=2e-4, atol=2e-4)
    for name, whole in expected.items():
        if name in ("output", "input", "residual"):
            ours = torch.cat([part[name] for part in parts])
            assert all(part[name].stride() == whole[:n].stride() for part in parts if (n := part[name].shape[0]) > 1)
        elif name in ("weight", "bias"):  # what DistributedDataParallel averages
            ours = sum(part[name] for part in parts)
        else:
            ours = parts[0][name]
            torch.testing.assert_close(parts[1][name], ours, rtol=0, atol=0)
        torch.testing.assert_close(ours.to(whole.dtype), whole, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.interpret
def test_double_backward(results):
    ours = torch.cat([result["double backward"] for result in results])
    torch.testing.assert_close(ours, double_backward(torch.nn.BatchNorm2d(2, dtype=torch.float64)))


def test_one_process_is_batch_norm():
    x = torch.randn(4, 3, 5, 5)
    ours, theirs = nn.SyncBatchNorm(3), torch.nn.BatchNorm2d(3)
    torch.testing.assert_close(ours(x, activation="relu"), theirs(x).relu())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_conversion_keeps_parameters_buffers_and_modes():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3), torch.nn.Sequential(torch.nn.BatchNorm2d(4, momentum=None)),
        torch.nn.SyncBatchNorm(4), torch.nn.InstanceNorm2d(4),
    )  # fmt: skip
    model[1].eval()
    before = copy.deepcopy(model)
    parameters = list(model.parameters())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(converted[i]) for i in (1, 3, 4)] == [nn.SyncBatchNorm, nn.SyncBatchNorm, torch.nn.InstanceNorm2d]
    assert type(converted[2][0]) is nn.SyncBatchNorm and converted[2][0].momentum is None
    assert converted[1].eps == 1e-3 and not converted[1].training and converted[3].training
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    torch.testing.assert_close(converted.state_dict(), before.state_dict())


def test_bad_arguments_are_refused():
    running = torch.zeros(3), torch.ones(3)
    x = torch.randn(2, 3, 4, 4)
    for error, message, changed in (
        (ValueError, "running_mean must have 3 elements", dict(running_mean=torch.zeros(2))),
        (ValueError, "residual must have the shape", dict(residual=x[:1])),
        (ValueError, "activation must be None or one of", dict(activation="elu")),
    ):
        with pytest.raises(error, match=message):
            sync_batch_norm(**dict(input=x, running_mean=running[0], running_var=running[1]) | changed)
    assert torch.equal(F.batch_norm(x, *running), F.batch_norm(x, torch.zeros(3), torch.ones(3)))
