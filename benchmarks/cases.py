"""The cases of the op benchmarks: layers of real networks (shapes.json, traced) and ragged ones; their random data."""

import dataclasses
import functools
import importlib
import json
import math
from pathlib import Path

import torch

from fastcnn.benchmarks.harness import Problem

# every op has its file bench_<op>.py with CASES and build(case, setting)
OPS = (
    "conv2d", "depthwise_conv2d", "separable_conv2d", "conv_transpose2d", "linear", "batch_norm", "activation",
    "max_pool2d", "avg_pool2d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "fractional_max_pool2d", "lp_pool2d", "dropout", "dropout2d",
    "stochastic_depth", "drop_connect", "decorrelated_batch_norm", "cross_entropy",
    "elementwise_loss", "multi_margin_loss", "batch_norm_act",
    "group_norm", "layer_norm", "instance_norm", "local_response_norm", "optim",
)  # fmt: skip
# cases of --quick; others: 2
QUICK = {
    "conv2d": 6,
    "depthwise_conv2d": 3,
    "batch_norm": 4,
    "batch_norm_act": 3,
    "activation": 3,
    "optim": 5,
    "adaptive_max_pool2d": 1,
    "fractional_max_pool2d": 1,
    "lp_pool2d": 1,
    "dropout2d": 1,
    "stochastic_depth": 1,
    "drop_connect": 1,
    "decorrelated_batch_norm": 1,
    "multi_margin_loss": 1,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A row's op and name ("resnet50.layer2.0.conv2"), and what `build` must know of the layer, without the batch."""

    op: str
    name: str
    layer: dict


def bench(op):
    """The module of an op's benchmark."""
    return importlib.import_module(f"fastcnn.benchmarks.bench_{op}")


@functools.cache
def _shapes():
    return json.loads((Path(__file__).parent / "shapes.json").read_text())


def traced(*kinds, op=None):
    """Every distinct layer of these kinds in the networks of shapes.json, then the ragged ones.

    Args:
        kinds: as traced: "conv2d", "relu", ...
        op: what the rows call it; default: the kind.
    """
    found = {}
    for network, layers in (*_shapes().items(), ("ragged", RAGGED)):
        for layer in layers:
            if layer["op"] in kinds:
                case = Case(op or layer["op"], f"{network}.{layer['name']}", layer)
                # two networks may share a layer: it is measured once, under the first name
                what = {k: v for k, v in layer.items() if k not in ("name", "count", "inplace")}
                found.setdefault(json.dumps(what, sort_keys=True), case)
    return list(found.values())


def quick(op, device_type):
    """A few cases of an op, most telling first: what each network spends most on, then a ragged one.

    On CPU only what takes two cores less than about a tenth of a second.
    """
    cases = bench(op).CASES
    if device_type == "cpu":
        cases = [case for case in cases if _work(case) < 1.5e6]
    networks = {}
    for case in sorted(cases, key=lambda case: -_work(case) * case.layer.get("count", 1)):
        networks.setdefault(case.name.split(".")[0], []).append(case)
    count = QUICK.get(op, 2)
    # a single case is one of a network, where there is one
    ragged = networks.pop("ragged", [])[: 1 if count > 1 or not networks else 0]
    # the first of every network, then the second of every network, ...
    turns = [case for turn in range(len(cases)) for queue in networks.values() for case in queue[turn : turn + 1]]
    return [*turns[: count - len(ragged)], *ragged]


def _work(case):
    # per image: elements moved, and multiply-adds at the hundred or so that a device does per element it moves
    layer = case.layer
    if "input" not in layer:
        return layer.get("work", 1)
    work = math.prod(layer["input"]) + math.prod(layer["output"])
    if layer["op"] == "linear":
        # its weights, which the batch shares
        work += layer["input"][-1] * layer["output"][-1] // 32
    if "kernel" in layer and "groups" in layer:
        taps = math.prod(layer["kernel"]) * layer["input"][0] // layer["groups"]
        work += math.prod(layer["output"]) * taps // 100
    return work


def randn(shape, setting, seed=0, scale=1.0, dtype=None):
    """Normal random numbers on the setting's device, the same in every run."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=setting.device) * scale).to(dtype or setting.dtype)


def kept(tensor, dims):
    """1 where a slice over these dimensions has an element that is not 0, else 0; fp64, of size 1 there."""
    return tensor.detach().ne(0).any(dim=dims, keepdim=True).double()


def text(shape):
    """(32, 64, 56, 56) -> "32x64x56x56"."""
    return "x".join(map(str, shape))


def pool_problem(layer, setting, function):
    """The problem of a pool: reads its input once, writes its output once; backward the other way round."""
    shape = (setting.batch, *layer["input"])
    outputs = setting.batch * math.prod(layer["output"])
    moved = (math.prod(shape) + outputs) * setting.dtype.itemsize
    described = text(shape) + " to " + text(layer["output"][1:])
    window = outputs
    if "kernel" in layer:
        R, S = layer["kernel"]
        described = f"{text(shape)}, window {R}x{S}, stride {layer['stride'][0]}"
        window *= R * S
    else:
        window = math.prod(shape)
    cost = {"forward": (window, moved), "backward": (window, moved)}
    return Problem(described, {"input": randn(shape, setting).requires_grad_()}, function, cost)


def _ragged(op, name, input, output, **attributes):
    return {"name": name, "op": op, "input": input, "output": output, "input_grad": True, "count": 1, **attributes}


def _window(k, stride, padding, **more):
    pairs = {"kernel": [k, k], "stride": [stride, stride], "padding": [padding, padding], "dilation": [1, 1]}
    return {**pairs, **more}


# odd sizes, 3 and 17 channels: what nobody tunes for and everybody has somewhere
RAGGED = [
    _ragged("conv2d", "c17", [17, 57, 55], [33, 57, 55], **_window(3, 1, 1, groups=1, bias=False)),
    _ragged("conv2d", "c3", [3, 223, 221], [17, 112, 111], **_window(7, 2, 3, groups=1, bias=True)),
    _ragged("conv2d", "c17.1x1", [17, 57, 55], [35, 57, 55], **_window(1, 1, 0, groups=1, bias=False)),
    _ragged("conv2d", "c34.groups2", [34, 29, 27], [34, 15, 14], **_window(3, 2, 1, groups=2, bias=False)),
    _ragged("depthwise_conv2d", "c17", [17, 57, 55], [17, 29, 28], **_window(5, 2, 2, groups=17, bias=False)),
    _ragged("depthwise_conv2d", "c3", [3, 111, 113], [3, 111, 113], **_window(3, 1, 1, groups=3, bias=True)),
    _ragged(
        "conv_transpose2d", "c17", [17, 29, 27], [33, 57, 53],
        **_window(3, 2, 1, groups=1, bias=True, output_padding=[0, 0]),
    ),
    _ragged("linear", "c17", [17], [1001], bias=True),
    _ragged("batch_norm", "c17", [17, 57, 55], [17, 57, 55]),
    _ragged("batch_norm", "c3", [3, 223, 221], [3, 223, 221]),
    _ragged("relu", "c17", [17, 57, 55], [17, 57, 55]),
    _ragged("max_pool2d", "c17", [17, 57, 55], [17, 29, 28], **_window(3, 2, 1, ceil_mode=False)),
    _ragged(
        "avg_pool2d", "c17", [17, 57, 55], [17, 19, 18], **_window(3, 3, 0, ceil_mode=False, count_include_pad=True)
    ),
    _ragged("adaptive_avg_pool2d", "c17", [17, 57, 55], [17, 7, 7]),
    _ragged("dropout", "c17", [17, 57, 55], [17, 57, 55], p=0.5),
]  # fmt: skip
