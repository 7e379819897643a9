"""`fastcnn tune`: measure the launches of a network's convolutions on this GPU and keep the best for later processes.

Every distinct pass of every convolution (and linear layer, which runs on the same kernels) is run with the launches
that are predicted fastest, and with cuDNN beside them, in one measurement. A launch whose result is not right by the
rule of testing.py is reported and never chosen. Choices go to the user's cache (ops/launch_cache.py), where
`conv_launch.choose` finds them.
"""

import contextlib
import dataclasses
import math
import sys

import torch

from fastcnn.names import check_name
from fastcnn.ops import chips, conv2d, conv2d_vendor, conv_launch, conv_layout, launch_cache
from fastcnn.ops.conv_launch import CUDNN
from fastcnn.ops.conv_prediction import predict, ranked, roofline
from fastcnn.ops.conv_problem import KINDS, Launch, Problem
from fastcnn.ops.launch_cache import Tuned
from fastcnn.study.trace import trace
from fastcnn.testing import assert_close_to_truth

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
CANDIDATES = 6  # per problem, unless all are asked for
REPETITIONS = 20


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution: shapes [N, C, H, W], [K, C / groups, R, S], [N, K, P, Q] of its input side, weight, output side.

    Attributes:
        padding: (top, left).
        switch: which of torch's switches says whether it may use TF32: "conv" or "matmul".
        kinds: the passes that training runs, of KINDS.
    """

    image: tuple
    weight: tuple
    output: tuple
    stride: tuple
    padding: tuple
    dilation: tuple
    groups: int
    switch: str
    kinds: tuple

    @property
    def geometry(self):
        """As the host functions take it."""
        return self.stride, self.padding, self.dilation, self.groups


@dataclasses.dataclass(frozen=True)
class Task:
    """One pass of a layer to be tuned."""

    problem: Problem
    layer: Layer
    dtype: torch.dtype
    layout: str


@dataclasses.dataclass
class Trial:
    """One launch of a task: seconds is None where it could not run or was wrong, and `reason` says so."""

    launch: Launch
    predicted: float
    seconds: float | None = None
    reason: str | None = None
    wrong: bool = False


def layers(calls):
    """The distinct Layers among the calls of a trace, in order."""
    found = {}
    for call in calls:
        layer = _LAYERS[call.op](call) if call.op in _LAYERS else None
        if layer is not None:
            found[layer] = None
    return list(found)


def _kinds(call, forward, grad_input):
    # nobody asks for the gradient of the image, value 0 of a trace
    return tuple(
        kind for kind in KINDS if kind in (forward, "backward_weight") or (kind == grad_input and call.inputs[0])
    )


def _conv2d(call):
    (n, c, *size), output, attrs = call.input_shapes[0], call.output_shapes[0], call.attrs
    weight = (output[1], c // attrs["groups"], *attrs["kernel"])
    padding = attrs["padding"]
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(attrs["dilation"], attrs["kernel"], strict=True))
    geometry = attrs["stride"], padding, attrs["dilation"], attrs["groups"]
    return Layer((n, c, *size), weight, output, *geometry, "conv", _kinds(call, "forward", "backward_input"))


def _conv_transpose2d(call):
    # the convolution whose input gradient it is
    image, output, attrs = call.output_shapes[0], call.input_shapes[0], call.attrs
    weight = (output[1], image[1] // attrs["groups"], *attrs["kernel"])
    geometry = attrs["stride"], attrs["padding"], attrs["dilation"], attrs["groups"]
    return Layer(image, weight, output, *geometry, "conv", _kinds(call, "backward_input", "forward"))


def _linear(call):
    *rows, features = call.input_shapes[0]
    image, outputs = (math.prod(rows), features, 1, 1), call.output_shapes[0][-1]
    geometry = (1, 1), (0, 0), (1, 1), 1
    kinds = _kinds(call, "forward", "backward_input")
    return Layer(image, (outputs, features, 1, 1), (image[0], outputs, 1, 1), *geometry, "matmul", kinds)


_LAYERS = {"conv2d": _conv2d, "conv_transpose2d": _conv_transpose2d, "linear": _linear}


def _tensors(layer, dtype, layout, device):
    """(image, weight, output side) of a layer, random where the device has memory."""
    found = []
    # outputs and gradients of order 1
    scales = 1.0, 1 / math.sqrt(math.prod(layer.weight[1:])), 1.0
    for i, (shape, scale) in enumerate(zip((layer.image, layer.weight, layer.output), scales, strict=True)):
        if device.type == "meta":
            tensor = torch.empty(shape, dtype=dtype, device=device)
        else:
            generator = torch.Generator(device).manual_seed(i)
            tensor = (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)
        found.append(tensor.contiguous(memory_format=LAYOUTS[layout]))
    return found


def tasks(layers, dtype, layout):
    """One Task for each distinct problem of the layers."""
    found = {}
    for layer in layers:
        image, weight, output = _tensors(layer, dtype, layout, torch.device("meta"))
        for kind in layer.kinds:
            precision = conv2d.precision_of(image, layer.switch)
            problem = conv2d.problem_of(kind, image, weight, output, layer.geometry, precision)
            found.setdefault(problem, Task(problem, layer, dtype, layout))
    return list(found.values())


def run(task, tensors):
    """The task's result by the host functions, with the launch that is forced around the call."""
    layer, (image, weight, output) = task.layer, tensors
    channels_last = task.layout == "channels_last"
    if task.problem.kind == "forward":
        size = layer.output[2:]
        return conv2d.conv2d_forward(image, weight, None, size, *layer.geometry, channels_last, layer.switch, "auto")
    if task.problem.kind == "backward_input":
        size = layer.image[2:]
        return conv2d.conv2d_backward_input(
            output, weight, None, size, *layer.geometry, channels_last, layer.switch, "auto"
        )
    return conv2d.conv2d_backward_weight(output, image, weight, *layer.geometry, layer.switch, "auto")


