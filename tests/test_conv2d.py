import dataclasses

import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops import conv2d as conv2d_ops
from fastcnn.ops import conv2d_gather, conv_launch, conv_sums, conv_tiles
from fastcnn.testing import assert_matches

channels_last = torch.channels_last
fp16, bf16, fp32, fp64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def leaf(tensor):
    return tensor.detach().requires_grad_()


def randn(*shape, device, dtype=fp32, memory_format=torch.contiguous_format):
    return leaf(torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format))


# x, w, arguments, dtype; a bias unless the id says no
CASES = {
    "LeNet's first layer": ((2, 1, 12, 12), (6, 1, 5, 5), {}, fp32),
    "one pixel, one tap": ((1, 1, 1, 1), (1, 1, 1, 1), {}, fp32),
    "odd sizes, no bias": ((3, 7, 9, 11), (5, 7, 3, 3), {}, fp32),
    "even filter, uneven pads": ((2, 3, 7, 6), (4, 3, 4, 2), dict(padding=(2, 0)), fp32),
    "stride 2": ((2, 17, 8, 7), (33, 17, 3, 3), dict(stride=2, padding=1), fp32),
    "1x1 stride 2: no tap reaches most pixels": ((2, 5, 7, 8), (6, 5, 1, 1), dict(stride=2), fp32),
    "stride beyond the filter": ((1, 3, 11, 10), (4, 3, 2, 2), dict(stride=(4, 3)), fp32),
    "stride beyond the image": ((2, 3, 5, 4), (4, 3, 2, 2), dict(stride=9), fp32),
    "padding beyond the filter": ((2, 2, 3, 3), (3, 2, 2, 2), dict(padding=(3, 4)), fp32),
    "dilation": ((2, 3, 9, 10), (4, 3, 3, 2), dict(dilation=(2, 3), padding=2), fp32),
    "dilation and stride share a factor": (
        (2, 3, 13, 9),
        (4, 3, 3, 3),
        dict(dilation=2, stride=(2, 4), padding=3),
        fp32,
    ),
    "all unlike": ((2, 3, 13, 9), (4, 3, 2, 3), dict(dilation=(3, 1), stride=(2, 3), padding=(1, 2)), fp32),
    "groups": ((2, 6, 6, 5), (9, 2, 3, 3), dict(groups=3, padding=1), fp32),
    "depthwise with multiplier": ((2, 3, 6, 5), (6, 1, 3, 3), dict(groups=3, padding=1, stride=2), fp32),
    "same": ((2, 3, 6, 5), (4, 3, 3, 5), dict(padding="same", dilation=2), fp32),
    "same, even filter": ((2, 3, 6, 5), (4, 3, 4, 2), dict(padding="same"), fp32),
    "valid": ((2, 3, 6, 5), (4, 3, 4, 2), dict(padding="valid", stride=2), fp32),
    "wide image": ((1, 2, 3, 300), (3, 2, 3, 3), dict(padding=1, stride=(1, 2)), fp32),
    "batch 0": ((0, 3, 6, 5), (4, 3, 3, 3), {}, fp32),
    "unbatched": ((3, 6, 5), (4, 3, 3, 3), dict(padding=1), fp32),
    "fp64": ((2, 3, 6, 5), (4, 3, 3, 3), dict(stride=2, padding=1), fp64),
    "fp16": ((2, 19, 6, 5), (18, 19, 3, 3), dict(stride=2, padding=1), fp16),
    "bf16": ((2, 19, 6, 5), (18, 19, 3, 3), dict(stride=2, padding=1), bf16),
    "several tiles each way, no bias": ((2, 80, 10, 10), (70, 80, 1, 2), {}, fp32),
}


@pytest.mark.parametrize("x, w, arguments, dtype", CASES.values(), ids=CASES)
def test_conv2d_matches_torch(lane, request, x, w, arguments, dtype):
    inputs = [randn(*x, device=lane.device, dtype=dtype), randn(*w, device=lane.device, dtype=dtype)]
    if "no bias" not in request.node.callspec.id:
        inputs.append(randn(w[0], device=lane.device, dtype=dtype))
    assert_matches(lambda *i: fF.conv2d(*i, **arguments), lambda *i: F.conv2d(*i, **arguments), *inputs)


