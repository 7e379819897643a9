import pytest
import torch
from conftest import INTERPRET
from torch import nn as tnn

import fastcnn
import fastcnn.functional as fF
from fastcnn import nn
from fastcnn.ops import conv2d, separable_conv2d
from fastcnn.ops.separable_conv2d import MOST_FILTERS, TILES, separable_conv2d_reference
from fastcnn.testing import assert_matches

LANES = ("triton", "cpu")
bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture
def fused(monkeypatch):
    """Counts the launches of the fused kernel; fp32 takes it as on a GPU that may use TF32."""
    launches = []
    original = separable_conv2d._fused_forward
    monkeypatch.setattr(separable_conv2d, "_fused_forward", lambda *args: (launches.append(args[-1]), original(*args)))
    precision_of = conv2d.precision_of
    monkeypatch.setattr(
        separable_conv2d.conv2d,
        "precision_of",
        lambda tensor, switch: "tf32" if INTERPRET and tensor.dtype == fp32 else precision_of(tensor, switch),
    )
    return launches


def tensors(lane, shape, filters, kernel, dtype, bias, depthwise_bias, multiplier=1, last=True):
    generator = torch.Generator().manual_seed(sum(shape) + filters)
    randn = lambda *sizes: torch.randn(sizes, generator=generator).to(lane.device, dtype)
    c = shape[-3]
    x = randn(*shape)
    x = x.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else x
    weights = randn(c * multiplier, 1, *kernel), randn(filters, c * multiplier, 1, 1)
    biases = randn(filters) if bias else None, randn(c * multiplier) if depthwise_bias else None
    return tuple(None if t is None else t.requires_grad_() for t in (x, *weights, *biases))


def matches(operands, *geometry):
    assert_matches(
        lambda *t: fF.separable_conv2d(*t[:4], *geometry, depthwise_bias=t[4]),
        lambda *t: separable_conv2d_reference(*t[:4], *geometry, depthwise_bias=t[4]),
        *operands,
    )


# input, filters, kernel, (stride, padding, dilation)
SHAPES = {
    "3x3": ((2, 16, 9, 7), 24, (3, 3), (1, 1, 1)),
    "stride 2": ((1, 24, 8, 9), 40, (3, 3), (2, 1, 1)),
    "odd channels": ((1, 19, 8, 9), 21, (3, 3), (2, 1, 1)),
    "few channels": ((1, 24, 5, 4), 3, (3, 3), (1, 1, 1)),
    "5x5, more channels than a step": ((1, 72, 5, 6), 8, (5, 5), (1, 2, 1)),
    "stride beyond the filter, no padding": ((2, 8, 7, 9), 8, (2, 2), (3, 0, 1)),
    "dilation, even filter": ((1, 8, 9, 11), 16, (2, 4), ((1, 2), (1, 3), (3, 2))),
    "same, even filter": ((1, 16, 6, 7), 8, (2, 4), (1, "same", 1)),
    "one channel, one pixel": ((3, 1, 1, 1), 5, (3, 3), (1, 1, 1)),
    "two tiles of filters": ((1, 8, 4, 5), 304, (3, 3), (1, 1, 1)),
    "padding beyond the filter": ((1, 8, 3, 4), 16, (1, 3), (1, (2, 4), 1)),
    "one pixel": ((3, 8, 1, 1), 16, (3, 3), (1, 1, 1)),
    "one image": ((6, 5, 7), 4, (3, 3), (1, "valid", 1)),
    "no images": ((0, 8, 5, 7), 8, (3, 3), (1, 1, 1)),
}


ODD = ("odd channels", "few channels", "one channel, one pixel")


@pytest.mark.parametrize("case", SHAPES)
def test_matches_two_convolutions(lane, fused, case):
    shape, filters, kernel, geometry = SHAPES[case]
    # numba has no 16-bit floats
    dtype = fp32 if lane.name == "cpu" else (bf16, fp16, fp32)[len(case) % 3]
    matches(tensors(lane, shape, filters, kernel, dtype, len(case) % 2, True), *geometry)
    assert len(fused) == (lane.name != "cpu" and shape[0] > 0 and len(shape) == 4 and case not in ODD)


