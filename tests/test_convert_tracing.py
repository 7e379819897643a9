"""What a trace of torch.fx could lose (writes to shared memory, side effects, modes): convert keeps it or refuses."""

import copy
import gc
import random

import pytest
import torch
import torch.nn.functional as F
from converted_nets import Block, assert_same, conv_bn, converted, image, run
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastcnn
from fastcnn.benchmarks.networks import import_torchvision

COUNTS = {"calls": 0}


@pytest.fixture(autouse=True)
def plain_torch():
    # fp64 on PyTorch: what is compared is the graph; kernels have tests of their own
    with fastcnn.backend("torch"):
        yield


class Patterns(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv_bn(), conv_bn()
        self.plain, self.norm, self.squeeze = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.relu, self.mish = nn.ReLU(inplace=True), nn.Mish(inplace=True)
        self.drop, self.identity = nn.Dropout(0.0), nn.Identity()


def written_and_read_again(self, x):
    y = self.a(x)
    return self.relu(y) + y


def written_and_read_by_a_convolution(self, x):
    y = self.a(x)
    z = self.relu(y)
    return self.b(y) + z


def written_through_a_view(self, x):
    y = self.a(x)
    self.relu(y.view(y.shape[0], -1))
    return y * 2


def written_through_an_identity(self, x):
    y = self.a(x)
    self.relu(self.identity(self.drop(y)))
    return y.sigmoid()


def captured_and_written_later(self, x):
    y = self.plain(x)
    s = self.a(x) + y
    y.mul_(2)
    return F.relu(s) + y


def captured_value_written_later(self, x):
    y, z = self.a(x), self.b(x)
    s = y + z
    z.clamp_(min=0.1)
    return F.relu(s) * z


def input_of_a_norm_written_later(self, x):
    h = x * 1
    v = self.norm(h)
    h.mul_(3)
    return v + h


def input_of_a_convolution_written_later(self, x):
    h = x * 1
    y = F.relu(self.a(h))
    h.mul_(3)
    return y + F.relu(torch.cat([self.b(h), self.b(y)], 1)[:, ::2]) + h


def added_to_what_is_read_again(self, x):
    h = self.plain(x)
    g = h
    h += self.a(x)
    return h * g


def added_to_the_argument(self, x):
    x += self.a(x)
    return self.b(x)


def changed_by_an_unknown_step(self, x):
    y = self.a(x)
    w = y + x
    y.clamp_(min=0.1)
    return w * y


def an_activation_we_lack_in_place(self, x):
    y = self.a(x)
    s = y + x
    return self.mish(y) + s + y


def input_written_between(self, x):
    h = x * 1
    y = self.a[0](h)
    h.mul_(2)
    return self.a[1](y) + h


def one_half_written(self, x):
    y = self.a(x)
    left, right = y.chunk(2, 1)
    left.add_(1)
    return torch.cat([right, left, y], 1)


def written_through_a_view_while_a_sum_waits(self, x):
    y = F.relu(self.a(x) + x)
    z = F.relu(self.b(y))
    s = z + y
    y[:, :1].mul_(2)
    t = F.relu(self.b(z))
    z[:, :1].mul_(3)
    return F.relu(s) + t


def item_set(self, x):
    y = self.a(x)
    y[:, 0] = 0
    return F.relu(y) + self.b(x)


def one_layer_twice(self, x):
    return F.relu(self.a(F.relu(self.a(x)))) + F.relu(self.norm(self.plain(x)))


def functions_and_methods(self, x):
    y = F.leaky_relu(self.a(x), 0.3)
    z = torch.add(F.hardtanh(self.b(y), 0, 6), F.silu(self.norm(y)))
    return z.relu() * torch.sigmoid(self.plain(F.adaptive_avg_pool2d(z, 1)))


def pools_and_sizes(self, x):
    y = F.relu(self.a(x))
    n, c, h, w = y.shape
    z = F.max_pool2d(y, 2) + F.avg_pool2d(y, kernel_size=2, ceil_mode=False)
    return z.reshape(n, c * (h // 2) * (w // 2)) * y.mean((2, 3)).sum() + y.size(1) + y.dim()


def gates(self, x):
    y = F.silu(self.a(x))
    gate = self.plain(y.mean((2, 3), keepdim=True)).sigmoid()
    return F.relu(y * gate + x) + gate * self.b(y)


def squeeze_excite(self, x):
    y = F.silu(self.a(x))
    gate = F.hardsigmoid(self.plain(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)), inplace=True)))
    z = gate * y
    other = self.plain(F.silu(self.squeeze(z.mean((2, 3), keepdim=True))))
    return self.b(z) + z * other.sigmoid_() + other


def broadcast_sums(self, x):
    y = self.a(x)
    return (y + y.mean((2, 3), keepdim=True)) * (self.b(x) + self.plain(x)[:1]) + (y + 1)


