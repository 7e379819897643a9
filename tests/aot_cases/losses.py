"""Losses."""

import torch

from aot_cases.common import fp16, fp32, fp64, t
from fastcnn.ops import cross_entropy as ce


def cross_entropy():
    def both(x, target, weight=None, reduction="mean", smoothing=0.0, dtype=fp32):
        how = (reduction, -100, smoothing)
        loss, lse, mass, total = ce.cross_entropy_forward(x, target, weight, *how, dtype, "triton")
        ce.cross_entropy_backward(loss, x, target, weight, lse, mass, total, *how, "triton")

    def index(*shape):
        return torch.empty(shape, dtype=torch.int64, device="meta")

    yield "imagenet", lambda: both(t(256, 1000), index(256))
    yield "imagenet, smoothing, fp32", lambda: both(t(256, 1000, dtype=fp32), index(256), smoothing=0.1)
    yield "mixup", lambda: both(t(256, 1000), t(256, 1000, dtype=fp32), smoothing=0.1)
    yield "cifar10, one launch", lambda: both(t(128, 10, dtype=fp16), index(128), dtype=fp16)
    yield "cifar100, weights", lambda: both(t(128, 100), index(128), t(100, dtype=fp32), "sum", 0.1)
    yield "imagenet21k", lambda: both(t(512, 21843, dtype=fp32), index(512), reduction="none")
    yield "fp64", lambda: both(t(64, 33, dtype=fp64), index(64), t(33, dtype=fp64), smoothing=0.1, dtype=fp64)
    for channels_last in (True, False):
        x = t(16, 21, 512, 512, channels_last=channels_last)
        yield f"segmentation {channels_last}", lambda x=x: both(x, index(16, 512, 512), t(21, dtype=fp32))
    yield "above 2^31 elements", lambda: both(t(512, 21, 512, 512), index(512, 512, 512))
