"""The table of tests/world.py: what fastcnn.convert makes of torchvision's and timm's networks.

    python tests/world_table.py [NAME ...]      measures what the table lacks (or the names); writes table and page

The table is benchmarks/results/convert-world.tsv, the page convert-world.md beside it.
"""

import collections
import csv
import dataclasses
import gc
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from world import KERNELS_PARAMETERS, MODELS, check, check_kernels

from fastcnn.study.trace import trace

TABLE = Path(__file__).parents[1] / "benchmarks" / "results" / "convert-world.tsv"
PAGE = TABLE.with_suffix(".md")
OPS = {
    "convolution": ("conv2d", "conv1d", "conv_transpose2d"),
    "norm": ("batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm"),
    "activation": (
        "relu", "relu6", "leaky_relu", "silu", "gelu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh",
        "mish", "softplus", "elu", "selu", "celu", "prelu",
    ),
    "other": ("linear", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
}  # fmt: skip
INTRODUCTION = """
Networks of torchvision and timm with random weights, each converted and compared with what it was, in fp64 on PyTorch's
functions: outputs, every gradient and the statistics of a step of training, the random numbers it draws, the outputs of
an evaluation, and its classes after `fastcnn.revert`. `difference` is the largest one of any tensor by the tensor's
largest value. `kernels`: networks of up to 1.5 million parameters are compared again on our CPU kernels, in fp64 and
fp32. Layers are convolutions, norms and activations: fused into chains, swapped for ours one by one, or kept. MACs and
bytes: the percentage of the multiply-adds, and of the bytes that layers write in a forward pass, that our kernels then
compute. Measured by `python tests/world_table.py`; tested by `make test-nightly ARGS=tests/test_world.py`.
"""
MOVES = ("permute", "transpose", "reshape", "view", "flatten", "unsqueeze", "expand", "getitem", "type", "to", "float")


def _is_layer(module):
    if "Norm" in type(module).__name__ and not any(list(child.parameters()) for child in module.children()):
        return True
    if list(module.children()) or type(module) is nn.Identity:
        return False
    from_activations = type(module).__module__.endswith(("activation", "activations"))
    return from_activations or any(p.dim() == 4 for p in module.parameters(recurse=False))


def counts(stock, report):
    """How many convolutions, norms and activations were fused, swapped and kept, and why most of the last were."""
    rows = {row.name: row for row in report.rows}
    done, reasons = collections.Counter(), collections.Counter()
    modules = dict(stock.named_modules())
    for name, module in modules.items():
        # timm's norms have their activation inside
        if not _is_layer(module) or (name and _is_layer(modules[name.rpartition(".")[0]])):
            continue
        row = rows.get(name)
        done["kept" if row is None else row.done] += 1
        if row is None or row.done == "kept":
            reasons[f"no kernel for {type(module).__name__}" if row is None else row.note] += 1
    why = reasons.most_common(1)[0][0] if reasons else ""
    return done["fused"], done["swapped"], done["kept"], why


def shares(stock, report, functions, px):
    """The parts of the multiply-adds, and of the bytes that layers write, that are computed by our kernels, in percent.

    Layers are those of OPS, also where a forward calls them as functions, and every step of a kept layer that is made
    of other functions. Elsewhere sums, products, concatenations, pools and what only moves data are on neither side.
    """
    ours = {row.name for row in report.rows if row.done in ("fused", "swapped")}
    modules = dict(stock.named_modules())
    # timm's norms have their activation inside
    ours |= {f"{name}.act" for name in ours if "Norm" in type(modules[name]).__name__}
    total, share = collections.Counter(), collections.Counter()
    for call in trace(stock, torch.empty(2, 3, px, px, dtype=torch.float64, device="meta")):
        if "pool" in call.op and call.name not in modules:
            continue
        place = call.name if call.name in modules else call.name.rpartition(".")[0]
        fused = (done and name.startswith(f"{place}.{call.op}".lstrip(".")) for name, done in functions.items())
        mine = place in ours or (call.op in OPS["activation"] and any(fused))
        elements = sum(math.prod(shape) for shape in call.output_shapes)
        found = {"macs": elements * _multiplications(call)}
        kept = place in modules and _is_layer(modules[place]) and not mine and call.op not in MOVES
        if kept or any(call.op in ops for ops in OPS.values()):
            found["bytes"] = elements
        for key, value in found.items():
            total[key] += value
            share[key] += value * mine
    return [100 * share[key] / total[key] if total[key] else 0.0 for key in ("macs", "bytes")]


def _multiplications(call):
    # of one element of the output
    if call.op in ("conv1d", "conv2d"):
        return math.prod(call.attrs["kernel"]) * call.input_shapes[0][1] // call.attrs["groups"]
    if call.op in ("linear", "matmul", "bmm"):
        return call.input_shapes[0][-1]
    if call.op == "scaled_dot_product_attention":
        return call.input_shapes[0][-1] + call.input_shapes[1][-2]
    return 0


@dataclass(frozen=True)
class Result:
    """One line of the table; every field is a string."""

    model: str
    source: str
    family: str
    parameters: str
    px: str
    fused: str
    swapped: str
    kept: str
    kept_because: str
    macs: str
    bytes: str
    agrees: str
    difference: str
    kernels: str
    seconds: str


FIELDS = [field.name for field in dataclasses.fields(Result)]


def measure(model):
    """The line of one network; "agrees" has the reason if it does not."""
    start = time.perf_counter()
    parameters = fused = swapped = kept = because = macs = of_bytes = off = kernels = ""
    try:
        stock, report, functions, worst = check(model)
        parameters = sum(p.numel() for p in stock.parameters())
        fused, swapped, kept, because = counts(stock, report)
        macs, of_bytes = (f"{share:.1f}" for share in shares(stock, report, functions, model.px))
        agrees, off = "yes", f"{worst:.0e}"
        if not fused and not swapped:
            agrees = f"left alone: {because}"
        del stock
        if parameters <= KERNELS_PARAMETERS:
            check_kernels(model)
            kernels = "yes"
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        if off:
            kernels = f"no: {message}"
        else:
            agrees = f"no: {type(error).__name__}: {message}"
    seconds = f"{time.perf_counter() - start:.0f}"
    values = (model.source, model.family, parameters, model.px, fused, swapped, kept, because, macs, of_bytes, agrees)
    return Result(model.name, *map(str, values), off, kernels, seconds)


def read():
    """{id: Result} of the table, in the order of MODELS."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        found = {f"{row['source']}:{row['model']}": Result(**row) for row in csv.DictReader(file, delimiter="\t")}
    return {name: found[name] for name in MODELS if name in found}


def write(results):
    """Table and page."""
    ordered = [results[name] for name in MODELS if name in results]
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows(dataclasses.astuple(result) for result in ordered)
    PAGE.write_text(page(ordered))


def page(results):
    """The table as a page, with its totals."""
    lines = [
        "# fastcnn.convert against the world",
        "",
        " ".join(INTRODUCTION.split()),
        "",
        "| | models | agree | median MACs | median bytes | all layers on our kernels |",
        "|---|---|---|---|---|---|",
    ]
    for source in ("torchvision", "timm"):
        rows = [row for row in results if row.source == source]
        agreeing = [row for row in rows if row.agrees == "yes"]
        if agreeing:
            macs, of_bytes = (statistics.median(float(getattr(r, key)) for r in agreeing) for key in ("macs", "bytes"))
            whole = sum(row.kept == "0" for row in agreeing)
            lines.append(f"| {source} | {len(rows)} | {len(agreeing)} | {macs:.1f}% | {of_bytes:.1f}% | {whole} |")
    head = ("model", "family", "parameters", "px", "fused", "swapped", "kept", "most of these because", "MACs", "bytes")
    head += ("agrees", "difference", "kernels")
    lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in results:
        millions = f"{int(row.parameters) / 1e6:.1f} M" if row.parameters else ""
        cells = [f"{row.source}:{row.model}", row.family, millions, row.px, row.fused, row.swapped, row.kept]
        cells += [row.kept_because, row.macs, row.bytes, row.agrees, row.difference, row.kernels]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(names):
    torch.set_num_threads(1)
    for name in names or [name for name in MODELS if name not in read()]:
        result = measure(MODELS[name])
        gc.collect()
        write(read() | {name: result})
        print(*dataclasses.astuple(result), sep="\t", flush=True)
    write(read())


if __name__ == "__main__":
    main(sys.argv[1:])
