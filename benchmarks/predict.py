"""ResNet-50's convolutions on an H100: what our launches are predicted to take, and beside it what was measured.

    make results        (python -m fastcnn.benchmarks.predict)

The page benchmarks/results/resnet50-convolutions-predicted.md is made here from the shapes of shapes.json, the model of
fastcnn/ops/conv_prediction.py and the result rows of such a GPU, once there are any; a test fails when it differs. And
resnet50-pending-predicted.md: layers that read a pending activation or a residual join, and the two ways to read it.
"""

import math
from pathlib import Path

import torch

from fastcnn import tune
from fastcnn.benchmarks import shapes
from fastcnn.benchmarks.rows import newest, read_rows
from fastcnn.ops import conv2d_join_launch
from fastcnn.ops.chips import CHIPS, SUSTAINED
from fastcnn.ops.conv_prediction import pending_seconds, ranked, roofline
from fastcnn.ops.conv_problem import KINDS

NETWORK, GPU, BATCH, DTYPE = "resnet50", "h100-sxm", 256, torch.bfloat16
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = f"{NETWORK}-convolutions-predicted.md"
PENDING_PAGE = f"{NETWORK}-pending-predicted.md"
PENDING_GPUS = (GPU, "a100-sxm")
# what rows call the passes
PASSES = dict(zip(KINDS, ("forward", "grad_input", "grad_weight"), strict=True))
NOT_MEASURED = "**Not yet measured on a GPU**: every launch below carries the mark *predicted*."


