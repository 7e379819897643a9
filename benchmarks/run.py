"""`fastcnn bench`: which cases and providers run, in which order, until when; rows are kept as they come."""

import dataclasses
import sys
import time

import torch
from tqdm import tqdm

from fastcnn.benchmarks import cases, harness, rows
from fastcnn.benchmarks.timing import ceilings, dtype_name, keep_memory

# when a --quick run starts nothing more: the last network may take two minutes on a GPU (it compiles), one on CPU
QUICK_SECONDS = {"cuda": 360, "cpu": 240}
# compiling takes longer than measuring there, and users of CPUs rarely do
CPU_PROVIDERS = ("torch", "torch-nhwc", "fastcnn", "fastcnn-auto", "fastcnn-chain")
LAYOUTS = ("channels_last", "contiguous")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def bench(
    what="all",
    networks=(),
    quick=False,
    ops=None,
    case="",
    providers=None,
    device="auto",
    dtype=None,
    layout=None,
    batch=None,
    seconds=None,
    resume=False,
    commit=None,
    results="benchmarks/results",
):
    """Measure, print tables, append rows.

    Args:
        what: "ops", "models" (training steps of whole networks), "steps" (the same taken apart) or "all" (ops, then
            models).
        networks: names for models and steps, see `networks.build`; default: the six of `networks.NETWORKS`.
        quick: few cases and short measuring; `seconds` defaults to `QUICK_SECONDS`.
        ops: names of `cases.OPS`; default: all.
        case: only cases whose name contains this.
        providers: names of `harness.PROVIDERS`, of which ops leave out OF_NETWORKS; default: all, on CPU without
            torch.compile, in quick runs without its max-autotune (minutes of compiling).
        device: "auto", "cpu" or "cuda".
        dtype: "bf16", "fp16" or "fp32"; default: bf16 on a GPU, fp32 on CPU.
        layout: "channels_last" (default) or "contiguous", of compile and fastcnn.
        batch: images; default: 256 on a GPU, 32 on CPU (models: 8, or 64 small ones).
        seconds: no new case starts after so many seconds.
        resume: leave out the cases of ops that the results already have, from this commit on this device.
        commit: what the rows call the measured state; default: git's commit, else the version.
        results: folder of the result files.

    Returns:
        list of the rows.
    """
    started = time.monotonic()
    device = _device(device)
    setting = default_setting(device, dtype, layout, batch)
    _refuse_what_has_no_effect(what, networks, op=ops, case=case, dtype=dtype, layout=layout, resume=resume)
    if device.type == "cpu":
        keep_memory()
    providers = _providers(providers, device, quick)
    if seconds is None and quick:
        seconds = QUICK_SECONDS[device.type]
    deadline = None if seconds is None else started + seconds
    found = []
    if what in ("all", "ops"):
        if quick:
            setting.seconds = 0.1
        if quick and device.type == "cpu":
            setting.split = False
        # the models' share of a quick run, if they come after
        last = deadline if what == "ops" or deadline is None else started + 0.6 * seconds
        found += run_ops(
            _select(ops or cases.OPS, case, quick, device), providers, setting, results, last, resume, commit
        )
    if what in ("all", "models", "steps"):
        from fastcnn.benchmarks import bench_models
        from fastcnn.benchmarks import networks as named

        default = named.NETWORKS[:3] if quick else named.NETWORKS
        if what == "all" and quick and device.type == "cpu":
            default = ("lenet5", "mobilenet_v2")
        found += bench_models.run(
            list(networks) or list(default),
            providers,
            device,
            quick,
            results,
            deadline,
            parts=what == "steps",
            batch=batch,
            commit=commit,
        )
    return found


def _refuse_what_has_no_effect(what, networks, **of_ops):
    if what == "ops" and networks:
        raise ValueError(f"networks are for models and steps, got {' '.join(networks)}: ops take --case {networks[0]}")
    given = [name for name, value in of_ops.items() if value]
    if what in ("models", "steps") and given:
        raise ValueError(f"{given[0]} is for ops and changes nothing for {what}, got {of_ops[given[0]]!r}")


def default_setting(device, dtype=None, layout=None, batch=None):
    """What is measured unless someone asks for something else; arguments of None are such defaults."""
    cuda = device.type == "cuda"
    for name, value, known in (("dtype", dtype, DTYPES), ("layout", layout, LAYOUTS)):
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    return harness.Setting(
        device=device,
        dtype=DTYPES[dtype or ("bf16" if cuda else "fp32")],
        layout=layout or "channels_last",
        batch=batch or (256 if cuda else 32),
        seconds=0.5,
    )


