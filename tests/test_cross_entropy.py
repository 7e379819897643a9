import warnings

import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops import cross_entropy as ops
from fastcnn.testing import assert_matches

LANES = ("triton", "cpu")


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def indices(lane, x, ignore=None):
    """Random classes for logits x; some are ignored if asked for."""
    C = x.shape[1]
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(C, (x.shape[0], *x.shape[2:]), generator=generator)
    if ignore is not None:
        target.view(-1)[::3] = ignore
    return target.to(lane.device)


def check(x, target, weight=None, **arguments):
    assert_matches(
        lambda x: fF.cross_entropy(x, target, weight, **arguments),
        # class weights in the dtype of the logits: truth is computed in fp64
        lambda x: F.cross_entropy(
            x,
            target.to(x.dtype) if target.is_floating_point() else target,
            None if weight is None else weight.to(x.dtype),
            **arguments,
        ),
        x,
    )


SHAPES = [
    pytest.param((5, 10), torch.float32, id="10 classes"),
    pytest.param((3, 1000), torch.float32, id="1000 classes"),
    pytest.param((7, 1), torch.float32, id="one class"),
    pytest.param((9, 33), torch.float64, id="fp64"),
    pytest.param((9, 33), torch.float16, id="fp16"),
    pytest.param((9, 33), torch.bfloat16, id="bf16"),
    pytest.param((130, 17), torch.float32, id="more rows than a block"),
    pytest.param((3, 2050), torch.float32, id="three blocks of classes"),
    pytest.param((2, 5, 7), torch.float32, id="3-D"),
    pytest.param((2, 40, 3, 5), torch.float32, id="4-D, two blocks of classes"),
    pytest.param((2, 3, 2, 3, 2), torch.float32, id="5-D"),
    pytest.param((256, 1000), torch.bfloat16, id="imagenet", marks=pytest.mark.gpu),
    pytest.param((4, 21, 256, 256), torch.bfloat16, id="segmentation", marks=pytest.mark.gpu),
]


def skip_half_on_cpu(lane, dtype):
    if lane.name == "cpu" and dtype in (torch.float16, torch.bfloat16):
        pytest.skip("the CPU kernels compute in float32 and float64")


def random_logits(lane, shape, dtype):
    skip_half_on_cpu(lane, dtype)
    if shape[0] * shape[-1] >= 1024 and lane.name != "gpu" and dtype == torch.bfloat16:
        pytest.skip("a GPU's size")
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 3).to(lane.device, dtype).requires_grad_()


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("shape, dtype", SHAPES)
def test_cross_entropy_class_indices(lane, shape, dtype, reduction):
    x = random_logits(lane, shape, dtype)
    check(x, indices(lane, x, ignore=-100), reduction=reduction)


@pytest.mark.parametrize("shape, dtype", SHAPES)
def test_cross_entropy_weights_smoothing_and_ignored(lane, shape, dtype):
    x = random_logits(lane, shape, dtype)
    weight = torch.rand(shape[1], device=lane.device, dtype=dtype) + 0.2
    for reduction, smoothing, weighted in (("mean", 0.1, True), ("none", 0.3, True), ("sum", 1.0, False)):
        check(
            x, indices(lane, x, ignore=0), weight if weighted else None,
            reduction=reduction, ignore_index=0, label_smoothing=smoothing,
        )  # fmt: skip
    check(x, indices(lane, x, ignore=0), weight, ignore_index=0)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("shape, dtype", SHAPES[:6] + SHAPES[7:])
