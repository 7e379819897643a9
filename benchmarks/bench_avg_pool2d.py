"""avg_pool2d: every pool of the networks."""

from fastcnn.benchmarks import cases

CASES = cases.traced("avg_pool2d")
OPTIONS = ("stride", "padding", "ceil_mode", "count_include_pad")


def build(case, setting):
    layer = case.layer
    options = {name: layer[name] for name in OPTIONS}

    def function(api, input):
        return api.functional.avg_pool2d(input, layer["kernel"], **options)

    return cases.pool_problem(layer, setting, function)
