"""All networks of fastcnn.models side by side: year, parameters, multiply-adds, memory, and what was measured.

    fastcnn models            fastcnn models "resnet*" --sort macs --plot resnets.png

Counted on meta tensors (counting.py) with images of the paper's size; nothing is run. Speeds come from the result rows
of `fastcnn bench models` alone: images per second of a training step on a GPU, the ratio to PyTorch on a CPU, which is
shared and so has no times.
"""

import math
from dataclasses import dataclass, field

import torch

from fastcnn.models import MODELS, create_model, list_models
from fastcnn.names import check_name
from fastcnn.study.counting import BYTES, summary

KEYS = ("name", "year", "parameters", "macs", "memory")
HEAD = ("network", "year", "image", "parameters", "weights, MB", "MMACs", "memory, MB")
MEANING = (
    "MMACs: million multiply-adds of an image, forward. Memory: of an image in training, in fp32: the outputs of all "
    "layers, and as much again for their gradients."
)
SPEEDS = "Speed: images/s of a training step on our kernels (ratio to PyTorch); on a CPU the ratio alone."


@dataclass(frozen=True)
class Facts:
    """What is known of one network.

    Attributes:
        name: of `list_models()`.
        year: of its paper.
        image: [C, H, W] that it was counted with.
        parameters: their number.
        macs: multiply-adds of an image, forward.
        activations: numbers in all layers' outputs for an image, forward.
        speeds: device -> judged result row of our fastest training step; empty if nothing is measured.
    """

    name: str
    year: int
    image: tuple
    parameters: int
    macs: int
    activations: int
    speeds: dict = field(default_factory=dict)

    @property
    def memory(self):
        """Bytes in fp32 that training needs for an image: outputs, and as much again for their gradients."""
        return 2 * BYTES * self.activations

    def milliseconds(self, device):
        """Of a training step, by image; None if it was not measured there."""
        row = self.speeds.get(device)
        return row["ms"] / row["batch"] if row else None

    def cells(self):
        """As text, in the order of HEAD."""
        memory, weights = self.memory / 1e6, BYTES * self.parameters / 1e6
        size = "x".join(map(str, (*self.image[1:], self.image[0])))
        numbers = [f"{self.parameters:,}", *map(_three, (weights, self.macs / 1e6, memory))]
        return [self.name, str(self.year), size, *numbers]


def gallery(pattern="*", rows=(), sort="year", progress=False):
    """The facts of the networks of `list_models(pattern)`.

    Args:
        pattern: of the names.
        rows: result rows (benchmarks/rows.py) to take speeds from.
        sort: one of KEYS.
        progress: show a bar where somebody looks.

    Returns:
        list of `Facts`, sorted; by name where the key is the same.

    Raises:
        ValueError: no network has such a name, or sort is no key.
    """
    from tqdm import tqdm

    check_name("key", sort, KEYS)
    names = list_models(pattern)
    if not names:
        raise ValueError(f"no network is called {pattern!r}: there are {', '.join(list_models())}")
    speeds = _speeds(rows)
    bar = tqdm(names, desc="counting", leave=False, disable=None if progress else True)
    found = [_facts(name, speeds.get(name, {})) for name in bar]
    return sorted(found, key=lambda facts: (getattr(facts, sort), facts.name))


def _facts(name, speeds):
    entry = MODELS[name]
    with torch.device("meta"):
        model = create_model(name)
    image = (model.in_chans, entry.image_size, entry.image_size)
    found = summary(model, image)
    return Facts(name, entry.year, image, found.parameters, found.macs, found.activations, speeds)


def _speeds(rows):
    """{network: {device: judged row of our fastest training step}}."""
    from fastcnn.benchmarks.judge import OURS, judged

    found = {}
    for row in judged(rows):
        if row["op"] == "model" and row["pass"] == "step" and row["provider"] in OURS and row["status"] == "ok":
            devices = found.setdefault(row["case"].rpartition(":")[2], {})
            best = devices.get(row["device"])
            if best is None or row["ms"] / row["batch"] < best["ms"] / best["batch"]:
                devices[row["device"]] = row
    return found


def table(facts):
    """Lines of cells, the first of them the head; a column per device that measured one of the networks."""
    devices = sorted({device for one in facts for device in one.speeds})
    yield [*HEAD, *devices]
    for one in facts:
        yield [*one.cells(), *(_speed(one.speeds.get(device)) for device in devices)]


