"""Depthwise convolution's gradients on Triton, against everything in plain PyTorch in fp64.

On one multiprocessor the programs are few, and each has several units and steps.
"""

import pytest
import torch
from depthwise_reference import backward as reference

from fastcnn.ops import chips
from fastcnn.ops import depthwise_conv2d_backward_sliding as sliding
from fastcnn.ops.conv_fusion import Correction, Gated, Pending
from fastcnn.ops.depthwise_conv2d_backward_launch import backward
from fastcnn.testing import assert_close_to_truth

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
H100 = chips.CHIPS["h100-sxm"]
SLOPE = 0.1
ALL = dict(correction="full", gated="silu", pending="silu", add=True)


@pytest.fixture(autouse=True)
def one_multiprocessor(monkeypatch):
    monkeypatch.setattr(sliding, "chip", lambda device: H100.with_sms(1))


@pytest.fixture
def launched(monkeypatch):
    """How many sliding kernels ran."""
    runs, run = [], sliding.run
    monkeypatch.setattr(sliding, "run", lambda *args: runs.append(args) or run(*args))
    return runs


class Layer:
    """Tensors of a depthwise convolution, and everything that can be fused with its backward."""

    def __init__(
        self, device, n=2, c=24, size=(7, 6), filter=3, stride=1, padding=None, dilation=1, multiplier=1, dtype=fp32,
        channels_last=True, correction=None, gated=None, pending=None, scaled=False, shuffle=1, add=False,
    ):  # fmt: skip
        pair = lambda value: value if isinstance(value, tuple) else (value, value)
        self.device, self.dtype, self.channels_last = device, dtype, channels_last
        filter, stride, dilation = pair(filter), pair(stride), pair(dilation)
        padding = tuple((f - 1) * d // 2 for f, d in zip(filter, dilation, strict=True)) if padding is None else padding
        self.geometry = (stride, pair(padding), dilation)
        span = lambda d: size[d] + 2 * self.geometry[1][d] - dilation[d] * (filter[d] - 1) - 1
        self.size = [span(d) // stride[d] + 1 for d in (0, 1)]
        k = c * multiplier
        self.input, self.grad_output = self.image(n, c, *size), self.image(n, k, *self.size)
        self.weight = torch.randn(k, 1, *filter, device=device).to(dtype)
        y = self.image(n, k, *self.size)
        vector = lambda *shape: torch.randn(*shape, 2, device=device, dtype=fp64 if dtype == fp64 else fp32)[..., 0]
        self.options = dict(shuffle=shuffle, add=self.image(n, c, *size) if add else None)
        if correction is not None:
            more = (vector(k), vector(k)) if correction == "full" else (None, None)
            self.options["correction"] = Correction(y if correction == "full" else None, vector(k), *more)
        if gated is not None:
            self.options["gated"] = Gated(y, *(vector(n, k) for _ in range(2)), vector(k), vector(k), gated, SLOPE)
        if pending is not None:
            self.options["pending"] = Pending(vector(c), vector(c), pending, SLOPE, scaled)

    def image(self, *shape):
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.randn(shape, device=self.device).to(self.dtype).contiguous(memory_format=layout)

    def run(self, needs=(True, True, True)):
        return backward(
            self.grad_output, self.input, self.weight, *self.geometry, self.channels_last, needs, **self.options
        )

    def reference(self, dtype, rounded=False):
        """In dtype; rounded: what is made of the gradient of the output is stored, as without a kernel for all."""
        to = lambda option: (
            option._replace(**{k: v.to(dtype) for k, v in option._asdict().items() if isinstance(v, torch.Tensor)})
            if isinstance(option, tuple)
            else option
        )
        options, grad = {name: to(option) for name, option in self.options.items()}, self.grad_output
        if rounded:
            for option in (options.pop("gated", None), options.pop("correction", None)):
                grad = grad if option is None else option.reference(grad.to(dtype))
            grad = grad.to(self.dtype)
        return reference(grad, self.input, self.weight, self.size, *self.geometry, dtype, **options)

    def check(self, found):
        truth, wide = self.reference(fp64), self.reference(fp64 if self.dtype == fp64 else fp32, rounded=True)
        for name, ours, theirs, true in zip(("input", "weight", "bias", "sums"), found, wide, truth, strict=True):
            if ours is None:
                continue
            dtype = theirs.dtype if name == "sums" else self.dtype
            ours = ours.sum(0) if name == "sums" else ours
            assert ours.dtype == dtype, name
            assert_close_to_truth(name, ours, theirs.to(dtype), true, dtype)
        if found.input is not None:
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            assert found.input.is_contiguous(memory_format=layout)
        if found.weight is not None:
            assert found.weight.stride() == self.weight.stride()
        assert (found.sums is None) == ("pending" not in self.options or found.input is None)


@pytest.mark.parametrize(
    "shape",
    (
        dict(),
        dict(ALL, c=40, size=(9, 7)),  # channels of a second block; a last column alone
        dict(ALL, n=5, c=3, size=(5, 1), dtype=bf16, pending="relu6", gated="hardswish"),
        dict(stride=2, size=(7, 6), correction="full", pending="relu", scaled=True),  # half a step at the end
        dict(ALL, stride=2, size=(6, 8), dtype=fp16),
        dict(stride=(1, 2), filter=(2, 3), padding=(0, 1), size=(5, 6), correction="a", pending="leaky_relu"),
        dict(filter=5, c=8, correction="full", pending="hardswish"),
        dict(filter=5, c=6, size=(9, 11), stride=2, pending="none", add=True),
        dict(filter=7, c=8, size=(4, 9), correction="full", pending="tanh"),
        dict(filter=(3, 7), c=2, size=(8, 9), stride=2),
        dict(ALL, c=12, shuffle=3, size=(4, 4)),
    ),
    ids=str,
)
def test_small_filters(lane, launched, shape):
    layer = Layer(lane.device, **shape)
    layer.check(layer.run())
    assert len(launched) == 1


@pytest.mark.parametrize(
    "shape",
    (
        dict(c=2, size=(5, 5), filter=2, stride=4, padding=0),
        dict(ALL, c=5, dilation=2, size=(9, 8), dtype=bf16),
        dict(ALL, c=6, multiplier=3, shuffle=2, size=(5, 7), stride=(2, 3), scaled=True),
        dict(ALL, c=4, channels_last=False, size=(6, 5), pending="relu"),
        dict(c=3, size=(9, 10), filter=(13, 9), padding=(6, 4), correction="full", pending="none"),
        dict(ALL, c=5, dtype=fp64, pending="sigmoid"),
        dict(c=2, padding=3, filter=4, size=(4, 4)),  # outputs under which there is no input
    ),
    ids=str,
)
def test_any_geometry(lane, launched, shape):
    layer = Layer(lane.device, **shape)
    layer.check(layer.run())
    assert not launched


@pytest.mark.parametrize("general", (False, True))
def test_channels_of_wider_images(lane, monkeypatch, launched, general):
    if general:
        monkeypatch.setattr(sliding, "can", lambda problem: False)
    layer = Layer(lane.device, c=16, correction="full", pending="relu", add=True, dtype=bf16)

    def slice_of(image):
        n, c, h, w = image.shape
        wide = layer.image(n, c + 12, h, w)
        wide[:, 4 : 4 + c] = image
        return wide[:, 4 : 4 + c]

    layer.input, layer.grad_output = slice_of(layer.input), slice_of(layer.grad_output)
    layer.options["add"] = slice_of(layer.options["add"])
    layer.weight = layer.weight.expand(16, 2, 3, 3)[:, :1]
    found = layer.run()
    assert (len(launched) == 0) == general
    layer.options["add"] = layer.options["add"].contiguous()
    layer.check(found._replace(weight=None))
    layer.weight = layer.weight.contiguous()
    layer.check(found)


@pytest.mark.parametrize("general", (False, True))
def test_only_what_is_needed_64_bit_offsets_and_the_same_bits(lane, monkeypatch, general):
    if general:
        monkeypatch.setattr(sliding, "can", lambda problem: False)
    layer = Layer(lane.device, **ALL, n=3, c=4, size=(5, 4))
    everything = layer.run()
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        found = layer.run(needs)
        wanted = (*needs, needs[0])
        for ours, all_of_them, need in zip(found, everything, wanted, strict=True):
            assert (ours is not None) == need
            if need:
                torch.testing.assert_close(ours, all_of_them, rtol=1e-5, atol=1e-5)
    for ours, again in zip(layer.run(), everything, strict=True):
        assert torch.equal(ours, again)
    monkeypatch.setattr("fastcnn.ops.common.exceeds_int32", lambda *tensors: True)
    for ours, again in zip(layer.run(), everything, strict=True):
        assert torch.equal(ours, again)


@pytest.mark.parametrize("general", (False, True))
def test_nan_and_inf_stay_in_their_channels(lane, monkeypatch, general):
    if general:
        monkeypatch.setattr(sliding, "can", lambda problem: False)
    layer = Layer(lane.device, c=5, size=(6, 6), pending="silu", correction="a")
    layer.grad_output[1, 2, 3, 4] = torch.inf
    layer.input[0, 3, 2, 2] = torch.nan
    found = layer.run()
    near = torch.zeros_like(layer.input, dtype=torch.bool)
    near[1, 2, 2:5, 3:6] = True
    near[0, 3, 2, 2] = True
    assert torch.equal(~found.input.isfinite(), near)
    channels = lambda *wanted: torch.tensor([c in wanted for c in range(5)], device=lane.device)
    assert torch.equal((~found.weight.isfinite()).flatten(1).any(1), channels(2, 3))
    assert torch.equal(~found.bias.isfinite(), channels(2))
    assert torch.equal((~found.sums.sum(0).isfinite()).any(0), channels(2, 3))


def test_pixels_past_the_image_do_not_count(lane):
    # z of a pixel of zeros would be Inf, and Inf times zero NaN
    layer = Layer(lane.device, c=3, size=(5, 5), stride=2, pending="none", correction="full")
    layer.options["pending"].shift.fill_(3e38)
    layer.options["pending"].scale.fill_(1e38)
    layer.input.fill_(-3.0)
    assert layer.run().weight.isfinite().all()


@pytest.mark.parametrize("dilation", (1, 2))
def test_no_images(lane, dilation):
    found = Layer(lane.device, n=0, dilation=dilation, pending="relu", add=True).run()
    assert found.input.shape == (0, 24, 7, 6) and found.sums.shape == (1, 2, 24)
    assert not found.weight.any() and not found.bias.any() and not found.sums.any()


def test_pixel_distance():
    image = torch.empty(2, 8, 4, 5).contiguous(memory_format=torch.channels_last)
    assert sliding.pixel_distance(image) == 8 and sliding.pixel_distance(image[:, 2:4]) == 8
    assert sliding.pixel_distance(image[:1, :, :1, :1]) == 8 and sliding.pixel_distance(image[..., :1]) == 40
    assert sliding.pixel_distance(image.contiguous()) is None and sliding.pixel_distance(image[:, :, 1:]) is None
    assert sliding.pixel_distance(torch.ones(1).expand(2, 8, 4, 5)) is None


def test_bands_fill_the_programs():
    assert sliding.bands_of(1000, 56, 3, 10) == 1  # enough columns: no row is read twice
    assert sliding.bands_of(16, 56, 3, 64) == 4
    assert sliding.bands_of(1, 7, 3, 400) == 7
