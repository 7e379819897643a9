"""Statistics of a batch from sums about a pivot: right wherever the pivot is."""

import pytest
import torch

from fastcnn.ops import batch_norm_affine, batch_statistics, conv_sums
from fastcnn.ops.batch_statistics import affine_from_sums, batch_statistics_reference, from_sums
from fastcnn.testing import assert_close_to_truth

LANES = ("triton", "cpu")
fp32, fp64 = torch.float32, torch.float64


def backend(lane):
    return "torch" if lane.name == "cpu" else "triton"


def sums_about(pivot, y):
    """As a convolution leaves them: fp32 sums of fp32 terms (fp64 for fp64)."""
    d = y.to(pivot.dtype) - pivot.view(1, -1, 1, 1)
    return torch.stack([d.sum((0, 2, 3)), d.square().sum((0, 2, 3))])


def image(lane, *shape, dtype=fp32, layout=torch.channels_last):
    return torch.randn(shape, device=lane.device).to(dtype).contiguous(memory_format=layout)


def check(lane, y, pivot, sums=None):
    wide = fp64 if y.dtype == fp64 else fp32
    sums = sums_about(pivot, y) if sums is None else sums
    mean, var = from_sums(y, sums, pivot, backend(lane))
    assert mean.dtype == var.dtype == wide
    true_mean, true_var = batch_statistics_reference(y.double())
    # of one in many thousand parts: 6 bits are given away, and sums round
    torch.testing.assert_close(var.double(), true_var, rtol=1e-5 if wide == fp32 else 1e-12, atol=0)
    their_mean, _ = batch_statistics_reference(y.to(wide))
    assert_close_to_truth("mean", mean, their_mean, true_mean, wide)
    return mean, var


@pytest.mark.parametrize("pivot", (0.0, 1.0, 100.0, 1e4, -3e6))
@pytest.mark.parametrize("dtype", (torch.bfloat16, fp32, fp64), ids=str)
@pytest.mark.parametrize("shape", ((3, 17, 7, 9), (2, 1, 1, 1), (1, 40, 1, 3)), ids=str)
def test_any_pivot(lane, shape, dtype, pivot):
    y = image(lane, *shape, dtype=dtype)
    pivot = torch.full((shape[1],), pivot, dtype=fp64 if dtype == fp64 else fp32, device=lane.device)
    if shape[1] > 1:
        pivot[::2] = 0.25  # beside bad ones
    check(lane, y, pivot)


def test_a_large_mean(lane):
    y = image(lane, 4, 20, 12, 11) + 1e4
    check(lane, y, torch.zeros(20, device=lane.device))


