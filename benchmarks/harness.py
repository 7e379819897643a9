"""The one way in which a claim about an op's speed is made: gate, measure, write rows.

`bench_<op>.py` describes problems (tensors, function, cost); here every provider runs them. First its results are
compared with PyTorch one precision up: a wrong provider gets FAIL and no time. Then all providers are timed side by
side: round by round each pass of each provider once, the order turning. What is kept are medians with 20th and 80th
percentiles, beside the ceilings and the noise (the first provider once more) of the same run.
"""

import contextlib
import dataclasses
import functools
from types import SimpleNamespace

import torch

import fastcnn
from fastcnn.benchmarks.timing import dtype_name, measure, peak_bytes, saved_bytes
from fastcnn.testing import assert_close_to_truth

PROVIDERS = ("torch", "torch-nhwc", "compile", "compile-max", "fastcnn", "fastcnn-auto", "fastcnn-chain")
OF_NETWORKS = ("fastcnn-chain",)  # converted by fastcnn.convert: single ops have no such form
TORCH = SimpleNamespace(functional=torch.nn.functional, optim=torch.optim)
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
AGAIN = "again"  # the first provider a second time: the difference is the noise


@dataclasses.dataclass
class Setting:
    """What a run holds fixed for all its cases."""

    device: torch.device
    dtype: torch.dtype
    layout: str  # of compile and fastcnn: "channels_last" or "contiguous"; torch and torch-nhwc have their own
    batch: int
    seconds: float  # of measuring, per provider and case
    rounds: int = 5  # at least, whatever they take
    split: bool = True  # whether grad_input and grad_weight are timed apart, too


@dataclasses.dataclass
class Problem:
    """One case of an op, ready to run.

    Attributes:
        shape: for people: "32x64x56x56, 64 filters 3x3".
        tensors: name -> tensor, contiguous; those with requires_grad get gradients. "input" is the data, the rest are
            parameters and buffers.
        function: function(api, **tensors) -> output; api.functional is torch.nn.functional or ours.
        cost: pass -> (FLOPs, fewest bytes) of "forward", "backward" and, where data and parameters have gradients,
            "grad_input" and "grad_weight".
        changed: names of tensors that the function changes in place; they are compared as outputs are.
        check: for random functions, in place of comparing values: check(output, tensors, grad_output, grads) raises
            AssertionError.
    """

    shape: str
    tensors: dict
    function: object
    cost: dict
    changed: tuple = ()
    check: object = None


@dataclasses.dataclass
class OptimizerProblem:
    """One optimizer on the parameters of one network, ready to run.

    Attributes:
        shape: for people.
        parameters: tensors with a .grad.
        make: make(api, parameters) -> optimizer; api.optim is torch.optim or ours.
        cost: {"step": (FLOPs, fewest bytes)}.
    """

    shape: str
    parameters: list
    make: object
    cost: dict


@contextlib.contextmanager
def restored_switches():
    """Inside the block providers set torch's and our global switches; afterwards they are as before."""
    benchmark = torch.backends.cudnn.benchmark
    try:
        with fastcnn.backend(fastcnn.backends.current_backend()), fastcnn.strict(fastcnn.backends.is_strict()):
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark


def set_switches(provider, device):
    """The global switches as this provider wants them; cheap enough to be called before every timed call."""
    torch.backends.cudnn.benchmark = provider != "torch"
    own = "triton" if device.type == "cuda" else "cpu"
    fastcnn.backend(own if provider == "fastcnn" else "auto")
    fastcnn.strict(provider == "fastcnn")


def layout_of(provider, default):
    """The memory format a provider runs in: torch's two have their own."""
    return {"torch": "contiguous", "torch-nhwc": "channels_last"}.get(provider, default)


def api_of(provider):
    """Whose .functional and .optim a provider calls."""
    return fastcnn if provider.startswith("fastcnn") else TORCH


def compiled(function, provider):
    """torch.compile in the provider's mode. CUDA graphs stay out of an op's time: they would copy its inputs."""
    mode = "max-autotune-no-cudagraphs" if provider == "compile-max" else None
    return torch.compile(function, mode=mode, dynamic=False)


class _Run:
    """One provider on one problem, and between the two passes the output with its graph."""

    def __init__(self, function, tensors, grad_output):
        self.function, self.tensors, self.grad_output = function, tensors, grad_output
        self.wanted = [name for name, t in tensors.items() if t.requires_grad]
        self.output = None

    def forward(self):
        self.output = self.function(**self.tensors)

    def backward(self):
        output, self.output = self.output, None
        return torch.autograd.grad(output, [self.tensors[name] for name in self.wanted], self.grad_output)

    def part(self, wanted):
        """The same with gradients of these tensors alone."""
        tensors = {name: t.detach().requires_grad_(name in wanted) for name, t in self.tensors.items()}
        return _Run(self.function, tensors, self.grad_output)

    def results(self, changed):
        """Name -> tensor of everything forward and backward make."""
        self.forward()
        output = self.output.detach()
        grads = zip(self.wanted, self.backward(), strict=True)
        return {"output": output, **{f"gradient of {n}": g for n, g in grads}, **{n: self.tensors[n] for n in changed}}


