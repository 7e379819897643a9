"""Compile every Triton kernel for sm_80, sm_90 and sm_100 without a GPU, and fail where a GPU would suffer.

    python tests/aot.py [--op conv2d ...] [--target 90 ...] [--jobs 2] [--update] [--table]

Our host functions run on tensors without memory (aot_cases) while a stand-in for Triton's driver claims the GPU and
a patched launch compiles instead of launching: what is compiled is what would run. From the machine code the tools in
the Triton package read registers and spills; a spill, too much shared memory, too many registers for the threads, or a
grid beyond CUDA's limits is an error, named by kernel and case.

What is in the machine code (occupancy, tensor-core instructions, copies, ...) is kept in benchmarks/results/aot, see
aot_report.py. A difference from it is an error until --update (make aot-update) has rewritten it, so that the diff of a
commit shows what it did to the machine code. --op and --target compare and update their part of it.
"""

import argparse
import dataclasses
import itertools
import multiprocessing
import re
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import aot_report
import triton

from fastcnn.study.launches import intercepted

TARGETS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one block may have (CUDA programming guide)
REGISTERS_PER_BLOCK = 65536
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
REPORT = Path(__file__).parent.parent / "benchmarks/results/aot"


@dataclasses.dataclass
class Usage:
    """What one compiled kernel takes of one target."""

    kernel: str
    case: str
    target: int
    problems: list
    registers: int = 0
    spill: int = 0
    shared: int = 0
    warps: int = 0
    tensor_memory: int = 0  # columns, sm_100
    code: bytes = b""  # the instructions; empty if it did not compile

    def row(self, mix):
        """The line of the report, given aot_report.instruction_mix of the code."""
        resident = aot_report.resident_warps(self.target, self.registers, self.shared, self.warps, self.tensor_memory)
        return aot_report.Row(
            self.kernel, self.case, self.target, self.registers, self.shared, self.warps, resident, **mix
        )


def measure(compiled, kernel, case, target, grid=(1,)):
    """Read a CompiledKernel's resources and collect what is wrong with them."""
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    threads, cubin = warps * 32, compiled.asm["cubin"]
    registers, stack = _resources(cubin)
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
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0)
    return Usage(kernel, case, target, problems, registers, spill, shared, warps, tensor_memory, _code(cubin))


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


def _code(cubin):
    """The instructions in a cubin: the .text sections of an ELF64 file."""
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    # name, type, flags, address, offset, size
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    names = sections[names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", names + name)
    )


def instruction_mixes(codes, target):
    """aot_report.instruction_mix of each of the codes.

    All go through one disassembler as one stream: it takes 0.3 s to start and 20 us for an instruction.
    """
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        text = subprocess.check_output([TOOLS / "nvdisasm", "-novliw", "-b", f"SM{target}", file.name], text=True)
    # "/*0070*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([\w.]+)", text, re.M)
    if len(opcodes) * 16 != sum(map(len, codes)):
        raise RuntimeError(f"nvdisasm printed {len(opcodes)} instructions of {sum(map(len, codes)) // 16}")
    ends = itertools.accumulate(len(code) // 16 for code in codes)
    return [
        aot_report.instruction_mix(opcodes[end - len(code) // 16 : end]) for code, end in zip(codes, ends, strict=True)
    ]


def compile_case(op, index, target):
    """Run one case of aot_cases.CASES; return a list of Usage, one per kernel it launches and version of its code."""
    label, call = _case(op, index)
    label = f"{op}: {label}"
    found = []

    def failed(kernel, error):
        reason = (str(error).strip().splitlines() or [""])[-1]
        found.append(Usage(kernel, label, target, [f"{type(error).__name__}: {reason}"]))

    def seen(kernel, grid, args, kwargs, compile):
        fn = kernel.fn
        try:
            usage = measure(compile(), fn.__name__, label, target, grid)
        except Exception as error:
            failed(fn.__name__, error)
            return
        versions = [u for u in found if u.kernel.split(" #")[0] == fn.__name__]
        for known in versions:
            if known.code == usage.code:
                known.problems += [problem for problem in usage.problems if problem not in known.problems]
                return
        if versions:
            usage.kernel += f" #{len(versions) + 1}"
        found.append(usage)

    with intercepted(target, seen):
        try:
            call()
        except Exception as error:
            failed("-", error)
    return found


def launched_kernels(op):
    """Names of the kernels an op's cases launch; nothing is compiled."""
    from aot_cases import CASES

    names = set()
    with intercepted(90, lambda kernel, *launch: names.add(kernel.fn.__name__)):
        for _, call in CASES[op]():
            call()
    return names


def _case(op, index):
    from aot_cases import CASES

    return list(CASES[op]())[index]


def disassemble(usages, pool, jobs):
    """The rows of the report for what compiled."""
    usages = [usage for usage in usages if usage.code]
    mixes, tasks = {}, []
    for target in {usage.target for usage in usages}:
        codes = sorted({usage.code for usage in usages if usage.target == target}, key=len)
        for part in range(jobs):
            if share := codes[part::jobs]:
                tasks.append((target, share, pool.submit(instruction_mixes, share, target)))
    for target, share, task in tasks:
        mixes |= {(target, code): mix for code, mix in zip(share, task.result(), strict=True)}
    return [usage.row(mixes[usage.target, usage.code]) for usage in usages]


def _print_table(rows):
    """One line for kernels whose numbers are the same, named after the first case."""
    distinct = {}
    for row in sorted(rows, key=lambda row: row.key):
        distinct.setdefault(dataclasses.astuple(dataclasses.replace(row, case="")), row)
    cells = [aot_report.COLUMNS, *([str(cell) for cell in dataclasses.astuple(row)] for row in distinct.values())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main():
    from aot_cases import CASES
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=CASES, default=list(CASES), help="only these ops")
    parser.add_argument("--target", nargs="+", type=int, choices=TARGETS, default=TARGETS, help="only these chips")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--update", action="store_true", help=f"write what differs to {REPORT.name}")
    parser.add_argument("--table", action="store_true", help="print what was compiled")
    arguments = parser.parse_args()

    usages = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [
            pool.submit(compile_case, op, index, target)
            for op in arguments.op
            for index in range(len(list(CASES[op]())))
            for target in arguments.target
        ]
        every = 0.1 if sys.stderr.isatty() else 30  # seconds: a log file wants few lines
        for task in tqdm(as_completed(tasks), total=len(tasks), unit="case", mininterval=every, maxinterval=every):
            usages += task.result()
        rows = disassemble(usages, pool, arguments.jobs)
    if arguments.table:
        _print_table(rows)
    bad = sorted((u for u in usages if u.problems), key=lambda u: (u.kernel, u.case, u.target))
    for usage in bad:
        print(f"FAILED {usage.kernel} on sm_{usage.target} ({usage.case}): {'; '.join(usage.problems)}")
    distinct = len({(usage.target, usage.code) for usage in usages if usage.code})
    print(f"Triton {triton.__version__}: {distinct} kernels compiled from {len(tasks)} cases, {len(bad)} failed")
    everything = set(arguments.op) == set(CASES) and set(arguments.target) == set(TARGETS)
    part = lambda row: everything or (row.op in arguments.op and row.target in arguments.target)
    if arguments.update and bad:
        print(f"{REPORT.name} not updated: first what failed")
        return 1
    agrees = aot_report.gate(REPORT, triton.__version__, rows, part, arguments.update)
    return 0 if agrees and not bad else 1


if __name__ == "__main__":
    sys.exit(main())
