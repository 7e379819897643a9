import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn import nn
from fastcnn.ops.dropout import dropout_forward
from fastcnn.ops.feature_dropout import (
    FeatureDropoutFunction,
    feature_dropout_forward,
    feature_dropout_forward_,
    feature_dropout_reference,
)
from fastcnn.testing import assert_matches

LANES = ("triton", "cpu")
SEED = 0x299F31D0A4093822


def backend_of(lane):
    return "cpu" if lane.name == "cpu" else "triton"


def seed_on(lane, value=SEED):
    return torch.tensor(value, device=lane.device)


def apply(lane, x, leading=2, residual=None, p=0.3, seed=SEED):
    return FeatureDropoutFunction.apply(x, residual, seed_on(lane, seed), p, leading, False, backend_of(lane))


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


CASES = {
    "contiguous": ((3, 5, 7, 3), lambda x: x),
    "contiguous, two tiles a plane": ((2, 3, 47, 45), lambda x: x),
    "channels_last in fours": ((3, 68, 5, 7), channels_last),
    "channels_last, odd channels": ((3, 67, 5, 7), channels_last),
    "channels_last, 2 channels": ((2, 2, 3, 3), channels_last),
    "channels_last, 1 channel": ((5, 1, 4, 3), channels_last),
    "channels_last, many tiles": ((1, 4, 70, 40), channels_last),
    "1 pixel": ((9, 300, 1, 1), lambda x: x),
    "1 image": ((1, 9, 4, 4), channels_last),
    "3-D": ((4, 7, 9), lambda x: x),
    "5-D channels_last": ((2, 6, 3, 2, 4), lambda x: x.to(memory_format=torch.channels_last_3d)),
    "2-D": ((5, 1030), lambda x: x),
    "another order": ((3, 4, 5, 6), lambda x: x.permute(3, 1, 0, 2)),
    "slice": ((4, 6, 5, 3), lambda x: x[:, ::2, 1:]),
    "slice of channels_last": ((2, 8, 4, 4), lambda x: channels_last(x)[:, 1:4]),
    "expanded": ((1, 6, 5), lambda x: x.expand(3, -1, -1)),
}


@pytest.mark.parametrize("leading", (0, 1, 2))
@pytest.mark.parametrize("case", CASES)
def test_feature_dropout_matches_the_reference(lane, case, leading):
    shape, make = CASES[case]
    x = make(torch.randn(shape, device=lane.device))
    residual = torch.randn(x.shape, device=lane.device)
    for seed in (0, -1, SEED):
        for r in (None, residual)[: 1 if leading == 2 else 2]:
            y = feature_dropout_forward(x, r, seed_on(lane, seed), 0.3, leading, backend_of(lane))
            expected = feature_dropout_reference(x, r, seed_on(lane, seed), 0.3, leading)
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
            assert r is not None or torch.equal(y == 0, expected == 0)
            assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("leading", (1, 2))
def test_feature_dropout_values_and_gradients(lane, dtype, layout, leading):
    if lane.name == "cpu" and dtype.itemsize == 2:
        pytest.skip("PyTorch runs fp16 and bf16 on CPU")
    x, residual = (torch.randn(5, 12, 3, 5, device=lane.device).to(dtype).contiguous(memory_format=layout)
                   for _ in range(2))  # fmt: skip
    residual = residual.requires_grad_() if leading == 1 else None
    assert_matches(
        lambda x, r: apply(lane, x, leading, r),
        lambda x, r: feature_dropout_reference(x, r, seed_on(lane), 0.3, leading),
        x.requires_grad_(),
        residual,
    )


def test_the_stream_is_that_of_dropout_on_as_many_elements_as_channels(lane):
    for x in (torch.ones(7, 33, 2, 3, device=lane.device), channels_last(torch.ones(7, 36, 2, 3, device=lane.device))):
        y = feature_dropout_forward(x, None, seed_on(lane), 0.5, 2, backend_of(lane))
        ones = torch.ones(x.shape[:2], device=lane.device)
        assert torch.equal(y[:, :, 0, 0], dropout_forward(ones, seed_on(lane), 0.5, backend_of(lane)))


def test_feature_dropout_special_values(lane):
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e38], device=lane.device)
    for p in (0.5, 1.0, 1e-7, 1 - 1e-7):
        for leading in (0, 1, 2):
            x = values.repeat(40, 10, 1)
            y = apply(lane, x, leading, None, p)
            expected = feature_dropout_reference(x, None, seed_on(lane), p, leading)
            torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-6, atol=0)


