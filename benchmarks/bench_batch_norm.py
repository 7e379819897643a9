"""batch_norm in training: batch statistics, running statistics updated; parameters in fp32 as under autocast."""

import math

import torch

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

CASES = cases.traced("batch_norm")


def build(case, setting):
    shape = (setting.batch, *case.layer["input"])
    C = shape[1]
    parameters = torch.float32 if setting.dtype.itemsize < 4 else setting.dtype
    tensors = {
        # a mean that is not zero: the statistics must be right
        "input": (cases.randn(shape, setting) + 0.5).requires_grad_(),
        "weight": cases.randn((C,), setting, seed=1, dtype=parameters).requires_grad_(),
        "bias": cases.randn((C,), setting, seed=2, dtype=parameters).requires_grad_(),
        "running_mean": torch.zeros(C, dtype=parameters, device=setting.device),
        "running_var": torch.ones(C, dtype=parameters, device=setting.device),
    }

    def function(api, input, weight, bias, running_mean, running_var):
        return api.functional.batch_norm(input, running_mean, running_var, weight, bias, training=True)

    elements = math.prod(shape)
    size = elements * setting.dtype.itemsize
    # two sums, then scale and shift: x is read twice; backward likewise reads x and dy twice
    cost = {"forward": (6 * elements, 3 * size), "backward": (9 * elements, 5 * size)}
    cost["grad_input"] = cost["backward"]
    cost["grad_weight"] = (4 * elements, 2 * size)
    return Problem(cases.text(shape), tensors, function, cost, changed=("running_mean", "running_var"))
