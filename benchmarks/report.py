"""From result rows to pages: tables in benchmarks/README.md and README.md, a page per device and op, and the plots.

    make results        (python -m fastcnn.benchmarks.report)

Everything between two marker lines is made here, from benchmarks/results/*.jsonl alone, and a test fails when page and
rows differ. Times are shown for GPUs alone; a shared CPU gives ratios. What a ratio is: judge.py.
"""

from dataclasses import dataclass, field
from pathlib import Path

from fastcnn.benchmarks import plots, tables
from fastcnn.benchmarks.cases import OPS
from fastcnn.benchmarks.judge import REFERENCES, by, judged, lines, providers_in
from fastcnn.benchmarks.rows import read_rows, slug

BEGIN = "<!-- results:begin (made by make results) -->"
END = "<!-- results:end -->"

MEANING = (
    "Speed as a ratio to the faster of PyTorch eager and PyTorch channels_last in the same run: 2× is half the time. "
    "▼ slower than PyTorch, ≈ a difference within the noise, FAIL a wrong result, – nothing to measure."
)
NO_GPU = "**Not yet measured on a GPU.**"
NOTHING = "**Nothing is measured yet:** `fastcnn bench` makes rows, `make results` tables and plots here."


@dataclass
class Report:
    """Everything made from the rows of a folder.

    Attributes:
        page: what stands between the markers of benchmarks/README.md.
        front: what stands between the markers of README.md.
        pages: path in the folder -> text: every case of an op on a device.
        plots: path in the folder -> (function of plots.py, device name, rows it draws).
    """

    page: str = ""
    front: str = ""
    pages: dict = field(default_factory=dict)
    plots: dict = field(default_factory=dict)


