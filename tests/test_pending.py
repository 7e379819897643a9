"""Passes over pending activations: every piece of the formula, and every gradient, against autograd in fp64.

The truth of a gradient is that of the formula with u = x * scale + shift (and right's map) as a leaf: the convention of
fastcnn.ops.pending. The yardstick is the PyTorch form in the tested dtype.
"""

from types import SimpleNamespace

import pytest
import torch

from fastcnn.ops import batch_norm_passes, common, pending
from fastcnn.ops.pending import Expression
from fastcnn.testing import assert_close_to_truth

LANES = ("triton", "cpu")
bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "silu", "sigmoid", "tanh", "hardswish", "gelu", "gelu_tanh")
SLOPE = 0.2
LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format

# pieces: what the expression has. a: affine, r: right, R: right with an affine map, g: gate, 1: gate [N, 1]
FORMS = {
    "affine": ("a", "none", "none"),
    "affine, relu": ("a", "relu", "none"),
    "activation alone": ("", "silu", "none"),
    "gate": ("ag", "silu", "none"),
    "gate alone": ("g", "none", "none"),
    "one gate per image": ("a1", "none", "none"),
    "join": ("ar", "none", "relu"),
    "join of two": ("aR", "none", "relu"),
    "join without relu": ("ar", "none", "none"),
    "join of two without relu": ("aR", "none", "none"),
    "sum": ("r", "none", "relu"),
    "sum, right pending": ("R", "none", "relu"),
    "activated join": ("ar", "hardswish", "none"),
    "gated join": ("agr", "none", "relu"),
    "drop-path": ("a1R", "none", "none"),
    "everything": ("agR", "gelu", "relu"),
}


@pytest.fixture
def backend(lane):
    return "torch" if lane.name == "cpu" else "triton"


def image(lane, shape, dtype, layout=LAST):
    return torch.randn(shape, dtype=fp32, device=lane.device).to(dtype).contiguous(memory_format=layout)


def expression(lane, pieces, activation, out, shape, dtype, layout=LAST):
    n, c = shape[:2]
    wide = fp64 if dtype == fp64 else fp32
    vector = lambda there: torch.randn(c, dtype=wide, device=lane.device) if there else None
    gate = torch.rand((n, 1 if "1" in pieces else c), device=lane.device).to(dtype)
    right = "r" in pieces.lower()
    return Expression(
        image(lane, shape, dtype, layout), vector("a" in pieces), vector("a" in pieces), activation, SLOPE,
        gate if "g" in pieces or "1" in pieces else None, image(lane, shape, dtype, layout) if right else None,
        vector("R" in pieces), vector("R" in pieces), out,
    )  # fmt: skip


def to64(e):
    return Expression(*(t.detach().double() if isinstance(t, torch.Tensor) else t for t in e))


def truth_of(e, grad, add, z, scaled):
    """Output and gradients by name in fp64, from the tensors as they are. z: the rounded output, of which relu takes
    the sign."""
    e, grad, add = to64(e), grad.double(), None if add is None else add.double()
    of = pending.pending_reference(e)
    if add is not None and e.is_join:
        grad, add = grad + add, None
    if e.out == "relu":
        grad = torch.where(z <= 0, 0.0, grad)
    leaves = {"gate": e.gate, "scale": e.scale, "shift": e.shift, "x": e.x, "right": e.right}
    leaves |= {"right_scale": e.right_scale, "right_shift": e.right_shift}
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items() if t is not None}
    before = Expression(
        *(leaves.get(name, value) for name, value in e._replace(out="none", slope=e.slope)._asdict().items())
    )
    found = torch.autograd.grad(pending.pending_reference(before), list(leaves.values()), grad)
    found = dict(zip(leaves, found, strict=True))
    # x and right as their maps leave them
    u = pending._affine(e.x, e.scale, e.shift).requires_grad_()
    at_u = before._replace(x=u, scale=None, shift=None)
    if not scaled or e.scale is None:
        (found["x"],) = torch.autograd.grad(pending.pending_reference(at_u), u, grad)
    if add is not None:
        found["x"] = found["x"] + add
    if e.is_join:
        found["right"] = grad
    return of, {name: t.detach() for name, t in found.items()}


