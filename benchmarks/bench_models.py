"""Training steps of whole networks on random images: images per second, memory, and where the time goes.

On a GPU a step runs in bf16 autocast over fp32 parameters, on CPU in fp32. The clock runs from an idle device to an
idle device, so that launching counts as it does in a training loop; the L2 cache stays as the step left it.

Before anything is timed, loss and gradients on a few of the images are compared with those in fp64 (training_step.py).
torch.compile is not: it would compile everything once more.
"""

import copy
import functools
import gc
import time

import torch
from torch import nn
from tqdm import tqdm

from fastcnn.benchmarks import networks, rows
from fastcnn.benchmarks.families import families
from fastcnn.benchmarks.harness import AGAIN, TORCH, restored_switches, set_switches, times
from fastcnn.benchmarks.judge import REFERENCES
from fastcnn.benchmarks.timing import ceilings, dtype_name, measure, peak_bytes, saved_bytes
from fastcnn.benchmarks.training_step import WARM_UP, Expected, Graph, Step, loss_of, with_layers
from fastcnn.nn import Block

PASSES = ("forward", "backward", "optimizer", "step")  # forward: with the loss, and clearing the gradients
GRAPHED = ("torch-nhwc", "fastcnn", "fastcnn-auto", "fastcnn-chain")  # providers that are also captured in a CUDA graph
GATED = ("fastcnn", "fastcnn-auto", "fastcnn-chain")  # PyTorch is the yardstick


def run(names, providers, device, quick, results_folder, deadline=None, parts=False, batch=None, commit=None):
    """Measure training steps of networks; print a table for each, append its rows.

    Args:
        names: of `networks.build`.
        providers: names of `harness.PROVIDERS`, the first is run twice, for the noise.
        device: torch.device.
        quick: few rounds, small batches on CPU, and no compile-max, which takes minutes to compile a network.
        results_folder: where the rows go.
        deadline: value of time.monotonic() after which no new network starts, or None.
        parts: print the passes and the kernel families, too.
        batch: images per step; default: 256 on a GPU; on CPU 8, or 64 small ones, a quarter of them if quick.
        commit: what the rows call the measured state, see `rows.run_info`.

    Returns:
        list of rows, of all that was measured.

    Raises:
        ValueError: a network is unknown or made of fastcnn's blocks, and nothing was measured; or it is no image
            classifier.
    """
    models = {name: networks.build(name) for name in names}
    for name, model in models.items():
        if any(isinstance(module, Block) for module in model.modules()):
            raise ValueError(
                f"{name} runs on fastcnn's fused chain whatever its layers are: PyTorch has no form of it to measure "
                "against: name the network of torchvision or timm, which the provider fastcnn-chain converts"
            )
    if quick and "compile-max" in providers:
        providers = [provider for provider in providers if provider != "compile-max"]
        print("compile-max is left out of quick runs of networks: compiling takes minutes")
    info = rows.run_info(device, ceilings(device), commit)
    found, left = [], []
    with tqdm(total=len(names) * (len(providers) + 1), unit="provider", disable=None) as progress:
        for name in names:
            model = models.pop(name)
            if deadline is not None and time.monotonic() > deadline:
                left.append(name)
                continue
            new = run_network(name, model, providers, device, quick, info, batch, progress)
            rows.append(new, results_folder)
            found += new
            progress.write(table(new, parts))
    if left:
        print(f"out of time: {len(left)} of {len(names)} networks did not run ({', '.join(left)})")
    return found


def run_network(name, model, providers, device, quick, info, batch=None, progress=None):
    """Gate and time one network; the rows of all providers, as `run` describes."""
    progress = progress or tqdm(disable=True)
    cuda = device.type == "cuda"
    layout = "channels_last"
    images, labels = _data(name, model, device, batch, quick)
    about = {
        "op": "model",
        "case": name,
        "shape": f"{'x'.join(map(str, images.shape))}, {int(labels.max()) + 1} classes, SGD with momentum",
        "dtype": "bfloat16" if cuda else dtype_name(images.dtype),
        "layout": layout,
        "batch": len(images),
    }
    # a compiled function of the last network would count towards torch.compile's limit of recompilations
    torch._dynamo.reset()
    with restored_switches():
        steps, memory, refused = _prepare(name, model, images, labels, providers, layout, progress)
        progress.set_description(f"{name}: timing {', '.join(steps)}")
        found, noise = _time_steps(steps, refused, device, quick)
        tables = {}
        for provider, passes in found.items():
            set_switches(provider, device)
            tables[provider] = families(steps[provider], device, passes["step"].ms)
        replayed, no_graph = {}, {}
        if cuda:
            graphed = [provider for provider in found if provider in GRAPHED]
            # the graphs need the memory of the other steps
            steps.clear()
            _let_go()
            progress.set_description(f"{name}: CUDA graphs")
            replayed, no_graph = _time_graphs(model, images, labels, graphed, layout, device, quick)
        progress.update()
    row = functools.partial(_row, about, info, _flops(model, images.shape))
    result = []
    for provider in providers:
        status = refused.get(provider, ("ok", None))
        for label, samples in found.get(provider, dict.fromkeys(PASSES)).items():
            more = {"noise": noise.get(label), **memory.get(provider, {})}
            if label == "step" and provider in tables:
                more["families"] = {kind: float(f"{ms:.4g}") for kind, ms in tables[provider].items()}
            result.append(row(provider, label, False, status, samples, more))
    result += [row(provider, "step", True, ("ok", None), passes["step"], {}) for provider, passes in replayed.items()]
    result += [row(provider, "step", True, status, None, {}) for provider, status in no_graph.items()]
    return result


