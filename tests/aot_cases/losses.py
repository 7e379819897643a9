"""Losses."""

import torch

from aot_cases.common import fp16, fp32, fp64, t
from fastcnn.ops import cross_entropy as ce
from fastcnn.ops import elementwise_loss as el
from fastcnn.ops import multi_margin_loss as mm


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


def elementwise_loss():
    def both(x, target, kind, beta=0.0, weight=None, pos=None, reduction="mean", need_target=False):
        dtype = torch.promote_types(x.dtype, target.dtype)
        loss, total = el.elementwise_loss_forward(x, target, weight, pos, kind, beta, reduction, dtype, "triton")
        how = (kind, beta, reduction, True, need_target, "triton")
        el.elementwise_loss_backward(loss, x, target, weight, pos, total, *how)

    image = (32, 64, 56, 56)
    for kind, beta in (("mse", 0.0), ("smooth_l1", 0.0), ("smooth_l1", 1.0), ("huber", 0.5), ("bce", 0.0)):
        yield f"{kind} {beta}", lambda k=kind, b=beta: both(t(*image), t(*image), k, b)
    yield (
        "mse, fp32, both gradients",
        lambda: both(t(*image, dtype=fp32), t(*image, dtype=fp32), "mse", need_target=True),
    )
    yield "mse, weights", lambda: both(t(*image), t(*image), "mse", weight=t(*image, dtype=fp32))
    yield "mse, fp64, one launch", lambda: both(t(8, 10, dtype=fp64), t(8, 10, dtype=fp64), "mse", reduction="sum")
    labels = (256, 80)
    yield (
        "bce of labels, weights per class",
        lambda: both(t(*labels), t(*labels, dtype=fp32), "bce", pos=t(80, dtype=fp32), need_target=True),
    )
    yield (
        "bce of masks",
        lambda: both(
            t(*image), t(*image, dtype=fp16), "bce", 0.0, t(32, 1, 1, 1, dtype=fp32), t(64, 1, 1, dtype=fp32), "none"
        ),
    )
    yield "bce above 2^31 elements", lambda: both(t(2**17, 2**15), t(2**17, 2**15), "bce", pos=t(2**15, dtype=fp32))


def multi_margin_loss():
    def both(x, weight=None, p=1, reduction="mean"):
        target = torch.empty(x.shape[:1], dtype=torch.int64, device="meta")
        loss = mm.multi_margin_loss_forward(x, target, weight, p, 1.0, reduction, x.dtype, "triton")
        mm.multi_margin_loss_backward(loss, x, target, weight, p, 1.0, reduction, "triton")

    yield "imagenet", lambda: both(t(256, 1000))
    yield "imagenet, fp32, squared", lambda: both(t(256, 1000, dtype=fp32), p=2)
    yield "cifar10, weights", lambda: both(t(128, 10, dtype=fp16), t(10, dtype=fp32), reduction="sum")
    yield "imagenet21k", lambda: both(t(512, 21843), reduction="none")
    yield "fp64", lambda: both(t(64, 33, dtype=fp64), t(33, dtype=fp64))
    yield "above 2^31 elements", lambda: both(t(2**21, 2**11))
