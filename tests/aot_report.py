"""The machine code of every kernel as data: benchmarks/results/aot/<op>.tsv, and what it means when it changes.

The first line of a file names the Triton version, the second the columns; then follows one line per kernel, case and
target, sorted. A kernel that one case launches in several versions has a line for each ("sum_slabs_kernel #2"). Counts
are of instructions in the code, not of what is executed:

    registers      per thread
    shared         bytes of shared memory per block, without the 1 KiB that CUDA keeps for itself
    warps          per block
    resident       warps that fit on one SM at the same time, of 64: the occupancy
    instructions   all of them, without padding
    tensor         tensor-core instructions by kind: HMMA (mma.sync), HGMMA (wgmma), UTC*MMA (tcgen05), with their shape
    copies         asynchronous copies by kind and bits: LDGSTS (cp.async), UTMALDG and UBLKCP (TMA)
    loads, stores  of global memory by bits per thread: "4 x128, 2 x16"
    shared_loads, shared_stores
    arithmetic     floating-point add, multiply, fma, minimum and maximum
    special        MUFU: exp, log, reciprocal, ...
    barriers       of the block
    other          integers, addresses, conversions, moves, branches
"""

import dataclasses
import re
from collections import Counter
from pathlib import Path

WARPS_PER_SM = 64
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # CUDA programming guide, compute capabilities
GROWTH = 1.25  # more code than this times the old is a loss
LINES = 40  # of losses, and of other differences, are printed; the diff of the file has them all

