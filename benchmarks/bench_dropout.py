"""dropout: the classifiers' dropouts. The mask is random, so its statistics and its use are checked, not its values."""

import math

import torch

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

CASES = cases.traced("dropout")


def build(case, setting):
    p, shape = case.layer["p"], (setting.batch, *case.layer["input"])
    tensors = {"input": cases.randn(shape, setting).requires_grad_()}
    size = tensors["input"].numel() * setting.dtype.itemsize

    def function(api, input):
        return api.functional.dropout(input, p)

    def check(output, tensors, grad_output, grads):
        x = tensors["input"].detach()
        kept = output != 0
        share, sigma = kept.float().mean().item(), math.sqrt(p * (1 - p) / x.numel())
        if abs(share - (1 - p)) > 6 * sigma:
            raise AssertionError(f"output: keeps {share:.4f} of the elements, {1 - p:.4f} +- {sigma:.4f} expected")
        for name, ours, source in (("output", output, x), ("gradient of input", grads[0], grad_output)):
            expected = torch.where(kept, source.double() / (1 - p), 0)
            if not torch.allclose(ours.double(), expected, rtol=2 * torch.finfo(x.dtype).eps, atol=0):
                raise AssertionError(f"{name}: is not its source over {1 - p} where kept and 0 elsewhere")

    cost = {"forward": (2 * size // setting.dtype.itemsize, 2 * size), "backward": (size, 2 * size)}
    return Problem(f"{cases.text(shape)}, p={p}", tensors, function, cost, check=check)