def _reference(task, tensors):
    """The same by PyTorch, in the dtype of the tensors."""
    image, weight, output = tensors
    function = lambda image, weight: conv_layout.padded_reference(
        image, weight, None, task.layer.output[2:], *task.layer.geometry
    )
    if task.problem.kind == "forward":
        return function(image, weight)
    wanted = (image if task.problem.kind == "backward_input" else weight).detach().requires_grad_()
    arguments = (wanted, weight) if task.problem.kind == "backward_input" else (image, wanted)
    with torch.enable_grad():
        return torch.autograd.grad(function(*arguments), wanted, output)[0]


@contextlib.contextmanager
def _exact():
    """Inside the block PyTorch computes fp32 as fp32."""
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def _truth(task, tensors):
    # one precision up
    higher = torch.float64 if task.dtype == torch.float32 else torch.float32
    with _exact():
        return _reference(task, [t.to(higher) for t in tensors]).double()


def shortlist(problem, chip, count=CANDIDATES):
    """[(Prediction, Launch)] to be measured: the fastest predicted, each tile once, and the best of every family.

    Args:
        count: how many; None for all candidates.
    """
    found = ranked(problem, chip)
    if count is None:
        return found
    tiles, families = {}, {}
    for prediction, launch in found:
        tiles.setdefault(dataclasses.replace(launch, splits=1), (prediction, launch))
        families.setdefault(launch.family, (prediction, launch))
    chosen = list(tiles.values())[:count]
    return chosen + [pair for pair in families.values() if pair not in chosen]


def tune_task(task, device, count=CANDIDATES):
    """Gate and measure the launches of a task.

    Returns:
        ([Trial], seconds of cuDNN or None where it cannot run the problem).
    """
    tensors = _tensors(task.layer, task.dtype, task.layout, device)
    trials = [Trial(launch, p.seconds) for p, launch in shortlist(task.problem, chips.chip(device), count)]
    yardstick, truth = _reference(task, tensors), _truth(task, tensors)

    def with_launch(launch):
        with conv_launch.use(launch, task.problem.kind):
            return run(task, tensors)

    for trial in trials:
        try:
            assert_close_to_truth(str(trial.launch), with_launch(trial.launch), yardstick, truth, task.dtype)
        except AssertionError as error:
            trial.reason, trial.wrong = str(error), True
        except Exception as error:
            # whatever goes wrong inside a launch is its failure and not the run's
            trial.reason = " ".join(f"{type(error).__name__}: {error}".split())
    del yardstick, truth
    right = [trial for trial in trials if trial.reason is None]
    launches = [trial.launch for trial in right] + ([CUDNN] if conv2d_vendor.can(task.problem) else [])
    calls = [lambda launch=launch: with_launch(launch) for launch in launches]
    times = conv_launch.measure(calls, REPETITIONS) if calls else []
    for trial, seconds in zip(right, times, strict=False):
        trial.seconds = seconds
    return trials, times[-1] if launches and launches[-1] == CUDNN else None


def best_of(trials, cudnn_seconds):
    """The Tuned that is kept, and its Trial; (None, None) if no launch was right."""
    measured = [trial for trial in trials if trial.seconds is not None]
    if not measured:
        return None, None
    best = min(measured, key=lambda trial: trial.seconds)
    return Tuned(best.launch, best.seconds, cudnn_seconds), best


