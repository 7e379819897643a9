"""Convolutions nobody would choose, drawn by Hypothesis, on every family of kernels with tiles that do not fit them.

Each example runs conv2d or conv_transpose2d with the launch of one family forced for every pass that it can run
(conv_launch.use) and compares the output and all gradients with the truth. The draws are the same in every run; each
test states which kinds of trouble its draws must contain. A step of the interpreter costs the same for every tile, so
examples are bounded by their number of steps.
"""

import contextlib
import dataclasses
import math
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRET
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import fastcnn.functional as fF
from fastcnn.ops import conv2d as conv2d_ops
from fastcnn.ops import conv2d_stem, conv_launch, conv_layout
from fastcnn.ops.chips import chip
from fastcnn.ops.conv_launch import KINDS, Launch, Problem
from fastcnn.ops.conv_prediction import _tiles_and_steps, why_not
from fastcnn.testing import assert_close_to_truth, assert_matches

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
channels_last = torch.channels_last
MOST_STEPS = 60  # of one pass, tiles included
EXAMPLES = {"images": 90, "stem": 40, "gather": 90, "folded": 40, "packed": 40}
SPECIAL = {"images": 30, "stem": 15, "gather": 20, "folded": 15, "packed": 15}


def drawn(examples):
    """Settings of Hypothesis: the same examples every time. A GPU compiles each of them, so it takes fewer."""
    return settings(
        max_examples=examples if INTERPRET else examples // 5,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


# what surrounds the values in memory is NaN

LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=channels_last),
    "contiguous": lambda t: t.contiguous(),
    "images of a larger batch": lambda t: _surrounded(t, 0)[1:-1],
    "channels of a wider tensor": lambda t: _surrounded(t, 1)[:, 8:-8],
    "columns apart": lambda t: _surrounded(t.unsqueeze(4), 4)[..., 1],
    "columns first": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


def _surrounded(tensor, dim):
    """With NaN around it along a dimension, channels_last if it has 4; 8 on each side keep channels aligned."""
    shape = list(tensor.shape)
    shape[dim] = 8 if dim == 1 else 1
    nan = tensor.new_full(shape, torch.nan)
    wide = torch.cat([nan, tensor, nan], dim)
    return wide.contiguous(memory_format=channels_last) if wide.dim() == 4 else wide


# draws


