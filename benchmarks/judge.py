"""What result rows say: which are the newest, who is faster, and by more than the noise.

A ratio is the time of the faster of PyTorch's two ways, `torch` and `torch-nhwc`, over the provider's own, both of one
run: above 1 the provider is faster.
"""

import math
import re
import statistics

from fastcnn.benchmarks.harness import PROVIDERS
from fastcnn.benchmarks.rows import KEY, newest

REFERENCES = ("torch", "torch-nhwc")
OURS = ("fastcnn", "fastcnn-auto", "fastcnn-chain")
PASSES = ("forward", "grad_input", "grad_weight", "backward", "optimizer", "step")


def judged(rows):
    """The newest row of each measurement, with "ratio" (None without a time of PyTorch in its run) and "verdict".

    A ratio within the noise, the larger of its own line's and the median of its op's, has the verdict "same"; others
    are "faster" or "slower".
    """
    references, noises = {}, {}
    for row in rows:
        if row["provider"] in REFERENCES and row["status"] == "ok":
            references.setdefault((line_of(row), row["run"]), {})[row["provider"]] = row["ms"]
    kept = newest(rows)
    for row in kept:
        if row.get("noise") is not None:
            noises.setdefault((row["device"], row["op"]), []).append(row["noise"])
    result = []
    for row in kept:
        ratio = verdict = None
        times = references.get((line_of(row), row["run"]))
        if times and row["status"] == "ok":
            ratio = min(times.values()) / row["ms"]
            usual = statistics.median(noises.get((row["device"], row["op"]), [0]))
            within = max(ratio, 1 / ratio) <= 1 + max(row.get("noise") or 0, usual)
            verdict = "same" if within else "faster" if ratio > 1 else "slower"
        result.append(row | {"ratio": ratio, "verdict": verdict})
    return result


def lines(rows):
    """The lines of one op's table: a list of (label of the case, pass, {provider: judged row}).

    Networks stand in order of appearance, their layers by name.
    """
    varying = [name for name in ("dtype", "layout", "batch") if len({row[name] for row in rows}) > 1]
    cases, refused = {}, {}
    for row in rows:
        cases.setdefault(case_of(row), {}).setdefault(row["pass"], {})[row["provider"]] = row
        if row["status"] != "ok":
            refused.setdefault(case_of(row), {})[row["provider"]] = row
    result = []
    networks = list(dict.fromkeys(_network(row) for row in rows))
    for case, passes in sorted(cases.items(), key=lambda item: _place(item[1], networks)):
        row = next(iter(next(iter(passes.values())).values()))
        words = [f"batch {row[name]}" if name == "batch" else row[name] for name in varying]
        label = ", ".join([row["case"], *words, *(["CUDA graph"] if row["graph"] else [])])
        for name in sorted(passes, key=PASSES.index):
            # a refused provider has no rows of passes that it did not name
            result.append((label, name, refused.get(case, {}) | passes[name]))
    return result


def _network(row):
    return row["case"].split(".")[0]


def _place(passes, networks):
    row = next(iter(next(iter(passes.values())).values()))
    # numbers by value: layer10 behind layer9
    name = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row["case"])]
    return networks.index(_network(row)), name, row["dtype"], row["layout"], row["batch"], row["graph"]


def line_of(row):
    """What tells the lines of all tables apart: everything but the provider."""
    return tuple(row[name] for name in KEY if name != "provider")


def case_of(row):
    """What tells cases apart: everything but provider and pass."""
    return tuple(row[name] for name in KEY if name not in ("provider", "pass"))


def by(rows, name):
    """{value of the field: its rows}, in order of appearance."""
    groups = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def providers_in(rows):
    """The providers that the rows name, in the usual order."""
    found = {row["provider"] for row in rows}
    return [name for name in PROVIDERS if name in found]


def geomean(ratios):
    """Geometric mean of positive numbers."""
    return math.exp(statistics.fmean(map(math.log, ratios)))
