"""Squeeze-excite: its own kernels, and the convolutions that read a gated activation."""

from aot_cases.common import bf16, fp32, fp64, t
from fastcnn.ops import conv2d as conv
from fastcnn.ops.conv_fusion import Correction, Pending


def _gated(n, c, k, size, activation="silu", dtype=bf16):
    """The 1x1 convolution after a gate, as chain.conv_batch_norm runs it: forward and gradient of the weight."""
    vector = lambda channels: t(channels, dtype=fp64 if dtype == fp64 else fp32)
    x, y, w = t(n, c, size, size, dtype=dtype), t(n, k, size, size, dtype=dtype), t(k, c, 1, 1, dtype=dtype)
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    pending = Pending(vector(c), vector(c), activation, gate=t(n, c, dtype=dtype))
    correction = Correction(y, vector(k), vector(k), vector(k))

    def call():
        conv.conv2d_forward(
            x, w, None, [size] * 2, *geometry, True, "conv", "triton", pending=pending, pivot=vector(k)
        )  # fmt: skip
        conv.conv2d_backward_weight(y, x, w, *geometry, "conv", "triton", correction=correction, pending=pending)

    return call


def squeeze_excite():
    for n, c, k, size in ((256, 32, 16, 112), (256, 96, 24, 56), (256, 240, 40, 28), (256, 1152, 320, 7)):
        yield f"efficientnet {c} to {k}", _gated(n, c, k, size)
    yield "mobilenetv3 hardswish, fp32", _gated(64, 120, 40, 28, "hardswish", fp32)
    yield "fp64", _gated(4, 48, 24, 7, "relu", fp64)
