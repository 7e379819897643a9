"""The family "stem": few channels, the window of a pixel as one box of the image."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastcnn.ops import conv2d as conv2d_ops
from fastcnn.ops import conv2d_stem, conv_launch
from fastcnn.ops.conv_fusion import Correction
from fastcnn.testing import assert_close_to_truth

channels_last = torch.channels_last
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

# n, c, h, w, filters, taps, stride, padding. Rows of the image are multiples of 16 bytes
CASES = {
    "ResNet": (34, 3, 9, 16, 24, (7, 7), (2, 2), (3, 3)),
    "VGG": (5, 3, 6, 8, 40, (3, 3), (1, 1), (1, 1)),
    "MobileNet": (33, 3, 9, 16, 16, (3, 3), (2, 2), (1, 1)),
    "LeNet": (3, 1, 8, 8, 8, (5, 5), (1, 1), (0, 0)),
    "four channels": (3, 4, 7, 6, 16, (3, 3), (1, 1), (1, 1)),
    "two channels, nothing alike": (2, 2, 9, 12, 48, (4, 2), (3, 1), (2, 5)),
    "stride beyond the filter": (2, 3, 11, 16, 8, (2, 2), (4, 3), (0, 1)),
    "fewer columns than shifts": (2, 1, 4, 8, 8, (4, 7), (1, 1), (0, 0)),
    "one pixel": (2, 3, 2, 8, 8, (2, 8), (1, 1), (0, 0)),
    "1x1": (20, 3, 3, 8, 8, (1, 1), (1, 1), (0, 0)),
    "1x1 with padding": (2, 4, 3, 4, 8, (1, 1), (2, 2), (2, 1)),
}


def problem_of(kind, n, c, h, w, k, taps, stride, padding, **how):
    size = [(a + 2 * p - t) // s + 1 for a, p, t, s in zip((h, w), padding, taps, stride, strict=True)]
    geometry = (n, c, h, w, k, *taps, *size, stride, padding, (1, 1), 1)
    return conv_launch.Problem(kind, *geometry, "16-bit", "image", **how)


def stem_launches(case):
    """Small tiles; five programs, more or fewer than there are tiles, and three splits, more than some have steps."""
    rows, run = conv2d_stem.box_of(problem_of("forward", *case))
    forward = conv_launch.Launch("stem", 16, 16, rows * run, 4, 2, programs=5)
    return forward, conv_launch.Launch("stem", 16, rows * run, 16, 4, 2, splits=3)


def operands(case, lane, dtype=bf16):
    n, c, h, w, k, taps, stride, padding = case
    x = torch.randn(n, c, h, w, device=lane.device).to(dtype).contiguous(memory_format=channels_last)
    weight = torch.randn(k, c, *taps, device=lane.device).to(dtype)
    return x, weight, torch.randn(k, device=lane.device).to(dtype), (stride, padding, (1, 1), 1)


@pytest.mark.parametrize("dtype", (bf16, fp16), ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_stem_matches_torch(lane, case, dtype):
    x, weight, bias, geometry = operands(case, lane, dtype)
    forward, backward = stem_launches(case)
    leaf = weight.double().requires_grad_()
    truth = F.conv2d(x.double(), leaf, bias.double(), *geometry)
    theirs = F.conv2d(x, weight, bias, *geometry)
    with conv_launch.use(forward, "forward"), conv_launch.use(backward, "backward_weight"):
        y = conv2d_ops.conv2d_forward(x, weight, bias, truth.shape[2:], *geometry, True, "conv", "triton")
        grad = torch.randn(y.shape, device=lane.device).to(dtype).contiguous(memory_format=channels_last)
        # the parameter's own strides, whatever they are
        for parameter in (weight, weight.contiguous(memory_format=channels_last)):
            dw = conv2d_ops.conv2d_backward_weight(grad, x, parameter, *geometry, "conv", "triton")
            assert dw.stride() == parameter.stride()
            true_dw = torch.autograd.grad(truth, leaf, grad.double(), retain_graph=True)[0]
            their_dw = torch.nn.grad.conv2d_weight(x, weight.shape, grad, *geometry)
            assert_close_to_truth("grad_weight", dw, their_dw, true_dw, dtype)
    assert_close_to_truth("y", y, theirs, truth.detach(), dtype)


@pytest.mark.parametrize("case", [CASES["ResNet"], CASES["VGG"]], ids=("ResNet", "VGG"))
def test_stem_with_all_it_does_on_load_and_store(lane, case):
    x, weight, bias, geometry = operands(case, lane)
    forward, backward = stem_launches(case)
    leaf = weight.double().requires_grad_()
    plain = F.conv2d(x.double(), leaf, bias.double(), *geometry)
    like_y = lambda: torch.randn(plain.shape, device=lane.device).to(bf16).contiguous(memory_format=channels_last)
    vector = lambda: torch.randn(plain.shape[1], device=lane.device)
    residual, pivot, grad = like_y(), vector(), like_y()
    truth = F.relu(plain.detach() + residual.double())
    theirs = F.relu(F.conv2d(x, weight, bias, *geometry) + residual)
    correction = Correction(like_y(), vector(), vector(), vector())
    with conv_launch.use(forward, "forward"), conv_launch.use(backward, "backward_weight"):
        y, sums = conv2d_ops.conv2d_forward(
            *(x, weight, bias, truth.shape[2:], *geometry, True, "conv", "triton"),
            activation=("relu", 0.0),
            residual=residual,
            pivot=pivot,
        )
        dw = conv2d_ops.conv2d_backward_weight(grad, x, weight, *geometry, "conv", "triton", correction=correction)
    assert_close_to_truth("y", y, theirs, truth, bf16)
    # rows past the batch would add the pivot's square
    centred = y.double() - pivot.double().view(1, -1, 1, 1)
    true_sums = torch.stack([centred.sum((0, 2, 3)), centred.square().sum((0, 2, 3))])
    torch.testing.assert_close(sums.double().sum(0), true_sums, rtol=1e-5, atol=1e-4)
    true_dw = torch.autograd.grad(plain, leaf, correction.reference(grad.double()))[0]
    their_dw = torch.nn.grad.conv2d_weight(x, weight.shape, correction.reference(grad.float()).to(bf16), *geometry)
    assert_close_to_truth("grad_weight", dw, their_dw, true_dw, bf16)


def test_stem_keeps_nan_and_inf_under_the_filter(lane):
    # the box is wider than the filter and starts before it: neighbours meet zeros of the weight
    case = CASES["ResNet"]
    x, weight, _, geometry = operands(case, lane)
    x[0, 1, 4, 7], x[1, 0, 0, 15], x[2, 2, 8, 0] = torch.nan, torch.inf, -torch.inf
    expected = F.conv2d(x.float(), weight.float(), None, *geometry)
    with conv_launch.use(stem_launches(case)[0], "forward"):
        y = conv2d_ops.conv2d_forward(x, weight, None, expected.shape[2:], *geometry, True, "conv", "triton")
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert 0 < (~y.isfinite()).sum() < y.numel() / 2


def test_stem_is_what_an_image_gets(lane):
    x, weight, _, geometry = operands(CASES["ResNet"], lane)
    found = lambda x, y: conv2d_ops.problem_of("forward", x, weight, y, geometry, "ieee")
    y = x.new_empty(34, 24, 5, 8).contiguous(memory_format=channels_last)
    assert found(x, y) == problem_of("forward", *CASES["ResNet"])
    # planes apart are copied; rows of 42 bytes have no box, copied or not
    assert found(x.contiguous(), y) == problem_of("forward", *CASES["ResNet"], copied=True)
    problem = found(x[..., :7], y[..., :4])
    assert problem.access == "narrow" and not problem.copied


@pytest.mark.parametrize(
    "changed, reason",
    [
        (dict(kind="backward_input"), "no gradient of the input"),
        (dict(arithmetic="ieee"), "16-bit"),
        (dict(access="packed"), "packed output"),
        (dict(dilation=(1, 2)), "no dilation"),
        (dict(groups=3), "one group"),
        (dict(r=9), "windows of 8 rows of 32 elements"),
        (dict(s=11), "windows of 8 rows of 32 elements"),
        (dict(pending=True), "without an activation on load"),
    ],
    ids=str,
)
def test_stem_declines(changed, reason):
    problem = problem_of("forward", *CASES["ResNet"])
    assert conv2d_stem.why_not(problem) is None
    assert reason in conv2d_stem.why_not(dataclasses.replace(problem, **changed))
