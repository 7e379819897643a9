"""conv_transpose2d: the upsampling layer of Mask R-CNN's mask head, and ragged sizes."""

import math

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

CASES = cases.traced("conv_transpose2d")


def build(case, setting):
    layer = case.layer
    shape = (setting.batch, *layer["input"])
    C, K, (R, S), groups = shape[1], layer["output"][0], layer["kernel"], layer["groups"]
    tensors = {
        "input": cases.randn(shape, setting).requires_grad_(),
        "weight": cases.randn((C, K // groups, R, S), setting, seed=1, scale=1 / math.sqrt(C)).requires_grad_(),
    }
    if layer["bias"]:
        tensors["bias"] = cases.randn((K,), setting, seed=2).requires_grad_()
    options = layer["stride"], layer["padding"], layer["output_padding"], groups, layer["dilation"]

    def function(api, input, weight, bias=None):
        return api.functional.conv_transpose2d(input, weight, bias, *options)

    y_elements = setting.batch * math.prod(layer["output"])
    x, y, w = (n * setting.dtype.itemsize for n in (math.prod(shape), y_elements, tensors["weight"].numel()))
    # every input pixel meets every tap of every filter
    flops = 2 * math.prod(shape) * (K // groups) * R * S
    one = (flops, x + w + y)
    cost = {"forward": one, "grad_input": one, "grad_weight": one, "backward": (2 * flops, 2 * x + y + 2 * w)}
    return Problem(f"{cases.text(shape)}, {K} filters {R}x{S}, stride {options[0][0]}", tensors, function, cost)