def test_feature_dropout_gradcheck(lane):
    x = torch.randn(3, 3, 2, 2, device=lane.device, dtype=torch.float64, requires_grad=True)
    r = torch.randn(3, 3, 2, 2, device=lane.device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, r: apply(lane, x, 1, r), (x, r), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: apply(lane, x), x, fast_mode=True)


@pytest.mark.parametrize("make", [lambda g: g, lambda g: g.transpose(2, 3), lambda g: g[:1].expand(4, -1, -1, -1)])
@pytest.mark.parametrize("last", (False, True))
def test_feature_dropout_gradient_of_any_layout(lane, make, last):
    x = torch.randn(4, 3, 6, 6, device=lane.device)
    x = (channels_last(x) if last else x).requires_grad_()
    grad = make(torch.randn(4, 3, 6, 6, device=lane.device))
    (ours,) = torch.autograd.grad(apply(lane, x), x, grad)
    torch.testing.assert_close(ours, feature_dropout_reference(grad, None, seed_on(lane), 0.3, 2))
    assert not last or ours.is_contiguous(memory_format=torch.channels_last)


def test_feature_dropout_opcheck(lane):
    base = torch.randn(2, 3, 4, 4, device=lane.device)
    for x in (base, channels_last(base), base[:, ::2], base[:0]):
        for leading, residual in ((2, None), (1, x), (0, None)):
            arguments = (x, residual, seed_on(lane), 0.5, leading, backend_of(lane))
            torch.library.opcheck(torch.ops.fastcnn.feature_dropout.default, arguments)
    arguments = (base.clone(), seed_on(lane), 0.5, 2, backend_of(lane))
    torch.library.opcheck(torch.ops.fastcnn.feature_dropout_.default, arguments)


def test_host_function_takes_every_layout_in_place(lane):
    for x in (
        channels_last(torch.ones(2, 4, 4, 4)),
        torch.ones(2, 5, 3, 4),
        torch.ones(2, 3, 4, 5).permute(3, 1, 0, 2),
    ):
        x = x.to(lane.device)
        expected = feature_dropout_forward(x, None, seed_on(lane), 0.5, 2, backend_of(lane))
        feature_dropout_forward_(x, seed_on(lane), 0.5, 2, backend_of(lane))
        assert torch.equal(x, expected)


SHAPES = {"dropout1d": (9, 7, 5), "dropout2d": (9, 7, 5, 3), "dropout3d": (9, 7, 3, 2, 2)}


@pytest.mark.parametrize("name", SHAPES)
def test_whole_channels_are_dropped(lane, name):
    for shape in (SHAPES[name], SHAPES[name][1:]):
        if name == "dropout2d" and len(shape) == 3:
            continue
        x = torch.randn(shape, device=lane.device, requires_grad=True)
        y = getattr(fF, name)(x, 0.5)
        factors = y / x
        planes = factors.flatten(2 if len(shape) == len(SHAPES[name]) else 1)
        assert ((planes == planes[..., :1]) | (planes - 2).abs().lt(1e-6)).all()
        assert 0 < int((planes[..., 0] == 0).sum()) < planes[..., 0].numel()
        (grad,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(grad, factors)


def test_inputs_without_batch_dimension_as_torch(lane):
    with pytest.warns(UserWarning, match=r"shape \(3, 4, 5\) as \(N, C, ...\)"):
        y = fF.dropout2d(torch.ones(3, 4, 5, device=lane.device))
    assert (y == y[:, :, :1]).all()
    with pytest.warns(UserWarning, match=r"shape \(30, 4\) as \(C, ...\)"):
        y = fF.dropout3d(torch.ones(30, 4, device=lane.device))
    assert (y == y[:, :1]).all() and 0 < int(y[:, 0].count_nonzero()) < 30
    for function, x in ((fF.dropout1d, torch.ones(2)), (fF.dropout2d, torch.ones(2)), (fF.dropout3d, torch.ones(()))):
        with pytest.raises(ValueError, match="input must"):
            function(x)


@pytest.mark.parametrize("last", (False, True))
def test_dropout2d_in_place(lane, last):
    leaf = torch.randn(4, 6, 4, 4, device=lane.device)
    leaf = (channels_last(leaf) if last else leaf).requires_grad_()
    x = leaf * 1
    torch.manual_seed(3)
    y = fF.dropout2d(x, 0.5, inplace=True)
    assert y is x
    torch.manual_seed(3)
    expected = fF.dropout2d(leaf, 0.5)
    assert torch.equal(y, expected) and bool((y == 0).any())
    ours, theirs = (torch.autograd.grad((t * t).sum(), leaf)[0] for t in (y, expected))
    assert torch.equal(ours, theirs)
    with pytest.raises(NotImplementedError, match="in place needs contiguous or channels_last memory"):
        fF.dropout2d(torch.ones(2, 4, 4, 4, device=lane.device)[:, ::2], inplace=True)
    unbatched = torch.ones(40, 3, device=lane.device)
    assert fF.dropout1d(unbatched, inplace=True) is unbatched and bool((unbatched == 0).any())


@pytest.mark.parametrize("name", SHAPES)
def test_identity_returns_its_input(lane, name):
    x = torch.randn(SHAPES[name], device=lane.device)
    state = torch.get_rng_state()
    function = getattr(fF, name)
    assert function(x, 0.5, False) is x and function(x, 0.0) is x and function(x[:0]).shape == x[:0].shape
    assert torch.equal(torch.get_rng_state(), state)
    assert not function(x, 1.0).any()


def test_feature_dropout_follows_the_generator(lane):
    x = torch.ones(50, 70, 2, 2, device=lane.device)
    torch.manual_seed(7)
    first, second = fF.dropout2d(x), fF.dropout2d(x)
    torch.manual_seed(7)
    assert torch.equal(fF.dropout2d(x), first) and not torch.equal(first, second)


N, C = 512, 256


@pytest.mark.parametrize("p", (0.5, 0.1))
def test_feature_dropout_statistics(lane, p):
    # 6 sigma: a right stream fails one of these in 10^8 runs
    y = torch.ones(N, C, device=lane.device)
    feature_dropout_forward_(y, seed_on(lane), p, 2, backend_of(lane))
    mask = (y != 0).double().cpu()
    z = (mask - (1 - p)) / (p * (1 - p)) ** 0.5
    assert abs(float(z.mean())) < 6 / (N * C) ** 0.5
    # rows and columns each keep their share: chi-square with as many degrees of freedom, its deviation sqrt(2 n)
    for dim, length, count in ((0, N, C), (1, C, N)):
        chi_square = float((z.sum(dim) ** 2 / length).sum())
        assert abs(chi_square - count) < 6 * (2 * count) ** 0.5
    # neighbours in the batch and among the channels draw independently
    for a, b in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z[:, 4:], z[:, :-4])):
        assert abs(float((a * b).mean())) < 6 / a.numel() ** 0.5


