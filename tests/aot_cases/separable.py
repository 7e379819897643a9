"""Depthwise separable convolution in one kernel: every tile, at the edge of its registers."""

from aot_cases.common import bf16, fp16, fp32, t
from aot_cases.convolution import tf32
from fastcnn.ops import separable_conv2d as ops


def separable_conv2d():
    def case(n, c, k, size, filter, stride=1, dilation=1, dtype=bf16, bias=False):
        x, out = t(n, c, size, size, dtype=dtype), 2 * [-(-size // stride)]
        w1 = t(c, 1, filter, filter, dtype=dtype, channels_last=False)
        w2 = t(k, c, 1, 1, dtype=dtype, channels_last=False)
        b1, b2 = (t(c, dtype=dtype), t(k, dtype=dtype)) if bias else (None, None)
        geometry = 2 * [stride], 2 * [dilation * (filter // 2)], 2 * [dilation]

        def call():
            with tf32(dtype == fp32):
                ops.separable_conv2d_forward(x, w1, b1, w2, b2, out, *geometry, True, "triton")

        return call

    yield "mobilenet_v1 32 to 64", case(256, 32, 64, 112, 3)
    yield "mobilenet_v1 128 to 128, biases", case(256, 128, 128, 56, 3, bias=True)
    yield "mobilenet_v1 256 to 512 stride 2", case(256, 256, 512, 28, 3, stride=2)
    yield "5x5 240 to 80", case(64, 240, 80, 28, 5)
    yield "5x5 stride 2, 232 to 120", case(64, 232, 120, 28, 5, stride=2, bias=True)
    yield "fp16, dilated, 24 to 120", case(64, 24, 120, 57, 3, dilation=2, dtype=fp16, bias=True)
    yield "above 2^31 elements", case(2048, 64, 256, 112, 3)
    yield "tf32 64 to 128", case(64, 64, 128, 56, 3, dtype=fp32)
    yield "tf32 128 to 256 stride 2", case(64, 128, 256, 56, 3, stride=2, dtype=fp32)
