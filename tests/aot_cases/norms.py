"""Norms."""

from aot_cases.common import bf16, fp16, fp32, fp64, t
from fastcnn.ops import batch_norm as bn
from fastcnn.ops import group_norm as gn
from fastcnn.ops import layer_norm as ln
from fastcnn.ops import local_response_norm as lrn


def batch_norm():
    def both(x, training, parameters=fp32, affine=True, running=True, activation=None, residual=False):
        C = x.shape[1]
        w, m = t(C, dtype=parameters), t(C, dtype=fp64 if x.dtype == fp64 else fp32)
        weight = w if affine else None
        stats = w if running else None
        r = x if residual else None
        masked = residual and activation in ("relu", "relu6", "leaky_relu")
        if training:
            *_, mask = bn.batch_norm_forward(
                x, weight, weight, stats, stats, r, 0.1, 1e-5, activation, masked, "triton"
            )  # fmt: skip
        else:
            _, mask = bn.batch_norm_forward_eval(x, weight, weight, w, w, r, 1e-5, activation, masked, "triton")
            m = w
        bn.batch_norm_backward(
            x, x, weight, weight, m, m, None if masked else r, mask if masked else None, training, 1e-5, activation,
            True, affine, residual and activation is not None, "triton",
        )  # fmt: skip

    shapes = {
        "resnet50 stem": (256, 64, 112, 112),
        "resnet50 layer4": (256, 2048, 7, 7),
        "mobilenetv2 24 channels": (256, 24, 56, 56),
        "efficientnet head": (256, 1280, 7, 7),
        "lenet": (128, 6, 28, 28),
    }
    for name, shape in shapes.items():
        for channels_last in (True, False):
            x = t(*shape, channels_last=channels_last)
            yield f"{name} {'nhwc' if channels_last else 'nchw'}", lambda x=x: both(x, True)
    x = t(256, 64, 56, 56)
    yield "evaluation", lambda x=x: both(x, False)
    yield "no affine, no running statistics", lambda x=x: both(x, True, affine=False, running=False)
    yield "above 2^31 elements", lambda: both(t(2048, 64, 224, 224), True)
    for dtype in (fp16, fp32, fp64):
        yield f"{dtype}, rows", lambda dtype=dtype: both(t(512, 4096, dtype=dtype), True, dtype)
        yield f"{dtype}, 3-D", lambda dtype=dtype: both(t(33, 17, 25, dtype=dtype), False, dtype)
    for activation in bn.ACTIVATIONS:
        how = dict(training=True, activation=activation)
        yield activation, lambda x=x, how=how: both(x, **how)
        yield f"add, {activation}", lambda x=x, how=how: both(x, **how, residual=True)
    for name, shape in shapes.items():
        x = t(*shape, channels_last=False)
        yield f"{name} add, relu, nchw", lambda x=x: both(x, True, activation="relu", residual=True)
    for dtype in (fp16, fp32, fp64):
        x = t(256, 64, 56, 56, dtype=dtype)
        yield f"{dtype} add, relu", lambda x=x: both(x, True, x.dtype, activation="relu", residual=True)
    x = t(33, 17, 25)
    yield "add, 3-D", lambda x=x: both(x, True, residual=True)
    yield "add, relu, 3-D evaluation", lambda x=x: both(x, False, activation="relu", residual=True)
    x = t(2048, 64, 224, 224)
    yield "above 2^31 elements, add, relu", lambda x=x: both(x, True, activation="relu", residual=True)


def group_norm():
    def both(x, groups, parameters=fp32, dtype=None):
        w = None if parameters is None else t(x.shape[1], dtype=parameters)
        y, mean, rstd = gn.group_norm_forward(x, groups, w, w, 1e-5, dtype or x.dtype, "triton")
        gn.group_norm_backward(y, x, groups, w, mean, rstd, True, w is not None, "triton")

    shapes = {
        "resnet50 stem": (64, 64, 112, 112),
        "resnet50 layer2": (64, 512, 28, 28),
        "resnet50 layer3": (64, 1024, 14, 14),
        "resnet50 layer4": (64, 2048, 7, 7),
        "one image": (1, 256, 56, 56),
    }
    for name, shape in shapes.items():
        for channels_last in (True, False):
            x = t(*shape, channels_last=channels_last)
            yield f"{name} {'nhwc' if channels_last else 'nchw'}", lambda x=x: both(x, 32)
    for channels_last in (True, False):
        layout = "nhwc" if channels_last else "nchw"
        for name, size, c in (("stem", 256, 64), ("residual", 64, 256), ("small", 16, 96)):
            x = t(1, c, size, size, channels_last=channels_last)
            yield f"instance norm, cyclegan {name} {layout}", lambda x=x: both(x, x.shape[1], None)
        x = t(16, 24, 56, 56, channels_last=channels_last)
        yield f"groups of 3 channels {layout}", lambda x=x: both(x, 8)
        x = t(16, 96, 14, 14, channels_last=channels_last)
        yield f"groups of 12 channels {layout}", lambda x=x: both(x, 8)
        yield f"one group {layout}", lambda x=x: both(x, 1)
    yield "autocast", lambda: both(t(64, 64, 56, 56), 32, dtype=fp32)
    yield "above 2^31 elements", lambda: both(t(2048, 64, 224, 224), 32)
    yield "above 2^31 elements, fused", lambda: both(t(131072, 512, 7, 7), 32)
    for dtype in (fp16, fp32, fp64):
        yield f"{dtype}, rows", lambda dtype=dtype: both(t(512, 4096, dtype=dtype), 32, dtype)
        yield f"{dtype}, 3-D", lambda dtype=dtype: both(t(33, 18, 25, dtype=dtype), 6, dtype)
        for channels_last in (True, False):
            for size in (14, 56):
                x = t(64, 256, size, size, dtype=dtype, channels_last=channels_last)
                layout = "nhwc" if channels_last else "nchw"
                yield f"{dtype}, {size}x{size} {layout}", lambda x=x, dtype=dtype: both(x, 16, dtype)