def text(facts):
    """The table for the terminal."""
    lines = list(table(facts))
    devices = lines[0][len(HEAD) :]
    # devices' names are long: a letter above the column, the name below
    lines[0] = [*HEAD, *(f"speed {_letter(i)}" for i in range(len(devices)))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = []
    for name, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        shown.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    notes = [f"{len(facts)} network{'s' * (len(facts) > 1)}. {MEANING}"]
    notes += [f"speed {_letter(i)}: {device}" for i, device in enumerate(devices)]
    if devices:
        notes.append(SPEEDS)
    return "\n".join([*shown, "", *notes])


def plot(facts, path=None):
    """Bubbles: multiply-adds across, parameters up, the area the bytes of training, the colour the year.

    Where a GPU measured some of the networks, its milliseconds per image of a training step stand beside it.

    Args:
        facts: of `gallery`.
        path: the picture, whose suffix says the format; None: not written.

    Returns:
        matplotlib Figure.
    """
    from matplotlib.figure import Figure

    device = _measured_gpu(facts)
    panels = [(lambda one: one.parameters / 1e6, "million parameters")]
    if device:
        panels.append((lambda one: one.milliseconds(device), f"ms per image of a training step, {device}"))
    width = 9
    figure = Figure(figsize=(width * len(panels) + 1, 8))
    # most are of the years from 2012 on
    years = max(2012, min(one.year for one in facts)), max(2013, *(one.year for one in facts))
    for place, (height, label) in enumerate(panels):
        own = [one for one in facts if height(one) is not None]
        # at a fixed place: the labels are laid out for it
        left, share = (place * width + 0.7) / (width * len(panels) + 1), (width - 0.9) / (width * len(panels) + 1)
        axes = figure.add_axes((left, 0.08, share, 0.84))
        dots = _bubbles(axes, own, height, years)
        axes.set_xlabel("million multiply-adds per image, forward")
        axes.set_ylabel(label)
        _labels(axes, own, height)
    bar = figure.add_axes((1 - 0.75 / (width * len(panels) + 1), 0.08, 0.012, 0.84))
    figure.colorbar(dots, cax=bar, ticks=range(years[0], years[1] + 1), extend="min", format="%d")
    title = "Networks of fastcnn.models; area: MB of training per image, colour: year of the paper"
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=10)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _bubbles(axes, facts, height, years):
    xs, ys = [one.macs / 1e6 for one in facts], [height(one) for one in facts]
    areas = [_area(one) for one in facts]
    options = {"cmap": "viridis", "vmin": years[0], "vmax": years[1], "alpha": 0.6, "edgecolors": "white"}
    # big ones below
    order = sorted(range(len(facts)), key=lambda i: -areas[i])
    pick = lambda values: [values[i] for i in order]
    dots = axes.scatter(pick(xs), pick(ys), s=pick(areas), c=[facts[i].year for i in order], linewidths=0.5, **options)
    axes.set(xscale="log", yscale="log", xlim=_limits(xs), ylim=_limits(ys))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(alpha=0.25, linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for megabytes in (1, 10, 100, 1000):
        axes.scatter([], [], s=_area_of(megabytes), color="#999999", alpha=0.6, label=f"{megabytes:,} MB")
    axes.legend(loc="upper left", frameon=False, fontsize=8, labelspacing=2, borderpad=1.5)
    return dots


def _labels(axes, facts, height, size=6.5):
    """Names beside their bubbles where there is room, those measured and short ones first; others stay without."""
    box = axes.get_position()
    inches = axes.figure.get_size_inches()
    points = [72 * side * share for side, share in zip(inches, (box.width, box.height), strict=True)]

    def place(value, limits, length):
        low, high = map(math.log, limits)
        return (math.log(value) - low) / (high - low) * length

    centres = [
        (place(one.macs / 1e6, axes.get_xlim(), points[0]), place(height(one), axes.get_ylim(), points[1]))
        for one in facts
    ]
    taken = []
    for i in sorted(range(len(facts)), key=lambda i: (not facts[i].speeds, len(facts[i].name), facts[i].name)):
        wide, high = 0.6 * size * len(facts[i].name), 1.1 * size
        radius = min(math.sqrt(_area(facts[i]) / math.pi), 12) + 1
        x, y = centres[i]
        options = [(radius, -high / 2), (-radius - wide, -high / 2), (-wide / 2, radius), (-wide / 2, -radius - high)]
        corner = 0.8 * radius
        options += [(dx, dy) for dx in (corner, -corner - wide) for dy in (corner, -corner - high)]
        for dx, dy in options:
            new = (x + dx, y + dy, x + dx + wide, y + dy + high)
            inside = new[0] > 0 and new[2] < points[0] and new[1] > 0 and new[3] < points[1]
            if inside and not any(_overlap(new, other) for other in taken):
                taken.append(new)
                at = {"xy": (facts[i].macs / 1e6, height(facts[i])), "xytext": (dx, dy), "textcoords": "offset points"}
                axes.annotate(facts[i].name, fontsize=size, va="bottom", zorder=5, **at)
                break


def _overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _limits(values):
    return min(values) / 1.8, max(values) * 2.2


def _area(facts):
    return _area_of(facts.memory / 1e6)


def _area_of(megabytes):
    # in points: a network of a GB covers no others entirely
    return 4 + 0.7 * megabytes


def _measured_gpu(facts):
    for one in facts:
        for device, row in one.speeds.items():
            if row["device_type"] == "cuda":
                return device
    return None


def _speed(row):
    if row is None:
        return ""
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}×"
    if row["device_type"] != "cuda":
        return ratio
    return f"{1e3 * row['batch'] / row['ms']:,.0f}" + (f" ({ratio})" if ratio else "")


def _letter(place):
    return chr(ord("A") + place)


def _three(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def command(pattern="*", sort="year", results_folder="benchmarks/results", path=None):
    """`fastcnn models`: print the table; draw the bubbles into a file, too.

    Args:
        pattern, sort: as of `gallery`.
        results_folder: where result rows lie; a missing one has none.
        path: the picture; None: none.
    """
    from fastcnn.benchmarks.rows import read_rows

    facts = gallery(pattern, read_rows(results_folder), sort, progress=True)
    print(text(facts))
    if path is not None:
        plot(facts, path)
        print(f"picture: {path}")