TENSOR = re.compile(r"(?:[HIDBQO]G?MMA|UTC\w*MMA)\b")
COPY = re.compile(r"LDGSTS|UTMALDG|UBLKCP|UTMASTG")
CLASSES = {
    "shared_loads": re.compile(r"LDS|LDSM"),
    "shared_stores": re.compile(r"STS|STSM"),
    "arithmetic": re.compile(r"[FHD](?:FMA|MUL|ADD|MNMX)\w*"),
    "special": re.compile(r"MUFU"),
    "barriers": re.compile(r"BAR|SYNCS"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report."""

    kernel: str
    case: str
    target: int
    registers: int
    shared: int
    warps: int
    resident: int
    instructions: int
    tensor: str
    copies: str
    loads: str
    stores: str
    shared_loads: int
    shared_stores: int
    arithmetic: int
    special: int
    barriers: int
    other: int

    @property
    def key(self):
        return self.kernel, self.case, self.target

    @property
    def op(self):
        return self.case.split(":")[0]


COLUMNS = [field.name for field in dataclasses.fields(Row)]
MEASURED = COLUMNS[3:]


def resident_warps(target, registers, shared, warps, tensor_memory=0):
    """Warps on one SM at the same time, by the rules of CUDA's cuda_occupancy.h.

    `shared`: bytes per block; `tensor_memory`: columns of the 512 of an sm_100 SM. 0 if not even one block fits.
    """
    round_up = lambda n, unit: -(-n // unit) * unit
    # each of the SM's four parts has a quarter of the registers, given to whole warps in units of 256
    warps_by_registers = 4 * (65536 // 4 // round_up(registers * 32, 256))
    blocks = min(
        32,
        WARPS_PER_SM // warps,
        warps_by_registers // round_up(warps, 4),
        # 1 KiB of every block is CUDA's
        SHARED_PER_SM[target] // round_up(shared + 1024, 128),
        512 // tensor_memory if tensor_memory else 32,
    )
    return blocks * warps


def instruction_mix(opcodes):
    """The columns from `instructions` on, from opcodes with their modifiers ("LDG.E.128.CONSTANT")."""
    counts = {name: Counter() for name in ("tensor", "copies", "loads", "stores")}
    classes = Counter()
    for opcode, n in Counter(opcodes).items():
        base = opcode.split(".")[0]
        if base == "NOP":
            continue
        classes["instructions"] += n
        if TENSOR.fullmatch(base):
            shape = re.search(r"\.(\d+x\d+x\d+|\d{3,})\b", opcode)
            counts["tensor"][base + (shape.group() if shape else "")] += n
        elif COPY.fullmatch(base):
            counts["copies"][f"{base}.{_bits(opcode)}" if base == "LDGSTS" else base] += n
        elif base in ("LDG", "LD"):
            counts["loads"][f"x{_bits(opcode)}"] += n
        elif base in ("STG", "ST"):
            counts["stores"][f"x{_bits(opcode)}"] += n
        else:
            name = next((name for name, pattern in CLASSES.items() if pattern.fullmatch(base)), "other")
            classes[name] += n
    return {
        "instructions": classes["instructions"],
        **{name: ", ".join(f"{count[kind]} {kind}" for kind in sorted(count)) for name, count in counts.items()},
        **{name: classes[name] for name in (*CLASSES, "other")},
    }


def _bits(opcode):
    width = re.search(r"\.[US]?(8|16|64|128|256)\b", opcode)
    return int(width.group(1)) if width else 32


def kinds(text):
    """{"HMMA.16816": 64} of "64 HMMA.16816"."""
    return {kind: int(n) for n, kind in (part.split() for part in text.split(", ") if part)}


def losses(old, new):
    """Sentences that say what a kernel lost from one Row to the next."""
    found = []
    if new.resident < old.resident:
        causes = "registers", "shared", "warps"
        why = ", ".join(_change(old, new, name) for name in causes if getattr(old, name) != getattr(new, name))
        found.append(f"occupancy {old.resident} -> {new.resident} of {WARPS_PER_SM} warps" + (why and f" ({why})"))
    for column, what in (("tensor", "tensor-core instructions"), ("copies", "asynchronous copies")):
        before, after = kinds(getattr(old, column)), kinds(getattr(new, column))
        found += [
            f"{what} {'fewer' if kind in after else 'lost'}: {n} -> {after.get(kind, 0)} {kind}"
            for kind, n in before.items()
            if after.get(kind, 0) < n
        ]
    for column in ("loads", "stores"):
        before, after = ({int(k[1:]): n for k, n in kinds(getattr(row, column)).items()} for row in (old, new))
        widest = max(before, default=0)
        narrow = [bits for bits, n in after.items() if bits < widest and n > before.get(bits, 0)]
        if narrow and after.get(widest, 0) < before[widest]:
            found.append(f"global {column} narrower: {getattr(old, column)} -> {getattr(new, column)}")
    if new.instructions > GROWTH * old.instructions:
        found.append(f"code {new.instructions / old.instructions - 1:+.0%} ({_change(old, new, 'instructions')})")
    return found


def _change(old, new, column):
    return f"{column} {getattr(old, column) or 'none'} -> {getattr(new, column) or 'none'}"


def compare(old, new):
    """(losses, other differences) between two lists of Row, each a list of sentences, equal ones of a kernel merged."""
    before, after = ({row.key: row for row in rows} for rows in (old, new))
    lost, other = {}, {}
    for key in sorted(before.keys() | after.keys()):
        kernel, case, target = key
        where = f"{kernel} on sm_{target}"
        if key not in before or key not in after:
            what = "is new" if key not in before else "is gone"
            other.setdefault(f"{where} {what}", []).append(case)
            continue
        sentences = losses(before[key], after[key])
        for sentence in sentences:
            lost.setdefault(f"{where}: {sentence}", []).append(case)
        changed = [name for name in MEASURED if getattr(before[key], name) != getattr(after[key], name)]
        if changed and not sentences:
            changes = ", ".join(_change(before[key], after[key], name) for name in changed)
            other.setdefault(f"{where}: {changes}", []).append(case)
    return _merged(lost), _merged(other)


def _merged(found):
    more = lambda cases: f" and {len(cases) - 1} more" if len(cases) > 1 else ""
    return [f"{sentence} ({cases[0]}{more(cases)})" for sentence, cases in found.items()]


def read(folder):
    """(Triton version, rows) of a report; (None, []) if there is none. ValueError if a file is not part of one."""
    versions, rows = {}, []
    for path in sorted(Path(folder).glob("*.tsv")):
        versions[path.name], more = _read_file(path)
        rows += more
    if len(set(versions.values())) > 1:
        raise ValueError(f"{folder} was made with several versions of Triton: make aot-update ({versions})")
    return next(iter(versions.values()), None), sorted(rows, key=lambda row: row.key)


def _read_file(path):
    lines = path.read_text().splitlines()
    version = re.fullmatch(r"# Triton (\S+)", lines[0]) if lines else None
    if version is None or lines[1:2] != ["\t".join(COLUMNS)]:
        raise ValueError(f"{path} is not a report of this version of tests/aot_report.py: make aot-update")
    types = [field.type for field in dataclasses.fields(Row)]
    rows = []
    for number, line in enumerate(lines[2:], 3):
        try:
            rows.append(Row(*(kind(cell) for kind, cell in zip(types, line.split("\t"), strict=True))))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return version.group(1), rows


def write(folder, version, rows):
    """Write the report: a file per op, each sorted. Files of other ops are removed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for row in sorted(rows, key=lambda row: row.key):
        files.setdefault(f"{row.op}.tsv", []).append("\t".join(str(cell) for cell in dataclasses.astuple(row)))
    for path in folder.glob("*.tsv"):
        if path.name not in files:
            path.unlink()
    for name, lines in files.items():
        (folder / name).write_text("\n".join([f"# Triton {version}", "\t".join(COLUMNS), *lines]) + "\n")


def gate(folder, version, rows, part, update):
    """Hold fresh rows against the report's rows for which part(row) is true, or with `update` put them in their place.

    Prints the differences; returns whether the report agrees now.
    """
    folder = Path(folder)
    try:
        known, committed = read(folder)
    except ValueError:
        if not update:
            raise
        known, committed = None, []
    kept = [row for row in committed if not part(row)]
    if known not in (None, version) and not update:
        print(f"{folder.name} was made with Triton {known} and this is {version}: not compared")
        return True
    if known not in (None, version) and kept:
        print(f"{folder.name} was made with Triton {known} and this is {version}: update all ops and targets at once")
        return False
    lost, other = compare([row for row in committed if part(row)], rows)
    for word, sentences in (("LOST", lost), ("DIFFERS", other)):
        for sentence in sentences[:LINES]:
            print(f"{word} {sentence}")
        if len(sentences) > LINES:
            print(f"{word} as well: {len(sentences) - LINES} more")
    if known == version and not lost and not other:
        return True
    if update:
        write(folder, version, kept + rows)
        print(f"{folder.name} rewritten: {len(lost)} losses, {len(other)} other differences")
        return True
    print(
        f"{folder.name} is out of date: {len(lost)} losses, {len(other)} other differences; if meant, make aot-update"
    )
    return False
