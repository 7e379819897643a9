"""activation: the networks' activations, each out of place: one read, one write; backward one more read."""

import math

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

CASES = cases.traced("relu", "relu6", "silu", "sigmoid", "hardswish", "gelu", "tanh", op="activation")


def build(case, setting):
    kind, shape = case.layer["op"], (setting.batch, *case.layer["input"])
    tensors = {"input": cases.randn(shape, setting).requires_grad_()}

    def function(api, input):
        return getattr(api.functional, kind)(input)

    elements = math.prod(shape)
    size = elements * setting.dtype.itemsize
    # comparisons and multiplications; an exponential counts as one
    operations = {"relu": 1, "relu6": 2}.get(kind, 4)
    cost = {"forward": (operations * elements, 2 * size), "backward": (operations * elements, 3 * size)}
    return Problem(f"{kind} {cases.text(shape)}", tensors, function, cost)
