"""The Markdown of the results pages: what stands in a cell, and the tables. All take judged rows of one device."""

import math
import statistics
from collections import Counter

from fastcnn.benchmarks.harness import OF_NETWORKS
from fastcnn.benchmarks.judge import OURS, PASSES, REFERENCES, by, case_of, geomean, line_of, lines, providers_in


def three(value):
    """A number with three significant digits and no exponent."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{min(digits, 5)}f}"


def _times(ratio):
    return f"{ratio:.2f}×" if ratio < 9.995 else f"{ratio:.1f}×"


def _judgement(row):
    text = _times(row["ratio"])
    return {"same": f"≈{text}", "slower": f"**{text}** ▼", "faster": text}[row["verdict"]]


def number(reason, notes):
    """The number of a footnote; a reason met again keeps its first."""
    return notes.setdefault(reason or "no reason given", len(notes) + 1)


def _cell(row, notes, value=lambda row: three(row["ms"])):
    """A provider's cell of a page. Only a correct result has a number."""
    if row is None:
        return ""
    if row["status"] != "ok":
        sign = "**FAIL**" if row["status"] == "FAIL" else "–"
        return f"{sign} <sup>{number(row['reason'], notes)}</sup>"
    cuda = row["device_type"] == "cuda"
    if row["ratio"] is None:
        return f"{value(row)}" if cuda else f"– <sup>{number('measured without PyTorch beside it', notes)}</sup>"
    if row["provider"] in REFERENCES:
        return value(row) if cuda else _times(row["ratio"])
    return f"{value(row)} ({_judgement(row)})" if cuda else _judgement(row)


