"""multi_margin_loss: the multi-class hinge over the classes of ImageNet, CIFAR-10 and ImageNet-21k."""

import torch

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

CASES = [
    cases.Case("multi_margin_loss", name, {"classes": classes, "work": classes})
    for name, classes in (
        ("imagenet.loss", 1000),
        ("cifar10.loss", 10),
        ("imagenet21k.loss", 21843),
        ("ragged.c17", 4097),
    )
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
        return api.functional.multi_margin_loss(input, target)

    cost = {"forward": (3 * elements, size), "backward": (3 * elements, 2 * size)}
    return Problem(cases.text(shape), tensors, function, cost)
