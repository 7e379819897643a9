"""stochastic_depth with its shortcut added: the ends of residual branches, against torchvision's formula and a sum."""

import math

import torch
import torch.nn.functional

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

SHAPES = {"resnet50.layer1": [256, 56, 56], "efficientnet_b0.stage6": [192, 7, 7], "ragged.c17": [17, 57, 55]}
CASES = [
    cases.Case("stochastic_depth", name, {"op": "stochastic_depth", "input": shape, "output": shape, "p": 0.2})
    for name, shape in SHAPES.items()
]


def build(case, setting):
    p, shape = case.layer["p"], (setting.batch, *case.layer["input"])
    tensors = {
        name: cases.randn(shape, setting, seed).requires_grad_() for seed, name in enumerate(("input", "residual"))
    }
    size = math.prod(shape) * setting.dtype.itemsize

    def function(api, input, residual):
        if api.functional is not torch.nn.functional:
            return api.functional.stochastic_depth(input, p, "row", residual=residual)
        factors = torch.empty((len(input), 1, 1, 1), dtype=input.dtype, device=input.device)
        return residual + input * factors.bernoulli_(1 - p).div_(1 - p)

    def check(output, tensors, grad_output, grads):
        factors = cases.kept(grads[0], (1, 2, 3)) / (1 - p)
        eps = torch.finfo(output.dtype).eps
        x, residual = (tensors[name].detach().double() for name in ("input", "residual"))
        for name, ours, expected in (
            ("output", output, residual + x * factors),
            ("gradient of input", grads[0], grad_output.double() * factors),
            ("gradient of residual", grads[1], grad_output.double()),
        ):
            if not torch.allclose(ours.double(), expected, rtol=4 * eps, atol=4 * eps):
                raise AssertionError(f"{name}: is not that of the samples that were kept")

    # one pass over both; the gradient of the residual is that of the output
    cost = {"forward": (2 * math.prod(shape), 3 * size), "backward": (math.prod(shape), 2 * size)}
    return Problem(f"{cases.text(shape)}, p={p}", tensors, function, cost, check=check)
