"""Timing callables side by side, on a GPU by its own clock; memory; and what the device reaches at most."""

import contextlib
import ctypes
import dataclasses
import gc
import os
import statistics
import time

import torch


@dataclasses.dataclass
class Samples:
    """Times of one pass of one provider, in milliseconds."""

    times: list
    host: list  # what the CPU needed to launch it (GPU only)

    @property
    def ms(self):
        return statistics.median(self.times)

    @property
    def p20(self):
        return _percentile(self.times, 0.2)

    @property
    def p80(self):
        return _percentile(self.times, 0.8)

    @property
    def samples(self):
        return len(self.times)

    @property
    def host_ms(self):
        return statistics.median(self.host) if self.host else None

    def __add__(self, other):
        """Two passes as one, round by round."""
        return Samples(
            [a + b for a, b in zip(self.times, other.times, strict=True)],
            [a + b for a, b in zip(self.host, other.host, strict=True)],
        )


def _percentile(values, share):
    return sorted(values)[round(share * (len(values) - 1))]


def measure(calls, device, seconds, min_samples=5, max_samples=200, flush=True):
    """Time callables side by side.

    Args:
        calls: name -> list of (pass, callable). Each round runs every name's list in order; a pass of None is run and
            not timed (what a timed call needs before it).
        device: where they run. On a GPU each timed call starts with a cold L2 cache (unless `flush` is false) and
            behind a pause of the device, so that launching it costs no device time.
        seconds: to spend per name; at least `min_samples` rounds whatever they take, at most `max_samples`.

    Returns:
        name -> {pass -> Samples}
    """
    timed = _GpuTimer(device, flush) if device.type == "cuda" else _cpu_time
    names = list(calls)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        # warm by time: clocks, caches, allocator, lazy loading
        start = time.perf_counter()
        _round(calls, names, timed, _empty(calls))
        while time.perf_counter() - start < 0.2 * seconds * len(calls):
            _round(calls, names, timed, _empty(calls))
        found, start, rounds = _empty(calls), time.perf_counter(), 0
        while rounds < min_samples or (rounds < max_samples and time.perf_counter() - start < seconds * len(calls)):
            # turn the order, every second round backwards: nobody always runs behind the same neighbour
            turn = rounds // 2 % len(names)
            order = names[turn:] + names[:turn]
            _round(calls, order[::-1] if rounds % 2 else order, timed, found)
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return found


def _empty(calls):
    return {name: {label: Samples([], []) for label, _ in passes if label} for name, passes in calls.items()}


def _round(calls, names, timed, found):
    pending = []
    for name in names:
        for label, call in calls[name]:
            if label is None:
                call()
            else:
                pending.append((found[name][label], timed(call, (name, label))))
    for samples, result in pending:
        ms, host_ms = result()
        samples.times.append(ms)
        if host_ms is not None:
            samples.host.append(host_ms)


def _cpu_time(call, key):
    start = time.perf_counter()
    call()
    ms = (time.perf_counter() - start) * 1e3
    return lambda: (ms, None)


class _GpuTimer:
    def __init__(self, device, flush):
        properties = torch.cuda.get_device_properties(device)
        l2_bytes = getattr(properties, "L2_cache_size", 0) or 64 << 20
        self.cache = torch.empty(4 * l2_bytes, dtype=torch.uint8, device=device) if flush else None
        # the fastest GPU ticks 3 times in a nanosecond; on a slower one the pause is only longer
        self.ticks_per_ms = 3e6
        self.host_ms = {}

    def __call__(self, call, key):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self.cache is not None:
            self.cache.zero_()
        # longer than the CPU needed last time, so that the kernels wait in line when it ends; a first call may compile
        pause_ms = min(1.5 * self.host_ms.get(key, 0.2) + 0.02, 20)
        torch.cuda._sleep(int(pause_ms * self.ticks_per_ms))
        start.record()
        launched = time.perf_counter()
        call()
        host_ms = (time.perf_counter() - launched) * 1e3
        end.record()
        self.host_ms[key] = host_ms

        def result():
            end.synchronize()
            return start.elapsed_time(end), host_ms

        return result


def keep_memory():
    """Let the C library keep freed memory for the rest of this process, as tcmalloc and jemalloc do.

    glibc returns large blocks to the system at once and gets them back page by page: that took longer than reading and
    writing them, for some providers of a case and not for others. Only glibc has these switches (man 3 mallopt).
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def ceilings(device):
    """What this device reaches, measured: {"copy_gbs": GB/s read plus written, "matmul_tflops": {dtype: TFLOP/s}}."""
    cuda = device.type == "cuda"
    source = torch.ones(2**30 if cuda else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if cuda else 1536
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if cuda else (torch.float32,)
    calls = {"copy": [("copy", lambda: target.copy_(source))]}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        calls[dtype_name(dtype)] = [("matmul", lambda a=a, b=b: a @ b)]
    found = measure(calls, device, 0.3, flush=False)
    return {
        "copy_gbs": round(2 * source.numel() / found["copy"]["copy"].ms / 1e6, 1),
        "matmul_tflops": {
            name: round(2 * size**3 / passes["matmul"].ms / 1e9, 3) for name, passes in found.items() if name != "copy"
        },
    }


def dtype_name(dtype):
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def peak_bytes(call, device):
    """The most memory that torch's allocator holds during the call, above what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # the CPU's allocator keeps no maximum, and the profiler sees every allocation
    with profiler(profile_memory=True) as prof:
        call()
    held = most = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def profiler(**options):
    """torch.profiler.profile without its own lines on stderr; of the CPU and of a GPU where there is one."""
    # read by the profiler's library when it first starts; it prints two lines a profile otherwise
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities, acc_events=True, **options)


def saved_bytes(forward, own=()):
    """Bytes that a forward pass keeps for its backward, each storage once.

    Args:
        forward: the call; its result is dropped.
        own: tensors that lie there anyway (parameters) and do not count.
    """
    saved = {}
    lying = {tensor.untyped_storage().data_ptr() for tensor in own}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in lying:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(saved.values())
