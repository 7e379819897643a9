"""Pools."""

from aot_cases.common import bf16, fp16, fp32, fp64, t
from fastcnn.ops import adaptive_avg_pool2d as adaptive
from fastcnn.ops import adaptive_max_pool2d as adaptive_max
from fastcnn.ops import avg_pool2d as avg
from fastcnn.ops import fractional_max_pool2d as fractional
from fastcnn.ops import lp_pool2d as lp
from fastcnn.ops import max_pool2d as maxpool
from fastcnn.ops import pending_pool as pool


def max_pool2d():
    def both(x, kernel, stride, padding, dilation=1, ceil_mode=False):
        window = [kernel, kernel, stride, stride, padding, padding, dilation, dilation]
        y, taps = maxpool.max_pool2d_forward(x, window, ceil_mode, True, "triton")
        channels_last = x.dim() == 4 and x.stride(1) == 1
        maxpool.max_pool2d_backward(y, taps, x.shape, channels_last, window, "triton")

    yield "resnet50 stem", lambda: both(t(256, 64, 112, 112), 3, 2, 1)
    yield (
        "resnet50 stem, evaluation",
        lambda: maxpool.max_pool2d_forward(t(256, 64, 112, 112), [3, 3, 2, 2, 1, 1, 1, 1], False, False, "triton"),
    )
    yield "resnet50 stem, contiguous fp32", lambda: both(t(64, 64, 112, 112, dtype=fp32, channels_last=False), 3, 2, 1)
    yield "vgg16", lambda: both(t(64, 64, 224, 224), 2, 2, 0)
    yield "lenet fp32", lambda: both(t(64, 6, 28, 28, dtype=fp32, channels_last=False), 2, 2, 0)
    yield "googlenet 3x3 stride 1", lambda: both(t(64, 192, 28, 28), 3, 1, 1)
    yield "googlenet ceil", lambda: both(t(64, 480, 28, 28), 3, 2, 0, ceil_mode=True)
    yield "yolo spp 13x13: loops", lambda: both(t(8, 512, 13, 13), 13, 1, 6)
    yield "dilated, two-byte taps", lambda: both(t(8, 64, 65, 65, dtype=fp32), 17, 2, 8, 2)
    yield "above 2^31 elements", lambda: both(t(2048, 64, 224, 224), 3, 2, 1)
    yield "fp16, unbatched", lambda: both(t(7, 33, 35, dtype=fp16), 3, 2, 1)
    yield "fp64, odd size", lambda: both(t(3, 5, 9, 7, dtype=fp64), 3, 2, 1)


def avg_pool2d():
    def both(x, kernel, stride, padding, count_pad=True, override=None):
        window = [kernel, kernel, stride, stride, padding, padding, 1, 1]
        y = avg.avg_pool2d_forward(x, window, False, count_pad, override, "triton")
        channels_last = x.dim() == 4 and x.stride(1) == 1
        avg.avg_pool2d_backward(y, x.shape, channels_last, window, count_pad, override, "triton")

    yield "densenet transition", lambda: both(t(64, 128, 56, 56), 2, 2, 0)
    yield (
        "densenet transition, contiguous fp32",
        lambda: both(t(64, 128, 56, 56, dtype=fp32, channels_last=False), 2, 2, 0),
    )
    yield "lenet", lambda: both(t(64, 6, 28, 28, channels_last=False), 2, 2, 0)
    yield "inception 3x3 stride 1", lambda: both(t(32, 288, 35, 35), 3, 1, 1)
    yield "inception, padding not counted", lambda: both(t(32, 288, 35, 35), 3, 1, 1, False)
    yield "override", lambda: both(t(32, 64, 35, 35, dtype=fp32), 3, 2, 1, True, 7)
    yield "8x8: loops", lambda: both(t(32, 2048, 8, 8), 8, 8, 0)
    yield "above 2^31 elements", lambda: both(t(2048, 64, 224, 224), 2, 2, 0)
    yield "fp16, unbatched", lambda: both(t(7, 33, 35, dtype=fp16), 3, 2, 1)
    yield "fp64, odd size", lambda: both(t(3, 5, 9, 7, dtype=fp64), 3, 2, 1)