def test_dropout2d_refuses_bad_arguments():
    x = torch.ones(3, 2, 2, 2)
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"has to be between 0 and 1, but got"):
            fF.dropout2d(x, p)
    with pytest.raises(TypeError, match="p must be a float, got '0.5'"):
        fF.dropout2d(x, "0.5")
    with pytest.raises(TypeError, match="input must be a torch.Tensor, got list"):
        fF.dropout2d([1.0])
    with pytest.raises(TypeError, match="input must have a floating-point dtype, got torch.int64"):
        fF.dropout2d(x.long())
    with pytest.raises(TypeError, match="training must be a bool, got 1"):
        fF.dropout2d(x, 0.5, 1)


@pytest.mark.parametrize("name", ("Dropout1d", "Dropout2d", "Dropout3d"))
def test_modules_are_torchs(name):
    module = getattr(nn, name)(0.3)
    assert isinstance(module, getattr(torch.nn, name)) and repr(module) == repr(getattr(torch.nn, name)(0.3))
    x = torch.ones(SHAPES[name.lower()])
    assert bool((module(x) == 0).any()) and module.eval()(x) is x


def test_dropout2d_under_vmap_is_torchs():
    with fastcnn.backend("auto"):
        y = torch.func.vmap(lambda x: fF.dropout2d(x, 0.5), randomness="different")(torch.ones(4, 5, 100, 1, 1))
    assert set(y.flatten().tolist()) == {0.0, 2.0}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("dropout", "dropout2d", "stochastic_depth"))
def test_graph_replays_draw_anew(name):
    """And the same again after re-seeding; forward and backward of a replay agree."""
    x = torch.ones(64, 32, 8, 8, device="cuda", requires_grad=True)
    function = getattr(fF, name)
    with fastcnn.backend("triton"), fastcnn.strict():
        torch.autograd.grad(function(x, 0.5).sum(), x)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = function(x, 0.5)
            (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))

        def replays():
            torch.cuda.manual_seed(5)
            results = []
            for _ in range(3):
                graph.replay()
                assert torch.equal(grad, y.detach())
                results.append(y.detach().clone())
            return results

        first, again = replays(), replays()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def test_reference_scales_as_torch():
    torch.manual_seed(0)
    assert set(F.dropout2d(torch.ones(20, 20, 1, 1), 0.2).flatten().tolist()) == {0.0, 1.25}
    reference = feature_dropout_reference(torch.ones(20, 20, 1, 1), None, torch.tensor(3), 0.2, 2)
    assert set(reference.flatten().tolist()) == {0.0, 1.25}