def _prepare(name, model, images, labels, providers, layout, progress):
    """(provider -> warm Step, provider -> its memory fields, provider -> (status, reason) of those that cannot run)."""
    device = images.device
    steps, memory, refused = {}, {}, {}
    progress.set_description(f"{name}: truth")
    try:
        expected = Expected(model, images, labels, layout)
    except torch.OutOfMemoryError as error:
        progress.update(len(providers))
        return steps, memory, dict.fromkeys(providers, _refusal(error))
    for provider in providers:
        progress.set_description(f"{name}: {provider}")
        set_switches(provider, device)
        try:
            if provider in GATED:
                expected.check(provider)
            step = Step(model, images, labels, provider, layout, autocast=device.type == "cuda")
            for _ in range(WARM_UP if device.type == "cuda" else 1):
                step()
            memory[provider] = _memory(step, device)
            steps[provider] = step
        except Exception as error:
            # whatever goes wrong inside a provider is its failure and not the run's
            refused[provider] = _refusal(error)
        progress.update()
    return steps, memory, refused


def _time_steps(steps, refused, device, quick):
    """(provider -> pass -> Samples, pass -> noise), all side by side, or one by one where one of them fails."""
    calls = {provider: _passes(step, provider, device) for provider, step in steps.items()}
    first = next(iter(calls), None)
    again = {} if first is None else {AGAIN: _passes(steps[first], first, device)}
    try:
        found = _measure(again | calls, device, quick)
    except Exception:
        found = {}
        for provider, passes in calls.items():
            try:
                found |= _measure((again if provider == first else {}) | {provider: passes}, device, quick)
            except Exception as error:
                refused[provider] = _refusal(error)
    repeated = found.pop(AGAIN, {})
    noise = {label: round(abs(own.ms / found[first][label].ms - 1), 4) for label, own in repeated.items()}
    return found, noise


def table(found, parts=False):
    """Text for the terminal: a line per provider of one network; with `parts` the passes and kernel families, too."""
    steps = [row for row in found if row["pass"] == "step"]
    name, shape, noise = found[0]["case"], found[0]["shape"], next((r["noise"] for r in steps if r["noise"]), 0.0)
    best = {
        graph: min(
            (r["ms"] for r in steps if r["ms"] and r["graph"] == graph and r["provider"] in REFERENCES), default=None
        )
        for graph in (False, True)
    }
    header = ["", "img/s", "ratio", "peak MB", "saved MB", *(f"{label} ms" for label in PASSES if parts)]
    lines, notes = [header], []
    for row in steps:
        title = row["provider"] + (", CUDA graph" if row["graph"] else "")
        if row["status"] != "ok":
            notes.append(f"{title}: {row['status']}: {row['reason']}")
            lines.append([title, "FAIL" if row["status"] == "FAIL" else "-", *[""] * (len(header) - 2)])
            continue
        of_torch = best[row["graph"]]
        cells = [f"{row['batch'] / row['ms'] * 1e3:,.1f}", f"{of_torch / row['ms']:.2f}" if of_torch else ""]
        cells += [f"{row[key] / 1e6:,.1f}" if row[key] else "" for key in ("peak_bytes", "saved_bytes")]
        for label in PASSES if parts else ():
            own = [r for r in found if (r["provider"], r["graph"], r["pass"]) == (row["provider"], row["graph"], label)]
            cells.append(f"{own[0]['ms']:,.2f}" if own else "")
        lines.append([title, *cells])
    text = [
        f"\n{name}: {shape}; ratio to the faster of {' and '.join(REFERENCES)}, noise {noise:.1%}",
        *_aligned(lines),
    ]
    tables = {row["provider"]: row["families"] for row in steps if parts and row.get("families")}
    if tables:
        # the first provider's largest first; what it does not have comes last
        kinds = list(dict.fromkeys(kind for own in tables.values() for kind in own))
        lines = [["ms", *tables]]
        lines += [[kind, *(f"{own.get(kind, 0):,.2f}" for own in tables.values())] for kind in kinds]
        lines.append(["step", *(f"{sum(own.values()):,.2f}" for own in tables.values())])
        text += ["", *_aligned(lines)]
    return "\n".join(text + notes)


def _aligned(lines):
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    ]