def run(e, grad, add, z, scaled, backend):
    join = e.is_join
    x = None if e.is_sum else e.x
    grad_x, sums, grad_right, right_sums, grad_gate = pending.pending_backward(
        grad, add, x, e.scale, e.shift, e.activation, e.slope, e.gate, join, e.right if e.right_scale is not None else
        None, e.right_scale, z if e.out == "relu" else None, e.out, e.gate is not None, scaled, backend,
    )  # fmt: skip
    found = dict(x=grad_x, right=grad_right, gate=grad_gate)
    if e.scale is not None:
        found["scale"], found["shift"] = sums.unbind(0)
    else:
        assert sums.numel() == 0
    if e.right_scale is not None:
        found["right_scale"], found["right_shift"] = right_sums.unbind(0)
    else:
        assert right_sums.numel() == 0
    assert e.gate is not None or grad_gate.numel() == 0
    return found


def check(lane, backend, e, with_add=False, scaled=False):
    dtype = e.x.dtype
    z = pending.pending_forward(*e, backend)
    grad = image(lane, z.shape, dtype, pending.layout_of(e.x))
    add = image(lane, z.shape, dtype, pending.layout_of(e.x)) if with_add else None
    truth, grads = truth_of(e, grad, add, z, scaled)
    assert z.dtype == dtype and z.is_contiguous(memory_format=pending.layout_of(e.x))
    assert_close_to_truth("z", z, pending.pending_forward(*e, "torch"), truth, dtype)
    ours, theirs = run(e, grad, add, z, scaled, backend), run(e, grad, add, z, scaled, "torch")
    for name, true in grads.items():
        is_sum = name in ("scale", "shift", "right_scale", "right_shift")
        assert ours[name].dtype == theirs[name].dtype == (pending.vector_dtype(e.x) if is_sum else dtype), name
        assert_close_to_truth(name, ours[name], theirs[name], true, pending.vector_dtype(e.x) if is_sum else dtype)
    return SimpleNamespace(z=z, grad=grad, **ours)


