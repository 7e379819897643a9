"""fastcnn tune: which passes a network has, what is measured and kept; kernels and a clock stand in for a GPU's."""

import dataclasses
import re

import pytest
import torch
from torch import nn

from fastcnn import tune
from fastcnn.cli import main
from fastcnn.ops import chips, conv_launch, launch_cache
from fastcnn.ops.chips import CHIPS
from fastcnn.ops.conv_launch import CUDNN
from fastcnn.ops.conv_prediction import candidates, ranked
from fastcnn.study.trace import trace

H100 = CHIPS["h100-sxm"]
GPU = "NVIDIA H100 80GB HBM3"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path))


def network():
    """Two images of 8x8 make: a strided convolution, a grouped one twice, a transposed one, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding="same", groups=2),
        nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Flatten(),
        nn.Linear(8 * 64, 10),
    )  # fmt: skip


def some_tasks(dtype=torch.float32, layout="channels_last", n=2):
    return tune.tasks(tune.layers(trace(network(), (n, 3, 8, 8))), dtype, layout)


def test_passes_of_a_network():
    passes = [
        (t.problem.kind, t.problem.c, t.problem.h, t.problem.k, t.problem.r, t.problem.groups) for t in some_tasks()
    ]
    first, twice, transposed, linear = (3, 8, 16, 3, 1), (16, 4, 16, 3, 2), (8, 8, 16, 2, 1), (512, 1, 10, 1, 1)
    kinds = ("forward", "backward_input", "backward_weight")
    # the image needs no gradient
    assert passes == [
        ("forward", *first), ("backward_weight", *first), *((kind, *twice) for kind in kinds),
        *((kind, *transposed) for kind in kinds), *((kind, *linear) for kind in kinds),
    ]  # fmt: skip


def test_problems_are_those_that_training_asks_for(monkeypatch):
    asked = set()

    def choose(problem, device, run, allow_cudnn, variant=()):
        asked.add(problem)
        raise NotImplementedError

    monkeypatch.setattr(conv_launch, "choose", choose)
    tasks = some_tasks(torch.float16)
    for task in tasks:
        with pytest.raises(NotImplementedError):
            tune.run(task, tune._tensors(task.layer, task.dtype, task.layout, CPU))
    assert asked == {task.problem for task in tasks}


@pytest.mark.parametrize("dtype, arithmetic", [("bf16", {"16-bit"}), ("fp16", {"16-bit"}), ("fp32", {"ieee", "tf32"})])
def test_layout_and_dtype_are_part_of_a_problem(dtype, arithmetic):
    access = {}
    for layout in tune.LAYOUTS:
        problems = [task.problem for task in some_tasks(tune.DTYPES[dtype], layout)]
        # torch's default: TF32 in convolutions, not in linear layers
        assert {problem.arithmetic for problem in problems} == arithmetic
        access[layout] = {(problem.access, problem.copied) for problem in problems if problem.groups == 2}
    assert access == {"channels_last": {("packed", False)}, "contiguous": {("packed", True)}}


def test_shortlist_has_every_family_and_no_tile_twice():
    (problem,) = {
        t.problem for t in some_tasks(torch.bfloat16, n=64) if t.problem.kind == "forward" and t.problem.c == 3
    }
    assert {launch.family for _, launch in tune.shortlist(problem, H100, 1)} == {"gather", "folded", "stem"}
    problem = dataclasses.replace(problem, kind="backward_weight", n=256, c=256, k=256, access="packed")
    found = [launch for _, launch in tune.shortlist(problem, H100)]
    tiles = [dataclasses.replace(launch, splits=1) for launch in found]
    assert len(set(tiles)) == len(tiles) >= tune.CANDIDATES
    assert found[0] == ranked(problem, H100)[0][1]
    assert {launch for _, launch in tune.shortlist(problem, H100, None)} == set(candidates(problem, H100))


@pytest.fixture
def fake(monkeypatch):
    """Host functions that compute with PyTorch, wrong or not at all where told; a clock that tells `.seconds`."""

    class Fake:
        wrong = lambda self, launch: False
        broken = lambda self, launch: False
        seconds = lambda self, launch: 1e-3 if launch == CUDNN else 2e-3 / launch.block_n
        measured = []

        def run(self, task, tensors):
            (launch, kinds) = conv_launch._forced[-1]
            assert kinds == (task.problem.kind,)
            self.last = launch
            if self.broken(launch):
                raise RuntimeError("out of\nresource")
            result = tune._reference(task, tensors)
            return result + (0.1 if self.wrong(launch) else 0)

        def measure(self, calls, repetitions):
            self.measured = []
            for call in calls:
                call()
                self.measured.append(self.last)
            return [self.seconds(launch) for launch in self.measured]

    found = Fake()
    monkeypatch.setattr(tune, "run", found.run)
    monkeypatch.setattr(conv_launch, "measure", found.measure)
    monkeypatch.setattr(chips, "chip", lambda device: H100)
    return found


def test_the_fastest_right_launch_is_kept_and_found_again(fake, monkeypatch, capsys):
    tasks = some_tasks()
    assert tune._measure_all(tasks, CPU, GPU, tune.CANDIDATES) == 0
    kept = launch_cache.load(GPU)
    assert set(kept) == {task.problem for task in tasks}
    task = next(task for task in tasks if task.problem.kind == "backward_weight" and task.problem.c == 8)
    trials, cudnn_seconds = tune.tune_task(task, CPU)
    assert len({trial.launch.block_n for trial in trials}) > 1
    assert cudnn_seconds == 1e-3 and fake.measured[-1] == CUDNN
    widest = max(trial.launch.block_n for trial in trials)
    assert kept[task.problem].launch.block_n == widest and kept[task.problem].seconds == 2e-3 / widest
    table = capsys.readouterr().out.splitlines()
    assert table[0].split("  ")[0] == "pass" and len(table) == 2 + len(tasks)
    line = next(line for line in table if line.startswith(str(task.problem)))
    launch, own, cudnn, ratio, predicted = re.split("  +", line.removeprefix(str(task.problem)).strip())
    assert launch == str(kept[task.problem].launch) and float(own) == pytest.approx(2e3 / widest, abs=0.06)
    assert float(cudnn) == 1000 and float(ratio) == pytest.approx(widest / 2, abs=0.01) and float(predicted) > 0
    assert table[-1] == f"kept in {launch_cache.path_for(GPU)}"

    # and found by another process
    monkeypatch.setattr(conv_launch, "_chosen", {})
    monkeypatch.setattr(conv_launch, "_tuned", {})
    monkeypatch.setattr(conv_launch, "chip", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(conv_launch, "measure", None)
    assert conv_launch.choose(task.problem, torch.device("cuda", 0), None, True) == kept[task.problem].launch


def test_a_wrong_launch_is_reported_and_never_kept(fake, capsys):
    task = some_tasks()[2]
    right, _ = tune.tune_task(task, CPU)
    fastest = min(right, key=lambda trial: trial.seconds).launch
    fake.wrong = lambda launch: launch == fastest
    trials, _ = tune.tune_task(task, CPU)
    (wrong,) = [trial for trial in trials if trial.wrong]
    assert wrong.launch == fastest and wrong.seconds is None and fastest not in fake.measured
    assert tune._measure_all([task], CPU, GPU, tune.CANDIDATES) == 1
    assert launch_cache.load(GPU)[task.problem].launch != fastest
    assert f"FAIL: {task.problem}: {fastest}: error" in capsys.readouterr().err


def test_a_launch_that_does_not_run_is_no_reason_to_stop(fake, capsys):
    task = some_tasks()[2]
    fake.broken = lambda launch: launch != CUDNN
    assert tune._measure_all([task], CPU, GPU, tune.CANDIDATES) == 0
    captured = capsys.readouterr()
    assert "does not run: RuntimeError: out of resource" in captured.err and "none is right" in captured.out
    assert launch_cache.load(GPU) == {}


def test_what_was_measured_before_an_end_is_kept(fake, monkeypatch):
    tasks = some_tasks()

    def stop(task, tensors, run=fake.run):
        if task is tasks[3]:
            raise KeyboardInterrupt
        return run(task, tensors)

    monkeypatch.setattr(tune, "run", stop)
    before = torch.backends.cudnn.benchmark
    with pytest.raises(KeyboardInterrupt):
        tune._measure_all(tasks, CPU, GPU, tune.CANDIDATES)
    assert set(launch_cache.load(GPU)) == {task.problem for task in tasks[:3]}
    assert torch.backends.cudnn.benchmark == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_is_one_precision_up(dtype):
    for task in some_tasks(dtype, n=1):
        tensors = tune._tensors(task.layer, dtype, task.layout, CPU)
        truth, result = tune._truth(task, tensors), tune._reference(task, tensors)
        assert truth.dtype == torch.float64 and result.dtype == dtype and truth.shape == result.shape
        assert 0 < (truth - result).abs().max() < (1e-3 if dtype == torch.float32 else 1)


def test_on_the_kernels_themselves(lane, monkeypatch):
    if lane.name == "interpret":
        # no clock: every call runs once
        monkeypatch.setattr(
            conv_launch, "measure", lambda calls, repetitions: [bool(call() is None) + 1.0 for call in calls]
        )
    tasks = [t for t in some_tasks(torch.float16, n=32) if t.problem.c in (3, 16)]
    assert len(tasks) == 5
    for task in tasks:
        trials, cudnn_seconds = tune.tune_task(task, lane.device, 1)
        assert [trial.reason for trial in trials] == [None] * len(trials) and cudnn_seconds > 0
        assert all(trial.seconds > 0 for trial in trials)


# the command


def test_dry_run_needs_no_gpu(capsys):
    assert main(["tune", "fastcnn:lenet5", "--dry-run", "--gpu", "a100-sxm", "--batch", "128", "--dtype", "fp32"]) == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title == "fastcnn:lenet5, 1x32x32, fp32, channels_last, batch 128: 14 passes, predicted for a100-sxm"
    assert re.split("  +", header) == ["pass", "fastcnn's launch", "waves", "limit", "predicted us", "roofline us"]
    assert len(rows) == 14 and rows[0].startswith("forward 128x1x32x32, 6 filters 5x5, tf32, narrow")
    for row in rows:
        *_, predicted, bound = row.split()
        assert float(predicted) > float(bound)
    assert not any("images" in row for row in rows)
    assert main(["tune", "fastcnn:lenet5", "--dry-run", "--image-size", "32"]) == 0
    assert "images" in capsys.readouterr().out


def test_without_a_gpu_it_says_what_it_needs(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune", "fastcnn:lenet5"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "fastcnn: error: tuning measures kernels on an NVIDIA GPU, and this machine has none; --dry-run prints "
        "predictions without one\n"
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["lenet6", "--dry-run"], "there is no network 'lenet6'"),
        (["fastcnn:lenet5", "--dry-run", "--gpu", "h100"], "unknown gpu 'h100'"),
        (["fastcnn:lenet5", "--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["fastcnn:lenet5", "--layout", "nhwc"], "unknown layout 'nhwc'"),
        (["fastcnn:lenet5", "--batch", "0"], "batch and image-size must be at least 1, got 0 and None"),
    ],
)
def test_mistakes_are_one_line(capsys, argv, message):
    assert main(["tune", *argv]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding_that_differs_at_the_far_side_is_not_cudnn_s(fake):
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 2, padding="same")

        def forward(self, x):
            return self.conv(x)

    for task in tune.tasks(tune.layers(trace(Same(), (2, 4, 6, 6))), torch.float32, "contiguous"):
        assert task.problem.padding == (0, 0) and task.problem.p == 6
        trials, cudnn_seconds = tune.tune_task(task, CPU)
        assert trials and cudnn_seconds is None
