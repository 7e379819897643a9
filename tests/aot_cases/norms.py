"""Norms."""

from aot_cases.common import fp16, fp32, fp64, t
from fastcnn.ops import batch_norm as bn


def batch_norm():
    def both(x, training, parameters=fp32, affine=True, running=True):
        C = x.shape[1]
        w, m = t(C, dtype=parameters), t(C, dtype=fp64 if x.dtype == fp64 else fp32)
        weight = w if affine else None
        stats = w if running else None
        if training:
            bn.batch_norm_forward(x, weight, weight, stats, stats, 0.1, 1e-5, "triton")
        else:
            bn.batch_norm_forward_eval(x, weight, weight, w, w, 1e-5, "triton")
            m = w
        bn.batch_norm_backward(x, x, weight, m, m, training, 1e-5, True, affine, "triton")

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
