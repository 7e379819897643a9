"""Squeeze-excite in the chain: every kind of maker and reader of the value with the gate, against plain PyTorch."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastcnn import chain
from fastcnn.ops.activation import activation_reference
from fastcnn.testing import assert_matches

LANES = ("triton", "cpu")
bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
# sizes of images [N, C, H, W], of the hidden layer and of the output
SHAPES = {
    "odd": ((3, 21, 7, 5), 5, 11),
    "one image, one channel": ((1, 1, 4, 3), 1, 3),
    "16 bytes": ((2, 24, 9, 8), 8, 16),
    "one pixel": ((5, 8, 1, 1), 3, 8),
}


def small(t, kind):
    # PyTorch's gradient of hardsigmoid has a sixth in fp32
    return (t + 3).clamp(0, 6) / 6 if kind == "hardsigmoid" else activation_reference(t, kind)


def tensors(device, dtype, shape, channels_last=True, depthwise=True):
    """x, then weight and batch norm's vectors of the convolution before the gate, of the layers and of the reader."""
    (n, c, h, w), squeezed, k = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    wide = fp64 if dtype == fp64 else fp32

    def draw(*shape, scale=1.0, like=dtype):
        drawn = (torch.randn(shape, generator=generator) * scale).to(device, like)
        return (drawn.contiguous(memory_format=layout) if drawn.dim() == 4 else drawn).requires_grad_()

    first = (c, 1, 3, 3) if depthwise else (c, c, 1, 1)
    return (
        draw(n, c, h, w),
        *(draw(*first, scale=0.5), draw(c, like=wide), draw(c, like=wide)),
        *(draw(squeezed, c, 1, 1, scale=2 * c**-0.5), draw(squeezed)),
        *(draw(c, squeezed, 1, 1, scale=2 * squeezed**-0.5), draw(c)),
        *(draw(k, c, 1, 1, scale=c**-0.5), draw(k, like=wide), draw(k, like=wide)),
    )


def modules(x, *parameters, training=True):
    """SimpleNamespace of what the chain's functions take for layers."""
    w0, gamma0, beta0, w1, b1, w2, b2, w3, gamma3, beta3 = parameters

    def conv(weight, bias=None, groups=1):
        padding = (weight.shape[2] // 2,) * 2
        return SimpleNamespace(
            weight=weight, bias=bias, stride=1, padding=padding, dilation=1, groups=groups, padding_mode="zeros"
        )

    def norm(weight, bias):
        state = lambda value: None if training else torch.full_like(weight, value, requires_grad=False)
        return SimpleNamespace(
            weight=weight, bias=bias, running_mean=state(0.3), running_var=state(1.7), training=training, momentum=0.1,
            eps=1e-5, track_running_stats=not training, num_batches_tracked=None,
        )  # fmt: skip

    groups = 1 if w0.shape[1] > 1 or len(w0) == 1 else len(w0)
    return conv(w0, groups=groups), norm(gamma0, beta0), conv(w1, b1), conv(w2, b2), conv(w3), norm(gamma3, beta3)


def of_chain(kinds, end, *inputs, **how):
    conv0, norm0, fc1, fc2, conv3, norm3 = modules(*inputs, **how)
    slope = 0.01 if kinds[0] == "leaky_relu" else 0.0
    x = chain.activate(chain.conv_batch_norm(inputs[0], conv0, norm0), kinds[0], slope)
    return chain.materialize(end(CHAIN, chain.squeeze_excite(x, fc1, fc2, *kinds[1:]), inputs[0], conv3, norm3))


def of_torch(kinds, end, *inputs, **how):
    conv0, norm0, fc1, fc2, conv3, norm3 = modules(*inputs, **how)
    z = activation_reference(PYTORCH.conv_norm(inputs[0], conv0, norm0), kinds[0])
    hidden = small(F.conv2d(z.mean((2, 3), keepdim=True), fc1.weight, fc1.bias), kinds[1])
    gate = small(F.conv2d(hidden, fc2.weight, fc2.bias), kinds[2])
    return end(PYTORCH, z * gate, inputs[0], conv3, norm3)


def conv_norm(x, conv, bn):
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, 1, conv.groups)
    return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, 0.1, bn.eps)


