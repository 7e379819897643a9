"""The harness must not be fooled: a wrong result gets no time, a slower function shows as slower, noise is noise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastcnn
from fastcnn.benchmarks import cases, harness, networks, rows, run, timing
from fastcnn.cli import main

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
INFO = {"matmul_tflops": {"float32": 0.1}, "copy_gbs": 10.0, "device": "test device", "device_type": "cpu", "run": "r"}


def setting(device=CPU, **changes):
    found = run.default_setting(device, batch=2)
    found.seconds, found.rounds = 0.0, 2
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def case_of(op, name):
    return next(case for case in cases.bench(op).CASES if case.name == name)


def rows_of(op, name, providers=("torch", "fastcnn-auto"), **changes):
    case, how = case_of(op, name), setting(**changes)
    return harness.run_case(case, cases.bench(op).build(case, how), providers, how, INFO)


def by_pass(found, provider):
    return {row["pass"]: row for row in found if row["provider"] == provider}


def assert_failed(found, provider, because):
    mine = by_pass(found, provider)
    assert mine, found
    for row in mine.values():
        assert row["status"] == "FAIL" and because in row["reason"], row
        assert row["ms"] is row["p20"] is row["p80"] is row["gbs"] is row["tflops"] is None
    assert all(row["status"] == "ok" and row["ms"] > 0 for row in found if row["provider"] == "torch")


WRONG = {
    "zeros": (lambda relu, x: relu(x) * 0, "output"),
    "one element": (lambda relu, x: relu(x) + (torch.arange(x.numel()).view_as(x) == 7).float(), "output"),
    "NaN": (lambda relu, x: relu(x) / (x.detach() != x.detach().flatten()[3]), "output"),
    "half precision": (lambda relu, x: relu(x).bfloat16().float(), "output"),
    "gradient": (lambda relu, x: relu(x) * 2 - relu(x).detach(), "gradient of input"),
    "no gradient": (lambda relu, x: relu(x).detach(), "does not require grad"),
    "shape": (lambda relu, x: relu(x)[:1], "shape"),
    "crash": (lambda relu, x: relu(x).nonsense, "AttributeError"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_fails_and_gets_no_time(monkeypatch, wrong):
    relu, (change, because) = fastcnn.functional.relu, WRONG[wrong]
    monkeypatch.setattr(fastcnn.functional, "relu", lambda x: change(relu, x))
    assert_failed(rows_of("activation", "ragged.c17"), "fastcnn-auto", because)


def test_wrong_running_statistics_fail(monkeypatch):
    batch_norm = fastcnn.functional.batch_norm

    def forgetful(input, mean, var, *args, **kwargs):
        return batch_norm(input, mean, var.clone(), *args, **kwargs)

    monkeypatch.setattr(fastcnn.functional, "batch_norm", forgetful)
    assert_failed(rows_of("batch_norm", "ragged.c3"), "fastcnn-auto", "running_var")


def test_a_wrong_gradient_of_a_parameter_fails(monkeypatch):
    linear = fastcnn.functional.linear
    monkeypatch.setattr(fastcnn.functional, "linear", lambda x, w, b: linear(x, w, b * 1.5 - b.detach() * 0.5))
    assert_failed(rows_of("linear", "ragged.c17"), "fastcnn-auto", "gradient of bias")


@pytest.mark.parametrize(
    "wrong, because",
    [
        (lambda x, p: x * 1, "output: keeps 1.0000"),
        (lambda x, p: torch.nn.functional.dropout(x, p) * (1 - p), "is not its source"),
        (lambda x, p: torch.nn.functional.dropout(x, p).detach() + x - x.detach(), "gradient of input"),
    ],
    ids=["keeps all", "not scaled", "gradient unmasked"],
)
def test_wrong_dropout_fails(monkeypatch, wrong, because):
    assert rows_of("dropout", "ragged.c17")[-1]["status"] == "ok"
    monkeypatch.setattr(fastcnn.functional, "dropout", wrong)
    assert_failed(rows_of("dropout", "ragged.c17"), "fastcnn-auto", because)


def test_a_wrong_optimizer_fails(monkeypatch):
    adamw = fastcnn.optim.AdamW
    assert rows_of("optim", "lenet5.adamw")[-1]["status"] == "ok"
    monkeypatch.setattr(fastcnn.optim, "AdamW", lambda p, **kwargs: adamw(p, **kwargs, eps=1e-3))
    assert_failed(rows_of("optim", "lenet5.adamw"), "fastcnn-auto", "parameter 0")


def test_slower_shows_as_slower_than_the_noise(monkeypatch):
    relu = fastcnn.functional.relu

    def slow(x):
        for _ in range(20):
            relu(x)
        return relu(x)

    monkeypatch.setattr(fastcnn.functional, "relu", slow)
    found = rows_of("activation", "resnet50.layer1.0.relu", rounds=7)
    torch_row, ours = (by_pass(found, provider)["forward"] for provider in ("torch", "fastcnn-auto"))
    assert ours["status"] == "ok" and ours["ms"] > torch_row["ms"] * (1 + torch_row["noise"]) * 2


def test_noise_is_the_first_provider_against_itself(monkeypatch):
    scripted = {"torch": 2.0, harness.AGAIN: 2.5, "fastcnn-auto": 4.0}

    def measured(calls, *_):
        assert next(iter(calls)) == harness.AGAIN and set(calls) == set(scripted)
        return {name: {"forward": samples(ms), "backward": samples(2 * ms)} for name, ms in scripted.items()}

    def samples(ms):
        return timing.Samples([ms * 0.9, ms, ms * 1.1], [])

    monkeypatch.setattr(harness, "measure", measured)
    found = rows_of("activation", "ragged.c17")
    assert len(found) == 6 and {row["noise"] for row in found} == {0.25}
    row = by_pass(found, "fastcnn-auto")["step"]
    assert (row["ms"], row["p20"], row["p80"], row["samples"]) == (12, 10.8, 13.2, 3)
    x = 2 * 17 * 57 * 55 * 4
    assert row["bytes"] == 5 * x and row["gbs"] == pytest.approx(5 * x / 12e6, rel=1e-3)
    assert row["gbs_share"] == pytest.approx(row["gbs"] / 10, rel=1e-3)
    assert row["tflops_share"] == pytest.approx(row["tflops"] / 0.1, rel=1e-3)


def test_no_own_kernel_is_said():
    found = rows_of("conv2d", "ragged.c17", ("torch", "fastcnn"))
    for row in by_pass(found, "fastcnn").values():
        assert row["status"] == "none" and "conv2d" in row["reason"] and row["ms"] is None
    assert {row["pass"] for row in found} == {"forward", "backward", "grad_input", "grad_weight", "step"}


def test_switches_are_restored():
    with fastcnn.backend("torch"), fastcnn.strict(False):
        rows_of("max_pool2d", "ragged.c17", ("torch-nhwc", "fastcnn"))
        assert fastcnn.backends.current_backend() == "torch" and not fastcnn.backends.is_strict()
        assert not torch.backends.cudnn.benchmark


def test_strict_provider_runs_our_kernel_alone():
    fastcnn.functional.max_pool2d(torch.zeros(1, 1, 4, 4), 2)
    op = next(op for op in fastcnn.backends.OPS if op.name == "max_pool2d")
    before = sum(count for (backend, _), count in op.calls.items() if backend == "cpu")
    assert by_pass(rows_of("max_pool2d", "ragged.c17", ("fastcnn",)), "fastcnn")["forward"]["status"] == "ok"
    assert sum(count for (backend, _), count in op.calls.items() if backend == "cpu") > before


def test_providers_run_in_their_layout(monkeypatch):
    seen = set()
    relu = torch.nn.functional.relu

    def spy(x):
        seen.add((harness_provider[0], x.is_contiguous()))
        return relu(x)

    harness_provider = [None]
    switch = harness.set_switches
    monkeypatch.setattr(
        harness, "set_switches", lambda p, d: (harness_provider.__setitem__(0, p), switch(p, d)) and None
    )
    monkeypatch.setattr(torch.nn.functional, "relu", spy)
    monkeypatch.setattr(fastcnn.functional, "relu", spy)
    rows_of("activation", "ragged.c17", ("torch", "torch-nhwc", "fastcnn-auto"), layout="channels_last")
    assert {("torch", True), ("torch-nhwc", False), ("fastcnn-auto", False)} <= seen
    assert not {("torch", False), ("torch-nhwc", True), ("fastcnn-auto", True)} & seen


def test_compile_is_gated_and_timed():
    found = rows_of("activation", "ragged.c17", ("torch", "compile"))
    assert {row["status"] for row in found} == {"ok"} and set(by_pass(found, "compile")) == {
        "forward",
        "backward",
        "step",
    }


def test_memory_of_one_layer():
    row = by_pass(rows_of("activation", "ragged.c17"), "torch")["step"]
    x = 2 * 17 * 57 * 55 * 4
    # relu keeps its output; then the gradient is made
    assert row["saved_bytes"] == x and row["peak_bytes"] == 2 * x
    row = by_pass(rows_of("linear", "ragged.c17"), "torch")["step"]
    # linear keeps its input (and its weight, which lies there anyway)
    assert row["saved_bytes"] == 2 * 17 * 4


@pytest.mark.parametrize("op", cases.OPS)
def test_every_op_runs(op, tmp_path, monkeypatch):
    """One small case of each, as --quick would run it."""
    monkeypatch.setattr(run, "ceilings", lambda device: {"matmul_tflops": {"float32": 0.1}, "copy_gbs": 10.0})
    others = {"decorrelated_batch_norm": "ragged.c48", "group_norm": "ragged.c18"}
    name = ({"cross_entropy": "cifar10.loss", "optim": "lenet5.adamw"} | others).get(op, "ragged.c17")
    providers = ["torch", "torch-nhwc", "fastcnn", "fastcnn-auto"]
    found = run.run_ops({op: [case_of(op, name)]}, providers, setting(split=False), tmp_path)
    assert {row["provider"] for row in found} == set(providers)
    for row in found:
        assert row["status"] in ("ok", "none") and (row["ms"] is None) == (row["status"] == "none"), row
        assert row["flops"] > 0 and row["bytes"] > 0
    assert all(row["status"] == "ok" for row in found if row["provider"] in ("torch", "fastcnn-auto"))
    dateless = [{field: value for field, value in row.items() if field != "date"} for row in found]
    assert [{f: v for f, v in row.items() if f != "date"} for row in rows.read_rows(tmp_path)] == dateless


def test_quick_has_every_op_and_every_network():
    for device in ("cpu", "cuda"):
        chosen = [case for op in cases.OPS for case in cases.quick(op, device)]
        assert {case.op for case in chosen} == set(cases.OPS) and len(chosen) < 60
        found = {case.name.split(".")[0] for case in chosen}
        assert found >= set(networks.NETWORKS) | {"ragged"}, found
    for op in cases.OPS:
        names = [case.name for case in cases.bench(op).CASES]
        assert len(names) == len(set(names))


def test_measure_interleaves_and_leaves_out_what_is_not_timed():
    log = []
    note = lambda word: lambda: log.append(word)
    calls = {"a": [(None, note("prepare a")), ("forward", note("a"))], "b": [("forward", note("b"))]}
    found = timing.measure(calls, CPU, seconds=0, min_samples=4)
    assert set(found) == {"a", "b"} and set(found["a"]) == {"forward"} and found["a"]["forward"].samples == 4
    # a warm-up round, then four that turn, every second one backwards
    there, back = ["prepare a", "a", "b"], ["b", "prepare a", "a"]
    assert log == [*there, *there, *back, *back, *there]


def test_costs_by_hand():
    case = case_of("conv2d", "resnet50.layer1.0.conv2")
    cost = cases.bench("conv2d").build(case, setting()).cost
    flops, x, w = 2 * 2 * 64 * 56 * 56 * 64 * 9, 2 * 64 * 56 * 56 * 4, 64 * 64 * 9 * 4
    assert cost["forward"] == (flops, 2 * x + w) and cost["backward"] == (2 * flops, 3 * x + 2 * w)
    stem = cases.bench("conv2d").build(case_of("conv2d", "resnet50.conv1"), setting())
    # nobody needs the gradient of the images
    assert not stem.tensors["input"].requires_grad and "grad_input" not in stem.cost
    assert cases.bench("optim").build(case_of("optim", "lenet5.amsgrad"), setting()).cost["step"][1] == 9 * 4 * 61706


def test_rows_survive_a_cut(tmp_path):
    row = dict.fromkeys(rows.KEY, "x") | {"device": "NVIDIA H100 80GB HBM3", "run": "1", "torch": "2.13", "ms": 1.0}
    rows.append([row, row | {"ms": 2.0}], tmp_path)
    file = tmp_path / "nvidia-h100-80gb-hbm3.jsonl"
    with open(file, "a") as opened:
        opened.write('{"device": "NVIDIA H1')
    read = rows.read_rows(tmp_path)
    assert len(file.read_text().splitlines()) == 4  # what both share, two rows, half a row
    assert {r["torch"] for r in read} == {"2.13"} and [r["ms"] for r in read] == [1.0, 2.0]
    assert [r["ms"] for r in rows.newest(read)] == [2.0]
    # the next run goes on behind the last whole line
    rows.append([row | {"run": "2", "ms": 3.0}], tmp_path)
    assert [r["ms"] for r in rows.read_rows(tmp_path)] == [1.0, 2.0, 3.0]
    with open(file, "a") as opened:
        opened.write("nonsense\n")
    with pytest.raises(ValueError, match="line 6 is no result row"):
        rows.read_rows(tmp_path)


def test_a_run_cut_short_has_seen_every_op_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    clock = iter([0, 1, 2, 3, 4, 5])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    chosen = {op: [case_of(op, "ragged.c17")] * 2 for op in ("max_pool2d", "dropout")}
    found = run.run_ops(chosen, ["torch"], setting(), tmp_path, deadline=1)
    assert [row["op"] for row in found] == ["max_pool2d"] * 3 + ["dropout"] * 3
    assert (
        "out of time: 2 of 4 cases did not run (max_pool2d ragged.c17, dropout ragged.c17)" in capsys.readouterr().out
    )


def test_resume_runs_what_is_missing(tmp_path):
    chosen = {"max_pool2d": [case_of("max_pool2d", "ragged.c17")], "linear": [case_of("linear", "ragged.c17")]}
    assert len(run.run_ops({"linear": chosen["linear"]}, ["torch"], setting(split=False), tmp_path)) == 3
    found = run.run_ops(chosen, ["torch"], setting(split=False), tmp_path, resume=True)
    assert {row["op"] for row in found} == {"max_pool2d"}
    assert run.run_ops(chosen, ["torch"], setting(split=False), tmp_path, resume=True) == []
    # another provider or batch is another measurement
    assert len(run.run_ops(chosen, ["torch", "torch-nhwc"], setting(split=False), tmp_path, resume=True)) == 12
    assert len(run.run_ops(chosen, ["torch"], setting(split=False, batch=3), tmp_path, resume=True)) == 6


def test_optimizers_keep_fp32_parameters(tmp_path):
    chosen = {"optim": [case_of("optim", "lenet5.sgd")]}
    named = run.run_ops(chosen, ["torch"], setting(), tmp_path / "named", commit="abc123")
    assert {row["commit"] for row in named} == {"abc123"}
    assert {row["dtype"] for row in run.run_ops(chosen, ["torch"], setting(dtype=torch.bfloat16), tmp_path)} == {
        "float32"
    }


@pytest.mark.parametrize(
    "words, message",
    [
        (["ops", "--op", "conv3d"], "op must be one of conv2d"),
        (["ops", "--provider", "cudnn"], "provider must be one of torch"),
        (["ops", "--case", "resnet51"], "case must be a part of a case's name, got 'resnet51'"),
        (["ops", "--dtype", "fp8"], "dtype must be one of bf16, fp16, fp32, got 'fp8'"),
        (["ops", "--layout", "nhwc"], "layout must be one of channels_last, contiguous, got 'nhwc'"),
        (["ops", "--batch", "0"], "batch must be at least 1, got 0"),
        (["ops", "--device", "tpu"], "device must be auto, cpu or cuda, got 'tpu'"),
        (["ops", "resnet50"], "networks are for models and steps, got resnet50: ops take --case resnet50"),
        (["models", "lenet5", "--dtype", "fp16"], "dtype is for ops and changes nothing for models, got 'fp16'"),
        (["steps", "--op", "conv2d"], "op is for ops and changes nothing for steps, got ['conv2d']"),
        (["models", "lenet5", "--batch", "-1"], "batch must be at least 1, got -1"),
        (["models", "resnet51"], "there is no network 'resnet51'"),
        (["roofline", "resnet50", "--gpu", "h900"], "h900"),
    ],
)
def test_mistakes_end_in_one_line(words, message, tmp_path, capsys):
    assert main(["bench", *words, "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastcnn: error: ") and message in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_command_makes_rows_tables_and_plots(tmp_path, capsys):
    words = ["bench", "ops", "--op", "max_pool2d", "--case", "ragged", "--batch", "2", "--results", str(tmp_path)]
    assert main([*words, "--provider", "torch", "fastcnn"]) == 0
    assert "ragged.c17" in capsys.readouterr().out
    assert list(tmp_path.glob("*.jsonl")) and list(tmp_path.glob("*/max_pool2d.md"))
    assert list(tmp_path.glob("plots/*/max_pool2d.svg"))


def test_command_reports_a_wrong_kernel(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        fastcnn.functional, "max_pool2d", lambda x, *a, **k: torch.nn.functional.max_pool2d(x, *a, **k) * 2
    )
    words = ["bench", "ops", "--op", "max_pool2d", "--case", "ragged", "--batch", "2", "--results", str(tmp_path)]
    assert main([*words, "--provider", "torch", "fastcnn-auto"]) == 1
    captured = capsys.readouterr()
    assert "FAIL: fastcnn's max_pool2d is wrong in ragged.c17" in captured.err and "FAIL" in captured.out


def test_pytest_benchmark_runs_the_same_cases(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "-k", "quick and linear and c17", "--benchmark-json", str(tmp_path / "out.json")]
    # pytest-benchmark measures nothing beside other workers, and this process may be one
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert len(found) == 4 and {b["group"] for b in found} == {f"linear ragged.c17 {p}ward" for p in ("for", "back")}
    # no own kernel on CPU, no channels_last of 2-D tensors
    assert "4 passed, 4 skipped" in done.stdout


@pytest.mark.gpu
def test_all_providers_on_a_gpu(tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    how = setting(device, seconds=0.02)
    found = run.run_ops({"conv2d": [case_of("conv2d", "ragged.c17")]}, list(harness.PROVIDERS), how, tmp_path)
    assert {row["status"] for row in found} == {"ok"}, [row["reason"] for row in found]
    for row in found:
        assert row["ms"] > 0 and row["host_ms"] > 0 and row["peak_bytes"] > 0


@pytest.mark.gpu
def test_the_gpu_timer_sees_the_device_and_not_the_launch():
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.zeros(2**26, device=device)
    calls = {"one": [("forward", lambda: x.add_(1))], "ten": [("forward", lambda: [x.add_(1) for _ in range(10)])]}
    found = timing.measure(calls, device, 0.2)
    one, ten = found["one"]["forward"].ms, found["ten"]["forward"].ms
    # 512 MiB read and written at no more than 10 TB/s; ten take ten times as long
    assert one > 0.05 and 8 < ten / one < 12