def _table(header, body, left):
    """Markdown; the first `left` columns are text, the others numbers."""
    rule = [":--" if i < left else "--:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *body))


def _footnotes(notes):
    # a reason may span lines and hold a table's own sign
    return "<br>".join(f"<sup>{number}</sup> {_plain(reason)}" for reason, number in notes.items())


def _plain(reason):
    return " ".join(reason.split()).replace("|", "\\|").replace("<", "&lt;")


def link(op, folder):
    """A link to an op's page."""
    return f"[{op}]({folder}/{op}.md)"


def dates(rows):
    """The day or days on which rows were measured."""
    days = sorted({row["date"][:10] for row in rows})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def commits(rows):
    """The commits that rows were measured at, the newest three by name."""
    newest_first = sorted(rows, key=lambda row: row["date"], reverse=True)
    found = list(dict.fromkeys(row["commit"] or "unknown" for row in newest_first))
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def noise(rows):
    """A sentence on the noise of rows."""
    # one figure per line: all providers of a line carry the same
    found = sorted({(line_of(row), row["run"]): row["noise"] for row in rows if row.get("noise") is not None}.values())
    if not found:
        return "Noise: unknown."
    most = found[math.ceil(0.9 * len(found)) - 1]
    return f"Noise: median {statistics.median(found):.1%}, 90% of the lines up to {most:.1%}."


def facts(rows):
    """Date, versions, ceilings and noise of a device's rows in a few sentences."""
    latest = max(rows, key=lambda row: row["date"])
    cuda = latest["device_type"] == "cuda"
    versions = [f"torch {latest['torch']}", f"Triton {latest['triton']}"]
    if cuda:
        versions += [f"cuDNN {latest['cudnn']}", f"driver {latest['driver']}"]
    text = f"Measured {dates(rows)} at commit {commits(rows)} with {', '.join(versions)}. "
    if cuda:
        products = {row["dtype"]: row["matmul_tflops"] for row in sorted(rows, key=lambda row: row["date"])}
        reached = [f"a copy {latest['copy_gbs']:,.0f} GB/s"]
        reached += [f"a matrix product {three(value)} TFLOP/s in {name}" for name, value in products.items() if value]
        text += f"In the same run {', '.join(reached)}: the ceilings. "
    else:
        text += "The machine is shared, so no times are shown, only ratios of one run. "
    return text + noise(rows)


def _count(rows, provider):
    """Cases of a provider: (with a time, with a pass slower than PyTorch, wrong)."""
    own = [row for row in rows if row["provider"] == provider]
    cases = [{case_of(row) for row in own if test(row)} for test in (
        lambda row: row["status"] == "ok", lambda row: row["verdict"] == "slower", lambda row: row["status"] == "FAIL"
    )]  # fmt: skip
    return [len(found) for found in cases]


def _slower(rows, provider):
    timed, slower, wrong = _count(rows, provider)
    text = (f"{slower} of {timed}" if timed else "–") + (" ▼" if slower else "")
    return f"{text}, **{wrong} FAIL**" if wrong else text


def _means(rows, provider, passes):
    cells = []
    for name in passes:
        ratios = [r["ratio"] for r in rows if r["provider"] == provider and r["pass"] == name and r["ratio"]]
        cells.append(f"{geomean(ratios):.2f}" if ratios else "–")
    return cells


def _extreme(rows, provider, choose):
    own = [row for row in rows if row["provider"] == provider and row["ratio"]]
    if not own:
        return "–"
    row = choose(own, key=lambda row: row["ratio"])
    return f"{_times(row['ratio'])} `{row['case']}` {row['pass']}"


def front_table(rows, folder):
    """A line per op: our own kernel, the public op, torch.compile."""
    header = [
        "op",
        "own kernel",
        "slowest",
        "fastest",
        "slower in some pass",
        "public op",
        "slower in some pass",
        "torch.compile",
    ]
    body = []
    for op, own in by(rows, "op").items():
        means = {}
        for provider in (*OURS, "compile"):
            cells = _means(own, provider, ("forward", "backward", "step"))
            # an optimizer has but one pass
            known = [cell for cell in cells if cell != "–"]
            means[provider] = " / ".join(known) if known else "–"
        body.append([
            link(op, folder), means["fastcnn"], _extreme(own, "fastcnn", min), _extreme(own, "fastcnn", max),
            _slower(own, "fastcnn"), means["fastcnn-auto"], _slower(own, "fastcnn-auto"), means["compile"],
        ])  # fmt: skip
    return _table(header, body, 1)


def summary(rows, folder):
    """A line per op and provider: geometric means per pass, extremes, and how many cases are slower than PyTorch."""
    passes = [name for name in PASSES if any(row["pass"] == name for row in rows)]
    body = []
    for op, own in by(rows, "op").items():
        for provider in providers_in(own):
            if provider not in REFERENCES:
                means = _means(own, provider, passes)
                ends = [_extreme(own, provider, min), _extreme(own, provider, max)]
                body.append([link(op, folder), provider, *means, _slower(own, provider), *ends])
    return _table(["op", "provider", *passes, "slower in some pass", "slowest", "fastest"], body, 2)


def losses(rows):
    """Every case on which fastcnn is wrong or slower than PyTorch in some pass, the worst first."""
    wrong, slower = {}, {}
    for row in rows:
        place = (case_of(row), row["provider"])
        if row["provider"] in OURS and row["status"] == "FAIL":
            wrong.setdefault(place, row)
        elif row["provider"] in OURS and row["verdict"] == "slower":
            slower[place] = min(slower.get(place, row), row, key=lambda row: row["ratio"])
    parts = []
    if wrong:
        body = [[f"`{r['op']}`", f"`{r['case']}`", r["provider"], _plain(r["reason"] or "")] for r in wrong.values()]
        parts.append("Wrong results, never timed:\n\n" + _table(["op", "case", "provider", "reason"], body, 4))
    if slower:
        worst = sorted(slower.values(), key=lambda row: row["ratio"])
        body = [[f"`{r['op']}`", f"`{r['case']}`", r["provider"], r["pass"], _judgement(r)] for r in worst]
        table = _table(["op", "case", "provider", "slowest pass", "ratio"], body, 4)
        count = f"Slower than PyTorch in some pass: {len(worst)} lines, the slowest first"
        parts.append(f"<details><summary>{count}</summary>\n\n{table}\n\n</details>")
    return parts


def model_words(rows):
    """What the numbers of `models` are."""
    unit = "images per second (and the ratio)" if rows[0]["device_type"] == "cuda" else "the ratio"
    return f"One training step of whole networks, {unit}:"


def models(rows, memory=True):
    """Whole training steps: a line per network, and the notes below."""
    rows = [row for row in rows if row["pass"] == "step"]
    providers, notes, body = providers_in(rows), {}, []
    for label, _, cells in lines(rows):
        row = next(iter(cells.values()))
        rates = [_cell(cells.get(p), notes, lambda r: f"{1e3 * r['batch'] / r['ms']:,.0f}") for p in providers]
        body.append([f"`{label}`", str(row["batch"]), *rates, *(_memory(cells.values()) if memory else [])])
    table = _table(["network", "batch", *providers, *(["peak, MB", "saved, MB"] if memory else [])], body, 1)
    return [table, _footnotes(notes)] if notes else [table]


def _memory(rows):
    """["812 → 405", ...]: peak memory and bytes kept for backward, in MB, of PyTorch and of fastcnn."""
    cells = []
    for name in ("peak_bytes", "saved_bytes"):
        found = {r["provider"]: r[name] for r in rows if r["status"] == "ok" and r.get(name) is not None}
        theirs = min((found[p] for p in REFERENCES if p in found), default=None)
        ours = next((found[p] for p in (*OF_NETWORKS, *OURS) if p in found), None)
        sizes = ["–" if size is None else f"{size / 1e6:,.{1 if size < 1e8 else 0}f}" for size in (theirs, ours)]
        cells.append("" if theirs is None and ours is None else " → ".join(sizes))
    return cells


def _ceiling(cells):
    """What PyTorch and fastcnn reach of the ceiling nearer to fastcnn (else to PyTorch): 61% → 88% of copy."""
    timed = {p: row for p, row in cells.items() if row["status"] == "ok" and row.get("gbs_share") is not None}
    ours = next((timed[p] for p in OURS if p in timed), None)
    theirs = min((timed[p] for p in REFERENCES if p in timed), key=lambda row: row["ms"], default=None)
    row = ours or theirs
    if row is None:
        return ""
    product = (row.get("tflops_share") or 0) > row["gbs_share"]
    name = "tflops_share" if product else "gbs_share"
    shares = ["–" if row is None else f"{row[name] or 0:.0%}" for row in (theirs, ours)]
    return f"{' → '.join(shares)} of {'product' if product else 'copy'}"


def op_table(rows):
    """A line per case and pass, all providers beside each other, and the notes below."""
    providers, notes, body, last = providers_in(rows), {}, [], None
    of_case = {}
    for row in rows:
        of_case.setdefault(case_of(row), []).append(row)
    for label, name, cells in lines(rows):
        row = next(iter(cells.values()))
        first = label != last
        last = label
        # what belongs to the case stands on its first line only
        about = [f"`{label}`", row["shape"]] if first else ["", ""]
        own = of_case[case_of(row)]
        latest = max(own, key=lambda row: row["date"])
        memory = _memory(own) if first else ["", ""]
        noise = next((f"{r['noise']:.1%}" for r in cells.values() if r.get("noise") is not None), "")
        date = f"{latest['date'][:10]} {latest['commit'] or ''}".strip() if first else ""
        values = [_cell(cells.get(p), notes) for p in providers]
        body.append([*about, name, *values, noise, _ceiling(cells), *memory, date])
    header = ["case", "shape", "pass", *providers, "noise", "ceiling", "peak, MB", "saved, MB", "measured"]
    table = _table(header, body, 3)
    return [table, _footnotes(notes)] if notes else [table]


def families(rows):
    """Where a step's time goes: a table per network with a column per provider."""
    parts = []
    own = [row for row in rows if row.get("families") and row["status"] == "ok"]
    groups = {}
    for row in own:
        groups.setdefault((row["case"], row["batch"], row["dtype"]), []).append(row)
    for (case, batch, dtype), group in groups.items():
        cuda = group[0]["device_type"] == "cuda"
        total = Counter()
        for row in group:
            total.update(row["families"])
        columns = [f"{row['provider']}{', CUDA graph' if row['graph'] else ''}" for row in group]
        body = []
        for family, _ in total.most_common():
            values = [(row["families"].get(family, 0), sum(row["families"].values())) for row in group]
            body.append([family, *((f"{three(ms)}" if cuda else f"{ms / all_ms:.0%}") for ms, all_ms in values)])
        unit = "milliseconds" if cuda else "share of the provider's own step"
        parts.append(f"`{case}`, batch {batch}, {dtype}, {unit}:\n\n" + _table(["kernels", *columns], body, 1))
    return parts
