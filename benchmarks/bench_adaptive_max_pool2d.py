"""adaptive_max_pool2d: global pools of attention blocks, spatial pyramids, a ragged one."""

from fastcnn.benchmarks import cases


def _case(name, input, size):
    return cases.Case(
        "adaptive_max_pool2d", name, {"op": "adaptive_max_pool2d", "input": input, "output": [input[0], *size]}
    )


CASES = [
    _case("cbam.stage2", [512, 28, 28], [1, 1]),
    _case("cbam.stage1", [256, 56, 56], [1, 1]),
    _case("sppnet.pool4", [256, 13, 13], [4, 4]),
    _case("sppnet.pool2", [256, 13, 13], [2, 2]),
    _case("ragged.c17", [17, 57, 55], [7, 7]),
]


def build(case, setting):
    size = case.layer["output"][1:]

    def function(api, input):
        return api.functional.adaptive_max_pool2d(input, size)

    return cases.pool_problem(case.layer, setting, function)
