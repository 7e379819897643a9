import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastcnn
import fastcnn.functional as fF
from fastcnn import nn
from fastcnn.ops.drop_connect import CPU_SMALLEST, drop_connect_conv2d_reference, drop_connect_linear_reference
from fastcnn.ops.dropout import dropout_reference
from fastcnn.testing import assert_matches

LANES = ("triton", "cpu")


def seed_of_next_call(lane):
    """The seed that a call after torch.manual_seed(11) draws."""
    torch.manual_seed(11)
    return torch.randint(2**63 - 1, (), device=lane.device)


def seeded(function):
    def call(*args):
        torch.manual_seed(11)
        return function(*args)

    return call


def randn(lane, *shape, dtype=torch.float32):
    return torch.randn(shape, device=lane.device).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "shape, out, bias", [((4, 9), 7, True), ((2, 3, 33), 17, False), ((0, 5), 3, True), ((8,), 5, True)]
)
def test_drop_connect_linear_matches_the_reference(lane, shape, out, bias, dtype):
    seed = seed_of_next_call(lane)
    assert_matches(
        seeded(lambda x, w, b: fF.drop_connect_linear(x, w, b, 0.3)),
        lambda x, w, b: drop_connect_linear_reference(x, w, b, seed, 0.3),
        randn(lane, *shape, dtype=dtype),
        randn(lane, out, shape[-1], dtype=dtype),
        randn(lane, out, dtype=dtype) if bias else None,
    )


GEOMETRIES = {
    "3x3": ((2, 6, 9, 7), (8, 6, 3, 3), 1, 1, 1, 1),
    "stride 2, groups": ((2, 6, 9, 8), (4, 3, 3, 3), (2, 1), (1, 0), 1, 2),
    "dilated": ((1, 3, 11, 9), (5, 3, 3, 2), 1, 2, (2, 1), 1),
    "1x1 of 1x1": ((3, 5, 1, 1), (7, 5, 1, 1), 1, 0, 1, 1),
    "same, even filter": ((2, 3, 6, 7), (4, 3, 2, 4), 1, "same", 1, 1),
    "one image": ((3, 6, 7), (4, 3, 3, 3), 1, "valid", 1, 1),
}


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("case", GEOMETRIES)
def test_drop_connect_conv2d_matches_the_reference(lane, case, last):
    shape, filters, *geometry = GEOMETRIES[case]
    x, w, b = torch.randn(shape), torch.randn(filters), torch.randn(filters[0])
    if last:
        x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        w = w.to(memory_format=torch.channels_last)
    seed = seed_of_next_call(lane)
    assert_matches(
        seeded(lambda x, w, b: fF.drop_connect_conv2d(x, w, b, *geometry, p=0.3)),
        lambda x, w, b: drop_connect_conv2d_reference(x, w, b, seed, 0.3, *geometry),
        *(t.to(lane.device).requires_grad_() for t in (x, w, b)),
    )


def test_dropped_weights_get_no_gradient(lane):
    seed = seed_of_next_call(lane)
    x, w = randn(lane, 6, 9), randn(lane, 7, 9)
    y = seeded(fF.drop_connect_linear)(x, w, None, 0.5)
    (grad,) = torch.autograd.grad(y.square().sum(), w)
    dropped = dropout_reference(torch.ones_like(w), seed, 0.5) == 0
    assert 0 < int(dropped.sum()) < dropped.numel() and torch.equal(grad == 0, dropped)


def test_nothing_but_input_weight_and_seed_is_kept(lane):
    x, w, b = randn(lane, 5, 3, 8, 8), randn(lane, 4, 3, 3, 3), randn(lane, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fF.drop_connect_conv2d(x, w, b)
    own = {t.untyped_storage().data_ptr() for t in (x, w, b)}
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in own]
    assert [t.numel() for t in extra] == [1]


