import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops import avg_pool2d as op
from fastcnn.ops import common
from fastcnn.testing import assert_matches

LANES = ("triton", "cpu")
CASES = {
    # shape, channels_last, arguments
    "2x2, odd size": ((2, 3, 13, 17), False, dict(kernel_size=2)),
    "2x2 channels_last, odd size": ((2, 5, 13, 17), True, dict(kernel_size=2)),
    "3x3 stride 1": ((1, 2, 12, 30), False, dict(kernel_size=3, stride=1, padding=1)),
    "3x3 stride 1 channels_last": ((1, 33, 7, 8), True, dict(kernel_size=3, stride=1, padding=1)),
    "3x3 stride 2 ceil": ((2, 3, 14, 15), False, dict(kernel_size=3, stride=2, ceil_mode=True)),
    "padding not counted": ((2, 3, 9, 9), False, dict(kernel_size=3, stride=2, padding=1, count_include_pad=False)),
    "beyond the padding": ((2, 5, 9, 8), True, dict(kernel_size=(4, 5), stride=3, padding=2, ceil_mode=True)),
    "all at once": (
        (2, 2, 9, 8),
        False,
        dict(kernel_size=4, stride=3, padding=2, ceil_mode=True, count_include_pad=False),
    ),
    "override": ((2, 3, 9, 9), False, dict(kernel_size=3, stride=2, padding=1, ceil_mode=True, divisor_override=7)),
    "override channels_last": ((1, 3, 9, 9), True, dict(kernel_size=2, stride=2, divisor_override=-3)),
    "stride over kernel": ((2, 3, 17, 16), False, dict(kernel_size=2, stride=5)),
    "one channel": ((3, 1, 9, 9), True, dict(kernel_size=(1, 4), stride=(1, 2), padding=(0, 2))),
    "130 channels": ((1, 130, 5, 5), True, dict(kernel_size=3, stride=2)),
    "7x6 window": ((1, 2, 12, 13), False, dict(kernel_size=(7, 6), stride=(2, 3), padding=3)),
    "whole plane": ((2, 300, 7, 7), False, dict(kernel_size=7)),
    "unbatched": ((4, 9, 10), False, dict(kernel_size=3, stride=2, padding=1)),
}


def make(shape, channels_last=False, device="cpu", dtype=torch.float32):
    x = torch.randn(shape, device=device).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.parametrize("case", CASES)
def test_avg_pool2d_matches_torch(lane, case):
    shape, channels_last, arguments = CASES[case]
    x = make(shape, channels_last, lane.device).requires_grad_()
    assert_matches(lambda x: fF.avg_pool2d(x, **arguments), lambda x: F.avg_pool2d(x, **arguments), x)
    y, expected = fF.avg_pool2d(x, **arguments), F.avg_pool2d(x, **arguments)
    assert y.stride() == expected.stride()
    ours, theirs = (torch.autograd.grad(out, x, torch.ones_like(y))[0] for out in (y, expected))
    assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_avg_pool2d_dtypes(lane, dtype):
    if lane.name == "cpu" and dtype != torch.float64:
        pytest.skip("the CPU kernel takes float32 and float64")
    for channels_last in (False, True):
        x = make((2, 9, 10, 11), channels_last, lane.device, dtype).requires_grad_()
        assert_matches(lambda x: fF.avg_pool2d(x, 3, 1, 1), lambda x: F.avg_pool2d(x, 3, 1, 1), x)
    # a sum of half-precision numbers beyond their range
    if dtype == torch.float16:
        assert fF.avg_pool2d(torch.full((1, 1, 4, 4), 60000.0, dtype=dtype, device=lane.device), 4).item() == 60000


