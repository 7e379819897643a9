"""Compile every Triton kernel for sm_80, sm_90 and sm_100 without a GPU, and fail where a GPU would suffer.

    python tests/aot.py [--op conv2d ...] [--target 90 ...] [--jobs 2]

Our host functions run on tensors without memory (aot_cases.py) while a stand-in for Triton's driver claims the GPU and
a patched launch compiles instead of launching: what is compiled is what would run. From the machine code the tools in
the Triton package read registers and spills; a spill, too much shared memory, too many registers for the threads, or a
grid beyond CUDA's limits is an error, named by kernel and case.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one block may have (CUDA programming guide)
REGISTERS_PER_BLOCK = 65536
TENSOR_CORES = {"mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}
COPIES = {"cp.async": r"\bcp\.async\.c[ag]\.", "TMA": r"\bcp\.async\.bulk\.tensor"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclasses.dataclass
class Usage:
    """What one compiled kernel takes of one target."""

    kernel: str
    case: str
    target: int
    hash: str
    registers: int
    spill: int
    shared: int
    threads: int
    tensor_cores: str
    copies: str
    problems: list

    def row(self):
        return (
            self.kernel, self.case, f"sm_{self.target}", self.registers, self.spill, f"{self.shared / 1024:.1f}",
            self.tensor_cores, self.copies,
        )  # fmt: skip


HEADER = ("kernel", "case", "target", "registers", "spill bytes", "shared KiB", "tensor cores", "async copies")


class _Driver:
    # device index = compute capability: Triton caches compiled kernels per device
    def __init__(self, target):
        self.target = target

    def get_current_device(self):
        return self.target

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.target, 32)

    def get_device_interface(self):
        return None


@contextlib.contextmanager
def launches(target, seen):
    """Inside the block every launch becomes `seen(kernel function, grid, compile)`; compile() -> CompiledKernel."""
    run, previous = JITFunction.run, driver._active

    def launch(self, *args, grid, warmup, **kwargs):
        return seen(self.fn, grid, lambda: run(self, *args, grid=grid, warmup=True, **kwargs))

    driver._active, JITFunction.run = _Driver(target), launch
    try:
        yield
    finally:
        driver._active, JITFunction.run = previous, run


def measure(compiled, kernel, case, target, grid=(1,)):
    """Read a CompiledKernel's resources and collect what is wrong with them."""
    shared, threads = compiled.metadata.shared, compiled.metadata.num_warps * 32
    registers, stack = _resources(compiled.asm["cubin"])
    # stack is where spills go, and everything else without a register
    spill = _spilled(compiled.asm["ptx"], target) if stack else 0
    problems = []
    if spill:
        problems.append(f"spills {spill} bytes")
    if shared > SHARED_LIMIT[target]:
        problems.append(
            f"needs {shared / 1024:.0f} KiB of shared memory and a block may have {SHARED_LIMIT[target] >> 10}"
        )
    if registers * threads > REGISTERS_PER_BLOCK:
        problems.append(f"needs {registers} registers in {threads} threads: more than {REGISTERS_PER_BLOCK} together")
    if not callable(grid) and any(n > 65535 for n in tuple(grid)[1:]):
        problems.append(f"launches a grid of {tuple(grid)}: y and z end at 65535")
    count = lambda patterns: ", ".join(
        f"{n} {name}" for name, pattern in patterns.items() if (n := len(re.findall(pattern, compiled.asm["ptx"])))
    )
    return Usage(
        kernel, case, target, compiled.hash, registers, spill, shared, threads, count(TENSOR_CORES), count(COPIES),
        problems,
    )  # fmt: skip


def _resources(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output(
            [TOOLS / "cuobjdump", "-res-usage", file.name], text=True, stderr=subprocess.STDOUT
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def _spilled(ptx, target):
    # cuobjdump does not tell spills from other uses of the stack; the assembler does
    tool = TOOLS / ("ptxas" if target < 100 or not (TOOLS / "ptxas-blackwell").exists() else "ptxas-blackwell")
    architecture = re.search(r"^\.target (\S+?)(,|$)", ptx, re.M).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool, "-v", f"--gpu-name={architecture}", file.name, "-o", "/dev/null"]
        text = subprocess.check_output(command, text=True, stderr=subprocess.STDOUT)
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text))


def compile_case(op, index, target):
    """Run one case of aot_cases.CASES; return a list of Usage, one per kernel it launches."""
    label, call = _case(op, index)
    label = f"{op}: {label}"
    found = []

    def failed(kernel, error):
        reason = (str(error).strip().splitlines() or [""])[-1]
        found.append(Usage(kernel, label, target, "", 0, 0, 0, 0, "", "", [f"{type(error).__name__}: {reason}"]))

    def seen(fn, grid, compile):
        try:
            found.append(measure(compile(), fn.__name__, label, target, grid))
        except Exception as error:
            failed(fn.__name__, error)

    with launches(target, seen):
        try:
            call()
        except Exception as error:
            failed("-", error)
    return found


def launched_kernels(op):
    """Names of the kernels an op's cases launch; nothing is compiled."""
    from aot_cases import CASES

    names = set()
    with launches(90, lambda fn, grid, compile: names.add(fn.__name__)):
        for _, call in CASES[op]():
            call()
    return names


def _case(op, index):
    from aot_cases import CASES

    return list(CASES[op]())[index]


def _print_table(rows):
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main():
    from aot_cases import CASES
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=CASES, default=list(CASES), help="only these ops")
    parser.add_argument("--target", nargs="+", type=int, choices=TARGETS, default=TARGETS, help="only these chips")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = parser.parse_args()

    usages = {}
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [
            pool.submit(compile_case, op, index, target)
            for op in arguments.op
            for index in range(len(list(CASES[op]())))
            for target in arguments.target
        ]
        every = 0.1 if sys.stderr.isatty() else 30  # seconds: a log file wants few lines
        for task in tqdm(as_completed(tasks), total=len(tasks), unit="case", mininterval=every, maxinterval=every):
            for usage in task.result():
                # cases share kernels: keep the first by name, so that the table does not depend on who finished first
                key = usage.hash or (usage.kernel, usage.case), usage.target
                if key not in usages or usage.case < usages[key].case:
                    usages[key] = usage
    found = sorted(usages.values(), key=lambda u: (u.kernel, u.case, u.target))
    _print_table([HEADER] + [u.row() for u in found])
    bad = [u for u in found if u.problems]
    for usage in bad:
        print(f"FAILED {usage.kernel} on sm_{usage.target} ({usage.case}): {'; '.join(usage.problems)}")
    print(f"Triton {triton.__version__}: {len(found)} kernels compiled from {len(tasks)} cases, {len(bad)} failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
