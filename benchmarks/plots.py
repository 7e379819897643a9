"""The plots of the results pages, as SVG.

Each function takes a device's name and its judged rows (judge.py) and gives a matplotlib Figure. A file carries a hash
of the rows it was drawn from, so that a stale one is known without drawing it again.
"""

import hashlib
import json
import math
import re

from fastcnn.benchmarks.judge import OURS, by, case_of, geomean, lines, providers_in

# of the Okabe-Ito palette: told apart by the colour-blind, too
COLOURS = {"forward": "#0072B2", "backward": "#D55E00", "step": "#555555"}
PROVIDER_COLOURS = {
    "torch": "#C9C9C9",
    "torch-nhwc": "#8C8C8C",
    "compile": "#E6B84F",
    "compile-max": "#B8860B",
    "fastcnn": "#0072B2",
    "fastcnn-auto": "#7FC4E8",
    "fastcnn-chain": "#CC79A7",
}
OP_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#555555")
# text stays text: small files and readable differences
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "fastcnn", "font.family": "sans-serif", "font.size": 9}
DRAWING = 1  # raise it when the same rows are drawn in another way, so that all plots are drawn again
_MARK = "rows sha256:"


def digest(rows):
    """A hash of rows, which their plot's file carries."""
    return hashlib.sha256(json.dumps([DRAWING, rows], sort_keys=True).encode()).hexdigest()[:16]


def digest_in(path):
    """The hash that a plot's file carries; None without a file or a hash."""
    match = re.search(rf"{_MARK}(\w+)", path.read_text()) if path.exists() else None
    return match.group(1) if match else None


