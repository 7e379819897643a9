"""Pools."""

from aot_cases.common import fp16, fp32, fp64, t
from fastcnn.ops import adaptive_avg_pool2d as adaptive
from fastcnn.ops import avg_pool2d as avg
from fastcnn.ops import max_pool2d as maxpool


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
