import pytest
import torch

from fastcnn.ops import batch_norm_affine as bn
from fastcnn.ops import pending, pending_cpu
from fastcnn.testing import assert_close_to_truth

LAYOUTS = {"rows": torch.channels_last, "planes": torch.contiguous_format}
SHAPES = [(1, 1, 1, 1), (3, 5, 37, 19), (2, 48, 7, 7), (5, 1, 31, 17), (33, 70, 6, 6), (2, 3, 1, 1100), (1, 1500, 2, 3)]
# gate's columns (0: none, -1: channels), right side, its vectors, out, add, scaled
FORMS = {
    "affine": (0, False, False, "none", False, False),
    "affine, scaled": (0, False, False, "none", True, True),
    "gate": (-1, False, False, "none", True, False),
    "join": (0, True, True, "relu", True, False),
    "join of a tensor": (0, True, False, "none", False, False),
    "join with relu": (0, True, False, "relu", False, True),
    "gated join": (1, True, True, "none", False, False),
}


class Case:
    """Tensors of one call of the two passes."""

    def __init__(self, shape, layout, form, activation, dtype=torch.float32, vectors=True):
        n, c = shape[:2]
        columns, join, right_vectors, out, add, self.scaled = FORMS[form]
        image = lambda: (2 * torch.randn(shape, dtype=dtype)).contiguous(memory_format=LAYOUTS[layout])
        vector = lambda there: torch.randn(c, dtype=dtype) if there else None
        gate = torch.rand(n, c if columns == -1 else columns, dtype=dtype) if columns else None
        self.forward = pending.Expression(
            image(), vector(vectors), vector(vectors), activation, 0.1, gate, image() if join else None,
            vector(right_vectors), vector(right_vectors), out,
        )  # fmt: skip
        self.grad, self.add = image(), image() if add else None

    def backward(self, z):
        e = self.forward
        return (
            self.grad, self.add, e.x, e.scale, e.shift, e.activation, e.slope, e.gate, e.is_join, e.right,
            e.right_scale, z if e.out == "relu" else None, e.out, e.gate is not None, self.scaled,
        )  # fmt: skip


def wide(arguments):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]


