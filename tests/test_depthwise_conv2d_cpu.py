import depthwise_reference as reference
import pytest
import torch

import fastcnn.functional
from fastcnn.ops import depthwise_conv2d, depthwise_conv2d_cpu
from fastcnn.ops.conv_fusion import Correction, Gated, Pending
from fastcnn.ops.conv_layout import suggests_channels_last
from fastcnn.testing import assert_close_to_truth, assert_matches

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# batch, channels, filters per channel, image, window, stride, padding, dilation
GEOMETRIES = [
    (2, 16, 1, (9, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 35, 1, (15, 13), (3, 3), (2, 2), (1, 1), (1, 1)),
    (3, 3, 1, (7, 20), (5, 5), (1, 1), (2, 2), (1, 1)),
    (2, 48, 1, (8, 7), (5, 5), (2, 2), (2, 2), (1, 1)),
    (2, 6, 3, (9, 10), (2, 4), (3, 1), (0, 2), (2, 1)),
    (2, 2, 1, (5, 7), (1, 1), (2, 3), (0, 0), (1, 1)),
    (1, 20, 2, (15, 11), (7, 3), (1, 2), (3, 4), (1, 2)),
    (17, 4, 1, (14, 14), (13, 13), (1, 1), (6, 6), (1, 1)),
    (1, 4, 1, (40, 1), (31, 1), (1, 1), (15, 0), (1, 1)),
    (1, 130, 1, (97, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
]
# pending's activation, scaled, shuffle, correction, gated, add, statistics
FORMS = {
    "plain": (None, True, False, False, False, False, False),
    "chain": ("relu6", False, False, True, False, True, True),
    "gated": ("silu", False, False, True, True, False, True),
    "gated alone": (None, False, False, False, True, True, False),
    "shuffled": ("relu", True, True, True, False, True, True),
    "affine": ("none", True, False, False, False, False, False),
}


class Case:
    def __init__(self, geometry, layout, form, dtype=torch.float32):
        n, c, m, image, window, *self.where = geometry
        activation, scaled, shuffled, corrected, gated, added, self.statistics = FORMS[form]
        self.dtype, self.channels_last = dtype, layout == "channels_last"
        self.shuffle = next((g for g in (5, 3, 2) if c % g == 0), 1) if shuffled else 1
        self.size = tuple(
            (h + 2 * p - d * (r - 1) - 1) // s + 1
            for h, r, s, p, d in zip(image, window, *self.where, strict=True)
        )  # fmt: skip
        images = lambda *shape: torch.randn(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
        vector = lambda *shape: torch.randn(shape, dtype=dtype)
        k = c * m
        self.x, self.weight, self.bias = images(n, c, *image), vector(k, 1, *window), vector(k)
        self.grad, y = images(n, k, *self.size), images(n, k, *self.size)
        self.pending = None if activation is None else Pending(vector(c), vector(c), activation, 0.1, scaled)
        self.correction = Correction(y, vector(k), vector(k), vector(k)) if corrected else None
        self.gated = Gated(y, vector(n, k), vector(n, k), vector(k), vector(k), "hardswish") if gated else None
        self.add = images(n, c, *image) if added else None

    def wide(self):
        """(forward, backward) in fp64."""
        return self.reference(torch.float64)

    def reference(self, dtype):
        def to(value):
            if isinstance(value, torch.Tensor):
                return value.to(dtype)
            if isinstance(value, tuple) and hasattr(value, "_fields"):
                return value._replace(**{name: to(getattr(value, name)) for name in value._fields})
            return value

        fused = {name: to(getattr(self, name)) for name in ("pending", "shuffle")}
        x, weight = to(self.x), to(self.weight)
        forward = reference.forward(x, weight, to(self.bias), self.size, *self.where, **fused)
        more = {name: to(getattr(self, name)) for name in ("correction", "gated", "add")}
        return forward, reference.backward(
            to(self.grad), x, weight, self.size, *self.where, dtype, **fused, **more
        )  # fmt: skip

    def forward(self, **options):
        return depthwise_conv2d_cpu.forward(
            self.x, self.weight, self.bias, self.size, *self.where, self.channels_last, pending=self.pending,
            shuffle=self.shuffle, **options,
        )  # fmt: skip

    def backward(self, needs=(True, True, True)):
        return depthwise_conv2d_cpu.backward(
            self.grad, self.x, self.weight, *self.where, self.channels_last, needs, correction=self.correction,
            gated=self.gated, pending=self.pending, shuffle=self.shuffle, add=self.add,
        )  # fmt: skip

    def check(self):
        y, truth = self.reference(self.dtype), self.wide()
        ours = self.forward(statistics=self.statistics)
        if self.statistics:
            ours, mean, var = ours
            for name, got, of in (
                ("mean", mean, lambda t: t.mean((0, 2, 3))),
                ("variance", var, lambda t: t.var((0, 2, 3), correction=0)),
            ):
                assert_close_to_truth(name, got, of(y[0]), of(truth[0]), self.dtype)
        assert ours.dtype == self.dtype and suggests_channels_last(ours) >= self.channels_last
        assert_close_to_truth("y", ours, y[0], truth[0], self.dtype)
        self.compare(self.backward(), y[1], truth[1])

    def compare(self, ours, theirs, truth):
        if ours.sums is not None:
            ours = ours._replace(sums=ours.sums.sum(0))
        for name, our, their, true in zip(ours._fields, ours, theirs, truth, strict=True):
            if our is not None:
                assert_close_to_truth(name, our, their, true, self.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_form(geometry, layout):
    for form in FORMS:
        Case(geometry, layout, form).check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_double(layout):
    for geometry in (GEOMETRIES[1], GEOMETRIES[4]):
        Case(geometry, layout, "chain", torch.float64).check()


def test_each_gradient_alone():
    case = Case(GEOMETRIES[1], "channels_last", "chain")
    theirs, truth = case.reference(torch.float32)[1], case.wide()[1]
    for wanted in range(3):
        ours = case.backward([i == wanted for i in range(3)])
        assert [t is not None for t in ours] == [i == wanted for i in range(3)] + [wanted == 0]
        case.compare(ours, theirs, truth)


def test_any_strides():
    case = Case(GEOMETRIES[0], "channels_last", "chain")
    n, c, h, w = case.x.shape
    case.x = torch.randn(n, h, 2 * w, c + 5).permute(0, 3, 1, 2)[:, 3 : 3 + c, :, ::2]
    case.weight = torch.randn(3, 3, 16, 1).permute(2, 3, 0, 1)
    case.grad = case.grad.contiguous().transpose(2, 3)
    case.add = case.add.mT
    case.check()
    assert case.backward().weight.stride() == case.weight.stride()


def test_out_is_a_part_of_a_buffer():
    case = Case(GEOMETRIES[0], "channels_last", "plain")
    buffer = torch.zeros(2, 40, 9, 9).contiguous(memory_format=torch.channels_last)
    y = case.forward(out=buffer[:, 7:23])
    assert torch.equal(y, case.forward()) and y.data_ptr() == buffer[:, 7].data_ptr()
    assert not buffer[:, :7].any() and not buffer[:, 23:].any()


def test_nan_and_inf_stay_where_they_belong():
    for layout in LAYOUTS:
        case = Case(GEOMETRIES[0], layout, "plain")
        case.x[0, 3, 4, 4], case.x[1, 5, 2, 7] = torch.nan, torch.inf
        case.grad[1, 2, 3, 3] = torch.nan
        case.check()


def test_empty_batch():
    case = Case((0, *GEOMETRIES[0][1:]), "channels_last", "affine")
    assert case.forward().shape == (0, 16, 9, 9)
    grads = case.backward()
    assert grads.input.shape == case.x.shape and not grads.weight.any() and not grads.bias.any()


def test_the_mean_is_no_trouble_for_the_variance():
    case = Case((2, 16, 1, (40, 30), (1, 1), (1, 1), (0, 0), (1, 1)), "channels_last", "plain")
    case.weight.fill_(1)
    case.bias.fill_(1e4)
    y, mean, var = case.forward(statistics=True)
    torch.testing.assert_close(var.double(), y.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), y.double().mean((0, 2, 3)), rtol=1e-6, atol=0)


def test_results_do_not_depend_on_threads():
    case = Case((5, 64, 1, (33, 29), (5, 5), (1, 1), (2, 2), (1, 1)), "channels_last", "gated")
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([*case.forward(statistics=True), *case.backward()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_refuses_half_precision():
    image = torch.zeros(1, 2, 3, 3, dtype=torch.bfloat16)
    assert "float32 and float64" in depthwise_conv2d_cpu.why_not(image, image)


def test_takes_over_where_it_was_measured_faster():
    pays, image = depthwise_conv2d_cpu.pays, torch.empty(8, 144, 56, 56, requires_grad=True)
    trained, small = (torch.empty(144, 1, k, k, requires_grad=True) for k in (5, 3))
    rows = image.contiguous(memory_format=torch.channels_last)
    assert pays(image, trained, (2, 2), (1, 1)) and pays(rows, small, (2, 2), (1, 1))
    assert not pays(image, small, (1, 1), (1, 1)) and not pays(rows.detach(), small, (1, 1), (1, 1))
    assert not pays(rows[..., :14, :14], small, (1, 1), (1, 1)) and not pays(rows[:1], small, (1, 1), (1, 1))
    assert not pays(image, trained.detach(), (2, 2), (1, 1)) and not pays(image, trained, (1, 1), (2, 2))
    assert not pays(image, trained[..., 1:, 1:4], (1, 1), (1, 1))
    assert not pays(image[:1, :, :7, :7], trained, (1, 1), (1, 1)) and not pays(rows[:, :63], trained, (1, 1), (1, 1))
    with torch.no_grad():
        assert not pays(image, trained, (2, 2), (1, 1))


@pytest.mark.parametrize("size, stride", [(5, 1), (5, 2), (3, 1)])
def test_auto_takes_pytorchs_forward_and_our_gradients(size, stride):
    x = torch.randn(2, 192, 57, 58).contiguous(memory_format=torch.channels_last)
    tensors = [t.requires_grad_() for t in (x, torch.randn(192, 1, size, size), torch.randn(192))]
    depthwise_conv2d.op.calls.clear()
    convolve = lambda api: lambda x, w, b: api.conv2d(x, w, b, stride, size // 2, 1, 192)
    with fastcnn.strict(False), fastcnn.backend("auto"):
        assert_matches(convolve(fastcnn.functional), convolve(torch.nn.functional), *tensors)
    assert depthwise_conv2d.op.calls == {("cpu", None): 1}
