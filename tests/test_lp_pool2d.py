import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops import common
from fastcnn.testing import assert_matches

CASES = {
    # shape, channels_last, arguments
    "2x2, odd size": ((2, 3, 13, 17), False, dict(norm_type=2, kernel_size=2)),
    "3x3 stride 2 channels_last": ((1, 33, 11, 12), True, dict(norm_type=2, kernel_size=3, stride=2)),
    "cubes": ((2, 3, 9, 8), False, dict(norm_type=3, kernel_size=(3, 2), stride=(1, 2))),
    "sum": ((2, 3, 9, 8), False, dict(norm_type=1, kernel_size=3)),
    "ceil": ((2, 3, 8, 9), False, dict(norm_type=2, kernel_size=3, stride=2, ceil_mode=True)),
    "ceil channels_last": ((2, 5, 8, 9), True, dict(norm_type=1.5, kernel_size=3, stride=2, ceil_mode=True)),
    "seventh power": ((1, 2, 6, 6), False, dict(norm_type=7, kernel_size=2)),
    "sixth power": ((1, 2, 6, 6), False, dict(norm_type=6, kernel_size=2)),
    "square root": ((1, 2, 6, 6), False, dict(norm_type=0.5, kernel_size=2)),
    "harmonic": ((1, 2, 6, 6), False, dict(norm_type=-1, kernel_size=2)),
    "largest": ((2, 3, 7, 8), False, dict(norm_type=float("inf"), kernel_size=2)),
    "smallest": ((2, 3, 7, 8), True, dict(norm_type=-float("inf"), kernel_size=3, stride=2)),
    "7x6 window: loops": ((1, 2, 12, 13), False, dict(norm_type=2, kernel_size=(7, 6), stride=(2, 1))),
    "unbatched": ((4, 9, 10), False, dict(norm_type=2, kernel_size=3, stride=2)),
    "empty batch": ((0, 3, 5, 5), False, dict(norm_type=2, kernel_size=2)),
}


def make(shape, channels_last=False, device="cpu", dtype=torch.float32, positive=True):
    x = torch.randn(shape, device=device)
    x = (x.abs() + 0.1 if positive else x).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.parametrize("case", CASES)
def test_lp_pool2d_matches_torch(lane, case):
    shape, channels_last, arguments = CASES[case]
    positive = arguments["norm_type"] not in (1, 2, 6, float("inf"), -float("inf"))
    x = make(shape, channels_last, lane.device, positive=positive).requires_grad_()
    assert_matches(lambda x: fF.lp_pool2d(x, **arguments), lambda x: F.lp_pool2d(x, **arguments), x)
    y, expected = fF.lp_pool2d(x, **arguments), F.lp_pool2d(x, **arguments)
    assert y.stride() == expected.stride()
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("norm_type", [1, 2, 3, 1.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_lp_pool2d_dtypes(lane, dtype, norm_type):
    for channels_last in (False, True):
        x = make((2, 9, 10, 11), channels_last, lane.device, dtype).requires_grad_()
        assert_matches(
            lambda x: fF.lp_pool2d(x, norm_type, 3, 2, True), lambda x: F.lp_pool2d(x, norm_type, 3, 2, True), x
        )


@pytest.mark.parametrize("norm_type", [1, 2, 3, 2.5])
def test_lp_pool2d_special_values(lane, norm_type):
    x = make((1, 2, 12, 12), False, lane.device, positive=False)
    x[0, 0, :5, :5] = 0  # sums of zero: no gradient
    x[0, 0, 6, 6:9] = torch.nan
    x[0, 1, 7:9, 7] = torch.tensor([torch.inf, -torch.inf])
    x[0, 1, 0, 0] = -0.0
    x[0, 1, 2:4, 2:4] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    x.requires_grad_()
    y, expected = fF.lp_pool2d(x, norm_type, 2), F.lp_pool2d(x, norm_type, 2)
    torch.testing.assert_close(y, expected, equal_nan=True)
    grad = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, x, grad)[0] for out in (y, expected))
    # infinity over infinity is NaN or infinite by the order of factors; the rest agrees
    finite = torch.isfinite(theirs)
    torch.testing.assert_close(ours[finite], theirs[finite])
    assert (ours[0, 0, :4, :4] == 0).all()
    if norm_type > 1:
        assert torch.isnan(ours[0, 0, 6, 6:9]).all()


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, ::2, 1:, ::2], id="slice"),
        pytest.param(lambda x: x.to(memory_format=torch.channels_last)[:, 1:4, :, 2:], id="channels_last slice"),
        pytest.param(lambda x: x[:1].expand(3, -1, -1, -1), id="expanded batch"),
        pytest.param(lambda x: x.transpose(1, 3), id="transposed channels"),
        pytest.param(lambda x: x[0].permute(1, 2, 0), id="unbatched permuted"),
    ],
)
def test_lp_pool2d_layouts(lane, view):
    x = view(torch.randn(2, 6, 11, 9, device=lane.device)).detach().requires_grad_()
    y, expected = fF.lp_pool2d(x, 2, 3, 2), F.lp_pool2d(x, 2, 3, 2)
    torch.testing.assert_close(y, expected)
    for grad in (torch.randn(y.mT.shape, device=lane.device).mT, torch.ones_like(y[..., :1]).expand(y.shape)):
        ours, theirs = (torch.autograd.grad(out, x, grad, retain_graph=True)[0] for out in (y, expected))
        torch.testing.assert_close(ours, theirs)


def test_lp_pool2d_saves_input_and_output(lane):
    x = torch.randn(2, 4, 16, 16, device=lane.device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fF.lp_pool2d(x, 2, 2)
    assert sum(t.numel() * t.element_size() for t in saved) == 4 * 2 * 4 * (16 * 16 + 8 * 8)


def test_lp_pool2d_second_derivative(lane):
    x = make((1, 1, 4, 5), dtype=torch.float64, device=lane.device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fF.lp_pool2d(x, 3, 2, 1), x)
    assert torch.autograd.gradgradcheck(lambda x: fF.lp_pool2d(x, 3, 2, 1), x)


@pytest.mark.parametrize("channels_last", [False, True])
def test_lp_pool2d_64_bit_variant(lane, channels_last, monkeypatch):
    monkeypatch.setattr(common, "exceeds_int32", lambda *tensors: True)
    x = make((2, 5, 9, 10), channels_last, lane.device).requires_grad_()
    assert_matches(lambda x: fF.lp_pool2d(x, 2, 3, 2), lambda x: F.lp_pool2d(x, 2, 3, 2), x)


def test_lp_pool2d_module_and_errors():
    x = torch.rand(1, 2, 6, 4)
    assert torch.equal(fastcnn.nn.LPPool2d(2, 3, 1)(x), F.lp_pool2d(x, 2.0, 3, 1))
    for error, message, arguments in [
        (TypeError, "norm_type must be an int or a float, got '2'", ("2", 2)),
        (ValueError, "norm_type must be a number other than 0, got 0", (0, 2)),
        (TypeError, "kernel_size must be an int or a pair of ints, got 2.0", (2, 2.0)),
        (ValueError, "kernel_size \\(7, 7\\) .* is too large for an input of \\(6, 4\\)", (2, 7)),
        (TypeError, "ceil_mode must be a bool, got 1", (2, 2, 2, 1)),
    ]:
        with pytest.raises(error, match=message):
            fF.lp_pool2d(x, *arguments)
