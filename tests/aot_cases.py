"""What `tests/aot.py` compiles: per op, calls of its host functions that reach every kernel and every launch choice.

Each op is a generator of (name, call). Shapes come from networks people train. Tensors are on torch's "meta" device:
shapes and strides without memory, so that a case may exceed 2^31 elements. Optimizers read addresses: theirs are real.
"""

import contextlib
import dataclasses
from unittest import mock

import torch

from fastcnn import optim
from fastcnn.ops import activation as act
from fastcnn.ops import adaptive_avg_pool2d as adaptive
from fastcnn.ops import avg_pool2d as avg
from fastcnn.ops import batch_norm as bn
from fastcnn.ops import conv2d as conv
from fastcnn.ops import conv_launch, conv_tiles
from fastcnn.ops import cross_entropy as ce
from fastcnn.ops import dropout as drop
from fastcnn.ops import max_pool2d as maxpool
from fastcnn.ops.conv_fusion import Correction, Pending

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def t(*shape, dtype=bf16, channels_last=True):
    """A tensor without memory; 4-D ones in channels_last unless told otherwise."""
    memory_format = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def activation():
    for kind in ("relu", "relu6", "leaky_relu", "silu", "sigmoid", "tanh", "hardswish", "gelu", "gelu_tanh"):
        for dtype in (bf16, fp32) if kind in ("relu", "gelu") else (bf16,):
            x = t(256, 64, 56, 56, dtype=dtype)
            yield (
                f"{kind} {dtype}",
                lambda kind=kind, x=x: (
                    act.activation_forward(x, kind, 0.01, "triton"),
                    act.activation_backward(x, x, kind, 0.01, "triton"),
                ),
            )
    x = t(2048, 64, 224, 224)
    yield (
        "silu above 2^31 elements",
        lambda x=x: (
            act.activation_forward(x, "silu", 0.0, "triton"),
            act.activation_backward(x, x, "silu", 0.0, "triton"),
        ),
    )
    for dtype in (fp16, fp64):
        x = t(33, 7, 5, 3, dtype=dtype)
        yield (
            f"silu {dtype}, odd size",
            lambda x=x: (
                act.activation_forward(x, "silu", 0.0, "triton"),
                act.activation_backward(x, x, "silu", 0.0, "triton"),
            ),
        )


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


def cross_entropy():
    def both(x, target, weight=None, reduction="mean", smoothing=0.0, dtype=fp32):
        how = (reduction, -100, smoothing)
        loss, lse, mass, total = ce.cross_entropy_forward(x, target, weight, *how, dtype, "triton")
        ce.cross_entropy_backward(loss, x, target, weight, lse, mass, total, *how, "triton")

    def index(*shape):
        return torch.empty(shape, dtype=torch.int64, device="meta")

    yield "imagenet", lambda: both(t(256, 1000), index(256))
    yield "imagenet, smoothing, fp32", lambda: both(t(256, 1000, dtype=fp32), index(256), smoothing=0.1)
    yield "mixup", lambda: both(t(256, 1000), t(256, 1000, dtype=fp32), smoothing=0.1)
    yield "cifar10, one launch", lambda: both(t(128, 10, dtype=fp16), index(128), dtype=fp16)
    yield "cifar100, weights", lambda: both(t(128, 100), index(128), t(100, dtype=fp32), "sum", 0.1)
    yield "imagenet21k", lambda: both(t(512, 21843, dtype=fp32), index(512), reduction="none")
    yield "fp64", lambda: both(t(64, 33, dtype=fp64), index(64), t(33, dtype=fp64), smoothing=0.1, dtype=fp64)
    for channels_last in (True, False):
        x = t(16, 21, 512, 512, channels_last=channels_last)
        yield f"segmentation {channels_last}", lambda x=x: both(x, index(16, 512, 512), t(21, dtype=fp32))
    yield "above 2^31 elements", lambda: both(t(512, 21, 512, 512), index(512, 512, 512))


