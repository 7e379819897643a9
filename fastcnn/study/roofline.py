"""The roofline model: how fast a GPU could train a network, from two numbers of the GPU and the bytes of `ledger`.

A kernel takes as long as the slower of its arithmetic and its memory traffic, max(FLOPs / peak, bytes / bandwidth); a
step is the sum of its kernels. "ideal" takes the ceilings as they are; "real" 65% of the arithmetic, 90% of the
bandwidth and a gap of 1.5 us between kernels.

At measured ceilings of an H100 (798 TFLOP/s, 3.0 TB/s, batch 256) this gives, in images per second, ideal:

| network         | eager  | fused  | chain  |
|-----------------|--------|--------|--------|
| ResNet-50       |  5,931 |  7,485 | 11,285 |
| VGG16           |  4,616 |  5,832 |  7,324 |
| MobileNetV2     | 10,900 | 15,883 | 28,702 |
| EfficientNet-B0 |  8,830 | 11,955 | 25,083 |
| DenseNet-121    |  4,645 |  6,132 | 14,148 |

An earlier, independent count of the same ledger agrees within 0.1%, for DenseNet-121's chain within 0.9%: it has
2.1 MB more per image in backward, 165.1 for 163.1, with equal FLOPs. In "real" they agree within 1%, for they count
small kernels differently. Caches are ignored: at small batches, whose tensors fit into L2, kernels can exceed these
ceilings.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from fastcnn.names import check_name
from fastcnn.ops.chips import CHIPS
from fastcnn.study import ledger
from fastcnn.study.trace import trace

REAL = {"arithmetic": 0.65, "bandwidth": 0.90, "gap": 1.5e-6}


@dataclass(frozen=True)
class Roofline:
    """The kernels of a network's training step and the time each takes at least.

    Attributes:
        title: network, image, dtype, batch.
        machine: the GPU and where its ceilings come from.
        batch: images per step.
        tflops, tbs: the ceilings: TFLOP/s of the tensor cores, TB/s.
        core_tflops: TFLOP/s outside of tensor cores.
        kernels: scheme -> list of `ledger.Kernel`, per image.
    """

    title: str
    machine: str
    batch: int
    tflops: float
    tbs: float
    core_tflops: float
    kernels: dict

    def seconds(self, kernel, real=False):
        """Time of one kernel per image."""
        arithmetic, bandwidth = (REAL["arithmetic"], REAL["bandwidth"]) if real else (1, 1)
        peak = (self.tflops if kernel.on_tensor_cores else self.core_tflops) * arithmetic
        gap = REAL["gap"] / self.batch if real else 0
        return max(kernel.flops / peak, kernel.bytes / (self.tbs * bandwidth)) / 1e12 + gap

    def images_per_second(self, scheme, real=False):
        """Of a training step."""
        return 1 / sum(self.seconds(kernel, real) for kernel in self.kernels[scheme])

    def step_ms(self, scheme, real=False):
        """Time of a training step in milliseconds."""
        return 1e3 * self.batch / self.images_per_second(scheme, real)

    def megabytes(self, scheme, phase=None):
        """Per image, of one phase ("forward", "backward", "optimizer") or all."""
        return sum(k.bytes for k in self.kernels[scheme] if phase in (None, k.phase)) / 1e6

    def gflops(self, phase=None):
        """Per image, of convolutions and linear layers; a multiply-add is two."""
        layers = (k for k in self.kernels["eager"] if k.family in ("conv, linear", "depthwise"))
        return sum(k.flops for k in layers if phase in (None, k.phase)) / 1e9

    def layers(self, scheme):
        """Per layer what its kernels need: {name: {phase: (FLOPs, bytes, seconds)}}, per image."""
        found = {}
        for k in self.kernels[scheme]:
            phases = found.setdefault(k.call.name if k.call else "optimizer", {})
            before = phases.get(k.phase, (0, 0, 0))
            phases[k.phase] = tuple(a + b for a, b in zip(before, (k.flops, k.bytes, self.seconds(k)), strict=True))
        return found

    def table(self):
        """Bytes and time by size of the image and by kind of kernel, then the totals; str, ready to print."""
        lines = [
            self.title,
            f"{self.machine}: {self.tflops:,.4g} TFLOP/s, {self.tbs:.4g} TB/s, ridge at {self.ridge():.0f} FLOP/byte",
            "",
            f"{'':16}{'GFLOP':>8}   {'MB per image':^26}   {'us per image':^26}",
            f"{'':16}{'':8}   " + "   ".join("".join(f"{s:>9}" for s in ledger.SCHEMES)[1:] for _ in range(2)),
        ]
        for group in (_resolution, lambda kernel: kernel.family):
            lines += [*self._rows(group), ""]
        lines += [f"{'':24}" + "".join(f"{s:>12}" for s in ledger.SCHEMES)]
        totals = {
            "MB forward": lambda s: _number(self.megabytes(s, "forward")),
            "MB backward": lambda s: _number(self.megabytes(s, "backward")),
            "MB weights, optimizer": lambda s: _number(self.megabytes(s, "optimizer")),
            "kernels": lambda s: f"{len(self.kernels[s]):,}",
            "ms per step, ideal": lambda s: _number(self.step_ms(s)),
            "img/s, ideal": lambda s: f"{self.images_per_second(s):,.0f}",
            "img/s, real": lambda s: f"{self.images_per_second(s, real=True):,.0f}",
        }
        lines += [f"{name:24}" + "".join(f"{text(s):>12}" for s in ledger.SCHEMES) for name, text in totals.items()]
        arithmetic = sum(self._arithmetic(k) for k in self.kernels["eager"])
        lines += [
            f"GFLOP per image: forward {self.gflops('forward'):.3g}, all {self.gflops():.4g}; arithmetic alone would "
            f"allow {1 / arithmetic:,.0f} img/s",
            f"real: {REAL['arithmetic']:.0%} of the arithmetic, {REAL['bandwidth']:.0%} of the bandwidth, "
            f"{REAL['gap'] * 1e6:g} us between kernels",
        ]
        return "\n".join(line.rstrip() for line in lines)

    def ridge(self):
        """FLOPs per byte above which the tensor cores are the limit."""
        return self.tflops / self.tbs

    def _arithmetic(self, kernel):
        return kernel.flops / self.tflops / 1e12 if kernel.on_tensor_cores else 0

    def _rows(self, group):
        sums = defaultdict(lambda: defaultdict(lambda: [0, 0, 0]))
        for scheme in ledger.SCHEMES:
            for k in self.kernels[scheme]:
                cell = sums[group(k)][scheme]
                cell[0] += k.flops if k.family in ("conv, linear", "depthwise") else 0
                cell[1] += k.bytes
                cell[2] += self.seconds(k)
        for name, cells in sorted(sums.items(), key=lambda item: item[0] in ("vectors", "optimizer")):
            flops = f"{_number(cells['eager'][0] / 1e9) if cells['eager'][0] else '':>8}"
            columns = [[_number(cells[s][i] * scale) for s in ledger.SCHEMES] for i, scale in ((1, 1e-6), (2, 1e6))]
            numbers = ["".join(f"{text:>9}" for text in column) for column in columns]
            yield f"{name:16}{flops}   {numbers[0][1:]}   {numbers[1][1:]}"

    def plot(self, path, points=()):
        """Draw the roofline with the eager kernels on it, and the time of a step by scheme.

        Args:
            path: the picture; its suffix says the format.
            points: result rows (benchmarks/README.md) that have a time, to draw where they were measured.

        Returns:
            the path.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 5.5), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
        figure.suptitle(f"{self.title}\n{self.machine}", x=0.01, horizontalalignment="left", fontsize=10)
        self._draw_roof(left, points)
        self._draw_steps(right)
        for axes in (left, right):
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        return path

    def _draw_roof(self, axes, points):
        # kernels alike in family and intensity are one mark; its area is their share of the step
        shares = Counter()
        total = sum(self.seconds(k) for k in self.kernels["eager"])
        for k in self.kernels["eager"]:
            if k.family in _COLOURS and k.flops:
                shares[k.family, float(f"{k.flops / k.bytes:.2g}")] += self.seconds(k) / total
        intensities = [row["flops"] / row["bytes"] for row in points]
        rates = [row["flops"] / row["ms"] / 1e9 for row in points]
        low = min([x for _, x in shares] + intensities) / 2
        high = max([x for _, x in shares] + intensities + [self.ridge()]) * 2
        roof = lambda intensity: min(self.tflops, self.tbs * intensity)
        axes.plot([low, self.ridge(), high], [roof(low), self.tflops, self.tflops], color="black", linewidth=1.2)
        axes.text(high, self.tflops * 1.12, f"{self.tflops:,.4g} TFLOP/s", ha="right", fontsize=9)
        axes.text(6, roof(6) * 1.25, f"{self.tbs:.4g} TB/s", ha="right", fontsize=9)
        bottom = min([roof(low), *rates]) / 1.5
        axes.plot([self.ridge()] * 2, [bottom, self.tflops], color="black", linewidth=0.7, linestyle=":")
        axes.text(self.ridge() * 1.1, bottom * 1.3, f"ridge {self.ridge():.0f}", fontsize=8)
        for family in (f for f in _COLOURS if any(f == key for key, _ in shares)):
            own = {x: share for (key, x), share in shares.items() if key == family}
            axes.scatter(
                *(list(own), [roof(x) for x in own]),
                s=[10 + 4000 * share for share in own.values()],
                color=_COLOURS[family], alpha=0.55, linewidths=0.5, edgecolors="white",
            )  # fmt: skip
            # a mark of one size for the legend
            axes.scatter([], [], s=40, color=_COLOURS[family], alpha=0.7, label=family)
        for provider in dict.fromkeys(row["provider"] for row in points):
            own = [i for i, row in enumerate(points) if row["provider"] == provider]
            xs, ys = [intensities[i] for i in own], [rates[i] for i in own]
            colour, marker = _PROVIDERS.get(provider, ("#555555", "x"))
            axes.scatter(xs, ys, s=18, color=colour, marker=marker, linewidths=0.8, label=f"{provider}, measured")
        axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOP per byte", ylabel="TFLOP/s")
        axes.set_ylim(bottom, max([self.tflops, *rates]) * 1.8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.legend(loc="upper left", frameon=False, fontsize=8)
        axes.set_title("Kernels of eager PyTorch at their limit; area: share of the step", fontsize=9, loc="left")

    def _draw_steps(self, axes):
        families = dict.fromkeys(k.family for s in ledger.SCHEMES for k in self.kernels[s])
        colours = _COLOURS | {"optimizer": "#555555", "other": "#BBBBBB"}
        bottoms = dict.fromkeys(ledger.SCHEMES, 0.0)
        for family in sorted(families, key=list(colours).index):
            own = [
                1e3 * self.batch * sum(self.seconds(k) for k in self.kernels[s] if k.family == family)
                for s in ledger.SCHEMES
            ]
            below = list(bottoms.values())
            axes.bar(ledger.SCHEMES, own, bottom=below, color=colours[family], width=0.65, label=family)
            bottoms = {s: bottoms[s] + ms for s, ms in zip(ledger.SCHEMES, own, strict=True)}
        for s, ms in bottoms.items():
            axes.text(s, ms, f"{self.images_per_second(s):,.0f} img/s", ha="center", va="bottom", fontsize=9)
        axes.set_ylabel("ms per step, ideal")
        axes.set_ylim(0, max(bottoms.values()) * 1.08)
        axes.legend(loc="upper right", frameon=False, fontsize=8, reverse=True)
        axes.set_title(f"A step of {self.batch} images", fontsize=9, loc="left")


_COLOURS = {
    "conv, linear": "#0072B2",
    "depthwise": "#56B4E9",
    "norm": "#E69F00",
    "activation": "#CC79A7",
    "pool": "#009E73",
    "add, cat, mul": "#8C564B",
}
_PROVIDERS = {"fastcnn": ("#D55E00", "o"), "torch": ("#777777", "x"), "torch-nhwc": ("#222222", "+")}


def _number(value):
    """Two decimals, or three digits where that says too little; an empty cell for nothing."""
    return "" if value == 0 else f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def _resolution(kernel):
    if kernel.call is None:
        return "optimizer"
    shape = kernel.call.output_shapes[0]
    return f"{shape[2]} x {shape[3]}" if len(shape) == 4 and math.prod(shape[2:]) > 1 else "vectors"


def roofline(model, input_shape, batch=256, gpu="h100-sxm", dtype=torch.bfloat16, ceilings=None, name=None):
    """The model of bytes and FLOPs of one training step.

    Args:
        model: any module; it is traced, not run.
        input_shape: of one image, [C, H, W].
        batch: images per step; they share the optimizer's traffic and the gaps between kernels.
        gpu: one of CHIPS.
        dtype: of activations: float16, bfloat16, float32 (then with TF32 on tensor cores).
        ceilings: (TFLOP/s, TB/s), measured; replaces the vendor's. gpu then is only a name.
        name: of the network, for titles.

    Raises:
        ValueError: unknown gpu, impossible batch or dtype, or a network that cannot be traced.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be a positive int, got {batch!r}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be torch.float16, torch.bfloat16 or torch.float32, got {dtype}")
    if ceilings is None:
        check_name("gpu", gpu, list(CHIPS))
        known = CHIPS[gpu]
        tflops, tbs = known.tf32 if dtype == torch.float32 else known.tensor_16, known.bandwidth
        machine, cores = f"{gpu} ({known.source})", known.fp32
    else:
        tflops, tbs = ceilings
        if not (tflops > 0 and tbs > 0):
            raise ValueError(f"ceilings must be two positive numbers (TFLOP/s, TB/s), got {ceilings!r}")
        # elementwise arithmetic is never the limit on a GPU: its rate is not measured
        machine, cores = f"{gpu}, measured ceilings", CHIPS[gpu].fp32 if gpu in CHIPS else tflops
    traced = 2  # batch norm needs more than one value
    calls = trace(model, (traced, *input_shape))
    kernels = {s: ledger.kernels(calls, s, traced, dtype.itemsize, batch) for s in ledger.SCHEMES}
    size = "x".join(map(str, input_shape))
    title = f"{name or type(model).__name__}, {size}, {str(dtype).removeprefix('torch.')}, batch {batch}"
    return Roofline(title, machine, batch, tflops, tbs, cores, kernels)


def command(name, batch=256, gpu="h100-sxm", results_folder="benchmarks/results", measured=False, out=None):
    """`fastcnn bench roofline NAME`: print the table, draw the plot, say where it is.

    Args:
        name: a network, as `networks.build` knows it.
        batch: images per step.
        gpu: one of CHIPS; measured=True ignores it.
        results_folder: where result rows lie; those of this network on this GPU are drawn.
        measured: take device, ceilings and dtype of the newest result row.
        out: the picture; default: roofline-NAME.png in the current folder.

    Returns:
        the path of the picture.
    """
    from fastcnn.benchmarks import networks
    from fastcnn.benchmarks.rows import newest, read_rows

    rows = [row for row in newest(read_rows(results_folder)) if row["op"] not in ("model", "optim")]
    options = {"gpu": gpu}
    if measured:
        usable = [row for row in rows if row.get("copy_gbs") and row.get("matmul_tflops")]
        if not usable:
            raise ValueError(f"no result row in {results_folder} has measured ceilings: run `fastcnn bench ops` first")
        last = max(usable, key=lambda row: row["date"])
        options = {
            "gpu": last["device"],
            "dtype": getattr(torch, last["dtype"]),
            "ceilings": (last["matmul_tflops"], last["copy_gbs"] / 1e3),
        }
        rows = [row for row in rows if row["device"] == last["device"] and row["dtype"] == last["dtype"]]
    else:
        check_name("gpu", gpu, list(CHIPS))
        rows = [row for row in rows if CHIPS[gpu].device in row["device"] and row["dtype"] == "bfloat16"]
    plain = name.rpartition(":")[2]
    found = roofline(networks.build(name), networks.input_shape(name), batch, name=plain, **options)
    points = [
        row
        for row in rows
        if row["case"].startswith(f"{plain}.") and row["provider"] in _PROVIDERS and row["ms"] and row["flops"]
    ]
    points = [row for row in points if row["pass"] in ("forward", "backward")]
    print(found.table())
    path = found.plot(out or f"roofline-{plain.replace('/', '-')}.png", points)
    print(f"\n{len(points)} measured points; picture: {path}")
    return path