@pytest.mark.parametrize("channels_last", [False, True])
def test_avg_pool2d_special_values(lane, channels_last):
    x = make((1, 2, 12, 12), channels_last, lane.device)
    x[0, 0, 6, 6:9] = torch.nan
    x[0, 1, 7, 7] = torch.inf
    x[0, 1, 11, 11] = -torch.inf
    x.requires_grad_()
    for arguments in ((3, 2, 1), (2, 2), (2, 3, 1, True)):
        y, expected = fF.avg_pool2d(x, *arguments), F.avg_pool2d(x, *arguments)
        torch.testing.assert_close(y, expected, equal_nan=True)
        grad = torch.randn_like(y)
        grad[0, 0, 0, 0] = torch.nan
        grad[0, 1, 1, 1] = torch.inf
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
def test_avg_pool2d_layouts(lane, view):
    x = view(torch.randn(2, 6, 11, 9, device=lane.device)).detach().requires_grad_()
    y, expected = fF.avg_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
    for grad in (torch.randn(expected.mT.shape, device=lane.device).mT, torch.ones_like(y[:, :1]).expand(y.shape)):
        ours, theirs = (torch.autograd.grad(out, x, grad, retain_graph=True)[0] for out in (y, expected))
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


def test_avg_pool2d_saves_nothing(lane):
    x = torch.randn(2, 4, 16, 16, device=lane.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("saved a tensor"), lambda t: t):
        fF.avg_pool2d(x, 3, 2, 1)


def test_avg_pool2d_second_derivative(lane):
    x = torch.randn(1, 1, 4, 5, device=lane.device, dtype=torch.float64, requires_grad=True)

    def cubed(x):
        return fF.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False) ** 3

    assert torch.autograd.gradcheck(cubed, x)
    assert torch.autograd.gradgradcheck(cubed, x)


@pytest.mark.parametrize("channels_last", [False, True])
def test_avg_pool2d_64_bit_variant(lane, channels_last, monkeypatch):
    monkeypatch.setattr(common, "exceeds_int32", lambda *tensors: True)
    x = make((2, 5, 9, 10), channels_last, lane.device).requires_grad_()
    assert_matches(lambda x: fF.avg_pool2d(x, 3, 2, 1), lambda x: F.avg_pool2d(x, 3, 2, 1), x)


def test_avg_pool2d_above_32_bit_offsets(lane, monkeypatch):
    # few elements, far apart: on a CPU only the pages they lie in become real
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    x = torch.empty(3 * 2**30 + 8, device=lane.device).as_strided((4, 2, 2, 2), (2**30, 4, 2, 1))
    x.copy_(torch.arange(32, device=lane.device).view(4, 2, 2, 2))
    assert fF.avg_pool2d(x, 2).flatten().tolist() == [1.5 + 4 * i for i in range(8)]


def test_avg_pool2d_on_cpu_runs_what_was_measured_faster():
    window, big = [2, 2, 2, 2, 0, 0, 1, 1], torch.zeros(1, 128, 32, 32)
    with fastcnn.backend("auto"):
        assert op._why_not("cpu", big, window) is None
        assert "measured as fast" in op._why_not("cpu", big[:, :4], window)
        assert "measured as fast" in op._why_not("cpu", big.to(memory_format=torch.channels_last), window)
        assert "measured as fast" in op._why_not("cpu", big, [7, 7, *window[2:]])
        assert "float32 and float64" in op._why_not("cpu", big.half(), window)
    with fastcnn.backend("cpu"):
        assert op._why_not("cpu", big[:, :4], window) is None


def test_avg_pool2d_refuses_bad_arguments():
    x = torch.zeros(1, 2, 4, 4)
    for error, message, arguments in [
        (TypeError, "kernel_size must be an int or a pair of ints, got 2.0", (2.0,)),
        (ValueError, "padding must be at most half of kernel_size, got \\(2, 2\\)", (3, 1, 2)),
        (ValueError, "kernel_size \\(5, 5\\) .* is too large for an input of \\(4, 4\\)", (5,)),
        (TypeError, "ceil_mode must be a bool, got 1", (2, 2, 0, 1)),
        (TypeError, "count_include_pad must be a bool, got 0", (2, 2, 0, False, 0)),
        (TypeError, "divisor_override must be an int or None, got 2.5", (2, 2, 0, False, True, 2.5)),
        (TypeError, "divisor_override must be an int or None, got True", (2, 2, 0, False, True, True)),
        (ValueError, "divisor_override must not be 0", (2, 2, 0, False, True, 0)),
    ]:
        with pytest.raises(error, match=message):
            fF.avg_pool2d(x, *arguments)
    assert torch.equal(fF.avg_pool2d(x.long(), 2), F.avg_pool2d(x.long(), 2))
    assert torch.equal(fF.avg_pool2d(x, 2, ()), F.avg_pool2d(x, 2, ()))
