"""The bytes that the fused chain moves: what it launches (study.launches) beside what the ledger says it should.

    make results        (python -m fastcnn.benchmarks.predict_chain)

The page benchmarks/results/chain-bytes.md is made here: one training step of each network, converted by
`fastcnn.convert`, with 16-bit weights as the optimizer writes them, on images of 224 x 224. A test fails when the page
differs, or when ResNet-50 moves more than 5% beyond the ledger's chain.
"""

from pathlib import Path

import torch
from torch import nn

import fastcnn
from fastcnn.benchmarks import networks
from fastcnn.ops.chips import CHIPS
from fastcnn.study import launches, ledger
from fastcnn.study.trace import trace

NETWORKS = ("resnet50", "densenet121", "vgg16_bn", "mobilenet_v2", "efficientnet_b0")
BATCH = 256
GPU = "h100-sxm"
GAP = 1.5e-6  # seconds between two launches of a CUDA graph: an assumption
CAPABILITY = 90
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = "chain-bytes.md"
LISTED = 0.002  # of a pass's bytes: what moves less is added up


def counted(name, batch=BATCH):
    """(forward, backward) lists of launches.Launch of one training step."""
    shape = (batch, *networks.input_shape(name))
    with torch.device("meta"):
        model = networks.build(f"torchvision:{name}").to(memory_format=torch.channels_last).bfloat16()
        images = torch.empty(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        labels = torch.empty(batch, dtype=torch.int64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    with launches.recorded(CAPABILITY) as made:
        fastcnn.convert(model)
        for _ in range(2):  # tables of taps go to the GPU in the first step alone
            model.zero_grad()
            del made[:]
            loss = fastcnn.functional.cross_entropy(model(images), labels)
            end = len(made)
            loss.backward()
    return made[:end], made[end:]


def expected(name, scheme="chain", batch=BATCH):
    """Megabytes per image that the ledger counts: (forward, backward), without the optimizer."""
    calls = trace(networks.build(f"torchvision:{name}"), (2, *networks.input_shape(name)))
    kernels = ledger.kernels(calls, scheme, 2, 2, batch)
    return tuple(sum(k.bytes for k in kernels if k.phase == phase) / 1e6 for phase in ("forward", "backward"))


def page():
    """The text of the page."""
    rows, details = [], []
    for name in NETWORKS:
        passes = counted(name)
        moved = [sum(launch.bytes for launch in made) / BATCH / 1e6 for made in passes]
        columns = [expected(name, scheme) for scheme in ledger.SCHEMES]
        totals = [f"{sum(column):.0f}" for column in columns]
        cells = [*totals, f"{moved[0]:.0f} / {moved[1]:.0f} / **{sum(moved):.0f}**"]
        count = sum(map(len, passes))
        ceiling = BATCH / (sum(moved) * BATCH * 1e6 / CHIPS[GPU].bytes_per_second + count * GAP)
        rows.append([name, *cells, f"{sum(moved) / sum(columns[-1]):.3f}", str(count), f"{ceiling:,.0f}"])
        details += ["", f"## {name}", ""]
        details += ["| kernel or op | forward: launches | MB per image | backward: launches | MB per image |"]
        details += ["|---|---:|---:|---:|---:|", *_kernels(passes)]
    head = ["network", "eager", "fused", "chain", "implemented: forward / backward / total", "of the ledger's chain"]
    return "\n".join(
        [
            f"# What the fused chain moves: MB per image of a training step, bf16, batch {BATCH}",
            "",
            "Counted, not timed: every tensor that a launch takes, once and at its full size, with partial sums and",
            "slabs; on the left the ledger's three schemes (`fastcnn/study/ledger.py`). Neither has the optimizer's",
            f"traffic. The launches are those for a GPU of compute capability {CAPABILITY / 10:g}, without tuning. Ops",
            "that are registered with PyTorch (pools, the loss) count as one launch. The last column is not measured",
            "and no promise: images per second if nothing but these bytes took time, at the copy bandwidth of an H100",
            f"({CHIPS[GPU].bytes_per_second / 1e12:.1f} TB/s) with {GAP * 1e6:g} us per launch.",
            "",
            f"| {' | '.join([*head, 'launches', 'ceiling, images/s'])} |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            *(f"| {' | '.join(row)} |" for row in rows),
            *details,
            "",
        ]
    )


def _kernels(passes):
    tables = [launches.megabytes(made, BATCH) for made in passes]
    least = [LISTED * sum(megabytes for _, megabytes in table.values()) for table in tables]
    names = {name: None for table in tables for name in table}
    named = [n for n in names if any(t.get(n, (0, 0))[1] >= low for t, low in zip(tables, least, strict=True))]
    cells = lambda found: [f"{found[0]:d} | {found[1]:.2f}" if found[0] else " | " for found in [found]][0]
    lines = [f"| {name} | {' | '.join(cells(table.get(name, (0, 0))) for table in tables)} |" for name in named]
    rest = [[table[name] for name in table if name not in named] for table in tables]
    sums = [(sum(count for count, _ in part), sum(megabytes for _, megabytes in part)) for part in rest]
    return [*lines, f"| others | {' | '.join(map(cells, sums))} |"]


def main(folder=RESULTS):
    """Write the page into a folder of result files."""
    (folder / PAGE).write_text(page())
    print(f"{folder.parent.name}/{folder.name}/{PAGE}")


if __name__ == "__main__":
    main()