def max_pool2d():
    def both(x, kernel, stride, padding, dilation=1, ceil_mode=False):
        window = [kernel, kernel, stride, stride, padding, padding, dilation, dilation]
        y, taps = maxpool.max_pool2d_forward(x, window, ceil_mode, True, "triton")
        channels_last = x.dim() == 4 and x.stride(1) == 1
        maxpool.max_pool2d_backward(y, taps, x.shape, channels_last, window, "triton")

    yield "resnet50 stem", lambda: both(t(256, 64, 112, 112), 3, 2, 1)
    yield (
        "resnet50 stem, evaluation",
        lambda: maxpool.max_pool2d_forward(t(256, 64, 112, 112), [3, 3, 2, 2, 1, 1, 1, 1], False, False, "triton"),
    )
    yield "resnet50 stem, contiguous fp32", lambda: both(t(64, 64, 112, 112, dtype=fp32, channels_last=False), 3, 2, 1)
    yield "vgg16", lambda: both(t(64, 64, 224, 224), 2, 2, 0)
    yield "lenet fp32", lambda: both(t(64, 6, 28, 28, dtype=fp32, channels_last=False), 2, 2, 0)
    yield "googlenet 3x3 stride 1", lambda: both(t(64, 192, 28, 28), 3, 1, 1)
    yield "googlenet ceil", lambda: both(t(64, 480, 28, 28), 3, 2, 0, ceil_mode=True)
    yield "yolo spp 13x13: loops", lambda: both(t(8, 512, 13, 13), 13, 1, 6)
    yield "dilated, two-byte taps", lambda: both(t(8, 64, 65, 65, dtype=fp32), 17, 2, 8, 2)
    yield "above 2^31 elements", lambda: both(t(2048, 64, 224, 224), 3, 2, 1)
    yield "fp16, unbatched", lambda: both(t(7, 33, 35, dtype=fp16), 3, 2, 1)
    yield "fp64, odd size", lambda: both(t(3, 5, 9, 7, dtype=fp64), 3, 2, 1)


def avg_pool2d():
    def both(x, kernel, stride, padding, count_pad=True, override=None):
        window = [kernel, kernel, stride, stride, padding, padding, 1, 1]
        y = avg.avg_pool2d_forward(x, window, False, count_pad, override, "triton")
        channels_last = x.dim() == 4 and x.stride(1) == 1
        avg.avg_pool2d_backward(y, x.shape, channels_last, window, count_pad, override, "triton")

    yield "densenet transition", lambda: both(t(64, 128, 56, 56), 2, 2, 0)
    yield (
        "densenet transition, contiguous fp32",
        lambda: both(t(64, 128, 56, 56, dtype=fp32, channels_last=False), 2, 2, 0),
    )
    yield "lenet", lambda: both(t(64, 6, 28, 28, channels_last=False), 2, 2, 0)
    yield "inception 3x3 stride 1", lambda: both(t(32, 288, 35, 35), 3, 1, 1)
    yield "inception, padding not counted", lambda: both(t(32, 288, 35, 35), 3, 1, 1, False)
    yield "override", lambda: both(t(32, 64, 35, 35, dtype=fp32), 3, 2, 1, True, 7)
    yield "8x8: loops", lambda: both(t(32, 2048, 8, 8), 8, 8, 0)
    yield "above 2^31 elements", lambda: both(t(2048, 64, 224, 224), 2, 2, 0)
    yield "fp16, unbatched", lambda: both(t(7, 33, 35, dtype=fp16), 3, 2, 1)
    yield "fp64, odd size", lambda: both(t(3, 5, 9, 7, dtype=fp64), 3, 2, 1)


