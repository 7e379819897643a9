"""Which kernel runs a convolution, and with which tiles: measured where it was measured, else predicted.

In this order: what `use` forces; what this process chose before; what `fastcnn tune` keeps in the user's cache; where
cuDNN may run, the best predicted launch of our own measured against it at the first call; else the best predicted one.
"""

import dataclasses
import logging
import statistics
import time

import torch

from fastcnn.ops import launch_cache
from fastcnn.ops.chips import chip
from fastcnn.ops.conv_prediction import pending_seconds, ranked, why_not
from fastcnn.ops.conv_problem import KINDS, Launch, Problem, is_one_pixel

__all__ = [
    "KINDS",
    "Choice",
    "Launch",
    "Problem",
    "choose",
    "is_one_pixel",
    "measure",
    "should_materialize",
    "table",
    "use",
]

CUDNN = Launch("cudnn")
REPETITIONS = 5  # of each, one after the other in turn, when a first call measures

logger = logging.getLogger("fastcnn")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for a problem.

    Attributes:
        launch: the best of our own.
        seconds: what it takes.
        cudnn_seconds: what cuDNN took in the same measurement; None if it was not measured.
        source: "measured" (at the first call), "tuned" (by `fastcnn tune`) or "predicted".
    """

    launch: Launch
    seconds: float
    cudnn_seconds: float | None
    source: str

    def best(self, allow_cudnn):
        """The launch to take."""
        return CUDNN if allow_cudnn and self.cudnn_seconds and self.cudnn_seconds < self.seconds else self.launch


_chosen = {}  # (where, problem) -> Choice; see _where
_ran = set()  # (where, problem, variant, launch) of our own that were compiled
_tuned = {}  # device -> {Problem: Tuned}
_forced = []  # of `use`, the innermost last
_logged = set()


class use:
    """Context in which convolutions run with this launch, whatever would be chosen; for tests and measurements.

    Args:
        launch: a Launch.
        *kinds: of KINDS, the passes it is for; default: all. The innermost context that is for a pass counts.

    Raises:
        ValueError: at once for a launch that no problem can have, at the call for one that this problem cannot have.
    """

    def __init__(self, launch, *kinds):
        if not isinstance(launch, Launch):
            raise TypeError(f"launch must be a Launch, got {type(launch).__name__}")
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"kinds must be of {', '.join(KINDS)}, got {kind!r}")
        self.entry = launch, kinds or KINDS

    def __enter__(self):
        _forced.append(self.entry)
        return self

    def __exit__(self, *exc_info):
        _forced.remove(self.entry)


def choose(problem, device, run, allow_cudnn, variant=()):
    """The Launch for this call.

    Args:
        problem: a Problem.
        device: torch.device of the tensors.
        run: function of a Launch that computes the pass with it, into the call's own output; it is called several times
            where something is measured, so it must not add to what it reads.
        allow_cudnn: whether Launch("cudnn") may be the answer: backend "auto", not strict, nothing fused, a GPU.
        variant: what else the kernel is compiled for (dtype, bias, ...); hashable. It decides nothing here: only, under
            CUDA-graph capture, whether the kernel was compiled before.

    Raises:
        ValueError: the launch that `use` forces cannot run this problem, or no launch can.
        RuntimeError: a CUDA graph is being captured, and this convolution never ran before.
    """
    for launch, kinds in reversed(_forced):
        if problem.kind in kinds:
            return _checked(problem, launch, device, allow_cudnn)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    where = _where(device)
    choice = _chosen.get((where, problem))
    if choice is None or (allow_cudnn and choice.source == "predicted" and not capturing and _may_measure()):
        if capturing:
            return _while_capturing(problem, allow_cudnn)
        choice = _chosen[where, problem] = _tuned_choice(problem, device) or _new_choice(
            problem, device, run, allow_cudnn
        )
    launch = choice.best(allow_cudnn)
    key = (where, problem, variant, launch)
    if launch != CUDNN and key not in _ran:
        if capturing:
            return _while_capturing(problem, allow_cudnn)
        _ran.add(key)
    return launch


def should_materialize(problem, device):
    """Whether a pending activation is better written once than applied on load by forward and gradient of the weight.

    By `conv_prediction.pending_seconds`: a 3x3 filter transforms every element nine times in each of the two passes,
    which may cost more than two passes over memory where images are small and the convolution is bound by arithmetic.
    1x1 filters are bound by memory, where writing is what costs. Predicted, not measured: see
    benchmarks/results/resnet50-pending-predicted.md.

    Args:
        problem: the forward Problem, with `pending`.
        device: torch.device of the tensors.
    """
    on_load, written = pending_seconds(problem, chip(device))
    return written < on_load


def _where(device):
    # a stand-in for Triton's driver may compile for one chip after the other, all for tensors of one device
    return device if device.type == "cuda" else f"{device}, sm_{chip(device).arch}"


def _checked(problem, launch, device, allow_cudnn):
    reason = why_not(problem, launch, chip(device))
    if launch == CUDNN and not allow_cudnn:
        reason = "cuDNN needs the backend auto, no strict mode, nothing fused and a tensor on a GPU"
    if reason is not None:
        raise ValueError(f"the launch {launch} cannot run {problem}: {reason}")
    return launch


def _while_capturing(problem, allow_cudnn):
    # compiling, measuring and synchronising would break the capture, or what is captured
    if allow_cudnn:
        if "capture" not in _logged:
            _logged.add("capture")
            logger.warning(
                "%s is first called while a CUDA graph is captured, so cuDNN runs it in this graph: nothing is "
                "compiled or measured during a capture. Call the model once before",
                problem,
            )
        return CUDNN
    raise RuntimeError(
        f"{problem} is first called while a CUDA graph is captured, and its kernel is not compiled yet: call the model "
        "once with these sizes before the capture"
    )


def _tuned_choice(problem, device):
    if device.type != "cuda":
        return None
    if device not in _tuned:
        _tuned[device] = launch_cache.load(torch.cuda.get_device_name(device))
    tuned = _tuned[device].get(problem)
    if tuned is None or why_not(problem, tuned.launch, chip(device)) is not None:
        return None
    return Choice(tuned.launch, tuned.seconds, tuned.cudnn_seconds, "tuned")


def _may_measure():
    # who asks for the same result in every run must not get what a clock says
    return not (torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic)


def _new_choice(problem, device, run, allow_cudnn):
    found = ranked(problem, chip(device))
    if not found:
        raise ValueError(f"no kernel can run {problem}")
    prediction, launch = found[0]
    if not (allow_cudnn and _may_measure()):
        return Choice(launch, prediction.seconds, None, "predicted")
    with torch.cuda.device(device):
        own, cudnn = measure([lambda: run(launch), lambda: run(CUDNN)])
    return Choice(launch, own, cudnn, "measured")


def measure(calls, repetitions=REPETITIONS):
    """Seconds that each of the calls takes on the current GPU: the medians of a few turns.

    The first, untimed turn compiles and warms up.
    """
    host = []
    for call in calls:
        call()
        started = time.perf_counter()
        call()
        host.append(time.perf_counter() - started)
    # longer than the CPU needs for any launch, so that the kernels wait in line; 3 ticks are a nanosecond or less
    pause = int(3e9 * min(1.5 * max(host) + 2e-5, 2e-3))
    events = [[] for _ in calls]
    for _ in range(repetitions):
        for call, own in zip(calls, events, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(pause)
            start.record()
            call()
            end.record()
            own.append((start, end))
    torch.cuda.synchronize()
    return [statistics.median(start.elapsed_time(end) for start, end in own) / 1e3 for own in events]


def table():
    """Rows of text, the first of them titles, of what this process chose so far; empty if nothing."""
    rows = []
    for (where, problem), choice in _chosen.items():
        cudnn = "-" if choice.cudnn_seconds is None else f"{choice.cudnn_seconds * 1e6:.1f}"
        fastest = "cuDNN" if choice.best(True) == CUDNN else "fastcnn"
        times = (f"{choice.seconds * 1e6:.1f}", cudnn, fastest, choice.source)
        rows.append((str(problem), str(where), str(choice.launch), *times))
    titles = ("convolution", "on", "fastcnn's launch", "us", "cuDNN us", "fastest", "times are")
    return [titles, *rows] if rows else []
