import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops import common
from fastcnn.testing import assert_matches

CASES = {
    # shape, channels_last, kernel_size, output_size
    "alpha sqrt 2": ((2, 3, 25, 25), False, 2, (17, 18)),
    "channels_last": ((2, 5, 25, 13), True, 2, (17, 9)),
    "steps of one": ((1, 3, 12, 9), False, 3, (10, 7)),
    "steps above the window": ((1, 33, 31, 17), True, 2, (5, 4)),
    "one row and one column": ((2, 3, 9, 8), False, (3, 4), (1, 1)),
    "window of the image": ((2, 3, 5, 4), False, (5, 4), 1),
    "window of one": ((1, 2, 7, 9), False, 1, (7, 4)),
    "6x7 window, overlapping": ((1, 2, 14, 16), False, (6, 7), (9, 8)),
    "130 channels": ((1, 130, 7, 5), True, 2, (4, 3)),
    "unbatched": ((4, 9, 10), False, 2, (6, 7)),
    "empty batch": ((0, 3, 5, 5), False, 2, 3),
}


def make(shape, channels_last=False, device="cpu", dtype=torch.float32):
    x = torch.randn(shape, device=device).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def make_samples(x, hostile=False):
    shape = (1 if x.dim() == 3 else x.shape[0], x.shape[-3], 2)
    samples = torch.rand(shape, device=x.device).to(x.dtype)
    if hostile:  # the ends of [0, 1), where rounding decides
        samples.view(-1)[::3] = 0
        samples.view(-1)[1::3] = torch.nextafter(torch.ones(()), torch.zeros(())).to(x.dtype)
    return samples


@pytest.mark.parametrize("case", CASES)
def test_fractional_max_pool2d_takes_torchs_windows(lane, case):
    shape, channels_last, kernel, size = CASES[case]
    values = make(shape, channels_last, lane.device)
    # small integers: ties everywhere
    for x, hostile in ((values, False), (values, True), (values.round(), False)):
        x.requires_grad_()
        samples = make_samples(x, hostile)
        y, indices = fF.fractional_max_pool2d(x, kernel, size, return_indices=True, _random_samples=samples)
        expected, expected_indices = F.fractional_max_pool2d(
            x, kernel, size, return_indices=True, _random_samples=samples
        )
        assert torch.equal(indices, expected_indices) and indices.dtype == torch.int64
        assert torch.equal(y, expected)
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        grad = torch.randn_like(y)
        ours, theirs = (torch.autograd.grad(out, x, grad)[0] for out in (y, expected))
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == x.stride()


def test_fractional_max_pool2d_finds_every_window_over_a_pixel(lane):
    # each output sends back 1: the sums are complete only if the backward meets every window
    x = torch.randn(1, 16, 37, 41, device=lane.device, requires_grad=True)
    for kernel, size in ((2, (29, 36)), (3, (18, 12)), (5, (31, 5))):
        y = fF.fractional_max_pool2d(x, kernel, size, _random_samples=make_samples(x, True))
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.sum().item() == y.numel()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_fractional_max_pool2d_dtypes(lane, dtype):
    for channels_last in (False, True):
        x = make((2, 9, 10, 11), channels_last, lane.device, dtype).requires_grad_()
        samples = make_samples(x)
        wide = torch.promote_types(dtype, torch.float32)

        def reference(x, samples=samples, wide=wide):
            return F.fractional_max_pool2d(x.to(wide), 3, (6, 7), _random_samples=samples.to(wide)).to(x.dtype)

        def ours(x, samples=samples):
            return fF.fractional_max_pool2d(x, 3, (6, 7), _random_samples=samples)

        y = reference(x)
        assert torch.equal(ours(x), y)
        grad = torch.randn_like(y)
        got, wanted = (torch.autograd.grad(f(x), x, grad)[0] for f in (ours, reference))
        torch.testing.assert_close(got, wanted)


