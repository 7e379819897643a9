"""What PyTorch users take for granted of an op, for every op of ours, against PyTorch's own.

Each case is one function of a functional module, so that ours and torch's run the same line.
"""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastcnn
import fastcnn.functional
from fastcnn.backends import OPS, interpreting
from fastcnn.ops import common
from fastcnn.ops.decorrelated_batch_norm import decorrelated_batch_norm_reference

LANES = ("triton", "cpu")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def image():
    return randn(2, 4, 6, 5).to(memory_format=torch.channels_last)


SAMPLES = torch.linspace(0.05, 0.95, 16).view(2, 4, 2)
TARGET = torch.tensor([1, 0, -100, 4])
FACTORS = image().exp()


def hinge(F, x):
    """multi_margin_loss with p = 2, written out for PyTorch, whose own has no second derivative."""
    target, weight = TARGET.clamp(min=0).to(x.device), torch.tensor([0.5, 2.0, 1.0, 3.0, 0.7], device=x.device)
    if F is fastcnn.functional:
        return F.multi_margin_loss(x, target, p=2, weight=weight.to(x.dtype))
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        weight = weight.to(x.dtype)
    gap = (1 - x.float().gather(1, target[:, None]) + x.float()).clamp(min=0) ** 2
    gap = gap.masked_fill(torch.arange(5, device=x.device) == target[:, None], 0)
    return (gap.sum(1) / 5 * weight[target]).mean()


