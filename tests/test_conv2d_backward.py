"""Both gradients of a 1x1 convolution from one kernel, against the composition in plain PyTorch in fp64.

Sizes leave every tile ragged: rows past the last pixel, channels and filters past the last one. On one
multiprocessor bands have several steps.
"""

import pytest
import torch

from fastcnn.ops import chips
from fastcnn.ops import conv2d_backward as ops
from fastcnn.ops.conv2d_backward_launch import Tile
from fastcnn.ops.conv_fusion import Correction, Join, Pending
from fastcnn.testing import assert_close_to_truth

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
H100 = chips.CHIPS["h100-sxm"]
SMALL = {"relu-": Tile(32, 64, 64, 4, 3), "join": Tile(64, 64, 64, 4, 3)}
SLOPE = 0.2


@pytest.fixture(autouse=True)
def one_multiprocessor(monkeypatch):
    monkeypatch.setattr(ops, "chip", lambda device: H100.with_sms(1))


class Layer:
    """Tensors of a 1x1 convolution of n images of h x w pixels, and everything that can be fused with its backward."""

    def __init__(self, device, n=3, c=24, k=40, h=5, w=9, dtype=bf16):
        self.device, self.dtype = device, dtype
        self.input, self.left, self.add = (self.image(n, c, h, w) for _ in range(3))
        self.grad_output, y = self.image(n, k, h, w), self.image(n, k, h, w)
        self.weight = self.image(k, c, 1, 1)
        self.correction = Correction(y, *(self.vector(k) for _ in range(3)))

    def image(self, *shape):
        return torch.randn(shape, device=self.device).to(self.dtype).contiguous(memory_format=torch.channels_last)

    def slice_of(self, image):
        """The same numbers as some channels of wider images."""
        n, c, h, w = image.shape
        wide = self.image(n, c + 16, h, w)
        wide[:, 8 : 8 + c] = image
        return wide[:, 8 : 8 + c]

    def vector(self, size):
        # a column: its elements do not follow each other in memory
        return torch.randn(size, 2, device=self.device)[:, 0]

    def options(self, x, correction=True, add=True):
        """x: "plain", "join", "sum" (a join without activation), or an activation of a pending one, "-" if unscaled."""
        options = dict(correction=self.correction if correction else None, add=self.add if add else None)
        if x in ("join", "sum"):
            options["join"] = Join(self.input if x == "join" else None, self.left)
        elif x != "plain":
            c = self.input.shape[1]
            how = (x.strip("-"), SLOPE, not x.endswith("-"))
            options["pending"] = Pending(self.vector(c), self.vector(c) + 0.5, *how)
        return options

    def run(self, **options):
        return ops.conv2d_backward(self.grad_output, self.input, self.weight, **options)

    def reference(self, exact, correction=None, pending=None, join=None, add=None):
        """In fp64; or with the products in the tested dtype, all else in fp32, rounded where the kernel rounds."""
        if exact:
            to64 = lambda option: (
                option
                and option._replace(
                    **{name: t.double() for name, t in option._asdict().items() if isinstance(t, torch.Tensor)}
                )
            )
            tensors = (t.double() for t in (self.grad_output, self.input, self.weight))
            options = dict(correction=to64(correction), pending=to64(pending), join=to64(join), add=add)
            return ops.conv2d_backward_reference(*tensors, **options)
        rounded = lambda t: t.to(self.dtype).float()
        dy, z = self.grad_output.float(), self.input.float()
        dy = dy if correction is None else rounded(correction.reference(dy))
        z = z if pending is None else rounded(pending.reference(z))
        _, grad_weight, _ = ops.conv2d_backward_reference(dy, z, self.weight.float())
        options = dict(pending=pending, join=join, add=add)
        grad, _, sums = ops.conv2d_backward_reference(dy, self.input.float(), self.weight.float(), **options)
        return grad.to(self.dtype), grad_weight.to(self.dtype), sums

    def check(self, result, **options):
        yardstick, truth = (self.reference(exact, **options) for exact in (False, True))
        assert_close_to_truth("grad_input", result[0], yardstick[0], truth[0], self.dtype)
        assert_close_to_truth("grad_weight", result[1], yardstick[1], truth[1], self.dtype)
        assert result[1].stride() == self.weight.stride()
        if truth[2] is None:
            assert result[2] is None
        else:
            assert result[2].dtype == fp32
            assert_close_to_truth("sums", result[2], yardstick[2], truth[2], fp32)


