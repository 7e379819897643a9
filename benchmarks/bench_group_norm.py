"""group_norm: 32 groups in place of ResNet-50's batch norms, parameters in fp32 as under autocast; a ragged one."""

import math

import torch

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

_RAGGED = {"op": "group_norm", "input": [18, 57, 55], "output": [18, 57, 55], "groups": 6}
CASES = [
    *(
        cases.Case("group_norm", case.name, {**case.layer, "groups": 32})
        for case in cases.traced("batch_norm", op="group_norm")
        if case.name.startswith("resnet50.")
    ),
    cases.Case("group_norm", "ragged.c18", _RAGGED),
]


def build(case, setting):
    groups = case.layer["groups"]
    return norm_problem(
        (setting.batch, *case.layer["input"]),
        case.layer["input"][:1],
        setting,
        lambda api, input, weight, bias: api.functional.group_norm(input, groups, weight, bias),
        f", {groups} groups",
    )


def norm_problem(shape, parameters, setting, function, described=""):
    """A norm of x [shape]: x is read twice, or once where what is normalised together fits a multiprocessor."""
    dtype = torch.float32 if setting.dtype.itemsize < 4 else setting.dtype
    tensors = {"input": (cases.randn(shape, setting) + 0.5).requires_grad_()}
    if parameters:
        tensors["weight"] = cases.randn(parameters, setting, seed=1, dtype=dtype).requires_grad_()
        tensors["bias"] = cases.randn(parameters, setting, seed=2, dtype=dtype).requires_grad_()
    elements = math.prod(shape)
    size = elements * setting.dtype.itemsize
    # the fewest bytes: x in, y out; then x and dy in, dx out
    cost = {"forward": (6 * elements, 2 * size), "backward": (9 * elements, 3 * size)}
    cost["grad_input"] = cost["backward"]
    cost["grad_weight"] = (4 * elements, 2 * size)
    return Problem(cases.text(shape) + described, tensors, function, cost)
