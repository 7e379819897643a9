"""decorrelated_batch_norm in training, groups of 16 channels, against the same formula through torch.linalg.eigh."""

import math

import torch
import torch.nn.functional

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem
from fastcnn.ops.decorrelated_batch_norm import decorrelated_batch_norm_reference

SHAPES = {"resnet20.layer1": [16, 32, 32], "resnet50.layer1": [64, 56, 56], "ragged.c48": [48, 27, 29]}
CASES = [
    cases.Case("decorrelated_batch_norm", name, {"op": "decorrelated_batch_norm", "input": shape, "output": shape})
    for name, shape in SHAPES.items()
]


def build(case, setting):
    shape = (setting.batch, *case.layer["input"])
    C = shape[1]
    parameters = torch.float32 if setting.dtype.itemsize < 4 else setting.dtype
    tensors = {
        "input": (cases.randn(shape, setting) + 0.5).requires_grad_(),
        "weight": cases.randn((C,), setting, seed=1, dtype=parameters).requires_grad_(),
        "bias": cases.randn((C,), setting, seed=2, dtype=parameters).requires_grad_(),
    }

    def function(api, input, weight, bias):
        if api.functional is torch.nn.functional:
            return decorrelated_batch_norm_reference(input, None, None, weight, bias, True, 1e-5, 16)
        return api.functional.decorrelated_batch_norm(input, None, None, weight, bias, True)

    elements = math.prod(shape)
    size = elements * setting.dtype.itemsize
    # 16 multiply-adds per element and pass; x is read twice, and so are x and dy
    cost = {"forward": (64 * elements, 3 * size), "backward": (96 * elements, 5 * size)}
    return Problem(f"{cases.text(shape)}, groups of 16", tensors, function, cost)
