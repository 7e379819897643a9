"""The families "gather" and "folded" with everything they can do on load and on store."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastcnn.ops import conv2d_gather
from fastcnn.ops.activation import activation_reference
from fastcnn.ops.conv_fusion import Correction, Pending
from fastcnn.ops.conv_launch import Launch
from fastcnn.testing import assert_close_to_truth

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
channels_last = torch.channels_last

# x, w, stride, padding, dilation, groups
GEOMETRIES = {
    "odd sizes": ((2, 5, 9, 7), (6, 5, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "several blocks each way": ((2, 35, 6, 5), (34, 35, 1, 2), (1, 1), (0, 1), (1, 1), 1),
    "stride 2": ((2, 18, 8, 7), (17, 18, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "1x1 stride 2: no tap reaches most pixels": ((2, 5, 7, 8), (6, 5, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "dilation and stride share a factor": ((2, 3, 13, 9), (4, 3, 3, 3), (2, 4), (3, 3), (2, 2), 1),
    "all unlike": ((2, 3, 13, 9), (4, 3, 2, 3), (2, 3), (1, 2), (3, 1), 1),
    "one channel": ((2, 1, 9, 8), (5, 1, 5, 4), (1, 2), (2, 1), (1, 1), 1),
    "padding beyond the filter": ((2, 2, 3, 3), (3, 2, 2, 2), (1, 1), (3, 4), (1, 1), 1),
    "groups": ((2, 6, 6, 5), (9, 2, 3, 3), (1, 1), (1, 1), (1, 1), 3),
}
FAMILIES = {
    "gather": Launch("gather", 32, 16, 16, 4, 2),
    "folded": Launch("folded", 16, 32, 16, 4, 2),
}
over_geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
over_families = pytest.mark.parametrize("launch", FAMILIES.values(), ids=FAMILIES)


class Case:
    """Tensors of one convolution, and everything that can be fused with it."""

    def __init__(self, geometry, device, dtype=fp32, pending=None, memory_format=torch.contiguous_format):
        x, w, *self.geometry = geometry
        randn = lambda *shape: torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format)
        vector = lambda size: torch.randn(size, device=device, dtype=fp64 if dtype == fp64 else fp32)
        self.dtype = dtype
        self.x, self.w, self.b = randn(*x), randn(*w), vector(w[0]).to(dtype)
        y = self.conv(self.x, self.w)
        self.grad_output, self.y, self.residual = (randn(*y.shape) for _ in range(3))
        self.add, self.pivot = randn(*x), vector(w[0])
        self.pending = pending and Pending(vector(x[1]), vector(x[1]), *pending)
        self.correction = Correction(self.y, *(vector(w[0]) for _ in range(3)))

    def conv(self, x, w, bias=None):
        stride, padding, dilation, groups = self.geometry
        return F.conv2d(x, w, bias, stride, padding, dilation, groups)

    def forward(self, launch, bias=None, **options):
        y = torch.empty_like(self.residual)
        sums = conv2d_gather.forward(self.x, self.w, bias, y, *self.geometry, "ieee", launch, **options)
        return y, sums

    def backward_input(self, launch, **options):
        grad = torch.empty_like(self.x)
        if options.get("pending"):
            options["input"] = self.x
        sums = conv2d_gather.backward_input(
            self.grad_output, self.w, None, grad, *self.geometry, "ieee", launch, **options
        )
        return grad, None if sums is None else sums.sum(0)

    def backward_weight(self, launch, **options):
        grad = torch.empty_like(self.w)
        conv2d_gather.backward_weight(self.grad_output, self.x, grad, *self.geometry, "ieee", launch, **options)
        return grad

    def gradients(self, dtype, pending=None, correction=None):
        """Gradients of input, weight and, with pending, of its scale and shift: PyTorch's, computed in dtype."""
        x, w = (t.detach().to(dtype).requires_grad_() for t in (self.x, self.w))
        inputs, z = [x, w], x
        if pending:
            vectors = [t.to(dtype).requires_grad_() for t in pending[:2]]
            z = Pending(*vectors, *pending[2:]).reference(x)
            inputs += vectors
        grad_output = self.grad_output.to(dtype)
        if correction:
            grad_output = correction.reference(grad_output)
        return torch.autograd.grad(self.conv(z, w), inputs, grad_output)


