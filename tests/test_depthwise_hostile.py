"""Depthwise convolutions nobody would choose, drawn by Hypothesis: conv2d with groups = channels, and everything that
its host functions do on load and on store, against plain PyTorch in fp64.

The draws are the same in every run; each test states which kinds of trouble its draws must contain. The lane "cpu" runs
the numba kernels, the lane "interpret" the Triton kernels on smaller images.
"""

import math
import random
from collections import Counter
from types import SimpleNamespace

import depthwise_reference as reference
import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRET
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from test_conv_hostile import LAYOUTS, tap_by_tap, with_special_values
from torch.testing._internal.common_methods_invocations import op_db

import fastcnn.functional as fF
from fastcnn.ops import batch_statistics, depthwise_conv2d
from fastcnn.ops.conv_fusion import Correction, Gated, Pending
from fastcnn.ops.conv_layout import suggests_channels_last
from fastcnn.ops.pending_cpu import KINDS
from fastcnn.testing import assert_close_to_truth, assert_matches

LANES = ("triton", "cpu")
bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish", "sigmoid", "tanh")


def drawn(examples):
    """Settings of Hypothesis: the same examples every time. A GPU compiles each of them, so it takes fewer."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


# draws

# height and width where the filter does not ask for more; channels, filter sizes. The interpreter takes a second for
# what numba does in a millisecond
LARGEST = 5 if INTERPRET else 14
CHANNELS = 12 if INTERPRET else 40
TAPS = (1, 2, 3, 3, 3, 4, 5) if INTERPRET else (1, 2, 3, 3, 3, 4, 5, 5, 6, 7, 8, 9)
EXAMPLES = (30, 10, 30) if INTERPRET else (300, 80, 300)  # of each test


# random.Random of a drawn seed: drawn evenly, which Hypothesis does not do by itself
SEEDS = st.integers(0, 2**40)


def axis(pick):
    """(size, filter, near padding, far padding, dilation)."""
    taps = pick(TAPS)
    dilation = pick((1, 1, 1, 2, 3)) if taps > 1 else 1
    near = pick((0, 0, 1, 2, taps // 2, taps // 2, taps + 1))
    far = pick((near, near, near, 0, taps))
    least = max(1, dilation * (taps - 1) + 1 - near - far, dilation * (taps - 1) + 1 - 2 * near)
    return pick(range(least, max(least, LARGEST) + 1)), taps, near, far, dilation


def square(pick, sizes, taps):
    """The same of both axes, as in networks: a square filter in its place."""
    return tuple((pick(sizes), taps, taps // 2, taps // 2, 1) for _ in range(2))


@st.composite
def convolutions(draw):
    """A depthwise convolution, the tensors' layouts and the dtype."""
    pick = random.Random(draw(SEEDS)).choice
    stride = pick(((1, 1), (1, 1), (2, 2), (2, 2), (1, 2), (3, 1), (4, 4)))
    kind = pick(range(20))
    if kind == 0 and not INTERPRET:
        axes = square(pick, range(4, 7), pick((13, 31)))
    elif kind == 1:
        axes = square(pick, range(1, LARGEST), 1)
    elif kind < 10:
        axes = square(pick, range(1, LARGEST + 1), pick((3, 5) if INTERPRET else (3, 5, 7)))
        stride = pick(((1, 1), (2, 2)))
    else:
        axes = axis(pick), axis(pick)
    sizes, filters, near, far, dilation = zip(*axes, strict=True)
    return SimpleNamespace(
        n=pick((1, 2, 1, 2, 1 if INTERPRET else 3, 0)),
        c=pick((*range(1, CHANNELS + 1), 1, 2, 8, CHANNELS)),
        multiplier=pick((1, 1, 1, 2, 3)),
        size=sizes,
        filters=filters,
        stride=stride,
        padding=near,
        far=far,
        dilation=dilation,
        same=pick(range(5)) == 0,
        dtype=pick((bf16, fp16, fp32, fp32, fp64) if INTERPRET else (fp32, fp32, fp64)),
        bias=pick((False, True)),
        layout=pick(("channels_last", *LAYOUTS)),
        weight_layout=pick(tuple(LAYOUTS)),
        grad_layout=pick(("channels_last", *LAYOUTS)),
    )