def test_channels_without_variance(lane):
    y = torch.full((4, 3, 5, 5), 7.3, device=lane.device)
    y[:, 1] = 0.0
    pivot = torch.zeros(3, device=lane.device)
    mean, var = from_sums(y, sums_about(pivot, y), pivot, backend(lane))
    assert (var <= 1e-13).all() and (var >= 0).all()
    torch.testing.assert_close(mean, y[0, :, 0, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ("contiguous", "slice", "transposed"))
def test_strides(lane, layout):
    y = image(lane, 3, 20, 6, 5, layout=torch.contiguous_format)
    if layout == "slice":
        y = image(lane, 3, 50, 6, 5)[:, 7:27]
    elif layout == "transposed":
        y = y.transpose(2, 3)
    check(lane, y, torch.full((20,), 300.0, device=lane.device))


def test_slabs_are_added(lane):
    y = image(lane, 3, 20, 6, 5)
    pivot = torch.linspace(-2.0, 300.0, 20, device=lane.device)
    slabs = torch.randn(39, 2, 20, device=lane.device)
    slabs[-1] = sums_about(pivot, y) - slabs[:-1].sum(0)
    far = check(lane, y, pivot, slabs)
    again = from_sums(y, slabs, pivot, backend(lane))
    assert all(torch.equal(a, b) for a, b in zip(far, again, strict=True))


@pytest.mark.parametrize("apart", (False, True), ids=("contiguous", "strided"))
@pytest.mark.parametrize("offset", (False, True), ids=("", "offset"))
@pytest.mark.parametrize("dtype, parameters", ((fp32, fp32), (torch.bfloat16, None), (fp64, fp64)), ids=str)
def test_vectors_and_running_statistics_in_the_same_call(lane, dtype, parameters, offset, apart):
    y = image(lane, 3, 19, 6, 5, dtype=dtype)
    wide = fp64 if dtype == fp64 else fp32
    pivot = torch.linspace(-2.0, 300.0, 19, device=lane.device, dtype=wide)
    slabs = torch.zeros(700, 2, 19, device=lane.device, dtype=wide)
    slabs[3] = sums_about(pivot, y)
    slabs[3] -= 1.0
    slabs[699] = 1.0
    affine = (None, None) if parameters is None else torch.randn((2, 19), device=lane.device).to(parameters)
    before, batches = torch.randn((2, 19), device=lane.device, dtype=wide), torch.tensor(6, device=lane.device)
    stored = before.t().clone().t() if apart else before.clone()
    moved = batch_norm_affine.Running(
        *stored, torch.full((19,), 0.25, device=lane.device) if offset else None, 90, 0.3, batches
    )
    mean, *vectors = affine_from_sums(y, slabs, pivot, *affine, 1e-3, backend(lane), moved)
    expected_mean, var = from_sums(y, slabs, pivot, backend(lane))
    assert torch.equal(mean, expected_mean) and batches == 7
    again = before.clone()
    expected = batch_norm_affine.affine(mean, var, *affine, 1e-3, running=moved._replace(mean=again[0], var=again[1]))
    limit = 1e-6 if wide == fp32 else 1e-14
    for ours, theirs in zip((*vectors, stored), (*expected, again), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)
    for ours, alone in zip(vectors, affine_from_sums(y, slabs, pivot, *affine, 1e-3, backend(lane))[1:], strict=True):
        assert torch.equal(ours, alone)


def test_nan_and_inf_stay_in_their_channels_and_do_not_cost_a_second_read(lane):
    y = image(lane, 3, 20, 6, 5)
    pivot = torch.zeros(20, device=lane.device)
    sums = sums_about(pivot, y)
    sums[:, 3] = torch.nan
    sums[:, 5] = torch.inf
    # what is read is not what was summed
    mean, var = from_sums(torch.full_like(y, 5.0), sums, pivot, backend(lane))
    assert mean[3].isnan() and var[3].isnan() and mean[5].isinf() and var[5].isnan()
    others = torch.ones(20, dtype=torch.bool, device=lane.device)
    others[[3, 5]] = False
    expected = batch_statistics_reference(y)
    torch.testing.assert_close(mean[others], expected[0][others])
    torch.testing.assert_close(var[others], expected[1][others])


@pytest.mark.parametrize("few", (100, 2048), ids=("in two launches", "in one"))
def test_many_rows_of_sums(lane, few, monkeypatch):
    if lane.name == "cpu":
        pytest.skip("a GPU's convolutions leave rows")
    monkeypatch.setattr(conv_sums, "FEW_ROWS", few)
    partial = torch.randn((1111, 2, 19), device=lane.device)
    parts = conv_sums.sum_rows_in_parts(partial)
    assert (parts is partial) == (few > 1111) and len(parts) <= few
    ours, truth = conv_sums.sum_parts(parts), partial.double().sum(0)
    assert_close_to_truth("sums", ours, partial.sum(0), truth, fp32)
    assert torch.equal(conv_sums.sum_parts(partial[:1]), partial[0])


def test_in_64_bits(lane, monkeypatch):
    monkeypatch.setattr(batch_statistics, "needs_int64", lambda *_: True)
    check(lane, image(lane, 3, 20, 6, 5), torch.full((20,), 300.0, device=lane.device))


def test_shapes_must_fit(lane):
    y = image(lane, 2, 3, 4, 4)
    vector = torch.zeros(3, device=lane.device)
    for sums, pivot in ((torch.zeros(2, 4), vector), (torch.zeros(2, 3), torch.zeros(1)), (torch.zeros(3), vector)):
        with pytest.raises(ValueError, match="sums must have shape"):
            from_sums(y, sums, pivot, backend(lane))