def adaptive_avg_pool2d():
    def both(x, size):
        y = adaptive.adaptive_avg_pool2d_forward(x, size, "triton")
        adaptive.adaptive_avg_pool2d_backward(y, x.shape, x.dim() == 4 and x.stride(1) == 1, "triton")

    yield "resnet50 global", lambda: both(t(256, 2048, 7, 7), (1, 1))
    yield "resnet50 global, contiguous fp32", lambda: both(t(64, 2048, 7, 7, dtype=fp32, channels_last=False), (1, 1))
    yield "squeeze-excite", lambda: both(t(128, 96, 112, 112), (1, 1))
    yield "squeeze-excite, contiguous", lambda: both(t(128, 96, 112, 112, channels_last=False), (1, 1))
    yield "vgg16", lambda: both(t(64, 512, 7, 7), (7, 7))
    yield "alexnet, contiguous", lambda: both(t(64, 256, 13, 13, channels_last=False), (6, 6))
    yield "pspnet", lambda: both(t(8, 2048, 60, 60), (3, 3))
    yield "above 2^31 elements, global", lambda: both(t(2048, 64, 224, 224), (1, 1))
    yield "above 2^31 elements", lambda: both(t(2048, 64, 224, 224), (6, 6))
    yield "fp16, unbatched", lambda: both(t(7, 33, 35, dtype=fp16), (1, 1))
    for size in ((1, 1), (4, 5)):
        yield f"fp64, odd size {size}", lambda size=size: both(t(3, 5, 9, 7, dtype=fp64), size)


