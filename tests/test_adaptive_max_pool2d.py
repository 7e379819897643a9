import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops import pooling
from fastcnn.testing import assert_matches

CASES = {
    # shape, channels_last, output_size
    "overlapping parts": ((2, 3, 13, 17), False, (6, 5)),
    "overlapping parts channels_last": ((2, 5, 13, 17), True, (6, 5)),
    "parts of equal size": ((1, 3, 12, 15), False, (4, 3)),
    "identity": ((1, 33, 7, 7), True, 7),
    "larger than the input": ((2, 3, 4, 3), False, (7, 9)),
    "None": ((2, 3, 6, 5), False, (None, 3)),
    "one row": ((1, 130, 9, 4), True, (1, 4)),
    "parts of more than 256 pixels": ((1, 3, 40, 41), False, (2, 2)),
    "global": ((3, 5, 7, 7), False, 1),
    "global channels_last": ((3, 5, 7, 7), True, 1),
    "global, many pixels": ((1, 3, 31, 37), False, (1, 1)),
    "global, many pixels channels_last": ((2, 3, 31, 37), True, (1, 1)),
    "global, many channels channels_last": ((2, 300, 3, 2), True, 1),
    "global of one pixel": ((2, 3, 1, 1), True, 1),
    "unbatched": ((4, 9, 10), False, (2, 3)),
    "empty batch": ((0, 3, 5, 5), False, 2),
}


def make(shape, channels_last=False, device="cpu", dtype=torch.float32):
    x = torch.randn(shape, device=device).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.parametrize("case", CASES)
def test_adaptive_max_pool2d_matches_torch(lane, case):
    shape, channels_last, size = CASES[case]
    values = make(shape, channels_last, lane.device)
    # small integers: ties everywhere
    for x in (values, values.round()):
        x.requires_grad_()
        y, indices = fF.adaptive_max_pool2d(x, size, return_indices=True)
        expected, expected_indices = F.adaptive_max_pool2d(x, size, return_indices=True)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        assert torch.equal(indices, expected_indices) and indices.dtype == torch.int64
        grad = torch.randn_like(y)
        ours, theirs = (torch.autograd.grad(out, x, grad)[0] for out in (y, expected))
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, (3, 4)])
def test_adaptive_max_pool2d_dtypes(lane, dtype, size):
    for channels_last in (False, True):
        x = make((2, 9, 10, 11), channels_last, lane.device, dtype).requires_grad_()
        # torch adds in half precision where parts overlap: compare with it in fp32
        y, expected = fF.adaptive_max_pool2d(x, size), F.adaptive_max_pool2d(x.float(), size)
        assert torch.equal(y.float(), expected.float())
        assert_matches(
            lambda x: fF.adaptive_max_pool2d(x, size),
            lambda x: F.adaptive_max_pool2d(x.double(), size).to(x.dtype) if x.dtype.itemsize == 2 else
            F.adaptive_max_pool2d(x, size),
            x,
        )  # fmt: skip


@pytest.mark.parametrize("size", [1, (3, 4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_adaptive_max_pool2d_special_values(lane, channels_last, size):
    x = make((2, 3, 9, 40), channels_last, lane.device)
    x[0, 0] = -torch.inf  # parts of nothing else
    x[0, 1, 6, [3, 20, 39]] = torch.nan
    x[0, 2, 7, 7] = torch.inf
    x[1, 0, 8, 39] = torch.nan
    x.requires_grad_()
    y, indices = fF.adaptive_max_pool2d(x, size, return_indices=True)
    expected, expected_indices = F.adaptive_max_pool2d(x, size, return_indices=True)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert torch.equal(indices, expected_indices)
    grad = torch.randn_like(y)
    grad[0, 0, 0, 0] = torch.nan
    ours, theirs = (torch.autograd.grad(out, x, grad)[0] for out in (y, expected))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


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
def test_adaptive_max_pool2d_layouts(lane, view):
    x = view(torch.randn(2, 6, 11, 9, device=lane.device)).detach().requires_grad_()
    for size in ((4, 2), 1):
        y, expected = fF.adaptive_max_pool2d(x, size), F.adaptive_max_pool2d(x, size)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        for grad in (torch.randn(y.mT.shape, device=lane.device).mT, torch.ones_like(y[..., :1]).expand(y.shape)):
            ours, theirs = (torch.autograd.grad(out, x, grad, retain_graph=True)[0] for out in (y, expected))
            torch.testing.assert_close(ours, theirs)


def test_adaptive_max_pool2d_saves_taps_alone(lane):
    x = torch.randn(2, 4, 34, 34, device=lane.device, requires_grad=True)
    for size, expected in ((3, 2 * 4 * 9), (17, 2 * 4 * 17 * 17), (1, 2 * 4 * 2)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            fF.adaptive_max_pool2d(x, size)
        assert sum(t.numel() * t.element_size() for t in saved) == expected


@pytest.mark.parametrize("size", [1, (3, 4)])
def test_adaptive_max_pool2d_second_derivative(lane, size):
    x = torch.randn(1, 1, 4, 5, device=lane.device, dtype=torch.float64, requires_grad=True)

    def cubed(x):
        return fF.adaptive_max_pool2d(x, size, return_indices=True)[0] ** 3

    assert torch.autograd.gradcheck(cubed, x)
    assert torch.autograd.gradgradcheck(cubed, x)


@pytest.mark.parametrize("channels_last", [False, True])
def test_adaptive_max_pool2d_64_bit_variant(lane, channels_last, monkeypatch):
    monkeypatch.setattr(pooling, "parts_exceed_int32", lambda *arguments: True)
    x = make((2, 5, 9, 10), channels_last, lane.device).requires_grad_()
    for size in (1, (4, 3)):
        assert_matches(
            lambda x, size=size: fF.adaptive_max_pool2d(x, size), lambda x, size=size: F.adaptive_max_pool2d(x, size), x
        )


def test_adaptive_max_pool2d_module_and_errors():
    x = torch.randn(1, 2, 6, 4)
    assert torch.equal(fastcnn.nn.AdaptiveMaxPool2d((3, None))(x), F.adaptive_max_pool2d(x, (3, None)))
    for error, message, input, arguments in [
        (ValueError, "input must be 3-D or 4-D, got 2-D", x[0, 0], (2,)),
        (ValueError, "input must have channels, rows and columns, got shape \\(1, 0, 6, 4\\)", x[:, :0], (2,)),
        (ValueError, "output_size must be an int or a pair, got \\(5,\\)", x, ((5,),)),
        (ValueError, "output_size must be at least 0, got .-1, 0.", x, ((-1, 0),)),
        (TypeError, "output_size must be an int or a pair of ints, got 2.0", x, (2.0,)),
        (TypeError, "return_indices must be a bool, got 1", x, (2, 1)),
    ]:
        with pytest.raises(error, match=message):
            fF.adaptive_max_pool2d(input, *arguments)
