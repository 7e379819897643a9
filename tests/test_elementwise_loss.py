import itertools

import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops import elementwise_loss as ops
from fastcnn.testing import assert_matches

LANES = ("triton", "cpu")
HALF = (torch.float16, torch.bfloat16)
LOSSES = {
    "mse_loss": {},
    "l1_loss": {},
    "smooth_l1_loss": {"beta": 0.7},
    "huber_loss": {"delta": 1.3},
    "binary_cross_entropy_with_logits": {},
}


def rand(lane, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(lane.device)


def data(lane, shape, dtype, make=lambda t: t):
    """Input and target, with gradients; none of the differences lies near a kink."""
    x, t = make((rand(lane, *shape) * 6 - 3).to(dtype)), make(rand(lane, *shape, seed=1).to(dtype))
    return x.detach().requires_grad_(), t.detach().requires_grad_()


def check(name, x, t, **arguments):
    """Value and gradients of input and target. Weights in the dtype of the input, since truth is computed in fp64."""

    def call(module):
        return lambda x, t: getattr(module, name)(
            x, t, **{k: v.to(x.dtype) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        )

    assert_matches(call(fF), call(F), x, t)


CASES = [
    pytest.param((3, 5), torch.float32, id="one block"),
    pytest.param((), torch.float32, id="a scalar"),
    pytest.param((1,), torch.float64, id="one element, fp64"),
    pytest.param((3, 7, 101), torch.float64, id="three blocks, fp64"),
    pytest.param((2, 17, 13, 11), torch.float32, id="odd sizes"),
    pytest.param((5, 1025), torch.float16, id="fp16"),
    pytest.param((5, 1025), torch.bfloat16, id="bf16"),
]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape, dtype", CASES)
def test_loss_and_both_gradients(lane, name, shape, dtype):
    if lane.name == "cpu" and dtype in HALF:
        pytest.skip("the CPU kernels compute in float32 and float64")
    x, t = data(lane, shape, dtype)
    for reduction in ("none", "mean", "sum"):
        check(name, x, t, reduction=reduction, **LOSSES[name])


@pytest.mark.parametrize("name", ("mse_loss", "l1_loss", "huber_loss"))
def test_weight_per_element(lane, name):
    x, t = data(lane, (3, 5, 201), torch.float32)
    for reduction in ("none", "mean", "sum"):
        check(name, x, t, reduction=reduction, weight=rand(lane, 3, 5, 201, seed=2) + 0.5)


# shapes that broadcast to (3, 4, 6, 50): dimensions side by side in memory, and apart
WEIGHTS = [(), (1,), (50,), (6, 1), (4, 1, 1), (3, 1, 1, 1), (4, 6, 50), (3, 4, 1, 1), (3, 1, 1, 50), (3, 4, 6, 50)]


@pytest.mark.parametrize("channels_last", (False, True))
def test_bce_weights_broadcast(lane, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    make = lambda t: t.contiguous(memory_format=memory_format)
    x, t = data(lane, (3, 4, 6, 50), torch.float32, make)
    for shape, other in zip(WEIGHTS, [*WEIGHTS[3:], *WEIGHTS[:3]], strict=True):
        weight, pos_weight = rand(lane, *shape, seed=3) + 0.5, rand(lane, *other, seed=4) + 0.5
        reduction = "none" if len(shape) % 2 else "mean"
        check("binary_cross_entropy_with_logits", x, t, weight=weight, pos_weight=pos_weight, reduction=reduction)
    check("binary_cross_entropy_with_logits", x, t, pos_weight=(rand(lane, 4, 1, 1) + 0.5).expand(4, 6, 50))


LAYOUTS = [
    pytest.param(lambda t: t.to(memory_format=torch.channels_last), id="channels_last"),
    pytest.param(lambda t: t[:, :, ::2, 1:], id="slice"),
    pytest.param(lambda t: t[:1].expand(2, -1, -1, -1), id="expanded"),
    pytest.param(lambda t: t.transpose(1, 3), id="transposed"),
]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("make", LAYOUTS)
def test_layouts(lane, name, make):
    x, t = data(lane, (2, 5, 6, 7), torch.float32, make)
    for target in (t, t.detach().contiguous().requires_grad_()):
        loss, expected = (getattr(f, name)(x, target, reduction="none", **LOSSES[name]) for f in (fF, F))
        torch.testing.assert_close(loss, expected)
        if x.is_contiguous(memory_format=torch.channels_last):
            assert loss.stride() == x.stride()
        for grad in (torch.ones((), device=lane.device).expand(loss.shape), rand(lane, *loss.shape[::-1]).float().T):
            ours, theirs = (torch.autograd.grad(y, (x, target), grad, retain_graph=True) for y in (loss, expected))
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", LOSSES)
def test_many_programs(lane, name, monkeypatch):
    # several blocks per program, a ragged last one, a last program with nothing to do
    monkeypatch.setattr(ops, "BLOCK", 16)
    monkeypatch.setattr(ops, "PROGRAMS", 4)
    for size in (200, 129, 64):
        x, t = data(lane, (size,), torch.float32)
        for reduction in ("mean", "sum"):
            check(name, x, t, reduction=reduction, **LOSSES[name])


@pytest.mark.parametrize("name", LOSSES)
def test_special_values(lane, name):
    values = [0.0, -0.0, 0.7, -0.7, 1.3, 300.0, -300.0, 1e-30, torch.inf, -torch.inf, torch.nan]
    for a, b in itertools.product(values, values[:8] + [torch.inf, torch.nan]):
        if (name.startswith("binary") and not 0 <= b <= 1) or (a == b and abs(a) == torch.inf):
            continue
        x = torch.tensor([a], device=lane.device, requires_grad=True)
        t = torch.tensor([b], device=lane.device)
        results = []
        for function in (fF, F):
            loss = getattr(function, name)(x, t, reduction="none", **LOSSES[name])
            results.append((loss, *torch.autograd.grad(loss, x)))
        # torch's sign of NaN is 0: where the difference is NaN, ours says NaN
        if a == a and b == b:
            torch.testing.assert_close(*results, equal_nan=True, rtol=1e-5, atol=1e-6)
        else:
            assert results[0][0].isnan() and results[0][1].isnan()


def test_bce_has_all_digits_where_the_loss_is_small(lane):
    x = torch.tensor([20.0, 40.0, 80.0], device=lane.device)
    loss = fF.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none")
    torch.testing.assert_close(loss, torch.exp(-x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_empty_tensors(lane, reduction):
    x, t = data(lane, (0, 3), torch.float32)
    for name in LOSSES:
        loss, expected = (getattr(f, name)(x, t, reduction=reduction) for f in (fF, F))
        torch.testing.assert_close(loss, expected, equal_nan=True)
        assert torch.autograd.grad(loss.sum(), x)[0].shape == (0, 3)


def test_beta_of_zero_is_l1(lane):
    x, t = data(lane, (40,), torch.float32)
    check("smooth_l1_loss", x, t, beta=0)
    assert torch.equal(fF.smooth_l1_loss(x, t, beta=0), fF.l1_loss(x, t))


def test_two_dtypes_are_promoted(lane):
    if lane.name == "cpu":
        return  # PyTorch runs
    x, t = data(lane, (30, 5), torch.bfloat16)
    t = t.detach().float().requires_grad_()
    for name in ("mse_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits"):
        loss = getattr(fF, name)(x, t)
        assert loss.dtype == getattr(F, name)(x, t).dtype == torch.float32
        # PyTorch takes some of the steps in bf16
        torch.testing.assert_close(loss, getattr(F, name)(x.float(), t))
        assert [g.dtype for g in torch.autograd.grad(loss, (x, t))] == [torch.bfloat16, torch.float32]
    with pytest.raises(NotImplementedError, match="float64 beside other dtypes"):
        fF.mse_loss(x, t.double())


def test_pytorch_runs_what_broadcasts(lane):
    x = torch.ones(3, 4, device=lane.device)
    with pytest.raises(NotImplementedError, match=r"no kernel that broadcasts, and got shapes \(3, 4\) and \(4,\)"):
        fF.mse_loss(x, x[0])
    with fastcnn.strict(False), pytest.warns(UserWarning, match="Using a target size"):
        assert fF.mse_loss(x, x[0]) == 0
    with pytest.raises(NotImplementedError, match="gradient of a weight"):
        fF.mse_loss(x, x, weight=x.clone().requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivative(lane, name):
    x, t = data(lane, (7,), torch.float64)
    for reduction in ("mean", "none"):
        function = lambda x, t, r=reduction: getattr(fF, name)(x, t, reduction=r, **LOSSES[name])
        assert torch.autograd.gradcheck(function, (x, t), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x, t), fast_mode=True)


@pytest.mark.parametrize("name", LOSSES)
def test_same_bits_from_one_thread_and_from_two(name):
    x, t = torch.randn(50001, requires_grad=True), torch.rand(50001)
    threads, results = torch.get_num_threads(), []
    with fastcnn.backend("cpu"), fastcnn.strict():
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                loss = getattr(fF, name)(x, t)
                results.append((loss, *torch.autograd.grad(loss, x)))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_on_cpu_ours_runs_where_it_is_faster():
    for name, below in ops.BELOW.items():
        for numel, backend in ((below - 1, "torch"), (below, "cpu")):
            ops._ops[name].calls.clear()
            getattr(fF, name)(torch.zeros(numel), torch.zeros(numel))
            assert [ran for ran, _ in ops._ops[name].calls] == [backend], (name, numel)
        for height, backend in ((below // 32, "torch"), (below // 16, "cpu")):
            ops._ops[name].calls.clear()
            x = torch.zeros(1, 4, height, 2).to(memory_format=torch.channels_last)
            getattr(fF, name)(x, x)
            assert [ran for ran, _ in ops._ops[name].calls] == [backend], (name, height)


@pytest.mark.parametrize("name", LOSSES)
def test_modules(lane, name):
    x, t = data(lane, (4, 6), torch.float32)
    kind = name.removesuffix("_loss")
    names = {"mse": "MSELoss", "l1": "L1Loss", "smooth_l1": "SmoothL1Loss", "huber": "HuberLoss"}
    arguments = dict(LOSSES[name], reduction="sum")
    if kind not in names:
        arguments["pos_weight"] = torch.full((6,), 2.0, device=lane.device)
    modules = [getattr(m, names.get(kind, "BCEWithLogitsLoss"))(**arguments) for m in (fastcnn.nn, torch.nn)]
    assert isinstance(modules[0], type(modules[1]))
    torch.testing.assert_close(*(module(x, t) for module in modules))


X = torch.zeros(2, 3)
REFUSED = [
    (TypeError, "input must be a torch.Tensor, got list", "mse_loss", dict(input=[1.0])),
    (TypeError, "target must be a torch.Tensor, got int", "huber_loss", dict(target=1)),
    (ValueError, r"weight must have the shape of input \(\(2, 3\)\), got \(3,\)", "l1_loss", dict(weight=X[0])),
    (ValueError, "average is not a valid value for reduction", "mse_loss", dict(reduction="average")),
    (ValueError, "beta must be at least 0, got -1", "smooth_l1_loss", dict(beta=-1)),
    (TypeError, "beta must be a number, got 'x'", "smooth_l1_loss", dict(beta="x")),
    (ValueError, "delta must be more than 0, got 0", "huber_loss", dict(delta=0)),
    (ValueError, r"target must have the shape of input \(\(2, 3\)\), got \(3,\)", "binary_cross_entropy_with_logits",
     dict(target=X[0])),
    (ValueError, r"pos_weight must broadcast to the shape of input \(\(2, 3\)\), got \(2,\)",
     "binary_cross_entropy_with_logits", dict(pos_weight=X[:, 0])),
]  # fmt: skip


@pytest.mark.parametrize("error, message, name, changed", REFUSED, ids=[message[:40] for _, message, _, _ in REFUSED])
def test_bad_arguments_are_refused(error, message, name, changed):
    with pytest.raises(error, match=message):
        getattr(fF, name)(**(dict(input=X, target=X) | changed))
