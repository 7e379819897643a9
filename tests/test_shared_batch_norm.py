"""The vectors of batch norms that share statistics, and the passes into and out of a dense block's buffer."""

import pytest
import torch

from fastcnn.ops import batch_norm_affine, dense_block
from fastcnn.ops.batch_statistics import batch_statistics_reference
from fastcnn.ops.shared_batch_norm import Gradients, Statistics, affine_backward, parameters_backward
from fastcnn.testing import assert_close_to_truth

LANES = ("triton", "cpu")
EPS = 1e-3
fp32, fp64 = torch.float32, torch.float64
CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
# shape of what enters, channels that are made, channels of the buffer
SHAPES = {
    "usual": ((2, 16, 4, 4), 16, 48),
    "ragged": ((3, 5, 7, 3), 3, 9),
    "one channel": ((2, 1, 5, 2), 1, 3),
    "one pixel": ((7, 12, 1, 1), 4, 20),
}
over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
over_layouts = pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=["channels_last", "contiguous"])


def backend(lane):
    return "torch" if lane.name == "cpu" else "triton"


def wide(dtype):
    return fp64 if dtype == fp64 else fp32


def image(lane, *shape, dtype=fp32, layout=CHANNELS_LAST):
    x = torch.randn(shape, dtype=fp64) * 3 + torch.arange(shape[1]).view(1, -1, 1, 1) / 2
    return x.to(lane.device, dtype).contiguous(memory_format=layout)


def sums_about(pivot, y, parts):
    """[parts, 2, C] as convolutions leave them."""
    d = y.to(pivot.dtype) - pivot.view(1, -1, 1, 1)
    sums = torch.randn((parts, 2, y.shape[1]), dtype=pivot.dtype, device=y.device)
    sums[-1] = torch.stack([d.sum((0, 2, 3)), d.square().sum((0, 2, 3))]) - sums[:-1].sum(0)
    return sums


def check_vectors(ours, images, weight, bias):
    """Against batch norm of the images in fp32 and in fp64."""

    def of(dtype):
        mean, var = batch_statistics_reference(images.to(dtype))
        weights = (None if t is None else t.to(dtype) for t in (weight, bias))
        return batch_norm_affine.affine(mean, var, *weights, EPS)

    dtype = wide(images.dtype)
    for name, our, their, true in zip(("scale", "shift", "invstd"), ours, of(dtype), of(fp64), strict=True):
        assert_close_to_truth(name, our, their, true, dtype)


def running_of(lane, channels, rows):
    mean, var = torch.zeros(channels, device=lane.device), torch.ones(channels, device=lane.device)
    return batch_norm_affine.Running(mean, var, None, rows, 0.25, torch.tensor(6, device=lane.device))


