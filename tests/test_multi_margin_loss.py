import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops import multi_margin_loss as ops
from fastcnn.testing import assert_matches

LANES = ("triton", "cpu")
HALF = (torch.float16, torch.bfloat16)


def scores(lane, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 2).to(lane.device, dtype).requires_grad_()


def classes(lane, shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape[-1], shape[:-1], generator=generator).to(lane.device)


def check(x, target, weight=None, **arguments):
    """Against the formula: PyTorch's own has no half precisions on CPU."""
    p, margin, reduction = (arguments.get(k, d) for k, d in (("p", 1), ("margin", 1.0), ("reduction", "mean")))

    def formula(x):
        w = None if weight is None else weight.to(x.dtype)
        inside = torch.float32 if x.dtype in HALF else x.dtype
        return ops._differentiable(x, target, w, p, margin, reduction, inside).to(x.dtype)

    assert_matches(lambda x: fF.multi_margin_loss(x, target, weight=weight, **arguments), formula, x)


CASES = [
    pytest.param((5, 10), torch.float32, id="10 classes"),
    pytest.param((3, 1000), torch.float32, id="1000 classes"),
    pytest.param((7, 1), torch.float32, id="one class"),
    pytest.param((9, 33), torch.float64, id="fp64"),
    pytest.param((9, 33), torch.float16, id="fp16"),
    pytest.param((9, 40), torch.bfloat16, id="bf16"),
    pytest.param((300, 17), torch.float32, id="more rows than a tile"),
    pytest.param((3, 2050), torch.float32, id="three tiles of classes"),
    pytest.param((1, 64), torch.float32, id="one row"),
]


@pytest.mark.parametrize("shape, dtype", CASES)
def test_loss_and_gradient(lane, shape, dtype):
    if lane.name == "cpu" and dtype in HALF:
        pytest.skip("the CPU kernels compute in float32 and float64")
    x, target = scores(lane, shape, dtype), classes(lane, shape)
    weight = (torch.arange(shape[1], device=lane.device) % 5 + 0.5).to(dtype)
    for arguments in (dict(), dict(p=2, reduction="sum"), dict(margin=0.3, reduction="none")):
        check(x, target, **arguments)
    check(x, target, weight, p=2)
    if dtype not in HALF:
        torch.testing.assert_close(
            fF.multi_margin_loss(x, target, 2, 0.5, weight), F.multi_margin_loss(x, target, 2, 0.5, weight)
        )


@pytest.mark.parametrize("make", (lambda t: t[::2, 1::2], lambda t: t.t(), lambda t: t[:1].expand(6, -1)))
def test_layouts(lane, make):
    x = make(scores(lane, (12, 12))).detach().requires_grad_()
    target = classes(lane, x.shape)
    results = []
    for module in (fF, F):
        loss = module.multi_margin_loss(x, target, reduction="none")
        for grad in (torch.ones((), device=lane.device).expand(loss.shape), torch.randn(24, device=lane.device)[::2]):
            torch.manual_seed(0)
            results.append((loss, *torch.autograd.grad(loss, x, grad[: len(loss)], retain_graph=True)))
    torch.testing.assert_close(results[0], results[2])


def test_special_values(lane):
    for row in (
        [1.0, 1.0, 1.0],
        [torch.nan, 0.0, 2.0],
        [0.0, torch.nan, 2.0],
        [torch.inf, 0.0, 1.0],
        [-torch.inf, 0.0, 1.0],
    ):
        x = torch.tensor([row, [0.5, -0.5, 3.0]], device=lane.device, requires_grad=True)
        for target in ([0, 1], [1, 2]):
            target = torch.tensor(target, device=lane.device)
            for p in (1, 2):
                results = []
                for module in (fF, F):
                    loss = module.multi_margin_loss(x, target, p, reduction="none")
                    results.append((loss, *torch.autograd.grad(loss.nan_to_num(0).sum(), x)))
                torch.testing.assert_close(results[0][0], results[1][0], equal_nan=True)
                if torch.tensor(row).isfinite().all():
                    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_no_rows(lane, reduction):
    x = torch.zeros(0, 4, device=lane.device, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64, device=lane.device)
    for strict in (True, False):
        with fastcnn.strict(strict), fastcnn.backend("auto" if not strict else fastcnn.backends.current_backend()):
            loss = fF.multi_margin_loss(x, target, reduction=reduction)
        assert loss.shape == ((0,) if reduction == "none" else ())
        assert reduction == "none" or (loss.isnan() if reduction == "mean" else loss == 0)
        assert torch.autograd.grad(loss.sum(), x)[0].shape == (0, 4)


