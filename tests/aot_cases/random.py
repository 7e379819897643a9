"""What draws random numbers."""

import torch

from aot_cases.common import bf16, fp16, fp32, fp64, t
from fastcnn.ops import dropout as drop
from fastcnn.ops import feature_dropout as feature


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


def feature_dropout():
    def case(*shape, leading=2, residual=False, **how):
        x, seed = t(*shape, **how), torch.empty((), dtype=torch.int64, device="meta")
        return lambda: feature.feature_dropout_forward(x, x if residual else None, seed, 0.2, leading, "triton")

    yield "dropout2d nhwc", case(256, 256, 56, 56)
    yield "dropout2d nhwc, odd channels fp32", case(64, 17, 57, 55, dtype=fp32)
    yield "dropout2d nchw", case(256, 256, 56, 56, channels_last=False)
    yield "dropout2d nchw, small planes", case(256, 2048, 7, 7, channels_last=False)
    yield "dropout3d fp16", case(8, 32, 16, 56, 56, dtype=fp16)
    yield "dropout1d fp64, odd size", case(5, 7, 33, dtype=fp64)
    yield "dropout2d fp64 nhwc", case(5, 12, 9, 7, dtype=fp64)
    yield "dropout2d nhwc above 2^31 elements", case(2048, 64, 224, 224)
    for dtype in (bf16, fp32, fp64):
        yield f"stochastic depth {dtype}", case(256, 256, 56, 56, leading=1, residual=True, dtype=dtype)
    yield "stochastic depth, mode batch", case(256, 256, 56, 56, leading=0, residual=True)
    yield "stochastic depth, mode batch, above 2^31 elements", case(2048, 64, 224, 224, leading=0, residual=True)
    yield "stochastic depth, backward", case(256, 256, 56, 56, leading=1)
