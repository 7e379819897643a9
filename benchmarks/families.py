"""Where the time of a training step goes: one profiled step, its kernels grouped in families that sum to the step."""

import re
import time
from collections import Counter

import torch

from fastcnn.benchmarks.timing import profiler

REST = "idle / Python"  # of the step, when no kernel (on a GPU) or no op (on CPU) ran
OPTIMIZER = re.compile(r"^Optimizer\.|(sgd|adam\w*)_kernel|multi_tensor_apply")
COPY = re.compile(r"nchwToNhwc|nhwcToNchw|Memcpy|^aten::(copy_|_to_copy|clone|contiguous|cat|_foreach_copy_)$")
KINDS = {
    "conv backward": r"conv\w*backward|dgrad|wgrad",
    "conv forward": r"conv(?!ert)|fprop",
    "norm": r"norm|bn_[fb]w",
    "pool": r"pool",
    "loss": r"cross_?entropy|log_?softmax|nll_?loss",
    "linear": r"::(add|b|badd)?mm(_out)?$|linear|gemm|matmul|addmm",
    "activation": r"relu|hardtanh|threshold|silu|sigmoid|gelu|hardswish|tanh|clamp|activation",
}
KINDS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in KINDS.items()}
# what belongs to none of these, such as a residual's sum; a convolution adds its bias with the same kernels
ELEMENTWISE = re.compile(
    r"elementwise|dropout|bernoulli|_fused|reduce"
    r"|::_?(foreach_)?(add|sub|rsub|mul|div|neg|pow|sqrt|exp|sum|mean|where|fill|zero|native_dropout)_?$"
)


def families(step, device, step_ms):
    """Milliseconds of a step by kernel family.

    On a GPU each kernel counts with its time on the device, under the op that launched it; on CPU each op with its own
    time, without the ops it calls. A profile stretches what the CPU does: CPU times are scaled back to the step's.

    Args:
        step: the call to take apart; it has run before.
        device: where it runs.
        step_ms: what it takes without a profiler.

    Returns:
        {family: ms}, largest first, with `REST` last; the sum is step_ms.
    """
    cuda = device.type == "cuda"
    with profiler() as prof:
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize(device)
        wall_ms = (time.perf_counter() - start) * 1e3
    found = Counter()
    for names, ms in _kernels(prof) if cuda else _ops(prof):
        found[family(names)] += ms
    scale = 1.0 if cuda else step_ms / wall_ms
    total = sum(found.values()) * scale
    if total > step_ms:
        # the profiled step was the slower one
        scale *= step_ms / total
        total = step_ms
    return {name: ms * scale for name, ms in found.most_common()} | {REST: step_ms - total}


def family(names):
    """The family of a kernel or op.

    Args:
        names: its own name, then those of the ops and ranges around it, outwards.
    """
    if any(OPTIMIZER.search(name) for name in names):
        return "optimizer"
    if COPY.search(names[0]):
        return "copy / layout"
    names = [_fused(name) for name in names]
    for name in names:
        for kind, pattern in KINDS.items():
            if pattern.search(name):
                return kind
    return "elementwise" if any(ELEMENTWISE.search(name) for name in names) else "other"


def _fused(name):
    # torch.compile names a kernel after all ops whose graph nodes it holds; products are kernels of their own
    if name.startswith(("triton_poi", "triton_red", "triton_per", "cpp_fused")):
        return re.sub(r"convolution(_backward)?|addmm|mm", "", name)
    return name


def _ops(prof):
    for event in prof.events():
        yield _around(event), event.self_cpu_time_total / 1e3


def _kernels(prof):
    # an op's kernels are linked to it by number; what is launched outside of any op has its own name alone
    cpu = torch.autograd.DeviceType.CPU
    ops = {event.id: event for event in prof.events() if event.device_type == cpu and not event.name.startswith("cu")}
    for event in prof.profiler.kineto_results.events():
        # a range such as the optimizer's is there once more as the time its kernels took
        range_again = event.is_user_annotation() or event.name().startswith("Optimizer.")
        if event.device_type() != cpu and not range_again:
            op = ops.get(event.linked_correlation_id())
            around = [] if op is None else _around(op)
            if COPY.search(event.name()):
                around = []
            yield [*around, event.name()], event.duration_ns() / 1e6


def _around(event):
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names