def test_cross_entropy_probabilities(lane, shape, dtype, reduction):
    x = random_logits(lane, shape, dtype)
    target = torch.randn(shape, device=lane.device).softmax(1).to(dtype)
    check(x, target, reduction=reduction)
    weight = torch.rand(shape[1], device=lane.device, dtype=dtype) + 0.2
    check(x, target, weight, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
def test_cross_entropy_many_programs(lane, soft, monkeypatch):
    # small tiles: several blocks of classes, a ragged last program, more programs than the finalize kernel adds at once
    monkeypatch.setattr(ops, "TILE", 32)
    monkeypatch.setattr(ops, "FINALIZE_BLOCK", 4)
    x = random_logits(lane, (15, 13), torch.float32)
    target = torch.randn(15, 13, device=lane.device).softmax(1) if soft else indices(lane, x, ignore=-100)
    for reduction in ("mean", "sum", "none"):
        check(x, target, reduction=reduction, label_smoothing=0.1)


LAYOUTS = [
    pytest.param((2, 5, 3, 4), channels_last, id="channels_last"),
    pytest.param((2, 5, 3, 4), lambda x: x[:, :, ::2, 1:], id="slice"),
    pytest.param((2, 5, 3, 4), lambda x: x[:1].expand(2, -1, -1, -1), id="expanded"),
    pytest.param((5, 6), lambda x: x.t(), id="transposed"),
    pytest.param((8, 12), lambda x: x[::2, ::2], id="every second"),
    pytest.param((2, 5, 3, 4), lambda x: x[:, :, :1, :1], id="one pixel"),
]


@pytest.mark.parametrize("shape, make", LAYOUTS)
def test_cross_entropy_layouts(lane, shape, make):
    x = make(torch.randn(shape, device=lane.device)).detach().requires_grad_()
    for target in (indices(lane, x), make(torch.randn(shape, device=lane.device)).softmax(1)):
        loss = fF.cross_entropy(x, target, reduction="none", label_smoothing=0.1)
        expected = F.cross_entropy(x, target, reduction="none", label_smoothing=0.1)
        assert loss.stride() == expected.stride()
        torch.testing.assert_close(loss, expected)
        for grad in (torch.randn(loss.shape[::-1], device=lane.device).permute(*range(loss.dim())[::-1]),
                     torch.ones((), device=lane.device).expand(loss.shape)):  # fmt: skip
            (ours,) = torch.autograd.grad(loss, x, grad, retain_graph=True)
            (theirs,) = torch.autograd.grad(expected, x, grad, retain_graph=True)
            torch.testing.assert_close(ours, theirs)
    if make is channels_last:
        # the layout of the logits, which torch would not keep
        assert ours.is_contiguous(memory_format=torch.channels_last)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)


SPECIAL = [
    pytest.param([[300.0, -300.0, 0.0], [-300.0, -300.0, -299.0]], id="+-300"),
    pytest.param([[5.0, 5.0, 5.0], [0.0, 0.0, 0.0]], id="all equal"),
    pytest.param([[-torch.inf, 1.0, 2.0], [1.0, -torch.inf, 2.0]], id="-inf"),
    pytest.param([[-torch.inf] * 3, [1.0, 2.0, 3.0]], id="all -inf"),
    pytest.param([[1.0, 2.0, torch.inf], [1.0, 2.0, 3.0]], id="+inf"),
    pytest.param([[1.0, torch.nan, 2.0], [1.0, 2.0, 3.0]], id="nan"),
]


@pytest.mark.parametrize("target", [[1, 1], [0, -100], [-100, 2]])
@pytest.mark.parametrize("logits", SPECIAL)
def test_cross_entropy_special_logits(lane, logits, target):
    x = torch.tensor(logits, device=lane.device, requires_grad=True)
    target = torch.tensor(target, device=lane.device)
    for target_or_soft in (target, torch.tensor([[0.0, 0.25, 0.75], [0.5, 0.5, 0.0]], device=lane.device)):
        for smoothing in (0.0, 0.1):
            for reduction in ("none", "mean"):
                results = []
                for function in (fF.cross_entropy, F.cross_entropy):
                    loss = function(x, target_or_soft, reduction=reduction, label_smoothing=smoothing)
                    results.append((loss, *torch.autograd.grad(loss.sum(), x)))
                same(*results)