def command(
    model,
    batch=256,
    image_size=None,
    dtype="bf16",
    layout="channels_last",
    everything=False,
    dry_run=False,
    gpu="h100-sxm",
):
    """`fastcnn tune MODEL`: measure, keep, print.

    Args:
        model: a classifier, as `networks.build` of the benchmarks knows it.
        batch: images.
        image_size: height and width; default: what the benchmarks use.
        dtype: "bf16", "fp16" or "fp32".
        layout: "channels_last" or "contiguous", of images and weights.
        everything: measure every candidate and not only the predicted best.
        dry_run: print predictions for `gpu`, which need no GPU, and measure nothing.
        gpu: of a dry run: a name of chips.CHIPS.

    Returns:
        exit code: 1 if a launch gave a wrong result.

    Raises:
        ValueError: an argument is not one of those; there is no GPU whose kernels could be measured.
    """
    from fastcnn.benchmarks import networks

    check_name("dtype", dtype, list(DTYPES))
    check_name("layout", layout, list(LAYOUTS))
    if batch < 1 or (image_size is not None and image_size < 1):
        raise ValueError(f"batch and image-size must be at least 1, got {batch} and {image_size}")
    device = None
    if dry_run:
        check_name("gpu", gpu, list(chips.CHIPS))
    else:
        device = _device()
    channels, *size = networks.input_shape(model)
    size = size if image_size is None else (image_size, image_size)
    network = networks.build(model)
    found = tasks(layers(trace(network, (batch, channels, *size))), DTYPES[dtype], layout)
    title = f"{model}, {channels}x{size[0]}x{size[1]}, {dtype}, {layout}, batch {batch}: {len(found)} passes"
    if dry_run:
        print(f"{title}, predicted for {gpu}")
        print(_text(_predictions(found, chips.CHIPS[gpu])))
        return 0
    name = torch.cuda.get_device_name(device)
    print(f"{title} on {name}")
    return _measure_all(found, device, name, None if everything else CANDIDATES)


def _device():
    from fastcnn.backends import gpu_refusal

    hint = "; --dry-run prints predictions without one"
    if not torch.cuda.is_available():
        raise ValueError(f"tuning measures kernels on an NVIDIA GPU, and this machine has none{hint}")
    device = torch.device("cuda", torch.cuda.current_device())
    refusal = gpu_refusal(device)
    if refusal is not None:
        raise ValueError(f"tuning measures kernels on a GPU: {refusal}{hint}")
    return device


def _measure_all(tasks, device, gpu, count):
    from tqdm import tqdm

    rows, wrong = [], []
    path, benchmark = launch_cache.path_for(gpu), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # cuDNN at its best
    try:
        for task in tqdm(tasks, unit="pass", disable=not sys.stderr.isatty()):
            trials, cudnn_seconds = tune_task(task, device, count)
            tuned, best = best_of(trials, cudnn_seconds)
            if tuned is not None:
                # at once: a run that is stopped keeps what it measured
                launch_cache.save(gpu, {task.problem: tuned})
            rows.append(_row(task.problem, best, cudnn_seconds))
            wrong += [(task.problem, trial) for trial in trials if trial.wrong]
            for trial in trials:
                if trial.reason is not None and not trial.wrong:
                    tqdm.write(f"{task.problem}: {trial.launch} does not run: {trial.reason}", sys.stderr)
    finally:
        torch.backends.cudnn.benchmark = benchmark
    print(_text([("pass", "fastcnn's launch", "us", "cuDNN us", "cuDNN/fastcnn", "predicted us"), *rows]))
    print(f"kept in {path}")
    for problem, trial in wrong:
        print(f"FAIL: {problem}: {trial.reason}", file=sys.stderr)
    return 1 if wrong else 0


def _row(problem, best, cudnn_seconds):
    microseconds = lambda seconds: "-" if seconds is None else f"{seconds * 1e6:.1f}"
    if best is None:
        return str(problem), "none is right", "-", microseconds(cudnn_seconds), "-", "-"
    ratio = "-" if cudnn_seconds is None else f"{cudnn_seconds / best.seconds:.2f}"
    times = microseconds(best.seconds), microseconds(cudnn_seconds), ratio, microseconds(best.predicted)
    return str(problem), str(best.launch), *times


def _predictions(tasks, chip):
    rows = [("pass", "fastcnn's launch", "waves", "limit", "predicted us", "roofline us")]
    for task in tasks:
        launch = ranked(task.problem, chip)[0][1]
        p = predict(task.problem, launch, chip)
        times = f"{p.seconds * 1e6:.1f}", f"{roofline(task.problem, chip) * 1e6:.1f}"
        rows.append((str(task.problem), str(launch), f"{p.waves:.2f}", p.limit, *times))
    return rows


def _text(rows):
    """A table for the terminal: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(cells)))
    return "\n".join(lines)
