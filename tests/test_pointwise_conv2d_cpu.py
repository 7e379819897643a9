"""1x1 convolutions of the chain on CPU: what their kernels make of an expression, and every gradient of it."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from fastcnn import chain
from fastcnn.ops import blas, conv_batch_norm, pending, pending_cpu, pointwise_conv2d_cpu
from fastcnn.ops.conv_fusion import Correction
from fastcnn.testing import assert_close_to_truth

pytestmark = pytest.mark.skipif(blas.addresses(torch.float32) is None, reason="this build of PyTorch has no MKL")
# N, C, K, H, W
SHAPES = [
    (1, 1, 1, 1, 2),
    (3, 5, 1, 37, 19),
    (2, 48, 70, 7, 7),
    (5, 1, 7, 13, 17),
    (33, 70, 24, 3, 6),
    (9, 130, 40, 1, 1),
]
LAYOUT = torch.channels_last
# vectors, gate's columns (0: none, -1: channels), right side, its vectors, out, add, scaled
FORMS = {
    "plain": (False, 0, False, False, "none", True, False),
    "affine": (True, 0, False, False, "none", False, False),
    "affine, scaled": (True, 0, False, False, "none", True, True),
    "gate": (True, -1, False, False, "none", True, False),
    "gate, at z": (True, -1, False, False, "none", True, pending.AT_Z),
    "join": (True, 0, True, True, "relu", True, False),
    "join of a tensor": (False, 0, True, False, "none", False, False),
    "join with relu": (True, 0, True, False, "relu", False, True),
    "gated join": (True, 1, True, True, "none", False, False),
    "gated join, at z": (True, -1, True, False, "none", True, pending.AT_Z),
}


def wide(value):
    """Every tensor in fp64."""
    if isinstance(value, torch.Tensor):
        return value.double()
    return type(value)(*map(wide, value)) if hasattr(value, "_fields") else value


class Case:
    """A convolution of an expression, and the gradient of the batch norm that follows it."""

    def __init__(self, shape, form, activation="none", dtype=torch.float32, bias=False):
        n, c, k, h, w = shape
        vectors, columns, join, right_vectors, out, add, self.scaled = FORMS[form]
        activation = activation if vectors else "none"
        # strides of channels_last for one channel, too
        empty = lambda channels: torch.empty((n, channels, h, w), dtype=dtype, memory_format=LAYOUT)
        image = lambda channels: empty(channels).normal_(0, 2)
        vector = lambda there, size=c: torch.randn(size, dtype=dtype) if there else None
        self.e = pending.Expression(
            image(c), vector(vectors), vector(vectors), activation, 0.1,
            torch.rand(n, c if columns == -1 else columns, dtype=dtype) if columns else None,
            image(c) if join else None, vector(right_vectors), vector(right_vectors), out,
        )  # fmt: skip
        self.weight = torch.randn(k, c, 1, 1, dtype=dtype) / c**0.5
        self.bias = vector(bias, k)
        self.grad, self.correction = image(k), Correction(image(k), *torch.randn(3, k, dtype=dtype))
        self.add = image(c) if add else None

    def ours(self, statistics=True):
        z = torch.empty_like(self.e.x) if self.e.is_join else None
        return z, pointwise_conv2d_cpu.forward(self.e, self.weight, self.bias, z, statistics)

    def theirs(self, to=lambda value: value):
        e, weight, bias = to(self.e), to(self.weight), None if self.bias is None else to(self.bias)
        z = pending.pending_forward(*e, "torch")
        y = F.conv2d(z, weight, bias)
        return z, y, *pending.statistics(y, "torch")

    def inputs(self, z, to=lambda value: value):
        e = to(self.e)
        saved = None if e.is_sum else e.x, e.scale, e.shift, e.gate, e.right, e.right_scale
        z = to(z) if e.is_join else None
        return conv_batch_norm.Inputs(*saved, z, e.activation, e.slope, e.out, e.is_join, self.scaled)

    def our_gradients(self, z, need_image=True, need_weight=True):
        arguments = self.grad, self.correction, self.weight, self.add, need_image, need_weight
        return pointwise_conv2d_cpu.backward(self.inputs(z), *arguments)

    def their_gradients(self, z, to=lambda value: value):
        inputs, weight = self.inputs(z, to), to(self.weight)
        # zeros where the others, too, see one: z is stored in the dtype that was asked for
        made = inputs.z if inputs.join else pending.pending_forward(*to(self.e), "torch")
        dy = to(self.grad) if self.correction is None else to(self.correction).reference(to(self.grad))
        dz, grad_weight, _ = torch.ops.aten.convolution_backward(
            dy, made, weight, None, (1, 1), (0, 0), (1, 1), False, [0, 0], 1, [True, True, False]
        )
        add = None if self.add is None else to(self.add)
        grad_x, *sums, _, grad_right, right_scale, right_shift = inputs.grads(dz, add, False, "torch")
        if inputs.is_plain:
            grad_x = dz if add is None else dz + add
        pair = lambda first, second: None if first is None else torch.stack([first, second])
        return grad_x, pair(*sums), grad_right, pair(right_scale, right_shift), grad_weight


NAMES = ("grad_x", "sums", "grad_right", "right_sums", "grad_weight")


def check(case):
    dtype = case.grad.dtype
    z, (y, mean, var) = case.ours()
    theirs, truth = case.theirs(), case.theirs(wide)
    assert y.is_contiguous(memory_format=LAYOUT) and y.dtype == dtype
    for name, our, their, true in zip(("z", "y", "mean", "var"), (z, y, mean, var), theirs, truth, strict=True):
        if our is not None:
            assert_close_to_truth(name, our, their, true, dtype)
    z = theirs[0]
    ours, theirs, truth = case.our_gradients(z), case.their_gradients(z), case.their_gradients(z, wide)
    for name, our, their, true in zip(NAMES, ours, theirs, truth, strict=True):
        assert (our is None) == (their is None), name
        if our is not None:
            assert our.shape == true.shape and our.dtype == dtype
            assert_close_to_truth(name, our, their, true, dtype)


@pytest.fixture(params=[2**19, 2**13], ids=["one piece", "pieces"])
def piece(request, monkeypatch):
    monkeypatch.setattr(pointwise_conv2d_cpu, "FORWARD", request.param)
    monkeypatch.setattr(pointwise_conv2d_cpu, "BACKWARD", request.param // 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form(shape, piece):
    for form in FORMS:
        check(Case(shape, form, "relu" if "gate" in form else "none"))
    check(Case(shape, "affine", "relu"))


@pytest.mark.parametrize("activation", pending_cpu.KINDS)
def test_every_activation(activation, piece):
    for form in FORMS:
        check(Case((3, 7, 11, 15, 13), form, activation))


def test_fp64(piece):
    for form in FORMS:
        check(Case((3, 5, 8, 37, 19), form, "silu", torch.float64))


def test_other_ends(piece):
    """A bias in place of batch norm; constants as its statistics; one of the gradients alone."""
    case = Case((3, 7, 11, 15, 13), "affine", "relu6", bias=True)
    z, y = case.ours(statistics=False)
    assert_close_to_truth("y", y, case.theirs()[1], case.theirs(wide)[1], torch.float32)
    for correction in (None, Correction(None, torch.randn(11), None, None)):
        case.correction = correction
        both, truth = case.our_gradients(z), case.their_gradients(z, wide)
        for name, our, their, true in zip(NAMES, both, case.their_gradients(z), truth, strict=True):
            if our is not None:
                assert_close_to_truth(name, our, their, true, torch.float32)
        for needs in ((True, False), (False, True)):
            for name, one, all_ in zip(NAMES, case.our_gradients(z, *needs), both, strict=True):
                if one is None:
                    assert all_ is None or needs[1] == (name != "grad_weight")
                else:
                    assert torch.equal(one, all_)


def test_a_large_mean():
    case = Case((2, 16, 24, 40, 41), "plain", bias=True)
    case.bias += 1000
    _, (_, mean, var) = case.ours()
    _, _, *truth = case.theirs(wide)
    _, _, *theirs = case.theirs()
    for ours, their, true in zip((mean, var), theirs, truth, strict=True):
        assert_close_to_truth("statistics", ours, their, true, torch.float32)


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
def test_special_values(activation):
    case = Case((2, 3, 2, 8, 9), "affine", activation)
    case.e.x[0, 0, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.0, -3.0, 6.0, -200.0])
    case.grad[1, 1, 2, :2] = torch.tensor([torch.nan, torch.inf])
    check(case)


def test_layouts_and_slices():
    case = Case((4, 6, 8, 9, 11), "join", "none")
    expected = case.theirs()
    buffer = torch.randn(4, 10, 9, 11).contiguous(memory_format=LAYOUT)
    buffer[:, 2:8] = case.e.x
    case.e = case.e._replace(x=buffer[:, 2:8], right=case.e.right.contiguous())
    case.weight = torch.empty(6, 8, 1, 1).transpose(0, 1).copy_(case.weight)
    case.grad = case.grad.contiguous()
    z = torch.empty_like(case.e.right, memory_format=LAYOUT)
    y = pointwise_conv2d_cpu.forward(case.e, case.weight, None, z)
    torch.testing.assert_close((z, y), expected[:2])
    ours, theirs = case.our_gradients(z), case.their_gradients(z)
    assert ours[-1].stride() == case.weight.stride()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_number_of_threads_changes_nothing():
    results = []
    for threads in (1, 2):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        case = Case((4, 24, 60, 40, 41), "gated join", "silu")
        z, (y, mean, var) = case.ours()
        results.append([z, y, mean, var, *filter(torch.is_tensor, case.our_gradients(z))])
        # PyTorch's own multiplication has all its threads again
        assert ctypes.CDLL(torch._C.__file__).MKL_Set_Num_Threads_Local(threads) == threads
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_who_runs_where(monkeypatch):
    called = []
    for name in ("forward", "backward"):
        function = getattr(pointwise_conv2d_cpu, name)
        monkeypatch.setattr(
            pointwise_conv2d_cpu, name, lambda *a, name=name, f=function, **how: (called.append(name), f(*a, **how))[1]
        )
    bn = torch.nn.BatchNorm2d(8)
    x = torch.randn(2, 6, 5, 5).contiguous(memory_format=LAYOUT).requires_grad_()
    for conv, taken in (
        (torch.nn.Conv2d(6, 8, 1), True),
        (torch.nn.Conv2d(6, 8, 1, stride=2), False),
        (torch.nn.Conv2d(6, 8, 1, padding=1), False),
        (torch.nn.Conv2d(6, 8, 3), False),
        (torch.nn.Conv2d(6, 8, 1, groups=2), False),
    ):
        for input in (x, x.contiguous()):
            called.clear()
            chain.materialize(chain.conv_batch_norm(input, conv, bn)).sum().backward()
            assert called == (["forward", "backward"] if taken and input is x else [])
    monkeypatch.setattr(blas, "addresses", lambda dtype: None)
    called.clear()
    chain.materialize(chain.conv_batch_norm(x, torch.nn.Conv2d(6, 8, 1), bn)).sum().backward()
    assert not called
