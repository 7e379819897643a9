"""Kernels that only move bytes, on an H100: the share of the copy bandwidth that their machine code allows.

    make results        (python -m fastcnn.benchmarks.predict_memory)

The page benchmarks/results/memory-bound-predicted.md is made here from results/aot (what each kernel compiled to) and
KERNELS (what it must move); a test fails when it differs. Three things can keep such a kernel from the bandwidth:

* width: accesses of fewer than 16 bytes per thread need more instructions and more transactions;
* latency: the loads in flight on an SM must cover the time one takes. Every load of one pass through the code is
  counted as in flight, in all warps that fit on the SM;
* issue: an SM starts four instructions of a warp per cycle. All instructions of the code are counted once, and the
  elements that one pass through it stores (reductions: loads). Code before a loop is counted with the loop, so the real
  share is higher.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from fastcnn.ops.chips import CHIPS

GPU, TARGET = "h100-sxm", "90"
LATENCY = 800e-9  # seconds that a load takes on a busy memory system: an assumption
ISSUES = 4  # warp instructions that an SM starts per cycle: one for each of its parts (CUDA programming guide)
WARP = 32
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = "memory-bound-predicted.md"


@dataclass(frozen=True)
class Kernel:
    """A kernel in the case of results/aot that stands for it, and the bytes that it must move per element.

    Attributes:
        op, case, kernel: as in results/aot.
        what: in words, for the page.
        reads, writes: bytes per element, from and to memory; writes of 0: a reduction.
        tail: the code has a second branch for a last, ragged chunk: its narrow accesses are not counted.
        beside: bytes that a thread stores beside the elements: sums.
        loop: instructions for an element in the loop, counted in the machine code, where the code around it is long
            and runs seldom; 0: all the code is counted.
        ahead: steps of that loop that are loaded ahead.
    """

    op: str
    case: str
    kernel: str
    what: str
    reads: float
    writes: float
    tail: bool = False
    beside: int = 0
    loop: float = 0.0
    ahead: int = 1


KERNELS = (
    Kernel("batch_norm", "resnet50 stem nhwc", "batch_norm_statistics_kernel", "forward, statistics", 2, 0),
    Kernel("batch_norm", "resnet50 stem nhwc", "batch_norm_apply_kernel", "forward", 2, 2),
    Kernel("batch_norm", "resnet50 stem nhwc", "batch_norm_backward_reduce_kernel", "backward, sums", 4, 0),
    Kernel("batch_norm", "resnet50 stem nhwc", "batch_norm_backward_apply_kernel", "backward", 4, 2),
    # one bit per element says where the sum was positive
    Kernel("batch_norm", "add, relu", "batch_norm_apply_kernel", "forward, add, ReLU", 4, 2.125),
    Kernel("batch_norm", "add, relu", "batch_norm_backward_reduce_kernel", "backward, sums, ReLU", 4.125, 0),
    Kernel("batch_norm", "add, relu", "batch_norm_backward_apply_kernel", "backward, add, ReLU", 4.125, 4),
    Kernel("group_norm", "resnet50 layer2 nhwc", "group_norm_statistics_kernel", "forward, statistics", 2, 0),
    Kernel("group_norm", "resnet50 layer2 nhwc", "group_norm_apply_kernel", "forward", 2, 2),
    Kernel("group_norm", "resnet50 layer2 nhwc", "group_norm_backward_reduce_kernel", "backward, sums", 4, 0),
    Kernel("group_norm", "resnet50 layer2 nhwc", "group_norm_backward_apply_kernel", "backward", 4, 2),
    Kernel("group_norm", "resnet50 layer4 nhwc", "group_norm_fused_kernel", "forward, one pass", 2, 2),
    Kernel("group_norm", "resnet50 layer4 nhwc", "group_norm_fused_backward_kernel", "backward, one pass", 4, 2),
    Kernel("layer_norm", "convnext-t 384", "layer_norm_kernel", "forward", 2, 2),
    Kernel("layer_norm", "convnext-t 384", "layer_norm_backward_kernel", "backward", 4, 2),
    Kernel(
        "local_response_norm", "largest window nhwc", "local_response_norm_rows_kernel", "forward, 9 channels", 2, 2
    ),
    Kernel(
        *("local_response_norm", "largest window nhwc", "local_response_norm_rows_backward_kernel"),
        *("backward, 9 channels", 4, 2),
    ),
    Kernel("dropout", "vgg16 head", "dropout_kernel", "forward and backward", 2, 2),
    Kernel("dropout", "channels_last", "dropout_quads_kernel", "forward and backward, channels_last", 2, 2),
    Kernel("feature_dropout", "dropout2d nhwc", "channel_dropout_kernel", "forward and backward", 2, 2),
    # per output: four inputs, one byte for the tap
    Kernel("max_pool2d", "resnet50 stem", "max_pool2d_forward_kernel", "forward, 3x3 stride 2", 8, 3),
    Kernel("max_pool2d", "vgg16", "max_pool2d_forward_kernel", "forward, 2x2 stride 2", 8, 3),
    Kernel("max_pool2d", "resnet50 stem", "max_pool2d_backward_cells_kernel", "backward, 3x3 stride 2", 0.75, 2),
    Kernel("max_pool2d", "vgg16", "max_pool2d_backward_cells_kernel", "backward, 2x2 stride 2", 0.75, 2),
    Kernel("max_pool2d", "googlenet 3x3 stride 1", "max_pool2d_backward_cells_kernel", "backward, 3x3 stride 1", 3, 2),
    Kernel("avg_pool2d", "densenet transition", "avg_pool2d_forward_kernel", "forward, 2x2 stride 2", 8, 2),
    Kernel("avg_pool2d", "densenet transition", "avg_pool2d_backward_kernel", "backward, 2x2 stride 2", 0.5, 2),
    Kernel("adaptive_avg_pool2d", "resnet50 global", "global_avg_pool2d_forward_kernel", "forward, global", 2, 0),
    Kernel("adaptive_avg_pool2d", "resnet50 global", "adaptive_avg_pool2d_backward_kernel", "backward, global", 0, 2),
    Kernel("lp_pool2d", "2x2 norm 2", "lp_pool2d_forward_kernel", "forward, 2x2 stride 2", 8, 2),
    Kernel("lp_pool2d", "2x2 norm 2", "lp_pool2d_backward_kernel", "backward, 2x2 stride 2", 3, 2),
    Kernel(
        *("cross_entropy", "imagenet, smoothing, fp32", "cross_entropy_forward_kernel", "forward", 4, 0),
    ),
    Kernel("cross_entropy", "imagenet, smoothing, fp32", "cross_entropy_backward_kernel", "backward", 4, 4),
    Kernel("elementwise_loss", "mse 0.0", "elementwise_loss_forward_kernel", "forward, MSE", 4, 0),
    Kernel("elementwise_loss", "mse 0.0", "elementwise_loss_backward_kernel", "backward, MSE", 4, 2),
    Kernel("elementwise_loss", "bce 0.0", "elementwise_loss_forward_kernel", "forward, BCE with logits", 4, 0),
    Kernel("elementwise_loss", "bce 0.0", "elementwise_loss_backward_kernel", "backward, BCE with logits", 4, 2),
    Kernel("multi_margin_loss", "imagenet", "multi_margin_loss_backward_kernel", "backward", 2, 2),
    # fp32; bytes per parameter
    Kernel("optimizers", "sgd momentum decay", "sgd_kernel", "SGD, momentum", 12, 8, tail=True),
    Kernel("optimizers", "adagrad", "adagrad_kernel", "Adagrad", 12, 8, tail=True),
    Kernel("optimizers", "rmsprop", "rmsprop_kernel", "RMSprop", 12, 8, tail=True),
    Kernel("optimizers", "rmsprop centered momentum", "rmsprop_kernel", "RMSprop, centered", 20, 16, tail=True),
    Kernel("optimizers", "adam", "adam_kernel", "Adam", 16, 12, tail=True),
    Kernel("optimizers", "adam amsgrad amp", "adam_kernel", "AMSGrad, unscales in place", 20, 20, tail=True),
    Kernel("optimizers", "adam ema", "adam_kernel", "Adam and the average of weights", 20, 16, tail=True),
    Kernel("optimizers", "nadam", "adam_kernel", "NAdam", 16, 12, tail=True),
    Kernel("optimizers", "radam", "adam_kernel", "RAdam", 16, 12, tail=True),
    Kernel("optimizers", "lion", "lion_kernel", "Lion", 12, 8, tail=True),
    Kernel("optimizers", "sgd clipped", "square_sums_kernel", "norm of the gradients", 4, 0, tail=True),
)

# these slide filters through registers: 4 bytes per thread, that the filter, open sums and a row of the input fit; the
# code before the loop, which loads the filter, is much of their code and little of their time
SLIDING = (
    *(
        Kernel("depthwise_conv2d", case, "depthwise_conv2d_sliding_kernel", what, reads, 2, beside=beside)
        for case, what, reads, beside in (
            ("mobilenetv2 3x3", "forward, 3x3", 2, 0),
            ("mobilenetv2 3x3 chain", "forward, 3x3, ReLU6 on load, statistics", 2, 16),
            ("mobilenetv2 3x3 stride 2", "forward, 3x3 stride 2", 8, 0),
            ("mobilenetv2 3x3 stride 2 chain", "forward, 3x3 stride 2, ReLU6 on load, statistics", 8, 16),
            ("efficientnet-b0 5x5", "forward, 5x5", 2, 0),
            ("efficientnet-b0 5x5 chain", "forward, 5x5, SiLU on load, statistics", 2, 16),
            ("efficientnet-b0 5x5 stride 2 chain", "forward, 5x5 stride 2, SiLU on load, statistics", 8, 16),
            ("convnext-t 7x7", "forward, 7x7, one channel per thread", 2, 0),
            ("7x7 stride 2 chain", "forward, 7x7 stride 2, ReLU on load, statistics", 8, 8),
        )
    ),
    *(
        Kernel(
            *("depthwise_conv2d_backward", case, "depthwise_conv2d_sliding_backward_kernel"),
            *(f"both gradients, {what}", reads, 2),
            beside=beside,
            loop=loop,
            ahead=ahead,
        )
        for case, what, reads, beside, loop, ahead in (
            ("mobilenetv2 3x3", "3x3, ReLU6, correction on load", 6, 44, 67.5, 2),
            ("mobilenetv2 3x3 stride 2", "3x3 stride 2, ReLU6, correction on load", 3, 44, 29.5, 2),
            ("3x3, all", "3x3, SiLU, gate, correction and sum on load", 8, 48, 104.2, 2),
            ("5x5, all", "5x5, SiLU, sum on load, gradient corrected before", 6, 112, 109.2, 1),
            ("mnasnet 5x5 stride 2", "5x5 stride 2, ReLU, correction on load", 3, 108, 37.9, 1),
            ("7x7, all, fp16", "7x7, SiLU, sum on load, gradient corrected before", 6, 208, 214.5, 1),
        )
    ),
)


def compiled(folder=RESULTS):
    """{(op, case, kernel): the line of results/aot for this GPU, a dict of strings}."""
    found = {}
    for path in sorted((folder / "aot").glob("*.tsv")):
        with path.open(newline="") as file:
            next(file)  # the version of Triton
            for line in csv.DictReader(file, delimiter="\t"):
                op, case = line["case"].split(": ", 1)
                if line["target"] == TARGET:
                    found[op, case, line["kernel"]] = line
    return found


def bytes_of(accesses):
    """Bytes per thread of "4 x128, 2 x16"."""
    return sum(int(n) * int(bits[1:]) // 8 for n, bits in (part.split() for part in accesses.split(", ") if part))


def wide(accesses):
    """Those of 16 bytes: "4 x128" of "4 x128, 2 x16"."""
    return ", ".join(part for part in accesses.split(", ") if part.endswith("x128"))


@dataclass(frozen=True)
class Limits:
    """What the machine code of a kernel allows.

    Attributes:
        in_flight: bytes of loads on one SM at the same time.
        instructions: of a warp, per KiB moved.
        latency, issue: bytes per second that these two allow.
        share: of the copy bandwidth, at most 1.
    """

    in_flight: float
    instructions: float
    latency: float
    issue: float
    share: float


def limits(kernel, line):
    """The Limits of a Kernel from its line of results/aot."""
    chip = CHIPS[GPU]
    loads, stores = (wide(line[name]) if kernel.tail else line[name] for name in ("loads", "stores"))
    loaded, stored = bytes_of(loads), bytes_of(stores) - kernel.beside
    elements = stored / kernel.writes if kernel.writes else loaded / kernel.reads
    moved = elements * (kernel.reads + kernel.writes) * WARP
    in_flight = int(line["resident"]) * WARP * loaded * kernel.ahead
    instructions = (kernel.loop * elements or int(line["instructions"])) / moved
    # what is read more than once comes from the caches: of the loads in flight only this part is from memory
    from_memory = min(1.0, elements * kernel.reads / loaded)
    read_share = kernel.reads / (kernel.reads + kernel.writes)
    latency = chip.sms * in_flight * from_memory / LATENCY / read_share if read_share else math.inf
    issue = chip.sms * ISSUES * chip.hertz / instructions
    share = min(1.0, latency / chip.bytes_per_second, issue / chip.bytes_per_second)
    return Limits(in_flight, instructions * 1024, latency, issue, share)


def page(folder=RESULTS):
    """The text of the page."""
    chip, lines = CHIPS[GPU], compiled(folder)
    head = ["op", "kernel", "pass", "case", "bytes read + written per element", "loads", "stores", "registers"]
    head += [
        "warps per SM",
        "KiB in flight per SM",
        "instructions per KiB",
        "latency allows, TB/s",
        "issue allows, TB/s",
    ]
    head += ["predicted share of the copy bandwidth"]
    table = [head, ["---"] * 4 + ["---:"] * 10]
    for kernel in (*KERNELS, *SLIDING):
        line = lines[kernel.op, kernel.case, kernel.kernel]
        found = limits(kernel, line)
        table.append(
            [kernel.op, f"`{kernel.kernel}`", kernel.what, kernel.case, f"{kernel.reads:g} + {kernel.writes:g}"]
            + [line["loads"], line["stores"], line["registers"], line["resident"], f"{found.in_flight / 1024:.0f}"]
            + [f"{found.instructions:.0f}", f"{found.latency / 1e12:.1f}", f"{found.issue / 1e12:.1f}"]
            + [f"{found.share:.0%}"]
        )
    return "\n".join(
        [
            f"# Kernels that only move bytes, on {GPU}: predicted from their machine code",
            "",
            f"**Not measured on a GPU.** None of these kernels spills: the ahead-of-time check fails on one. The copy "
            f"bandwidth is {chip.bytes_per_second / 1e12:.1f} TB/s, measured on one H100. `latency`: the loads of one "
            f"pass through the code are in flight in every warp, and take {LATENCY * 1e9:.0f} ns, an assumption. "
            f"`issue`: {ISSUES} warp instructions per cycle and SM, every instruction of the code counted once (of "
            "depthwise_conv2d_backward those of the loop alone: the code around it is long and runs seldom). A "
            "share of 100% says that neither is in the way; launches, the last wave and what DRAM makes of the order "
            "of the accesses are not in it. depthwise_conv2d: a third to a sixth of the code stands before the loop, "
            "which runs for every few rows of the image, so the real share is higher. How: "
            "`benchmarks/predict_memory.py`.",
            "",
            *(f"| {' | '.join(row)} |" for row in table),
            "",
        ]
    )


def main(folder=RESULTS):
    """Write the page into a folder of result files."""
    (folder / PAGE).write_text(page(folder))
    print(f"{folder.parent.name}/{folder.name}/{PAGE}")


if __name__ == "__main__":
    main()
