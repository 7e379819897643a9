"""local_response_norm: AlexNet's two layers (the paper's sizes and torchvision's), GoogLeNet's, a ragged one."""

import math

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

SIZE = 5
CASES = [
    cases.Case("local_response_norm", name, {"op": "local_response_norm", "input": shape, "output": shape})
    for name, shape in (
        ("alexnet.norm1", [96, 55, 55]),
        ("alexnet.norm2", [256, 27, 27]),
        ("alexnet_torchvision.norm1", [64, 55, 55]),
        ("alexnet_torchvision.norm2", [192, 27, 27]),
        ("googlenet.norm1", [64, 56, 56]),
        ("ragged.c17", [17, 57, 55]),
    )
]


def build(case, setting):
    shape = (setting.batch, *case.layer["input"])
    tensors = {"input": cases.randn(shape, setting).requires_grad_()}
    elements = math.prod(shape)
    size = elements * setting.dtype.itemsize
    cost = {"forward": ((2 * SIZE + 6) * elements, 2 * size), "backward": ((4 * SIZE + 10) * elements, 3 * size)}

    def function(api, input):
        return api.functional.local_response_norm(input, SIZE, 1e-4, 0.75, 2.0)

    return Problem(f"{cases.text(shape)}, {SIZE} channels", tensors, function, cost)