PENDING = {"affine": ("none",), "relu": ("relu",), "sigmoid, not zero at zero": ("sigmoid",)}


@over_families
@over_geometries
@pytest.mark.parametrize("dtype", (fp32, bf16), ids=str)
@pytest.mark.parametrize("fused", (False, True), ids=("plain", "fused"))
def test_forward(lane, geometry, launch, dtype, fused):
    case = Case(geometry, lane.device, dtype, ("sigmoid",), channels_last if dtype == bf16 else torch.contiguous_format)
    options = {}
    if fused:
        options = dict(pending=case.pending, activation=("silu", 0.0), residual=case.residual, pivot=case.pivot)
    y, sums = case.forward(launch, case.b, **options)

    def reference(dtype):
        x = case.x.to(dtype)
        y = case.conv(case.pending.reference(x) if fused else x, case.w.to(dtype), case.b.to(dtype))
        return activation_reference(y + case.residual.to(dtype), "silu") if fused else y

    assert_close_to_truth("y", y, reference(dtype), reference(fp64), dtype)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_to_truth("y", torch.zeros_like(y), reference(dtype), reference(fp64), dtype)
    assert (sums is None) == (not fused)
    if fused:
        d = y.double() - case.pivot.double().view(1, -1, 1, 1)
        expected = torch.stack([d.sum((0, 2, 3)), d.square().sum((0, 2, 3))])
        torch.testing.assert_close(sums.double().sum(0), expected, atol=1e-4, rtol=1e-5)


@over_families
@pytest.mark.parametrize("pending", PENDING.values(), ids=PENDING)
def test_forward_of_a_pending_activation(lane, pending, launch):
    case = Case(GEOMETRIES["odd sizes"], lane.device, fp32, pending)
    y, sums = case.forward(launch, pending=case.pending)
    truth = case.conv(case.pending.reference(case.x.double()), case.w.double())
    assert_close_to_truth("y", y, truth.float(), truth, fp32)
    assert sums is None


OPTIONS = {
    "plain": (),
    "correction": ("correction",),
    "pending": ("pending",),
    "add": ("add",),
    "all": ("correction", "pending", "add"),
}


@over_geometries
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_backward_input(lane, geometry, options):
    case = Case(geometry, lane.device, fp32, ("silu",))
    used = {name: getattr(case, name) for name in options}
    grad, sums = case.backward_input(FAMILIES["gather"], **used)
    add = used.pop("add", None)
    theirs, truth = (case.gradients(dtype, **used) for dtype in (fp32, fp64))
    expected, torchs = (x if add is None else x + add for x in (truth[0], theirs[0]))
    assert_close_to_truth("grad_input", grad, torchs, expected, fp32)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_to_truth("grad_input", torch.zeros_like(grad), torchs, expected, fp32)
    if "pending" in options:
        for name, our, their, true in zip(("scale", "shift"), sums, theirs[2:], truth[2:], strict=True):
            assert_close_to_truth(name, our, their, true, fp32)
    else:
        assert sums is None


@pytest.mark.parametrize("geometry", ("stride 2", "groups"))
def test_backward_input_in_bf16_with_everything(lane, geometry):
    case = Case(GEOMETRIES[geometry], lane.device, bf16, ("relu",), channels_last)
    used = dict(correction=case.correction, pending=case.pending)
    grad, sums = case.backward_input(FAMILIES["gather"], add=case.add, **used)
    theirs, truth = (case.gradients(dtype, **used) for dtype in (bf16, fp64))
    assert_close_to_truth("grad_input", grad, theirs[0] + case.add, truth[0] + case.add, bf16)
    for our, their, true in zip(sums, theirs[2:], truth[2:], strict=True):
        assert our.dtype == fp32
        assert_close_to_truth("sums", our, their, true, bf16)


def test_backward_input_adds_to_what_is_there(lane):
    case = Case(GEOMETRIES["stride 2"], lane.device)
    truth = case.gradients(fp64)[0] + case.add
    conv2d_gather.backward_input(
        case.grad_output, case.w, None, case.add, *case.geometry, "ieee", FAMILIES["gather"], add=case.add
    )
    assert_close_to_truth("grad_input", case.add, truth.float(), truth, fp32)


