"""elementwise_loss: the losses that compare element by element, gradient of the input, mean over everything."""

import math

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

# an autoencoder's images, a detector's boxes (SSD300), segmentation masks, labels of which an image has many (COCO)
CASES = [
    cases.Case("elementwise_loss", name, {"function": function, "shape": shape, "work": math.prod(shape)})
    for name, function, shape in (
        ("autoencoder.loss", "mse_loss", (3, 224, 224)),
        ("ssd.boxes", "smooth_l1_loss", (8732, 4)),
        ("unet.masks", "binary_cross_entropy_with_logits", (1, 256, 256)),
        ("coco.labels", "binary_cross_entropy_with_logits", (80,)),
        ("depth.loss", "l1_loss", (1, 240, 320)),
        ("ragged.c17", "huber_loss", (17, 57, 55)),
    )
]


def build(case, setting):
    name, shape = case.layer["function"], (setting.batch, *case.layer["shape"])
    tensors = {
        "input": cases.randn(shape, setting).requires_grad_(),
        "target": cases.randn(shape, setting, seed=1).sigmoid(),
    }
    elements = math.prod(shape)
    size = elements * setting.dtype.itemsize

    def function(api, input, target):
        return getattr(api.functional, name)(input, target)

    # a difference, a square, a sum; an exponential and a logarithm count as one each
    operations = 8 if name.startswith("binary") else 3
    cost = {"forward": (operations * elements, 2 * size), "backward": (operations * elements, 3 * size)}
    return Problem(f"{name} {cases.text(shape)}", tensors, function, cost)
