"""Depthwise convolution's forward pass on Triton, against everything in plain PyTorch in fp64."""

import pytest
import torch
from depthwise_reference import forward as reference

from fastcnn.ops import common
from fastcnn.ops import depthwise_conv2d_launch as launch
from fastcnn.ops.activation import activation_reference
from fastcnn.ops.conv_fusion import Pending
from fastcnn.testing import assert_close_to_truth

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "silu", "sigmoid", "tanh", "hardswish", "gelu", "gelu_tanh")
SLOPE = 0.1


class Layer:
    """Tensors of a depthwise convolution, and everything that can be fused with it."""

    def __init__(
        self, device, n=2, c=24, image=(7, 6), filter=3, stride=1, padding=None, dilation=1, multiplier=1, dtype=fp32,
        channels_last=True, pending=None, shuffle=1, bias=False, residual=False, activation=None,
    ):  # fmt: skip
        pair = lambda value: value if isinstance(value, tuple) else (value, value)
        self.device, self.dtype, self.channels_last = device, dtype, channels_last
        filter, stride, dilation = pair(filter), pair(stride), pair(dilation)
        padding = tuple((f - 1) * d // 2 for f, d in zip(filter, dilation, strict=True)) if padding is None else padding
        self.geometry = (stride, pair(padding), dilation)
        self.size = [
            (image[d] + 2 * self.geometry[1][d] - dilation[d] * (filter[d] - 1) - 1) // stride[d] + 1 for d in (0, 1)
        ]
        k, wide = c * multiplier, fp64 if dtype == fp64 else fp32
        vector = lambda size: torch.randn(size, device=device, dtype=wide)
        self.input, self.weight = self.image(n, c, *image), self.image(k, 1, *filter)
        self.bias = vector(k).to(dtype) if bias else None
        self.residual = self.image(n, k, *self.size) if residual else None
        self.pivot, self.activation = vector(k), activation and (activation, SLOPE)
        self.shuffle = shuffle
        self.pending = pending and Pending(vector(c), vector(c) + 0.5, pending, SLOPE)

    def image(self, *shape):
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.randn(shape, device=self.device).to(self.dtype).contiguous(memory_format=layout)

    def run(self, pivot=None, out=None):
        return launch.forward(
            self.input, self.weight, self.bias, self.size, *self.geometry, self.channels_last, pending=self.pending,
            shuffle=self.shuffle, residual=self.residual, activation=self.activation, pivot=pivot, out=out,
        )  # fmt: skip

    def reference(self, dtype):
        wide = lambda t: None if t is None else t.to(dtype)
        how = dict(pending=self.pending, shuffle=self.shuffle)
        y = reference(wide(self.input), wide(self.weight), wide(self.bias), self.size, *self.geometry, **how)
        y = y if self.residual is None else y + wide(self.residual)
        return y if self.activation is None else activation_reference(y, *self.activation)

    def check(self):
        y, sums = self.run(self.pivot)
        assert y.dtype == self.dtype
        assert y.is_contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        assert_close_to_truth("y", y, self.reference(self.dtype), self.reference(fp64), self.dtype)
        d = y - self.pivot.to(torch.promote_types(self.dtype, fp32)).view(1, -1, 1, 1)
        for i, own in enumerate((d, d * d)):
            truth = own.double().sum((0, 2, 3))
            assert_close_to_truth(f"sum {i}", sums.sum(0)[i], own.sum((0, 2, 3)), truth, self.pivot.dtype)


@pytest.fixture
def launched(monkeypatch):
    """One entry for each run of the sliding kernel."""
    runs, run = [], launch._sliding
    monkeypatch.setattr(launch, "_sliding", lambda *args: runs.append(args) or run(*args))
    return runs


SLIDING = {
    "3x3": dict(n=3, c=20, image=(8, 9), pending="relu6"),
    "3x3, ragged last tile": dict(n=1, c=33, image=(4, 17), padding=(1, 0), pending="silu", bias=True),
    "3x3 stride 2": dict(n=2, c=70, image=(9, 8), stride=2, pending="silu", dtype=bf16),
    "5x5": dict(n=2, c=12, image=(11, 8), filter=5, pending="sigmoid"),
    "5x5 stride 2, fp16": dict(n=1, c=18, image=(7, 15), filter=5, stride=2, dtype=fp16, residual=True),
    "7x7": dict(n=1, c=6, image=(6, 9), filter=7, bias=True),
    "7x7 stride 2": dict(n=1, c=5, image=(7, 5), filter=7, stride=2, pending="relu"),
    "even filter, more padding than it needs": dict(n=2, c=8, image=(3, 5), filter=(2, 4), padding=(2, 5)),
    "stride of the filter": dict(n=2, c=8, image=(6, 7), filter=2, stride=2, padding=0, pending="none"),
    "row": dict(n=2, c=4, image=(5, 11), filter=(1, 7), stride=(1, 2), dilation=(3, 1), pending="tanh"),
    "column": dict(n=2, c=4, image=(11, 3), filter=(5, 1), stride=(2, 1)),
    "multiplier, shuffle": dict(n=2, c=6, image=(5, 6), multiplier=3, shuffle=2, pending="hardswish", bias=True),
    "everything": dict(n=2, c=24, image=(7, 7), shuffle=3, pending="silu", bias=True, residual=True, activation="relu"),
    "one pixel": dict(n=1, c=2, image=(1, 1), filter=3),
}
GENERAL = {
    "contiguous": dict(n=2, c=3, image=(9, 10), channels_last=False, pending="silu", shuffle=3, bias=True),
    "dilated": dict(n=2, c=70, image=(5, 6), dilation=(2, 3), pending="relu6", residual=True, activation="silu"),
    "13x13": dict(n=1, c=9, image=(8, 6), filter=13, dtype=bf16, pending="relu"),
    "31x2": dict(n=1, c=5, image=(20, 4), filter=(31, 2)),
    "stride beyond the filter": dict(n=2, c=4, image=(9, 8), filter=2, stride=(3, 4), padding=0, multiplier=2),
    "fp64": dict(n=3, c=5, image=(6, 7), dtype=fp64, stride=(1, 2), pending="gelu_tanh", bias=True, multiplier=2),
}


@pytest.mark.parametrize("case", SLIDING)
def test_sliding(lane, case, launched):
    Layer(lane.device, **SLIDING[case]).check()
    assert len(launched) == 1


@pytest.mark.parametrize("case", GENERAL)
def test_general(lane, case, launched):
    Layer(lane.device, **GENERAL[case]).check()
    assert not launched


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pending_activations(lane, activation):
    Layer(lane.device, n=1, c=4, image=(3, 4), pending=activation).check()
    Layer(lane.device, n=1, c=4, image=(3, 4), pending=activation, dilation=2).check()


@pytest.mark.parametrize("programs", [1, 64])
def test_few_programs_take_several_units_and_many_share_an_image(lane, programs, monkeypatch):
    monkeypatch.setattr(launch, "SLIDING_PROGRAMS", programs)
    Layer(lane.device, n=3, c=48, image=(10, 9), pending="relu", bias=True).check()
    Layer(lane.device, n=3, c=48, image=(11, 9), filter=4, stride=2, pending="relu").check()


def test_64_bit_variant(lane, monkeypatch):
    monkeypatch.setattr(common, "exceeds_int32", lambda *tensors: True)
    Layer(lane.device, n=2, c=12, image=(5, 6), pending="silu", bias=True, shuffle=2).check()
    Layer(lane.device, n=2, c=3, image=(5, 6), channels_last=False, residual=True).check()


@pytest.mark.parametrize("filter, dilation", [(3, 1), (3, 2)])
def test_slices(lane, filter, dilation):
    """Channels of wider images, with NaN around them, into channels of wider images, which keep theirs."""
    layer = Layer(lane.device, c=8, image=(5, 6), filter=filter, dilation=dilation, pending="silu")
    layer.input = torch.full((2, 19, 5, 6), torch.nan).contiguous(memory_format=torch.channels_last)
    layer.input = layer.input.to(lane.device)[:, 3:11].copy_(layer.image(2, 8, 5, 6))
    wide = torch.full((2, 21, *layer.size), 7.0, device=lane.device).contiguous(memory_format=torch.channels_last)
    out = wide[:, 5:13]
    y, sums = layer.run(layer.pivot, out)
    assert y is out
    assert_close_to_truth("y", y, layer.reference(fp32), layer.reference(fp64), fp32)
    assert bool((wide[:, :5] == 7).all()) and bool((wide[:, 13:] == 7).all())


@pytest.mark.parametrize("dilation", [1, 2])
def test_special_values_stay_under_the_filter(lane, dilation):
    layer = Layer(lane.device, n=2, c=6, image=(9, 15), dilation=dilation)
    layer.input[0, 1, 4, 5], layer.input[1, 2, 0, 0], layer.input[1, 3, 8, 14] = torch.nan, torch.inf, -torch.inf
    layer.weight.abs_()
    y, truth = layer.run(), layer.reference(fp64)
    assert_close_to_truth("y", y, truth.float(), truth, fp32)
    assert 0 < int((~torch.isfinite(y)).sum()) <= 3 * 9


def test_pending_applies_before_padding(lane):
    layer = Layer(lane.device, n=1, c=4, image=(3, 3), pending="sigmoid")
    layer.input.zero_()
    layer.weight.fill_(1)
    shift = torch.full((4,), 100.0, device=lane.device)
    layer.pending = Pending(torch.ones_like(shift), shift, "sigmoid")
    expected = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]], device=lane.device)
    torch.testing.assert_close(layer.run(), expected.expand(1, 4, 3, 3))


def test_statistics_change_nothing(lane):
    layer = Layer(lane.device, n=2, c=20, pending="silu", bias=True)
    assert torch.equal(layer.run(), layer.run(layer.pivot)[0])


def test_empty_batch(lane):
    layer = Layer(lane.device, n=0, c=4)
    y, sums = layer.run(layer.pivot)
    assert y.shape == (0, 4, *layer.size)
    assert sums.shape == (1, 2, 4) and not sums.any()


def test_columns_of_a_tile():
    """The fewest columns of input; the fewest tiles where those are as many."""
    assert launch.columns_of_tile(56, 3, 1, 7) == 7
    assert launch.columns_of_tile(10, 3, 1, 7) == 5
    assert launch.columns_of_tile(3, 5, 2, 7) == 3
    assert launch.columns_of_tile(32, 3, 1, 7) == 7
