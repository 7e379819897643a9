"""What convolutions do on load and on store, through the host functions, on every family of kernels.

The truth is the composition in plain PyTorch in fp64 (Pending.reference, Correction.reference and autograd), the
yardstick the same with convolutions in the tested dtype. Sizes leave every tile ragged: rows past the batch and
channels past the last one, where an activation of zero is not zero.
"""

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRET

from fastcnn.ops import conv2d as conv2d_ops
from fastcnn.ops import conv2d_gather, conv2d_images, conv_launch
from fastcnn.ops.activation import activation_reference
from fastcnn.ops.conv_fusion import Correction, Join, Pending
from fastcnn.ops.conv_launch import Launch
from fastcnn.testing import assert_close_to_truth

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "silu", "sigmoid", "tanh", "hardswish", "gelu", "gelu_tanh")
SLOPE = 0.2  # of leaky_relu

WINDOW = dict(stride=(2, 1), padding=(1, 2), dilation=(1, 2))
GROUPS = dict(stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
UNDILATED = dict(stride=(2, 1), padding=(1, 2))
IMAGES = Launch("images", 16, 32, 16, 4, 3, programs=3)
IMAGES_WEIGHT = Launch("images", 32, 16, 16, 4, 3, splits=3)
NARROW = Launch("images", 16, 16, 16, 4, 3, programs=5)
GATHER = Launch("gather", 32, 16, 16, 4, 2)
PACKED = Launch("gather", 32, 16, 16, 4, 2, pack=2)
# family: {pass: (x, w, geometry, dtype, launch)}
CASES = {
    "images": {
        "forward": ((19, 16, 3, 3), (40, 16, 2, 3), WINDOW, bf16, IMAGES),
        "backward_input": ((19, 40, 3, 3), (16, 40, 2, 3), WINDOW, bf16, IMAGES),
        "backward_weight": ((19, 40, 3, 3), (24, 40, 2, 3), WINDOW, bf16, IMAGES_WEIGHT),
    },
    "images in groups": {
        "forward": ((19, 32, 3, 3), (32, 16, 2, 3), GROUPS, fp16, NARROW),
        "backward_input": ((19, 32, 3, 3), (32, 16, 2, 3), GROUPS, fp16, NARROW),
        "backward_weight": ((19, 16, 3, 3), (48, 8, 2, 3), GROUPS, fp16, Launch("images", 16, 32, 16, 4, 3)),
    },
    "images of one pixel": {
        "forward": ((5, 24, 3, 3), (40, 24, 1, 1), {}, bf16, IMAGES),
        "backward_input": ((5, 40, 3, 3), (24, 40, 1, 1), {}, bf16, IMAGES),
        "backward_weight": ((5, 40, 3, 3), (24, 40, 1, 1), {}, bf16, IMAGES_WEIGHT),
    },
    "images of 1x1 filters with stride 2": {
        "backward_input": ((19, 40, 3, 3), (16, 40, 1, 1), dict(stride=(2, 2)), bf16, IMAGES),
    },
    "images, pixels of padding alone": {
        "forward": ((19, 16, 2, 2), (40, 16, 1, 1), dict(padding=(1, 1)), bf16, IMAGES),
    },
    # the window's box has 32 elements
    "stem": {
        "forward": ((19, 3, 4, 8), (40, 3, 2, 3), UNDILATED, bf16, Launch("stem", 16, 32, 32, 4, 3, programs=9)),
        "backward_weight": ((19, 3, 4, 8), (40, 3, 2, 3), UNDILATED, bf16, Launch("stem", 32, 32, 16, 4, 3, splits=3)),
    },
    "gather": {
        "forward": ((3, 19, 5, 4), (21, 19, 2, 3), WINDOW, fp32, GATHER),
        # the filter reaches the row behind the last: one of odd parity, of which there are fewer than of even
        "backward_input": ((3, 19, 5, 4), (21, 19, 3, 3), WINDOW, fp32, GATHER),
        "backward_weight": ((3, 19, 5, 4), (21, 19, 2, 3), WINDOW, fp32, Launch("gather", 32, 16, 16, 4, 2, splits=2)),
    },
    "gather, two halves": {
        "forward": ((3, 19, 3, 4), (70, 19, 2, 3), WINDOW, fp32, Launch("gather", 32, 64, 16, 4, 2)),
        "backward_input": ((3, 70, 3, 4), (19, 70, 2, 3), WINDOW, fp32, Launch("gather", 32, 64, 16, 4, 2)),
    },
    "folded": {
        "forward": ((3, 3, 5, 6), (21, 3, 3, 3), WINDOW, fp32, Launch("folded", 32, 16, 16, 4, 2)),
        "backward_weight": ((3, 3, 5, 6), (21, 3, 3, 3), WINDOW, fp32, Launch("folded", 16, 16, 16, 4, 2, splits=2)),
    },
    "packed": {
        "forward": ((3, 20, 4, 4), (12, 5, 2, 3), GROUPS | dict(groups=4), fp32, PACKED),
        "backward_input": ((3, 20, 4, 4), (12, 5, 2, 3), GROUPS | dict(groups=4), fp32, PACKED),
        "backward_weight": ((3, 20, 4, 4), (12, 5, 2, 3), GROUPS | dict(groups=4), fp32, PACKED),
    },
}
# reads images as they are
WITH_PENDING = [family for family in CASES if family != "stem"]


def over(*kinds, only=CASES):
    """Parametrize over (family, pass)."""
    pairs = [(family, kind) for family in only for kind in kinds if kind in CASES[family]]
    return pytest.mark.parametrize("family, kind", pairs, ids=lambda name: name)


class Layer:
    """Tensors of one convolution with everything that can be fused with it, and the host functions with its launch."""

    def __init__(self, family, kind, device, dtype=None):
        x, w, window, default, self.launch = CASES[family][kind]
        self.dtype, self.device, self.kind = dtype or default, device, kind
        window = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1) | window
        self.geometry = tuple(window.values())
        self.x, self.w, self.bias = self.image(*x), self.image(*w), self.vector(w[0]).to(self.dtype)
        shape = self.conv(self.x, self.w).shape
        self.size = shape[2:]
        self.grad_output, self.residual, self.add = self.image(*shape), self.image(*shape), self.image(*x)
        self.pivot = self.vector(w[0])
        self.correction = Correction(self.image(*shape), *(self.vector(w[0]) for _ in range(3)))
        self.join = Join(self.image(*x), self.image(*x))

    def image(self, *shape):
        return torch.randn(shape, device=self.device).to(self.dtype).contiguous(memory_format=torch.channels_last)

    def vector(self, size):
        return torch.randn(size, device=self.device, dtype=fp64 if self.dtype == fp64 else fp32)

    def pending(self, activation, scaled=True):
        return Pending(self.vector(self.x.shape[1]), self.vector(self.x.shape[1]) + 0.5, activation, SLOPE, scaled)

    def conv(self, x, w, bias=None):
        return F.conv2d(x, w, bias, *self.geometry)

    def forced(self):
        return conv_launch.use(self.launch, self.kind)

    def forward(self, bias=None, **options):
        how = (self.size, *self.geometry, True, "conv", "triton")
        with self.forced():
            return conv2d_ops.conv2d_forward(self.x, self.w, bias, *how, **options)

    def backward_input(self, **options):
        how = (self.x.shape[2:], *self.geometry, True, "conv", "triton")
        with self.forced():
            return conv2d_ops.conv2d_backward_input(self.grad_output, self.w, None, *how, **options)

    def backward_weight(self, **options):
        how = (*self.geometry, "conv", "triton")
        with self.forced():
            return conv2d_ops.conv2d_backward_weight(self.grad_output, self.x, self.w, *how, **options)

    def operand(self, tensor, reference, exact):
        """What a convolution takes after `reference` on load: in fp64, or computed in fp32 and rounded once."""
        if reference is None:
            return tensor.double() if exact else tensor
        if exact:
            return reference(tensor.double())
        return reference(tensor.to(fp64 if self.dtype == fp64 else fp32)).to(self.dtype)

    def forward_reference(self, exact, bias=None, pending=None, activation=None, residual=None):
        to = (lambda t: t.double()) if exact else (lambda t: t)
        x = self.operand(self.x, pending and pending.reference, exact)
        y = self.conv(x, to(self.w), None if bias is None else to(bias))
        y = y if residual is None else y + to(residual)
        return y if activation is None else activation_reference(y, *activation)

    def gradients_reference(self, exact, correction=None, pending=None, join=None, add=None):
        """Gradients of input and weight and, with pending, of its scale and shift; with a join, of that."""
        grad = self.operand(self.grad_output, correction and correction.reference, exact)
        z = self.operand(self.x, pending and pending.reference, exact).requires_grad_()
        w = (self.w.double() if exact else self.w).detach().requires_grad_()
        dz, dw = torch.autograd.grad(self.conv(z, w), (z, w), grad)
        vectors = []
        if pending:
            wide = fp64 if exact else fp32
            inputs = [t.detach().to(wide).requires_grad_() for t in (self.x, *pending[:2])]
            u = Pending(*inputs[1:], *pending[2:]).reference(inputs[0])
            dx, *vectors = torch.autograd.grad(u, inputs, dz.to(wide))
            dz = dx if pending.scaled else dx / inputs[1].detach().view(1, -1, 1, 1)
        if join:
            dz = dz.to(fp64 if exact else fp32)
        if add is not None:
            dz = dz + add.to(dz.dtype)
        if join:
            dz, *vectors = join.reference(dz)
        return (dz if exact else dz.to(self.dtype)), dw, *vectors


