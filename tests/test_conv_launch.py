"""Choosing a launch: which candidates there are, what they are predicted to take, what is measured, kept and forced."""

import contextlib
import dataclasses
import json
import logging
import math
import multiprocessing
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fastcnn
from fastcnn.ops import chips, conv_launch, conv_prediction, launch_cache
from fastcnn.ops.chips import CHIPS
from fastcnn.ops.conv_launch import CUDNN, Choice, Launch, Problem, choose, use
from fastcnn.ops.conv_prediction import candidates, predict, ranked, roofline, why_not
from fastcnn.ops.launch_cache import Tuned

H100, A100, B200 = CHIPS["h100-sxm"], CHIPS["a100-sxm"], CHIPS["b200"]
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
SECONDS = 1e-4


def conv(
    kind="forward", n=256, c=128, size=28, k=None, kernel=3, stride=1, dilation=1, groups=1, arithmetic="16-bit",
    access="packed", padding=None, fused=False,
):  # fmt: skip
    """A Problem of a square convolution, padded to keep its size."""
    padding = dilation * (kernel // 2) if padding is None else padding
    out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    pair = lambda value: (value, value)
    return Problem(
        *(kind, n, c, size, size, k or c, kernel, kernel, out, out),
        *(pair(stride), pair(padding), pair(dilation), groups, arithmetic, access, fused),
    )


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch, tmp_path):
    """Every test starts like a process, with a cache folder of its own, and without a word of determinism."""
    for name, empty in (("_chosen", {}), ("_ran", set()), ("_tuned", {}), ("_forced", []), ("_logged", set())):
        monkeypatch.setattr(conv_launch, name, empty)
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path / "cache"))
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu(monkeypatch):
    """An H100 that measures: `.capturing`, `.times` by family; `.ran` is what it was asked to run."""

    class Gpu:
        capturing = False
        times = {"images": 2 * SECONDS, "gather": 3 * SECONDS, "cudnn": SECONDS}
        ran = []
        measurements = 0
        current = []  # devices that were made the current one

        @contextlib.contextmanager
        def device(self, device):
            self.current.append(device)
            yield
            self.current.pop()

        def run(self, launch):
            assert not self.capturing
            self.ran.append(launch)

        def measure(self, calls, repetitions=5):
            assert not self.capturing and self.current == [CUDA]
            self.measurements += 1
            self.ran = []
            for call in calls:
                call()
            return [self.times[launch.family] for launch in self.ran]

    found = Gpu()
    monkeypatch.setattr(conv_launch, "measure", found.measure)
    monkeypatch.setattr(conv_launch, "chip", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "device", found.device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    return found


# chips


def test_rates_of_a_cycle_are_whole_numbers_of_the_architecture():
    assert [round(chip.macs_per_cycle("16-bit"), -1) for chip in (A100, H100)] == [1020, 2050]
    assert round(H100.macs_per_cycle("tf32")) == 1024 and round(H100.macs_per_cycle("ieee"), -1) == 140
    assert round(H100.tensor_16 * chips.SUSTAINED["arithmetic"]) == 798


def test_half_a_chip_has_half_the_rate():
    half = H100.with_sms(66)
    assert half.macs_per_cycle("16-bit") == pytest.approx(H100.macs_per_cycle("16-bit"))
    problem = conv()
    assert roofline(problem, half) == pytest.approx(2 * roofline(problem, H100), rel=0.2)


@pytest.mark.parametrize(
    "arch, name",
    [(80, "a100-sxm"), (87, "rtx-3090"), (90, "h100-sxm"), (103, "b200"), (121, "rtx-5090"), (75, "a100-sxm")],
)
def test_every_capability_has_a_chip(arch, name):
    assert chips.of_arch(arch) is CHIPS[name]


def test_the_chip_is_that_of_triton_s_driver(monkeypatch):
    import aot
    from triton.runtime.driver import driver

    meta = torch.device("meta")
    with aot.intercepted(80, None):
        assert chips.chip(meta) is A100
    with aot.intercepted(100, None):
        assert chips.chip(meta) is B200
    monkeypatch.setattr(driver, "_active", None)
    monkeypatch.setattr(driver, "_default", None, raising=False)
    if not torch.cuda.is_available():
        assert chips.chip(CPU) is H100


def test_a_gpu_of_another_size(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties",
        lambda index: type("Properties", (), dict(name="NVIDIA H100 NVL", major=9, minor=0, multi_processor_count=66)),
    )  # fmt: skip
    chips._of_gpu.cache_clear()
    found = chips.chip(CUDA)
    chips._of_gpu.cache_clear()
    assert (found.arch, found.sms) == (90, 66) and found.tensor_16 == H100.tensor_16 / 2


# candidates


PROBLEMS = st.builds(
    conv,
    kind=st.sampled_from(conv_launch.KINDS),
    n=st.sampled_from((1, 7, 32, 64, 65, 256)),
    c=st.sampled_from((1, 3, 16, 24, 48, 64, 96, 128, 320)),
    size=st.sampled_from((1, 7, 14, 57)),
    kernel=st.sampled_from((1, 3, 5)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from((1, 2, 4, 32)),
    arithmetic=st.sampled_from(("16-bit", "tf32", "ieee", "fp64")),
    access=st.sampled_from(("packed", "wide", "narrow")),
    fused=st.booleans(),
)


@given(problem=PROBLEMS, name=st.sampled_from(sorted(CHIPS)))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_candidates_keep_the_rules(problem, name):
    assume(problem.c % problem.groups == 0)
    chip = CHIPS[name]
    found = candidates(problem, chip)
    assert found, "there is always a launch"
    assert len(set(found)) == len(found)
    c, k = problem.c // problem.groups, problem.k // problem.groups
    for launch in found:
        assert why_not(problem, launch, chip) is None
        prediction = predict(problem, launch, chip)
        assert prediction.seconds > roofline(problem, chip) and math.isfinite(prediction.seconds)
        assert conv_prediction.resources(problem, launch, chip)[1] <= chip.shared_per_block
        assert launch.splits == 1 or problem.kind == "backward_weight"
        assert problem.groups % launch.pack == 0
        if launch.family != "images":
            assert launch.programs == 0
            continue
        assert chip.arch >= 90 and problem.access == "packed"
        assert problem.arithmetic == "16-bit" or (problem.arithmetic == "tf32" and problem.kind == "forward")
        if problem.kind == "backward_weight":
            assert 2 * problem.rows >= launch.block_k
            continue
        assert launch.programs % chip.sms == 0 and launch.programs > 0
        assert 2 * problem.rows >= launch.block_m
        reduced, computed = (c, k) if problem.kind == "forward" else (k, c)
        assert reduced % launch.block_k == 0 or (problem.is_one_pixel and problem.groups == 1)
        assert computed % launch.block_n == 0 or problem.groups == 1


@pytest.mark.parametrize("kind", conv_launch.KINDS)
def test_images_beat_gather_in_resnet50_s_3x3_on_an_h100(kind):
    for c, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        best = {}
        for prediction, launch in ranked(conv(kind, c=c, size=size), H100):
            best.setdefault(launch.family, prediction.seconds)
        assert best["images"] < best["gather"]


def test_an_a100_has_no_images():
    assert {launch.family for launch in candidates(conv(), A100)} == {"gather"}
    assert "compute capability 9.0" in why_not(conv(), Launch("images", 128, 128, 64, 8, 3, programs=132), A100)


def test_images_need_images():
    families = lambda **sizes: {launch.family for launch in candidates(conv(**sizes), H100)}
    assert families(n=31) == {"gather"} and families(n=32) == {"gather", "images"}
    # the pixels of 1x1 filters are rows; with a stride they are not
    assert families(n=1, kernel=1) == {"gather", "images"} and families(n=1, kernel=1, stride=2) == {"gather"}


def test_few_channels_are_folded():
    stem = dict(c=3, k=64, size=224, kernel=7, stride=2, access="narrow")
    for kind, families in (
        ("forward", {"gather", "folded"}), ("backward_weight", {"gather", "folded"}), ("backward_input", {"gather"}),
    ):  # fmt: skip
        assert {launch.family for launch in candidates(conv(kind, **stem), H100)} == families
    assert ranked(conv(**stem), H100)[0][1].family == "folded"


def test_narrow_groups_share_a_tile():
    resnext = conv(c=128, groups=32, access="wide")
    assert {launch.pack for launch in candidates(resnext, H100)} == {1, 8, 16}
    assert ranked(resnext, H100)[0][1].pack > 1
    assert {launch.pack for launch in candidates(conv(c=128, groups=2), H100)} == {1}


@pytest.mark.parametrize(
    "problem, launch, words",
    [
        (conv(), Launch("winograd"), "no family 'winograd'"),
        (conv(), Launch("gather", 128, 96, 64, 8, 3), "block_n must be a power of two, got 96"),
        (conv(), Launch("gather", 128, 8, 64, 8, 3), "at least 16"),
        (conv(), Launch("gather", 128, 64, 64, 8, 0), "stages, pack and splits"),
        (conv(), Launch("gather", 128, 64, 64, 8, 3, splits=2), "only the gradient of the weight is split"),
        (conv(groups=4), Launch("gather", 128, 64, 64, 8, 3, pack=3), "pack must divide the 4 groups"),
        (conv(), Launch("gather", 256, 256, 128, 8, 4), "513 KiB of shared memory"),
        (conv(), Launch("folded", 128, 64, 64, 8, 3), "up to 8 channels per group"),
        (conv(access="wide"), Launch("images", 128, 64, 64, 4, 3, programs=1), "without gaps"),
        (conv(arithmetic="ieee"), Launch("images", 128, 64, 16, 4, 3, programs=1), "no forward in ieee"),
        (conv(), Launch("images", 128, 64, 64, 4, 3), "programs must be at least 1"),
        (conv(c=96), Launch("images", 128, 64, 64, 4, 3, programs=1), "block_k must divide the 96 reduced"),
        (conv(c=192, k=64, groups=2), Launch("images", 128, 64, 32, 4, 3, programs=1), "block_n must divide the 32"),
        (
            dataclasses.replace(conv(kernel=1), p=29),
            Launch("images", 128, 64, 64, 4, 3, programs=1),
            "leave pixels without one",
        ),
    ],
)  # fmt: skip
def test_a_launch_that_cannot_be_says_why(problem, launch, words):
    assert words in why_not(problem, launch, H100)


# predictions


def test_taps_inside_by_counting():
    for problem in (conv(size=7), conv(size=9, stride=2), conv(size=9, dilation=3), conv(size=5, kernel=7, padding=1)):
        inside = 0
        for p in range(problem.p):
            for q in range(problem.q):
                for r in range(problem.r):
                    for s in range(problem.s):
                        h = p * problem.stride[0] - problem.padding[0] + r * problem.dilation[0]
                        w = q * problem.stride[1] - problem.padding[1] + s * problem.dilation[1]
                        inside += 0 <= h < problem.h and 0 <= w < problem.w
        assert problem.taps_inside() == inside
    assert conv(n=2, c=3, k=5, size=7).macs == 2 * 3 * 5 * 19 * 19


def test_a_tap_costs_and_padding_does_not():
    tile = Launch("images", 128, 128, 64, 8, 3, programs=132)
    seconds = lambda **sizes: predict(conv(**sizes), tile, H100).compute
    assert seconds(kernel=1, padding=0) < seconds(kernel=3) < seconds(kernel=5)
    # in a 7x7 image, 19 of the 21 pairs of a row and a tap fall inside
    ratio = seconds(c=512, size=7) / seconds(c=512, size=7 + 2, padding=0)
    assert ratio == pytest.approx((19 / 21) ** 2, rel=0.02)
    assert predict(conv(c=512, size=7), Launch("gather", 128, 128, 64, 8, 3), H100).compute > seconds(c=512, size=7)


def test_waves_are_steps():
    tile = Launch("images", 128, 128, 64, 8, 4, programs=132)
    found = [predict(conv(n=128 * images, size=1, kernel=3), tile, H100) for images in (132, 133, 264)]
    assert [p.tiles for p in found] == [132, 133, 264] and found[0].occupancy == 1
    assert found[1].waves == pytest.approx(133 / 132)
    assert found[0].compute < found[1].compute == found[2].compute


def test_rows_that_a_tile_leaves_empty_cost_as_much():
    tile = Launch("images", 128, 128, 64, 8, 4, programs=132)
    assert predict(conv(n=65), tile, H100).compute == predict(conv(n=128), tile, H100).compute


def test_bytes_are_a_floor():
    thin = conv(c=64, k=256, size=56, kernel=1)
    prediction, _ = ranked(thin, H100)[0]
    moved = 2 * (256 * 56 * 56 * (64 + 256) + 64 * 256)
    assert thin.bytes == moved and prediction.limit == "memory"
    assert prediction.memory == pytest.approx(moved / 3.0e12, rel=0.01)
    # a strided 1x1 reads a quarter of the pixels, its gradient writes all of them
    strided = conv(c=64, k=64, size=56, kernel=1, stride=2)
    assert strided.bytes == 2 * (256 * 28 * 28 * (64 + 64) + 64 * 64)
    assert conv("backward_input", c=64, k=64, size=56, kernel=1, stride=2).bytes > 2 * strided.bytes


def test_splits_fill_the_chip_and_stay_bounded():
    splits = lambda **sizes: {launch.splits for launch in candidates(conv("backward_weight", **sizes), H100)}
    deep = conv("backward_weight", c=64, size=56, kernel=1)
    prediction, launch = ranked(deep, H100)[0]
    assert launch.splits > 30 and prediction.waves > 0.9
    assert max(splits(n=32, c=64, size=2, kernel=1)) == 1
    wide = conv("backward_weight", c=2048, size=7)
    slab = 4 * 2048 * 2048 * 9
    assert all(launch.splits * slab <= conv_prediction.MAX_SLABS for launch in candidates(wide, H100))
    # slabs cost memory, and the kernel that adds them time
    one, many = (predict(deep, dataclasses.replace(launch, splits=n), H100) for n in (1, 10_000))
    assert many.memory > one.memory and many.seconds > many.memory + 10_000 * 4 * 64 * 64 / 3.1e12


def test_strided_gradient_of_the_input_does_no_work_twice():
    tile = Launch("gather", 128, 128, 64, 8, 3)
    strided, plain = (predict(conv("backward_input", stride=s), tile, H100) for s in (2, 1))
    assert strided.tiles == plain.tiles
    assert strided.compute < 0.4 * plain.compute


def test_bigger_chips_are_faster():
    problem = conv(c=256, size=14)
    times = [ranked(problem, CHIPS[name])[0][0].seconds for name in ("rtx-3090", "a100-sxm", "h100-sxm", "b200")]
    assert times == sorted(times, reverse=True)


# choosing


def test_the_faster_of_own_and_cudnn_is_measured_once(gpu):
    problem = conv()
    assert choose(problem, CUDA, gpu.run, True) == CUDNN
    assert [launch.family for launch in gpu.ran] == ["images", "cudnn"]
    assert choose(problem, CUDA, gpu.run, True) == CUDNN and gpu.measurements == 1
    # strict mode, which may not take it, has the other one
    own = choose(problem, CUDA, gpu.run, False)
    assert own == ranked(problem, H100)[0][1] and gpu.measurements == 1
    assert conv_launch._chosen == {(CUDA, problem): Choice(own, 2 * SECONDS, SECONDS, "measured")}


def test_own_where_it_is_faster(gpu):
    gpu.times = gpu.times | {"cudnn": 3 * SECONDS}
    assert choose(conv(), CUDA, gpu.run, True).family == "images"


def test_a_prediction_gives_way_to_a_measurement(gpu):
    assert choose(conv(), CUDA, gpu.run, False).family == "images" and gpu.measurements == 0
    assert conv_launch._chosen[CUDA, conv()].source == "predicted"
    assert choose(conv(), CUDA, gpu.run, True) == CUDNN and gpu.measurements == 1


@pytest.mark.parametrize("wish", ["algorithms", "cudnn"])
def test_who_wants_the_same_result_every_time_gets_no_measurement(gpu, wish, monkeypatch):
    if wish == "cudnn":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    else:
        torch.use_deterministic_algorithms(True, warn_only=True)
    for _ in range(2):
        assert choose(conv(), CUDA, gpu.run, True) == ranked(conv(), H100)[0][1]
    assert gpu.measurements == 0


def test_without_a_gpu_the_prediction_counts(monkeypatch):
    monkeypatch.setattr(conv_launch, "measure", None)
    assert choose(conv(), CPU, None, False) == ranked(conv(), H100)[0][1]


def test_every_target_of_a_stand_in_driver_has_its_own_choice():
    import aot

    meta, found = torch.device("meta"), []
    for target in (80, 90, 80):
        with aot.intercepted(target, None):
            found.append(choose(conv(), meta, None, False).family)
    assert found == ["gather", "images", "gather"]


def test_a_capture_measures_and_compiles_nothing(gpu, caplog):
    gpu.capturing = True
    with caplog.at_level(logging.WARNING, "fastcnn"):
        assert choose(conv(), CUDA, gpu.run, True) == CUDNN
        assert choose(conv(c=64), CUDA, gpu.run, True) == CUDNN
    (record,) = caplog.records
    assert "256x128x28x28" in record.getMessage() and "Call the model once before" in record.getMessage()
    with pytest.raises(RuntimeError, match="256x128x28x28.*call the model once with these sizes before the capture"):
        choose(conv(), CUDA, gpu.run, False)
    # once it ran, it is captured
    gpu.capturing = False
    own = choose(conv(), CUDA, gpu.run, False)
    gpu.capturing = True
    assert choose(conv(), CUDA, gpu.run, False) == own
    with pytest.raises(RuntimeError):
        choose(conv(), CUDA, gpu.run, False, variant=("float16",))


def test_a_capture_takes_what_was_measured_before(gpu):
    gpu.times = gpu.times | {"cudnn": 3 * SECONDS}
    own = choose(conv(), CUDA, gpu.run, True)
    gpu.capturing = True
    assert choose(conv(), CUDA, gpu.run, True) == own


def test_forced(gpu):
    gather, images = Launch("gather", 128, 64, 64, 8, 3), Launch("images", 128, 64, 64, 4, 3, programs=132)
    with use(gather):
        assert choose(conv(), CUDA, gpu.run, True) == gather
        with use(images, "forward"):
            assert choose(conv(), CUDA, gpu.run, False) == images
            assert choose(conv("backward_input"), CUDA, gpu.run, False) == gather
        with use(CUDNN):
            assert choose(conv(), CUDA, gpu.run, True) == CUDNN
            with pytest.raises(ValueError, match="cuDNN needs"):
                choose(conv(), CUDA, gpu.run, False)
    with use(images), pytest.raises(ValueError, match="without gaps"):
        choose(conv(access="wide"), CUDA, gpu.run, True)
    assert gpu.measurements == 0 and conv_launch._chosen == {}
    assert choose(conv(), CUDA, gpu.run, True) == CUDNN
    with pytest.raises(TypeError, match="must be a Launch"):
        use("gather")
    with pytest.raises(ValueError, match="'backwards'"):
        use(gather, "backwards")


def test_explain_shows_the_choices(gpu):
    assert "\n\n" not in fastcnn.explain()
    choose(conv(stride=2), CUDA, gpu.run, True)
    choose(conv("backward_weight", c=64, groups=2, access="wide", fused=True), CUDA, gpu.run, False)
    titles, measured, predicted = fastcnn.explain().split("\n\n")[1].splitlines()
    cells = lambda line: re.split("  +", line)
    assert cells(titles) == ["convolution", "on", "fastcnn's launch", "us", "cuDNN us", "fastest", "times are"]
    problem, device, launch, *times = cells(measured)
    assert problem == "forward 256x128x28x28, 128 filters 3x3, stride 2, 16-bit"
    assert device == "cuda:0" and re.fullmatch(r"images \d+x\d+x\d+, \d warps, \d stages", launch)
    assert times == ["200.0", "100.0", "cuDNN", "measured"]
    problem, _, launch, *times = cells(predicted)
    assert problem == "backward_weight 256x64x28x28, 64 filters 3x3, groups 2, 16-bit, wide, fused"
    assert launch.startswith("gather") and launch.endswith(" splits")
    assert float(times[0]) > 0 and times[1:] == ["-", "fastcnn", "predicted"]


def test_time_is_taken_in_turns(monkeypatch):
    clock, slept, order = [0.0], [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call(name, first_ms, ms):
        def run():
            # slow at first, and once more in between
            clock[0] += first_ms if order.count(name) in (0, 3) else ms
            order.append(name)

        return run

    seconds = conv_launch.measure([call("own", 900.0, 2.0), call("cudnn", 50.0, 3.0)], repetitions=3)
    assert seconds == [0.002, 0.003]
    # the first two calls compile, load and tell how long the CPU takes
    assert order == ["own"] * 2 + ["cudnn"] * 2 + ["own", "cudnn"] * 3
    assert len(slept) == 6 and min(slept) > 0


# the cache


GPU = "NVIDIA H100 80GB HBM3"
GATHER = Launch("gather", 128, 64, 64, 8, 3)


def test_tuned_choices_are_kept(gpu):
    tuned = {conv(): Tuned(GATHER, SECONDS, 2 * SECONDS), conv(c=64): Tuned(GATHER, SECONDS, None)}
    path = launch_cache.save(GPU, tuned)
    assert path.name.startswith("nvidia-h100-80gb-hbm3-triton-") and launch_cache.load(GPU) == tuned
    assert choose(conv(), CUDA, gpu.run, True) == GATHER and gpu.measurements == 0
    assert conv_launch._chosen[CUDA, conv()] == Choice(GATHER, SECONDS, 2 * SECONDS, "tuned")
    # other sizes are measured
    assert choose(conv(c=256), CUDA, gpu.run, True) == CUDNN and gpu.measurements == 1
    assert list(path.parent.glob("*.tmp")) == []


def test_tuned_for_cudnn(gpu):
    launch_cache.save(GPU, {conv(): Tuned(GATHER, 2 * SECONDS, SECONDS)})
    assert choose(conv(), CUDA, gpu.run, True) == CUDNN and choose(conv(), CUDA, gpu.run, False) == GATHER


def test_a_tuned_launch_is_not_compiled_within_a_capture(gpu):
    launch_cache.save(GPU, {conv(): Tuned(GATHER, SECONDS, None)})
    gpu.capturing = True
    assert choose(conv(), CUDA, gpu.run, True) == CUDNN


def test_other_kernels_or_another_triton_or_gpu_have_another_file(monkeypatch):
    import triton

    paths = {launch_cache.path_for(GPU), launch_cache.path_for("NVIDIA H200")}
    monkeypatch.setattr(launch_cache, "source_hash", lambda: "0123456789ab")
    paths.add(launch_cache.path_for(GPU))
    monkeypatch.setattr(triton, "__version__", "9.9.9")
    paths.add(launch_cache.path_for(GPU))
    assert len(paths) == 4


def test_the_hash_is_of_the_kernels_source(tmp_path, monkeypatch):
    import fastcnn.kernels.triton as kernels

    before = launch_cache.source_hash.__wrapped__()
    assert before == launch_cache.source_hash.__wrapped__()
    folder = tmp_path / "kernels"
    folder.mkdir()
    for source in Path(kernels.__path__[0]).glob("*.py"):
        (folder / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(kernels, "__path__", [str(folder)])
    assert launch_cache.source_hash.__wrapped__() == before
    with open(folder / "conv2d.py", "a") as file:
        file.write("# changed\n")
    assert launch_cache.source_hash.__wrapped__() != before


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert launch_cache.folder() == tmp_path / "cache"
    monkeypatch.delenv("FASTCNN_CACHE")
    assert launch_cache.folder() == tmp_path / ".cache/fastcnn"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"seconds": 0.0001', '"seconds": -1'),
        lambda text: text.replace('"launch"', '"launches"'),
        lambda text: text.replace('"block_m"', '"rows"'),
        lambda text: "\0\xff" * 100,
    ],
)
def test_a_damaged_file_is_named_once_and_ignored(gpu, caplog, damage):
    path = launch_cache.save(GPU, {conv(): Tuned(GATHER, SECONDS, 2 * SECONDS)})
    path.write_text(damage(path.read_text()), encoding="latin-1")
    with caplog.at_level(logging.WARNING, "fastcnn"):
        assert choose(conv(), CUDA, gpu.run, True) == CUDNN
        choose(conv(c=64), CUDA, gpu.run, True)
    (record,) = caplog.records
    assert str(path) in record.getMessage() and "fastcnn tune" in record.getMessage()
    # and written anew
    launch_cache.save(GPU, {conv(): Tuned(GATHER, SECONDS, None)})
    assert launch_cache.load(GPU) == {conv(): Tuned(GATHER, SECONDS, None)}


def test_a_launch_in_the_file_that_cannot_be_is_not_taken(gpu):
    launch_cache.save(GPU, {conv(): Tuned(Launch("gather", 512, 256, 128, 8, 4), SECONDS, None)})
    assert choose(conv(), CUDA, gpu.run, False).family == "images"


def _save_some(folder, first):
    os.environ["FASTCNN_CACHE"] = folder
    for i in range(5):
        launch_cache.save(GPU, {conv(n=first + i): Tuned(GATHER, SECONDS, None)})


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_save_some, args=(str(tmp_path / "cache"), 10 * i)) for i in range(1, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert {problem.n for problem in launch_cache.load(GPU)} == {10 * i + j for i in range(1, 5) for j in range(5)}
    assert len(json.loads(launch_cache.path_for(GPU).read_text())["choices"]) == 20
