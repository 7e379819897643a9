"""Batch norm's vectors, forward and backward, against batch norm of a tensor in fp64."""

import pytest
import torch
import torch.nn.functional as F

from fastcnn.ops import batch_norm_affine as bn
from fastcnn.testing import assert_close_to_truth

LANES = ("triton", "cpu")
bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EPS = 1e-3


@pytest.fixture
def backend(lane):
    return "torch" if lane.name == "cpu" else "triton"


def vectors(lane, channels, dtype, parameters):
    """mean, var, weight, bias; the latter None with parameters None."""
    mean = torch.randn(channels, dtype=dtype, device=lane.device)
    var = torch.rand(channels, dtype=dtype, device=lane.device)
    if parameters is None:
        return mean, var, None, None
    weight, bias = torch.randn((2, channels), device=lane.device).to(parameters)
    return mean, var, weight, bias


@pytest.mark.parametrize("channels", (1, 19, 257))
@pytest.mark.parametrize(
    "dtype, parameters", ((fp32, fp32), (fp32, None), (fp32, bf16), (fp64, fp64), (fp64, None)), ids=str
)
def test_forward(lane, backend, channels, dtype, parameters):
    mean, var, weight, bias = vectors(lane, channels, dtype, parameters)
    wide = [None if t is None else t.double() for t in (mean, var, weight, bias)]
    truth = bn.affine(*wide, EPS)
    x = torch.randn((3, channels), dtype=fp64, device=lane.device)
    torch.testing.assert_close(x * truth[0] + truth[1], F.batch_norm(x, *wide, False, 0.0, EPS))
    ours, theirs = (bn.affine(mean, var, weight, bias, EPS, which) for which in (backend, "torch"))
    for name, *results in zip(("scale", "shift", "invstd"), ours, theirs, truth, strict=True):
        assert results[0].dtype == dtype
        assert_close_to_truth(name, *results, dtype)


@pytest.mark.parametrize("counted", (False, True), ids=("number", "tensor"))
@pytest.mark.parametrize("offset", (None, fp32, bf16), ids=str)
@pytest.mark.parametrize("dtype, kept", ((fp32, fp32), (fp64, fp64), (fp32, bf16)), ids=str)
def test_running_statistics(lane, backend, dtype, kept, offset, counted):
    mean, var, weight, bias = vectors(lane, 19, dtype, kept)
    offset = None if offset is None else torch.randn(19, device=lane.device).to(offset)
    rows = torch.tensor(7.0, dtype=dtype, device=lane.device) if counted else 7
    before = torch.randn((2, 19), device=lane.device).to(kept)
    running = before.clone()
    batches = torch.tensor(2**40, device=lane.device)
    versions = running[0]._version, batches._version
    result = bn.affine(mean, var, weight, bias, EPS, backend, bn.Running(*running, offset, rows, 0.3, batches))
    for ours, alone in zip(result, bn.affine(mean, var, weight, bias, EPS, backend), strict=True):
        assert torch.equal(ours, alone)
    batch = mean.double() + (0 if offset is None else offset.double())
    truth = before.double() * 0.7 + 0.3 * torch.stack([batch, var.double() * 7 / 6])
    assert_close_to_truth("running", running, truth.to(kept), truth, kept)
    assert running[0]._version > versions[0] and batches._version > versions[1] and batches == 2**40 + 1
    counted_alone = bn.Running(None, None, offset, rows, 0.3, batches)
    unchanged = bn.affine(mean, var, weight, bias, EPS, backend, counted_alone)
    assert torch.equal(unchanged[0], result[0]) and batches == 2**40 + 2


def test_running_statistics_that_are_not_contiguous(lane, backend):
    mean, var, weight, bias = vectors(lane, 19, fp32, fp32)
    running = torch.zeros((19, 2), device=lane.device).unbind(1)
    bn.affine(mean, var, weight, bias, EPS, backend, bn.Running(*running, None, 5, 1.0))
    torch.testing.assert_close(running[0], mean)
    torch.testing.assert_close(running[1], var * 5 / 4)


@pytest.mark.parametrize("training", (True, False), ids=("training", "frozen"))
@pytest.mark.parametrize("channels", (1, 19, 257))
@pytest.mark.parametrize(
    "dtype, parameters", ((fp32, fp32), (fp32, None), (fp32, bf16), (fp64, fp64), (fp64, None)), ids=str
)
def test_backward(lane, backend, channels, dtype, parameters, training):
    x = torch.randn((11, channels), dtype=dtype, device=lane.device) * 2 + 1
    var, mean = torch.var_mean(x, 0, correction=0)
    *_, weight, bias = vectors(lane, channels, dtype, parameters)
    du = torch.randn_like(x)

    def results(backend, *tensors):
        at, grad, m, v, w = tensors
        sums = (grad * at).sum(0), grad.sum(0)
        a, b, c, *grads = bn.affine_backward(*sums, m, torch.rsqrt(v + EPS), w, len(x), training, None, backend)
        assert (b is None) == (c is None) == (not training)
        return a * grad + (b * at + c if training else 0), *grads, a

    tensors = x, du, mean, var, weight
    ours, theirs = results(backend, *tensors), results("torch", *tensors)
    truth = results("torch", *(None if t is None else t.double() for t in tensors))
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    running = (None, None) if training else (mean.double(), var.double())
    output = F.batch_norm(leaves[0], *running, *leaves[1:], training, 0.0, EPS)
    expected = torch.autograd.grad(output, [t for t in leaves if t is not None], du.double())
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == fp32 else {}  # mean and var are rounded
    for true, found in zip(expected, truth, strict=False):
        torch.testing.assert_close(found, true, **tolerance)
    for name, *three in zip(("grad_x", "grad_weight", "grad_bias", "a"), ours, theirs, truth, strict=True):
        rounded = parameters if "grad_w" in name or "grad_b" in name else None
        assert_close_to_truth(name, *three, rounded or dtype)
    if weight is not None and backend == "triton":
        assert ours[1].dtype == ours[2].dtype == parameters


def test_nan_and_inf_stay_in_their_channels(lane, backend):
    mean, var, weight, bias = vectors(lane, 19, fp32, fp32)
    mean[3], var[4], var[5], weight[6] = torch.nan, torch.inf, torch.nan, torch.inf
    running = torch.zeros((2, 19), device=lane.device)
    scale, shift, invstd = bn.affine(mean, var, weight, bias, EPS, backend, bn.Running(*running, None, 5, 0.1))
    expected = bn.affine(mean, var, weight, bias, EPS)
    for ours, theirs in zip((scale, shift, invstd), expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert running[0].isnan().nonzero().flatten().tolist() == [3]
    assert (~running[1].isfinite()).nonzero().flatten().tolist() == [4, 5]
    sums = torch.randn((2, 19), device=lane.device)
    ours, theirs = (bn.affine_backward(*sums, mean, invstd, weight, 9, True, None, w) for w in (backend, "torch"))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-5, atol=1e-5)