def terminal_table(rows):
    """Text for the terminal after a run: a line per case and pass, milliseconds and ratio per provider, the noise.

    Args:
        rows: of one op and one run, as the harness returns them.
    """
    rows = judged(rows)
    providers, notes = providers_in(rows), {}
    table = [["case", "pass", *providers]]
    for label, name, cells in lines(rows):
        table.append([label, name, *(_terminal_cell(cells.get(provider), notes) for provider in providers)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = []
    for first, second, *numbers in table:
        cells = [first.ljust(widths[0]), second.ljust(widths[1])]
        text.append("  ".join(cells + [cell.rjust(w) for cell, w in zip(numbers, widths[2:], strict=True)]).rstrip())
    text += [f"[{number}] {' '.join(reason.split())}" for reason, number in notes.items()]
    legend = "ms (ratio to the faster of torch and torch-nhwc; v: slower, ~: within the noise)"
    text.append(f"{legend}. {tables.noise(rows)}")
    return "\n".join(text)


def make(folder):
    """The Report of a folder of result files; an empty or missing folder has one, too."""
    places = {op: place for place, op in enumerate(OPS)}
    rows = sorted(judged(read_rows(folder)), key=lambda row: places.get(row["op"], len(OPS)))
    report = Report()
    page, front = [], []
    if not rows:
        page.append(NOTHING)
        front.append(NOTHING)
    if not any(row["device_type"] == "cuda" for row in rows):
        page.append(NO_GPU)
        front.append(NO_GPU + " Correctness comes first, measured speed next.")
    if rows:
        page.append(MEANING)
        front.append(MEANING + " Three numbers are forward / backward / both, geometric means over the cases.")
    devices = by(rows, "device")
    # GPUs first
    for device in sorted(devices, key=lambda name: (devices[name][0]["device_type"] != "cuda", name)):
        own = devices[device]
        _add_plots(report, device, own)
        for op, group in by(own, "op").items():
            report.pages[f"{slug(device)}/{op}.md"] = _op_page(device, op, group)
        page += _device_block(device, own)
        front += _front_block(device, own)
    if rows:
        front.append("All cases, plots and how it is measured: [benchmarks/README.md](benchmarks/README.md).")
    report.page, report.front = "\n\n".join(page), "\n\n".join(front)
    return report


def write(folder, page=None, front=None):
    """Write all that is made from a folder: pages and plots into the folder, blocks into two files.

    Args:
        folder: of the result files; missing counts as empty.
        page, front: files with the two markers, for the full and the short block; None: not written.

    Returns:
        list of the paths written. A plot whose rows are still the same is not drawn again.

    Raises:
        ValueError: a result file has a line that is no row, or a page lacks its markers.
    """
    folder = Path(folder)
    report = make(folder)
    written = []
    for path, block in ((page, report.page), (front, report.front)):
        if path is not None:
            Path(path).write_text(splice(Path(path).read_text(), block, path))
            written.append(Path(path))
    for name, text in report.pages.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        written.append(folder / name)
    for name, (draw, device, rows) in report.plots.items():
        if plots.digest_in(folder / name) != plots.digest(rows):
            plots.save(draw(device, rows), folder / name, plots.digest(rows))
            written.append(folder / name)
    for path in _left_over(folder, report):
        path.unlink()
    return written


def stale(folder, page=None, front=None):
    """Names of the files that `write` would change or delete."""
    folder = Path(folder)
    report = make(folder)
    found = []
    for path, block in ((page, report.page), (front, report.front)):
        if path is not None and Path(path).read_text() != splice(Path(path).read_text(), block, path):
            found.append(Path(path).name)
    for name, text in report.pages.items():
        if not (folder / name).exists() or (folder / name).read_text() != text:
            found.append(name)
    for name, (_, _, rows) in report.plots.items():
        if plots.digest_in(folder / name) != plots.digest(rows):
            found.append(name)
    return found + [path.relative_to(folder).as_posix() for path in _left_over(folder, report)]


def splice(text, block, name):
    """The text with what stands between its two markers replaced by the block.

    Raises:
        ValueError: not exactly one of each marker; the message has `name`.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{name} must have one line {BEGIN!r} and after it one line {END!r}")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{block}\n{text[text.index(END) :]}"


def _left_over(folder, report):
    # pages and plots of devices and ops without rows; what is not made here is left alone
    for path in sorted(folder.glob("*/*.md")):
        if path.relative_to(folder).as_posix() not in report.pages and path.read_text().startswith(BEGIN):
            yield path
    for path in sorted(folder.glob("plots/*/*.svg")):
        if path.relative_to(folder).as_posix() not in report.plots and plots.digest_in(path):
            yield path


def _split(rows):
    models = [row for row in rows if row["op"] == "model"]
    # a run cut off within its first step has nothing to show yet
    whole = any(row["pass"] == "step" for row in models)
    return [row for row in rows if row["op"] != "model"], models if whole else []


def _terminal_cell(row, notes):
    if row is None:
        return ""
    if row["status"] != "ok":
        return f"{'FAIL' if row['status'] == 'FAIL' else '-'} [{tables.number(row['reason'], notes)}] "
    if row["ratio"] is None:
        return f"{tables.three(row['ms'])} "
    sign = {"same": "~", "slower": "v", "faster": " "}[row["verdict"]]
    return f"{tables.three(row['ms'])} ({row['ratio']:.2f}){' ' if row['provider'] in REFERENCES else sign}"


def _plot(device, name, folder, text):
    return f"![{text}]({folder}plots/{slug(device)}/{name}.svg)"


def _device_block(device, rows):
    ops, models = _split(rows)
    pages = f"results/{slug(device)}"
    parts = [f"### {device}", tables.facts(rows), "Every case is on the page of its op, behind the op's name."]
    if ops:
        parts += [_plot(device, "overview", "results/", "speed against PyTorch by op"), tables.summary(ops, pages)]
        parts += tables.losses(ops)
        if rows[0]["device_type"] == "cuda":
            parts.append(_plot(device, "ceilings", "results/", "share of the measured ceilings"))
    if models:
        parts += [tables.model_words(models), *tables.models(models)]
        parts += [f"Their passes and kernels: {tables.link('model', pages)}."]
        parts += [_plot(device, "models", "results/", "training steps of whole networks")]
    return parts


def _front_block(device, rows):
    ops, models = _split(rows)
    parts = [f"**{device}**, {tables.dates(rows)}, commit {tables.commits(rows)}"]
    if ops:
        parts.append(_plot(device, "overview", "benchmarks/results/", "speed against PyTorch by op"))
        parts.append(tables.front_table(ops, f"benchmarks/results/{slug(device)}"))
    if models:
        parts += [tables.model_words(models), *tables.models(models, memory=False)]
    return parts


def _op_page(device, op, rows):
    """Every case of an op on a device; of op "model" whole networks."""
    kinds = sorted({row["dtype"] for row in rows}) + sorted({row["layout"] for row in rows})
    unit = "milliseconds (and the ratio)" if rows[0]["device_type"] == "cuda" else "the ratio"
    parts = [
        BEGIN,
        f"# {'Whole networks' if op == 'model' else op}, {device}",
        f"{', '.join(kinds)}. {tables.facts(rows)}",
        f"{MEANING} Cells: {unit}. Ceiling, peak memory, and bytes kept for backward: PyTorch's → fastcnn's. "
        "A commit with + had uncommitted changes. Back to [all ops and how they are measured](../../README.md).",
    ]
    if op == "model":
        parts += [tables.model_words(rows), *tables.models(rows), "Their passes:", *tables.op_table(rows)]
        families = tables.families(rows)
        if families:
            parts += ["Time of a step by kind of kernel:", *families]
    else:
        parts += [_plot(device, op, "../", f"{op}: speed against PyTorch, case by case"), *tables.op_table(rows)]
    return "\n\n".join([*parts, END]) + "\n"


def _add_plots(report, device, rows):
    ops, models = _split(rows)
    folder = f"plots/{slug(device)}"
    for op, own in by(ops, "op").items():
        report.plots[f"{folder}/{op}.svg"] = (plots.cases, device, own)
    if ops:
        report.plots[f"{folder}/overview.svg"] = (plots.overview, device, ops)
        if rows[0]["device_type"] == "cuda":
            report.plots[f"{folder}/ceilings.svg"] = (plots.ceilings, device, ops)
    if models:
        report.plots[f"{folder}/models.svg"] = (plots.models, device, models)


def main():
    here = Path(__file__).resolve().parent
    for path in write(here / "results", here / "README.md", here.parent / "README.md"):
        print(path.relative_to(here.parent))


if __name__ == "__main__":
    main()
