import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops import adaptive_avg_pool2d as op
from fastcnn.ops import pooling
from fastcnn.testing import assert_matches

CASES = {
    # shape, channels_last, output_size
    "overlapping parts": ((2, 3, 13, 17), False, (6, 5)),
    "overlapping parts channels_last": ((2, 5, 13, 17), True, (6, 5)),
    "parts of equal size": ((1, 3, 12, 15), False, (4, 3)),
    "identity": ((1, 33, 7, 7), True, 7),
    "larger than the input": ((2, 3, 4, 3), False, (7, 9)),
    "larger than the input channels_last": ((2, 5, 4, 3), True, (5, 4)),
    "None": ((2, 3, 6, 5), False, (None, 3)),
    "one row": ((1, 130, 9, 4), True, (1, 4)),
    "global": ((3, 5, 7, 7), False, 1),
    "global channels_last": ((3, 5, 7, 7), True, 1),
    "global, many pixels": ((1, 3, 31, 37), False, (1, 1)),
    "global, many pixels channels_last": ((2, 3, 31, 37), True, (1, 1)),
    "global, many channels": ((2, 300, 3, 2), False, 1),
    "global, many channels channels_last": ((2, 300, 3, 2), True, 1),
    "global unbatched": ((4, 9, 10), False, 1),
    "global of one pixel": ((2, 3, 1, 1), True, 1),
    "unbatched": ((4, 9, 10), False, (2, 3)),
}


def make(shape, channels_last=False, device="cpu", dtype=torch.float32):
    x = torch.randn(shape, device=device).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.parametrize("case", CASES)
def test_adaptive_avg_pool2d_matches_torch(lane, case):
    shape, channels_last, size = CASES[case]
    x = make(shape, channels_last, lane.device).requires_grad_()
    assert_matches(lambda x: fF.adaptive_avg_pool2d(x, size), lambda x: F.adaptive_avg_pool2d(x, size), x)
    y = fF.adaptive_avg_pool2d(x, size)
    assert y.stride() == F.adaptive_avg_pool2d(x, size).stride()
    # torch's global pooling forgets the layout here; ours keeps it
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, (3, 4)])
def test_adaptive_avg_pool2d_dtypes(lane, dtype, size):
    for channels_last in (False, True):
        x = make((2, 9, 10, 11), channels_last, lane.device, dtype).requires_grad_()
        assert_matches(lambda x: fF.adaptive_avg_pool2d(x, size), lambda x: F.adaptive_avg_pool2d(x, size), x)
    # a sum of half-precision numbers beyond their range
    if dtype == torch.float16:
        x = torch.full((1, 1, 8, 8), 60000.0, dtype=dtype, device=lane.device)
        assert (fF.adaptive_avg_pool2d(x, size) == 60000).all()


@pytest.mark.parametrize("size", [1, (5, 4)])
def test_adaptive_avg_pool2d_special_values(lane, size):
    for channels_last in (False, True):
        x = make((2, 3, 9, 9), channels_last, lane.device)
        x[0, 0, 6, 6] = torch.nan
        x[0, 1, 7, 7] = torch.inf
        x.requires_grad_()
        y, expected = fF.adaptive_avg_pool2d(x, size), F.adaptive_avg_pool2d(x, size)
        torch.testing.assert_close(y, expected, equal_nan=True)
        grad = torch.randn_like(y)
        grad[0, 0, 0, 0] = torch.nan
        grad[1, 1, 0, 0] = -torch.inf
        ours, theirs = (torch.autograd.grad(out, x, grad)[0] for out in (y, expected))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, ::2, 1:, ::2], id="slice"),
        pytest.param(lambda x: x.to(memory_format=torch.channels_last)[:, 1:4, :, 2:], id="channels_last slice"),
        pytest.param(lambda x: x[:1].expand(3, -1, -1, -1), id="expanded batch"),
        pytest.param(lambda x: x.transpose(2, 3), id="transposed"),
        pytest.param(lambda x: x.transpose(1, 3), id="transposed channels"),
        pytest.param(lambda x: x[0].permute(1, 2, 0), id="unbatched permuted"),
        pytest.param(lambda x: x[:0], id="empty batch"),
    ],
)
def test_adaptive_avg_pool2d_layouts(lane, view):
    x = view(torch.randn(2, 6, 11, 9, device=lane.device)).detach().requires_grad_()
    for size in ((4, 2), 1):
        y, expected = fF.adaptive_avg_pool2d(x, size), F.adaptive_avg_pool2d(x, size)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        for grad in (
            torch.randn(expected.mT.shape, device=lane.device).mT,
            torch.ones_like(y[..., :1]).expand(y.shape),
        ):
            ours, theirs = (torch.autograd.grad(out, x, grad, retain_graph=True)[0] for out in (y, expected))
            torch.testing.assert_close(ours, theirs)