@pytest.mark.parametrize("x", ("plain", "join", "sum", "none", "relu-", "relu", "leaky_relu", "silu-", "tanh"))
@pytest.mark.parametrize("fused", ("", "correction", "add", "correction add"))
def test_options(lane, x, fused):
    if x in ("leaky_relu", "silu-", "tanh") and fused != "correction add":
        pytest.skip("activations differ in nothing else")
    layer = Layer(lane.device)
    options = layer.options(x, "correction" in fused, "add" in fused)
    layer.check(layer.run(**options), **options)


@pytest.mark.parametrize(
    "n, c, k, h, w, small",
    (
        (1, 8, 8, 1, 1, False),
        (1, 8, 8, 5, 7, True),  # many channels and filters that are none
        (2, 136, 48, 3, 7, True),  # programs that share the channels, the last with few
        (5, 64, 64, 1, 1, True),  # images of one pixel
        (3, 96, 72, 4, 9, False),
        (2, 160, 136, 4, 9, False),
        (2, 264, 64, 4, 9, False),
        (250, 16, 16, 1, 3, True),  # a band that ends in the middle of a tile
    ),
    ids=str,
)
@pytest.mark.parametrize("x", ("relu-", "join"))
def test_shapes(lane, n, c, k, h, w, small, x):
    layer = Layer(lane.device, n, c, k, h, w)
    options = layer.options(x)
    layer.check(layer.run(**options, tile=SMALL[x] if small else None), **options)


@pytest.mark.parametrize("x", ("plain", "relu"))
def test_channels_of_wider_images_are_read_and_accumulated_in_place(lane, x):
    layer = Layer(lane.device)
    layer.input = layer.slice_of(layer.input)
    options = layer.options(x)
    wide = layer.image(3, 48, 5, 9)
    before, out = wide.clone(), wide[:, 16:40]
    out.copy_(layer.add)
    result = layer.run(**options | dict(add=out), out=out)
    assert result[0] is out
    layer.check(result, **options)
    assert torch.equal(wide[:, :16], before[:, :16]) and torch.equal(wide[:, 40:], before[:, 40:])


def test_fp16(lane):
    layer = Layer(lane.device, dtype=fp16)
    options = layer.options("relu-")
    layer.check(layer.run(**options), **options)


