"""The ahead-of-time check itself: it refuses what would suffer on a GPU, and it sees every kernel we have."""

import ast
import os
from pathlib import Path

import aot_report
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels do not compile in the interpreter's process", allow_module_level=True)
aot = pytest.importorskip("aot", reason="needs Triton", exc_type=ImportError)
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from aot_cases import CASES  # noqa: E402

KERNELS = Path(__file__).parent.parent / "kernels/triton"


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, k_total, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    c = tl.zeros((M, N), tl.float32)
    for start in range(0, k_total, K):
        a = tl.load(a_ptr + m[:, None] * k_total + start + k[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * N + n[None, :])
        c = tl.dot(a, b, c)
    tl.store(c_ptr + m[:, None] * N + n[None, :], c)


def usage_of(target, m, n, k, grid=(1,), **options):
    found = []
    tensor = torch.empty(0, dtype=torch.bfloat16, device="meta")

    def seen(kernel, grid, args, kwargs, compile):
        found.append(aot.measure(compile(), kernel.fn.__name__, "test", target, grid))

    with aot.intercepted(target, seen):
        dot_kernel[grid](tensor, tensor, tensor, 1024, M=m, N=n, K=k, **options)
    return found[0]


def row_of(usage):
    (mix,) = aot.instruction_mixes([usage.code], usage.target)
    return usage.row(mix)


def test_a_good_kernel_passes_and_its_instructions_are_seen():
    usage = usage_of(80, 64, 64, 32, num_warps=4, num_stages=3)
    assert usage.problems == []
    assert usage.spill == 0 and 32 < usage.registers < 255 and usage.shared > 0
    row = row_of(usage)
    assert "HMMA.16816" in row.tensor and "LDGSTS" in row.copies and "x" in row.stores
    assert (row.target, row.warps) == (80, 4) and 4 <= row.resident < 64
    assert "HGMMA.64x64x16" in row_of(usage_of(90, 64, 64, 32, num_warps=4, num_stages=3)).tensor
    assert "UTCHMMA" in row_of(usage_of(100, 128, 64, 32, num_warps=4, num_stages=3)).tensor


def test_the_gate_sees_a_kernel_that_lost_its_pipeline():
    usages = [usage_of(80, 64, 64, 32, num_warps=4, num_stages=stages) for stages in (3, 1)]
    # one disassembler for both tells them apart
    good, worse = (
        u.row(mix) for u, mix in zip(usages, aot.instruction_mixes([u.code for u in usages], 80), strict=True)
    )
    assert good == row_of(usages[0])
    assert any("asynchronous copies lost" in sentence for sentence in aot_report.losses(good, worse))


def test_a_spill_is_an_error():
    usage = usage_of(80, 128, 256, 32, num_warps=4, num_stages=2)
    assert usage.spill > 0
    assert any(problem.startswith(f"spills {usage.spill} bytes") for problem in usage.problems)


def test_too_much_shared_memory_is_an_error():
    usage = usage_of(80, 128, 128, 64, num_warps=8, num_stages=7)
    assert any("of shared memory" in problem for problem in usage.problems)


def test_a_grid_beyond_cuda_is_an_error():
    assert any("a grid of (1, 70000)" in p for p in usage_of(80, 64, 64, 32, (1, 70000), num_stages=3).problems)


def test_a_case_that_does_not_compile_is_an_error(monkeypatch):
    tensor = torch.empty(0, dtype=torch.bfloat16, device="meta")

    def cases():
        yield "K of 8", lambda: dot_kernel[(1,)](tensor, tensor, tensor, 8, M=16, N=16, K=8)

    monkeypatch.setitem(CASES, "broken", cases)
    (usage,) = aot.compile_case("broken", 0, 80)
    assert usage.kernel == "dot_kernel" and "K >= 16" in usage.problems[0]


def declared_kernels(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
            if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                yield node.name


def test_every_kernel_is_compiled_by_some_case():
    launched = set().union(*(aot.launched_kernels(op) for op in CASES))
    missing = {
        f"{path.name}: {name}"
        for path in KERNELS.glob("*.py")
        for name in declared_kernels(path)
        if name not in launched
    }
    assert not missing, f"add calls that launch these to tests/aot_cases: {sorted(missing)}"
