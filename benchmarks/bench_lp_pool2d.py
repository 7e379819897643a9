"""lp_pool2d: norm 2 where networks pool, and overlapping norm 3; a ragged one."""

from fastcnn.benchmarks import cases


def _case(name, input, k, stride, norm):
    size = [(pixels - k) // stride + 1 for pixels in input[1:]]
    layer = {
        "op": "lp_pool2d",
        "input": input,
        "output": [input[0], *size],
        "kernel": [k, k],
        "stride": [stride, stride],
    }
    return cases.Case("lp_pool2d", name, layer | {"norm": norm})


CASES = [
    _case("vgg16.pool3.norm2", [256, 56, 56], 2, 2, 2),
    _case("alexnet.pool1.norm3", [64, 55, 55], 3, 2, 3),
    _case("ragged.c17", [17, 57, 55], 3, 2, 2),
]


def build(case, setting):
    layer = case.layer

    def function(api, input):
        # positive, so that odd norms have roots
        return api.functional.lp_pool2d(input, layer["norm"], layer["kernel"], layer["stride"])

    problem = cases.pool_problem(layer, setting, function)
    problem.tensors["input"] = problem.tensors["input"].detach().abs().add_(0.01).requires_grad_()
    return problem