def assert_sums(sums, y, pivot):
    """Sums of y - pivot and of its square, against fp64 over the y that was stored."""
    d = y.double() - pivot.double().view(1, -1, 1, 1)
    expected = torch.stack([d.sum((0, 2, 3)), d.square().sum((0, 2, 3))])
    assert sums.shape[1:] == expected.shape and sums.dtype == pivot.dtype
    sums = sums.sum(0)
    size = torch.stack([d.abs().sum((0, 2, 3)), expected[1]])
    assert ((sums.double() - expected).abs() <= 4e-6 * size).all()


def check_forward(layer, given=None, **options):
    given = given or {}
    pivot = options.pop("pivot", None)
    result = layer.forward(**options, pivot=pivot, **given)
    y, sums = (result, None) if pivot is None else result
    assert y is given.get("out", y)
    yardstick, truth = (layer.forward_reference(exact, **options) for exact in (False, True))
    assert_close_to_truth("y", y, yardstick, truth, layer.dtype)
    if pivot is not None:
        assert_sums(sums, y, pivot)


@pytest.mark.parametrize("activation", ("none", *ACTIVATIONS))
@over("forward", only=WITH_PENDING)
def test_forward_of_a_pending_activation(lane, family, kind, activation):
    layer = Layer(family, kind, lane.device)
    check_forward(layer, pending=layer.pending(activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@over("forward")
def test_forward_then_activation(lane, family, kind, activation):
    layer = Layer(family, kind, lane.device)
    check_forward(layer, bias=layer.bias, activation=(activation, SLOPE))


@pytest.mark.parametrize("options", ("", "bias", "residual", "pivot", "bias residual pivot"))
@over("forward")
def test_forward_options(lane, family, kind, options):
    layer = Layer(family, kind, lane.device)
    check_forward(layer, **{name: getattr(layer, name) for name in options.split()})


@pytest.mark.parametrize("activation", ("none", "sigmoid"))
@over("forward")
def test_forward_with_everything(lane, family, kind, activation):
    layer = Layer(family, kind, lane.device)
    options = dict(bias=layer.bias, activation=("silu", 0.0), residual=layer.residual, pivot=layer.pivot)
    if family in WITH_PENDING:
        options |= dict(pending=layer.pending(activation))
    check_forward(layer, **options)


@pytest.mark.parametrize("residual", ("contiguous", "rows and columns swapped"))
@over("forward")
def test_forward_takes_a_residual_of_any_strides(lane, family, kind, residual):
    layer = Layer(family, kind, lane.device)
    other = layer.residual.contiguous()
    if residual == "rows and columns swapped":
        other = other.transpose(2, 3).contiguous().transpose(2, 3)
    check_forward(layer, residual=other, activation=("relu", 0.0))


def check_backward_input(layer, given=None, **options):
    given = given or {}
    raw = dict(input=layer.x) if "pending" in options else {}
    yardstick, truth = (layer.gradients_reference(exact, **options) for exact in (False, True))
    result = layer.backward_input(**options | raw | given)
    grad, *vectors = result if isinstance(result, tuple) else (result,)
    assert_close_to_truth("grad_input", grad, yardstick[0], truth[0], layer.dtype)
    assert len(vectors) == len(truth[2:])
    for name, *three in zip(("grad_scale", "grad_shift"), vectors, yardstick[2:], truth[2:], strict=False):
        assert three[0].dtype == layer.pivot.dtype
        # sums of fp32 terms
        assert_close_to_truth(name, *three, fp32)


@pytest.mark.parametrize("activation", ("none", *ACTIVATIONS))
@over("backward_input")
def test_backward_input_of_a_pending_activation(lane, family, kind, activation):
    layer = Layer(family, kind, lane.device)
    check_backward_input(layer, pending=layer.pending(activation))


@pytest.mark.parametrize("options", ("", "correction", "add", "correction add"))
@over("backward_input")
def test_backward_input_options(lane, family, kind, options):
    layer = Layer(family, kind, lane.device)
    check_backward_input(layer, **{name: getattr(layer, name) for name in options.split()})


@over("backward_input")
def test_backward_input_with_everything(lane, family, kind):
    layer = Layer(family, kind, lane.device)
    options = dict(correction=layer.correction, add=layer.add)
    check_backward_input(layer, **options, pending=layer.pending("silu"))
    # the gradient before the scale; what is added is the same
    check_backward_input(layer, **options, pending=layer.pending("silu", scaled=False))
    check_backward_input(layer, **options, join=layer.join)


@over("backward_input")
def test_backward_input_of_a_join(lane, family, kind):
    layer = Layer(family, kind, lane.device)
    check_backward_input(layer, join=layer.join)
    check_backward_input(layer, join=layer.join._replace(output=None))
    # as in torch, a relu's zero stops even NaN, and its NaN stops nothing
    layer.join.output[:, 0] = torch.nan
    layer.grad_output[1] = torch.nan
    grad, _, _ = layer.backward_input(join=layer.join)
    blocked = layer.join.output <= 0
    assert (grad[blocked] == 0).all()
    reached = layer.gradients_reference(True)[0].isnan() & ~blocked
    assert torch.equal(grad.isnan(), reached) and reached[1, 0].any()


# slices of the channels of wider images


def wider(image, before, behind):
    """The same image as a slice of one with further channels, and that one."""
    n, c, h, w = image.shape
    whole = torch.full((n, h, w, before + c + behind), 7.0, dtype=image.dtype, device=image.device).permute(0, 3, 1, 2)
    part = whole[:, before : before + c]
    part.copy_(image)
    return part, whole


def assert_untouched(whole, part, before):
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[:, before : before + part.shape[1]] = False
    assert (whole[outside] == 7.0).all()


@over("forward", "backward_input", "backward_weight", only=WITH_PENDING)
def test_slices_of_wider_images(lane, family, kind):
    layer = Layer(family, kind, lane.device)
    before, behind = (16, 24) if layer.launch.family == "images" else (3, 4)
    layer.x, _ = wider(layer.x, before, behind)
    layer.grad_output, _ = wider(layer.grad_output, before, behind)
    layer.correction = layer.correction._replace(y=wider(layer.correction.y, before, behind)[0])
    if kind == "backward_weight":
        options = dict(correction=layer.correction, pending=layer.pending("silu"))
        grad = layer.backward_weight(**options)
        yardstick, truth = (layer.gradients_reference(exact, **options)[1] for exact in (False, True))
        assert_close_to_truth("grad_weight", grad, yardstick, truth, layer.dtype)
    elif kind == "forward":
        out, whole = wider(layer.residual, before, behind)
        residual = layer.residual.clone()
        check_forward(layer, dict(out=out), pending=layer.pending("silu"), residual=residual, pivot=layer.pivot)
        assert_untouched(whole, out, before)
    else:
        for option in (dict(pending=layer.pending("relu")), dict(join=layer.join), {}):
            # what is there is added to
            there, whole = wider(layer.add, before, behind)
            layer.add = there.clone()
            given = dict(out=there, add=there)
            check_backward_input(layer, given, correction=layer.correction, add=layer.add, **option)
            assert_untouched(whole, there, before)


def test_slices_choose_the_family_images(lane):
    x, _ = wider(torch.randn(2, 16, 3, 3, dtype=bf16, device=lane.device), 8, 8)
    w = torch.randn(24, 16, 1, 1, dtype=bf16, device=lane.device)
    geometry = (1, 1), (0, 0), (1, 1), 1
    y, _ = wider(torch.randn(2, 24, 3, 3, dtype=bf16, device=lane.device), 8, 8)
    assert conv2d_ops.problem_of("forward", x, w, y, geometry, "ieee").access == "packed"
    odd, _ = wider(x, 8, 4)
    assert conv2d_ops.problem_of("forward", odd, w, y, geometry, "ieee").copied


@pytest.mark.parametrize("wrong", ("shape", "dtype"))
def test_out_must_fit(lane, wrong):
    layer = Layer("gather", "forward", lane.device)
    n, k, p, q = layer.residual.shape
    out = layer.x.new_empty((n, k, p, q + 1)) if wrong == "shape" else layer.residual.double()
    with pytest.raises(ValueError if wrong == "shape" else TypeError, match="out must have"):
        layer.forward(out=out)


def test_a_join_and_a_pending_activation_exclude_each_other(lane):
    layer = Layer("gather", "backward_input", lane.device)
    with pytest.raises(ValueError, match="join must be None"):
        layer.backward_input(join=layer.join, pending=layer.pending("relu"), input=layer.x)


@over("backward_input")
def test_backward_input_adds_to_what_is_there(lane, family, kind):
    layer = Layer(family, kind, lane.device)
    if layer.launch.pack > 1:
        pytest.skip("the host function expands groups")
    before = layer.add.clone()
    module = conv2d_images if layer.launch.family == "images" else conv2d_gather
    pending = layer.pending("tanh")
    how = (*layer.geometry, "ieee", layer.launch)
    module.backward_input(
        layer.grad_output, layer.w, None, layer.add, *how, pending=pending, input=layer.x, add=layer.add
    )
    yardstick, truth = (layer.gradients_reference(e, pending=pending, add=before) for e in (False, True))
    assert_close_to_truth("grad_input", layer.add, yardstick[0], truth[0], layer.dtype)


@pytest.mark.parametrize("activation", ("", "none", "relu", "sigmoid"))
@pytest.mark.parametrize("correction", (False, True), ids=("", "corrected"))
@over("backward_weight")
def test_backward_weight_options(lane, family, kind, activation, correction):
    if activation and family not in WITH_PENDING:
        pytest.skip("the family reads images as they are")
    layer = Layer(family, kind, lane.device)
    options = dict(pending=layer.pending(activation)) if activation else {}
    if correction:
        options |= dict(correction=layer.correction)
    check_backward_weight(layer, **options)


def check_backward_weight(layer, **options):
    grad = layer.backward_weight(**options)
    yardstick, truth = (layer.gradients_reference(exact, **options)[1] for exact in (False, True))
    assert_close_to_truth("grad_weight", grad, yardstick, truth, layer.dtype)


@over("forward", "backward_weight", only=WITH_PENDING)
def test_a_pending_activation_with_a_gate(lane, family, kind):
    layer = Layer(family, kind, lane.device)
    gate = layer.vector(layer.x.shape[:2]).to(layer.dtype)
    pending = layer.pending("silu")._replace(gate=gate)
    if kind == "forward":
        check_forward(layer, pending=pending, pivot=layer.pivot)
    else:
        check_backward_weight(layer, pending=pending, correction=layer.correction)


# traps


@over("backward_input", "backward_weight")
def test_a_correction_of_constant_statistics_is_a_product(lane, family, kind):
    layer = Layer(family, kind, lane.device)
    layer.grad_output[0, 0] = torch.inf  # zero times which would be NaN
    a = layer.correction.a
    corrected = getattr(layer, kind)(correction=Correction(None, a, None, None))
    layer.grad_output = (layer.grad_output * a.view(1, -1, 1, 1)).to(layer.dtype)
    torch.testing.assert_close(corrected, getattr(layer, kind)(), rtol=0, atol=0, equal_nan=True)


@over("forward", "backward_weight", only=WITH_PENDING)
def test_padding_is_zero_after_the_transform(lane, family, kind):
    layer = Layer(family, kind, lane.device)
    # z is 1 at every pixel, so that the sums count pixels inside, times channels
    channels = layer.x.shape[1]
    pending = Pending(torch.zeros(channels, device=lane.device), torch.ones(channels, device=lane.device))
    layer.w, layer.grad_output = torch.ones_like(layer.w), torch.ones_like(layer.grad_output)
    ones = torch.ones_like(layer.x, dtype=fp64)
    w = torch.ones_like(layer.w, dtype=fp64).requires_grad_()
    inside = layer.conv(ones, w)
    if kind == "forward":
        y, sums = layer.forward(pending=pending, pivot=torch.zeros_like(layer.pivot))
        assert torch.equal(y.double(), inside)
        assert torch.equal(sums.double().sum(0), torch.stack([inside.sum((0, 2, 3)), inside.square().sum((0, 2, 3))]))
    else:
        (expected,) = torch.autograd.grad(inside.sum(), w)
        assert torch.equal(layer.backward_weight(pending=pending).double(), expected)


@over("forward")
def test_sums_about_a_good_pivot_stay_accurate(lane, family, kind):
    mean = 500.0 if CASES[family][kind][3] in (bf16, fp16) else 1e4
    layer = Layer(family, kind, lane.device, fp16 if mean == 500.0 else None)
    layer.w = layer.w * 0.1
    pivot = torch.full_like(layer.pivot, mean)
    bias = pivot.to(layer.dtype)
    y, sums = layer.forward(bias=bias, pivot=pivot)
    assert_sums(sums, y, pivot)
    count = y.numel() / y.shape[1]
    variance = lambda sums: sums[:, 1].double().sum(0) / count - (sums[:, 0].double().sum(0) / count) ** 2
    truth = y.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(variance(sums), truth, rtol=1e-4, atol=0)
    # about zero, squares of the mean cancel
    _, sums = layer.forward(bias=bias, pivot=torch.zeros_like(pivot))
    assert ((variance(sums) - truth).abs() / truth).max() > 1e-3


def spread(layer, spots):
    """Pixels of y, for every filter, that read one of the spots [N, C, H, W] (bool)."""
    n, channels, *size = spots.shape
    groups = layer.geometry[-1]
    read = layer.conv(spots.double(), torch.ones_like(layer.w, dtype=fp64)) > 0
    if layer.launch.pack > 1:
        # groups of one tile share what is not finite in their pixels: see conv2d_gather.expand_groups
        together = read.unflatten(1, (groups // layer.launch.pack, -1)).any(2, keepdim=True)
        read = together.expand(-1, -1, read.shape[1] * layer.launch.pack // groups, -1, -1).flatten(1, 2)
    return read


@pytest.mark.parametrize("value", (torch.nan, torch.inf), ids=("nan", "inf"))
@over("forward", "backward_input", "backward_weight", only=WITH_PENDING)
def test_nan_stays_where_it_is_read(lane, family, kind, value):
    layer = Layer(family, kind, lane.device)
    # the gradient of relu passes a NaN's dz on as it is
    pending = layer.pending("none" if value == value else "silu" if kind == "backward_input" else "relu")
    layer.x[1, 2, 1, 1] = value
    spots = ~layer.x.isfinite()
    if kind == "forward":
        y, sums = layer.forward(pending=pending, pivot=layer.pivot)
        read = spread(layer, spots)
        assert torch.equal(~y.isfinite(), read)
        assert torch.equal(~sums[:, 0].sum(0).isfinite(), read.any(3).any(2).any(0))
    elif kind == "backward_input":
        grad, grad_scale, grad_shift = layer.backward_input(pending=pending, input=layer.x)
        channels = spots.any(3).any(2).any(0)
        if value != value:
            assert torch.equal(~grad.isfinite(), spots)
            assert torch.equal(~grad_shift.isfinite(), channels)
        assert torch.equal(~grad_scale.isfinite(), channels)
    else:
        grad = layer.backward_weight(pending=pending)
        x = layer.x.isfinite().logical_not().double()
        w = torch.ones_like(layer.w, dtype=fp64).requires_grad_()
        y = layer.conv(x, w)
        (read,) = torch.autograd.grad(y, w, torch.ones_like(y))
        assert torch.equal(~grad.isfinite(), read > 0)


@over("backward_input", "backward_weight")
def test_correction_of_what_is_not_there_does_not_overflow(lane, family, kind):
    # near the mean corrections are small; of the zeros behind the batch or outside of y they would be Inf in fp16
    layer = Layer(family, kind, lane.device, fp16)
    layer.x, layer.w = layer.x * 0.02, layer.w * 0.02
    constant = lambda value: torch.full((layer.w.shape[0],), value, device=lane.device)
    y = (60.0 + layer.grad_output.float()).half()
    correction = Correction(y, constant(1.0), constant(1800.0), constant(1.0 - 1800.0 * 60.0))
    grad = getattr(layer, kind)(correction=correction)
    which = 0 if kind == "backward_input" else 1
    yardstick, truth = (layer.gradients_reference(exact, correction=correction)[which] for exact in (False, True))
    assert_close_to_truth(kind, grad, yardstick, truth, fp16)


@over("forward", "backward_weight", only=WITH_PENDING)
def test_activation_of_what_is_not_there_does_not_overflow(lane, family, kind):
    # as above: pixels are near the mean, z of zero would be Inf in fp16
    layer = Layer(family, kind, lane.device, fp16)
    layer.x, layer.w = (layer.x.float() - 60.0).half(), layer.w * 0.02
    channels = layer.x.shape[1]
    scale, shift = (torch.full((channels,), value, device=lane.device) for value in (1500.0, 90000.0))
    pending = Pending(scale, shift, "none")
    result = getattr(layer, kind)(pending=pending)
    if kind == "forward":
        yardstick, truth = (layer.forward_reference(exact, pending=pending) for exact in (False, True))
    else:
        yardstick, truth = (layer.gradients_reference(exact, pending=pending)[1] for exact in (False, True))
    assert_close_to_truth(kind, result, yardstick, truth, fp16)


# the chain


CHAINS = {
    "gather, fp32": (fp32, GATHER, GATHER, Launch("gather", 16, 16, 32, 4, 2, splits=2)),
    "gather, fp64": (fp64, GATHER, GATHER, Launch("gather", 16, 16, 32, 4, 2, splits=2)),
    "images, bf16": (bf16, *(Launch("images", 16, 16, 16, 4, 3, programs=4),) * 2, Launch("images", 16, 16, 16, 4, 3)),
}


@pytest.mark.parametrize("dtype, launches", [(d, ls) for d, *ls in CHAINS.values()], ids=CHAINS)
def test_conv_bn_relu_conv_without_a_normalised_tensor(lane, dtype, launches):
    """Sums in the first epilogue, a pending activation in the second load, gradients of the sums as a correction."""
    device, wide = lane.device, fp64 if dtype == fp64 else fp32
    randn = lambda *shape: torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    x, w1, w2 = randn(19, 16, 4, 3), randn(16, 16, 2, 3), randn(16, 16, 3, 2)
    gamma, beta = (torch.rand(16, device=device, dtype=wide).add(0.5).requires_grad_() for _ in range(2))
    first, second = ((1, 1), (0, 1), (1, 1), 1), ((2, 1), (1, 1), (1, 1), 1)
    eps = 1e-5

    def reference(dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, w1, gamma, beta, w2)]
        y = F.conv2d(inputs[0], inputs[1], None, *first)
        z = F.batch_norm(y, None, None, inputs[2], inputs[3], True, 0.0, eps).relu()
        y = F.conv2d(z, inputs[4], None, *second)
        return y.detach(), *torch.autograd.grad(y, inputs, grad.to(dtype))

    size1, size2 = (3, 3), (2, 4)
    grad = randn(19, 16, *size2)
    end = (True, "conv", "triton")
    with ExitStack() as stack:
        for launch, kind in zip(launches, conv_launch.KINDS, strict=True):
            stack.enter_context(conv_launch.use(launch, kind))
        pivot = torch.randn(16, device=device, dtype=wide)
        y1, sums = conv2d_ops.conv2d_forward(x, w1, None, size1, *first, *end, pivot=pivot)
        # batch norm's finalize, differentiable
        sums = sums.sum(0).requires_grad_()
        mean, square = sums / (y1.numel() / 16)
        scale = gamma * (square - mean**2 + eps).rsqrt()
        shift = beta - (pivot + mean) * scale
        pending = Pending(scale.detach(), shift.detach(), "relu")
        y2 = conv2d_ops.conv2d_forward(y1, w2, None, size2, *second, *end, pending=pending)
        dw2 = conv2d_ops.conv2d_backward_weight(grad, y1, w2, *second, *end[1:], pending=pending)
        dy1, *dvectors = conv2d_ops.conv2d_backward_input(
            grad, w2, None, size1, *second, *end, pending=pending, input=y1
        )
        dsums, dgamma, dbeta = torch.autograd.grad((scale, shift), (sums, gamma, beta), dvectors)
        correction = Correction(y1, torch.ones_like(pivot), 2 * dsums[1], dsums[0] - 2 * dsums[1] * pivot)
        dw1 = conv2d_ops.conv2d_backward_weight(dy1, x, w1, *first, *end[1:], correction=correction)
        dx = conv2d_ops.conv2d_backward_input(dy1, w1, None, (4, 3), *first, *end, correction=correction)
    names = ("y", "dx", "dw1", "dgamma", "dbeta", "dw2")
    ours = (y2, dx, dw1, dgamma, dbeta, dw2)
    for name, *three in zip(names, ours, reference(dtype), reference(fp64), strict=True):
        assert_close_to_truth(name, *three, dtype)


@pytest.mark.skipif(not INTERPRET, reason="fp32 through TF32 has no fp32 yardstick on a GPU")
def test_images_in_tf32(lane, monkeypatch):
    monkeypatch.setattr(conv2d_ops, "precision_of", lambda *_: "tf32")
    layer = Layer("images", "forward", lane.device, fp32)
    check_forward(
        layer,
        bias=layer.bias,
        pending=layer.pending("sigmoid"),
        activation=("gelu", 0.0),
        residual=layer.residual,
        pivot=layer.pivot,
    )
