"""batch_norm with a ReLU, and a residual before it where the network has one, in training; PyTorch runs three ops."""

import dataclasses
import math

import torch

from fastcnn.benchmarks import bench_batch_norm, cases
from fastcnn.benchmarks.harness import Problem


def _residual(channels, height, name, count):
    shape = [channels, height, height]
    layer = {"op": "batch_norm_act", "input": shape, "output": shape, "residual": True, "count": count}
    return cases.Case("batch_norm_act", name, layer)


# the sums that end a stage's blocks of ResNet-50 and ResNet-18, then norms with a ReLU alone
RESIDUAL = [
    _residual(256, 56, "resnet50.layer1.add", 3),
    _residual(512, 28, "resnet50.layer2.add", 4),
    _residual(1024, 14, "resnet50.layer3.add", 6),
    _residual(2048, 7, "resnet50.layer4.add", 3),
    _residual(64, 56, "resnet18.layer1.add", 2),
    _residual(128, 28, "resnet18.layer2.add", 2),
    _residual(256, 14, "resnet18.layer3.add", 2),
    _residual(512, 7, "resnet18.layer4.add", 2),
    _residual(17, 55, "ragged.c17.add", 1),
]
ALONE = [dataclasses.replace(case, op="batch_norm_act") for case in bench_batch_norm.CASES]
CASES = RESIDUAL + ALONE


def build(case, setting):
    problem = bench_batch_norm.build(case, setting)
    shape = (setting.batch, *case.layer["input"])
    residual = case.layer.get("residual", False)
    if residual:
        problem.tensors["residual"] = cases.randn(shape, setting, seed=3).requires_grad_()

    def function(api, input, weight, bias, running_mean, running_var, residual=None):
        arguments = (input, running_mean, running_var, weight, bias, True)
        if api.functional is not torch.nn.functional:
            return api.functional.batch_norm(*arguments, activation="relu", residual=residual)
        y = torch.nn.functional.batch_norm(*arguments)
        return torch.nn.functional.relu(y if residual is None else y + residual, inplace=True)

    elements = math.prod(shape)
    size = elements * setting.dtype.itemsize
    bits = elements // 8
    # with a residual: it is read once, its gradient written once, and the bits say where the ReLU passed
    forward = 4 * size + bits if residual else 3 * size
    backward = 6 * size + 2 * bits if residual else 5 * size
    cost = {"forward": (8 * elements, forward), "backward": (11 * elements, backward)}
    cost["grad_input"] = cost["backward"]
    cost["grad_weight"] = (6 * elements, 2 * size + (bits if residual else 0))
    return Problem(problem.shape, problem.tensors, function, cost, changed=problem.changed)
