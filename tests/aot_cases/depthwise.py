"""Depthwise convolution, forward: shapes of networks, every option."""

from aot_cases.common import bf16, fp16, fp32, fp64, t
from fastcnn.ops import depthwise_conv2d as ops
from fastcnn.ops.conv_fusion import Pending


def depthwise_conv2d():
    def case(
        n, c, h, kernel, stride=1, dtype=bf16, channels_last=True, multiplier=1, dilation=1, activation=None, shuffle=1,
        fused=(),
    ):  # fmt: skip
        k, padding = c * multiplier, dilation * (kernel - 1) // 2
        size = 2 * [(h + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1]
        x = t(n, c, h, h, dtype=dtype, channels_last=channels_last)
        w = t(k, 1, kernel, kernel, dtype=dtype, channels_last=False)
        vector, wide = t(k, dtype=dtype), fp64 if dtype == fp64 else fp32
        options = dict(shuffle=shuffle)
        if activation is not None:
            options |= dict(pending=Pending(t(c, dtype=wide), t(c, dtype=wide), activation), pivot=t(k, dtype=wide))
        if "residual" in fused:
            options |= dict(residual=t(n, k, *size, dtype=dtype, channels_last=channels_last), activation=("relu", 0.0))
        bias = vector if "bias" in fused else None
        geometry = size, 2 * [stride], 2 * [padding], 2 * [dilation], channels_last
        return lambda: ops.depthwise_forward(x, w, bias, *geometry, "triton", **options)

    yield "mobilenetv2 3x3", case(256, 144, 56, 3)
    yield "mobilenetv2 3x3 chain", case(256, 144, 56, 3, activation="relu6")
    yield "mobilenetv2 3x3 stride 2", case(256, 96, 112, 3, 2)
    yield "mobilenetv2 3x3 stride 2 chain", case(256, 96, 112, 3, 2, activation="relu6")
    yield "efficientnet-b0 5x5", case(128, 240, 28, 5)
    yield "efficientnet-b0 5x5 chain", case(128, 240, 28, 5, activation="silu")
    yield "efficientnet-b0 5x5 stride 2 chain", case(128, 144, 56, 5, 2, activation="silu")
    yield "convnext-t 7x7", case(128, 96, 56, 7, fused=("bias",))
    yield "7x7 stride 2 chain", case(128, 96, 56, 7, 2, activation="relu")
    yield "shufflenet 3x3 stride 2 chain, fp16", case(256, 240, 28, 3, 2, dtype=fp16, activation="none", shuffle=3)
    yield "fp32 5x5 chain", case(64, 120, 28, 5, dtype=fp32, activation="hardswish")
    yield "odd channels, multiplier 2, bias, residual", case(8, 27, 30, 3, multiplier=2, fused=("bias", "residual"))
    yield "contiguous", case(64, 32, 112, 3, channels_last=False)
    yield "contiguous, fp32, pending", case(64, 32, 112, 3, dtype=fp32, channels_last=False, activation="relu6")
    yield "3x3 dilated, multiplier 2, bias, residual", case(
        8, 96, 56, 3, dtype=fp16, dilation=2, multiplier=2, fused=("bias", "residual")
    )  # fmt: skip
    yield "fp64, odd size", case(3, 5, 9, 3, dtype=fp64, activation="silu", fused=("bias",))
    yield "dilated, above 2^31 elements", case(2048, 96, 112, 3, dilation=2, activation="relu6")
