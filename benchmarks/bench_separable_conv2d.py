"""separable_conv2d: MobileNet's layers without what stands between their convolutions, against two calls of conv2d."""

import math

import torch
import torch.nn.functional

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.harness import Problem

# channels in and out, size, filter, stride
LAYERS = {
    "mobilenet_v1.1": (32, 64, 112, 3, 1),
    "mobilenet_v1.3": (128, 128, 56, 3, 1),
    "mobilenet_v1.4": (128, 256, 56, 3, 2),
    "mobilenet_v1.7": (512, 512, 14, 3, 1),
    "ragged.c17": (17, 33, 57, 5, 2),
}


def _case(name, channels, filters, size, filter, stride):
    out = -(-size // stride)
    layer = {"op": "separable_conv2d", "input": [channels, size, size], "output": [filters, out, out]}
    return cases.Case("separable_conv2d", name, {**layer, "filter": filter, "stride": stride})


CASES = [_case(name, *layer) for name, layer in LAYERS.items()]


def build(case, setting):
    layer = case.layer
    shape, (K, P, Q), R, stride = (setting.batch, *layer["input"]), layer["output"], layer["filter"], layer["stride"]
    C = shape[1]
    tensors = {
        "input": cases.randn(shape, setting).requires_grad_(),
        "depthwise_weight": cases.randn((C, 1, R, R), setting, seed=1, scale=1 / R).requires_grad_(),
        "pointwise_weight": cases.randn((K, C, 1, 1), setting, seed=2, scale=1 / math.sqrt(C)).requires_grad_(),
    }

    def function(api, input, depthwise_weight, pointwise_weight):
        if api.functional is torch.nn.functional:
            z = api.functional.conv2d(input, depthwise_weight, None, stride, R // 2, 1, C)
            return api.functional.conv2d(z, pointwise_weight)
        return api.functional.separable_conv2d(input, depthwise_weight, pointwise_weight, None, stride, R // 2)

    pixels = setting.batch * P * Q
    size = setting.dtype.itemsize
    x, y, z = (n * size for n in (math.prod(shape), pixels * K, pixels * C))
    flops = 2 * pixels * C * (R * R + K)
    # backward makes z again, and its gradient lies in memory between the two convolutions' gradients
    cost = {"forward": (flops, x + y), "backward": (2 * flops, 3 * x + 2 * y + 4 * z)}
    return Problem(f"{cases.text(shape)}, {R}x{R} stride {stride}, to {K}", tensors, function, cost)
