"""What draws random numbers."""

import torch

from aot_cases.common import fp16, fp32, fp64, t
from fastcnn.ops import dropout as drop


def dropout():
    def case(*shape, **how):
        x, seed = t(*shape, **how), torch.empty((), dtype=torch.int64, device="meta")
        return lambda: (drop.dropout_forward(x, seed, 0.5, "triton"), drop.dropout_forward_(x, seed, 0.5, "triton"))

    yield "vgg16 head", case(64, 4096)
    yield "efficientnet head fp32", case(256, 1280, dtype=fp32)
    yield "channels_last", case(64, 256, 56, 56)
    yield "channels_last, odd plane, fp32", case(64, 256, 7, 7, dtype=fp32)
    yield "fp16, odd size", case(3, 5, 7, dtype=fp16)
    yield "fp64, odd size", case(3, 5, 7, dtype=fp64)
    yield "above 2^31 elements", case(2048, 64, 224, 224)
    yield "above 2^31 elements, contiguous", case(2048, 64, 224, 224, channels_last=False)