def concatenations(self, x):
    y = F.relu(self.a(x))
    return F.relu(torch.cat([y, x, self.b(y)], dim=1)) + torch.cat((y, y, y), 1)


def output_is_a_value_twice(self, x):
    y = self.a(x)
    return torch.stack([y, F.relu(y)]) + y + y


PATTERNS = [
    written_and_read_again, written_and_read_by_a_convolution, written_through_a_view, written_through_an_identity,
    captured_and_written_later, captured_value_written_later, input_of_a_norm_written_later,
    input_of_a_convolution_written_later, added_to_what_is_read_again, added_to_the_argument,
    changed_by_an_unknown_step, an_activation_we_lack_in_place, input_written_between, one_half_written, item_set,
    written_through_a_view_while_a_sum_waits,
    one_layer_twice, functions_and_methods, pools_and_sizes, gates, squeeze_excite, broadcast_sums, concatenations,
    output_is_a_value_twice,
]  # fmt: skip


@pytest.mark.parametrize("forward", PATTERNS, ids=lambda f: f.__name__)
def test_what_a_forward_does_with_its_tensors(forward):
    cls = type("Net", (Patterns,), {"forward": forward})
    model, stock, report = converted(cls())
    assert model._fastcnn_unit.programs
    if forward not in (input_written_between, input_of_a_norm_written_later):
        assert any(name.startswith(("a", "norm")) for name in report.fused)
    for mode in (True, False):
        model.train(mode), stock.train(mode)
        try:
            expected = run(copy.deepcopy(stock), image())
        except RuntimeError:  # PyTorch itself refuses to differentiate what was written
            expected = None
        if expected is not None:
            assert_same(model, stock)
        with torch.no_grad():
            assert_same(model, stock)


def counts_in_an_attribute(self, x):
    self.calls += 1
    return self.body(x) * self.calls


def counts_in_a_global(self, x):
    COUNTS["calls"] += 1
    return self.body(x)


def keeps_a_list(self, x):
    self.history.append(1)
    return self.body(x) * len(self.history)


def draws_python_numbers(self, x):
    return self.body(x) * random.random()


def draws_torch_numbers(self, x):
    return self.body(x) + torch.rand(1).item()


def branches_on_a_value(self, x):
    return self.body(x) if x.sum() > 0 else -self.body(x)


def branches_on_a_size(self, x):
    return self.body(x) if x.shape[-1] % 2 else -self.body(x)


def without_gradients(self, x):
    with torch.no_grad():
        y = self.body(x)
    return y + x


def under_autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.body(x)


def catches_errors(self, x):
    try:
        factor = 2 if x.sum() > -1e9 else 3
    except Exception:
        factor = 5
    return self.body(x) * factor


def asks_for_the_type(self, x):
    return self.body(x) if type(x) is torch.Tensor else x


def asks_for_the_same_object(self, x):
    y = self.identity(x)
    return self.body(x) * (3 if y is x else 1)


def asks_for_an_instance(self, x):
    sizes = x.shape
    return self.body(x) * (2 if isinstance(sizes[0], int) else 3)


def checkpoints(self, x):
    return checkpoint(self.body, x, use_reentrant=False)