def layers():
    """[(layer of shapes.json, {kind: Problem})] of every distinct convolution of the network."""
    found = []
    for layer in shapes.read()[NETWORK]:
        if layer["op"] != "conv2d":
            continue
        (c, *_), (k, *_) = layer["input"], layer["output"]
        geometry = *(tuple(layer[name]) for name in ("stride", "padding", "dilation")), layer["groups"]
        sizes = (BATCH, *layer["input"]), (k, c // layer["groups"], *layer["kernel"]), (BATCH, *layer["output"])
        tasks = tune.tasks([tune.Layer(*sizes, *geometry, "conv", KINDS)], DTYPE, "channels_last")
        found.append((layer, {task.problem.kind: task.problem for task in tasks}))
    return found


def measured(rows):
    """{(case, pass): (microseconds of fastcnn, of cuDNN or None)} of one run each, on this GPU, dtype and batch."""
    wanted = ("conv2d", str(DTYPE).removeprefix("torch."), "channels_last", BATCH, "ok", False)
    fields = ("op", "dtype", "layout", "batch", "status", "graph")
    rows = [row for row in rows if CHIPS[GPU].device in row["device"] and tuple(map(row.get, fields)) == wanted]
    cudnn = {(row["case"], row["pass"], row["run"]): row["ms"] * 1e3 for row in rows if row["provider"] == "torch-nhwc"}
    return {
        (row["case"], row["pass"]): (row["ms"] * 1e3, cudnn.get((row["case"], row["pass"], row["run"])))
        for row in newest(rows)
        if row["provider"] == "fastcnn"
    }


def page(rows):
    """The text of the page.

    Args:
        rows: of the result files, as `read_rows` gives them.
    """
    chip, times = CHIPS[GPU], measured(rows)
    lines, ratios, step = [], [], 0.0
    for layer, problems in layers():
        for kind, problem in problems.items():
            prediction, launch = ranked(problem, chip)[0]
            asked = layer["input_grad"] or kind != "backward_input"
            step += prediction.seconds * layer["count"] * asked
            case = f"{NETWORK}.{layer['name']}", PASSES[kind]
            own, cudnn = times.get(case, (None, None))
            if cudnn:
                ratios.append(cudnn / own)
            numbers = (prediction.seconds * 1e6, roofline(problem, chip) * 1e6, own, cudnn)
            shape = str(problem).removeprefix(f"{kind} ").split(f", {problem.arithmetic}")[0]
            cells = [shape, str(layer["count"]), PASSES[kind], f"{launch}", f"{prediction.waves:.2f}", prediction.limit]
            lines.append(cells + ["–" if number is None else f"{number:.0f}" for number in numbers])
            lines[-1].append(f"{cudnn / own:.2f}×" if cudnn else "–")
    head = ["shape", "layers", "pass", "fastcnn's launch", "waves", "limit", "predicted µs", "roofline µs"]
    head += ["measured µs", "cuDNN µs", "cuDNN / fastcnn"]
    table = [head, ["---"] * 6 + ["---:"] * 5, *lines]
    words = NOT_MEASURED
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        words = (
            f"Measured: {len(ratios)} of {len(lines)} passes, geometric mean of cuDNN / fastcnn {mean:.2f}×, lowest "
            f"{min(ratios):.2f}×. The rest is *predicted*."
        )
    return "\n".join(
        [
            f"# {NETWORK}'s convolutions on {GPU}, bfloat16, channels_last, batch {BATCH}",
            "",
            words,
            "",
            "The launch is the one that is taken without tuning. The prediction is of "
            f"`fastcnn/ops/conv_prediction.py`: waves of tiles over {chip.sms} SMs, steps as long as the slowest of "
            "tensor cores, shared memory, L2 and latency, at least the time of the bytes of every tensor once; `limit` "
            "says which it was. The constants there say what is assumed. Roofline: "
            f"{chip.tensor_16 * SUSTAINED['arithmetic']:.0f} TFLOP/s and {chip.bytes_per_second / 1e12:.1f} TB/s, both "
            "measured on one H100; products with the zeros of the padding are not counted. cuDNN: PyTorch in "
            "channels_last with benchmark=True. Training asks for no grad_input of the first layer.",
            "",
            f"All convolutions of a training step, predicted: {step * 1e3:.1f} ms.",
            "",
            *(f"| {' | '.join(row)} |" for row in table),
            "",
        ]
    )


def joins():
    """[(name, layers, conv2d_join_launch.Joined)] of the distinct convolutions that are the first to read a join."""
    found = []
    for layer, problems in layers():
        # of every block but the first: before that one there is a pool
        if layer["name"].endswith("conv1") and layer["name"] not in ("conv1", "layer1.0.conv1"):
            p = problems["forward"]
            found.append((layer["name"], layer["count"], conv2d_join_launch.Joined(p.n * p.h * p.w, p.c, p.k)))
    return found


def _table_of_joins():
    head, ends = ["layer", "layers", "channels", "filters", "apart MB", "in one MB"], ["---", *["---:"] * 5]
    for gpu in PENDING_GPUS:
        head += [f"{gpu}: tile", "apart µs", "in one µs", "of it memory µs", "choice"]
        ends += ["---", "---:", "---:", "---:", "---"]
    table = [head, ends]
    for name, count, problem in joins():
        cells = [name, str(count), str(problem.c), str(problem.k)]
        cells += [f"{size / 1e6:.0f}" for size in (problem.bytes_apart, problem.bytes_together(1))]
        for gpu in PENDING_GPUS:
            tile = conv2d_join_launch.choose(problem, CHIPS[gpu])
            apart = conv2d_join_launch.apart(problem, CHIPS[gpu])
            one = conv2d_join_launch.together(problem, tile, CHIPS[gpu])
            times = apart.seconds, one.seconds, one.memory
            cells += ["x".join(map(str, tile[:3])), *(f"{seconds * 1e6:.0f}" for seconds in times)]
            cells.append("in one" if conv2d_join_launch.pays(problem, CHIPS[gpu]) else "apart")
        table.append(cells)
    return table


def pending_page():
    """The text of the page about pending activations and joins."""
    head, ends = ["shape", "layers"], ["---", "---:"]
    for gpu in PENDING_GPUS:
        head += [f"{gpu}: on load µs", "written µs", "choice"]
        ends += ["---:", "---:", "---"]
    table = [head, ends]
    for layer, problems in layers():
        problem = problems["forward"]
        if not layer["input_grad"]:  # reads the image
            continue
        cells = [str(problem).removeprefix("forward ").split(f", {problem.arithmetic}")[0], str(layer["count"])]
        for gpu in PENDING_GPUS:
            on_load, written = pending_seconds(problem, CHIPS[gpu])
            cells += [f"{on_load * 1e6:.0f}", f"{written * 1e6:.0f}", "written" if written < on_load else "on load"]
        table.append(cells)
    return "\n".join(
        [
            f"# {NETWORK}'s pending activations, on load or written once: bfloat16, channels_last, batch {BATCH}",
            "",
            "**Not yet measured on a GPU**: every time below is *predicted*.",
            "",
            "Forward and gradient of the weight of a convolution whose input is relu(x * scale + shift), together. On "
            "load: both kernels transform what they load, once for every tap and tile of columns. Written: a pass over "
            "memory writes z before forward and, since z is not kept, once more in backward. The choice is what "
            "`conv_launch.should_materialize` says; every layer but the first is listed as if its input were pending.",
            "",
            *(f"| {' | '.join(row)} |" for row in table),
            "",
            "## Residual joins, by a pass or in the convolution that reads them first",
            "",
            "Apart: a pass over memory reads both sides and writes the join, which the 1x1 convolution reads. In one: "
            "the convolution's kernel makes the join and writes it. Bytes are those of images. The tile: pixels x "
            "filters x channels of a step; where it does not hold all filters, programs read both sides again, which "
            "the times count and the bytes do not. The choice is what `conv2d_join_launch.pays` says.",
            "",
            *(f"| {' | '.join(row)} |" for row in _table_of_joins()),
            "",
        ]
    )


def main(folder=RESULTS):
    """Write the pages into a folder of result files."""
    for name, text in ((PAGE, page(read_rows(folder))), (PENDING_PAGE, pending_page())):
        (folder / name).write_text(text)
        print(f"{folder.parent.name}/{folder.name}/{name}")


if __name__ == "__main__":
    main()
