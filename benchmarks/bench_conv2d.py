"""conv2d: every dense convolution of the networks. The stem's image needs no gradient, as in training."""

import math

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

CASES = cases.traced("conv2d")


def build(case, setting):
    layer = case.layer
    shape = (setting.batch, *layer["input"])
    K, (R, S), groups = layer["output"][0], layer["kernel"], layer["groups"]
    C = shape[1] // groups
    tensors = {
        "input": cases.randn(shape, setting).requires_grad_(layer["input_grad"]),
        # outputs of order 1
        "weight": cases.randn((K, C, R, S), setting, seed=1, scale=1 / math.sqrt(C * R * S)).requires_grad_(),
    }
    if layer["bias"]:
        tensors["bias"] = cases.randn((K,), setting, seed=2).requires_grad_()
    options = layer["stride"], layer["padding"], layer["dilation"], groups

    def function(api, input, weight, bias=None):
        return api.functional.conv2d(input, weight, bias, *options)

    outputs = setting.batch * math.prod(layer["output"])
    x, y, w = (n * setting.dtype.itemsize for n in (math.prod(shape), outputs, K * C * R * S))
    flops = 2 * outputs * C * R * S
    cost = {"forward": (flops, x + w + y), "grad_weight": (flops, x + y + w)}
    cost["backward"] = cost["grad_weight"]
    if layer["input_grad"]:
        cost["grad_input"] = (flops, y + w + x)
        # both gradients read dy; one read is enough
        cost["backward"] = (2 * flops, 2 * x + y + 2 * w)
    unusual = {"stride": options[0][0], "dilation": options[2][0], "groups": groups}
    text = "".join(f", {name} {value}" for name, value in unusual.items() if value > 1)
    return Problem(f"{cases.text(shape)}, {K} filters {R}x{S}{text}", tensors, function, cost)
