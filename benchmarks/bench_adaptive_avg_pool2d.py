"""adaptive_avg_pool2d: the global pools before the classifiers and in squeeze-excite blocks."""

from fastcnn.benchmarks import cases

CASES = cases.traced("adaptive_avg_pool2d")


def build(case, setting):
    size = case.layer["output"][1:]

    def function(api, input):
        return api.functional.adaptive_avg_pool2d(input, size)

    return cases.pool_problem(case.layer, setting, function)