def test_cross_entropy_maximum_in_a_later_block(lane):
    # the first block of classes is all -inf, the maximum grows from block to block
    x = torch.full((2, 3000), -torch.inf, device=lane.device)
    x[0, 1024:2048] = -200.0
    x[0, 2048:] = 100.0
    x[1, 2999] = 7.0
    x.requires_grad_()
    target = torch.tensor([2500, 2999], device=lane.device)
    same(fF.cross_entropy(x, target, reduction="none"), F.cross_entropy(x, target, reduction="none"))


def test_cross_entropy_mean_of_nothing(lane):
    x = torch.randn(3, 4, device=lane.device, requires_grad=True)
    ignored = torch.full((3,), -100, device=lane.device)
    for weight, target in ((None, ignored), (torch.zeros(4, device=lane.device), indices(lane, x))):
        for smoothing in (0.0, 0.1):
            results = []
            for function in (fF.cross_entropy, F.cross_entropy):
                loss = function(x, target, weight, label_smoothing=smoothing)
                results.append((loss, *torch.autograd.grad(loss, x)))
            assert results[0][0].isnan()
            same(*results)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_cross_entropy_empty_batch(lane, reduction):
    x = torch.randn(0, 4, device=lane.device, requires_grad=True)
    for target in (torch.zeros(0, dtype=torch.int64, device=lane.device), torch.zeros(0, 4, device=lane.device)):
        loss, expected = (f(x, target, reduction=reduction) for f in (fF.cross_entropy, F.cross_entropy))
        assert loss.shape == expected.shape
        same(loss, expected)
        assert torch.autograd.grad(loss.sum(), x)[0].shape == (0, 4)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_cross_entropy_without_batch(lane, reduction):
    x = torch.randn(7, device=lane.device, requires_grad=True)
    for target in (torch.tensor(3), torch.tensor([3]), torch.tensor(-100), torch.rand(7)):
        target = target.to(lane.device)
        loss, expected = (f(x, target, reduction=reduction) for f in (fF.cross_entropy, F.cross_entropy))
        assert loss.shape == expected.shape
        same(loss, expected)
        if target.shape == (1,):  # torch 2.13 has no backward for it
            expected = F.cross_entropy(x, target[0], reduction=reduction)
        same(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


def test_cross_entropy_uint8_targets(lane):
    x = torch.randn(3, 200, device=lane.device)
    target = torch.tensor([0, 156, 199], dtype=torch.uint8, device=lane.device)
    same(fF.cross_entropy(x, target), F.cross_entropy(x, target))


@pytest.mark.parametrize("value", (5, -1, 2**33))
def test_cross_entropy_target_out_of_range(lane, value):
    x = torch.randn(3, 5, device=lane.device, requires_grad=True)
    target = torch.tensor([1, value, 2], device=lane.device)
    if lane.name != "gpu":
        with pytest.raises(IndexError, match=rf"target must be in \[0, 5\) or ignore_index \(-100\), got {value}"):
            fF.cross_entropy(x, target)
    # ignored, it is right
    same(fF.cross_entropy(x, target, ignore_index=value), F.cross_entropy(x, target.where(target != value, -100)))


@pytest.mark.parametrize("kind", (IndexError, ValueError))
def test_cross_entropy_target_out_of_range_on_pytorch(kind):
    for shape, target in (((3, 5), [0, 7, 1]), ((5,), 7), ((2, 5, 3), [[0, 1, 7], [0, 0, 0]])):
        with pytest.raises(kind, match=r"target must be in \[0, 5\) or ignore_index \(-100\), got 7"):
            fF.cross_entropy(torch.zeros(shape), torch.tensor(target))


def test_cross_entropy_no_class_is_nan_in_the_kernel(lane, monkeypatch):
    if lane.name == "cpu":
        return  # there it raises
    # as on a GPU, where nothing checks before the launch
    monkeypatch.setattr(ops, "_check_classes", lambda *_: None)
    if lane.name == "interpret":
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter.interpreter_builder, "create_assert", lambda *_: None)
    x = torch.randn(3, 5, device=lane.device, requires_grad=True)
    for value in (5, -1, 2**33):
        target = torch.tensor([1, value, 2], device=lane.device)
        for smoothing in (0.0, 0.1):
            loss = fF.cross_entropy(x, target, reduction="none", label_smoothing=smoothing)
            assert loss.isnan().tolist() == [False, True, False]
            assert torch.autograd.grad(loss.sum(), x)[0].isnan().any(1).tolist() == [False, True, False]
        assert fF.cross_entropy(x, target).isnan() and fF.cross_entropy(x, target, reduction="sum").isnan()