CASES = {
    # our CPU kernel is of the global pool alone
    "adaptive_avg_pool2d": (
        lambda F, x: F.adaptive_avg_pool2d(x, (3, 2) if x.is_cuda or interpreting() else 1),
        lambda: [image()],
    ),
    "adaptive_max_pool2d": (lambda F, x: F.adaptive_max_pool2d(x, (3, 2)), lambda: [image()]),
    "avg_pool2d": (lambda F, x: F.avg_pool2d(x, 3, 2, 1), lambda: [image()]),
    "batch_norm": (
        lambda F, x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        lambda: [image(), randn(4), randn(4, seed=1)],
    ),
    "binary_cross_entropy_with_logits": (
        lambda F, x, t: F.binary_cross_entropy_with_logits(
            x, t, FACTORS[0, 0, 0].to(x), pos_weight=FACTORS[1].to(x), reduction="none"
        ),
        lambda: [image(), randn(2, 4, 6, 5, seed=1).sigmoid()],
    ),
    "conv2d": (
        lambda F, x, w, b: F.conv2d(x, w, b, stride=(2, 1), padding=1, groups=2),
        lambda: [image(), randn(6, 2, 3, 3), randn(6)],
    ),
    "conv_transpose2d": (
        lambda F, x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=1),
        lambda: [image(), randn(4, 3, 3, 3), randn(3)],
    ),
    "cross_entropy": (
        lambda F, x: F.cross_entropy(x, TARGET.to(x.device), label_smoothing=0.1),
        lambda: [randn(4, 5)],
    ),
    "decorrelated_batch_norm": (
        lambda F, x, w, b: (
            decorrelated_batch_norm_reference(x, None, None, w, b, True, 1e-3, 2)
            if F is torch.nn.functional
            else F.decorrelated_batch_norm(x, None, None, w, b, True, eps=1e-3, group_size=2)
        ),
        lambda: [image(), randn(4), randn(4, seed=1)],
    ),
    "depthwise_conv2d": (
        lambda F, x, w, b: F.conv2d(x, w, b, (2, 1), 1, 1, 4),
        lambda: [image(), randn(8, 1, 3, 3), randn(8)],
    ),
    # of so small a probability that nothing is dropped
    "drop_connect_conv2d": (
        lambda F, x, w, b: (
            F.conv2d(x, w, b, 2, 1, 1, 2)
            if F is torch.nn.functional
            else F.drop_connect_conv2d(x, w, b, 2, 1, 1, 2, 1e-10)
        ),
        lambda: [image(), randn(6, 2, 3, 3), randn(6)],
    ),
    "drop_connect_linear": (
        lambda F, x, w, b: F.linear(x, w, b) if F is torch.nn.functional else F.drop_connect_linear(x, w, b, 1e-10),
        lambda: [randn(3, 2, 5), randn(7, 5), randn(7)],
    ),
    "dropout": (lambda F, x: F.dropout(x, 0.4), lambda: [image()]),
    "dropout1d": (lambda F, x: F.dropout1d(x, 0.4), lambda: [randn(5, 7, 3)]),
    "dropout2d": (lambda F, x: F.dropout2d(x, 0.4), lambda: [image()]),
    "dropout3d": (lambda F, x: F.dropout3d(x, 0.4), lambda: [randn(3, 7, 2, 2, 3)]),
    "fractional_max_pool2d": (
        lambda F, x: F.fractional_max_pool2d(x, 2, (3, 3), _random_samples=SAMPLES.to(x)),
        lambda: [image()],
    ),
    "gelu": (lambda F, x: F.gelu(x), lambda: [image()]),
    "group_norm": (
        lambda F, x, w, b: F.group_norm(x, 2, w, b),
        # contiguous: PyTorch 2.13 on CPU crashes where weight and bias of a channels_last image alone have gradients
        lambda: [image().contiguous(), randn(4), randn(4, seed=1)],
    ),
    "hardswish": (lambda F, x: F.hardswish(x), lambda: [image()]),
    "huber_loss": (lambda F, x, t: F.huber_loss(x, t, delta=0.7), lambda: [image(), randn(2, 4, 6, 5, seed=1)]),
    "l1_loss": (lambda F, x, t: F.l1_loss(x, t, reduction="sum"), lambda: [image(), randn(2, 4, 6, 5, seed=1)]),
    "instance_norm": (
        lambda F, x, w, b: F.instance_norm(x, None, None, w, b),
        # PyTorch makes the output of a channels_last image contiguous
        lambda: [image().contiguous(), randn(4), randn(4, seed=1)],
    ),
    "layer_norm": (
        lambda F, x, w, b: F.layer_norm(x, (4,), w, b),
        lambda: [image().permute(0, 2, 3, 1), randn(4), randn(4, seed=1)],
    ),
    "leaky_relu": (lambda F, x: F.leaky_relu(x, 0.2), lambda: [image()]),
    "linear": (lambda F, x, w, b: F.linear(x, w, b), lambda: [randn(3, 2, 5), randn(7, 5), randn(7)]),
    "local_response_norm": (lambda F, x: F.local_response_norm(x, 3, 0.1), lambda: [image()]),
    "lp_pool2d": (lambda F, x: F.lp_pool2d(x, 2, 3, 2, True), lambda: [image()]),
    "max_pool2d": (lambda F, x: F.max_pool2d(x, 3, 2, 1), lambda: [image()]),
    "mse_loss": (
        lambda F, x, t: F.mse_loss(x, t, weight=FACTORS.to(x)),
        lambda: [image(), randn(2, 4, 6, 5, seed=1)],
    ),
    "multi_margin_loss": (lambda F, x: hinge(F, x), lambda: [randn(4, 5)]),
    "relu": (lambda F, x: F.relu(x), lambda: [image()]),
    "relu6": (lambda F, x: F.relu6(x), lambda: [image()]),
    "separable_conv2d": (
        lambda F, x, w1, w2, b: (
            F.conv2d(F.conv2d(x, w1, None, 2, 1, 1, 4), w2, b)
            if F is torch.nn.functional
            else F.separable_conv2d(x, w1, w2, b, 2, 1)
        ),
        lambda: [image(), randn(8, 1, 3, 3), randn(5, 8, 1, 1), randn(5)],
    ),
    "sigmoid": (lambda F, x: F.sigmoid(x), lambda: [image()]),
    "silu": (lambda F, x: F.silu(x), lambda: [image()]),
    "smooth_l1_loss": (
        lambda F, x, t: F.smooth_l1_loss(x, t, beta=0.7, reduction="none"),
        lambda: [image(), randn(2, 4, 6, 5, seed=1)],
    ),
    "stochastic_depth": (
        # of so small a probability that nothing is dropped
        lambda F, x, z: x + z if F is torch.nn.functional else F.stochastic_depth(x, 1e-10, residual=z),
        lambda: [image(), image() + 1],
    ),
    "tanh": (lambda F, x: F.tanh(x), lambda: [image()]),
}
RANDOM = ("dropout", "dropout1d", "dropout2d", "dropout3d")


def test_every_op_has_a_case():
    import fastcnn.optim

    optimizers = {name.lower() for name in fastcnn.optim.__all__}
    # the fused chain has its own tests; it is no function of torch's
    assert set(CASES) == {op.name for op in OPS} - optimizers - {"conv_batch_norm"}
    # conv2d itself goes to depthwise_conv2d
    assert set(CASES) - {"depthwise_conv2d"} <= set(fastcnn.functional.__all__)


@pytest.fixture(params=CASES)
def case(request, lane):
    name = request.param
    op = next(op for op in OPS if op.name == name)
    if lane.name == "cpu" and not op.cpu_kernel:
        # PyTorch itself runs there: the case still checks that our way to it loses nothing
        fastcnn.strict(False)
    call, make = CASES[name]
    inputs = [t.to(lane.device) for t in make()]
    return name, call, inputs