def _data(name, model, device, batch, quick):
    shape = networks.input_shape(name)
    if batch is None:
        batch = 256 if device.type == "cuda" else (64 if shape[-1] <= 64 else 8) // (4 if quick else 1)
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn((batch, *shape), generator=generator, device=device)
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(images[:1].cpu())
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise ValueError(f"model must give logits [N, classes] for images of {tuple(shape)}, and {name} does not")
    labels = torch.randint(logits.shape[1], (batch,), generator=generator, device=device)
    # the largest class is there, so that the labels say how many there are
    labels[0] = logits.shape[1] - 1
    return images, labels


def _memory(step, device):
    def both():
        step.forward()
        step.backward()

    step.optimizer.zero_grad()
    peak = peak_bytes(both, device)
    saved = saved_bytes(step.forward, [*step.model.parameters(), *step.model.buffers()])
    step.loss = None
    return {"peak_bytes": peak, "saved_bytes": saved}


def _passes(step, provider, device):
    calls = [("forward", step.forward), ("backward", step.backward), ("optimizer", step.update)]
    if device.type == "cuda":
        calls = [(label, _UntilIdle(call)) for label, call in [*calls, ("step", step)]]
    return [(None, functools.partial(set_switches, provider, device)), *calls]


class _UntilIdle:
    """A call that returns when the GPU has finished, and how long it took to launch each time, in milliseconds."""

    def __init__(self, call):
        self.call, self.host = call, []

    def __call__(self):
        start = time.perf_counter()
        self.call()
        self.host.append((time.perf_counter() - start) * 1e3)
        torch.cuda.synchronize()


def _measure(calls, device, quick):
    if not calls:
        return {}
    cuda = device.type == "cuda"
    seconds = (1 if quick else 4) if cuda else (0.5 if quick else 5)
    # every call ends with an idle device: the clock on the wall is the one to read
    found = measure(calls, torch.device("cpu"), seconds, min_samples=3 if quick and not cuda else 5)
    for name, passes in found.items():
        for label, call in calls[name]:
            if isinstance(call, _UntilIdle):
                passes[label].host = call.host[-passes[label].samples :]
        if "step" not in passes:
            # on CPU nothing overlaps
            passes["step"] = passes["forward"] + passes["backward"] + passes["optimizer"]
    return found


def _time_graphs(model, images, labels, providers, layout, device, quick):
    """(provider -> {"step": Samples}, provider -> (status, reason)) of steps replayed from CUDA graphs."""
    calls, refused, pool = {}, {}, None
    for provider in providers:
        set_switches(provider, device)
        try:
            graph = Graph(Step(model, images, labels, provider, layout, autocast=True), pool)
        except Exception as error:
            refused[provider] = ("none", f"no CUDA graph: {_refusal(error)[1]}")
            continue
        # they run one after the other, and none reads what another computed: their activations share memory
        pool = graph.graph.pool()
        calls[provider] = [("step", _UntilIdle(graph))]
    try:
        found = _measure(calls, device, quick)
    except Exception as error:
        found, refused = {}, refused | dict.fromkeys(calls, ("none", f"no CUDA graph: {_refusal(error)[1]}"))
    calls.clear()
    _let_go()
    return found, refused


def _let_go():
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def _refusal(error):
    """(status, reason) for what a provider raised; what it cannot do is no wrong result."""
    if isinstance(error, NotImplementedError):
        return "none", str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "none", "out of memory"
    first_line = (str(error).strip().splitlines() or [""])[0]
    return "FAIL", first_line if isinstance(error, AssertionError) else f"{type(error).__name__}: {first_line}"


def _flops(model, shape):
    """{pass: useful FLOPs} of products and convolutions, forward and backward, counted on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    model = with_layers(copy.deepcopy(model), nn).to("meta")
    # batch norm wants two images
    images = torch.empty((2, *shape[1:]), device="meta")
    with FlopCounterMode(display=False) as counter:
        loss = loss_of(model, TORCH.functional.cross_entropy, images, torch.zeros(2, dtype=torch.long, device="meta"))
        forward = counter.get_total_flops()
        loss.backward()
    both = counter.get_total_flops()
    found = {"forward": forward, "backward": both - forward, "optimizer": 0, "step": both}
    return {label: count // 2 * shape[0] for label, count in found.items()}


def _row(about, info, flops, provider, label, graph, status, samples, more):
    most = info["matmul_tflops"].get(about["dtype"])
    tflops = flops[label] / samples.ms / 1e9 if samples and flops[label] else None
    nothing = {"noise": None, "peak_bytes": None, "saved_bytes": None}
    return {
        **about, "provider": provider, "pass": label, "graph": graph, "status": status[0], "reason": status[1],
        **times(samples), "flops": flops[label], "bytes": None,
        "tflops": tflops and float(f"{tflops:.4g}"), "gbs": None,
        "tflops_share": tflops and most and float(f"{tflops / most:.4g}"), "gbs_share": None,
        **nothing, **more, **info, "matmul_tflops": most,
    }  # fmt: skip
