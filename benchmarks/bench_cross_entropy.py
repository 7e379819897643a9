"""cross_entropy: the loss behind every classifier, with class indices, mean over the batch."""

import torch

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

# 1,000 classes behind ImageNet networks; CIFAR-10, ImageNet-21k
CASES = [
    cases.Case("cross_entropy", name, {"classes": classes})
    for name, classes in (("imagenet.loss", 1000), ("cifar10.loss", 10), ("imagenet21k.loss", 21843))
]


def build(case, setting):
    classes = case.layer["classes"]
    shape = (setting.batch, classes)
    generator = torch.Generator(setting.device).manual_seed(2)
    target = torch.randint(classes, (setting.batch,), generator=generator, device=setting.device)
    tensors = {"input": cases.randn(shape, setting).requires_grad_(), "target": target}
    elements = setting.batch * classes
    size = elements * setting.dtype.itemsize

    def function(api, input, target):
        return api.functional.cross_entropy(input, target)

    # subtract the maximum, exponentiate, add; backward: exponentiate, subtract, scale
    cost = {"forward": (4 * elements, size), "backward": (4 * elements, 2 * size)}
    return Problem(cases.text(shape), tensors, function, cost)
