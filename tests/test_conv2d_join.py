"""A residual join made in the 1x1 convolution that reads it, against the two one after the other in plain PyTorch.

Sizes leave every tile ragged: rows past the last pixel, channels and filters past the last one, programs that share the
pixels. The truth is in fp64, of z as well as of y of the rounded z.
"""

from pathlib import Path

import pytest
import test_conv_batch_norm
import torch
from test_conv_batch_norm import SHAPES, of_chain, of_torch, tensors

from fastcnn.benchmarks import predict
from fastcnn.ops import conv2d_join as ops
from fastcnn.ops import conv2d_join_launch as launches
from fastcnn.ops.chips import CHIPS
from fastcnn.ops.pending import Expression
from fastcnn.testing import assert_close_to_truth, assert_matches

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
H100 = CHIPS["h100-sxm"]
SMALL = launches.Tile(64, 64, 64, 4, 3)
RESULTS = Path(__file__).parent.parent / "benchmarks/results"


class Layer:
    """A join of n images of h x w pixels and a 1x1 convolution of it."""

    def __init__(self, device, n=3, c=24, k=40, h=5, w=9, dtype=bf16, affine=True, out="relu"):
        image = lambda *shape: torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        # columns: their elements do not follow each other in memory
        vector = lambda size: torch.randn(size, 2, device=device)[:, 0]
        right = (vector(c), vector(c)) if affine else (None, None)
        x, other = image(n, c, h, w), image(n, c, h, w)
        self.expression = Expression(x, vector(c), vector(c), "none", 0.0, None, other, *right, out)
        self.weight, self.pivot = image(k, c, 1, 1), vector(k)

    def run(self, pivot=True, **how):
        z = torch.empty_like(self.expression.x)
        y = ops.conv2d_join(self.expression, self.weight, z, self.pivot if pivot else None, **how)
        return (z, *y) if pivot else (z, y, None)

    def reference(self, dtype):
        """(z, y of the rounded z)"""
        widened = {f: t.to(dtype) for f, t in self.expression._asdict().items() if isinstance(t, torch.Tensor)}
        z, _ = ops.conv2d_join_reference(self.expression._replace(**widened), self.weight.to(dtype))
        return z.to(self.weight.dtype)

    def check(self, result):
        z, y, sums = result
        dtype, wide = self.weight.dtype, self.weight.double()
        truth = {f: t.double() for f, t in self.expression._asdict().items() if isinstance(t, torch.Tensor)}
        exact, _ = ops.conv2d_join_reference(self.expression._replace(**truth), wide)
        assert_close_to_truth("z", z, self.reference(fp32), exact, dtype)
        exact = torch.nn.functional.conv2d(z.double(), wide)
        assert_close_to_truth("y", y, exact.to(dtype), exact, dtype)
        assert z.stride() == self.expression.x.stride()
        assert y.is_contiguous(memory_format=torch.channels_last)
        if sums is not None:
            centred = y.double() - self.pivot.double().view(1, -1, 1, 1)
            exact = torch.stack([centred.sum((0, 2, 3)), centred.square().sum((0, 2, 3))])
            assert sums.dtype == fp32
            assert_close_to_truth("sums", sums.sum(0), exact.float(), exact, fp32)


@pytest.mark.parametrize("dtype", (bf16, fp16), ids=str)
@pytest.mark.parametrize("affine", (True, False), ids=("affine", "plain"))
@pytest.mark.parametrize("out", ("relu", "none"))
@pytest.mark.parametrize("pivot", (True, False), ids=("sums", "alone"))
def test_options(lane, dtype, affine, out, pivot):
    layer = Layer(lane.device, dtype=dtype, affine=affine, out=out)
    layer.check(layer.run(pivot))


@pytest.mark.parametrize(
    "n, c, k, h, w, tile",
    (
        (1, 8, 8, 1, 1, None),
        (1, 8, 8, 5, 7, SMALL),
        (2, 136, 72, 5, 7, SMALL),  # a second program for the last filters, channels of a third step
        (1, 200, 264, 3, 7, SMALL),  # more programs than blocks of channels
        (5, 64, 64, 1, 1, None),
        (3, 72, 200, 4, 11, None),
        (250, 16, 16, 1, 3, None),
        (1, 96, 520, 3, 3, None),
    ),
    ids=str,
)
def test_shapes(lane, n, c, k, h, w, tile):
    layer = Layer(lane.device, n, c, k, h, w)
    layer.check(layer.run(tile=tile))


def test_64_bit_offsets(lane, monkeypatch):
    layer = Layer(lane.device, 3, 72, 136, 5, 9)
    expected = layer.run(tile=SMALL)
    monkeypatch.setattr(ops.common, "exceeds_int32", lambda *tensors: True)
    assert all(map(torch.equal, layer.run(tile=SMALL), expected))


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf), ids=str)
@pytest.mark.parametrize("side", ("x", "right"))
def test_nan_and_inf_stay_in_their_pixel(lane, value, side):
    layer = Layer(lane.device, affine=False)
    # the last pixel of the last image: beside it are the rows past the end
    getattr(layer.expression, side)[2, 3, 4, 8] = value
    layer.expression.scale.abs_()
    z, y, sums = layer.run()
    expected = layer.reference(fp32)
    assert torch.equal(z.isnan(), expected.isnan()) and torch.equal(z.isinf(), expected.isinf())
    pixels = torch.zeros(3, 5, 9, dtype=torch.bool, device=lane.device)
    pixels[2, 4, 8] = value != -torch.inf
    assert torch.equal((~y.isfinite()).any(1), pixels) and torch.equal((~y.isfinite()).all(1), pixels)
    assert sums.isfinite().all() == (value == -torch.inf)


