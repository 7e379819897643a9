"""fractional_max_pool2d: pools of Graham's network for CIFAR-10 (2x2 windows, cube root of 2), a ragged one."""

import torch

from fastcnn.benchmarks import cases


def _case(name, input, size):
    layer = {
        "op": "fractional_max_pool2d",
        "input": input,
        "output": [input[0], *size],
        "kernel": [2, 2],
        "stride": ["random"],
    }
    return cases.Case("fractional_max_pool2d", name, layer)


CASES = [
    _case("graham.pool1", [160, 94, 94], [74, 74]),
    _case("graham.pool3", [320, 59, 59], [47, 47]),
    _case("graham.pool6", [960, 29, 29], [23, 23]),
    _case("ragged.c17", [17, 57, 55], [40, 31]),
]


def build(case, setting):
    size = case.layer["output"][1:]
    # far from where fp32 and fp64 would round to windows one pixel apart
    samples = torch.full((setting.batch, case.layer["input"][0], 2), 0.37, device=setting.device)

    def function(api, input):
        return api.functional.fractional_max_pool2d(input, 2, size, _random_samples=samples.to(input.dtype))

    return cases.pool_problem(case.layer, setting, function)