UNFUSED = {
    "multiplier": ((2, 6, 5, 7), 8, (3, 3), bf16, dict(multiplier=2)),
    "contiguous": ((2, 6, 5, 7), 8, (3, 3), bf16, dict(last=False)),
    "30 taps": ((1, 8, 5, 4), 8, (5, 6), bf16, {}),
    "fp64": ((2, 6, 5, 7), 8, (3, 3), fp64, {}),
}


@pytest.mark.parametrize("case", UNFUSED)
def test_what_the_fused_kernel_does_not_do(lane, fused, case):
    *sizes, dtype, how = UNFUSED[case]
    dtype = fp32 if lane.name == "cpu" and dtype == bf16 else dtype
    matches(tensors(lane, *sizes, dtype, True, True, **how), 1, 3)
    assert not fused


def test_strided_operands(lane, fused):
    """Slices of wider images' channels, and weights that lie apart."""
    dtype = fp32 if lane.name == "cpu" else bf16
    images, w1, w2, b2, b1 = (t.detach() for t in tensors(lane, (2, 24, 6, 5), 16, (3, 3), dtype, True, True))
    apart = lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]
    for x in (images[:, 8:16], images[:, :8, ::2]):
        c = x.shape[1]
        operands = x, apart(w1[:c]), apart(w2[:, :c]), apart(b2), apart(b1[:c])
        matches(tuple(t.requires_grad_() for t in operands), 1, 1)
    assert len(fused) == (0 if lane.name == "cpu" else 2)


def test_every_tile_is_reached(lane):
    if lane.name == "cpu":
        pytest.skip("tiles are of the Triton kernel")
    found = {}
    for dtype, arithmetic, precision in ((bf16, "16-bit", "ieee"), (fp32, "tf32", "tf32")):
        for filters in (8, 64, 104, 200, 512):
            x, w1, w2, *_ = tensors(lane, (1, 8, 2, 2), filters, (3, 3), dtype, False, False)
            y = torch.empty(1, filters, 2, 2, dtype=dtype, device=lane.device).to(memory_format=torch.channels_last)
            found.setdefault(arithmetic, set()).add(separable_conv2d._tile(x, w1, w2, y, precision))
    assert found == {arithmetic: set(tiles) for arithmetic, tiles in TILES.items()}
    assert max(MOST_FILTERS.values()) == 512


