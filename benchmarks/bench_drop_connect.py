"""drop_connect_linear: the classifiers that dropout is used in, their weights dropped, against linear of F.dropout."""

import torch
import torch.nn.functional

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

LAYERS = {"vgg16.classifier.3": (4096, 4096), "alexnet.classifier.1": (9216, 4096), "ragged.c17": (1017, 1001)}
CASES = [
    cases.Case("drop_connect", name, {"op": "linear", "input": [i], "output": [o], "p": 0.5})
    for name, (i, o) in LAYERS.items()
]


def build(case, setting):
    (inputs,), (outputs,), p = case.layer["input"], case.layer["output"], case.layer["p"]
    batch = setting.batch
    tensors = {
        "input": cases.randn((batch, inputs), setting).requires_grad_(),
        "weight": cases.randn((outputs, inputs), setting, seed=1, scale=inputs**-0.5).requires_grad_(),
        "bias": cases.randn((outputs,), setting, seed=2).requires_grad_(),
    }

    def function(api, input, weight, bias):
        if api.functional is torch.nn.functional:
            return api.functional.linear(input, api.functional.dropout(weight, p), bias)
        return api.functional.drop_connect_linear(input, weight, bias, p)

    def check(output, tensors, grad_output, grads):
        x, w, b = (tensors[name].detach().float() for name in ("input", "weight", "bias"))
        factors = (grads[1] != 0).float() / (1 - p)
        dy = grad_output.float()
        for name, ours, expected in (
            ("output", output, x @ (w * factors).t() + b),
            ("gradient of input", grads[0], dy @ (w * factors)),
            ("gradient of weight", grads[1], (dy.t() @ x) * factors),
        ):
            error = float((ours.float() - expected).abs().max())
            if not error <= 8 * torch.finfo(output.dtype).eps * float(expected.abs().max()) + 1e-5:
                raise AssertionError(f"{name}: is not that of the weights that were kept, error {error:.2e}")

    flops = 2 * batch * inputs * outputs
    moved = (batch * (inputs + outputs) + inputs * outputs) * setting.dtype.itemsize
    cost = {"forward": (flops, moved), "backward": (2 * flops, 2 * moved)}
    return Problem(f"{batch}x{inputs} to {outputs}, p={p}", tensors, function, cost, check=check)