def test_cross_entropy_legacy_arguments(lane):
    x = torch.randn(4, 3, device=lane.device)
    target = indices(lane, x)
    for arguments in (dict(size_average=False), dict(reduce=False), dict(size_average=True, reduce=True)):
        with pytest.warns(UserWarning, match="size_average and reduce"):
            loss = fF.cross_entropy(x, target, **arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            same(loss, F.cross_entropy(x, target, **arguments))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_cross_entropy_under_autocast(lane, dtype):
    skip_half_on_cpu(lane, dtype)
    x = torch.randn(4, 9, device=lane.device).to(dtype).requires_grad_()
    soft = torch.randn(4, 9, device=lane.device).softmax(1).to(dtype)
    weight = torch.rand(9, device=lane.device) + 0.5
    with torch.autocast(lane.device.type, dtype=torch.bfloat16):
        for target, w in ((indices(lane, x), None), (soft, None), (indices(lane, x), weight.to(dtype))):
            loss, expected = (f(x, target, w, label_smoothing=0.1) for f in (fF.cross_entropy, F.cross_entropy))
            assert loss.dtype == expected.dtype
            same(loss, expected)
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.dtype == dtype


def test_cross_entropy_dtypes_of_probabilities(lane):
    skip_half_on_cpu(lane, torch.float16)
    x = torch.randn(4, 3, device=lane.device).half().requires_grad_()
    soft = torch.randn(4, 3, device=lane.device).softmax(1)
    loss, expected = (f(x, soft) for f in (fF.cross_entropy, F.cross_entropy))
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(NotImplementedError, match="computes in float64 from an input in torch.float16"):
        fF.cross_entropy(x, soft.double())


def test_cross_entropy_gradient_of_the_target_runs_on_pytorch(lane):
    x = torch.randn(4, 3, device=lane.device)
    soft = torch.randn(4, 3, device=lane.device).softmax(1).requires_grad_()
    with pytest.raises(NotImplementedError, match="gradient of the target"):
        fF.cross_entropy(x, soft)
    with pytest.raises(NotImplementedError, match="gradient of the weight"):
        fF.cross_entropy(x, soft.detach(), torch.ones(3, device=lane.device, requires_grad=True))


def test_cross_entropy_second_derivative(lane):
    x = torch.randn(3, 4, device=lane.device, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, -100, 3], device=lane.device)
    for reduction in ("mean", "none"):
        function = lambda x, reduction=reduction: fF.cross_entropy(x, target, reduction=reduction, label_smoothing=0.1)
        assert torch.autograd.gradcheck(function, (x,), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)


def test_cross_entropy_is_unchanged_by_a_shift_and_the_same_every_time(lane):
    x = torch.randint(-8, 8, (40, 100), device=lane.device).float()
    target = indices(lane, x)
    loss = fF.cross_entropy(x, target)
    assert torch.equal(loss, fF.cross_entropy(x, target)) and torch.equal(loss, fF.cross_entropy(x + 1024, target))


