import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops import conv2d as conv2d_ops
from fastcnn.testing import assert_matches

channels_last = torch.channels_last
fp16, bf16, fp32, fp64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def randn(*shape, device, dtype=fp32, memory_format=torch.contiguous_format):
    tensor = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format)
    return tensor.detach().requires_grad_()


# x, w, arguments, dtype; a bias unless the id says no
CASES = {
    "stride 1": ((2, 3, 5, 4), (3, 5, 3, 3), {}, fp32),
    "U-Net: 2x2 stride 2": ((2, 6, 4, 5), (6, 3, 2, 2), dict(stride=2), fp32),
    "DCGAN: 4x4 stride 2, no bias": ((2, 7, 4, 4), (7, 5, 4, 4), dict(stride=2, padding=1), fp32),
    "output_padding": ((2, 3, 4, 5), (3, 4, 3, 3), dict(stride=(2, 3), padding=1, output_padding=(1, 2)), fp32),
    "pixels that no tap reaches are bias": ((2, 3, 4, 3), (3, 4, 1, 2), dict(stride=3, output_padding=2), fp32),
    "output_padding beyond stride, within dilation": (
        (2, 3, 4, 5),
        (3, 2, 2, 2),
        dict(dilation=3, output_padding=2),
        fp32,
    ),
    "dilation and stride": ((2, 3, 4, 3), (3, 2, 3, 2), dict(dilation=(2, 3), stride=(4, 2), padding=(1, 2)), fp32),
    "groups": ((2, 6, 4, 3), (6, 3, 3, 3), dict(groups=2, stride=2), fp32),
    "padding cuts all but a pixel": ((2, 3, 5, 5), (3, 4, 3, 3), dict(padding=3), fp32),
    "one pixel": ((1, 1, 1, 1), (1, 1, 1, 1), {}, fp32),
    "batch 0": ((0, 3, 4, 5), (3, 4, 3, 3), dict(stride=2), fp32),
    "unbatched": ((3, 4, 5), (3, 4, 3, 3), dict(stride=2, output_padding=1), fp32),
    "fp64": ((2, 3, 4, 5), (3, 4, 3, 3), dict(stride=2), fp64),
    "fp16": ((2, 19, 4, 5), (19, 18, 3, 3), dict(stride=2, padding=1), fp16),
    "bf16": ((2, 19, 4, 5), (19, 18, 3, 3), dict(stride=2, padding=1), bf16),
    "several tiles each way": ((2, 70, 6, 7), (70, 80, 2, 1), dict(stride=2), fp32),
}


@pytest.mark.parametrize("x, w, arguments, dtype", CASES.values(), ids=CASES)
def test_conv_transpose2d_matches_torch(lane, request, x, w, arguments, dtype):
    inputs = [randn(*x, device=lane.device, dtype=dtype), randn(*w, device=lane.device, dtype=dtype)]
    if "no bias" not in request.node.callspec.id:
        inputs.append(randn(w[1] * arguments.get("groups", 1), device=lane.device, dtype=dtype))
    ours = lambda *i: fF.conv_transpose2d(*i, **arguments)
    assert_matches(ours, lambda *i: F.conv_transpose2d(*i, **arguments), *inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (bf16, fp32), ids=str)
@pytest.mark.parametrize(
    "x, w, arguments",
    [
        pytest.param((8, 128, 64, 64), (128, 64, 2, 2), dict(stride=2), id="U-Net"),
        pytest.param((8, 512, 8, 8), (512, 256, 4, 4), dict(stride=2, padding=1), id="DCGAN"),
    ],
)
def test_conv_transpose2d_of_real_networks(x, w, arguments, dtype):
    x = randn(*x, device="cuda", dtype=dtype, memory_format=channels_last)
    w = randn(*w, device="cuda", dtype=dtype, memory_format=channels_last)
    ours = lambda *i: fF.conv_transpose2d(*i, **arguments)
    with fastcnn.backend("triton"), fastcnn.strict():
        assert_matches(ours, lambda *i: F.conv_transpose2d(*i, **arguments), x, w)