def outputs(case, far):
    """(P, Q) with this padding at the far side."""
    axes = zip(case.size, case.filters, case.stride, case.padding, far, case.dilation, strict=True)
    return tuple(
        (size + near + far - dilation * (taps - 1) - 1) // step + 1 for size, taps, step, near, far, dilation in axes
    )


def values(case, device):
    """randn(*shape) in the case's dtype."""
    generator = torch.Generator().manual_seed(case.c * 31 + case.filters[0])
    return lambda *shape, dtype=case.dtype: torch.randn(shape, generator=generator).to(device, dtype)


def tensors_of(case, device):
    """input, weight, and bias or None."""
    randn, k = values(case, device), case.c * case.multiplier
    x = LAYOUTS[case.layout](randn(case.n, case.c, *case.size))
    w = LAYOUTS[case.weight_layout](randn(k, 1, *case.filters))
    return x, w, randn(k) if case.bias else None


TROUBLE = {
    "batch 0": lambda case: case.n == 0,
    "batch 1": lambda case: case.n == 1,
    "one channel": lambda case: case.c == 1,
    "channels not a multiple of 8": lambda case: case.c % 8 > 0,
    "stride beyond the filter": lambda case: any(map(int.__gt__, case.stride, case.filters)),
    "padding beyond the filter": lambda case: any(map(int.__gt__, case.padding, case.filters)),
    "dilation and stride share a factor": lambda case: any(
        math.gcd(d, s) > 1 and r > 1 for d, s, r in zip(case.dilation, case.stride, case.filters, strict=True)
    ),
    "even filter": lambda case: any(taps % 2 == 0 for taps in case.filters),
    "1x1": lambda case: case.filters == (1, 1),
    "no bias": lambda case: not case.bias,
    **{f"{m} filters": lambda case, m=m: case.multiplier == m for m in (1, 2, 3)},
    **{f"stride {step}": lambda case, step=step: case.stride == (step, step) for step in (1, 2)},
    **{f"{taps}x{taps}": lambda case, taps=taps: case.filters == (taps, taps) for taps in (3, 5, 7, 13, 31)},
    **{str(dtype): lambda case, dtype=dtype: case.dtype == dtype for dtype in (bf16, fp16, fp32, fp64)},
    **{layout: lambda case, layout=layout: case.layout == layout for layout in LAYOUTS},
}  # fmt: skip


def not_drawn(seen, names):
    """What was not; numba has no 16-bit floats. The interpreter's few draws have few kinds of trouble."""
    names = {str(fp32), str(fp64), "batch 0", "batch 1"} if INTERPRET else {*names} - {str(bf16), str(fp16)}
    return sorted(names - {*+seen})


# conv2d


@pytest.mark.parametrize("layout", ("plain", "channels_last", "every_second"))
def test_samples_of_pytorch(lane, layout):
    """PyTorch's own samples of conv2d with one filter per channel."""
    info = next(info for info in op_db if info.name == "nn.functional.conv2d")
    count = 0
    for sample in info.sample_inputs(lane.device.type, fp32, requires_grad=True):
        x, (w, b, *_), groups = sample.input, sample.args, sample.kwargs.get("groups", 1)
        if groups == 1 or w.shape[1] > 1:
            continue
        change = {
            "plain": lambda t: t,
            "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
            "every_second": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
        }[layout]
        operands = (None if t is None else change(t.detach()).requires_grad_() for t in (x, w, b))
        assert_matches(
            lambda *t, how=sample.kwargs: fF.conv2d(*t, **how), lambda *t, how=sample.kwargs: F.conv2d(*t, **how),
            *operands,
        )  # fmt: skip
        count += 1
    assert count >= 1