@contextlib.contextmanager
def tf32(allowed):
    """torch's own switches of TF32 for convolutions and matrix products."""
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def _conv2d(x, w, stride=1, padding=None, dilation=1, groups=1, bias=True, allow_tf32=False, transposed=False):
    """Forward and all gradients. The forward of a transposed convolution is the gradient of the input, plus a bias."""
    channels_last = x.stride(1) == 1
    padding = (w.shape[2] - 1) * dilation // 2 if padding is None else padding
    size = [(x.shape[d] + 2 * padding - dilation * (w.shape[d] - 1) - 1) // stride + 1 for d in (2, 3)]
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    b = t(w.shape[0], dtype=x.dtype) if bias else None
    b_transposed = t(x.shape[1], dtype=x.dtype) if transposed else None
    with tf32(allow_tf32):
        y = conv.conv2d_forward(x, w, b, size, *geometry, channels_last, "conv", "triton")
        conv.conv2d_backward_input(y, w, b_transposed, x.shape[2:], *geometry, channels_last, "conv", "triton")
        conv.conv2d_backward_weight(y, x, w, *geometry, "conv", "triton")
        if bias:
            conv.conv2d_backward_bias(y, "triton")


def conv2d():
    def case(n, c, k, size, kernel, dtype=bf16, channels_last=True, groups=1, **how):
        x = t(n, c, size, size, dtype=dtype, channels_last=channels_last)
        w = t(k, c // groups, kernel, kernel, dtype=dtype, channels_last=channels_last)
        return lambda: _conv2d(x, w, groups=groups, **how)

    yield "resnet50 stem", case(256, 3, 64, 224, 7, stride=2, bias=False)
    yield "resnet50 3x3, 64", case(256, 64, 64, 56, 3, bias=False)
    yield "resnet50 3x3 stride 2, 128", case(256, 128, 128, 56, 3, stride=2, bias=False)
    yield "resnet50 3x3, 512", case(256, 512, 512, 7, 3, bias=False)
    yield "resnet50 1x1, 64 to 256", case(256, 64, 256, 56, 1, bias=False)
    yield "resnet50 1x1, 2048 to 512", case(256, 2048, 512, 7, 1, bias=False)
    yield "resnet50 projection", case(256, 512, 1024, 28, 1, stride=2, bias=False)
    yield "resnet20 16", case(128, 16, 16, 32, 3, bias=False)
    yield "resnet20 16 to 32", case(128, 16, 32, 32, 3, stride=2, bias=False)
    yield "vgg16 64 to 128", case(64, 64, 128, 112, 3)
    yield "densenet121 128 to 32", case(64, 128, 32, 28, 3, bias=False)
    yield "mobilenetv2 depthwise", case(256, 144, 144, 56, 3, groups=144, bias=False)
    yield "mobilenetv2 depthwise stride 2", case(256, 192, 192, 28, 3, groups=192, stride=2, bias=False)
    yield "mobilenetv2 1x1, 24 to 144", case(256, 24, 144, 56, 1, bias=False)
    yield "resnext50 32 groups", case(128, 128, 128, 56, 3, groups=32, bias=False)
    yield "regnet groups of 64", case(128, 256, 256, 28, 3, groups=4, bias=False)
    yield "deeplab dilation 12", case(8, 2048, 256, 33, 3, dilation=12, bias=False)
    yield "alexnet stem", case(128, 3, 64, 224, 11, stride=4, padding=2)
    yield "above 2^31 elements", case(2048, 64, 64, 224, 3)
    yield "contiguous 64", case(64, 64, 64, 56, 3, channels_last=False)
    yield "fp16 contiguous weights and 1x1 image", case(64, 64, 64, 1, 3, fp16, channels_last=False)
    for name, dtype, how in (("ieee", fp32, {}), ("tf32", fp32, dict(allow_tf32=True)), ("fp64", fp64, {})):
        yield f"{name} lenet", case(128, 1, 6, 32, 5, dtype, channels_last=False, padding=0, **how)
        yield f"{name} lenet second", case(128, 6, 16, 14, 5, dtype, channels_last=False, padding=0, **how)
        yield f"{name} contiguous 64", case(64, 64, 64, 56, 3, dtype, channels_last=False, **how)
        for channels in (16, 32, 64, 256):
            yield f"{name} {channels}", case(64, channels, channels, 28, 3, dtype, **how)


def _passes(x, w, stride=1, activation="relu", fused=True):
    """{kind: call} of the three passes, with everything they can do on load and on store or without."""
    (_, c, *_), (k, _, r, _) = x.shape, w.shape
    size = [(x.shape[d] + r // 2 * 2 - r) // stride + 1 for d in (2, 3)]
    geometry = ([stride] * 2, [r // 2] * 2, [1] * 2, 1)
    channels_last = x.stride(1) == 1
    y = t(x.shape[0], k, *size, dtype=x.dtype, channels_last=channels_last)
    if not fused:
        return {
            "forward": lambda: conv.conv2d_forward(x, w, None, size, *geometry, channels_last, "conv", "triton"),
            "backward_input": lambda: conv.conv2d_backward_input(
                y, w, None, x.shape[2:], *geometry, channels_last, "conv", "triton"
            ),
            "backward_weight": lambda: conv.conv2d_backward_weight(y, x, w, *geometry, "conv", "triton"),
        }
    vector = lambda channels: t(channels, dtype=fp64 if x.dtype == fp64 else fp32)
    # an image is read as it is
    pending = Pending(vector(c), vector(c), activation) if c > 4 else None
    correction = Correction(y, vector(k), vector(k), vector(k))
    forward = dict(pending=pending, activation=("silu", 0.0), residual=y, pivot=vector(k))
    back = dict(correction=correction, pending=pending, input=x if pending else None, add=x)
    return {
        "forward": lambda: conv.conv2d_forward(
            x, w, t(k, dtype=x.dtype), size, *geometry, channels_last, "conv", "triton", **forward
        ),
        "backward_input": lambda: conv.conv2d_backward_input(
            y, w, None, x.shape[2:], *geometry, channels_last, "conv", "triton", **back
        ),
        "backward_weight": lambda: conv.conv2d_backward_weight(
            y, x, w, *geometry, "conv", "triton", correction=correction, pending=pending
        ),
    }


def conv2d_fused():
    def case(n, c, k, size, kernel, dtype=bf16, allow_tf32=False, **how):
        calls = _passes(t(n, c, size, size, dtype=dtype), t(k, c, kernel, kernel, dtype=dtype), **how)

        def call():
            with tf32(allow_tf32):
                for kind in ("forward", "backward_weight") + ("backward_input",) * (c > 4):
                    calls[kind]()

        return call

    yield "resnet50 stem", case(256, 3, 64, 224, 7, stride=2)
    yield "resnet50 3x3, 64", case(256, 64, 64, 56, 3)
    yield "resnet50 3x3 stride 2, 128", case(256, 128, 128, 56, 3, stride=2)
    yield "resnet50 3x3, 512", case(256, 512, 512, 7, 3)
    yield "resnet50 1x1, 64 to 256", case(256, 64, 256, 56, 1)
    yield "resnet50 1x1, 2048 to 512", case(256, 2048, 512, 7, 1)
    yield "densenet121 128 to 32", case(64, 128, 32, 28, 3)
    yield "mobilenetv2 1x1, 24 to 144", case(256, 24, 144, 56, 1, activation="relu6")
    yield "efficientnet 1x1, 96 to 24", case(256, 96, 24, 56, 1, activation="silu")
    yield "small batch", case(8, 256, 256, 28, 3, fp16)
    for name, dtype, allow in (("ieee", fp32, False), ("tf32", fp32, True), ("fp64", fp64, False)):
        yield name, case(64, 64, 64, 28, 3, dtype, allow)


def conv2d_tiles():
    """Every tile of the convolutions in a shape that fills it, plain and with everything on load and on store."""

    def case(launch, x, w, kind, stride, arithmetic, chips):
        def call():
            from triton.runtime.driver import driver

            # a chip that is not named has the numbers of the next one below it
            known = max((arch for arch in chips if arch <= driver.active.get_current_target().arch), default=None)
            plain, fused = chips.get(known, (None, None))
            if launch.family != "images" and arithmetic != "16-bit":
                fused = None  # compiled with everything on for the layers of conv2d_fused only
            how = dict(splits=4) if kind == "backward_weight" else dict(programs=132)
            with tf32(arithmetic == "tf32"), conv_launch.use(dataclasses.replace(launch, **how)):
                for on, numbers in ((False, plain), (True, fused)):
                    if numbers:
                        _passes(x, w, stride, fused=on)[kind]()

        return call

    for (family, kind, arithmetic, access), tiles in conv_tiles.TILES.items():
        dtype = {"16-bit": bf16, "fp64": fp64}.get(arithmetic, fp32)
        wide = access != "narrow"
        if family == "folded":
            c = 4 if wide else 1
            x, w, stride = t(64, c, 224, 224, dtype=dtype), t(64, c, 7, 7, dtype=dtype), 2
        else:
            c = 256 if wide else 250
            x = t(256 if family == "images" else 64, c, 28, 28, dtype=dtype, channels_last=wide)
            w, stride = t(c, c, 3, 3, dtype=dtype, channels_last=wide), 1
        for tile, chips in tiles.items():
            launch = conv_launch.Launch(family, *tile)
            # short: every case is in the report many times
            name = f"{kind} {family} {'x'.join(map(str, tile))} {arithmetic} {access}"
            yield name, case(launch, x, w, kind, stride, arithmetic, chips)


def conv_transpose2d():
    def case(n, c, k, size, kernel, dtype=bf16, channels_last=True, **how):
        # c: channels of the larger image
        x = t(n, c, size, size, dtype=dtype, channels_last=channels_last)
        w = t(k, c, kernel, kernel, dtype=dtype, channels_last=channels_last)
        return lambda: _conv2d(x, w, bias=False, transposed=True, **how)

    yield "dcgan 4x4 stride 2", case(128, 64, 128, 32, 4, stride=2, padding=1)
    yield "dcgan last layer", case(128, 3, 64, 64, 4, stride=2, padding=1)
    yield "unet 2x2 stride 2", case(16, 64, 128, 256, 2, stride=2, padding=0)
    yield "unet 2x2, contiguous fp32", case(16, 64, 128, 256, 2, fp32, False, stride=2, padding=0)
    yield "unet 2x2, contiguous tf32", case(16, 64, 128, 256, 2, fp32, False, stride=2, padding=0, allow_tf32=True)
    yield "fp64", case(3, 5, 7, 11, 3, fp64, False, stride=2)


def linear():
    def case(n, features, out, dtype=bf16, **how):
        x, w = t(n, features, dtype=dtype), t(out, features, dtype=dtype)
        return lambda: _conv2d(x[:, :, None, None], w[:, :, None, None], **how)

    yield "resnet50 head", case(256, 2048, 1000)
    yield "resnet50 head fp32", case(256, 2048, 1000, fp32)
    yield "resnet50 head tf32", case(256, 2048, 1000, fp32, allow_tf32=True)
    yield "vgg16", case(64, 25088, 4096)
    yield "lenet", case(128, 400, 120, fp32)
    yield "lenet last", case(128, 84, 10, fp32)
    yield "cifar head", case(128, 512, 10)
    yield "fp64", case(128, 400, 120, fp64)


def dropout():
    def case(*shape, **how):
        x, seed = t(*shape, **how), torch.empty((), dtype=torch.int64, device="meta")
        return lambda: (drop.dropout_forward(x, seed, 0.5, "triton"), drop.dropout_forward_(x, seed, 0.5, "triton"))

    yield "vgg16 head", case(64, 4096)
    yield "efficientnet head fp32", case(256, 1280, dtype=fp32)
    yield "channels_last", case(64, 256, 56, 56)
    yield "channels_last, odd plane, fp32", case(64, 256, 7, 7, dtype=fp32)
    yield "fp16, odd size", case(3, 5, 7, dtype=fp16)
    yield "fp64, odd size", case(3, 5, 7, dtype=fp64)
    yield "above 2^31 elements", case(2048, 64, 224, 224)
    yield "above 2^31 elements, contiguous", case(2048, 64, 224, 224, channels_last=False)


def optimizers():
    def case(make, dtype=fp32, amp=False, aligned=True):
        def call():
            # 17 elements: one after the other, and a view that starts off the 16-byte grid
            params = [torch.zeros(17 * 16, dtype=dtype)[0 if aligned else 1 :] for _ in range(2)]
            for p in params:
                p.grad = torch.zeros(17 * 16, dtype=dtype)[0 if aligned else 1 :]
            optimizer = make(params)
            if amp:
                optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
            with mock.patch.object(optimizer._op, "route", lambda *_: "triton"):
                optimizer.step()

        return call

    sgd = lambda **how: lambda params: optim.SGD(params, lr=0.1, **how)
    adam = lambda **how: lambda params: optim.Adam(params, **how)
    yield "sgd", case(sgd())
    yield "sgd momentum decay", case(sgd(momentum=0.9, weight_decay=1e-4))
    yield "sgd nesterov decay amp", case(sgd(momentum=0.9, weight_decay=1e-4, nesterov=True), amp=True)
    yield "sgd lr tensor", case(lambda params: optim.SGD(params, lr=torch.tensor(0.1), momentum=0.9))
    yield "adam", case(adam())
    yield "adam l2", case(adam(weight_decay=1e-4))
    yield "adam amsgrad amp", case(adam(amsgrad=True), amp=True)
    yield "adam lr tensor", case(adam(lr=torch.tensor(1e-3), capturable=True))
    yield "adamw", case(lambda params: optim.AdamW(params))
    yield "adamw unaligned", case(lambda params: optim.AdamW(params), aligned=False)
    for dtype in (bf16, fp16, fp64):
        yield f"sgd momentum {dtype}", case(sgd(momentum=0.9), dtype)
        yield f"adamw {dtype}", case(lambda params: optim.AdamW(params), dtype)


CASES = {
    "activation": activation,
    "adaptive_avg_pool2d": adaptive_avg_pool2d,
    "avg_pool2d": avg_pool2d,
    "batch_norm": batch_norm,
    "conv2d": conv2d,
    "conv2d_fused": conv2d_fused,
    "conv2d_tiles": conv2d_tiles,
    "conv_transpose2d": conv_transpose2d,
    "cross_entropy": cross_entropy,
    "dropout": dropout,
    "linear": linear,
    "max_pool2d": max_pool2d,
    "optimizers": optimizers,
}
