import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops import batch_norm as ops
from fastcnn.ops import batch_norm_passes as passes
from fastcnn.testing import assert_close_to_truth, assert_matches

LANES = ("triton", "cpu")
HALF = (torch.float16, torch.bfloat16)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def tensors(lane, shape, dtype=torch.float32, parameters=None, layout=lambda x: x, seed=0):
    """Leaves input, weight, bias and running statistics, all far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    C = shape[1]
    x = layout((torch.randn(shape, generator=generator) * 2 + 3).to(lane.device, dtype)).requires_grad_()
    values = torch.randn(3, C, generator=generator).to(lane.device, parameters or dtype)
    variance = torch.rand(C, generator=generator).to(lane.device, parameters or dtype) + 0.5
    return x, values[0].clone().requires_grad_(), values[1].clone().requires_grad_(), values[2].clone(), variance


def check(lane, shape, dtype=torch.float32, parameters=None, layout=lambda x: x, training=True):
    """Output, gradients and running statistics against PyTorch."""
    if lane.name == "cpu" and dtype in HALF:
        pytest.skip("numba has no 16-bit floats")
    x, weight, bias, mean, var = tensors(lane, shape, dtype, parameters, layout)
    truth = [t.double() for t in (mean, var)]
    F.batch_norm(x.detach().double(), *truth, training=training, momentum=0.3)
    after = {}

    def call(function):
        def run(x, weight, bias, mean, var):
            running = (mean.clone(), var.clone())
            y = function(x, *running, weight, bias, training, 0.3, 1e-3)
            after[function] = running
            return y

        return run

    assert_matches(call(fF.batch_norm), call(lambda *a: F.batch_norm(*a)), x, weight, bias, mean, var)
    (theirs,) = ((mean.clone(), var.clone()),)
    F.batch_norm(x, *theirs, weight, bias, training, 0.3)
    for name, ours, torch_result, true in zip(("mean", "var"), after[fF.batch_norm], theirs, truth, strict=True):
        assert ours.dtype == mean.dtype
        assert_close_to_truth(f"running {name}", ours, torch_result, true, ours.dtype)


CASES = [
    pytest.param(dict(shape=(4, 3, 5, 7)), id="odd sizes"),
    pytest.param(dict(shape=(4, 3, 5, 7), layout=channels_last), id="channels_last, odd sizes"),
    pytest.param(dict(shape=(3, 17, 4, 4), dtype=torch.float64), id="fp64"),
    pytest.param(dict(shape=(3, 17, 4, 4), dtype=torch.float64, layout=channels_last), id="fp64 channels_last"),
    pytest.param(dict(shape=(4, 8, 5, 5), dtype=torch.float16), id="fp16"),
    pytest.param(
        dict(shape=(4, 8, 5, 5), dtype=torch.float16, parameters=torch.float32, layout=channels_last),
        id="fp16, fp32 parameters",
    ),
    pytest.param(
        dict(shape=(4, 9, 5, 5), dtype=torch.bfloat16, parameters=torch.float32, layout=channels_last),
        id="bf16, fp32 parameters",
    ),
    pytest.param(dict(shape=(4, 9, 5, 5), dtype=torch.bfloat16), id="bf16"),
    pytest.param(dict(shape=(33, 70)), id="2-D, more channels than a block"),
    pytest.param(dict(shape=(2, 5, 11)), id="3-D"),
    pytest.param(dict(shape=(2, 3, 2, 3, 5)), id="5-D"),
    pytest.param(
        dict(shape=(2, 3, 2, 3, 5), layout=lambda x: x.to(memory_format=torch.channels_last_3d)),
        id="5-D channels_last",
    ),
    pytest.param(dict(shape=(2, 1, 7, 7)), id="one channel"),
    pytest.param(dict(shape=(2, 300, 3, 3), layout=channels_last), id="300 channels, channels_last"),
    pytest.param(dict(shape=(2, 300, 3, 3)), id="300 channels"),
    pytest.param(dict(shape=(1, 1, 400, 250)), id="one channel, 10^5 pixels"),
    pytest.param(dict(shape=(2, 4, 1, 1)), id="two values per channel"),
    pytest.param(dict(shape=(64, 64, 56, 56), dtype=torch.bfloat16, parameters=torch.float32, layout=channels_last),
                 id="resnet50 layer1", marks=pytest.mark.gpu),
    pytest.param(dict(shape=(64, 2048, 7, 7), dtype=torch.bfloat16, parameters=torch.float32),
                 id="resnet50 layer4, contiguous", marks=pytest.mark.gpu),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_batch_norm_training_matches_torch(lane, case):
    if case["shape"][0] == 64 and lane.name != "gpu":
        pytest.skip("a GPU's size")
    check(lane, **case)


@pytest.mark.parametrize("case", CASES[:6] + CASES[8:9])
def test_batch_norm_evaluation_matches_torch(lane, case):
    check(lane, **case, training=False)


@pytest.mark.parametrize("programs", (1, 6, 1024))
@pytest.mark.parametrize("layout", (lambda x: x, channels_last), ids=("contiguous", "channels_last"))
def test_batch_norm_strips(lane, layout, programs, monkeypatch):
    # small tiles: many strips of one tile, a ragged last strip of several, all tiles in one
    monkeypatch.setattr(passes, "TILE", 64)
    monkeypatch.setattr(passes, "PROGRAMS", programs)
    monkeypatch.setattr(passes, "FINALIZE", dict(BLOCK_S=4, BLOCK_C=4))
    check(lane, (3, 5, 9, 10), layout=layout)


def test_batch_norm_folded_rows_and_strips(lane):
    # more rows than a run of the CPU kernels, and pixels left over after the last folded row
    check(lane, (3, 3, 101, 67), layout=channels_last)


@pytest.mark.parametrize("layout", (lambda x: x, channels_last), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("mean", (1e2, 1e3, 1e4))
def test_batch_norm_mean_far_from_zero(lane, mean, layout):
    x = layout(torch.randn(8, 3, 16, 16, dtype=torch.float64) + mean).to(lane.device, torch.float32)
    truth = x.double().var((0, 2, 3))
    running = torch.zeros(3, device=lane.device), torch.zeros(3, device=lane.device)
    y = fF.batch_norm(x, *running, training=True, momentum=1.0)
    # of E[x^2] - E[x]^2 nothing would be left at 1e4
    torch.testing.assert_close(running[1].double(), truth, rtol=3e-6, atol=0)
    torch.testing.assert_close(running[0].double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    expected = F.batch_norm(x.double(), None, None, training=True)
    # half a last place of the mean is what fp32 leaves
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=mean * 1.2e-7 + 2e-6)


def test_batch_norm_first_pixels_are_outliers(lane):
    # a pivot taken from one pixel would be far from the mean
    for layout in (lambda x: x, channels_last):
        x = torch.randn(8, 2, 16, 16, dtype=torch.float64) + 1e3
        x[0, :, 0, 0] = 0
        x = layout(x.to(lane.device, torch.float32))
        running = torch.zeros(2, device=lane.device), torch.zeros(2, device=lane.device)
        fF.batch_norm(x, *running, training=True, momentum=1.0)
        torch.testing.assert_close(running[1].double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", (lambda x: x, channels_last), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_batch_norm_bad_value_stays_in_its_channel(lane, bad, layout):
    x, weight, bias, mean, var = tensors(lane, (3, 5, 4, 6), layout=layout)
    dirty = x.detach().clone()
    dirty[1, 2, 3, 1] = bad
    dirty[0, 4, 0, 0] = bad
    dirty.requires_grad_()
    clean = torch.tensor([0, 1, 3])
    results = []
    for tensor in (x, dirty):
        running = mean.clone(), var.clone()
        y = fF.batch_norm(tensor, *running, weight, bias, True)
        grads = torch.autograd.grad(y, (tensor, weight, bias), torch.ones_like(y))
        results.append((y[:, clean], grads[0][:, clean], grads[1][clean], grads[2], running[0][clean]))
        last = y, grads, running
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    y, grads, running = last
    assert y[:, [2, 4]].isnan().all() and grads[0][:, [2, 4]].isnan().all() and grads[1][[2, 4]].isnan().all()
    # an infinite value leaves an infinite mean, no NaN
    expected = mean.clone(), var.clone()
    F.batch_norm(dirty, *expected, training=True)
    torch.testing.assert_close(running, expected, equal_nan=True)


def test_batch_norm_constant_channel(lane):
    # variance 0: also rounding must not make it negative
    for layout in (lambda x: x, channels_last):
        x = layout(torch.full((4, 2, 7, 7), 1234.567, device=lane.device)).requires_grad_()
        weight = torch.tensor([2.0, 3.0], device=lane.device, requires_grad=True)
        mean, var = torch.zeros(2, device=lane.device), torch.ones(2, device=lane.device)
        y = fF.batch_norm(x, mean, var, weight, None, True, 1.0, 1e-3)
        torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=1e-2)
        torch.testing.assert_close(var, torch.zeros_like(var), rtol=0, atol=1e-6)
        assert_matches(
            lambda x, w: fF.batch_norm(x, None, None, w, None, True, eps=1e-3),
            lambda x, w: F.batch_norm(x, None, None, w, None, True, eps=1e-3),
            x,
            weight,
        )


@pytest.mark.parametrize("momentum", (0.0, 1.0, 1 / 3))
def test_batch_norm_momentum(lane, momentum):
    x, _, _, mean, var = tensors(lane, (3, 4, 5, 5), torch.float64)
    results = []
    for functional in (fF, F):
        running = mean.clone(), var.clone()
        functional.batch_norm(x, *running, training=True, momentum=momentum)
        results.append(running)
    # fp64: a momentum or eps that passed through fp32 would show
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-14)


LAYOUTS = [
    pytest.param(channels_last, id="channels_last"),
    pytest.param(lambda x: x[:, :, ::2, 1:], id="slice"),
    pytest.param(lambda x: x[:, 1:3], id="slice of channels"),
    pytest.param(lambda x: x[:1].expand(4, -1, -1, -1), id="expanded"),
    pytest.param(lambda x: x.transpose(2, 3), id="transposed"),
    pytest.param(lambda x: x.transpose(0, 1), id="batch and channels swapped"),
    pytest.param(lambda x: channels_last(x[:, :1]), id="channels_last, one channel"),
    pytest.param(lambda x: channels_last(x[:, :, :1, :1]), id="channels_last, one pixel"),
    pytest.param(lambda x: x[0].t() if x.dim() == 3 else x[:, :, 0].transpose(1, 2), id="3-D transposed"),
]


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("make", LAYOUTS)
def test_batch_norm_layouts(lane, make, training):
    x = make(torch.randn(4, 3, 5, 6, device=lane.device)).detach().requires_grad_()
    C = x.shape[1]
    mean, var = torch.zeros(C, device=lane.device), torch.ones(C, device=lane.device)
    y = fF.batch_norm(x, mean.clone(), var.clone(), training=training)
    expected = F.batch_norm(x, mean, var, training=training)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    contiguous = torch.randn(y.shape, device=lane.device)
    for grad in (
        contiguous,
        contiguous.transpose(0, 1).contiguous().transpose(0, 1),
        torch.ones((), device=lane.device),
    ):
        grad = grad.expand(y.shape)
        (ours,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected, x, grad, retain_graph=True)
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4), (0, 3)])
def test_batch_norm_empty(lane, shape, training):
    x = torch.randn(shape, device=lane.device, requires_grad=True)
    C = shape[1]
    weight, bias = (torch.ones(C, device=lane.device, requires_grad=True) for _ in range(2))
    mean, var = torch.full((C,), 2.0, device=lane.device), torch.full((C,), 3.0, device=lane.device)
    y = fF.batch_norm(x, mean, var, weight, bias, training)
    assert y.shape == x.shape and (mean == 2).all() and (var == 3).all()
    for grad, leaf in zip(torch.autograd.grad(y.sum(), (x, weight, bias)), (x, weight, bias), strict=True):
        assert grad.shape == leaf.shape and (grad == 0).all()


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("needed", ["input", "weight", "bias", "weight bias", "input bias", ""])
def test_batch_norm_only_the_gradients_asked_for(lane, needed, training):
    leaves = dict(zip(("input", "weight", "bias", "mean", "var"), tensors(lane, (3, 4, 5, 5)), strict=True))
    for name in ("input", "weight", "bias"):
        leaves[name].requires_grad_(name in needed.split())
    assert_matches(
        lambda x, w, b, m, v: fF.batch_norm(x, m.clone(), v.clone(), w, b, training),
        lambda x, w, b, m, v: F.batch_norm(x, m.clone(), v.clone(), w, b, training),
        *leaves.values(),
    )


@pytest.mark.parametrize("weight, bias", [(False, False), (True, False), (False, True)])
def test_batch_norm_without_parameters(lane, weight, bias):
    x, w, b, _, _ = tensors(lane, (3, 4, 5, 5), layout=channels_last)
    w, b = w if weight else None, b if bias else None
    for training in (True,):
        assert_matches(
            lambda x, w, b, training=training: fF.batch_norm(x, None, None, w, b, training),
            lambda x, w, b, training=training: F.batch_norm(x, None, None, w, b, training),
            x, w, b,
        )  # fmt: skip


def test_batch_norm_second_derivative(lane):
    x, weight, bias, mean, var = tensors(lane, (3, 2, 2), torch.float64)
    for training in (True, False):
        function = lambda x, w, b, training=training: fF.batch_norm(x, mean.clone(), var.clone(), w, b, training)
        assert torch.autograd.gradcheck(function, (x, weight, bias), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x, weight, bias), fast_mode=True)


def test_batch_norm_second_derivative_leaves_running_statistics(lane):
    x, weight, bias, mean, var = tensors(lane, (3, 2, 2, 3))
    y = fF.batch_norm(x, mean, var, weight, bias, True)
    before = mean.clone(), var.clone()
    torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].square().sum().backward()
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


def test_batch_norm_same_bits_every_time(lane):
    x, weight, bias, _, _ = tensors(lane, (5, 7, 9, 11), layout=channels_last)
    runs = []
    for _ in range(2):
        y = fF.batch_norm(x, None, None, weight, bias, True)
        runs.append((y, *torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y) * 0.3)))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_batch_norm_under_autocast(lane):
    # torch leaves batch norm out of autocast: the dtype of input stays
    if lane.name == "cpu":
        pytest.skip("numba has no 16-bit floats")
    x, weight, bias, mean, var = tensors(lane, (2, 3, 4, 4), torch.bfloat16, torch.float32)
    with torch.autocast(lane.device.type, dtype=torch.bfloat16):
        assert fF.batch_norm(x, mean, var, weight, bias, True).dtype == torch.bfloat16
        assert fF.batch_norm(x.float(), mean, var, weight, bias, True).dtype == torch.float32


def test_batch_norm_compiles_without_graph_breaks(lane):
    x, weight, bias, mean, var = tensors(lane, (2, 3, 4, 4))
    ours, theirs = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    compiled = torch.compile(
        lambda x, w, b: fF.batch_norm(x * 2, *ours, w, b, True), fullgraph=True, backend="aot_eager"
    )
    y, expected = compiled(x, weight, bias), F.batch_norm(x * 2, *theirs, weight, bias, True)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), (x, weight)), torch.autograd.grad(expected.square().sum(), (x, weight)),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("layout", (lambda x: x, channels_last, lambda x: x.transpose(2, 3)))
def test_batch_norm_registration(lane, layout):
    x, weight, bias, mean, var = (t.detach() for t in tensors(lane, (2, 3, 4, 5), layout=layout))
    backend = "cpu" if lane.name == "cpu" else "triton"
    torch.library.opcheck(ops._forward, (x, weight, bias, mean, var, x, 0.1, 1e-5, "relu", True, backend))
    torch.library.opcheck(ops._forward, (x, None, None, None, None, None, 0.1, 1e-5, None, False, backend))
    torch.library.opcheck(ops._forward_eval, (x, weight, bias, mean, var, x, 1e-5, "relu", True, backend))
    bits = torch.ones(passes.mask_shape(x), dtype=torch.uint8, device=lane.device)
    for mask, activation, training, *needs in (
        (bits, "relu", True, True, True, True), (None, None, False, True, False, False),
        (None, None, True, False, True, False),
    ):  # fmt: skip
        arguments = (torch.randn_like(x), x, weight, bias, mean, var, None, mask, training, 1e-5, activation)
        torch.library.opcheck(ops._backward, (*arguments, *needs, backend))


def test_batch_norm_strided_parameters_run_on_pytorch(lane):
    x = torch.randn(2, 3, 4, 4, device=lane.device)
    mean, var = torch.zeros(3, 2, device=lane.device)[:, 0], torch.ones(3, 2, device=lane.device)[:, 0]
    with pytest.raises(NotImplementedError, match="contiguous weight, bias and running statistics"):
        fF.batch_norm(x, mean, var, training=True)


def test_batch_norm_cpu_takes_large_training_batches():
    chosen = []
    large = torch.randn(32, 8, 64, 64)
    for x, training in ((large, True), (channels_last(large), True), (large, False), (large[:2], True)):
        ops._op.calls.clear()
        with fastcnn.backend("auto"):
            fF.batch_norm(x, torch.zeros(8), torch.ones(8), training=training)
        chosen += [backend for backend, _ in ops._op.calls]
    with fastcnn.backend("auto"):
        ops._op.calls.clear()
        fF.batch_norm(large, torch.zeros(8), torch.ones(8), activation="relu", residual=large)
    chosen += [backend for backend, _ in ops._op.calls]
    assert chosen in (["cpu", "cpu", "torch", "torch", "cpu"], ["triton"] * 5)


REFUSED = [
    (TypeError, "input must be a torch.Tensor, got list", dict(input=[1.0])),
    (ValueError, r"input must have at least 2 dimensions.*got shape \(3,\)", dict(input=torch.zeros(3))),
    (TypeError, "input must have a floating-point dtype, got torch.int64", dict(input=torch.zeros(2, 3, 4, 4).long())),
    (TypeError, "running_mean must be a torch.Tensor, got float", dict(running_mean=0.5)),
    (ValueError, r"running_mean must have 3 elements, one per channel, got shape \(4,\)",
     dict(running_mean=torch.zeros(4))),
    (ValueError, r"weight must have 3 elements, one per channel, got shape \(3, 1\)", dict(weight=torch.ones(3, 1))),
    (ValueError, r"bias must have 3 elements, one per channel, got shape \(2,\)", dict(bias=torch.ones(2))),
    (TypeError, r"weight must have the dtype of input \(torch.float32\)", dict(weight=torch.ones(3).half())),
    (TypeError, r"running_mean must have the dtype of weight \(torch.float32\), got torch.float16",
     dict(input=torch.zeros(2, 3, 4, 4).half(), weight=torch.ones(3), running_mean=torch.zeros(3).half(),
          running_var=torch.ones(3).half())),
    (ValueError, "running_mean and running_var must be both tensors or both None", dict(running_mean=None)),
    (ValueError, "must be defined in evaluation mode",
     dict(running_mean=None, running_var=None, training=False)),
    (ValueError, "running_var must not require a gradient", dict(running_var=torch.ones(3, requires_grad=True))),
    (ValueError, r"Expected more than 1 value per channel when training, got input size \(1, 3, 1, 1\)",
     dict(input=torch.zeros(1, 3, 1, 1))),
    (ValueError, "eps must be positive during training, but got 0", dict(eps=0)),
    (ValueError, "eps must be non-negative, but got -1", dict(eps=-1, training=False)),
    (TypeError, "momentum must be a number, got None", dict(momentum=None)),
    (TypeError, "training must be a bool, got 1", dict(training=1)),
    (ValueError, "activation must be None or one of gelu, .*got 'elu'", dict(activation="elu")),
    (TypeError, "residual must be a torch.Tensor, got float", dict(residual=1.0)),
    (TypeError, r"residual must have the dtype of input \(torch.float32\), got torch.float64",
     dict(residual=torch.zeros(2, 3, 4, 4).double())),
    (ValueError, r"residual must have the shape of input \(2, 3, 4, 4\), got \(3, 4, 4\)",
     dict(residual=torch.zeros(3, 4, 4))),
]  # fmt: skip


@pytest.mark.parametrize("error, message, changed", REFUSED, ids=[message[:40] for _, message, _ in REFUSED])
def test_batch_norm_refuses_bad_arguments(error, message, changed):
    running = dict(running_mean=torch.zeros(3), running_var=torch.ones(3))
    arguments = dict(input=torch.randn(2, 3, 4, 4), training=True) | running | changed
    with pytest.raises(error, match=message):
        fF.batch_norm(**arguments)
    # refused before anything was changed
    assert (running["running_mean"] == 0).all() and (running["running_var"] == 1).all()