def test_a_weight_changed_before_backward_is_noticed(lane):
    x, w = randn(lane, 2, 4), randn(lane, 3, 4)
    y = fF.drop_connect_linear(x, w)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_drop_connect_in_a_checkpointed_segment(lane):
    x, w = randn(lane, 5, 16), randn(lane, 8, 16)

    def gradient(run):
        torch.manual_seed(1)
        return torch.autograd.grad(run(lambda w: fF.drop_connect_linear(x, w, None, 0.5) ** 2, w).sum(), w)[0]

    direct = gradient(lambda f, w: f(w))
    again = gradient(lambda f, w: checkpoint(f, w, use_reentrant=False))
    torch.testing.assert_close(again, direct)


def test_double_backward(lane):
    x = randn(lane, 2, 2, 4, 4, dtype=torch.float64)
    w, b = randn(lane, 3, 2, 3, 3, dtype=torch.float64), randn(lane, 3, dtype=torch.float64)
    function = seeded(lambda *inputs: fF.drop_connect_conv2d(*inputs, padding=1, p=0.4).tanh())
    assert torch.autograd.gradcheck(function, (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, w, b), fast_mode=True)


def test_evaluation_is_the_layer_itself():
    x, w, v = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(6, 5)
    state = torch.get_rng_state()
    assert torch.equal(fF.drop_connect_conv2d(x, w, training=False), F.conv2d(x, w))
    assert torch.equal(fF.drop_connect_conv2d(x, w, p=0.0), F.conv2d(x, w))
    assert torch.equal(fF.drop_connect_linear(x, v, None, 0.5, False), F.linear(x, v))
    assert torch.equal(torch.get_rng_state(), state)


def test_modules(lane):
    linear, conv = nn.DropConnectLinear(9, 5, p=0.25), nn.DropConnectConv2d(3, 4, 3, padding=1, padding_mode="circular")
    assert repr(linear) == "DropConnectLinear(in_features=9, out_features=5, bias=True, p=0.25)"
    assert set(linear.state_dict()) == {"weight", "bias"} and isinstance(conv, torch.nn.Conv2d)
    x = torch.randn(2, 3, 6, 6, device=lane.device)
    conv = conv.to(lane.device)
    assert not torch.equal(conv(x), conv(x))
    linear = linear.to(lane.device)
    assert not torch.equal(linear(torch.ones(3, 9, device=lane.device)), linear(torch.ones(3, 9, device=lane.device)))
    with fastcnn.strict(False):
        plain = torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular").to(lane.device)
        plain.load_state_dict(conv.state_dict())
        torch.testing.assert_close(conv.eval()(x), plain(x), rtol=1e-4, atol=1e-5)


def test_pytorch_drops_the_weights_where_ours_does_not():
    with fastcnn.backend("torch"):
        y = fF.drop_connect_linear(torch.eye(40), torch.ones(40, 40))
        assert set(y.flatten().tolist()) == {0.0, 2.0}
        y = fF.drop_connect_conv2d(torch.ones(1, 1, 1, 1), torch.ones(400, 1, 1, 1))
        assert set(y.flatten().tolist()) == {0.0, 2.0}
    small = torch.ones(CPU_SMALLEST - 1, 1)
    with fastcnn.backend("auto"), fastcnn.strict(), pytest.raises(NotImplementedError, match="fewer than"):
        fF.drop_connect_linear(torch.ones(2, 1), small)


def test_drop_connect_refuses_bad_arguments():
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match="has to be between 0 and 1, but got 1.5"):
        fF.drop_connect_linear(x, w, None, 1.5)
    with pytest.raises(ValueError, match="input must have weight.shape"):
        fF.drop_connect_linear(x, w[:, :2])
    with pytest.raises(TypeError, match="training must be a bool"):
        fF.drop_connect_linear(x, w, training=1)
    with pytest.raises(ValueError, match="groups must divide"):
        fF.drop_connect_conv2d(torch.ones(1, 6, 4, 4), torch.ones(3, 3, 1, 1), groups=2)
