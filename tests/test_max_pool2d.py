import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops import common
from fastcnn.ops import max_pool2d as op
from fastcnn.testing import assert_matches

LANES = ("triton", "cpu")
CASES = {
    # shape, channels_last, arguments
    "2x2, odd size": ((2, 3, 13, 17), False, dict(kernel_size=2)),
    "2x2 channels_last, odd size": ((2, 5, 13, 17), True, dict(kernel_size=2)),
    "stem 3x3 stride 2": ((1, 5, 23, 21), False, dict(kernel_size=3, stride=2, padding=1)),
    "stem channels_last": ((1, 33, 11, 12), True, dict(kernel_size=3, stride=2, padding=1)),
    "3x3 stride 1": ((1, 2, 12, 30), False, dict(kernel_size=3, stride=1, padding=1)),
    "3x3 stride 1 channels_last": ((1, 40, 9, 7), True, dict(kernel_size=3, stride=1, padding=1)),
    "2x2 channels_last, 48 channels": ((1, 48, 7, 6), True, dict(kernel_size=2)),
    "alexnet: overlapping 3x3 stride 2": ((1, 3, 27, 27), False, dict(kernel_size=3, stride=2)),
    "alexnet channels_last": ((1, 32, 13, 13), True, dict(kernel_size=3, stride=2)),
    "3x3 ceil": ((2, 3, 14, 15), False, dict(kernel_size=3, stride=2, ceil_mode=True)),
    "last window in the padding": ((1, 2, 7, 6), False, dict(kernel_size=2, stride=3, padding=1, ceil_mode=True)),
    "dilation": ((1, 3, 19, 18), False, dict(kernel_size=(3, 2), stride=(2, 1), padding=1, dilation=(2, 3))),
    "dilation channels_last": ((2, 7, 19, 18), True, dict(kernel_size=4, padding=2, dilation=2, ceil_mode=True)),
    "stride over kernel": ((2, 3, 17, 16), False, dict(kernel_size=2, stride=5)),
    "one channel": ((3, 1, 9, 9), True, dict(kernel_size=(1, 4), stride=(1, 2), padding=(0, 2))),
    "one pixel": ((2, 5, 1, 1), False, dict(kernel_size=1)),
    "130 channels": ((1, 130, 5, 5), True, dict(kernel_size=3, stride=2)),
    "7x6 window": ((1, 2, 12, 13), False, dict(kernel_size=(7, 6), stride=(2, 3), padding=3)),
    "unbatched": ((4, 9, 10), False, dict(kernel_size=3, stride=2, padding=1)),
}


def make(shape, channels_last=False, device="cpu", dtype=torch.float32):
    x = torch.randn(shape, device=device).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.parametrize("case", CASES)
def test_max_pool2d_matches_torch(lane, case):
    shape, channels_last, arguments = CASES[case]
    values = make(shape, channels_last, lane.device)
    # small integers: ties everywhere
    for x in (values, values.round()):
        x.requires_grad_()
        y, indices = fF.max_pool2d(x, **arguments, return_indices=True)
        expected, expected_indices = F.max_pool2d(x, **arguments, return_indices=True)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        assert torch.equal(indices, expected_indices) and indices.stride() == expected_indices.stride()
        assert indices.dtype == torch.int64
        grad = torch.randn_like(y)
        ours, theirs = (torch.autograd.grad(out, x, grad)[0] for out in (y, expected))
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_max_pool2d_dtypes(lane, dtype):
    if lane.name == "cpu" and dtype != torch.float64:
        pytest.skip("the CPU kernel takes float32 and float64")
    for channels_last in (False, True):
        x = make((2, 9, 10, 11), channels_last, lane.device, dtype).requires_grad_()
        assert_matches(lambda x: fF.max_pool2d(x, 3, 1, 1), lambda x: F.max_pool2d(x, 3, 1, 1), x)


