"""A residual join made in the 1x1 convolution that reads it."""

import torch

from aot_cases.common import bf16, fp16, fp32, t
from fastcnn.ops.conv2d_join import conv2d_join as run
from fastcnn.ops.pending import Expression


def conv2d_join():
    def case(n, c, k, size, affine=False, out="relu", dtype=bf16, pivot=True):
        vectors = lambda: (t(c, dtype=fp32), t(c, dtype=fp32))
        image = lambda: t(n, c, size, size, dtype=dtype)
        right = vectors() if affine else (None, None)
        x = image()
        expression = Expression(x, *vectors(), "none", 0.0, None, image(), *right, out)
        weight = t(k, c, 1, 1, dtype=dtype)
        return lambda: run(expression, weight, torch.empty_like(x), t(k, dtype=fp32) if pivot else None)

    yield "resnet50 256 to 64", case(256, 256, 64, 56)
    yield "resnet50 512 to 128, both sides affine", case(256, 512, 128, 28, affine=True)
    yield "resnet50 1024 to 256, both sides affine", case(256, 1024, 256, 14, affine=True)
    yield "mobilenetv2 24 to 144, no activation", case(256, 24, 144, 56, out="none", dtype=fp16, pivot=False)
    yield "beyond 2^31 elements", case(2048, 256, 256, 72, affine=True)
