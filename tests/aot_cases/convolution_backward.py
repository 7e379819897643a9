"""Both gradients of a 1x1 convolution from one kernel."""

from aot_cases.common import bf16, fp16, fp32, t
from fastcnn.ops.conv2d_backward import conv2d_backward as run
from fastcnn.ops.conv_fusion import Correction, Join, Pending


def conv2d_backward():
    def case(n, c, k, size, activation=None, join=False, buffer=None, dtype=bf16, fused=True, added=True, of_y=True):
        vector = lambda channels: t(channels, dtype=fp32)
        # of DenseNet's kind: the first channels of a block's buffer, where gradients are added up
        image = lambda: t(n, buffer or c, size, size, dtype=dtype)[:, :c]
        dy, x, w, add = t(n, k, size, size, dtype=dtype), image(), t(k, c, 1, 1, dtype=dtype), image()
        more = (vector(k), vector(k)) if of_y else (None, None)
        options = dict(correction=Correction(dy if of_y else None, vector(k), *more)) if fused else {}
        if fused and added:
            options["add"] = add
        if activation is not None:
            options["pending"] = Pending(vector(c), vector(c), activation, scaled=buffer is not None)
        if join:
            options["join"] = Join(x, image())
        return lambda: run(dy, x, w, **options, out=add if buffer else None)

    yield "resnet50 64 to 64, plain", case(256, 64, 64, 56, fused=False)
    yield "resnet50 64 to 256", case(256, 64, 256, 56, "relu", added=False)
    yield "resnet50 64 to 256, constant statistics", case(256, 64, 256, 56, "relu", added=False, of_y=False)
    yield "resnet50 256 to 64, join", case(256, 256, 64, 56, join=True)
    yield "resnet50 256 to 128, join", case(256, 256, 128, 56, join=True)
    yield "densenet121 256 to 128", case(64, 256, 128, 56, "relu", buffer=256)
    yield "densenet121 64 to 128", case(64, 64, 128, 56, "relu", buffer=256)
    yield "mobilenetv2 24 to 144, join", case(256, 24, 144, 56, join=True)
    yield "efficientnet 96 to 24", case(256, 96, 24, 56, "silu")
    yield "resnext50 128 to 256", case(256, 128, 256, 56, "relu", dtype=fp16)
    yield "beyond 2^31 elements", case(2048, 64, 256, 72, "relu")