def _in_layout(tensor, layout):
    # a leaf of its own, in this memory format if it has one
    memory_format = MEMORY_FORMATS[layout] if tensor.dim() == 4 else torch.contiguous_format
    return tensor.detach().contiguous(memory_format=memory_format).requires_grad_(tensor.requires_grad)


def _run_of(problem, provider, setting, grad_output):
    layout = layout_of(provider, setting.layout)
    function = functools.partial(problem.function, api_of(provider))
    if provider.startswith("compile"):
        function = compiled(function, provider)
    tensors = {name: _in_layout(t, layout) for name, t in problem.tensors.items()}
    tensors |= {name: tensors[name].clone() for name in problem.changed}
    return _Run(function, tensors, _in_layout(grad_output, layout))


def _grad_output(problem):
    with torch.no_grad():
        tensors = {n: t.clone() if n in problem.changed else t for n, t in problem.tensors.items()}
        output = problem.function(TORCH, **tensors)
    generator = torch.Generator(output.device).manual_seed(1)
    return torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)


def _truth(problem, grad_output, dtype):
    # one precision up: fp64 for fp32, fp32 for the 16-bit types, and no TF32
    higher = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
    tensors = {
        name: (t.detach().to(higher, copy=True) if t.is_floating_point() else t).requires_grad_(t.requires_grad)
        for name, t in problem.tensors.items()
    }
    run = _Run(functools.partial(problem.function, TORCH), tensors, grad_output.to(higher))
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        return run.results(problem.changed)
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def _attempt(provider, refused, action):
    """action(), or None with the reason in `refused` where the provider cannot run or is wrong."""
    try:
        return action()
    except AssertionError as error:
        refused[provider] = ("FAIL", str(error))
    except NotImplementedError as error:
        refused[provider] = ("none", str(error))
    except torch.OutOfMemoryError:
        refused[provider] = ("none", "out of memory")
    except Exception as error:
        # whatever goes wrong inside a provider is its failure and not the run's
        first_line = (str(error).strip().splitlines() or [""])[0]
        refused[provider] = ("FAIL", f"{type(error).__name__}: {first_line}")
    return None


def prepare(problem, providers, setting):
    """Gate every provider.

    Returns:
        (provider -> list of calls for `timing.measure`, provider -> its memory fields, provider -> (status, reason) of
        those that cannot run or are wrong). The calls of the first provider are there once more as `AGAIN`.
    """
    if isinstance(problem, OptimizerProblem):
        return _prepare_optimizer(problem, providers, setting)
    grad_output = _grad_output(problem)
    by_torch, truth = {}, None
    if problem.check is None:
        truth = _truth(problem, grad_output, setting.dtype)
        # PyTorch's own error is the yardstick, layout by layout: its sums over channels_last tensors are rougher
        for layout in {layout_of(provider, setting.layout) for provider in providers}:
            baseline = "torch" if layout == "contiguous" else "torch-nhwc"
            set_switches(baseline, setting.device)
            by_torch[layout] = _run_of(problem, baseline, setting, grad_output).results(problem.changed)
    calls, memory, refused = {}, {}, {}

    def gated(provider):
        if provider == "torch-nhwc" and all(t.dim() != 4 for t in problem.tensors.values()):
            raise NotImplementedError("without 4-D tensors torch-nhwc is torch")
        set_switches(provider, setting.device)
        run = _run_of(problem, provider, setting, grad_output)
        ours = run.results(problem.changed)
        if problem.check is None:
            yardstick = by_torch[layout_of(provider, setting.layout)]
            for name, result in ours.items():
                assert_close_to_truth(name, result, yardstick[name], truth[name], setting.dtype)
        else:
            grads = [ours[f"gradient of {name}"] for name in run.wanted]
            problem.check(ours["output"], run.tensors, run.grad_output, grads)
        return run, _memory(run, setting.device)

    for provider in providers:
        found = _attempt(provider, refused, functools.partial(gated, provider))
        if found is not None:
            run, memory[provider] = found
            if not calls:
                calls[AGAIN] = _passes(run.part(run.wanted), provider, setting)
            calls[provider] = _passes(run, provider, setting)
    return calls, memory, refused


def _memory(run, device):
    def both():
        run.forward()
        run.backward()

    parameters = [t for name, t in run.tensors.items() if name != "input"]
    found = {"peak_bytes": peak_bytes(both, device), "saved_bytes": saved_bytes(run.forward, parameters)}
    run.output = None
    return found


