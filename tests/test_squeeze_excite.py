"""Squeeze-excite in the chain: every kind of maker and reader of the value with the gate, against plain PyTorch."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastcnn
from fastcnn import chain
from fastcnn.ops import squeeze_excite as ops
from fastcnn.ops.activation import activation_reference
from fastcnn.testing import assert_close_to_truth, assert_matches, run_with_grads

LANES = ("triton", "cpu")
bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
SLOPE = 0.2  # of the leaky ReLU before the gate, not its default
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


class Layer(SimpleNamespace):
    """What the chain's functions take for a convolution."""

    def __call__(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def modules(x, *parameters, training=True):
    """SimpleNamespace of what the chain's functions take for layers."""
    w0, gamma0, beta0, w1, b1, w2, b2, w3, gamma3, beta3 = parameters

    def conv(weight, bias=None, groups=1):
        padding = (weight.shape[2] // 2,) * 2
        return Layer(
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
    slope = SLOPE if kinds[0] == "leaky_relu" else 0.0
    x = chain.activate(chain.conv_batch_norm(inputs[0], conv0, norm0), kinds[0], slope)
    return chain.materialize(end(CHAIN, chain.squeeze_excite(x, fc1, fc2, *kinds[1:]), inputs[0], conv3, norm3))


def of_torch(kinds, end, *inputs, **how):
    conv0, norm0, fc1, fc2, conv3, norm3 = modules(*inputs, **how)
    z = activation_reference(PYTORCH.conv_norm(inputs[0], conv0, norm0), kinds[0], SLOPE)
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


def test_slope_of_the_activation_on_pytorchs_functions():
    kinds = ("leaky_relu", "relu", "sigmoid")
    functions = (lambda *inputs, f=f: f(kinds, one_by_one, *inputs) for f in (of_chain, of_torch))
    with fastcnn.backend("torch"):
        assert_matches(*functions, *tensors("cpu", fp64, "odd"))


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


def block(kinds=EFFICIENT, end=one_by_one, **how):
    """of_chain and of_torch with these."""
    return tuple(lambda *inputs, f=f: f(kinds, end, *inputs, **how) for f in (of_chain, of_torch))


def test_du_is_left_to_a_depthwise_convolution_alone(lane, monkeypatch):
    passes = []
    original = ops.gradient
    monkeypatch.setattr(ops, "gradient", lambda *args: passes.append(1) or original(*args))
    assert_matches(*block(), *tensors(lane.device, fp32, "odd"))
    assert passes == []
    assert_matches(*block(), *tensors(lane.device, fp32, "odd", depthwise=False))
    assert passes == [1]


@pytest.mark.parametrize("order", ["before", "after", "before the activation"])
def test_other_readers_of_the_value(lane, order):
    def ours(*inputs):
        conv0, norm0, fc1, fc2, conv3, norm3 = modules(*inputs)
        u = chain.conv_batch_norm(inputs[0], conv0, norm0)
        x = chain.activate(u, "silu")
        other = chain.mean(x) if order == "before" else None
        y = chain.conv_batch_norm(chain.squeeze_excite(x, fc1, fc2, "relu", "sigmoid"), conv3, norm3)
        if other is None:
            other = chain.mean(x if order == "after" else u)
        return chain.materialize(y) + (other * other).sum()

    def theirs(*inputs):
        conv0, norm0, fc1, fc2, conv3, norm3 = modules(*inputs)
        u = conv_norm(inputs[0], conv0, norm0)
        z = F.silu(u)
        gate = torch.sigmoid(
            F.conv2d(F.relu(F.conv2d(z.mean((2, 3), keepdim=True), fc1.weight, fc1.bias)), fc2.weight, fc2.bias)
        )
        other = (u if order == "before the activation" else z).mean((2, 3))
        return conv_norm(z * gate, conv3, norm3) + (other * other).sum()

    assert_matches(ours, theirs, *tensors(lane.device, fp32, "odd"))


def test_what_one_backward_left_is_not_taken_by_the_next(lane):
    inputs = tensors(lane.device, fp32, "odd")
    conv0, norm0, fc1, fc2, conv3, norm3 = modules(*inputs)
    x = chain.activate(chain.conv_batch_norm(inputs[0], conv0, norm0), "silu")
    y = chain.materialize(chain.conv_batch_norm(chain.squeeze_excite(x, fc1, fc2), conv3, norm3))
    other = chain.mean(x).square().sum()
    (expected,) = torch.autograd.grad(other, conv0.weight, retain_graph=True)
    torch.autograd.grad(y.square().sum(), fc1.weight, retain_graph=True)  # stops before the convolution
    (found,) = torch.autograd.grad(other, conv0.weight)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("wanted", ["the layers", "the image", "batch norm before", "biases"])
def test_some_gradients_alone(lane, wanted):
    some = {"the layers": (4, 5, 6, 7), "the image": (0,), "batch norm before": (2, 3), "biases": (5, 7)}[wanted]
    inputs = tensors(lane.device, fp32, "odd")
    for i, t in enumerate(inputs):
        t.requires_grad_(i in some)
    assert_matches(*block(), *inputs)


def test_layers_without_bias(lane):
    def without(f):
        return lambda *inputs: f(*inputs[:5], None, inputs[5], None, *inputs[6:])

    inputs = tensors(lane.device, fp32, "odd")
    assert_matches(*map(without, block(V3)), *inputs[:5], inputs[6], *inputs[8:])


def test_checkpointing(lane):
    ours, theirs = block()
    assert_matches(
        lambda *inputs: checkpoint(ours, *inputs, use_reentrant=False), theirs, *tensors(lane.device, fp32, "odd")
    )


def test_nan_and_inf_stay_in_their_image(lane):
    inputs = list(tensors(lane.device, fp32, "odd"))
    with torch.no_grad():
        inputs[0][0, 3, 2, 2], inputs[0][2, 1, 0, 0] = torch.nan, torch.inf
    for f in block(V3, training=False):
        y, grads = run_with_grads(f, inputs)
        assert y[0].isnan().any() and y[1].isfinite().all() and y[2].isnan().any()
        assert grads[0][1].isfinite().all()


def test_autocast(lane):
    if lane.name == "cpu":
        pytest.skip("PyTorch runs these dtypes")
    inputs = tensors(lane.device, fp32, "odd")
    with torch.autocast(lane.device.type, dtype=bf16), fastcnn.strict():
        y, grads = run_with_grads(block()[0], inputs)
    with torch.autocast(lane.device.type, dtype=bf16), fastcnn.backend("torch"):
        theirs, their_grads = run_with_grads(block()[1], inputs)
    truth, true_grads = run_with_grads(block()[1], [t.detach().double().requires_grad_() for t in inputs])
    assert y.dtype == theirs.dtype == bf16
    for i, three in enumerate(zip((y, *grads), (theirs, *their_grads), (truth, *true_grads), strict=True)):
        assert three[0].dtype == three[1].dtype
        assert_close_to_truth("output" if i == 0 else f"gradient of input {i - 1}", *three, bf16)


def test_evaluation_without_gradients(lane):
    inputs = [t.detach() for t in tensors(lane.device, fp32, "odd")]
    with torch.no_grad():
        assert_matches(*block(V3, join, training=False), *inputs)
        assert_matches(*block(V3, join), *inputs)


def test_names_that_are_no_activations_are_refused():
    x = torch.randn(2, 4, 3, 3)
    layers = torch.nn.Conv2d(4, 2, 1), torch.nn.Conv2d(2, 4, 1)
    with pytest.raises(ValueError, match="gate_activation must be one of relu, .* or hardsigmoid, got 'softmax'"):
        chain.squeeze_excite(x, *layers, "relu", "softmax")
    linear = torch.nn.Linear(4, 2), torch.nn.Linear(2, 4)
    gate = torch.sigmoid(linear[1](F.relu(linear[0](x.mean((2, 3))))))
    torch.testing.assert_close(chain.squeeze_excite(x, *linear), x * gate[:, :, None, None])
