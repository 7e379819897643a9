"""A residual block of the chain, of every kind of input that its convolutions take, in the dtypes that people train in.

x -> 1x1 -> 3x3 (stride) -> 1x1, + projection, ReLU -> join, read by two 1x1 convolutions and by a sum.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRET

import fastcnn
from fastcnn import chain
from fastcnn.ops import conv2d_backward, conv_batch_norm
from fastcnn.ops import pending as passes
from fastcnn.testing import assert_matches, run_with_grads

LANES = ("triton", "cpu")
fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
SHAPES = {
    "odd": dict(n=3, c=16, k=24, wide=40, size=(5, 7)),
    "ragged channels": dict(n=2, c=5, k=3, wide=9, size=(6, 3)),
    "one channel, one image": dict(n=1, c=1, k=1, wide=1, size=(4, 5)),
    "grouped, strided": dict(n=2, c=8, k=16, wide=24, size=(7, 6), stride=2, groups=4),
}


def tensors(device, dtype, n, c, k, wide, size, channels_last=True, groups=1, **_):
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def draw(*shape, scale=1.0, like=dtype):
        drawn = torch.randn(shape, generator=generator) * scale
        drawn = drawn.to(device, like)
        return (drawn.contiguous(memory_format=layout) if drawn.dim() == 4 else drawn).requires_grad_()

    wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = lambda size: (draw(size, like=wide_dtype), draw(size, like=wide_dtype))
    return (
        draw(n, c, *size),
        *(draw(k, c, 1, 1, scale=c**-0.5), *vectors(k)),
        *(draw(k, k // groups, 3, 3, scale=(9 * k / groups) ** -0.5), *vectors(k)),
        *(draw(wide, k, 1, 1, scale=k**-0.5), *vectors(wide)),
        *(draw(wide, c, 1, 1, scale=c**-0.5), *vectors(wide)),
        *(draw(wide, wide, 1, 1, scale=wide**-0.5), *vectors(wide)),
        *(draw(wide, wide, 1, 1, scale=wide**-0.5), *vectors(wide)),
    )


def block(conv_bn, relu, add, x, *parameters, stride=1, groups=1):
    layers = [parameters[i : i + 3] for i in range(0, len(parameters), 3)]
    y = relu(conv_bn(x, *layers[0], 1, 0, 1))
    y = relu(conv_bn(y, *layers[1], stride, 1, groups))
    joined = relu(add(conv_bn(y, *layers[2], 1, 0, 1), conv_bn(x, *layers[3], stride, 0, 1)))
    both = add(conv_bn(joined, *layers[4], 1, 0, 1), conv_bn(joined, *layers[5], 1, 0, 1))
    return add(relu(both), joined)


def of_chain(x, *parameters, **how):
    def conv_bn(x, weight, gamma, beta, stride, padding, groups):
        conv = SimpleNamespace(
            weight=weight, bias=None, stride=stride, padding=padding, dilation=1, groups=groups, padding_mode="zeros"
        )
        bn = SimpleNamespace(
            weight=gamma, bias=beta, running_mean=None, running_var=None, training=True, momentum=0.1, eps=1e-5,
            track_running_stats=False, num_batches_tracked=None,
        )  # fmt: skip
        return chain.conv_batch_norm(x, conv, bn)

    relu = lambda x: chain.activate(x, "relu")
    return chain.materialize(block(conv_bn, relu, chain.add, x, *parameters, **how))


def of_torch(x, *parameters, **how):
    def conv_bn(x, weight, gamma, beta, stride, padding, groups):
        return F.batch_norm(F.conv2d(x, weight, None, stride, padding, 1, groups), None, None, gamma, beta, True)

    return block(conv_bn, F.relu, torch.add, x, *parameters, **how)


@pytest.mark.parametrize("dtype", [bf16, fp16, fp32] if INTERPRET else [fp32, bf16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_has_the_gradients_of_torchs(lane, shape, dtype, monkeypatch):
    if lane.name == "interpret":
        # small images would have two kernels
        monkeypatch.setattr(
            conv2d_backward, "pays", lambda *args, **fused: conv2d_backward.why_not(*args, **fused) is None
        )
    sizes = SHAPES[shape]
    how = {name: sizes[name] for name in ("stride", "groups") if name in sizes}
    functions = (lambda *inputs: of_chain(*inputs, **how), lambda *inputs: of_torch(*inputs, **how))
    assert_matches(*functions, *tensors(lane.device, dtype, **sizes))


def test_a_contiguous_block(lane):
    assert_matches(of_chain, of_torch, *tensors(lane.device, fp32, **SHAPES["odd"], channels_last=False))


def test_both_gradients_come_from_one_kernel_where_that_pays(lane, monkeypatch):
    if lane.name != "interpret":
        pytest.skip("CPU has no such kernel; on a GPU the prediction decides")
    ran = []
    original = conv2d_backward.conv2d_backward
    monkeypatch.setattr(conv2d_backward, "pays", lambda *args, **fused: conv2d_backward.why_not(*args, **fused) is None)
    monkeypatch.setattr(
        conv2d_backward, "conv2d_backward", lambda *args, **fused: ran.append(fused) or original(*args, **fused)
    )
    run_with_grads(of_chain, tensors(lane.device, bf16, **SHAPES["odd"]))
    kinds = [("join" if f["join"] else "pending" if f["pending"] else "plain") for f in ran]
    assert sorted(kinds) == ["join", "pending", "plain", "plain", "plain"]


@pytest.mark.parametrize("between", [None, "a second reader", "a hook", "a hook that writes"])
def test_who_takes_the_sums_runs_the_backward_of_batch_norm(lane, between, monkeypatch):
    if lane.name == "cpu":
        pytest.skip("kernels of a GPU alone")
    again = []
    original = conv_batch_norm.bn.affine_backward
    monkeypatch.setattr(conv_batch_norm.bn, "affine_backward", lambda *args: again.append(1) or original(*args))
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(5, 8, 1), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 6, 3), torch.nn.Conv2d(8, 6, 3)
    conv, bn, *readers = (layer.to(lane.device).double() for layer in layers)
    readers = readers if between == "a second reader" else readers[:1]
    inputs = torch.randn(3, 5, 6, 7, dtype=torch.float64, device=lane.device).requires_grad_(), *conv.parameters()
    value = chain.conv_batch_norm(inputs[0], conv, bn)
    if between == "a hook":
        value.scale.register_hook(torch.clone)
    elif between == "a hook that writes":
        value.shift.register_hook(lambda grad: [grad.add_(0.0), None][1])
    value = chain.activate(value, "relu")
    ours = sum(chain.conv(value, reader) for reader in readers)
    z = bn(conv(inputs[0])).relu()
    theirs = sum(reader(z) for reader in readers)
    inputs = *inputs, bn.weight, bn.bias, *readers[0].parameters()
    ours, theirs = (torch.autograd.grad(y.square().mean(), inputs) for y in (ours, theirs))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert len(again) == (between is not None)


def test_nothing_normalised_is_kept(lane):
    inputs = tensors(lane.device, fp32, **SHAPES["odd"])
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        of_chain(*inputs)
    n, _, h, w = inputs[0].shape
    images = {"x": 16, "first": 24, "second": 24, "third": 40, "projection": 40, "join": 40, "readers": 80, "sum": 40}
    parameters = sum(t.numel() for t in inputs[1:])
    vectors = 40 * sum(images.values())  # scale, shift, mean, invstd and the like
    assert sum(kept.values()) <= 4 * (n * h * w * sum(images.values()) + parameters + vectors)


def test_a_second_derivative_is_refused():
    inputs = tensors("cpu", fp32, **SHAPES["odd"])
    loss = of_chain(*inputs).sum()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, inputs[0], create_graph=True)


def test_one_value_per_channel_is_refused_before_anything_changes():
    conv, bn = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)
    before = bn.running_mean.clone()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        chain.conv_batch_norm(torch.randn(1, 3, 1, 1), conv, bn)
    assert torch.equal(bn.running_mean, before)


def test_backward_twice_gives_the_same():
    inputs = tensors("cpu", fp32, **SHAPES["odd"])
    loss = of_chain(*inputs).square().mean()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", [[0], [1], [4, 5], [12], [14, 15]])
def test_any_part_of_the_gradients(wanted):
    inputs = tensors("cpu", torch.float64, **SHAPES["odd"])
    ours = torch.autograd.grad(of_chain(*inputs).square().mean(), [inputs[i] for i in wanted])
    theirs = torch.autograd.grad(of_torch(*inputs).square().mean(), [inputs[i] for i in wanted])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("batch", [1, 64])  # a weight larger, and smaller, than the output
@pytest.mark.parametrize("kind", [None, "relu", "silu"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_evaluation_folds_batch_norm(batch, kind, backend):
    torch.manual_seed(0)
    conv, bn = torch.nn.Conv2d(16, 24, 3, padding=1), torch.nn.BatchNorm2d(24).eval()
    bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2), bn.weight.data.normal_(), bn.bias.data.normal_()
    x, residual = torch.randn(batch, 16, 4, 4), torch.randn(batch, 24, 4, 4)
    with torch.no_grad(), fastcnn.backend(backend):
        value = chain.add(chain.conv_batch_norm(x, conv, bn), residual)
        ours = chain.materialize(value if kind is None else chain.activate(value, kind))
        theirs = bn(conv(x)) + residual
        theirs = theirs if kind is None else getattr(F, kind)(theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        plain = chain.materialize(chain.activate(chain.conv_batch_norm(x, conv, bn), kind or "tanh"))
        torch.testing.assert_close(
            plain, passes.activation_reference(bn(conv(x)), kind or "tanh"), rtol=1e-4, atol=1e-5
        )
    assert conv_batch_norm.op.calls


@pytest.mark.parametrize("bn", [torch.nn.BatchNorm2d(1, track_running_stats=False), torch.nn.BatchNorm2d(5)])
def test_a_batch_norm_of_other_channels_is_refused(bn):
    with pytest.raises(ValueError, match="must have 4 elements"):
        chain.conv_batch_norm(torch.randn(2, 3, 5, 5), torch.nn.Conv2d(3, 4, 1), bn)
    with pytest.raises(ValueError, match="must have 4 elements"):
        chain.batch_norm(torch.randn(2, 4, 5, 5), bn)


@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_an_inf_stays_one_through_constant_statistics(lane, dtype):
    torch.manual_seed(0)
    conv, bn = torch.nn.Conv2d(8, 16, 1, bias=False).to(lane.device, dtype), torch.nn.BatchNorm2d(16).to(lane.device)
    bn.eval().running_var.uniform_(0.5, 2.0)
    inputs = (torch.rand(2, 8, 5, 6) + 0.5).to(lane.device, dtype).requires_grad_(), *conv.parameters()
    grad = torch.zeros(2, 16, 5, 6, dtype=dtype, device=lane.device)
    grad[1, 3, 2, 4] = torch.inf
    for read in (lambda x: chain.conv_batch_norm(x, conv, bn), lambda x: chain.batch_norm(conv(x), bn)):
        z = chain.materialize(read(inputs[0]))
        ours = torch.autograd.grad(z, (*inputs, bn.weight, bn.bias), grad)
        assert ours[0][1, :, 2, 4].isinf().all() and ours[1][3].isinf().all() and ours[3][3].isinf()
        for found in ours[:2]:
            assert not found.isnan().any() and found.isfinite().sum() == found.numel() - 8


def test_what_does_not_fit_counts_no_batch():
    conv, bn = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)
    with pytest.raises(ValueError, match="channels"):
        chain.conv_batch_norm(torch.randn(2, 5, 5, 5), conv, bn)
    with pytest.raises(ValueError, match="more than 1 value"):
        chain.conv_batch_norm(torch.randn(1, 3, 1, 1), conv, bn)
    assert bn.num_batches_tracked == 0