def leaves(inputs):
    return [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]


def gradients(function, inputs):
    tensors = leaves(inputs)
    torch.manual_seed(1)
    output = function(*tensors)
    return output.detach(), torch.autograd.grad((output * weights(output)).sum(), tensors)


def weights(output):
    return randn(*output.shape).to(output.device, output.dtype)


def ours(call):
    return lambda *inputs: call(fastcnn.functional, *inputs)


def torchs(call):
    return lambda *inputs: call(torch.nn.functional, *inputs)


@pytest.mark.parametrize("name", CASES)
def test_meta_tensors_give_shapes(name):
    """Tensors without data, as models built under torch.device("meta") and tracers use them."""
    call, make = CASES[name]
    inputs = [t.to("meta").requires_grad_() for t in make()]
    output, expected = ours(call)(*inputs), torchs(call)(*inputs)
    assert output.is_meta and output.shape == expected.shape and output.stride() == expected.stride()
    grads = torch.autograd.grad(output, inputs, torch.empty_like(output))
    assert [g.shape for g in grads] == [t.shape for t in inputs]


class Recorder(TorchDispatchMode):
    """Keeps every call of an op of ours."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastcnn":
            copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
            self.calls.append((function, copies, dict(kwargs or {})))
        return function(*args, **(kwargs or {}))


def recorded_calls(call, inputs):
    with Recorder() as recorder:
        tensors = leaves(inputs)
        output = call(fastcnn.functional, *tensors)
        torch.autograd.grad((output * weights(output)).sum(), tensors)
    return recorder.calls


def test_opcheck(case):
    name, call, inputs = case
    for function, args, kwargs in recorded_calls(call, inputs):
        result = torch.library.opcheck(function, tuple(args), kwargs)
        assert set(result.values()) == {"SUCCESS"}, (function, result)


def test_compile_fullgraph(case):
    name, call, inputs = case
    expected, expected_grads = gradients(ours(call), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(ours(call), fullgraph=True, backend="aot_eager")
    output, grads = gradients(compiled, inputs)
    if name not in RANDOM:
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(grads, expected_grads)
    else:
        torch.testing.assert_close((grads[0] == 0), (output == 0))
    assert output.stride() == expected.stride()


@pytest.mark.parametrize("times_input", (True, False), ids=("f(x)*x", "f(x)+x^3"))
@pytest.mark.parametrize("through", ("grad", "backward"))
def test_double_backward_is_right(case, through, times_input):
    """The gradient of a gradient penalty; an opaque backward gets all four patterns silently wrong."""
    name, call, inputs = case

    def penalty_gradient(function):
        tensors = leaves(inputs)
        torch.manual_seed(1)
        output = function(*tensors)
        loss = (output * weights(output)).tanh().sum()
        loss = loss * tensors[0].sum() if times_input else loss + (tensors[0] ** 3).sum()
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        penalty = sum((g**2).sum() for g in first)
        if through == "grad":
            return torch.autograd.grad(penalty, tensors)
        penalty.backward()
        return [t.grad for t in tensors]

    if name in RANDOM:
        # torch draws another mask: compare with a product by the mask that ours drew
        torch.manual_seed(1)
        kept = call(fastcnn.functional, torch.ones_like(inputs[0]))
        expected = penalty_gradient(lambda x: x * kept)
    else:
        expected = penalty_gradient(torchs(call))
    for mine, theirs in zip(penalty_gradient(ours(call)), expected, strict=True):
        # sums of squares of sums: fp32 noise grows with them, a wrong formula is off by whole factors
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("reentrant", (True, False))
def test_activation_checkpointing(case, reentrant):
    name, call, inputs = case
    expected, expected_grads = gradients(ours(call), inputs)
    tensors = leaves(inputs)
    torch.manual_seed(1)
    output = checkpoint(ours(call), *tensors, use_reentrant=reentrant)
    torch.rand(3)  # other random numbers in between do not change the recomputed mask
    (output * weights(output)).sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close([t.grad for t in tensors], list(expected_grads))


def test_autocast_gives_torchs_dtypes(case, lane):
    name, call, inputs = case
    if lane.name == "cpu" and name in ("depthwise_conv2d", "separable_conv2d"):
        # autocast asks for a dtype that numba does not have
        fastcnn.strict(False)
    with torch.autocast(lane.device.type, torch.bfloat16):
        output, grads = gradients(ours(call), inputs)
        expected, expected_grads = gradients(torchs(call), inputs)
    assert output.dtype == expected.dtype
    assert [g.dtype for g in grads] == [g.dtype for g in expected_grads]
    if name not in RANDOM:
        torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(grads, expected_grads, rtol=5e-2, atol=5e-2)


def test_gradients_only_where_wanted(case):
    name, call, inputs = case
    _, full = gradients(ours(call), inputs)
    for needs in itertools.product((True, False), repeat=len(inputs)):
        if not any(needs):
            continue
        tensors = [
            t.detach().clone(memory_format=torch.preserve_format).requires_grad_(n)
            for t, n in zip(inputs, needs, strict=True)
        ]
        torch.manual_seed(1)
        output = call(fastcnn.functional, *tensors)
        (output * weights(output)).sum().backward()
        for tensor, need, expected in zip(tensors, needs, full, strict=True):
            if need:
                torch.testing.assert_close(tensor.grad, expected)
                assert tensor.grad.stride() == tensor.stride()
            else:
                assert tensor.grad is None


def test_gradient_arrives_in_any_layout(case):
    name, call, inputs = case
    tensors = leaves(inputs)
    output = call(fastcnn.functional, *tensors)
    grad = weights(output)
    expected = torch.autograd.grad(output, tensors, grad, retain_graph=True)
    layouts = [grad.expand(grad.shape)]
    if grad.dim() >= 2:
        layouts += [grad.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([grad, grad], -1)[..., 0]]
    for layout in layouts:
        torch.testing.assert_close(torch.autograd.grad(output, tensors, layout, retain_graph=True), expected)
    # a sum's gradient is one element expanded
    ones = torch.ones((), device=output.device).expand(output.shape)
    torch.testing.assert_close(
        torch.autograd.grad(output, tensors, ones, retain_graph=True),
        torch.autograd.grad(output, tensors, ones.contiguous(), retain_graph=True),
    )


def test_backward_twice_and_after_a_change(case):
    name, call, inputs = case
    tensors = leaves(inputs)
    output = call(fastcnn.functional, *tensors)
    output.sum().backward(retain_graph=True)
    once = tensors[0].grad.clone()
    output.sum().backward()
    torch.testing.assert_close(tensors[0].grad, 2 * once)
    if name in ("conv2d", "conv_transpose2d", "linear", "batch_norm", "silu"):
        output = call(fastcnn.functional, *tensors)
        with torch.no_grad():
            tensors[0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_no_grad_and_inference_mode_keep_no_graph(case):
    name, call, inputs = case
    with torch.no_grad():
        assert call(fastcnn.functional, *leaves(inputs)).grad_fn is None
    with torch.inference_mode():
        assert call(fastcnn.functional, *inputs).is_inference()


def test_torch_func_transforms_are_right(case):
    """They run on PyTorch's ops: right, not fast."""
    name, call, inputs = case
    if name in RANDOM:
        return
    with fastcnn.strict(False):
        mine = torch.func.grad(lambda x: ours(call)(x, *inputs[1:]).tanh().sum())(inputs[0])
        theirs = torch.func.grad(lambda x: torchs(call)(x, *inputs[1:]).tanh().sum())(inputs[0])
        torch.testing.assert_close(mine, theirs)