@pytest.mark.parametrize("channels_last", [False, True])
def test_max_pool2d_special_values(lane, channels_last):
    x = make((1, 2, 12, 12), channels_last, lane.device)
    x[0, :, :5, :5] = -torch.inf  # windows of nothing else
    x[0, 0, 6, 6:9] = torch.nan
    x[0, 1, 7:9, 7] = torch.tensor([torch.inf, torch.nan])
    x[0, 1, 0, 0] = -0.0
    x.requires_grad_()
    for arguments in ((3, 2, 1), (2, 2), (4, 1, 2)):
        y, indices = fF.max_pool2d(x, *arguments, return_indices=True)
        expected, expected_indices = F.max_pool2d(x, *arguments, return_indices=True)
        torch.testing.assert_close(y, expected, equal_nan=True)
        assert torch.equal(indices, expected_indices)
        grad = torch.randn_like(y)
        grad[0, 0, 0, 0] = torch.nan
        grad[0, 1, 1, 1] = torch.inf
        ours, theirs = (torch.autograd.grad(out, x, grad)[0] for out in (y, expected))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


LARGE = [((15, 17), torch.uint8), ((16, 16), torch.uint8), ((16, 17), torch.int16), ((182, 182), torch.int32)]


@pytest.mark.parametrize("window, dtype", LARGE)
def test_max_pool2d_taps_of_large_windows(lane, window, dtype):
    if lane.name == "interpret" and window == (182, 182):
        pytest.skip("33,124 taps take minutes in the interpreter")
    # one maximum in the last corner: its tap is the largest there is
    x = torch.zeros(1, 1, *window, device=lane.device)
    x[..., -1, -1] = 1
    x.requires_grad_()
    _, taps = op.max_pool2d_forward(
        x, [*window, 1, 1, 0, 0, 1, 1], False, True, "cpu" if lane.name == "cpu" else "triton"
    )
    assert taps.dtype == dtype and taps.item() == window[0] * window[1] - 1
    (grad,) = torch.autograd.grad(fF.max_pool2d(x, window), x)
    assert torch.equal(grad, x)


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
        pytest.param(lambda x: x[:, :1], id="one channel of six"),
    ],
)
def test_max_pool2d_layouts(lane, view):
    x = view(torch.randn(2, 6, 11, 9, device=lane.device)).detach().requires_grad_()
    y, expected = fF.max_pool2d(x, 3, 2, 1), F.max_pool2d(x, 3, 2, 1)
    assert torch.equal(y, expected) and y.stride() == expected.stride()
    # gradients of every kind: transposed, expanded
    for grad in (torch.randn(expected.mT.shape, device=lane.device).mT, torch.ones_like(y[:, :1]).expand(y.shape)):
        ours, theirs = (torch.autograd.grad(out, x, grad, retain_graph=True)[0] for out in (y, expected))
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


def test_max_pool2d_sizes_of_one(lane):
    # contiguous and channels_last at once: torch looks at the strides
    for shape in ((2, 6, 1, 1), (2, 1, 4, 4), (1, 6, 1, 5), (1, 1, 1, 1)):
        for channels_last in (False, True):
            x = make(shape, channels_last, lane.device)
            expected = F.max_pool2d(x, 1)
            y = fF.max_pool2d(x, 1)
            assert torch.equal(y, expected) and y.stride() == expected.stride()