def test_hostile_convolutions(lane):
    seen = Counter()

    @drawn(EXAMPLES[0] if lane.name != "gpu" else 20)
    @given(convolutions())
    def run(case):
        operands = tuple(t if t is None else t.detach().requires_grad_() for t in tensors_of(case, lane.device))
        padding = "same" if case.same and case.stride == (1, 1) else case.padding
        geometry = case.stride, padding, case.dilation, case.c
        if case.c > 1:
            ours = lambda *t: fF.conv2d(*t, *geometry)
        else:  # one channel is a dense convolution, too
            geometry = case.stride, case.padding, case.dilation, case.c
            backend = "cpu" if lane.name == "cpu" else "triton"
            how = outputs(case, case.padding), *geometry[:3], backend
            ours = lambda *t: depthwise_conv2d.DepthwiseConv2dFunction.apply(*t, *how)
        theirs = lambda *t: F.conv2d(*t, *geometry)
        if case.c == 1 and case.dtype in (bf16, fp16):
            # PyTorch's own gradient of such a weight is NaN now and then, from memory that it does not own
            theirs = lambda *t: F.conv2d(*(u if u is None else u.float() for u in t), *geometry).to(t[0].dtype)
        assert_matches(ours, theirs, *operands)
        seen.update(name for name, holds in TROUBLE.items() if holds(case))
        seen["same"] += case.same and case.stride == (1, 1)

    run()
    assert lane.name == "gpu" or not_drawn(seen, {*TROUBLE, "same"}) == []


def test_hostile_convolutions_keep_nan_and_inf_where_they_belong(lane):
    @drawn(EXAMPLES[1] if lane.name != "gpu" else 10)
    @given(convolutions(), st.data())
    def run(case, data):
        assume(case.n and case.c > 1)
        x, w, _ = tensors_of(case, lane.device)
        x = LAYOUTS[case.layout](with_special_values(x, data)).requires_grad_()
        w = w.detach().requires_grad_()
        geometry = case.stride, case.padding, case.dilation, case.c
        size = outputs(case, case.padding)
        grad = values(case, lane.device)(case.n, case.c * case.multiplier, *size)
        grad = LAYOUTS[case.grad_layout](with_special_values(grad, data))
        y = fF.conv2d(x, w, None, *geometry)
        ours = y, *torch.autograd.grad(y, (x, w), grad)
        inputs = [t.detach().double().requires_grad_() for t in (x, w)]
        y = tap_by_tap(*inputs, *geometry, size)
        assume(isinstance(y, torch.Tensor))
        truth = y.detach(), *torch.autograd.grad(y, inputs, grad.double())
        for name, our, true in zip(("y", "grad_input", "grad_weight"), ours, truth, strict=True):
            our = our.detach()
            if name == "grad_weight":
                # what is not finite meets zeros past the edges: where one tap's gradient is not, others may be NaN
                excused = ~true.isfinite().all(3).all(2).all(1) | ~grad.isfinite().all(3).all(2).all(0)
                excused = excused[:, None, None, None]
                our = torch.where(excused, true.to(our.dtype), our)
            assert_close_to_truth(name, our, true.to(case.dtype), true, case.dtype)

    run()


# everything on load and on store


@st.composite
def fusions(draw, activations):
    """What is done on load and on store."""
    pick = random.Random(draw(SEEDS)).choice
    return SimpleNamespace(
        pending=pick((None, *activations)),
        slope=pick((0.1, 0.3)),
        scaled=pick((False, True)),
        shuffle=pick((1, 2, 3, 4)),
        # with and without the tensor; a gate has a correction behind it
        correction=pick((None, "constant", "full", "full", "full")),
        gated=pick((None, *activations)),
        add=pick((False, True)),
        statistics=pick((False, True)),
        needs=pick(((True,) * 3, (True,) * 3, (True, False, False), (False, True, False))),
    )