def _passes(run, provider, setting):
    calls = [(None, functools.partial(set_switches, provider, setting.device)), ("forward", run.forward)]
    calls.append(("backward", run.backward))
    parameters = [name for name in run.wanted if name != "input"]
    # torch.compile would compile each of them anew
    if setting.split and "input" in run.wanted and parameters and not provider.startswith("compile"):
        for label, wanted in (("grad_input", ["input"]), ("grad_weight", parameters)):
            part = run.part(wanted)
            calls += [(None, part.forward), (label, part.backward)]
    return calls


def _prepare_optimizer(problem, providers, setting):
    def stepped(api, dtype, wrap=lambda step: step):
        parameters = [p.detach().to(dtype, copy=True).requires_grad_() for p in problem.parameters]
        for copy, p in zip(parameters, problem.parameters, strict=True):
            copy.grad = p.grad.to(dtype, copy=True)
        step = wrap(problem.make(api, parameters).step)
        for _ in range(3):
            step()
        return {f"parameter {i}": p.detach().clone() for i, p in enumerate(parameters)}, step

    set_switches("torch", setting.device)
    truth, _ = stepped(TORCH, torch.float64)
    by_torch, _ = stepped(TORCH, setting.dtype)
    calls, memory, refused = {}, {}, {}

    def gated(provider):
        if provider in ("torch-nhwc", "compile-max"):
            raise NotImplementedError(f"an optimizer's step has no variant {provider}")
        set_switches(provider, setting.device)
        wrap = functools.partial(compiled, provider=provider) if provider == "compile" else lambda step: step
        ours, step = stepped(api_of(provider), setting.dtype, wrap)
        for name, result in ours.items():
            assert_close_to_truth(name, result, by_torch[name], truth[name], setting.dtype)
        return step, {"peak_bytes": peak_bytes(step, setting.device), "saved_bytes": None}

    for provider in providers:
        found = _attempt(provider, refused, functools.partial(gated, provider))
        if found is not None:
            step, memory[provider] = found
            passes = [(None, functools.partial(set_switches, provider, setting.device)), ("step", step)]
            if not calls:
                calls[AGAIN] = list(passes)
            calls[provider] = passes
    return calls, memory, refused


def run_case(case, problem, providers, setting, info):
    """Gate and time one case.

    Args:
        case: what the rows are called (attributes op and name).
        problem: `Problem` or `OptimizerProblem`.
        providers: names of `PROVIDERS`; the first that works is run twice, for the noise.
        setting: `Setting`.
        info: fields that all rows share, of `rows.run_info`.

    Returns:
        list of rows, one per provider and pass; benchmarks/README.md explains them.
    """
    # a compiled function of the last case would count towards torch.compile's limit of recompilations
    torch._dynamo.reset()
    with restored_switches():
        try:
            calls, memory, refused = prepare(problem, providers, setting)
            found = measure(calls, setting.device, setting.seconds, setting.rounds) if calls else {}
        except torch.OutOfMemoryError:
            found, memory, refused = {}, {}, dict.fromkeys(providers, ("none", "out of memory"))
    for passes in found.values():
        if "backward" in passes:
            passes["step"] = passes["forward"] + passes["backward"]
    cost = dict(problem.cost)
    if "step" not in cost:
        cost["step"] = tuple(sum(both) for both in zip(cost["forward"], cost["backward"], strict=True))
    again = found.pop(AGAIN, None)
    noise = _noise(next(iter(found.values())), again) if found else {}
    most = {"tflops": info["matmul_tflops"].get(dtype_name(setting.dtype)), "gbs": info["copy_gbs"]}
    labels = max(found.values(), key=len, default=cost)
    rows = []
    for provider in providers:
        status, reason = refused.get(provider, ("ok", None))
        for label, samples in found.get(provider, dict.fromkeys(labels)).items():
            rows.append(
                {
                    "op": case.op, "case": case.name, "shape": problem.shape, "provider": provider, "pass": label,
                    "graph": False, "dtype": dtype_name(setting.dtype), "layout": setting.layout,
                    "batch": setting.batch, "status": status, "reason": reason, **times(samples),
                    "noise": noise.get(label), **_rates(samples, *cost[label], most),
                    **memory.get(provider, {"peak_bytes": None, "saved_bytes": None}),
                    **info, "matmul_tflops": most["tflops"],
                }
            )  # fmt: skip
    return rows


def _noise(first, again):
    return {label: round(abs(again[label].ms / samples.ms - 1), 4) for label, samples in first.items()}


def times(samples):
    """The fields ms, p20, p80, samples, host_ms of a row; samples may be None."""
    names = ("ms", "p20", "p80", "samples", "host_ms")
    return {name: None if samples is None else _short(getattr(samples, name)) for name in names}


def _rates(samples, flops, bytes, most):
    fields = {"flops": flops, "bytes": bytes}
    for name, amount in (("tflops", flops / 1e9), ("gbs", bytes / 1e6)):
        rate = amount / samples.ms if samples and amount else None
        fields[name] = _short(rate)
        fields[f"{name}_share"] = _short(rate / most[name]) if rate and most[name] else None
    return fields


def _short(value):
    return value if value is None or isinstance(value, int) else float(f"{value:.4g}")