def test_forward_mode_gradients_are_right(case):
    """Like torch.func: on PyTorch's ops. An op of ours that ran would drop the tangent silently."""
    name, call, inputs = case
    with fastcnn.strict(False), forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
        tangent = forward_ad.unpack_dual(call(fastcnn.functional, dual, *inputs[1:])).tangent
        expected = forward_ad.unpack_dual(call(torch.nn.functional, dual, *inputs[1:])).tangent
    if name in RANDOM:
        assert 0 < (tangent == 0).sum() < tangent.numel()
    else:
        torch.testing.assert_close(tangent, expected)


def test_opcheck_of_the_activations_in_place(lane):
    if lane.name != "cpu":
        x = torch.randn(5, 7, device=lane.device)
        result = torch.library.opcheck(torch.ops.fastcnn.activation_.default, (x, "silu", 0.0, "triton"))
        assert set(result.values()) == {"SUCCESS"}


def test_every_registered_op_was_opchecked(lane):
    """Every torch.ops.fastcnn op is reached by some case above, or named here with the test that checks it."""
    # opchecked in the tests of their ops
    elsewhere = {"activation_", "dropout_", "feature_dropout_", "batch_norm_eval", "decorrelated_batch_norm_eval"}
    reached = set()
    for call, make in CASES.values():
        with fastcnn.strict(False):
            for function, _, _ in recorded_calls(call, [t.to(lane.device) for t in make()]):
                reached.add(function._schema.name.split("::")[1])
    defined = {name.split("::")[1].split(".")[0] for name in common.library._op_defs}
    if lane.name != "cpu":
        assert defined - reached - elsewhere == set()