def _device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu: torch finds no GPU here")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def _providers(wanted, device, quick):
    known = harness.PROVIDERS if device.type == "cuda" else CPU_PROVIDERS
    wanted = list(wanted or [provider for provider in known if not (quick and provider == "compile-max")])
    for provider in wanted:
        if provider not in harness.PROVIDERS:
            raise ValueError(f"provider must be one of {', '.join(harness.PROVIDERS)}, got {provider!r}")
    # in the fixed order: the first is the one that is run twice
    return [provider for provider in harness.PROVIDERS if provider in wanted]


def _select(ops, pattern, quick, device):
    for op in ops:
        if op not in cases.OPS:
            raise ValueError(f"op must be one of {', '.join(cases.OPS)}, got {op!r}")
    found = {}
    for op in ops:
        every = cases.bench(op).CASES
        # whoever names a case wants it, quick or not
        chosen = cases.quick(op, device.type) if quick and not pattern else every
        found[op] = [case for case in chosen if pattern in case.name]
    if not any(found.values()):
        raise ValueError(f"case must be a part of a case's name, got {pattern!r}: no case of {', '.join(ops)} has it")
    return found


def run_ops(selected, providers, setting, results, deadline=None, resume=False, commit=None):
    """Run cases op by op in turns, so that a run cut short has seen every op.

    Args:
        selected: op -> list of `cases.Case`.
        deadline: a value of time.monotonic() after which no case starts, or None.
        resume: leave out what the results have, from this commit on this device.
        commit: what the rows call the measured state.

    Returns:
        list of rows; each case's are on disk as soon as they are measured.
    """
    providers = [name for name in providers if name not in harness.OF_NETWORKS]
    info = rows.run_info(setting.device, ceilings(setting.device), commit)
    print(_header(info, setting), flush=True)
    if info["busy"] is not None and info["busy"] > 0.1:
        # small parallel loops wait for each other's cores: factors of ten in either direction, and the noise is blind
        print(f"WARNING: others use {info['busy']:.0%} of this machine; ratios measured now are worth nothing")
    if resume:
        selected = _missing(selected, providers, setting, info, results)
    most = max(map(len, selected.values()))
    turns = [queue[turn] for turn in range(most) for queue in selected.values() if turn < len(queue)]
    found, left = {op: [] for op in selected}, []
    progress = tqdm(turns, unit="case", disable=None)
    for case in progress:
        if deadline is not None and time.monotonic() > deadline:
            left.append(case)
            continue
        progress.set_description(f"{case.op} {case.name}", refresh=False)
        new = _run_case(case, providers, setting, info)
        rows.append(new, results)
        found[case.op] += new
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    from fastcnn.benchmarks.report import terminal_table

    for op, new in found.items():
        if new:
            print(f"\n{op}\n{terminal_table(new)}")
    if left:
        names = ", ".join(f"{case.op} {case.name}" for case in left[:6])
        print(
            f"\nout of time: {len(left)} of {len(turns)} cases did not run ({names}{', ...' if len(left) > 6 else ''})"
        )
    return [row for new in found.values() for row in new]


def _missing(selected, providers, setting, info, results):
    same = ("device", "commit", "layout", "batch")
    wanted = {**info, "layout": setting.layout, "batch": setting.batch}
    done = {
        (row["op"], row["case"], row["provider"], row["dtype"])
        for row in rows.read_rows(results)
        if all(row[field] == wanted[field] for field in same)
    }

    def measured(case):
        dtype = dtype_name(_setting_of(case, setting).dtype)
        return all((case.op, case.name, provider, dtype) in done for provider in providers)

    return {op: [case for case in queue if not measured(case)] for op, queue in selected.items()}


def _setting_of(case, setting):
    # under autocast the parameters stay in fp32, and so does their optimizer
    if case.op == "optim" and setting.dtype.itemsize == 2:
        return dataclasses.replace(setting, dtype=torch.float32)
    return setting


def _run_case(case, providers, setting, info):
    setting = _setting_of(case, setting)
    try:
        problem = cases.bench(case.op).build(case, setting)
    except torch.OutOfMemoryError:
        print(f"{case.op} {case.name}: out of memory before anything ran", file=sys.stderr)
        return []
    return harness.run_case(case, problem, providers, setting, info)


def _header(info, setting):
    most = ", ".join(f"{tflops:g} TFLOP/s {name}" for name, tflops in info["matmul_tflops"].items())
    return (
        f"{info['device']}, torch {info['torch']}, Triton {info['triton']}, commit {info['commit']}; "
        f"measured ceilings: copy {info['copy_gbs']:g} GB/s, matmul {most}; batch {setting.batch}, {setting.layout}"
    )