def check(case):
    e, dtype = case.forward, case.grad.dtype
    theirs, truth = pending.pending_forward(*e, "torch"), pending.pending_forward(*wide(e), "torch")
    ours = pending_cpu.pending_forward(*e)
    assert ours.stride() == theirs.stride() and ours.dtype == dtype
    assert_close_to_truth("z", ours, theirs, truth, dtype)
    backward = case.backward(theirs)
    theirs, truth = pending.pending_backward(*backward, "torch"), pending.pending_backward(*wide(backward), "torch")
    given = case.grad.clone(memory_format=torch.preserve_format)
    for overwrite in (False, True):
        ours = pending_cpu.pending_backward(*backward, overwrite)
        if not overwrite:
            assert torch.equal(given.nan_to_num(), case.grad.nan_to_num())
        assert (ours[0] is ours[2]) == (theirs[0] is theirs[2])
        names = ("grad_x", "sums", "grad_right", "right_sums", "grad_gate")
        for name, our, their, true in zip(names, ours, theirs, truth, strict=True):
            assert our.stride() == their.stride() and our.dtype == dtype
            assert_close_to_truth(name, our, their, true, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form(shape, layout):
    for form in FORMS:
        check(Case(shape, layout, form, "relu" if form == "gate" else "none"))
    check(Case(shape, layout, "affine", "relu"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", pending_cpu.KINDS)
def test_every_activation(activation, layout):
    for form in FORMS:
        check(Case((3, 7, 15, 13), layout, form, activation))
    check(Case((3, 7, 15, 13), layout, "join", activation, vectors=False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp64(layout):
    for form in FORMS:
        check(Case((3, 5, 37, 19), layout, form, "silu", torch.float64))


@pytest.mark.parametrize("activation", pending_cpu.KINDS)
def test_special_values(activation):
    case = Case((2, 3, 8, 9), "rows", "affine", activation)
    # exact at the bends, too
    case.forward.scale.fill_(1), case.forward.shift.fill_(0)
    case.forward.x[0, 0, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.0, -3.0, 6.0, -200.0])
    case.grad[1, 1, 2, :2] = torch.tensor([torch.nan, torch.inf])
    check(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_sums_correction_and_statistics(shape, layout):
    mix = lambda: torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
    grad, y, vectors = mix(), mix() + 100, torch.randn(3, shape[1])
    for name, ours, function, arguments in (
        ("sums", pending_cpu.sums, pending.sums, (grad, y)),
        ("corrected", pending_cpu.corrected, pending.corrected, (grad, y, *vectors)),
    ):
        assert_close_to_truth(
            name, ours(*arguments), function(*arguments, "torch"), function(*wide(arguments), "torch"), torch.float32
        )
    for ours, theirs, truth in zip(
        pending_cpu.statistics(y), pending.statistics(y, "torch"), pending.statistics(y.double(), "torch"), strict=True
    ):
        assert_close_to_truth("statistics", ours, theirs, truth, torch.float32)


def test_other_layouts_of_the_gradient_and_slices():
    case = Case((4, 6, 9, 11), "rows", "join", "none")
    e = case.forward
    case.grad, case.add = case.grad.contiguous(), case.add.transpose(2, 3).contiguous().transpose(2, 3)
    buffer = torch.randn(4, 10, 9, 11).contiguous(memory_format=torch.channels_last)
    case.forward = e._replace(x=buffer[:, 2:8], right=e.right.contiguous())
    z = pending.pending_forward(*case.forward, "torch")
    assert torch.equal(pending_cpu.pending_forward(*case.forward), z)
    backward = case.backward(z)
    for ours, theirs in zip(
        pending_cpu.pending_backward(*backward, False), pending.pending_backward(*backward, "torch"), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_batch_norm_as_vectors(shape, layout):
    for dtype, affine, shifted in (
        (torch.float32, True, False),
        (torch.float32, False, True),
        (torch.float64, True, True),
    ):
        c = shape[1]
        y, grad = (torch.randn(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
        y += 3
        weight, bias, offset, *sums = torch.randn(5, c, dtype=dtype)
        weight, bias = (weight, bias) if affine else (None, None)
        offset = offset if shifted else None
        results = []
        for kind, wanted in (("ours", dtype), ("theirs", dtype), ("truth", torch.float64)):
            to = lambda *tensors, wanted=wanted: [None if t is None else t.to(wanted) for t in tensors]
            y_, grad_, weight_, bias_, offset_, *sums_ = to(y, grad, weight, bias, offset, *sums)
            rows, count = y.numel() // c, torch.zeros((), dtype=torch.int64)
            moved = to(torch.ones(c), torch.ones(c))
            running = bn.Running(*(t.clone() for t in moved), offset_, rows, 0.1, count)
            if kind == "ours":
                version = running.mean._version
                mean, scale, shift, invstd = pending_cpu.normalised(y_, weight_, bias_, 1e-5, running)
                dy, *grads = pending_cpu.normalised_backward(grad_, y_, mean, invstd, weight_, *sums_)
                assert running.mean._version > version and dy.stride() == y.stride()
            else:
                mean, var = pending.statistics(y_, "torch")
                scale, shift, invstd = bn.affine(mean, var, weight_, bias_, 1e-5, "torch", running)
                *vectors, grad_weight, grad_bias = bn.affine_backward(*sums_, mean, invstd, weight_, rows, True, None)
                dy, grads = pending.corrected(grad_, y_, *vectors, "torch"), (grad_weight, grad_bias)
            assert count == 1
            results.append((mean, scale, shift, invstd, running.mean, running.var, dy, *grads))
        names = ("mean", "scale", "shift", "invstd", "running_mean", "running_var", "dy", "grad_weight", "grad_bias")
        for name, ours, theirs, truth in zip(names, *results, strict=True):
            assert_close_to_truth(name, ours, theirs, truth, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_means_of_images(shape, layout):
    """The mean of every image, and its backward, are those of a pool of z."""
    n, c, h, w = shape
    for activation, vectors, added in (("silu", True, True), ("relu", True, False), ("none", False, True)):
        case = Case(shape, layout, "affine, scaled" if added else "affine", activation, vectors=vectors)
        e, grad, results = case.forward, torch.randn(n, c, 1, 1), []
        arguments = e.x, case.add, grad, e.scale, e.shift
        for x, add, grad_mean, scale, shift in (arguments, wide(arguments)):
            z = pending.pending_forward(x, scale, shift, activation, 0.1, *[None] * 4, "none", "torch")
            grad_z = (grad_mean / (h * w)).expand(shape)
            grad_x, sums, *_ = pending.pending_backward(
                grad_z, add, x, scale, shift, activation, 0.1, None, False, None, None, None, "none", False,
                case.scaled, "torch",
            )  # fmt: skip
            results.append((z.mean((2, 3), keepdim=True), grad_x, sums))
        how = e.scale, e.shift, activation, 0.1
        ours = (
            pending_cpu.image_means(e.x, *how),
            *pending_cpu.image_means_backward(grad, case.add, e.x, *how, case.scaled),
        )
        assert ours[1].stride() == e.x.stride()
        for name, our, their, true in zip(("means", "grad_x", "sums"), ours, *results, strict=True):
            assert_close_to_truth(name, our, their, true, torch.float32)


def test_the_number_of_threads_changes_nothing():
    results = []
    for threads in (1, 2):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        results.append([])
        for layout in LAYOUTS:
            case = Case((4, 24, 40, 41), layout, "gated join", "silu")
            z = pending_cpu.pending_forward(*case.forward)
            results[-1] += [z, *pending_cpu.pending_backward(*case.backward(z), False)]
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_who_runs_where(monkeypatch):
    one = torch.zeros(1, 1, 1, 1)
    assert pending_cpu.can(one, "silu") and not pending_cpu.can(one[:0])
    assert not pending_cpu.can(one.bfloat16()) and not pending_cpu.can(one, "gelu")
    called = []
    for name in ("pending_forward", "pending_backward", "sums", "corrected", "statistics"):
        function = getattr(pending_cpu, name)
        monkeypatch.setattr(
            pending_cpu, name, lambda *a, name=name, function=function: (called.append(name), function(*a))[1]
        )
    case = Case((2, 16, 64, 64), "rows", "affine", "relu")
    pending.pending_forward(*case.forward, "cpu")
    pending.pending_backward(*case.backward(None), "cpu")
    pending.sums(case.grad, case.forward.x, "cpu")
    pending.corrected(case.grad, case.forward.x, *torch.ones(3, 16), "cpu")
    pending.statistics(case.grad, "cpu")
    assert called[:2] == ["pending_forward", "pending_backward"] and set(called[2:]) == {
        "sums", "pending_backward", "corrected", "statistics",
    }  # fmt: skip
