"""linear: the classifiers, and the 1x1 images of squeeze-excite blocks that are written as linear layers."""

import math

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

CASES = cases.traced("linear")


def build(case, setting):
    layer = case.layer
    shape = (setting.batch, *layer["input"])
    C, K = shape[-1], layer["output"][-1]
    tensors = {
        "input": cases.randn(shape, setting).requires_grad_(layer["input_grad"]),
        "weight": cases.randn((K, C), setting, seed=1, scale=1 / math.sqrt(C)).requires_grad_(),
    }
    if layer["bias"]:
        tensors["bias"] = cases.randn((K,), setting, seed=2).requires_grad_()

    def function(api, input, weight, bias=None):
        return api.functional.linear(input, weight, bias)

    rows = math.prod(shape[:-1])
    x, y, w = (n * setting.dtype.itemsize for n in (rows * C, rows * K, K * C))
    flops = 2 * rows * C * K
    one = (flops, x + y + w)
    cost = {"forward": one, "grad_input": one, "grad_weight": one, "backward": (2 * flops, 2 * x + y + 2 * w)}
    return Problem(f"{cases.text(shape)}, {K} outputs", tensors, function, cost)
