"""The cases as pytest-benchmark's: pytest benchmarks/ --benchmark-only -k "quick and max_pool2d".

Gated like those of `fastcnn bench`; "quick" in a test's name marks the cases of --quick. Comparable claims come from
`fastcnn bench`, which interleaves the providers; here each runs by itself, and GPU times include launching.
"""

import pytest
import torch

from fastcnn.benchmarks import cases, harness
from fastcnn.benchmarks.run import CPU_PROVIDERS, default_setting
from fastcnn.benchmarks.timing import keep_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTING = default_setting(DEVICE)
if DEVICE.type == "cpu":
    keep_memory()


def _parameters():
    for op in cases.OPS:
        quick = [case.name for case in cases.quick(op, DEVICE.type)]
        for case in cases.bench(op).CASES:
            known = harness.PROVIDERS if DEVICE.type == "cuda" else CPU_PROVIDERS
            for provider in [name for name in known if name not in harness.OF_NETWORKS]:
                for label in ("step",) if op == "optim" else ("forward", "backward"):
                    name = "-".join(["quick"] * (case.name in quick) + [op, case.name, provider, label])
                    yield pytest.param(case, provider, label, id=name)


@pytest.mark.parametrize("case, provider, label", _parameters())
def test_benchmark(benchmark, case, provider, label):
    benchmark.group = f"{case.op} {case.name} {label}"
    problem = cases.bench(case.op).build(case, SETTING)
    with harness.restored_switches():
        calls, _, refused = harness.prepare(problem, [provider], SETTING)
        if provider in refused:
            status, reason = refused[provider]
            (pytest.fail if status == "FAIL" else pytest.skip)(reason)
        before, timed = [], None
        for name, call in calls[provider]:
            if name == label:
                timed = call
                break
            before.append(call)

        def setup():
            for call in before:
                call()
            _synchronize()

        def target():
            timed()
            _synchronize()

        benchmark.pedantic(target, setup=setup, rounds=10, warmup_rounds=2)


def _synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
