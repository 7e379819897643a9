"""Depthwise convolution, forward: shapes of MobileNetV2 and EfficientNet-B0, large filters, every option."""

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

    yield "contiguous", case(64, 32, 112, 3, channels_last=False)
    yield "contiguous, fp32, pending", case(64, 32, 112, 3, dtype=fp32, channels_last=False, activation="relu6")
    yield "3x3 dilated, multiplier 2, bias, residual", case(
        8, 96, 56, 3, dtype=fp16, dilation=2, multiplier=2, fused=("bias", "residual")
    )  # fmt: skip
    yield "fp64, odd size", case(3, 5, 9, 3, dtype=fp64, activation="silu", fused=("bias",))
    yield "dilated, above 2^31 elements", case(2048, 96, 112, 3, dilation=2, activation="relu6")