@over_shapes
@over_layouts
@pytest.mark.parametrize("dtype", (torch.bfloat16, fp32, fp64), ids=str)
def test_statistics_of_one_buffer(lane, shape, layout, dtype):
    """What enters, a norm of it, new channels, a norm of all; the rest without a norm."""
    (n, c, h, w), made, total = shape
    truth = image(lane, n, total, h, w, dtype=dtype, layout=layout)
    buffer = torch.full_like(truth, torch.nan)
    statistics, triton = Statistics(buffer, backend(lane)), lane.name != "cpu"
    pivot = lambda k: torch.full((k,), 0.5, dtype=wide(dtype), device=lane.device)
    dense_block.enter(truth[:, :c], buffer, statistics, pivot(c) if triton else None)
    assert torch.equal(buffer[:, :c], truth[:, :c]) and buffer[:, c:].isnan().all()
    weight, bias = torch.randn(2, c + made, device=lane.device)
    rows, end = n * h * w, c
    for width, parts in ((0, 0), (made, 3)):
        images = truth[:, end : end + width]
        if width:
            statistics.add(images, sums_about(pivot(width), images, parts) if triton else None, pivot(width))
        end += width
        running = running_of(lane, end, rows)
        vectors = statistics.affine(weight[:end], bias[:end], EPS, running)
        check_vectors(vectors, truth[:, :end], weight[:end], bias[:end])
        mean, var = batch_statistics_reference(truth[:, :end].double())
        torch.testing.assert_close(running.mean.double(), 0.25 * mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(running.var.double(), 0.75 + 0.25 * var * rows / (rows - 1), rtol=1e-5, atol=1e-6)
        assert running.batches == 7
    images = truth[:, end:]
    statistics.add(images, sums_about(pivot(total - end), images, 1) if triton else None, pivot(total - end))
    statistics.store()
    mean, var = batch_statistics_reference(truth.double())
    torch.testing.assert_close(statistics.mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.var.double(), var, rtol=1e-4, atol=1e-5)


def test_running_statistics_that_kernels_cannot_move(lane):
    buffer = image(lane, 2, 6, 3, 3)
    statistics = Statistics(buffer, backend(lane))
    pivot = torch.zeros(6, device=lane.device)
    statistics.add(buffer, sums_about(pivot, buffer, 2) if lane.name != "cpu" else None, pivot)
    mean, var = torch.zeros(2, 12, device=lane.device)[:, ::2]
    running = batch_norm_affine.Running(mean, var, None, 18, 1.0)
    check_vectors(statistics.affine(None, None, EPS, running), buffer, None, None)
    torch.testing.assert_close(mean, buffer.mean((0, 2, 3)))


@over_shapes
@over_layouts
def test_what_leaves_a_buffer(lane, shape, layout):
    (n, c, h, w), _, total = shape
    buffer, grad = (image(lane, n, total, h, w, layout=layout) for _ in range(2))
    mean, grad_mean, grad_var = torch.randn(3, total, device=lane.device)
    rows = n * h * w

    def of(dtype):
        vectors = (t[:c].to(dtype).view(1, -1, 1, 1) for t in (mean, grad_mean, grad_var))
        x, dx, (mean_, dmean, dvar) = buffer[:, :c].to(dtype), grad[:, :c].to(dtype), vectors
        return dx + dmean / rows + dvar * 2 / rows * (x - mean_)

    ours = dense_block.leave(grad, buffer, c, Gradients(mean, rows, grad_mean, grad_var, backend(lane)), backend(lane))
    assert_close_to_truth("grad_x", ours, of(fp32), of(fp64), fp32)
    assert ours.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("parameters", (None, torch.bfloat16, fp32), ids=str)
@pytest.mark.parametrize("dtype", (fp32, fp64), ids=str)
@pytest.mark.parametrize("channels", (1, 21, 48))
@pytest.mark.parametrize("given", (False, True))
def test_gradients(lane, channels, dtype, parameters, given):
    """Of two norms of more and fewer channels, given as vectors and in parts; against autograd in fp64."""
    new = lambda *shape: torch.randn(shape, dtype=fp64).to(lane.device, dtype)
    rows, fewer, triton = 50, max(1, channels // 2), lane.name != "cpu"
    mean, var = new(channels), new(channels).abs() + 0.1
    grad_mean, grad_var = (new(channels) if given else None for _ in range(2))
    gradients = Gradients(mean, rows, grad_mean, grad_var, backend(lane))
    true, theirs = ([t.detach().to(kind, copy=True).requires_grad_() for t in (mean, var)] for kind in (fp64, dtype))
    totals = [(leaves[0] * grad_mean + leaves[1] * grad_var).sum() if given else 0.0 for leaves in (true, theirs)]
    for end, parts in ((channels, 600), (fewer, 1), (fewer, None)):
        weight = None if parameters is None else new(end).to(parameters)
        grads = new(parts or 1, 2, end)
        invstd = torch.rsqrt(var[:end] + EPS)
        passed = grads.unbind(1) if triton and parts else grads.sum(0).unbind(0)
        alone = parameters_backward(*passed, mean[:end], invstd, weight, backend(lane))
        everything = affine_backward(*passed, mean[:end], invstd, weight, backend(lane))
        ours = gradients.add(*passed, invstd, weight)
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(ours, alone, everything[2:], strict=True))
        expected = []
        for k, leaves in enumerate((true, theirs)):
            kind = leaves[0].dtype
            w = (torch.ones_like(mean[:end]) if weight is None else weight).to(kind).requires_grad_()
            b = torch.zeros_like(w).requires_grad_()
            scale, shift, _ = batch_norm_affine.affine(leaves[0][:end], leaves[1][:end], w, b, EPS)
            total = (scale * grads[:, 0].sum(0)).sum() + (shift * grads[:, 1].sum(0)).sum()
            expected.append(torch.autograd.grad(total, (w, b, *leaves), retain_graph=True))
            totals[k] = totals[k] + total
        for name, our, their, right in zip(("weight", "bias"), ours, expected[1], expected[0], strict=False):
            assert_close_to_truth(name, our, their.to(our.dtype), right, our.dtype)
        for name, our, their, right in zip(("mean", "var"), everything, expected[1][2:], expected[0][2:], strict=False):
            assert_close_to_truth(name, our, their[:end], right[:end], dtype)
    true, theirs = (torch.autograd.grad(total, t) for total, t in zip(totals, (true, theirs), strict=True))
    _, _, b, c = gradients.correction(new(1, channels, 1, 1), 0, channels)
    for our, their, right in ((gradients.grad_mean, theirs[0], true[0]), (gradients.grad_var, theirs[1], true[1])):
        assert_close_to_truth("statistics", our, their, right, dtype)
    affine = lambda dmean, dvar: (dvar * 2 / rows, dmean / rows - dvar * 2 / rows * mean.to(dvar.dtype))
    for our, their, right in zip((b, c), affine(*theirs), affine(*true), strict=True):
        assert_close_to_truth("correction", our, their, right, dtype)