def save(figure, path, mark):
    """Write a figure as SVG with its hash; the same figure gives the same bytes, whatever the day."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": None, "Description": _MARK + mark}
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="svg", metadata=metadata)


def overview(device, rows):
    """Ratio of every case, a band per op: forward above, backward below."""
    shown = _chosen(rows)
    ops = by(rows, "op")
    figure, axes = _figure(8, 1.3 + 0.55 * len(ops))
    for place, op in enumerate(ops):
        for name, offset in (("forward", -0.2), ("backward", 0.2), ("step", 0)):
            own = [row for row in shown if row["op"] == op and row["pass"] == name]
            if not own:
                continue
            # neighbours spread out inside their half of the band, always in the same way
            heights = [place + offset + 0.07 * (i % 3 - 1) for i in range(len(own))]
            _points(axes, own, heights, COLOURS[name], 14)
            mean = geomean([row["ratio"] for row in own])
            axes.plot(
                [mean] * 2, [place + offset - 0.17, place + offset + 0.17], color="black", linewidth=1.6, zorder=4
            )
    axes.set_yticks(range(len(ops)), list(ops))
    axes.set_ylim(len(ops) - 0.45, -0.55)
    for place in range(len(ops) - 1):
        axes.axhline(place + 0.5, color="#DDDDDD", linewidth=0.6)
    _ratio_axis(axes, shown)
    _legend(axes, shown, mean=True)
    _title(figure, f"Speed against PyTorch, {device}")
    return figure


def cases(device, rows):
    """Ratio of every case of one op, a line per case: forward and backward."""
    shown = _chosen(rows)
    names = list(dict.fromkeys(label for label, _, _ in lines(rows)))
    place = {case: names.index(label) for label, case in _labels(rows)}
    figure, axes = _figure(8, 1.4 + 0.19 * len(names))
    for case in place:
        found = [row["ratio"] for row in shown if case_of(row) == case]
        if found:
            axes.plot([min(found), max(found)], [place[case]] * 2, color="#BBBBBB", linewidth=1, zorder=1)
    for name, colour in COLOURS.items():
        own = [row for row in shown if row["pass"] == name]
        _points(axes, own, [place[case_of(row)] for row in own], colour, 20)
    wrong = set()
    for row in rows:
        if row["status"] == "FAIL" and row["provider"] in OURS:
            wrong.add(place[case_of(row)])
    if wrong:
        axes.plot([1] * len(wrong), sorted(wrong), "x", color="red", markeredgewidth=2, zorder=5, label="FAIL")
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", color="#EEEEEE", linewidth=0.5)
    _ratio_axis(axes, shown)
    # nobody should have to scroll for the scale
    axes.tick_params(top=len(names) > 30, labeltop=len(names) > 30)
    _legend(axes, shown)
    _title(figure, f"{rows[0]['op']}: speed against PyTorch, {device}")
    return figure


def models(device, rows):
    """Bars of whole training steps: images per second on a GPU, ratios on a CPU."""
    rows = [row for row in rows if row["pass"] == "step"]
    cuda = rows[0]["device_type"] == "cuda"
    bars, ticks, y = [], {}, 0
    for label, _, cells in lines(rows):
        own = [cells[provider] for provider in providers_in(cells.values())]
        ticks[y + (len(own) - 1) / 2] = label
        bars += [(y + i, row) for i, row in enumerate(own)]
        y += len(own) + 0.7
    figure, axes = _figure(8, 1.2 + 0.17 * y)
    for y, row in bars:
        value = None
        if row["status"] == "ok":
            value = 1e3 * row["batch"] / row["ms"] if cuda else row["ratio"]
        if value is None:
            wrong = row["status"] == "FAIL"
            text = f" {row['provider']}: {'FAIL' if wrong else 'none'}"
            axes.text(0, y, text, va="center", fontsize=7, color="red" if wrong else "#777777")
        else:
            axes.barh(y, value, 0.9, color=PROVIDER_COLOURS[row["provider"]])
            axes.text(value, y, f" {value:,.0f}" if cuda else f" {value:.2f}×", va="center", fontsize=7)
    if not cuda:
        axes.axvline(1, color="black", linewidth=0.8, zorder=0)
    for provider in providers_in(rows):
        axes.barh(0, 0, color=PROVIDER_COLOURS[provider], label=provider)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(y + 0.8, -0.8)
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("images per second" if cuda else "speed; 1 is the faster of torch and torch-nhwc")
    figure.legend(loc="outside lower center", ncol=6, frameon=False, fontsize=8)
    _title(figure, f"One training step, {device}")
    return figure


def ceilings(device, rows):
    """What our kernels reach of the measured matrix product (x) and copy (y); the lines at 100% are the aim."""
    figure, axes = _figure(7, 5)
    shown = [r for r in _chosen(rows) if r.get("gbs_share") is not None and r.get("tflops_share") is not None]
    for i, (op, own) in enumerate(by(shown, "op").items()):
        colour = OP_COLOURS[i % len(OP_COLOURS)]
        # ops of few FLOPs gather at the left edge
        xs = [max(row["tflops_share"], 1e-4) for row in own]
        marker = "o" if i < len(OP_COLOURS) else "^"
        axes.scatter(xs, [row["gbs_share"] for row in own], s=16, color=colour, marker=marker, alpha=0.75, label=op)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhline(0.9, color="black", linewidth=0.6, linestyle=":")
    axes.set_xscale("log")
    axes.set_ylim(0, max([1.1, *(1.05 * row["gbs_share"] for row in shown)]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("share of the measured matrix product, FLOP/s")
    axes.set_ylabel("share of the measured copy, bytes/s")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    _title(figure, f"Share of the ceilings, {device}")
    return figure


def _figure(width, height):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _title(figure, text):
    # from the edge of the picture: device names are long
    figure.suptitle(text, x=0.01, horizontalalignment="left", fontsize=10)


def _chosen(rows):
    """A row per case and pass, of our own kernel or else of the public op: forward and backward, or else the step."""
    found = {}
    for provider in reversed(OURS):
        for row in rows:
            if row["provider"] == provider and row["pass"] in COLOURS and row["ratio"] is not None:
                found[(*case_of(row), row["pass"])] = row
    parted = {row["op"] for row in found.values() if row["pass"] == "forward"}
    return [row for row in found.values() if row["pass"] != "step" or row["op"] not in parted]


def _labels(rows):
    # the label of a case, beside the case itself
    return [(label, case_of(next(iter(cells.values())))) for label, _, cells in lines(rows)]


def _points(axes, rows, heights, colour, size):
    # hollow: the public op
    for own, face in ((True, colour), (False, "white")):
        chosen = [
            (row["ratio"], y) for row, y in zip(rows, heights, strict=True) if (row["provider"] == OURS[0]) == own
        ]
        if chosen:
            xs, ys = zip(*chosen, strict=True)
            axes.scatter(xs, ys, s=size, facecolors=face, edgecolors=colour, linewidths=0.8, alpha=0.85, zorder=3)


def _ratio_axis(axes, rows):
    ratios = [row["ratio"] for row in rows] or [1]
    low, high = min([0.8, *(0.9 * r for r in ratios)]), max([1.25, *(1.1 * r for r in ratios)])
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    steps = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 30, 50, 100, 200, 500, 1000]
    if high / low < 3:
        steps = [0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 1.75, 2, 2.5]
    ticks = [tick for tick in steps if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.axvspan(low, 1, color="#FFF1EC", zorder=0)
    axes.axvline(1, color="black", linewidth=0.9, zorder=2)
    # its bar under the line at 1, if that leaves the words inside the picture
    place = min(max(math.log(1 / low) / math.log(high / low), 0.3), 0.7)
    axes.set_xlabel("← slower than PyTorch   |   faster than PyTorch →", x=place)


def _legend(axes, rows, mean=False):
    for name, colour in COLOURS.items():
        if any(row["pass"] == name for row in rows):
            axes.scatter([], [], s=20, color=colour, label=name)
    if any(row["provider"] != OURS[0] for row in rows):
        label = "public op, where our own kernel has no time"
        axes.scatter([], [], s=20, facecolors="white", edgecolors="black", label=label)
    if mean:
        axes.plot([], [], color="black", linewidth=1.6, label="geometric mean")
    axes.figure.legend(loc="outside lower center", ncol=5, frameon=False, fontsize=8)
