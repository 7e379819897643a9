"""1x1 convolutions on an H100: both gradients from one kernel or from two, as predicted.

    make results        (python -m fastcnn.benchmarks.predict_backward)

The page benchmarks/results/one-kernel-backward-predicted.md is made here from the shapes of shapes.json and the model
of fastcnn/ops/conv2d_backward_launch.py; a test fails when it differs.
"""

from pathlib import Path

from fastcnn.benchmarks import shapes
from fastcnn.ops.chips import CHIPS
from fastcnn.ops.conv2d_backward_launch import Backward, apart, choose, pays, together

NETWORKS, GPU, BATCH = ("resnet50", "densenet121"), "h100-sxm", 256
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = "one-kernel-backward-predicted.md"


def layers(network):
    """[(layer of shapes.json, Backward)] of the distinct 1x1 convolutions of stride 1, in the fused chain."""
    found = []
    for layer in shapes.read()[network]:
        if layer["op"] != "conv2d" or (*layer["kernel"], *layer["stride"]) != (1, 1, 1, 1):
            continue
        (c, h, w), (k, *_) = layer["input"], layer["output"]
        *_, block, name = layer["name"].split(".")
        x, added = "pending", False
        if network == "densenet121":
            added = name == "conv1"  # to what later layers left in the block's buffer
        elif name == "conv1":
            # a residual join, which the shortcut reads, too; before the first block there is a pool
            x, added = "plain" if layer["name"] == "layer1.0.conv1" else "join", True
        found.append((layer, Backward(BATCH * h * w, c, k, True, x, x == "join", added)))
    return found


def page():
    """The text of the page."""
    chip = CHIPS[GPU]
    head = ["network", "layer", "layers", "input", "channels", "filters", "two kernels MB", "one kernel MB"]
    head += ["tile", "two kernels µs", "one kernel µs", "of it memory µs", "choice"]
    table, words = [head, ["---"] * 2 + ["---:", "---", *["---:"] * 4, "---", *["---:"] * 3, "---"]], []
    for network in NETWORKS:
        two = least = 0.0
        for layer, problem in layers(network):
            tile, separate = choose(problem, chip), apart(problem, chip)
            one = tile and together(problem, tile, chip)
            two += layer["count"] * separate.seconds
            least += layer["count"] * (one.seconds if pays(problem, chip) else separate.seconds)
            cells = [network, layer["name"].removeprefix("features."), str(layer["count"])]
            cells += [problem.x + " + add" * problem.added, str(problem.c), str(problem.k)]
            cells += [f"{separate.bytes / 1e6:.0f}", f"{one.bytes / 1e6:.0f}" if one else "–"]
            cells += [
                "x".join(map(str, tile[:3])) if tile else "none holds the filters",
                f"{separate.seconds * 1e6:.0f}",
            ]
            cells += [f"{one.seconds * 1e6:.0f}", f"{one.memory * 1e6:.0f}"] if one else ["–", "–"]
            table.append([*cells, "one" if pays(problem, chip) else "two"])
        words.append(f"{network}: {two * 1e3:.2f} ms with two kernels for every layer, {least * 1e3:.2f} ms as chosen.")
    return "\n".join(
        [
            f"# Both gradients of a 1x1 convolution from one kernel, on {GPU}: bfloat16, channels_last, batch {BATCH}",
            "",
            "**Not yet measured on a GPU**: every time below is *predicted*.",
            "",
            "Every layer of stride 1 as the fused chain calls it: the gradient of the output takes a correction of "
            "batch norm; the input is plain, a pending activation, or a residual join; `add`: a gradient that came "
            "from another reader is added. Bytes are those of images, with what programs that share the channels read "
            "again. The tile: pixels x channels x filters. Choice: what `conv2d_backward_launch.pays` says; the "
            "constants there say what is assumed. " + " ".join(words),
            "",
            *(f"| {' | '.join(row)} |" for row in table),
            "",
        ]
    )


def main(folder=RESULTS):
    """Write the page into a folder of result files."""
    (folder / PAGE).write_text(page())
    print(f"{folder.parent.name}/{folder.name}/{PAGE}")


if __name__ == "__main__":
    main()
