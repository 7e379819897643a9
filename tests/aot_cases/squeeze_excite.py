"""Squeeze-excite: its own kernels, and the convolutions that read a gated activation."""

from aot_cases.common import bf16, fp32, fp64, t
from fastcnn.ops import conv2d as conv
from fastcnn.ops import squeeze_excite as ops
from fastcnn.ops.conv_fusion import Correction, Gated, Pending


def _gate(n, c, s, size, kinds=("silu", "silu", "sigmoid"), dtype=bf16, channels_last=True):
    """The gate, forward and backward, with the gradient as a pass of its own."""
    wide = fp64 if dtype == fp64 else fp32
    x = t(n, c, size, size, dtype=dtype, channels_last=channels_last)
    scale, shift = t(c, dtype=wide), t(c, dtype=wide)
    layers = ops.Layers(t(s, c, 1, 1, dtype=wide), t(s, dtype=wide), t(c, s, 1, 1, dtype=wide), t(c, dtype=wide))
    form = ops.Form(kinds[0], 0.0, *kinds[1:])

    def call():
        sums = ops.pooled(x, scale, shift, form, "triton")
        squeezed, excited, _ = ops.gate_forward(sums, layers, form, dtype, size * size, "triton")
        saved, needs = (sums, squeezed, excited), (True,) * 5
        found = ops.backward(x, x, scale, shift, layers, saved, form, needs, "triton")
        ops.gradient(x, Gated(x, found.gate, found.add, scale, shift, form.activation), "triton")

    return call


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
    yield "gate, efficientnet 32", _gate(256, 32, 8, 112)
    yield "gate, efficientnet 1152", _gate(256, 1152, 48, 7)
    yield "gate, mobilenetv3 120, small batch", _gate(8, 120, 32, 28, ("hardswish", "relu", "hardsigmoid"))
    yield "gate, senet 2048", _gate(64, 2048, 128, 7, ("none", "relu", "sigmoid"))
    yield "gate, contiguous fp32", _gate(32, 96, 4, 56, dtype=fp32, channels_last=False)
    yield "gate, fp64", _gate(4, 48, 12, 14, dtype=fp64)
    for n, c, k, size in ((256, 32, 16, 112), (256, 96, 24, 56), (256, 240, 40, 28), (256, 1152, 320, 7)):
        yield f"efficientnet {c} to {k}", _gated(n, c, k, size)
    yield "mobilenetv3 hardswish, fp32", _gated(64, 120, 40, 28, "hardswish", fp32)
    yield "fp64", _gated(4, 48, 24, 7, "relu", fp64)