@pytest.mark.parametrize("w_format", (torch.contiguous_format, channels_last), ids=("w contiguous", "w channels_last"))
@pytest.mark.parametrize("x_format", (torch.contiguous_format, channels_last), ids=("x contiguous", "x channels_last"))
@pytest.mark.parametrize(
    "x, w, groups", [((2, 3, 4, 5), (3, 4, 3, 2), 1), ((2, 3, 1, 1), (3, 4, 1, 1), 1), ((1, 4, 3, 3), (4, 1, 3, 3), 4)]
)
def test_conv_transpose2d_has_torchs_strides(lane, x, w, groups, x_format, w_format):
    x = randn(*x, device=lane.device, memory_format=x_format)
    w = randn(*w, device=lane.device, memory_format=w_format)
    y, expected = (f.conv_transpose2d(x, w, groups=groups) for f in (fF, F))
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(expected)
    (dx, dw), (dx_expected, dw_expected) = (torch.autograd.grad(out, (x, w), grad) for out in (y, expected))
    assert dx.stride() == dx_expected.stride()
    assert dw.stride() == w.stride()
    torch.testing.assert_close((dx, dw), (dx_expected, dw_expected))


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
def test_conv_transpose2d_computes_wanted_gradients_only(lane, needs, monkeypatch):
    tensors = [torch.randn(shape, device=lane.device) for shape in ((2, 3, 4, 5), (3, 4, 3, 3), (4,))]
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(bool(need))
    y, expected = fF.conv_transpose2d(*tensors), F.conv_transpose2d(*tensors)
    called = []
    for name in ("forward_op", "backward_weight_op", "backward_bias_op"):
        op = getattr(conv2d_ops, name)
        monkeypatch.setattr(conv2d_ops, name, lambda *a, op=op: called.append(1) or op(*a))
    wanted = [t for t in tensors if t.requires_grad]
    # an expanded gradient: one element for all
    ours, theirs = (torch.autograd.grad(out, wanted, torch.ones((), device=lane.device).expand(y.shape))
                    for out in (y, expected))  # fmt: skip
    torch.testing.assert_close(ours, theirs)
    assert len(called) == 1


def test_conv_transpose2d_of_views(lane):
    wide = torch.full((2, 6, 4, 10), torch.nan, device=lane.device)
    wide[:, ::2, :, ::2] = torch.randn(2, 3, 4, 5, device=lane.device)
    x = wide[:, ::2, :, ::2].requires_grad_()
    w = torch.randn(3, 3, 2, 4, device=lane.device).permute(1, 3, 0, 2).requires_grad_()
    ours = lambda *i: fF.conv_transpose2d(*i, stride=2)
    assert_matches(ours, lambda *i: F.conv_transpose2d(*i, stride=2), x, w)


def test_conv_transpose2d_double_backward(lane):
    x, w, b = (randn(*shape, device=lane.device, dtype=fp64) for shape in ((2, 2, 3, 2), (2, 2, 2, 3), (2,)))
    function = lambda *i: fF.conv_transpose2d(*i, stride=2, padding=1, output_padding=1)
    assert torch.autograd.gradcheck(function, (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, w, b), fast_mode=True)


def test_conv_transpose2d_under_autocast(lane):
    x, w, b = (randn(*shape, device=lane.device) for shape in ((2, 3, 4, 5), (3, 4, 3, 3), (4,)))
    with torch.autocast(lane.device.type, dtype=bf16):
        y, expected = fF.conv_transpose2d(x, w, b), F.conv_transpose2d(x, w, b)
    assert y.dtype == expected.dtype == bf16
    torch.testing.assert_close(y, expected, atol=0.1, rtol=0.05)
    assert all(g.dtype == fp32 for g in torch.autograd.grad(y.float().sum(), (x, w, b)))


def test_conv_transpose2d_compiles_without_graph_breaks(lane):
    x, w = randn(2, 3, 4, 5, device=lane.device), randn(3, 4, 3, 3, device=lane.device, memory_format=channels_last)
    step = lambda x, w: fF.conv_transpose2d(x, w, stride=2, output_padding=1).square()
    y, expected = torch.compile(step, fullgraph=True, backend="aot_eager")(x, w), step(x, w)
    assert y.stride() == expected.stride()
    ours, eager = (torch.autograd.grad(out.sum(), (x, w)) for out in (y, expected))
    torch.testing.assert_close((y, ours), (expected, eager))


BAD = {
    "input must be 3-D or 4-D, got 5-D": dict(input=torch.zeros(1, 3, 4, 4, 4)),
    r"input must have weight.shape\[0\] = 4 channels, got 3": dict(weight=torch.zeros(4, 4, 3, 3)),
    "groups must divide the 3 channels of input, got 2": dict(groups=2),
    "weight must have no dimension of size 0": dict(weight=torch.zeros(3, 0, 3, 3)),
    "weight must have the dtype of input": dict(weight=torch.zeros(3, 4, 3, 3).double()),
    r"bias must have shape \(4,\)": dict(bias=torch.zeros(1)),
    "output_padding must be below stride 1 or dilation 1, got 1": dict(output_padding=1),
    "output_padding must be at least 0, got -1": dict(output_padding=-1),
    "padding must be an int or a pair of ints, got 'same'": dict(padding="same"),
    "padding must leave an output of at least 1 x 1, got 4, which gives 0 x 0": dict(padding=4),
    "stride must be at least 1, got 0": dict(stride=0),
}


@pytest.mark.parametrize("message, arguments", BAD.items(), ids=BAD)
def test_conv_transpose2d_refuses_bad_arguments(message, arguments):
    good = dict(input=torch.zeros(2, 3, 6, 6), weight=torch.zeros(3, 4, 3, 3), bias=torch.zeros(4))
    with pytest.raises((TypeError, ValueError), match=message):
        fF.conv_transpose2d(**good | arguments)
