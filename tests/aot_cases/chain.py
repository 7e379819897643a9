"""The fused training chain: what is computed between its convolutions."""

import torch

from aot_cases.common import bf16, fp16, fp32, fp64, t
from fastcnn.ops import batch_norm_affine, batch_statistics, dense_block, pending, shared_batch_norm


def pending_activation():
    def case(*shape, dtype=bf16, channels_last=True, affine=True, activation="none", gate=0, right=None, out="none"):
        n, c = shape[:2]
        x = t(*shape, dtype=dtype, channels_last=channels_last)
        vector = t(c, dtype=fp64 if dtype == fp64 else fp32)
        gate = t(n, gate, dtype=dtype) if gate else None
        scale = vector if affine else None
        right_scale = vector if right == "pending" else None
        e = (x, scale, scale, activation, 0.0, gate, x if right else None, right_scale, right_scale, out)

        def call():
            pending.pending_forward(*e, "triton")
            for scaled, add in ((False, None), (True, x)):
                pending.pending_backward(
                    x, add, x, scale, scale, activation, 0.0, gate, right is not None, x if right else None,
                    right_scale, x, out, gate is not None, scaled, "triton",
                )  # fmt: skip

        return call

    join = dict(right="plain", out="relu")
    for name, shape in (("resnet50 layer1", (256, 256, 56, 56)), ("resnet50 layer4", (256, 2048, 7, 7))):
        yield f"{name}, join", case(*shape, **join)
        yield f"{name}, join of two", case(*shape, right="pending", out="relu")
    yield "resnet50 stem, relu", case(256, 64, 112, 112, activation="relu")
    yield "contiguous, join of two", case(256, 256, 56, 56, channels_last=False, right="pending", out="relu")
    yield "mobilenetv2 24 channels, join", case(256, 24, 56, 56, right="plain")
    yield "efficientnet gate", case(256, 240, 28, 28, activation="silu", gate=240)
    yield "efficientnet gate, 7x7", case(256, 1152, 7, 7, activation="silu", gate=1152)
    yield "drop-path", case(256, 40, 28, 28, gate=1, right="plain")
    yield "gelu", case(64, 96, 56, 56, activation="gelu")
    yield "above 2^31 elements", case(2048, 64, 224, 224, activation="silu", gate=64, right="pending", out="relu")
    for dtype in (fp16, fp32, fp64):
        everything = dict(activation="relu6", gate=64, right="pending", out="relu")
        yield f"{dtype}, everything", case(64, 64, 56, 56, dtype=dtype, **everything)

    def passes():
        y, vector = t(256, 256, 56, 56), t(256, dtype=fp32)
        pending.sums(y, y, "triton")
        pending.corrected(y, y, vector, vector, vector, "triton")
        pending.statistics(y, "triton")

    yield "sums, correction, statistics", passes


def batch_norm_vectors():
    def case(c, dtype=fp32, parameters=fp32, running=True, counted=False, training=True):
        v, w = t(c, dtype=dtype), None if parameters is None else t(c, dtype=parameters)
        rows = t(dtype=fp32) if counted else 802816
        moved = batch_norm_affine.Running(w, w, w, rows, 0.1, t(dtype=torch.int64)) if running else None
        y, sums = t(256, c, 14, 14, dtype=fp64 if dtype == fp64 else bf16), t(392, 2, c, dtype=dtype)

        def call():
            batch_norm_affine.affine(v, v, w, w, 1e-5, "triton", moved)
            if running and not counted:
                batch_statistics.affine_from_sums(y, sums, v, w, w, 1e-5, "triton", moved)
            elif training:
                batch_statistics.from_sums(y, sums, v)
            batch_norm_affine.affine_backward(v, v, v, v, w, 802816, training, None, "triton")
            if training:
                batch_norm_affine.Ahead(v, v, w, 802816, training).take(sums)

        return call

    yield "256", case(256)
    yield "frozen", case(256, running=False, training=False)
    yield "all processes", case(256, counted=True)
    yield "no parameters", case(30, parameters=None, running=False)
    yield "bf16 parameters", case(2048, parameters=bf16)
    yield "fp64", case(64, fp64, fp64)


def dense_block_passes():
    """What a dense block computes beside its convolutions, which conv2d_fused has."""

    def case(n, channels, made, total, size, dtype=bf16, channels_last=True, parameters=fp32):
        wide = fp64 if dtype == fp64 else fp32
        buffer = t(n, total, size, size, dtype=dtype, channels_last=channels_last)
        images = buffer[:, channels : channels + made]
        vector = lambda c, dtype=wide: t(c, dtype=dtype)
        sums, parts = t(64, 2, made, dtype=wide), t(64, 2, total, dtype=wide)
        weight = vector(channels + made, parameters)
        running = batch_norm_affine.Running(weight, weight, None, n * size * size, 0.1, t(dtype=torch.int64))

        def call():
            statistics = shared_batch_norm.Statistics(buffer, "triton")
            x = t(n, channels, size, size, dtype=dtype, channels_last=channels_last)
            dense_block.enter(x, buffer, statistics, vector(channels))
            statistics.add(images, sums, vector(made))
            statistics.affine(weight, weight, 1e-5, running)
            gradients = shared_batch_norm.Gradients(vector(total), running.rows, vector(total), None, "triton")
            gradients.add(*parts.unbind(1), vector(total), vector(total, parameters))
            shared_batch_norm.affine_backward(*(vector(total) for _ in range(4)), vector(total, parameters), "triton")
            dense_block.leave(buffer, buffer, channels, gradients, "triton")

        return call

    yield "densenet121 block 1", case(256, 64, 32, 256, 56)
    yield "densenet121 block 4, bf16 parameters", case(256, 512, 32, 1024, 7, parameters=bf16)
    yield "ragged channels", case(64, 20, 12, 44, 28)
    yield "contiguous", case(256, 64, 32, 256, 56, channels_last=False)
    yield "above 2^31 elements", case(1024, 64, 32, 1024, 56)
    yield "fp32", case(64, 64, 32, 256, 56, fp32)
    yield "fp64", case(64, 64, 32, 256, 56, fp64, parameters=fp64)