def test_adaptive_avg_pool2d_of_no_size(lane):
    x = torch.randn(2, 3, 4, 4, device=lane.device, requires_grad=True)
    y = fF.adaptive_avg_pool2d(x, (0, 3))
    assert y.shape == (2, 3, 0, 3)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(x))
    x = x.detach()[:, :0].requires_grad_()
    y = fF.adaptive_avg_pool2d(x, 2)
    assert y.shape == (2, 0, 2, 2) and torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_adaptive_avg_pool2d_saves_nothing(lane):
    x = torch.randn(2, 4, 16, 16, device=lane.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("saved a tensor"), lambda t: t):
        fF.adaptive_avg_pool2d(x, 3)
        fF.adaptive_avg_pool2d(x, 1)


@pytest.mark.parametrize("size", [1, (3, 4)])
def test_adaptive_avg_pool2d_second_derivative(lane, size):
    x = torch.randn(1, 1, 4, 5, device=lane.device, dtype=torch.float64, requires_grad=True)

    def cubed(x):
        return fF.adaptive_avg_pool2d(x, size) ** 3

    assert torch.autograd.gradcheck(cubed, x)
    assert torch.autograd.gradgradcheck(cubed, x)


@pytest.mark.parametrize("channels_last", [False, True])
def test_adaptive_avg_pool2d_64_bit_variant(lane, channels_last, monkeypatch):
    monkeypatch.setattr(pooling, "parts_exceed_int32", lambda *arguments: True)
    x = make((2, 5, 9, 10), channels_last, lane.device).requires_grad_()
    for size in (1, (4, 3)):
        assert_matches(
            lambda x, size=size: fF.adaptive_avg_pool2d(x, size), lambda x, size=size: F.adaptive_avg_pool2d(x, size), x
        )


def test_adaptive_avg_pool2d_above_32_bit_offsets(lane, monkeypatch):
    # few elements, far apart: on a CPU only the pages they lie in become real
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    x = torch.empty(3 * 2**30 + 8, device=lane.device).as_strided((4, 2, 2, 2), (2**30, 4, 2, 1))
    x.copy_(torch.arange(32, device=lane.device).view(4, 2, 2, 2))
    assert fF.adaptive_avg_pool2d(x, 1).flatten().tolist() == [1.5 + 4 * i for i in range(8)]
    assert fF.adaptive_avg_pool2d(x, (2, 1)).flatten().tolist() == [0.5 + 2 * i for i in range(16)]


def test_adaptive_avg_pool2d_refuses_bad_arguments():
    x = torch.zeros(1, 2, 4, 4)
    for error, message, input, size in [
        (ValueError, "input must be 3-D or 4-D, got 2-D", x[0, 0], 2),
        (ValueError, "input must have rows and columns, got shape \\(1, 2, 0, 4\\)", x[:, :, :0], 2),
        (ValueError, "output_size must be an int or a pair, got \\(\\)", x, ()),
        (ValueError, "output_size must be an int or a pair, got \\(5,\\)", x, (5,)),
        (ValueError, "output_size must be at least 0, got .-1, 0.", x, (-1, 0)),
        (TypeError, "output_size must be an int or a pair of ints, got 2.0", x, 2.0),
        (TypeError, "output_size must be an int or a pair of ints, got None", x, None),
    ]:
        with pytest.raises(error, match=message):
            fF.adaptive_avg_pool2d(input, size)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adaptive_avg_pool2d_global_on_cpu(channels_last, dtype):
    with fastcnn.backend("cpu"), fastcnn.strict():
        for shape in ((2, 5, 7, 9), (3, 40, 1, 6), (1, 1, 1, 1)):
            x = make(shape, channels_last, dtype=dtype).requires_grad_()
            assert_matches(lambda x: fF.adaptive_avg_pool2d(x, 1), lambda x: F.adaptive_avg_pool2d(x, 1), x)
            y = fF.adaptive_avg_pool2d(x, 1)
            assert y.stride() == F.adaptive_avg_pool2d(x, 1).stride()
            (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
            assert grad.stride() == x.stride()
        with pytest.raises(NotImplementedError, match="that of global pooling"):
            fF.adaptive_avg_pool2d(x, 2)
    with fastcnn.backend("auto"):
        large = torch.zeros(1, 32, 512, 512)
        assert "without a backward" in op._why_not("cpu", large, [1, 1])
        assert op._why_not("cpu", large.requires_grad_(), [1, 1]) is None
        assert "2^23 elements" in op._why_not("cpu", large[:, :31], [1, 1])
