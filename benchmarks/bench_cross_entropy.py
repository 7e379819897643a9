"""cross_entropy: the loss behind every classifier, with class indices, mean over the batch; and over pixels."""

import math

import torch

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

# 1,000 classes behind ImageNet networks; CIFAR-10, ImageNet-21k; the 21 classes of Pascal VOC at every pixel
CASES = [
    cases.Case("cross_entropy", name, {"classes": classes, "size": size})
    for name, classes, size in (
        ("imagenet.loss", 1000, ()),
        ("cifar10.loss", 10, ()),
        ("imagenet21k.loss", 21843, ()),
        ("voc.pixels", 21, (64, 64)),
    )
]


def build(case, setting):
    shape = (setting.batch, case.layer["classes"], *case.layer["size"])
    rows = (setting.batch, *case.layer["size"])
    generator = torch.Generator(setting.device).manual_seed(2)
    target = torch.randint(shape[1], rows, generator=generator, device=setting.device)
    tensors = {"input": cases.randn(shape, setting).requires_grad_(), "target": target}
    elements = math.prod(shape)
    size = elements * setting.dtype.itemsize

    def function(api, input, target):
        return api.functional.cross_entropy(input, target)

    # subtract the maximum, exponentiate, add; backward: exponentiate, subtract, scale
    cost = {"forward": (4 * elements, size), "backward": (4 * elements, 2 * size)}
    return Problem(cases.text(shape), tensors, function, cost)
