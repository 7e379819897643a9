"""Convolutions and what runs through them."""

import contextlib
import dataclasses

import torch

from aot_cases.common import bf16, fp16, fp32, fp64, t
from fastcnn.ops import conv2d as conv
from fastcnn.ops import conv_launch, conv_tiles
from fastcnn.ops.conv_fusion import Correction, Join, Pending


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


def _passes(x, w, stride=1, activation="relu", fused=True, frozen=False):
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
    correction = Correction(None, vector(k), None, None) if frozen else Correction(y, vector(k), vector(k), vector(k))
    forward = dict(pending=pending, activation=("silu", 0.0), residual=y, pivot=vector(k))
    back = dict(correction=correction, pending=pending, input=x if pending else None, add=x)
    join = dict(correction=correction, join=Join(x, x), add=x)

    def backward_input():
        for options in (back, join):
            conv.conv2d_backward_input(y, w, None, x.shape[2:], *geometry, channels_last, "conv", "triton", **options)

    bias = t(k, dtype=x.dtype)
    return {
        "forward": lambda: conv.conv2d_forward(x, w, bias, size, *geometry, channels_last, "conv", "triton", **forward),
        "backward_input": backward_input,
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
    yield "constant statistics, stem", case(256, 3, 64, 224, 7, stride=2, frozen=True)
    yield "constant statistics, 3x3", case(256, 128, 128, 28, 3, frozen=True)
    yield "constant statistics, ieee", case(64, 64, 64, 28, 3, fp32, frozen=True)
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
