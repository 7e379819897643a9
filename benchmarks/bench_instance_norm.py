"""instance_norm: CycleGAN's generator at 256x256, without parameters as there; a ragged one."""

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.bench_group_norm import norm_problem

CASES = [
    cases.Case("instance_norm", name, {"op": "instance_norm", "input": shape, "output": shape})
    for name, shape in (
        ("cyclegan.stem", [64, 256, 256]),
        ("cyclegan.down1", [128, 128, 128]),
        ("cyclegan.residual", [256, 64, 64]),
        ("ragged.c17", [17, 57, 55]),
    )
]


def build(case, setting):
    shape = (setting.batch, *case.layer["input"])
    return norm_problem(shape, (), setting, lambda api, input: api.functional.instance_norm(input))