@pytest.mark.parametrize("x", ("none", "join"))
def test_64_bit_offsets(lane, monkeypatch, x):
    layer = Layer(lane.device)
    options = layer.options(x)
    expected = layer.run(**options)
    monkeypatch.setattr(ops.common, "exceeds_int32", lambda *tensors: True)
    for ours, theirs in zip(layer.run(**options), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("x", ("plain", "relu-", "join"))
def test_same_bits_again(lane, x):
    layer = Layer(lane.device)
    options = layer.options(x)
    for ours, again in zip(layer.run(**options), layer.run(**options), strict=True):
        assert ours is again is None or torch.equal(ours, again)


@pytest.mark.parametrize("value", (torch.nan, torch.inf), ids=("nan", "inf"))
def test_nan_of_the_gradient_stays_in_its_pixel_and_filter(lane, value):
    layer = Layer(lane.device)
    layer.grad_output[1, 2, 3, 4] = value
    layer.input.abs_()  # a relu would hide pixels
    grad, grad_weight, sums = layer.run(**layer.options("join"))
    pixels = torch.zeros(3, 5, 9, dtype=torch.bool, device=lane.device)
    pixels[1, 3, 4] = True
    assert torch.equal((~grad.isfinite()).all(1), pixels) and torch.equal((~grad.isfinite()).any(1), pixels)
    filters = torch.arange(40, device=lane.device) == 2
    assert torch.equal((~grad_weight.isfinite()).flatten(1).all(1), filters)
    assert torch.equal((~grad_weight.isfinite()).flatten(1).any(1), filters)
    assert not sums.isfinite().any()


def test_nan_of_the_input_stays_in_its_channel(lane):
    layer = Layer(lane.device)
    layer.input[1, 2, 3, 4] = torch.nan
    grad, grad_weight, sums = layer.run(**layer.options("silu"))
    assert torch.equal(grad.isnan(), layer.input.isnan())
    channels = torch.arange(24, device=lane.device) == 2
    assert torch.equal(grad_weight.isnan().flatten(2).all(2).all(0), channels)
    assert torch.equal(grad_weight.isnan().flatten(2).any(2).any(0), channels)
    assert torch.equal(sums.isnan(), channels.expand(2, -1))


def test_the_gradient_passes_where_a_join_is_nan(lane):
    layer = Layer(lane.device)
    layer.input[1, 2, 3, 4] = torch.nan  # as torch's relu
    options = layer.options("join")
    grad, _, sums = layer.run(**options)
    yardstick, truth = (layer.reference(exact, **options) for exact in (False, True))
    assert_close_to_truth("grad_input", grad, yardstick[0], truth[0], bf16)
    assert_close_to_truth("sums", sums, yardstick[2], truth[2], fp32)


def test_a_correction_of_constant_statistics_is_a_product(lane):
    layer = Layer(lane.device)
    layer.grad_output[0, 0] = torch.inf  # zero times which would be NaN
    a = layer.correction.a
    corrected = layer.run(correction=Correction(None, a, None, None))
    layer.grad_output = (layer.grad_output * a.view(1, -1, 1, 1)).to(layer.dtype)
    for ours, unfused in zip(corrected[:2], layer.run()[:2], strict=True):
        torch.testing.assert_close(ours, unfused, rtol=0, atol=0, equal_nan=True)


def test_rows_past_the_end_do_not_overflow(lane):
    # pixels are near the mean; z of a zero and the correction of one would be Inf in fp16
    layer = Layer(lane.device, dtype=fp16)
    layer.input, layer.weight = (layer.input * 0.02 - 60.0).half(), layer.weight * 0.02
    constant = lambda size, value: torch.full((size,), value, device=lane.device)
    pending = Pending(constant(24, 1500.0), constant(24, 90000.0), "none", 0.0, False)
    y = (60.0 + 0.02 * layer.grad_output.float()).half()
    correction = Correction(y, constant(40, 1.0), constant(40, 1800.0), constant(40, -108000.0))
    layer.grad_output = layer.grad_output * 0.01
    options = dict(pending=pending, correction=correction)
    result = layer.run(**options)
    yardstick, truth = (layer.reference(exact, **options) for exact in (False, True))
    assert_close_to_truth("grad_input", result[0], yardstick[0], truth[0], fp16)
    assert_close_to_truth("grad_weight", result[1], yardstick[1], truth[1], fp16)


@pytest.mark.parametrize("x", ("plain", "relu", "join"))
def test_no_images(lane, x):
    layer = Layer(lane.device, n=0)
    grad, grad_weight, sums = layer.run(**layer.options(x))
    assert grad.shape == layer.input.shape and not grad_weight.any()
    assert sums is None if x == "plain" else torch.equal(sums, torch.zeros(2, 24, device=lane.device))


# without a kernel


def refused(change, *, geometry=(), **options):
    layer = Layer("cpu")
    change(layer)
    return ops.why_not(layer.grad_output, layer.input, layer.weight, *geometry, **options)


def test_why_not():
    nothing = lambda layer: None
    assert refused(nothing) is None
    for geometry in (((2, 1), (0, 0), 1), ((1, 1), (1, 0), 1), ((1, 1), (0, 0), 2)):
        assert "1x1 filters, stride 1, no padding and one group" in refused(nothing, geometry=geometry)

    def images(convert):
        def change(layer):
            layer.input, layer.grad_output, layer.weight = map(convert, (layer.input, layer.grad_output, layer.weight))

        return change

    assert "needs 16-bit tensors and got torch.float32" in refused(images(torch.Tensor.float))
    assert "input must be channels_last" in refused(images(torch.Tensor.contiguous))
    layer = Layer("cpu")
    c24 = layer.input.shape[1]
    assert "add must have shape (3, 24, 5, 9), got (3, 16, 5, 9)" == refused(nothing, add=layer.add[:, :16])
    assert "add must have the dtype" in refused(nothing, add=layer.add.half())
    pending = Pending(torch.ones(c24), torch.ones(c24))
    assert "exclude each other" in refused(nothing, pending=pending, join=Join(None, layer.left))
    assert "join.output must be" in refused(nothing, join=Join(layer.add, layer.left))

    def odd_slice(layer):
        wide = layer.image(3, 40, 5, 9)
        layer.input = wide[:, 4:28]

    assert "input must be channels_last, with pixels that start on 16 bytes" == refused(odd_slice)

    def slice_of_gradient(layer):
        layer.grad_output = layer.slice_of(layer.grad_output)

    assert "grad_output must be channels_last, with pixels that start on 16 bytes and without gaps" == refused(
        slice_of_gradient
    )

    def many_filters(layer):
        layer.grad_output, layer.weight = layer.image(3, 512, 5, 9), layer.image(512, 24, 1, 1)

    assert "holds 512 filters" in refused(many_filters)
    with pytest.raises(ValueError, match="exclude each other"):
        layer.run(pending=pending, join=Join(None, layer.left))