def test_rows_and_channels_past_the_end_do_not_overflow(lane):
    # fp16 would make Inf of a shift alone
    layer = Layer(lane.device, dtype=fp16)
    layer.expression.scale.fill_(1500.0)
    layer.expression.shift.fill_(90000.0)
    layer.expression.x.copy_(layer.expression.x * 0.02 - 60.0)
    layer.weight.mul_(0.02)
    layer.check(layer.run())


# without a kernel


def refused(*geometry, weight=None, **changes):
    layer = Layer("cpu")
    return ops.why_not(layer.expression._replace(**changes), layer.weight if weight is None else weight, *geometry)


def test_why_not():
    assert refused() is None
    layer = Layer("cpu")
    e = layer.expression
    for changes in (dict(right=None), dict(scale=None), dict(activation="relu"), dict(gate=torch.ones(3, 24))):
        assert "where it is x * scale + shift, plus a right side, and nothing else" in refused(**changes)
    for geometry in (((2, 1), (0, 0), 1), ((1, 1), (1, 0), 1), ((1, 1), (0, 0), 2)):
        assert "1x1 filters, stride 1, no padding and one group" in refused(*geometry)
    assert "16-bit tensors, not of torch.float32" in refused(x=e.x.float())
    assert refused(right=e.right.half()) == "right must have the dtype of x (torch.bfloat16), got torch.float16"
    assert refused(weight=layer.weight[:, :16]) == "weight must have shape (40, 24, 1, 1), got (40, 16, 1, 1)"
    for changes in (dict(x=e.x.contiguous()), dict(right=torch.cat([e.right, e.right], 1)[:, :24])):
        assert "must be channels_last without gaps, with pixels that start on 16 bytes" in refused(**changes)
    assert "multiple of 8 filters, not of 39" in refused(weight=layer.weight[:39])
    assert "1 to 2^30 pixels, not of 0 * 5 * 9" in refused(x=e.x[:0], right=e.right[:0])
    with pytest.raises(ValueError, match="16-bit"):
        ops.conv2d_join(e._replace(x=e.x.float()), layer.weight, None)


def bottlenecks(conv_bn, relu, add, x, *parameters):
    """Joins without an activation, of a plain and of an affine right side; no ReLU whose sign a rounding could turn."""
    layers = [parameters[i : i + 3] for i in range(0, len(parameters), 3)]
    first = add(conv_bn(conv_bn(x, *layers[0], 1, 0, 1), *layers[1], 1, 1, 1), x)
    second = add(conv_bn(first, *layers[2], 1, 0, 1), conv_bn(first, *layers[3], 1, 0, 1))
    both = add(conv_bn(second, *layers[4], 1, 0, 1), conv_bn(second, *layers[5], 1, 0, 1))
    # as they are, too: batch norm alone would take their means away, and with them gradients
    return add(add(both, second), first)


@pytest.mark.parametrize("joins", (1, 2))
def test_blocks_of_the_chain(lane, monkeypatch, joins):
    """The joins go into the convolutions behind them, and have the gradients of torch's."""
    ran, run = [], ops.conv2d_join
    monkeypatch.setattr(ops, "pays", lambda *arguments: ops.why_not(*arguments) is None)
    monkeypatch.setattr(ops, "conv2d_join", lambda *arguments, **fused: ran.append(1) or run(*arguments, **fused))
    sizes = SHAPES["odd"]
    if joins == 2:
        monkeypatch.setattr(test_conv_batch_norm, "block", bottlenecks)
        sizes = dict(n=2, c=8, k=8, wide=8, size=(4, 5))
    assert_matches(of_chain, of_torch, *tensors(lane.device, bf16, **sizes))
    assert len(ran) == joins


def test_it_is_chosen_where_it_is_predicted_to_be_faster():
    joins = {name: problem for name, _, problem in predict.joins()}
    for problem in joins.values():
        tile = launches.choose(problem, H100)
        apart, together = launches.apart(problem, H100), launches.together(problem, tile, H100)
        assert launches.pays(problem, H100) == (together.seconds < apart.seconds)
        assert apart.bytes - together.bytes <= problem.side and together.memory <= together.seconds
    assert {name for name, problem in joins.items() if launches.pays(problem, H100)} == {
        "layer1.1.conv1", "layer2.0.conv1", "layer2.1.conv1", "layer3.0.conv1", "layer3.1.conv1"
    }  # fmt: skip


def test_bytes_are_those_of_the_tensors():
    problem = launches.Joined(1000, 256, 64)
    image, y = 2 * 1000 * 256, 2 * 1000 * 64
    assert problem.bytes_apart == 3 * image + (image + y)
    assert problem.bytes_together(1) == 3 * image + y
    assert problem.bytes_together(2) == 5 * image + y