@over_families
@over_geometries
@pytest.mark.parametrize("options", [OPTIONS[name] for name in ("plain", "correction", "pending")], ids=str)
def test_backward_weight(lane, geometry, launch, options):
    case = Case(geometry, lane.device, fp32, ("sigmoid",))
    used = {name: getattr(case, name) for name in options}
    theirs, truth = (case.gradients(dtype, **used)[1] for dtype in (fp32, fp64))
    for splits in (3,) if options else (1, 3):
        grad = case.backward_weight(dataclasses.replace(launch, splits=splits), **used)
        assert_close_to_truth("grad_weight", grad, theirs, truth, fp32)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_to_truth("grad_weight", torch.zeros_like(grad), theirs, truth, fp32)


@over_families
@pytest.mark.parametrize("geometry", ("stride 2", "groups"))
def test_backward_weight_in_bf16_with_everything(lane, geometry, launch):
    case = Case(GEOMETRIES[geometry], lane.device, bf16, ("relu",), channels_last)
    used = dict(correction=case.correction, pending=case.pending)
    grad = case.backward_weight(dataclasses.replace(launch, splits=2), **used)
    theirs, truth = (case.gradients(dtype, **used)[1] for dtype in (bf16, fp64))
    assert grad.stride() == case.w.stride()
    assert_close_to_truth("grad_weight", grad, theirs, truth, bf16)


def test_both_halves_of_a_tiles_columns(lane):
    # options work on tiles of at least 64 columns in two halves
    case = Case(((2, 70, 4, 5), (72, 70, 1, 2), (1, 1), (0, 0), (1, 1), 1), lane.device, fp64, ("relu",))
    launch = Launch("gather", 32, 64, 32, 4, 2)
    y, sums = case.forward(launch, case.b, pending=case.pending, residual=case.residual, pivot=case.pivot)
    expected = case.conv(case.pending.reference(case.x), case.w, case.b) + case.residual
    torch.testing.assert_close(y, expected)
    d = expected - case.pivot.view(1, -1, 1, 1)
    torch.testing.assert_close(sums.sum(0), torch.stack([d.sum((0, 2, 3)), d.square().sum((0, 2, 3))]))
    grad, sums = case.backward_input(launch, pending=case.pending, add=case.add)
    truth = case.gradients(fp64, pending=case.pending)
    torch.testing.assert_close((grad, *sums), (truth[0] + case.add, *truth[2:]))


def test_operands_of_an_option_may_lie_in_another_order(lane):
    case = Case(GEOMETRIES["stride 2"], lane.device, fp64, ("relu",))
    launch, used = FAMILIES["gather"], dict(correction=case.correction, pending=case.pending)
    straight = case.backward_input(launch, add=case.add, **used)[0], case.backward_weight(launch, **used)
    forward = case.forward(launch, residual=case.residual)[0]
    other = lambda t: t.contiguous(memory_format=channels_last)
    used["correction"] = case.correction._replace(y=other(case.y))
    turned = case.backward_input(launch, add=other(case.add), **used)[0], case.backward_weight(launch, **used)
    torch.testing.assert_close(turned, straight)
    torch.testing.assert_close(case.forward(launch, residual=other(case.residual))[0], forward)
    case.grad_output = case.grad_output[:1].expand(case.grad_output.shape)
    truth = case.gradients(fp64, **used)
    torch.testing.assert_close(case.backward_input(launch, **used)[0], truth[0])
    torch.testing.assert_close(case.backward_weight(launch, **used), truth[1])


def integers(*shape, device, dtype=bf16):
    values = torch.randint(-2, 3, shape, device=device) * (torch.rand(shape, device=device) < 0.5)
    return values.to(dtype).contiguous(memory_format=channels_last)