@pytest.mark.parametrize("layout", (LAST, CONTIGUOUS), ids=("channels_last", "contiguous"))
@pytest.mark.parametrize("form", FORMS)
def test_every_form(lane, backend, form, layout):
    dtype = (fp32, bf16, fp64, fp16)[(list(FORMS).index(form) + (layout == LAST)) % 4]
    e = expression(lane, *FORMS[form], (3, 19, 5, 7), dtype, layout)
    check(lane, backend, e)
    check(lane, backend, e, with_add=True, scaled=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(lane, backend, activation):
    check(lane, backend, expression(lane, "a", activation, "none", (2, 9, 3, 5), fp32), with_add=True)


@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize("layout", (LAST, CONTIGUOUS), ids=("channels_last", "contiguous"))
@pytest.mark.parametrize(
    "shape", ((2, 1, 3, 5), (1, 8, 1, 1), (3, 70, 1, 1), (1, 130, 2, 3), (2, 3, 40, 41), (0, 4, 3, 3)), ids=str
)
def test_shapes(lane, backend, shape, layout):
    check(lane, backend, expression(lane, "agR", "relu", "relu", shape, fp32, layout))
    check(lane, backend, expression(lane, "ar", "none", "relu", shape, bf16, layout), with_add=True)
    e = expression(lane, "a", "none", "none", shape, fp32, layout)
    mean, var = pending.statistics(e.x, backend)
    if shape[0] > 0:
        true_var, true_mean = torch.var_mean(e.x.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(mean.double(), true_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var.double(), true_var, rtol=1e-5, atol=1e-6)
    else:
        assert mean.isnan().all() and var.isnan().all()


@pytest.mark.parametrize("layout", (LAST, CONTIGUOUS), ids=("channels_last", "contiguous"))
def test_strips_of_several_tiles(lane, backend, layout, monkeypatch):
    monkeypatch.setattr(batch_norm_passes, "TILE", 64)
    monkeypatch.setattr(batch_norm_passes, "PROGRAMS", 6)
    monkeypatch.setattr(pending, "SUM_PARTS", 2)
    e = expression(lane, "agR", "relu", "relu", (3, 19, 5, 7), fp32, layout)
    first, second = (check(lane, backend, e._replace(gate=gate)) for gate in (e.gate, e.gate[:, :1]))
    torch.manual_seed(5)
    grad = image(lane, e.x.shape, fp32, layout)
    once, again = (run(e, grad, None, first.z, False, backend) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_in_64_bits(lane, backend, monkeypatch):
    monkeypatch.setattr(common, "exceeds_int32", lambda *tensors: True)
    for layout in (LAST, CONTIGUOUS):
        check(lane, backend, expression(lane, "agR", "relu", "relu", (3, 19, 5, 7), fp32, layout), with_add=True)
    check(lane, backend, expression(lane, "a1", "none", "none", (3, 19, 5, 7), fp32))


def test_some_channels_of_wider_images(lane, backend):
    e = expression(lane, "aR", "relu", "relu", (3, 19, 5, 4), fp32)
    wider = image(lane, (3, 50, 5, 4), fp32)
    e = e._replace(x=wider[:, 7:26], right=wider[:, 30:49])
    result = check(lane, backend, e)
    assert result.z.is_contiguous(memory_format=LAST) and result.x.is_contiguous(memory_format=LAST)
    check(lane, backend, e._replace(x=e.x.contiguous()[:, :, :, ::2], right=e.right[:, :, :, 1::2]))
    mean, var = pending.statistics(wider[:, 7:26], backend)
    torch.testing.assert_close((var, mean), torch.var_mean(wider[:, 7:26], (0, 2, 3), correction=0))


def test_tensors_in_other_layouts(lane, backend):
    e = expression(lane, "aR", "relu", "relu", (3, 19, 5, 4), fp32)
    z = pending.pending_forward(*e, backend)
    other = e._replace(right=e.right.contiguous())
    assert torch.equal(z, pending.pending_forward(*other, backend))
    grad = torch.ones((), device=lane.device).expand(z.shape)
    expected = run(e, torch.ones_like(z), None, z, False, backend)
    found = run(other, grad, None, z.contiguous(), False, backend)
    for name in ("x", "scale", "shift", "right", "right_scale", "right_shift"):
        torch.testing.assert_close(found[name], expected[name])


def test_what_need_not_be_written_is_not(lane, backend):
    """A gradient that both sides of a join share, or that came as it goes, is one tensor."""
    e = expression(lane, "aR", "none", "relu", (3, 19, 5, 4), fp32)
    result = check(lane, backend, e)
    assert result.x is result.right
    result = check(lane, backend, e._replace(out="none"))
    assert result.x.data_ptr() == result.right.data_ptr() == result.grad.data_ptr()


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf), ids=str)
def test_nan_and_inf_pass_as_in_pytorch(lane, backend, value):
    for form, out in (("a", "none"), ("aR", "relu")):
        e = expression(lane, form, "relu", out, (2, 19, 3, 5), fp32)
        for tensor in (e.x, e.right):
            if tensor is not None:
                tensor[1, 3, 1, 2] = value
        e.scale[5] = value
        check(lane, backend, e)
        grad = torch.randn_like(e.x)
        grad[0, 7, 0, 0] = value
        z = pending.pending_forward(*e, backend)
        ours, theirs = (run(e, grad, None, z, False, which) for which in (backend, "torch"))
        for name in ("x", "scale", "shift"):
            torch.testing.assert_close(ours[name], theirs[name], equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ("relu6", "hardswish"))
def test_rows_that_do_not_exist_add_no_nan(lane, backend, activation):
    """Their x is 0, and 0 times an infinite scale is NaN, where rows that exist have finite gradients."""
    e = expression(lane, "ag", activation, "none", (2, 19, 3, 5), fp32)
    e.x.abs_()
    e.scale[5] = torch.inf
    grad = torch.randn_like(e.x)
    ours, theirs = (run(e, grad, None, None, False, which) for which in (backend, "torch"))
    assert theirs["shift"].isfinite().all()
    for name in ("x", "scale", "shift", "gate"):
        torch.testing.assert_close(ours[name], theirs[name], equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (fp32, bf16, fp16, fp64), ids=str)
def test_sums_and_correction(lane, backend, dtype):
    for shape, layout in (((3, 19, 5, 7), LAST), ((2, 6, 9, 4), CONTIGUOUS), ((0, 3, 2, 2), LAST)):
        grad, y = image(lane, shape, dtype, layout), image(lane, shape, dtype, layout)
        wide = pending.vector_dtype(y)
        ours, theirs = (pending.sums(grad, y, which) for which in (backend, "torch"))
        assert ours.dtype == wide
        assert_close_to_truth("sums", ours, theirs, pending._sums(grad.double(), y.double()), wide)
        a, b, c = torch.randn((3, shape[1]), dtype=wide, device=lane.device)
        ours, theirs = (pending.corrected(grad, y, a, b, c, which) for which in (backend, "torch"))
        vector = lambda t: t.double().view(1, -1, 1, 1)
        truth = grad.double() * vector(a) + vector(b) * y.double() + vector(c)
        assert ours.dtype == dtype and ours.stride() == theirs.stride()
        assert_close_to_truth("corrected", ours, theirs, truth, dtype)


def test_statistics_with_a_large_mean(lane, backend):
    x = image(lane, (4, 20, 12, 11), fp32) + 1e4
    mean, var = pending.statistics(x, backend)
    true_var, true_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), true_var, rtol=1e-5, atol=0)