def test_max_pool2d_saves_one_byte_per_output(lane):
    x = torch.randn(2, 4, 16, 16, device=lane.device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fF.max_pool2d(x, 3, 2, 1)
    assert sum(t.numel() * t.element_size() for t in saved) == 2 * 4 * 8 * 8


def test_max_pool2d_backward_is_deterministic(lane):
    x = torch.randn(2, 3, 20, 20, device=lane.device, requires_grad=True)
    y = fF.max_pool2d(x, 5, 1, 2)
    grad = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, x, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_max_pool2d_second_derivative(lane):
    x = torch.randn(1, 1, 4, 5, device=lane.device, dtype=torch.float64, requires_grad=True)

    def cubed(x):
        return fF.max_pool2d(x, 3, 2, 1, return_indices=True)[0] ** 3

    assert torch.autograd.gradcheck(cubed, x)
    assert torch.autograd.gradgradcheck(cubed, x)


def test_max_pool2d_without_gradients(lane):
    x = torch.randn(1, 3, 9, 9, device=lane.device)
    with torch.no_grad():
        y, indices = fF.max_pool2d(x.requires_grad_(), 2, return_indices=True)
    assert not y.requires_grad and torch.equal(indices, F.max_pool2d(x, 2, return_indices=True)[1])
    assert torch.equal(fF.max_pool2d(x.detach(), 2), F.max_pool2d(x, 2))
    # indices alone have no gradient to give
    y, indices = fF.max_pool2d(x, 2, return_indices=True)
    assert y.requires_grad and not indices.requires_grad


def test_max_pool2d_above_32_bit_offsets(lane, monkeypatch):
    # few elements, far apart: on a CPU only the pages they lie in become real
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    x = torch.empty(3 * 2**30 + 8, device=lane.device).as_strided((4, 2, 2, 2), (2**30, 4, 2, 1))
    x.copy_(torch.arange(32, device=lane.device).view(4, 2, 2, 2))
    x.requires_grad_()
    y = fF.max_pool2d(x, 2)
    assert y.flatten().tolist() == list(range(3, 32, 4))


@pytest.mark.parametrize("channels_last", [False, True])
def test_max_pool2d_64_bit_variant(lane, channels_last, monkeypatch):
    monkeypatch.setattr(common, "exceeds_int32", lambda *tensors: True)
    x = make((2, 5, 9, 10), channels_last, lane.device).requires_grad_()
    assert_matches(lambda x: fF.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1), x)


def test_max_pool2d_on_cpu_runs_what_was_measured_faster():
    window, big = [2, 2, 2, 2, 0, 0, 1, 1], torch.zeros(1, 64, 32, 32)
    with fastcnn.backend("auto"):
        assert op._why_not("cpu", big, window) is None
        assert "measured faster" in op._why_not("cpu", big[:, :4], window)
        assert "measured faster" in op._why_not("cpu", big.to(memory_format=torch.channels_last), window)
        assert "float32 and float64" in op._why_not("cpu", big.half(), window)
    with fastcnn.backend("cpu"):
        assert op._why_not("cpu", big[:, :4], window) is None
        # a window that can step over the image
        assert "dilation within the image" in op._why_not("cpu", big[..., :2, :2], [2, 2, 2, 2, 1, 1, 3, 3])


def test_max_pool2d_refuses_bad_arguments():
    x = torch.zeros(1, 2, 4, 4)
    for error, message, input, arguments in [
        (TypeError, "input must be a torch.Tensor, got list", [1.0], (2,)),
        (ValueError, "input must be 3-D or 4-D, got 2-D", x[0, 0], (2,)),
        (ValueError, "input must have channels, rows and columns, got shape \\(1, 0, 4, 4\\)", x[:, :0], (2,)),
        (ValueError, "input must have channels, rows and columns, got shape \\(0, 4, 4\\)", x[0, :0], (2,)),
        (TypeError, "kernel_size must be an int or a pair of ints, got 2.0", x, (2.0,)),
        (ValueError, "kernel_size must be at least 1, got 0", x, (0,)),
        (ValueError, "stride must be at least 1, got 0", x, (2, 0)),
        (ValueError, "padding must be at least 0, got -1", x, (2, 2, -1)),
        (
            ValueError,
            "padding must be at most half of kernel_size, got \\(2, 2\\) for kernel_size \\(3, 3\\)",
            x,
            (3, 1, 2),
        ),
        (ValueError, "dilation must be at least 1, got \\(1, 0\\)", x, (3, 1, 1, (1, 0))),
        (ValueError, "kernel_size \\(5, 5\\) .* is too large for an input of \\(4, 4\\)", x, (5,)),
        (TypeError, "ceil_mode must be a bool, got 1", x, (2, 2, 0, 1, 1)),
        (TypeError, "return_indices must be a bool, got None", x, (2, 2, 0, 1, False, None)),
    ]:
        with pytest.raises(error, match=message):
            fF.max_pool2d(input, *arguments)
    with fastcnn.strict(), fastcnn.backend("cpu"), pytest.raises(NotImplementedError, match="floating-point"):
        fF.max_pool2d(x.long(), 2)
    assert torch.equal(fF.max_pool2d(x.long(), 2), F.max_pool2d(x.long(), 2))
    assert torch.equal(fF.max_pool2d(x, 2, ()), F.max_pool2d(x, 2, ()))