CHAIN = SimpleNamespace(
    conv_norm=chain.conv_batch_norm, relu=lambda x: chain.activate(x, "relu"), add=chain.add, mean=chain.mean,
    tensor=chain.materialize,
)  # fmt: skip
PYTORCH = SimpleNamespace(
    conv_norm=conv_norm, relu=F.relu, add=torch.add, mean=lambda x: x.mean((2, 3)), tensor=lambda x: x
)


# readers of the value with the gate


def one_by_one(on, z, x, conv3, norm3):
    return on.conv_norm(z, conv3, norm3)


def join(on, z, x, conv3, norm3):
    joined = on.relu(on.add(z, x))
    return on.add(on.conv_norm(joined, conv3, norm3), on.conv_norm(joined, conv3, norm3))


def tensor(on, z, x, conv3, norm3):
    return on.tensor(z)


def several(on, z, x, conv3, norm3):
    both = on.tensor(on.add(on.conv_norm(z, conv3, norm3), on.conv_norm(z, conv3, norm3)))
    return both + on.mean(z).sum() + on.tensor(z).square().mean()


def padded(on, z, x, conv3, norm3):
    wide = SimpleNamespace(**vars(conv3) | dict(weight=F.pad(conv3.weight, (1, 1, 1, 1)), padding=(1, 1)))
    return on.conv_norm(z, wide, norm3)


V3 = ("hardswish", "relu", "hardsigmoid")
EFFICIENT = ("silu", "silu", "sigmoid")


def check(lane, dtype, shape, kinds, end, training=True, **how):
    functions = (lambda *inputs, f=f: f(kinds, end, *inputs, training=training) for f in (of_chain, of_torch))
    assert_matches(*functions, *tensors(lane.device, dtype, shape, **how))


@pytest.mark.parametrize("kinds", [V3, EFFICIENT], ids=["v3", "efficientnet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_mbconv(lane, shape, kinds):
    check(lane, fp32, shape, kinds, one_by_one)


def test_mbconv_in_16_bits(lane):
    check(lane, bf16, "16 bytes", EFFICIENT, one_by_one)
    check(lane, bf16, "odd", V3, one_by_one)


@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("end", [one_by_one, join, tensor, several, padded], ids=lambda end: end.__name__)
def test_makers_and_readers(lane, end, depthwise):
    check(lane, fp32, "odd", ("relu", "silu", "sigmoid"), end, depthwise=depthwise)


@pytest.mark.parametrize("activation", ["none", "relu6", "leaky_relu", "sigmoid", "tanh", "gelu"])
def test_activations(lane, activation):
    kinds = (activation, activation, activation)
    functions = (lambda *inputs, f=f: f(kinds, one_by_one, *inputs) for f in (of_chain, of_torch))
    if activation == "none":
        kinds = ("none", "relu", "sigmoid")
        functions = (_affine_chain, _affine_torch)
    assert_matches(*functions, *tensors(lane.device, fp32, "odd"))


def _affine_chain(*inputs):
    conv0, norm0, fc1, fc2, conv3, norm3 = modules(*inputs)
    x = chain.squeeze_excite(chain.conv_batch_norm(inputs[0], conv0, norm0), fc1, fc2)
    return chain.materialize(chain.conv_batch_norm(x, conv3, norm3))


def _affine_torch(*inputs):
    conv0, norm0, fc1, fc2, conv3, norm3 = modules(*inputs)
    z = conv_norm(inputs[0], conv0, norm0)
    hidden = F.relu(F.conv2d(z.mean((2, 3), keepdim=True), fc1.weight, fc1.bias))
    return conv_norm(z * torch.sigmoid(F.conv2d(hidden, fc2.weight, fc2.bias)), conv3, norm3)


def test_contiguous_images_and_frozen_statistics(lane):
    check(lane, fp32, "odd", EFFICIENT, one_by_one, training=False)
    check(lane, fp32, "odd", EFFICIENT, join, channels_last=False, depthwise=False)
    check(lane, fp64, "odd", ("hardswish", "relu", "sigmoid"), one_by_one, channels_last=False)