def adaptive_avg_pool2d():
    def both(x, size):
        y = adaptive.adaptive_avg_pool2d_forward(x, size, "triton")
        adaptive.adaptive_avg_pool2d_backward(y, x.shape, x.dim() == 4 and x.stride(1) == 1, "triton")

    yield "resnet50 global", lambda: both(t(256, 2048, 7, 7), (1, 1))
    yield "resnet50 global, contiguous fp32", lambda: both(t(64, 2048, 7, 7, dtype=fp32, channels_last=False), (1, 1))
    yield "squeeze-excite", lambda: both(t(128, 96, 112, 112), (1, 1))
    yield "squeeze-excite, contiguous", lambda: both(t(128, 96, 112, 112, channels_last=False), (1, 1))
    yield "vgg16", lambda: both(t(64, 512, 7, 7), (7, 7))
    yield "alexnet, contiguous", lambda: both(t(64, 256, 13, 13, channels_last=False), (6, 6))
    yield "pspnet", lambda: both(t(8, 2048, 60, 60), (3, 3))
    yield "above 2^31 elements, global", lambda: both(t(2048, 64, 224, 224), (1, 1))
    yield "above 2^31 elements", lambda: both(t(2048, 64, 224, 224), (6, 6))
    yield "fp16, unbatched", lambda: both(t(7, 33, 35, dtype=fp16), (1, 1))
    for size in ((1, 1), (4, 5)):
        yield f"fp64, odd size {size}", lambda size=size: both(t(3, 5, 9, 7, dtype=fp64), size)


def adaptive_max_pool2d():
    def both(x, size):
        y, taps = adaptive_max.adaptive_max_pool2d_forward(x, size, True, "triton")
        channels_last = x.dim() == 4 and x.stride(1) == 1
        adaptive_max.adaptive_max_pool2d_backward(y, taps, x.shape, channels_last, "triton")

    yield "cbam global", lambda: both(t(64, 512, 28, 28), (1, 1))
    yield "cbam global, contiguous fp32", lambda: both(t(64, 512, 28, 28, dtype=fp32, channels_last=False), (1, 1))
    yield (
        "global, evaluation",
        lambda: adaptive_max.adaptive_max_pool2d_forward(t(64, 512, 28, 28), (1, 1), False, "triton"),
    )
    yield "spp 4x4", lambda: both(t(64, 256, 13, 13), (4, 4))
    yield "spp 4x4, contiguous fp32", lambda: both(t(64, 256, 13, 13, dtype=fp32, channels_last=False), (4, 4))
    yield (
        "roi 7x7 of 60x60, evaluation",
        lambda: adaptive_max.adaptive_max_pool2d_forward(t(8, 256, 60, 60), (7, 7), False, "triton"),
    )
    yield "above 2^31 elements, global", lambda: both(t(2048, 64, 224, 224), (1, 1))
    yield "above 2^31 elements", lambda: both(t(2048, 64, 224, 224), (6, 6))
    for size in ((1, 1), (4, 5)):
        yield f"fp64, odd size {size}", lambda size=size: both(t(3, 5, 9, 7, dtype=fp64), size)