NETWORKS = {
    "stem": ((8, 3, 224, 224), (64, 3, 7, 7), dict(stride=2, padding=3)),
    "3x3": ((8, 128, 28, 28), (128, 128, 3, 3), dict(padding=1)),
    "3x3 stride 2": ((8, 256, 28, 28), (256, 256, 3, 3), dict(padding=1, stride=2)),
    "1x1": ((8, 256, 56, 56), (64, 256, 1, 1), {}),
    "1x1 stride 2": ((8, 1024, 14, 14), (2048, 1024, 1, 1), dict(stride=2)),
    "ResNeXt": ((8, 128, 28, 28), (128, 4, 3, 3), dict(padding=1, groups=32)),
    "VGG": ((4, 64, 224, 224), (64, 64, 3, 3), dict(padding=1)),
    "EfficientNet's odd channels": ((8, 24, 56, 56), (144, 24, 1, 1), {}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (bf16, fp16, fp32), ids=str)
@pytest.mark.parametrize("x, w, arguments", NETWORKS.values(), ids=NETWORKS)
def test_conv2d_of_real_networks(x, w, arguments, dtype):
    x = randn(*x, device="cuda", dtype=dtype, memory_format=channels_last)
    w = leaf(randn(*w, device="cuda", dtype=dtype, memory_format=channels_last) * 0.05)
    with fastcnn.backend("triton"), fastcnn.strict():
        assert_matches(lambda *i: fF.conv2d(*i, **arguments), lambda *i: F.conv2d(*i, **arguments), x, w)


@pytest.mark.parametrize("w_format", (torch.contiguous_format, channels_last), ids=("w contiguous", "w channels_last"))
@pytest.mark.parametrize("x_format", (torch.contiguous_format, channels_last), ids=("x contiguous", "x channels_last"))
@pytest.mark.parametrize(
    "x, w, groups",
    [
        ((2, 3, 6, 5), (4, 3, 3, 2), 1),
        ((2, 1, 6, 5), (4, 1, 1, 1), 1),  # sizes of one: both layouts at once
        ((2, 4, 1, 1), (6, 4, 1, 1), 1),
        ((1, 4, 3, 3), (4, 1, 3, 3), 4),
    ],
    ids=str,
)
def test_conv2d_has_torchs_strides(lane, x, w, groups, x_format, w_format):
    x = randn(*x, device=lane.device, memory_format=x_format)
    w = randn(*w, device=lane.device, memory_format=w_format)
    y, expected = fF.conv2d(x, w, groups=groups), F.conv2d(x, w, groups=groups)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(expected)
    (dx, dw), (dx_expected, dw_expected) = (torch.autograd.grad(out, (x, w), grad) for out in (y, expected))
    assert dx.stride() == dx_expected.stride()
    assert dw.stride() == w.stride()
    torch.testing.assert_close((dx, dw), (dx_expected, dw_expected))


def every_other_column(tensor):
    wide = torch.full((*tensor.shape, 2), torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide[..., 0] = tensor
    return wide[..., 0]


VIEWS = {
    "gaps of NaN": every_other_column,
    "rows and columns swapped": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:1].expand(t.shape),
    "offset by one element": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "half of the channels": lambda t: torch.cat([t, t * torch.nan], 1).contiguous(memory_format=channels_last)[
        :, : t.shape[1]
    ],
}


@pytest.mark.parametrize("which", (0, 1), ids=("input", "weight"))
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_conv2d_of_views(lane, view, which):
    tensors = [torch.randn(2, 4, 5, 5, device=lane.device), torch.randn(3, 4, 2, 2, device=lane.device)]
    tensors[which] = view(tensors[which])
    assert_matches(lambda x, w: fF.conv2d(x, w, stride=2), lambda x, w: F.conv2d(x, w, stride=2), *map(leaf, tensors))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_conv2d_backward_of_views(lane, view):
    x, w, b = (randn(*shape, device=lane.device) for shape in ((2, 3, 6, 5), (4, 3, 3, 3), (4,)))
    y, expected = fF.conv2d(x, w, b), F.conv2d(x, w, b)
    grad = view(torch.randn_like(expected))
    ours, theirs = (torch.autograd.grad(out, (x, w, b), grad) for out in (y, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
def test_conv2d_computes_wanted_gradients_only(lane, needs, monkeypatch):
    called = []
    for name in ("backward_input_op", "backward_weight_op", "backward_bias_op"):
        op = getattr(conv2d_ops, name)
        monkeypatch.setattr(conv2d_ops, name, lambda *a, op=op, name=name: called.append(name) or op(*a))
    tensors = [torch.randn(shape, device=lane.device) for shape in ((2, 3, 6, 5), (4, 3, 3, 3), (4,))]
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(bool(need))
    assert_matches(fF.conv2d, F.conv2d, *tensors)
    assert len(called) == sum(needs)


def test_conv2d_keeps_nan_and_inf_where_they_belong(lane):
    x = torch.randn(2, 3, 6, 6, device=lane.device)
    x[0, 0, 0, 0], x[1, 1, 5, 2], x[1, 2, 3, 5] = torch.inf, -torch.inf, torch.nan
    w, b = torch.randn(4, 3, 3, 3, device=lane.device), torch.randn(4, device=lane.device)
    b[2] = torch.nan
    x, w, b = leaf(x), leaf(w), leaf(b)
    y, expected = fF.conv2d(x, w, b, padding=1), F.conv2d(x, w, b, padding=1)
    torch.testing.assert_close(y, expected, equal_nan=True)
    # an Inf in the gradient of a border pixel meets the zeros of the padding
    x = leaf(torch.randn_like(x))
    grad = torch.randn_like(expected)
    grad[0, 1, 0, 0], grad[1, 3, 5, 3] = torch.inf, torch.nan
    ours, theirs = (torch.autograd.grad(f(x, w, b, padding=1), (x, w, b), grad) for f in (fF.conv2d, F.conv2d))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def small_integers(*shape, device, dtype, memory_format=torch.contiguous_format):
    values = torch.randint(-2, 3, shape, device=device) * (torch.rand(shape, device=device) < 0.5)
    return leaf(values.to(dtype).contiguous(memory_format=memory_format))


def tiles():
    """(family, or "narrow", arithmetic, tile): every shape of a tile once, warps and stages are the compiler's."""
    found = {}
    for (family, _, arithmetic, access), rows in conv_tiles.TILES.items():
        # the interpreter has no tf32, without which there are no images in fp32; few channels have tests of their own
        if (family, arithmetic) != ("images", "tf32") and family != "folded":
            name = "narrow" if access == "narrow" else family
            found |= {(name, arithmetic, tile[:3]): tile for tile in rows}
    return [(family, arithmetic, tile) for (family, arithmetic, _), tile in sorted(found.items())]


@pytest.mark.parametrize("family, arithmetic, tile", tiles(), ids=str)
def test_conv2d_is_exact_on_integers_with_every_tile(lane, family, arithmetic, tile):
    dtype = {"16-bit": bf16, "fp64": fp64}.get(arithmetic, fp32)
    block_m, block_n, block_k, *_ = tile
    # rows and columns: more than one tile of each, the last one ragged
    if family == "images":
        n, c, k, size = block_m + 2, 2 * block_k, max(block_n, block_k) + block_k, (2, 1)
    else:
        n, c, k, size = 2, *((5, 18) if family == "narrow" else (16, 32)), (13, 11)
    x = small_integers(n, c, *size, device=lane.device, dtype=dtype, memory_format=channels_last)
    w = small_integers(k, c, 1, 2, device=lane.device, dtype=dtype, memory_format=channels_last)
    b = small_integers(k, device=lane.device, dtype=dtype)
    launch = conv_launch.Launch("gather" if family == "narrow" else family, *tile, programs=2)
    split = dataclasses.replace(launch, splits=3)
    with conv_launch.use(launch, "forward", "backward_input"), conv_launch.use(split, "backward_weight"):
        y = fF.conv2d(x, w, b, padding=(0, 1))
        grad = small_integers(*y.shape, device=lane.device, dtype=dtype, memory_format=channels_last)
        ours = (y, *torch.autograd.grad(y, (x, w, b), grad))
    inputs = [leaf(t.double()) for t in (x, w, b)]
    expected = F.conv2d(*inputs, padding=(0, 1))
    truth = (expected, *torch.autograd.grad(expected, inputs, grad.double()))
    for our, true in zip(ours, truth, strict=True):
        # sums beyond 256 round in bf16, once
        assert torch.equal(our, true.to(dtype))


@pytest.mark.parametrize("stride, dilation, padding", [(1, 2, 1), (3, 1, 2), ((2, 3), (2, 1), (0, 3))])
def test_conv2d_gradients_are_adjoint(lane, stride, dilation, padding):
    arguments = dict(stride=stride, dilation=dilation, padding=padding, groups=2)
    x = small_integers(2, 4, 11, 8, device=lane.device, dtype=fp32)
    w = small_integers(6, 2, 3, 2, device=lane.device, dtype=fp32)
    y = fF.conv2d(x, w, **arguments)
    grad = small_integers(*y.shape, device=lane.device, dtype=fp32)
    dx, dw = torch.autograd.grad(y, (x, w), grad)
    assert (y * grad).sum() == (x * dx).sum() == (w * dw).sum()


def test_conv2d_splits_pixels(lane):
    # 1,155 pixels are 73 steps: the gradients of weight and bias are sums of several slabs, the last of them shorter
    x, w = randn(3, 2, 35, 12, device=lane.device), randn(3, 2, 1, 2, device=lane.device)
    b = randn(3, device=lane.device)
    assert conv_sums.shares(1155, 1, 64)[0] > 1
    with conv_launch.use(conv_launch.Launch("gather", 16, 16, 16, 4, 2, splits=10), "backward_weight"):
        assert_matches(fF.conv2d, F.conv2d, x, w, b)


@pytest.mark.parametrize("groups", (1, 2))
def test_conv2d_copies_planes_to_pixels(lane, groups):
    x, w = (
        randn(2, 16, 5, 6, device=lane.device, dtype=bf16),
        randn(24, 16 // groups, 3, 3, device=lane.device, dtype=bf16),
    )
    geometry = (1, 1), (1, 1), (1, 1), groups
    problem = conv2d_ops.problem_of("forward", x, w, F.conv2d(x, w, None, *geometry), geometry, "ieee")
    assert problem.access == "packed" and problem.copied
    function = lambda x, w: fF.conv2d(x, w, None, *geometry)
    assert_matches(function, lambda x, w: F.conv2d(x, w, None, *geometry), x, w)
    # a channel fewer does not fill 16 bytes: read as it is
    x, w = x[:, 1:].detach(), w[:, : 15 // groups].detach()
    if groups == 1:
        problem = conv2d_ops.problem_of("forward", x, w, F.conv2d(x, w, None, *geometry), geometry, "ieee")
        assert problem.access == "narrow" and not problem.copied


def far_apart(tensor, dim):
    """The same values with the third element of a dimension 2^31 elements from the first: one too far for 32 bits."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    storage = torch.empty(2**31 + 2**16, dtype=tensor.dtype, device=tensor.device)  # never touched: costs no memory
    torch.utils.deterministic.fill_uninitialized_memory = fill
    strides = list(tensor.contiguous().stride())
    strides[dim] = 2**30
    return storage.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("dim", (0, 1), ids=("outer", "channels"))
@pytest.mark.parametrize("which", ("input", "weight", "grad_output"))
def test_conv2d_of_elements_beyond_32_bits(lane, which, dim):
    x, w = randn(3, 3, 3, 3, device=lane.device, dtype=fp16), randn(3, 3, 2, 2, device=lane.device, dtype=fp16)
    grad = torch.randn(3, 3, 2, 2, device=lane.device, dtype=fp16)
    expected = F.conv2d(x, w)
    truth = (expected, *torch.autograd.grad(expected, (x, w), grad))
    if which == "grad_output":
        grad = far_apart(grad, dim)
    x, w = (leaf(far_apart(t.detach(), dim)) if which == name else t for name, t in (("input", x), ("weight", w)))
    y = fF.conv2d(x, w)
    torch.testing.assert_close((y, *torch.autograd.grad(y, (x, w), grad)), truth, atol=1e-2, rtol=1e-2)


def test_conv2d_of_many_pixels_in_64_bits(lane, monkeypatch):
    # the variant that gigantic tensors take, on a small one
    monkeypatch.setattr(conv2d_gather, "needs_int64", lambda *_: True)
    x, w = randn(2, 4, 7, 6, device=lane.device), randn(6, 2, 3, 3, device=lane.device)
    arguments = dict(stride=2, padding=1, groups=2)
    assert_matches(lambda *i: fF.conv2d(*i, **arguments), lambda *i: F.conv2d(*i, **arguments), x, w)
    assert not conv2d_ops.common.exceeds_int32(x)


def test_conv2d_chooses_64_bits_by_size():
    small = torch.empty(4, device="meta")
    assert not conv2d_gather.needs_int64(10**6, small)
    # few elements, many pixels: an expanded gradient
    assert conv2d_gather.needs_int64(2**31, small)
    assert conv2d_gather.needs_int64(1, small, torch.empty(2**31, device="meta"))


def test_conv2d_double_backward(lane):
    x, w, b = (randn(*shape, device=lane.device, dtype=fp64) for shape in ((2, 2, 4, 5), (2, 2, 2, 2), (2,)))
    for arguments in (dict(stride=2, padding=1), dict(padding="same")):
        function = lambda *i, a=arguments: fF.conv2d(*i, **a)
        assert torch.autograd.gradcheck(function, (x, w, b), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x, w, b), fast_mode=True)


@pytest.mark.parametrize("dtype", (fp16, bf16), ids=str)
def test_conv2d_under_autocast(lane, dtype):
    x, w, b = (randn(*shape, device=lane.device) for shape in ((2, 3, 6, 5), (4, 3, 3, 3), (4,)))
    with torch.autocast(lane.device.type, dtype=dtype):
        y, expected = fF.conv2d(x, w, b), F.conv2d(x, w, b)
        # half of the operands in the low dtype already
        torch.testing.assert_close(fF.conv2d(x.to(dtype), w, b), expected, atol=0.1, rtol=0.05)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, atol=0.1, rtol=0.05)
    grads = torch.autograd.grad(y.float().square().sum(), (x, w, b))
    theirs = torch.autograd.grad(expected.float().square().sum(), (x, w, b))
    for ours, their in zip(grads, theirs, strict=True):
        assert ours.dtype == fp32
        torch.testing.assert_close(ours, their, atol=0.05 * their.abs().max().item(), rtol=0.1)


def test_conv2d_declines_what_its_kernels_lack(lane):
    x, w = (
        torch.ones(1, 2, 4, 4, dtype=torch.int64, device="cpu"),
        torch.ones(3, 2, 2, 2, dtype=torch.int64, device="cpu"),
    )
    empty = torch.randn(2, 0, 4, 4, device=lane.device), torch.randn(3, 0, 2, 2, device=lane.device)
    with fastcnn.strict(False):
        assert torch.equal(fF.conv2d(x, w), F.conv2d(x, w))
        assert fF.conv2d(*empty).shape == F.conv2d(*empty).shape
    with pytest.raises(NotImplementedError, match="at least one input channel"):
        fF.conv2d(*empty)


def test_conv2d_compiles_without_graph_breaks(lane):
    x = randn(2, 3, 6, 5, device=lane.device, memory_format=channels_last)
    w, b = randn(4, 3, 4, 2, device=lane.device), randn(4, device=lane.device)

    def step(x, w, b):
        return fF.conv2d(x, w, b, padding="same").square()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, w, b), step(x, w, b)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)
    ours, eager = (torch.autograd.grad(out.sum(), (x, w, b)) for out in (y, expected))
    torch.testing.assert_close(ours, eager)


def test_conv2d_ops_are_sound(lane):
    ops = torch.ops.fastcnn
    x = torch.randn(2, 4, 5, 5, device=lane.device).contiguous(memory_format=channels_last)
    w, b = torch.randn(6, 2, 3, 3, device=lane.device), torch.randn(6, device=lane.device)
    dy = torch.randn(2, 6, 3, 3, device=lane.device)
    geometry = ((2, 2), (1, 1), (1, 1), 2)
    for op, arguments in (
        (ops.conv2d, (x, w, b, (3, 3), *geometry, True, "conv", "triton")),
        (ops.conv2d_backward_input, (dy, w, None, (5, 5), *geometry, False, "conv", "triton")),
        (ops.conv2d_backward_weight, (dy, x, w, *geometry, "conv", "triton")),
        (ops.conv2d_backward_bias, (dy, "triton")),
    ):
        torch.library.opcheck(op.default, arguments)


def test_conv2d_follows_torchs_tf32_switches():
    tensor = torch.empty(1, device="meta")
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        for conv.fp32_precision, matmul.fp32_precision in (("tf32", "ieee"), ("ieee", "tf32")):
            assert conv2d_ops.precision_of(tensor, "conv") == conv.fp32_precision
            assert conv2d_ops.precision_of(tensor, "matmul") == matmul.fp32_precision
            assert conv2d_ops.precision_of(tensor.half(), "conv") == "ieee"
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


BAD = {
    "input must be a torch.Tensor, got list": dict(input=[1.0]),
    "input must be 3-D or 4-D, got 2-D": dict(input=torch.zeros(4, 4)),
    "weight must be 4-D, got 3-D": dict(weight=torch.zeros(4, 3, 3)),
    "weight must have the dtype of input .torch.float32., got torch.float16": dict(
        weight=torch.zeros(4, 3, 3, 3).half()
    ),
    "bias must have the dtype of input": dict(bias=torch.zeros(4).double()),
    "weight must be on the device of input .cpu., got meta": dict(weight=torch.zeros(4, 3, 3, 3, device="meta")),
    r"input must have groups \* weight.shape\[1\] = 1 \* 2 = 2 channels, got 3": dict(weight=torch.zeros(4, 2, 3, 3)),
    "groups must divide the 4 filters of weight, got 3": dict(weight=torch.zeros(4, 1, 3, 3), groups=3),
    "groups must be at least 1, got 0": dict(groups=0),
    "groups must be an int, got 1.0": dict(groups=1.0),
    "padding must be at least 0, got -1": dict(padding=-1),
    "stride must be at least 1, got 0": dict(stride=0),
    r"stride must be an int or a pair of ints, got \(1, 1, 1\)": dict(stride=(1, 1, 1)),
    "dilation must be at least 1, got 0": dict(dilation=0),
    "a filter of 7 x 5 with its dilation": dict(dilation=(3, 2)),
    r"padded input \(6 x 6\)": dict(dilation=(3, 2)),
    "padding must not be 'same' when stride is not 1, got stride 2": dict(padding="same", stride=2),
    "padding must be an int, a pair of ints, 'same' or 'valid', got 'full'": dict(padding="full"),
    r"bias must have shape \(4,\), one element per output channel, got \(3,\)": dict(bias=torch.zeros(3)),
    "input must have a height and width of at least 1": dict(input=torch.zeros(1, 3, 0, 6)),
    "weight must have no dimension of size 0": dict(weight=torch.zeros(4, 3, 0, 3)),
}


@pytest.mark.parametrize("message, arguments", BAD.items(), ids=BAD)
def test_conv2d_refuses_bad_arguments(message, arguments):
    good = dict(input=torch.zeros(2, 3, 6, 6), weight=torch.zeros(4, 3, 3, 3), bias=torch.zeros(4))
    with pytest.raises((TypeError, ValueError), match=message):
        fF.conv2d(**good | arguments)
