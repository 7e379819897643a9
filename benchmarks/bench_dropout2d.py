"""dropout2d: whole channels of the feature maps it is used on. The mask is random: its use is checked."""

import math

import torch

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

SHAPES = {"squeezenet.fire4": [256, 28, 28], "resnet50.layer2": [512, 28, 28], "ragged.c17": [17, 57, 55]}
CASES = [
    cases.Case("dropout2d", name, {"op": "dropout2d", "input": shape, "output": shape, "p": 0.2})
    for name, shape in SHAPES.items()
]


def build(case, setting):
    p, shape = case.layer["p"], (setting.batch, *case.layer["input"])
    tensors = {"input": cases.randn(shape, setting).requires_grad_()}
    size = math.prod(shape) * setting.dtype.itemsize

    def function(api, input):
        return api.functional.dropout2d(input, p)

    def check(output, tensors, grad_output, grads):
        factors = cases.kept(output, (2, 3)) / (1 - p)
        for name, ours, source in (("output", output, tensors["input"]), ("gradient of input", grads[0], grad_output)):
            expected = source.detach().double() * factors
            if not torch.allclose(ours.double(), expected, rtol=2 * torch.finfo(output.dtype).eps, atol=0):
                raise AssertionError(f"{name}: is not its source over {1 - p} in kept channels and 0 elsewhere")

    cost = {"forward": (math.prod(shape), 2 * size), "backward": (math.prod(shape), 2 * size)}
    return Problem(f"{cases.text(shape)}, p={p}", tensors, function, cost, check=check)