def test_without_batch(lane):
    for x, targets in ((scores(lane, (6,)), (2, [3])), (scores(lane, (1,)).reshape(()), (0, [0]))):
        for target in targets:
            target = torch.tensor(target, device=lane.device)
            for reduction in ("none", "mean"):
                loss, expected = (m.multi_margin_loss(x, target, reduction=reduction) for m in (fF, F))
                torch.testing.assert_close(loss, expected)


def test_target_that_is_no_class(lane, monkeypatch):
    x = scores(lane, (3, 5))
    for value in (5, -1, 2**33):
        target = torch.tensor([1, value, 2], device=lane.device)
        if lane.name != "gpu":
            for kind in (IndexError, ValueError):
                with pytest.raises(kind, match=rf"target must be in \[0, 5\), got {value}"):
                    fF.multi_margin_loss(x, target)
    with fastcnn.strict(False), fastcnn.backend("auto"), pytest.raises(IndexError, match="got 7"):
        fF.multi_margin_loss(x, torch.tensor([1, 7, 0], device=lane.device))


def test_no_class_is_nan_in_the_kernel(lane, monkeypatch):
    if lane.name == "cpu":
        return  # there it raises
    monkeypatch.setattr(ops, "_check_classes", lambda *_: None)
    if lane.name == "interpret":
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter.interpreter_builder, "create_assert", lambda *_: None)
    x = scores(lane, (3, 5))
    loss = fF.multi_margin_loss(x, torch.tensor([1, 5, 2], device=lane.device), reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert torch.autograd.grad(loss.sum(), x)[0].isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("p", (1, 2))
def test_second_derivative(lane, p):
    x, target = scores(lane, (4, 5), torch.float64), classes(lane, (4, 5))
    function = lambda x: fF.multi_margin_loss(x, target, p)
    assert torch.autograd.gradcheck(function, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)


def test_on_cpu_ours_runs_where_it_is_faster():
    for rows, backend in ((63, "torch"), (64, "cpu")):
        ops._op.calls.clear()
        fF.multi_margin_loss(torch.zeros(rows, 1024), torch.zeros(rows, dtype=torch.int64))
        assert [ran for ran, _ in ops._op.calls] == [backend]


def test_same_bits_from_one_thread_and_from_two():
    x, target = torch.randn(300, 1000, requires_grad=True), torch.randint(1000, (300,))
    threads, results = torch.get_num_threads(), []
    with fastcnn.backend("cpu"), fastcnn.strict():
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                loss = fF.multi_margin_loss(x, target)
                results.append((loss, *torch.autograd.grad(loss, x)))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_module(lane):
    x, target = scores(lane, (4, 6)), classes(lane, (4, 6))
    weight = torch.full((6,), 2.0, device=lane.device)
    modules = [m.MultiMarginLoss(2, 0.5, weight, reduction="sum") for m in (fastcnn.nn, torch.nn)]
    torch.testing.assert_close(*(module(x, target) for module in modules))


X, T = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
REFUSED = [
    (TypeError, "input must be a torch.Tensor, got list", dict(input=[1.0])),
    (TypeError, "input must have a floating-point dtype, got torch.int64", dict(input=X.long())),
    (ValueError, "input must be 0-D or 1-D or 2-D, got 3-D", dict(input=X[None])),
    (ValueError, r"input must have one class or more, got shape \(2, 0\)", dict(input=X[:, :0])),
    (ValueError, r"target must have shape \(2,\) for input of shape \(2, 3\), got \(1,\)", dict(target=T[:1])),
    (TypeError, "target must hold class indices in torch.int64, got torch.int32", dict(target=T.int())),
    (ValueError, "p must be 1 or 2, got 3", dict(p=3)),
    (TypeError, "p must be 1 or 2, got 'x'", dict(p="x")),
    (TypeError, "margin must be a number, got 'x'", dict(margin="x")),
    (ValueError, r"weight must have one value for each of 3 classes, got shape \(4,\)", dict(weight=torch.ones(4))),
    (TypeError, r"weight must have the dtype of input \(torch.float32\), got torch.float64",
     dict(weight=torch.ones(3).double())),
    (ValueError, "average is not a valid value for reduction", dict(reduction="average")),
]  # fmt: skip


@pytest.mark.parametrize("error, message, changed", REFUSED, ids=[message[:40] for _, message, _ in REFUSED])
def test_bad_arguments_are_refused(error, message, changed):
    with pytest.raises(error, match=message):
        fF.multi_margin_loss(**(dict(input=X, target=T) | changed))