def test_hostile_fusions(lane):
    seen, backend = Counter(), "cpu" if lane.name == "cpu" else "triton"
    known = ACTIVATIONS if backend == "triton" else KINDS

    @drawn(EXAMPLES[2] if lane.name != "gpu" else 20)
    @given(convolutions(), fusions(known))
    def run(case, fusion):
        fusion.shuffle = math.gcd(fusion.shuffle, case.c)
        x, w, b = tensors_of(case, lane.device)
        randn, k, size = values(case, lane.device), case.c * case.multiplier, outputs(case, case.far)
        vector = lambda *shape: randn(*shape, dtype=fp64 if case.dtype == fp64 else fp32)
        pending = correction = gated = None
        if fusion.pending is not None:
            pending = Pending(vector(case.c), vector(case.c), fusion.pending, fusion.slope, fusion.scaled)
        y = LAYOUTS[case.grad_layout](randn(case.n, k, *size))
        grad = LAYOUTS[case.layout](randn(case.n, k, *size))
        if fusion.correction is not None:
            full = fusion.correction == "full"
            correction = (
                Correction(y, vector(k), vector(k), vector(k)) if full else Correction(None, vector(k), None, None)
            )
            if fusion.gated is not None:
                gates = vector(case.n, k), vector(case.n, k)
                gated = Gated(y, *gates, vector(k), vector(k), fusion.gated, fusion.slope)
        add = LAYOUTS[case.grad_layout](randn(*x.shape)) if fusion.add else None
        geometry = case.stride, case.padding, case.dilation
        on_load = dict(pending=pending, shuffle=fusion.shuffle)
        check_forward(case, x, w, b, size, geometry, on_load, fusion.statistics, backend)

        how = dict(correction=correction, gated=gated, add=add, **on_load)
        needs = (*fusion.needs[:2], fusion.needs[2] and case.bias)
        if not needs[0]:
            how["add"] = None
        ours = depthwise_conv2d.depthwise_backward(
            grad, x, w, *geometry, suggests_channels_last(x), needs, backend, **how
        )
        wide = fp64 if case.dtype == fp64 else fp32
        theirs, truth = (reference.backward(grad, x, w, size, *geometry, dtype, **how) for dtype in (wide, fp64))
        for name, our, their, true, need in zip(
            ours._fields, ours, theirs, truth, (*needs, pending is not None and needs[0]), strict=True
        ):
            if not need:
                assert our is None, name
            else:
                our = our.sum(0) if name == "sums" else our
                assert our.dtype == (wide if name == "sums" else case.dtype)
                # sums may be of gradients that were rounded for storing: the dtype of the tensors sets the bound
                assert_close_to_truth(name, our, their.to(our.dtype), true, case.dtype)
        seen.update(
            f"{name} {value}" for name, value in vars(fusion).items() if not (name == "gated" and correction is None)
        )
        seen.update(name for name, holds in TROUBLE.items() if holds(case))
        seen["asymmetric"] += case.far != case.padding

    run()
    expected = {
        *(f"{what} {name}" for what in ("pending", "gated") for name in (None, *known)),
        *(f"shuffle {groups}" for groups in (1, 2, 3, 4)),
        *(f"correction {kind}" for kind in (None, "constant", "full")),
        *(f"{what} {on}" for what in ("scaled", "add", "statistics") for on in (False, True)),
        "asymmetric",
    }
    assert lane.name == "gpu" or not_drawn(seen, expected) == []


def check_forward(case, x, w, b, size, geometry, on_load, statistics, backend):
    """The forward pass against the reference, its statistics against those of what it wrote."""
    wide = fp64 if case.dtype == fp64 else fp32
    how = {}
    if statistics and x.numel():
        pivot = torch.full((w.shape[0],), 0.5, dtype=wide, device=x.device)
        how = dict(statistics=True) if backend == "cpu" else dict(pivot=pivot)
    ours = depthwise_conv2d.depthwise_forward(
        x, w, b, size, *geometry, suggests_channels_last(x), backend, **on_load, **how
    )
    y = ours[0] if how else ours
    operands = lambda dtype: (None if t is None else t.to(dtype) for t in (x, w, b))
    theirs, truth = (reference.forward(*operands(dtype), size, *geometry, **on_load) for dtype in (wide, fp64))
    assert y.dtype == case.dtype
    assert_close_to_truth("y", y, theirs.to(y.dtype), truth, y.dtype)
    if how:
        mean, variance = ours[1:] if backend == "cpu" else batch_statistics.from_sums(y, ours[1], pivot)
        dims = (0, 2, 3)
        for name, our, their, true in (
            ("mean", mean, y.to(wide).mean(dims), y.double().mean(dims)),
            ("variance", variance, y.to(wide).var(dims, correction=0), y.double().var(dims, correction=0)),
        ):
            assert_close_to_truth(name, our, their, true, wide)