@st.composite
def axes(draw, stride, largest):
    """(size, filter, padding, dilation) of one axis."""
    taps = draw(st.sampled_from((1, 2, 3, 4)))
    dilation = draw(st.integers(1, 4)) if taps > 1 else 1
    padding = draw(st.sampled_from((0, 0, 1, 2, taps // 2, taps + 1)))
    least = max(1, dilation * (taps - 1) + 1 - 2 * padding)
    return draw(st.integers(least, max(least, largest))), taps, padding, dilation


# channels and filters of a group, batches. TMA reads rows of 16 bytes: of pixels, or in the family stem of images
CHANNELS = {
    "images": (8, 16, 24, 32, 40),
    "stem": (1, 2, 3, 4, 5, 7),
    "gather": (1, 3, 7, 8, 16, 19, 34),
    "folded": (1, 2, 3, 4, 8),
    "packed": (1, 3, 7, 8),
}
FILTERS = {"images": (8, 16, 24, 32, 40), "stem": (8, 16, 24, 40), "packed": (1, 3, 8, 16)}
BATCHES = {"images": (1, 2, 15, 17, 33, 70, 65, 0), "stem": (1, 15, 17, 33, 0)}
TMA = ("images", "stem")


@st.composite
def convolutions(draw, family):
    """A convolution, its tensors' layout and dtype, and a tile; sizes are those of the convolution's input side."""
    stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)) | st.sampled_from(((1, 1), (2, 2))))
    height, width = (draw(axes(step, 5 if family in TMA else 9)) for step in stride)
    if draw(st.integers(0, 5)) == 0:
        # of one tap: a matrix product at stride 1, else with pixels that nothing reaches
        height, width = ((size, 1, 0, 1) for size, *_ in (height, width))
        stride = draw(st.sampled_from(((1, 1), (2, 2), (3, 1))))
    groups = 1 if family == "stem" else draw(st.sampled_from((2, 3, 4, 6) if family == "packed" else (1, 1, 1, 2, 3)))
    c = draw(st.sampled_from(CHANNELS[family]))
    if family == "stem":
        unit = 8 // math.gcd(8, c)
        height, width = (*height[:3], 1), (-(-width[0] // unit) * unit, *width[1:3], 1)
    dtypes = {"images": (bf16, fp16, fp32), "stem": (bf16, fp16)}.get(family, (bf16, fp16, fp32, fp32, fp64))
    if not INTERPRET and family in TMA:
        # in TF32 there is no result of PyTorch's to compare with
        dtypes = dtypes[:2]
    layouts = ("channels_last", "images of a larger batch") if family in TMA else tuple(LAYOUTS)
    case = SimpleNamespace(
        family=family,
        access={"images": "packed", "stem": "image"}.get(family, "narrow"),
        n=draw(st.sampled_from(BATCHES.get(family, (1, 2, 3, 5, 2, 3, 1, 0)))),
        c=c * groups,
        k=draw(st.sampled_from(FILTERS.get(family, (1, 3, 8, 16, 21, 40)))) * groups,
        size=(height[0], width[0]),
        filters=(height[1], width[1]),
        stride=stride,
        padding=(height[2], width[2]),
        dilation=(height[3], width[3]),
        groups=groups,
        dtype=draw(st.sampled_from(dtypes)),
        bias=draw(st.booleans()),
        transposed=draw(st.integers(0, 3)) == 0,
        layout=draw(st.sampled_from(layouts)),
        weight_layout="channels_last" if family == "images" else draw(st.sampled_from(tuple(LAYOUTS))),
    )
    case.launches = {kind: draw(launches(family, kind)) for kind in KINDS}
    if family == "stem":
        box = math.prod(conv2d_stem.box(c, *case.filters, case.stride, case.padding))
        for kind, side in (("forward", "block_k"), ("backward_weight", "block_n")):
            case.launches[kind] = dataclasses.replace(case.launches[kind], **{side: box})
    return case


@st.composite
def launches(draw, family, kind):
    """A launch of the family for a pass; small tiles, so that every edge shows."""
    weight = kind == "backward_weight"
    small = st.sampled_from((16, 32))
    if family in TMA:
        sides = draw(st.tuples(st.sampled_from((16, 32, 64)), small, small))
        persistent = dict(splits=draw(st.integers(1, 7))) if weight else dict(programs=draw(st.integers(1, 5)))
        return Launch(family, *sides, 4, 3, **persistent)
    rows, columns, depth = draw(st.tuples(st.sampled_from((32, 64)), small, small))
    return Launch(
        "folded" if family == "folded" and kind != "backward_input" else "gather",
        *((rows, columns, depth) if not weight else (columns, depth, rows)),
        4,
        2,
        pack=draw(st.sampled_from((2, 3, 4))) if family == "packed" else 1,
        splits=draw(st.sampled_from((1, 2, 5, 40))) if weight else 1,
    )


def problem_of(case, kind):
    """The conv_launch.Problem of a pass."""
    axes = zip(case.size, case.filters, case.stride, case.padding, case.dilation, strict=True)
    outputs = [(size + 2 * pad - dil * (taps - 1) - 1) // step + 1 for size, taps, step, pad, dil in axes]
    return Problem(
        *(kind, case.n, case.c, *case.size, case.k, *case.filters, *outputs),
        *(case.stride, case.padding, case.dilation, case.groups),
        {fp32: "tf32" if INTERPRET else "ieee", fp64: "fp64"}.get(case.dtype, "16-bit"),
        case.access,
    )


def plan(case, device):
    """{pass: launch}: what was drawn where it can run, else a gathering tile; only draws that are not too long."""
    chosen = {}
    for kind, launch in case.launches.items():
        problem = problem_of(case, kind)
        if why_not(problem, launch, chip(device)) is not None:
            launch = Launch("gather", 32, 16, 16, 4, 2)
        if case.n:
            tiles, steps = _tiles_and_steps(problem, launch)
            assume(tiles * launch.splits + steps <= MOST_STEPS)
        chosen[kind] = launch
    assume(any(chosen[kind] == case.launches[kind] for kind in KINDS))
    if case.family in TMA:
        # torch takes 1x1 images with 1x1 filters for contiguous ones
        assume(any(map(conv_layout.suggests_channels_last, tensors_of(case, device)[:2])))
    return chosen


@contextlib.contextmanager
def forced(chosen):
    """Every pass has its own launch."""
    with contextlib.ExitStack() as stack:
        for kind, launch in chosen.items():
            stack.enter_context(conv_launch.use(launch, kind))
        yield


def tensors_of(case, device):
    """The layer's input, weight and bias or None. A transposed layer's input lies on the output's side."""
    problem = problem_of(case, "forward")
    generator = torch.Generator(device).manual_seed(case.c * 31 + case.k)
    randn = lambda *shape: torch.randn(shape, generator=generator, device=device).to(case.dtype)
    x = randn(case.n, case.k, problem.p, problem.q) if case.transposed else randn(case.n, case.c, *case.size)
    w = randn(case.k, case.c // case.groups, *case.filters)
    b = randn(case.c if case.transposed else case.k) if case.bias else None
    tensors = LAYOUTS[case.layout](x), LAYOUTS[case.weight_layout](w), b
    return tuple(None if t is None else t.detach().requires_grad_() for t in tensors)


def layer(case, functional):
    """The layer as a function of its tensors."""
    arguments = dict(stride=case.stride, padding=case.padding, dilation=case.dilation, groups=case.groups)
    if not case.transposed:
        return lambda *tensors: functional.conv2d(*tensors, **arguments)
    # rows that no tap reaches belong to the output
    problem = problem_of(case, "forward")
    geometry = zip(case.filters, case.stride, case.padding, case.dilation, strict=True)
    least = [
        (p - 1) * step - 2 * pad + dil * (taps - 1) + 1
        for p, (taps, step, pad, dil) in zip((problem.p, problem.q), geometry, strict=True)
    ]
    rest = [size - reached for size, reached in zip(case.size, least, strict=True)]
    return lambda *tensors: functional.conv_transpose2d(*tensors, output_padding=rest, **arguments)


TROUBLE = {
    "batch 0": lambda case: case.n == 0,
    "batch 1": lambda case: case.n == 1,
    "one channel": lambda case: min(case.c, case.k) == case.groups,
    "channels not a multiple of 8": lambda case: case.c // case.groups % 8 > 0,
    "stride beyond the filter": lambda case: any(map(int.__gt__, case.stride, case.filters)),
    "padding beyond the filter": lambda case: any(map(int.__gt__, case.padding, case.filters)),
    "dilation and stride share a factor": lambda case: any(
        math.gcd(d, s) > 1 and r > 1 for d, s, r in zip(case.dilation, case.stride, case.filters, strict=True)
    ),
    "even filter": lambda case: any(taps % 2 == 0 for taps in case.filters),
    "1x1": lambda case: case.filters == case.stride == (1, 1),
    "1x1 strided": lambda case: case.filters == (1, 1) and max(case.stride) > 1,
    "groups": lambda case: case.groups > 1,
    "transposed": lambda case: case.transposed,
    "no bias": lambda case: not case.bias,
    **{str(dtype): lambda case, dtype=dtype: case.dtype == dtype for dtype in (bf16, fp16, fp32, fp64)},
    **{layout: lambda case, layout=layout: case.layout == layout for layout in LAYOUTS},
}
# TMA reads rows of 16 bytes, in bf16 and fp16
NOT_IMAGES = ("one channel", "channels not a multiple of 8", str(fp64), *list(LAYOUTS)[1:2], *list(LAYOUTS)[3:])


def launch_trouble(problem, launch):
    """What a tile has to cope with."""
    tiles, steps = _tiles_and_steps(problem, launch)
    if launch.splits * tiles > steps > 0:
        yield "more splits than steps"
    if launch.programs:
        yield "more tiles than programs" if tiles > launch.programs else "fewer tiles than programs"
    if tiles > problem.groups and problem.kind != "backward_weight":
        yield "several tiles"


@pytest.fixture
def interpreted_tf32(monkeypatch):
    """Launches for TF32 run in the interpreter, which computes them in fp32."""
    if INTERPRET:
        monkeypatch.setattr(conv2d_ops, "precision_of", lambda tensor, _: "tf32" if tensor.dtype == fp32 else "ieee")


@pytest.mark.parametrize("family", EXAMPLES)
def test_hostile_convolutions(lane, family, interpreted_tf32):
    seen = Counter()

    @drawn(EXAMPLES[family])
    @given(convolutions(family))
    def run(case):
        chosen = plan(case, lane.device)
        with forced(chosen):
            assert_matches(layer(case, fF), layer(case, F), *tensors_of(case, lane.device))
        seen.update(name for name, holds in TROUBLE.items() if holds(case))
        for kind, launch in chosen.items():
            seen[f"{launch.family} {kind}"] += 1
            seen.update(launch_trouble(problem_of(case, kind), launch))

    run()
    if INTERPRET:
        kernels = "gather" if family == "packed" else family
        expected = {f"{kernels} {kind}" for kind in KINDS} - {"folded backward_input", "stem backward_input"}
        if family in ("images", "gather"):
            expected |= {*TROUBLE, "more splits than steps", "several tiles"}
        if family == "images":
            expected -= {*NOT_IMAGES}
            expected |= {"more tiles than programs", "fewer tiles than programs"}
        assert sorted(expected - {*seen}) == []


def tap_by_tap(x, w, stride, padding, dilation, groups, outputs):
    """conv2d as a sum over taps of the pixels that they read: no arithmetic with the zeros of the padding."""
    x = x.unflatten(1, (groups, -1))
    w = w.unflatten(0, (groups, -1))
    total = 0
    for r in range(w.shape[3]):
        for s in range(w.shape[4]):
            rows, columns = (
                [
                    (o, i)
                    for o in range(outputs[d])
                    if 0 <= (i := o * stride[d] - padding[d] + tap * dilation[d]) < x.shape[3 + d]
                ]
                for d, tap in ((0, r), (1, s))
            )
            if rows and columns:
                (p, h), (q, v) = (torch.tensor(pairs, device=x.device).T for pairs in (rows, columns))
                product = torch.einsum("ngchw,gkc->ngkhw", x[..., h[:, None], v], w[..., r, s])
                around = (q[0], outputs[1] - 1 - q[-1], p[0], outputs[0] - 1 - p[-1])
                total = total + F.pad(product.flatten(1, 2), tuple(map(int, around)))
    return total


def with_special_values(tensor, data):
    """The same with one to three of Inf, NaN, -Inf somewhere."""
    spots = data.draw(st.lists(st.integers(0, tensor.numel() - 1), min_size=1, max_size=3))
    flat = tensor.detach().flatten()
    for spot, value in zip(spots, (torch.inf, torch.nan, -torch.inf), strict=False):
        flat[spot] = value
    return flat.view(tensor.shape)


def excused(case, chosen, grad, truth):
    """Where these families may have NaN though the truth is a number: masks for output and gradients.

    A gradient of the weight that is folded or a stem's meets padding: filters whose grad_output is not finite. Groups
    that share a tile share what is not finite in their pixels (see expand_groups).
    """
    masks = [torch.zeros_like(t, dtype=torch.bool) for t in truth]
    if case.family in ("folded", "stem"):
        masks[2] |= ~grad.isfinite().all(3).all(2).all(0)[:, None, None, None]
    for mask, true, kind in zip(masks, truth, ("forward", "backward_input"), strict=False):
        pack = chosen[kind].pack
        if pack > 1:
            bad = ~true.isfinite().unflatten(1, (case.groups // pack, -1)).all(2, keepdim=True)
            mask |= bad.expand(-1, -1, true.shape[1] * pack // case.groups, -1, -1).flatten(1, 2) & true.isfinite()
    return masks


@pytest.mark.parametrize("family", SPECIAL)
def test_hostile_convolutions_keep_nan_and_inf_where_they_belong(lane, family, interpreted_tf32):
    @drawn(SPECIAL[family])
    @given(convolutions(family), st.data())
    def run(case, data):
        assume(case.n and not case.transposed)
        chosen = plan(case, lane.device)
        x, w, _ = tensors_of(case, lane.device)
        x = LAYOUTS[case.layout](with_special_values(x, data)).requires_grad_()
        problem = problem_of(case, "forward")
        geometry = case.stride, case.padding, case.dilation, case.groups
        grad = torch.randn(case.n, case.k, problem.p, problem.q, device=lane.device).to(case.dtype)
        grad = with_special_values(grad, data)
        grad = grad.contiguous(memory_format=channels_last if case.access != "narrow" else torch.contiguous_format)
        with forced(chosen):
            y = fF.conv2d(x, w, None, *geometry)
            ours = y, *torch.autograd.grad(y, (x, w), grad)
        inputs = [t.detach().double().requires_grad_() for t in (x, w)]
        y = tap_by_tap(*inputs, *geometry, (problem.p, problem.q))
        assume(isinstance(y, torch.Tensor))
        truth = y.detach(), *torch.autograd.grad(y, inputs, grad.double())
        excuses = excused(case, chosen, grad, truth)
        for name, our, true, excuse in zip(("y", "grad_input", "grad_weight"), ours, truth, excuses, strict=True):
            our = torch.where(excuse, true.to(our.dtype), our.detach())
            assert_close_to_truth(name, our, true.to(case.dtype), true, case.dtype)

    run()


@drawn(100)
@given(st.one_of(map(convolutions, CHANNELS)), st.data())
def check_refusal(device, case, data):
    problem = problem_of(case, "forward")
    assume(case.n and not case.transposed)
    x, w, b = tensors_of(case, device)
    launch = data.draw(
        launches("images", "forward")
        | launches("packed", "forward")
        | launches("folded", "forward")
        | st.sampled_from(NEVER_RIGHT)
    )
    assume((case.family in TMA) == conv_layout.suggests_channels_last(x))
    reason = why_not(problem, launch, chip(device))
    assume(reason is not None)
    with conv_launch.use(launch), pytest.raises(ValueError, match=re.escape(reason)):
        layer(case, fF)(x, w, b)


NEVER_RIGHT = (
    Launch("gather", 48, 16, 16, 4, 2),
    Launch("gather", 32, 16, 8, 4, 2),
    Launch("gather", 32, 16, 16, 3, 2),
    Launch("gather", 32, 16, 16, 4, 0),
    Launch("gather", 32, 16, 16, 4, 2, splits=2),
    Launch("gather", 512, 256, 128, 8, 4),
    Launch("images", 64, 32, 16, 4, 3),
    Launch("no family", 64, 32, 16, 4, 3),
)


def test_launches_that_cannot_be_raise(lane, interpreted_tf32):
    check_refusal(lane.device)