def test_saved_for_backward_are_the_operands_alone(lane):
    operands = tensors(lane, (2, 6, 5, 7), 8, (3, 3), fp32, True, True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fF.separable_conv2d(*operands[:4], padding=1, depthwise_bias=operands[4])
    own = {t.untyped_storage().data_ptr() for t in operands}
    assert saved and {t.untyped_storage().data_ptr() for t in saved} <= own


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone(lane, wanted):
    operands = tensors(lane, (2, 6, 5, 7), 8, (3, 3), fp32, True, True)
    matches(tuple(t.detach().requires_grad_(i == wanted) for i, t in enumerate(operands)), 1, 1)


def test_layouts_of_gradients(lane):
    operands = tensors(lane, (2, 6, 5, 7), 8, (3, 3), fp32, True, True)
    y = fF.separable_conv2d(*operands[:4], padding=1, depthwise_bias=operands[4])
    assert y.is_contiguous(memory_format=torch.channels_last)
    for t, grad in zip(operands, torch.autograd.grad(y.sum(), operands), strict=True):
        assert grad.stride() == t.stride()


def test_nan_and_inf_stay_under_the_filter(lane, fused):
    dtype = fp32 if lane.name == "cpu" else bf16
    x, w1, w2, *_ = (
        None if t is None else t.detach() for t in tensors(lane, (2, 8, 9, 9), 16, (3, 3), dtype, False, False)
    )
    x[0, 3, 4, 4], x[1, 0, 0, 8] = torch.nan, torch.inf
    bad = ~fF.separable_conv2d(x, w1, w2, padding=1).isfinite()
    expected = torch.zeros_like(bad)
    expected[0, :, 3:6, 3:6] = expected[1, :, :2, 7:] = True
    assert torch.equal(bad, expected)


def test_parameters_as_in_the_lecture():
    """4 channels to 2 with 3x3 filters: M K^2 + M N = 44 weights, where one convolution has M K^2 N = 72."""
    count = lambda layer: sum(p.numel() for p in layer.parameters())
    assert count(nn.SeparableConv2d(4, 2, 3, bias=False)) == 44
    assert count(nn.Conv2d(4, 2, 3, bias=False)) == 72


def test_module(lane):
    layer = nn.SeparableConv2d(
        4, 6, 3, stride=2, padding=1, depth_multiplier=2, depthwise_bias=True, padding_mode="reflect"
    ).to(lane.device)
    pair = tnn.Sequential(
        tnn.Conv2d(4, 8, 3, 2, 1, groups=4, padding_mode="reflect"), tnn.Conv2d(8, 6, 1)
    ).to(lane.device)  # fmt: skip
    names = ("depthwise.weight", "depthwise.bias", "pointwise.weight", "pointwise.bias")
    assert tuple(layer.state_dict()) == names
    torch.manual_seed(3)
    fresh = nn.SeparableConv2d(4, 6, 3, bias=False, dtype=fp64)
    torch.manual_seed(3)
    first = tnn.Conv2d(4, 4, 3, groups=4, bias=False, dtype=fp64), tnn.Conv2d(4, 6, 1, bias=False, dtype=fp64)
    assert torch.equal(fresh.depthwise.weight, first[0].weight) and torch.equal(fresh.pointwise.weight, first[1].weight)
    pair.load_state_dict(dict(zip(pair.state_dict(), layer.state_dict().values(), strict=True)))
    x = torch.randn(2, 4, 7, 6, device=lane.device)
    torch.testing.assert_close(layer(x), pair(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="depth_multiplier must be a positive int, got 0"):
        nn.SeparableConv2d(4, 6, 3, depth_multiplier=0)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(input=torch.ones(4, 5)), "input must be 3-D or 4-D, got 2-D"),
        (dict(depthwise_weight=[1]), "depthwise_weight must be a torch.Tensor, got list"),
        (dict(depthwise_weight=torch.ones(4, 2, 3, 3)), r"depthwise_weight must have shape \(4 \* multiplier, 1"),
        (dict(depthwise_weight=torch.ones(6, 1, 3, 3)), "depthwise_weight must have shape .* got .6, 1, 3, 3."),
        (dict(depthwise_weight=torch.ones(4, 1, 9, 3)), "depthwise_weight must not reach beyond the padded input"),
        (dict(pointwise_weight=torch.ones(5, 4, 1, 2)), r"pointwise_weight must have shape \(channels, 4, 1, 1\)"),
        (dict(pointwise_weight=torch.ones(5, 8, 1, 1)), r"pointwise_weight must have shape \(channels, 4, 1, 1\)"),
        (dict(pointwise_weight=torch.ones(5, 4, 1, 1).double()), "pointwise_weight must have the dtype of input"),
        (dict(bias=torch.ones(4)), r"bias must have shape \(5,\)"),
        (dict(depthwise_bias=torch.ones(5)), r"depthwise_bias must have shape \(4,\)"),
        (dict(stride=0), "stride must be at least 1, got 0"),
        (dict(padding="full"), "padding must be"),
        (dict(dilation=(1, 2, 3)), "dilation must be an int or a pair"),
    ],
)
def test_bad_arguments(changed, message):
    arguments = dict(
        input=torch.ones(2, 4, 6, 6), depthwise_weight=torch.ones(4, 1, 3, 3), pointwise_weight=torch.ones(5, 4, 1, 1)
    )
    with pytest.raises((TypeError, ValueError), match=message):
        fF.separable_conv2d(**{**arguments, **changed})


def test_other_dtypes_run_on_pytorch():
    x, w1, w2 = torch.ones(1, 2, 3, 3).int(), torch.ones(2, 1, 1, 1).int(), torch.ones(3, 2, 1, 1).int()
    assert fF.separable_conv2d(x, w1, w2).tolist() == [[[[2] * 3] * 3] * 3]
    with fastcnn.backend("cpu"), fastcnn.strict(), pytest.raises(NotImplementedError, match="int32"):
        fF.separable_conv2d(x, w1, w2)