def prints(self, x):
    print("forward")
    return self.body(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


@torch.jit.script
def scripted(x):
    return x * torch.sigmoid(x)


def calls_an_autograd_function(self, x):
    return self.body(Doubled.apply(x))


def calls_a_scripted_function(self, x):
    return scripted(self.body(x))


def makes_a_tensor_of_a_value(self, x):
    return self.body(torch.as_tensor(x))


def matches_classes(self, x):
    match x:
        case torch.Tensor():
            return self.body(x)
    return x


def calls_what_is_not_registered(self, x):
    return self.hidden[0](x)


REFUSED = [
    (counts_in_an_attribute, "attribute"), (counts_in_a_global, "changes a global"), (keeps_a_list, "attribute"),
    (draws_python_numbers, "random numbers"), (draws_torch_numbers, "random numbers"),
    (branches_on_a_value, "control flow"), (branches_on_a_size, "control flow"), (without_gradients, "switches"),
    (under_autocast, "switches"), (catches_errors, "control flow"), (asks_for_the_type, "type()"),
    (asks_for_the_same_object, "same object"), (asks_for_an_instance, "type of a value"), (checkpoints, "control flow"),
    (prints, "print()"), (calls_an_autograd_function, "looks inside"), (calls_a_scripted_function, "looks inside"),
    (makes_a_tensor_of_a_value, "looks inside"), (matches_classes, "looks inside"),
    (calls_what_is_not_registered, "not registered"),
]  # fmt: skip


@pytest.mark.parametrize("forward, reason", REFUSED, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("inside", (False, True), ids=("root", "inside"))
def test_what_a_trace_would_lose_is_refused(forward, reason, inside):
    """With its reason; what is around it and inside it is fused."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.identity, self.calls, self.history = Block(), nn.Identity(), 0, []
            self.hidden = [self.body]
            if forward is calls_what_is_not_registered:
                del self.body

    Odd.forward = forward
    saved = COUNTS["calls"]
    odd = Odd()
    if forward is calls_what_is_not_registered:
        odd.hidden = [Block().double()]
    model, stock, report = converted(nn.Sequential(conv_bn(), odd) if inside else odd)
    name = "1" if inside else ""
    assert reason in report.kept[name]
    assert odd.calls == 0 and odd.history == []
    COUNTS["calls"] = saved
    if forward is not calls_what_is_not_registered:
        assert f"{name}.body.conv1".lstrip(".") in report.fused
    if inside:
        assert "0.0" in report.fused
    assert_same(model, stock)
    if forward is counts_in_a_global:
        assert COUNTS["calls"] == saved + 4
    assert odd.calls == (2 if forward is counts_in_an_attribute else 0)


def test_isinstance_of_values_is_known_where_the_tensor_is():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = conv_bn()

        def forward(self, x):
            y = self.body(x)
            assert torch.is_tensor(x) and isinstance(y, torch.Tensor | list) and not isinstance(y, (list, nn.Module))
            return F.relu(y)

    model, stock, report = converted(Asking())
    assert "body.0" in report.fused and isinstance is __import__("builtins").isinstance
    assert isinstance.__class__ is type(len)  # Python's own again
    assert_same(model, stock)


def test_what_others_hung_on_the_garbage_collector_is_not_the_forwards_doing():
    namespace = {"__name__": "somebody"}
    exec("def callback(phase, info):\n    global seen\n    seen = phase", namespace)
    gc.callbacks.append(namespace["callback"])
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        _, _, report = converted(conv_bn())
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(namespace["callback"])
    assert "0" in report.fused


class StandardisedConv2d(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class NormOfChannels(nn.LayerNorm):
    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class NormThenActivation(nn.GroupNorm):
    def __init__(self):
        super().__init__(2, 4)
        self.act = Tanhlike()

    def forward(self, x):
        return self.act(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


class Tanhlike(nn.Module):
    def forward(self, x):
        return F.gelu(x, approximate="tanh")


def functions():
    norms = NormOfChannels(4), NormThenActivation()
    return nn.Sequential(StandardisedConv2d(4, 4, 3, padding=1), *norms, Tanhlike(), conv_bn(), Tanhlike())


def test_functions_that_forwards_call_are_ours():
    model, stock, report = converted(functions())
    calls = {"0": "conv2d", "1": "layer_norm", "2": "group_norm", "2.act": "gelu", "3": "gelu"}
    assert report.swapped == {name: f"its forward calls fastcnn.functional.{op}" for name, op in calls.items()}
    assert report.fused == {"4.0": "with 4.1", "4.1": "with 4.0", "5": "gelu_tanh"} and report.kept == {}
    assert_same(model, stock)
    before = {op.name: sum(op.calls.values()) for op in fastcnn.backends.OPS}
    model(image())
    after = {op.name: sum(op.calls.values()) for op in fastcnn.backends.OPS}
    assert {"conv2d", "layer_norm", "group_norm", "gelu"} <= {name for name in after if after[name] > before[name]}


def test_functions_of_forwards_are_selected_as_layers_are():
    model, stock, report = converted(functions(), ops=("conv2d", "gelu"), filter_fn=lambda module, name: name != "3")
    assert set(report.swapped) == {"0", "2.act", "4.0", "5"}
    assert report.kept["1"].startswith("no kernel for") and report.kept["2"].endswith("NormThenActivation")
    assert "3" in report.kept
    assert_same(model, stock)


def test_convolution_that_pads_itself_is_fused_with_its_batch_norm():
    import_torchvision()
    layers = pytest.importorskip("timm").layers

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = layers.Conv2dSame(4, 4, (5, 3), 2, bias=False)
            self.skip = layers.Conv2dSame(4, 4, 1, (2, 1), dilation=2)
            self.again = layers.Conv2dSame(4, 4, 2, 2)
            self.norm, self.norm_skip, self.norm_again = (nn.BatchNorm2d(4) for _ in range(3))
            self.stem = conv_bn()

        def forward(self, x):
            x = F.relu(self.stem(x))
            y = F.relu(self.norm(self.wide(x)))
            return self.norm_again(self.again(y)).mean() + self.norm_skip(self.skip(x)) + x.mean()

    model, stock, report = converted(Same())
    assert {"wide", "norm", "skip", "norm_skip", "again", "norm_again"} <= set(report.fused), report
    assert_same(model, stock)
    fastcnn.convert(model, ops=("batch_norm",))
    assert_same(model, stock, steps=1)
