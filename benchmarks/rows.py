"""Result rows: benchmarks/results/<device>.jsonl, one JSON object per case, provider and pass, appended as measured.

What all rows of a run share (device, versions, ceilings) stands once, in a line before them; `read_rows` joins the two.
benchmarks/README.md explains the fields.
"""

import datetime
import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

import fastcnn

# what tells one measurement from another; the newest of each is what counts
KEY = ("device", "op", "case", "provider", "pass", "graph", "dtype", "layout", "batch")
RUN = ("device", "device_type", "threads", "busy", "driver", "torch", "triton", "cudnn", "commit", "copy_gbs")


def run_info(device, ceilings, commit=None):
    """The fields that all rows of a run share.

    Args:
        device: torch.device.
        ceilings: of `timing.ceilings`, measured in this run.
        commit: what to call the measured state; default: git's commit, or the version where there is no checkout.
    """
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    cuda = device.type == "cuda"
    return {
        **ceilings,
        "device": torch.cuda.get_device_name(device) if cuda else f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "busy": None if cuda else _busy(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "commit": commit or _commit() or f"v{fastcnn.__version__}",
        "date": now,
        "run": now,
    }


def slug(device):
    """The stem of a device's files: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def append(rows, folder):
    """Append rows to the file of their device, at once on disk; a run that is cut off keeps them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    for row in rows:
        path = folder / f"{slug(row['device'])}.jsonl"
        shared = json.dumps({"run": row["run"], **{field: row.get(field) for field in RUN}})
        own = json.dumps({field: value for field, value in row.items() if field not in RUN} | {"date": now})
        started = path.exists() and (path, shared) in _started
        if path.exists() and not started:
            _drop_cut_line(path)
        _started.add((path, shared))
        with open(path, "a") as file:
            file.write(("" if started else shared + "\n") + own + "\n")


def _drop_cut_line(path):
    # what a run that was killed while writing left behind
    text = path.read_bytes()
    if text and not text.endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)


_started = set()  # (file, line of a run) that this process has written


def read_rows(folder):
    """All rows of a folder, device by device, in the order in which they were measured.

    Raises:
        ValueError: a line is no row; the message names file and line. The last line of a file may be cut off.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        lines, runs = path.read_text().splitlines(keepends=True), {}
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if "device" in row and "op" not in row:
                    runs[row["run"]] = row
                    continue
                row = runs.get(row.get("run"), {}) | row
                missing = [field for field in KEY if field not in row]
            except (json.JSONDecodeError, AttributeError, TypeError):
                missing = ["JSON"]
            if not missing:
                rows.append(row)
            elif number < len(lines) or line.endswith("\n"):
                raise ValueError(f"{path}, line {number} is no result row: it lacks {', '.join(missing)}")
    return rows


def newest(rows):
    """The last row of each measurement (KEY), in the order in which they first appeared."""
    found = {}
    for row in rows:
        found[tuple(row[field] for field in KEY)] = row
    return list(found.values())


def _cpu_name():
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return re.sub(r"\s+", " ", re.sub(r"\((R|TM|r|tm)\)", "", match.group(1))).strip() if match else platform.machine()


def _busy():
    """The share of this machine's CPU time that others take, seen over half a second; None where that is not known."""

    def ticks():
        numbers = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(numbers), numbers[3] + numbers[4]  # idle, and idle while waiting for a disk

    try:
        before = ticks()
        time.sleep(0.5)
        total, idle = (after - start for after, start in zip(ticks(), before, strict=True))
    except (OSError, ValueError, IndexError):
        return None
    return round(1 - idle / total, 3) if total else None


def _triton_version():
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _commit():
    commit = _output("git", "rev-parse", "--short", "HEAD")
    if commit is None:
        return None
    # pages and rows are no change of what is measured
    measured = ("fastcnn", "kernels", "benchmarks", ":(exclude)*.md", ":(exclude)benchmarks/results")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", *measured)
    return commit + ("+" if changed else "")


def _output(*command):
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