@pytest.mark.parametrize("shape", [(700, 65), (3, 20000), (2, 3, 30, 40)])
@pytest.mark.parametrize("soft", (False, True), ids=("indices", "probabilities"))
def test_cross_entropy_many_tasks_on_cpu(shape, soft):
    """Ragged last tasks and lanes, and the same bits from one thread and from two."""
    x = (torch.randn(shape) * 3).requires_grad_()
    target = torch.randn(shape).softmax(1) if soft else torch.randint(shape[1], (shape[0], *shape[2:]))
    weight, threads, results = torch.rand(shape[1]) + 0.2, torch.get_num_threads(), []
    with fastcnn.backend("cpu"), fastcnn.strict():
        check(x, target, weight, label_smoothing=0.1)
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                loss = fF.cross_entropy(x, target, weight)
                results.append((loss, *torch.autograd.grad(loss, x)))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_cross_entropy_on_cpu_is_ours_where_it_is_faster():
    cases = [((128, 10), {}, False), ((512, 2048), {}, True), ((512, 2048), {"label_smoothing": 0.1}, False)]
    cases += [((2, 512, 32, 32), {}, True), ((70000, 20), {}, False)]
    for shape, arguments, ours in cases:
        target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
        for requires_grad in (True, False):
            ops._op.calls.clear()
            fF.cross_entropy(torch.randn(shape, requires_grad=requires_grad), target, **arguments)
            expected = "cpu" if ours and requires_grad else "torch"
            assert [backend for backend, _ in ops._op.calls] == [expected], (shape, arguments)


def test_cross_entropy_compiles_without_graph_breaks(lane):
    x = torch.randn(4, 9, device=lane.device, requires_grad=True)
    target = indices(lane, x)
    compiled = torch.compile(lambda x: fF.cross_entropy(x * 2, target), fullgraph=True, backend="aot_eager")
    loss, expected = compiled(x), F.cross_entropy(x * 2, target)
    same(loss, expected)
    same(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize("shape, make", LAYOUTS[:2])
def test_cross_entropy_registration(lane, shape, make):
    x = make(torch.randn(shape, device=lane.device))
    weight = torch.rand(x.shape[1], device=lane.device)
    for target, reduction in ((indices(lane, x), "none"), (torch.rand_like(x), "none")):
        how = (reduction, -100, 0.1)
        backend = "cpu" if lane.name == "cpu" else "triton"
        arguments = (x, target, weight, *how, torch.float32, backend)
        torch.library.opcheck(ops._forward, arguments)
        loss, lse, mass, total = ops._forward(*arguments)
        torch.library.opcheck(ops._backward, (loss, x, target, weight, lse, mass, total, *how, backend))


X, T = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
REFUSED = [
    (TypeError, "input must be a torch.Tensor, got list", dict(input=[1.0])),
    (TypeError, "input must have a floating-point dtype, got torch.int64", dict(input=X.long())),
    (ValueError, "input must have at least 1 dimension", dict(input=torch.zeros(()))),
    (TypeError, "target must be a torch.Tensor, got int", dict(target=1)),
    (ValueError, r"target must have shape \(2,\) \(class indices\) or \(2, 3\).*got \(1,\)", dict(target=T[:1])),
    (TypeError, "target must hold class indices in torch.int64 or torch.uint8, got torch.int32", dict(target=T.int())),
    (TypeError, "so it must hold floating-point probabilities, got torch.int64", dict(target=X.long())),
    (ValueError, "ignore_index is for class indices", dict(target=X, ignore_index=1)),
    (ValueError, r"weight must have one value for each of 3 classes, got shape \(4,\)", dict(weight=torch.ones(4))),
    (TypeError, r"weight must have the dtype of input \(torch.float32\), got torch.float16",
     dict(weight=torch.ones(3).half())),
    (ValueError, "average is not a valid value for reduction", dict(reduction="average")),
    (ValueError, "label_smoothing must be between 0.0 and 1.0, got 1.5", dict(label_smoothing=1.5)),
    (ValueError, "label_smoothing must be between 0.0 and 1.0, got nan", dict(label_smoothing=float("nan"))),
    (TypeError, "label_smoothing must be a number, got None", dict(label_smoothing=None)),
    (TypeError, "ignore_index must be an int, got 0.5", dict(ignore_index=0.5)),
]  # fmt: skip


@pytest.mark.parametrize("error, message, changed", REFUSED, ids=[message[:40] for _, message, _ in REFUSED])
def test_cross_entropy_refuses_bad_arguments(error, message, changed):
    with pytest.raises(error, match=message):
        fF.cross_entropy(**(dict(input=X, target=T) | changed))