def pending_pool():
    def case(pool, *shape, dtype=bf16, activation="relu", add=False):
        x, vector = t(*shape, dtype=dtype), t(shape[1], dtype=fp64 if dtype == fp64 else fp32)

        def call():
            y, taps = pool.forward(x, "triton", (vector, vector, activation, 0.0))
            how = activation, 0.0, x if add else None, add
            pool.launch_backward(y, taps, x, vector, vector, *how)

        return call

    stem = pool.MaxPool([3, 3, 2, 2, 1, 1, 1, 1], False)
    yield "resnet50 stem", case(stem, 256, 64, 112, 112)
    yield "stem, silu, fp32, other readers", case(stem, 64, 48, 112, 112, dtype=fp32, activation="silu", add=True)
    yield "vgg16", case(pool.MaxPool([2, 2, 2, 2, 0, 0, 1, 1], False), 64, 64, 224, 224)
    yield "3x3 stride 1, fp16", case(pool.MaxPool([3, 3, 1, 1, 1, 1, 1, 1], False), 8, 96, 28, 28, dtype=fp16)
    yield "stem above 2^31 elements", case(stem, 2048, 64, 224, 224)
    yield "stem, fp64", case(stem, 3, 5, 9, 7, dtype=fp64)
    mean = pool.AdaptiveAvgPool([1, 1])
    yield "mobilenetv2 head", case(mean, 256, 1280, 7, 7, activation="relu6")
    yield "efficientnet squeeze", case(mean, 256, 144, 56, 56, activation="silu", add=True)
    yield "mean above 2^31 elements", case(mean, 2048, 64, 224, 224, activation="silu")
    yield "mean, fp64", case(mean, 3, 5, 9, 7, dtype=fp64, activation="silu")


def fractional_max_pool2d():
    def both(x, kernel, size):
        samples = t(1 if x.dim() == 3 else x.shape[0], x.shape[-3], 2, dtype=x.dtype)
        y, taps = fractional.fractional_max_pool2d_forward(x, samples, [kernel] * 2, size, True, "triton")
        channels_last = x.dim() == 4 and x.stride(1) == 1
        fractional.fractional_max_pool2d_backward(y, samples, taps, x.shape, channels_last, [kernel] * 2, "triton")

    yield "graham cifar", lambda: both(t(64, 160, 74, 74), 2, [52, 52])
    yield (
        "graham cifar, contiguous fp32",
        lambda: both(t(64, 160, 74, 74, dtype=fp32, channels_last=False), 2, [52, 52]),
    )
    yield "3x3", lambda: both(t(64, 320, 36, 36), 3, [25, 25])
    yield "above 2^31 elements", lambda: both(t(2048, 64, 224, 224), 2, [112, 112])
    yield "fp16, unbatched", lambda: both(t(7, 33, 35, dtype=fp16), 2, [20, 21])
    yield "fp64, odd size", lambda: both(t(3, 5, 9, 7, dtype=fp64), 2, [6, 5])


def lp_pool2d():
    def both(x, norm_type, kernel, stride, ceil_mode=False):
        window = [kernel, kernel, stride, stride, 0, 0, 1, 1]
        y = lp.lp_pool2d_forward(x, norm_type, window, ceil_mode, "triton")
        lp.lp_pool2d_backward(y, x, y, norm_type, window, "triton")

    yield "2x2 norm 2", lambda: both(t(64, 128, 56, 56), 2.0, 2, 2)
    yield "2x2 norm 2, contiguous fp32", lambda: both(t(64, 128, 56, 56, dtype=fp32, channels_last=False), 2.0, 2, 2)
    yield "3x3 norm 3, overlapping", lambda: both(t(64, 96, 55, 55), 3.0, 3, 2)
    yield "3x3 norm 1.5, ceil", lambda: both(t(64, 96, 56, 56), 1.5, 3, 2, True)
    yield "sums", lambda: both(t(64, 96, 56, 56), 1.0, 2, 2)
    yield "7x7 norm 4: loops", lambda: both(t(8, 64, 56, 56), 4.0, 7, 1)
    yield "above 2^31 elements", lambda: both(t(2048, 64, 224, 224), 2.0, 2, 2)
    yield "fp16, unbatched", lambda: both(t(7, 33, 35, dtype=fp16), 2.0, 3, 2)
    yield "fp64, odd size", lambda: both(t(3, 5, 9, 7, dtype=fp64), 2.5, 3, 2)