@over_families
@pytest.mark.parametrize("c, k, groups", ((24, 40, 1), (48, 16, 2)))
def test_vectors_that_the_compiler_does_not_see_are_exact_on_integers(lane, launch, c, k, groups):
    x, w = integers(2, c, 4, 5, device=lane.device), integers(k, c // groups, 3, 2, device=lane.device)
    grad_output = integers(2, k, 4, 4, device=lane.device)
    assert conv2d_gather._vector(c // groups, k // groups, x, w, grad_output) == 8
    inputs = [t.double().requires_grad_() for t in (x, w)]
    y = F.conv2d(*inputs, padding=(1, 0), groups=groups)
    truth = (y, *torch.autograd.grad(y, inputs, grad_output.double()))
    ours = [torch.empty_like(t) for t in (grad_output, x, w)]
    how = ((1, 1), (1, 0), (1, 1), groups, "ieee", launch)
    conv2d_gather.forward(x, w, None, ours[0], *how)
    conv2d_gather.backward_input(grad_output, w, None, ours[1], *how)
    conv2d_gather.backward_weight(grad_output, x, ours[2], *how)
    for our, true in zip(ours, truth, strict=True):
        assert torch.equal(our, true.to(bf16))


def test_vectors_are_stated_where_the_compiler_does_not_see_them():
    image = lambda c, dtype=bf16, **how: torch.empty(2, c, 3, 3, dtype=dtype, device="meta").contiguous(**how)
    vector = lambda *images: conv2d_gather._vector(images[0].shape[1], images[-1].shape[1], *images)
    nhwc = dict(memory_format=channels_last)
    assert vector(image(24, **nhwc), image(40, **nhwc)) == 8
    assert vector(image(24, fp32, **nhwc), image(20, fp32, **nhwc)) == 4
    assert vector(image(64, **nhwc), image(32, **nhwc)) == 1  # it does see multiples of 16
    for narrow in (image(20, **nhwc), image(24), image(32, **nhwc)[:, 1:25], image(20, **nhwc)[:, :16]):
        assert vector(image(24, **nhwc), narrow) == vector(narrow, image(24, **nhwc)) == 1


@over_families
@pytest.mark.parametrize("pack", (1, 2, 4))
def test_groups_of_a_tile_are_exact_on_integers(lane, launch, pack):
    groups, geometry = 4, ((1, 1), (1, 1), (1, 1))
    x, w = integers(2, 12, 6, 5, device=lane.device), integers(20, 3, 3, 3, device=lane.device)
    grad_output = integers(2, 20, 6, 5, device=lane.device)
    inputs = [t.double().requires_grad_() for t in (x, w)]
    y = F.conv2d(*inputs, padding=1, groups=groups)
    truth = (y, *torch.autograd.grad(y, inputs, grad_output.double()))
    expanded = conv2d_gather.expand_groups(w, groups, pack)
    assert expanded.shape == (20, 3 * pack, 3, 3) and expanded.is_contiguous(memory_format=channels_last)
    ours = [torch.empty_like(t) for t in (grad_output, x, w)]
    how = (*geometry, groups // pack, "ieee", launch)
    conv2d_gather.forward(x, expanded, None, ours[0], *how)
    conv2d_gather.backward_input(grad_output, expanded, None, ours[1], *how)
    packed = torch.empty_like(expanded)
    conv2d_gather.backward_weight(grad_output, x, packed, *how)
    conv2d_gather.contract_groups(packed, ours[2], groups, pack)
    for our, true in zip(ours, truth, strict=True):
        assert torch.equal(our, true.to(bf16))


def test_groups_of_a_tile_keep_the_weights_strides(lane):
    w = torch.randn(6, 2, 3, 2, device=lane.device).transpose(2, 3)
    expanded = conv2d_gather.expand_groups(w, 2, 2)
    expected = torch.zeros(6, 4, 2, 3, device=lane.device)
    expected[:3, :2], expected[3:, 2:] = w[:3], w[3:]
    assert torch.equal(expanded, expected)
    back = torch.empty_strided(w.shape, w.stride(), device=lane.device)
    conv2d_gather.contract_groups(expanded, back, 2, 2)
    assert torch.equal(back, w)


@over_families
@pytest.mark.parametrize("geometry", ("stride 2", "groups", "all unlike"))
def test_in_64_bits(lane, geometry, launch, monkeypatch):
    monkeypatch.setattr(conv2d_gather, "needs_int64", lambda *_: True)
    case = Case(GEOMETRIES[geometry], lane.device, fp64, ("relu",))
    options = dict(pending=case.pending, residual=case.residual, pivot=case.pivot)
    used = dict(correction=case.correction, pending=case.pending)
    y, sums = case.forward(launch, case.b, **options)
    expected = case.conv(case.pending.reference(case.x), case.w, case.b) + case.residual
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(sums.sum(0)[0], (expected - case.pivot.view(1, -1, 1, 1)).sum((0, 2, 3)))
    truth = case.gradients(fp64, **used)
    grad, sums = case.backward_input(launch, **used)
    torch.testing.assert_close((grad, case.backward_weight(launch, **used), *sums), truth)


@over_families
def test_padding_meets_no_inf_and_no_nan(lane, launch):
    case = Case(GEOMETRIES["odd sizes"], lane.device, fp32, ("relu",))
    case.x[0, 0, 0, 0], case.x[1, 1, 8, 2], case.x[1, 4, 3, 6] = torch.inf, -torch.inf, torch.nan
    y, _ = case.forward(launch, pending=case.pending)
    truth = case.conv(case.pending.reference(case.x.double()), case.w.double())
    assert_close_to_truth("y", y, truth.float(), truth, fp32)
    case.x.normal_()
    case.grad_output[0, 1, 0, 0], case.grad_output[1, 3, 8, 3] = torch.inf, torch.nan
    # in fp64 PyTorch unfolds, and there padding does meet grad_output
    theirs = case.gradients(fp32, correction=case.correction)
    truth = [grad.double() for grad in theirs]
    grad, _ = case.backward_input(launch, correction=case.correction)
    assert_close_to_truth("grad_input", grad, theirs[0], truth[0], fp32)
    grad = case.backward_weight(launch, correction=case.correction)
    if launch.family == "gather":
        assert_close_to_truth("grad_weight", grad, theirs[1], truth[1], fp32)
    else:  # NaN in more taps of the same filters, and in no other filter
        finite = truth[1].isfinite().flatten(1).all(1)
        assert torch.equal(grad.isfinite().flatten(1).all(1), finite) and finite.any()
        assert_close_to_truth("grad_weight", grad[finite], theirs[1][finite], truth[1][finite], fp32)


@pytest.mark.parametrize("channels", (1, 2, 3, 4, 5, 8, 16))
def test_few_channels_are_copied_only_where_they_cannot_be_read_at_once(lane, channels, monkeypatch):
    copies = []
    in_vectors = conv2d_gather._in_vectors

    def spy(tensor, channels):
        result = in_vectors(tensor, channels)
        if result is not tensor:
            copies.append(tensor.data_ptr())
        return result

    monkeypatch.setattr(conv2d_gather, "_in_vectors", spy)
    launch = FAMILIES["folded"]
    for memory_format in (torch.contiguous_format, channels_last):
        x = torch.randn(2, channels, 5, 6, device=lane.device, dtype=fp64).contiguous(memory_format=memory_format)
        w = torch.randn(3, channels, 3, 2, device=lane.device, dtype=fp64).contiguous(memory_format=channels_last)
        how = ((1, 1), (1, 0), (1, 1), 1, "ieee", launch)
        expected = F.conv2d(x, w, padding=(1, 0))
        y = torch.empty_like(expected)
        copies.clear()
        conv2d_gather.forward(x, w, None, y, *how)
        torch.testing.assert_close(y, expected)
        assert (x.data_ptr() in copies) == (channels in (3, 5) or (1 < channels <= 8 and x.stride(1) > 1))
        assert (w.data_ptr() in copies) == (channels in (3, 5))
        grad = torch.empty_like(w)
        conv2d_gather.backward_weight(y, x, grad, *how)
        true = torch.nn.grad.conv2d_weight(x, w.shape, y, padding=(1, 0))
        torch.testing.assert_close(grad, true)


def test_numbers_for_divisions():
    for d in (1, 2, 3, 7, 49, 56, 112 * 112, 224 * 224, 2**15 + 1, 2**30 - 1, 2**31 - 1):
        multiplier, shift = conv2d_gather._divisor(d)
        assert -(2**31) <= multiplier < 2**31
        for m in {0, 1, d - 1, d, d + 1, 3 * d - 1, 3 * d, 2**31 // d * d - 1, 2**31 // d * d, 2**31 - 1}:
            if 0 <= m < 2**31:
                assert ((m * (multiplier % 2**32) >> 32) + m) >> shift == m // d