def layer_norm():
    def both(x, dimensions=1, parameters=fp32, dtype=None):
        shape = x.shape[x.dim() - dimensions :]
        w = None if parameters is None else t(*shape, dtype=parameters, channels_last=False)
        y, mean, rstd = ln.layer_norm_forward(x, shape, w, w, 1e-6, dtype or x.dtype, "triton")
        ln.layer_norm_backward(y, x, shape, w, mean, rstd, True, w is not None, "triton")

    for size, c in ((56, 96), (28, 192), (14, 384), (7, 768)):
        yield f"convnext-t {c}", lambda size=size, c=c: both(t(64, size, size, c, channels_last=False))
    yield "vit-b", lambda: both(t(64, 197, 768))
    yield "vit-b, autocast", lambda: both(t(64, 197, 768), dtype=fp32)
    yield "rows of 5", lambda: both(t(4096, 5), parameters=None)
    yield "rows of 8192", lambda: both(t(512, 8192))
    yield "whole images, 7x7", lambda: both(t(64, 512, 7, 7, channels_last=False), 3)
    yield "whole images, 56x56", lambda: both(t(64, 64, 56, 56, channels_last=False), 3)
    yield "whole images, 55x55, no affine", lambda: both(t(64, 63, 55, 55, channels_last=False), 3, None)
    yield "above 2^31 elements", lambda: both(t(2048, 224, 224, 64, channels_last=False))
    yield "above 2^31 elements, long rows", lambda: both(t(2048, 64, 224, 224, channels_last=False), 3)
    for dtype in (fp16, fp32, fp64):
        yield f"{dtype}", lambda dtype=dtype: both(t(64, 14, 14, 384, dtype=dtype, channels_last=False), 1, dtype)
        yield f"{dtype}, odd", lambda dtype=dtype: both(t(64, 33, 35, dtype=dtype), 2, dtype)
        yield f"{dtype}, 8192", lambda dtype=dtype: both(t(512, 8192, dtype=dtype), 1, dtype)
        yield f"{dtype}, long", lambda dtype=dtype: both(t(64, 33, 35, 37, dtype=dtype, channels_last=False), 3, dtype)


def local_response_norm():
    def both(x, size=5, beta=0.75, k=1.0, dtype=None):
        y = lrn.local_response_norm_forward(x, size, 1e-4, beta, k, dtype or x.dtype, "triton")
        lrn.local_response_norm_backward(y, x, size, 1e-4, beta, k, "triton")

    for channels_last in (True, False):
        layout = "nhwc" if channels_last else "nchw"
        for name, c, size in (("alexnet norm1", 96, 55), ("alexnet norm2", 256, 27), ("googlenet", 64, 56)):
            for dtype in (bf16, fp32):
                x = t(128, c, size, size, dtype=dtype, channels_last=channels_last)
                yield f"{name} {layout} {dtype}", lambda x=x: both(x)
        x = t(128, 96, 56, 56, channels_last=channels_last)
        yield f"autocast {layout}", lambda x=x: both(x, dtype=fp32)
        yield f"beta 0.5, window of 4, {layout}", lambda x=x: both(x, 4, 0.5, 2.0)
        yield f"largest window {layout}", lambda x=x: both(x, lrn.LARGEST)
        x = t(2048, 64, 224, 224, channels_last=channels_last)
        yield f"above 2^31 elements {layout}", lambda x=x: both(x)
        for dtype in (fp16, fp64):
            x = t(3, 17, 9, 7, dtype=dtype, channels_last=channels_last)
            yield f"{dtype}, odd size {layout}", lambda x=x: both(x)