def test_fractional_max_pool2d_special_values(lane):
    for channels_last in (False, True):
        x = make((1, 2, 12, 12), channels_last, lane.device)
        x[0, 0, :6, :6] = -torch.inf
        x[0, 0, 8, 6:9] = torch.nan
        x[0, 1, 7:9, 7] = torch.tensor([torch.inf, torch.nan])
        x.requires_grad_()
        samples = make_samples(x)
        y, indices = fF.fractional_max_pool2d(x, 3, 7, return_indices=True, _random_samples=samples)
        expected, expected_indices = F.fractional_max_pool2d(x, 3, 7, return_indices=True, _random_samples=samples)
        torch.testing.assert_close(y, expected, equal_nan=True)
        assert torch.equal(indices, expected_indices)
        grad = torch.randn_like(y)
        grad[0, 0, 0, 0] = torch.nan
        ours, theirs = (torch.autograd.grad(out, x, grad)[0] for out in (y, expected))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_fractional_max_pool2d_draws_torchs_numbers(lane):
    x = torch.randn(2, 3, 20, 20, device=lane.device)
    for arguments in (dict(output_size=13), dict(output_ratio=0.7), dict(output_ratio=(0.6, 0.8))):
        torch.manual_seed(3)
        y = fF.fractional_max_pool2d(x, 2, **arguments)
        torch.manual_seed(3)
        ratio = arguments.get("output_ratio")
        theirs = dict(output_ratio=(ratio, ratio)) if isinstance(ratio, float) else arguments
        assert torch.equal(y, F.fractional_max_pool2d(x, 2, **theirs))
        assert not torch.equal(y, fF.fractional_max_pool2d(x, 2, **arguments))
        module = fastcnn.nn.FractionalMaxPool2d(2, **arguments)
        torch.manual_seed(3)
        assert torch.equal(module(x), y)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, ::2, 1:, ::2], id="slice"),
        pytest.param(lambda x: x.to(memory_format=torch.channels_last)[:, 1:4, :, 2:], id="channels_last slice"),
        pytest.param(lambda x: x.transpose(1, 3), id="transposed channels"),
        pytest.param(lambda x: x[0].permute(1, 2, 0), id="unbatched permuted"),
    ],
)
def test_fractional_max_pool2d_layouts(lane, view):
    x = view(torch.randn(2, 6, 11, 12, device=lane.device)).detach().requires_grad_()
    samples = make_samples(x).transpose(0, 1).contiguous().transpose(0, 1)
    y, expected = (f.fractional_max_pool2d(x, 2, (4, 3), _random_samples=samples) for f in (fF, F))
    assert torch.equal(y, expected)
    for grad in (torch.randn(y.mT.shape, device=lane.device).mT, torch.ones_like(y[..., :1]).expand(y.shape)):
        ours, theirs = (torch.autograd.grad(out, x, grad, retain_graph=True)[0] for out in (y, expected))
        torch.testing.assert_close(ours, theirs)


def test_fractional_max_pool2d_saves_taps_and_random_numbers(lane):
    x = torch.randn(2, 4, 16, 16, device=lane.device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fF.fractional_max_pool2d(x, 2, 9)
    assert sum(t.numel() * t.element_size() for t in saved) == 2 * 4 * (9 * 9 + 2 * 4)


def test_fractional_max_pool2d_second_derivative(lane):
    for shape in ((1, 1, 5, 6), (2, 4, 5)):
        x = torch.randn(shape, device=lane.device, dtype=torch.float64, requires_grad=True)
        samples = make_samples(x)

        def cubed(x, samples=samples):
            return fF.fractional_max_pool2d(x, 2, 3, return_indices=True, _random_samples=samples)[0] ** 3

        assert torch.autograd.gradcheck(cubed, x)
        assert torch.autograd.gradgradcheck(cubed, x)


@pytest.mark.parametrize("channels_last", [False, True])
def test_fractional_max_pool2d_64_bit_variant(lane, channels_last, monkeypatch):
    monkeypatch.setattr(common, "exceeds_int32", lambda *tensors: True)
    x = make((2, 5, 9, 10), channels_last, lane.device).requires_grad_()
    samples = make_samples(x)

    def pool(functional):
        return lambda x: functional.fractional_max_pool2d(x, 2, 6, _random_samples=samples.to(x.dtype))

    assert_matches(pool(fF), pool(F), x)


def test_fractional_max_pool2d_refuses_bad_arguments():
    x = torch.zeros(1, 2, 6, 5)
    for error, message, input, arguments in [
        (ValueError, "input must be 3-D or 4-D, got 2-D", x[0, 0], (2, 3)),
        (ValueError, "input must have channels, rows and columns, got shape \\(1, 0, 6, 5\\)", x[:, :0], (2, 3)),
        (TypeError, "kernel_size must be an int or a pair of ints, got 2.0", x, (2.0, 3)),
        (ValueError, "output_size or output_ratio must be given, got neither", x, (2,)),
        (ValueError, "output_size must be at least 1, got 0", x, (2, 0)),
        (ValueError, "an output of \\(5, 5\\) must have .* an input of \\(6, 5\\) and kernel_size", x, (2, 5)),
        (ValueError, "output_ratio must be a number or a pair of numbers in \\(0, 1\\), got 1.5", x, (2, None, 1.5)),
        (TypeError, "return_indices must be a bool, got 1", x, (2, 3, None, 1)),
        (ValueError, "_random_samples must have shape \\(1, 2, 2\\), got", x, (2, 3, None, False, torch.rand(1, 2, 3))),
        (TypeError, "_random_samples must have the dtype of input", x, (2, 3, None, False, torch.rand(1, 2, 2).half())),
    ]:
        with pytest.raises(error, match=message):
            fF.fractional_max_pool2d(input, *arguments)
