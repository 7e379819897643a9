"""Both gradients of a depthwise convolution."""

from aot_cases.common import bf16, fp16, fp32, fp64, t
from fastcnn.ops.conv_fusion import Correction, Gated, Pending
from fastcnn.ops.depthwise_conv2d_backward_launch import backward


def depthwise_conv2d_backward():
    def case(
        n, c, size, filter, stride=1, dilation=1, multiplier=1, activation=None, gated=None, corrected=True, shuffle=1,
        add=False, bias=False, dtype=bf16, channels_last=True,
    ):  # fmt: skip
        padding = dilation * (filter - 1) // 2
        out, k = -(-size // stride), c * multiplier
        image = lambda channels, size: t(n, channels, size, size, dtype=dtype, channels_last=channels_last)
        vector = lambda *shape: t(*shape, dtype=fp64 if dtype == fp64 else fp32)
        x, dy = image(c, size), image(k, out)
        options = dict(shuffle=shuffle, add=image(c, size) if add else None)
        if corrected:
            options["correction"] = Correction(dy, vector(k), vector(k), vector(k))
        if gated is not None:
            options["gated"] = Gated(dy, vector(n, k), vector(n, k), vector(k), vector(k), gated)
        if activation is not None:
            options["pending"] = Pending(vector(c), vector(c), activation, scaled=False)
        geometry = ((stride,) * 2, (padding,) * 2, (dilation,) * 2)
        weight = t(k, 1, filter, filter, dtype=dtype, channels_last=False)
        return lambda: backward(dy, x, weight, *geometry, channels_last, (True, True, bias), **options)

    everything = dict(activation="silu", gated="silu", add=True)
    yield "mobilenetv2 3x3", case(256, 144, 56, 3, activation="relu6")
    yield "mobilenetv2 3x3 stride 2", case(256, 96, 112, 3, 2, activation="relu6")
    yield "shufflenet, channels in twos", case(256, 58, 28, 3, activation="relu", shuffle=2)
    yield "3x3, all", case(256, 480, 14, 3, **everything, bias=True)
    yield "3x3 stride 2, all", case(256, 240, 28, 3, 2, **everything)
    yield "5x5, all", case(256, 240, 28, 5, **everything, bias=True)
    yield "mnasnet 5x5 stride 2", case(256, 72, 56, 5, 2, activation="relu")
    yield "5x5 stride 2, all but a gate", case(256, 144, 55, 5, 2, activation="silu", add=True, bias=True)
    yield "7x7, all, fp16", case(64, 96, 56, 7, **everything, bias=True, dtype=fp16)
    yield "fp32 5x5, all", case(64, 96, 28, 5, **everything, dtype=fp32)
    yield "beyond 2^31 elements", case(2048, 32, 224, 3, activation="silu", add=True)
    yield "dilation", case(64, 256, 28, 3, dilation=2, activation="relu")
    yield (
        "multiplier 2, nchw, plain",
        case(64, 64, 28, 3, multiplier=2, corrected=False, bias=True, channels_last=False),
    )
    yield "31x31, fp16", case(64, 128, 56, 31, dtype=fp16, corrected=False, bias=True)
    yield "fp64, all", case(8, 24, 14, 3, 2, activation="silu", gated="silu", shuffle=2, add=True, dtype=fp64)
