"""fastcnn.convert against the model as it was: what a trace could lose, what may change afterwards, what must go on."""

import copy
import io
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastcnn
from fastcnn import nn as ours

COUNTS = {"calls": 0}
FLAG = False


@pytest.fixture(autouse=True)
def plain_torch():
    # fp64 on PyTorch: what is compared is the graph; kernels have tests of their own
    with fastcnn.backend("torch"):
        yield


def conv_bn(c=4, k=3, **options):
    return nn.Sequential(nn.Conv2d(c, c, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(c))


class Block(nn.Module):
    """A residual block as people write it."""

    def __init__(self, c=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stem = conv_bn()
        self.blocks = nn.Sequential(*(blocks or (Block(), Block())))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.fc(self.blocks(x).mean((2, 3)))


def image(seed=0):
    return torch.randn(3, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(model, x, seed=5):
    torch.manual_seed(seed)
    random.seed(seed)
    x = x.clone().requires_grad_(torch.is_grad_enabled())
    output = model(x * 1)  # a tensor of the graph: some models write to it
    if not output.requires_grad:
        return [output]
    output.square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [output.detach(), x.grad, *grads]


def assert_same(model, stock, steps=2):
    """Both do the same, step after step: outputs, gradients, statistics, and the random numbers they leave."""
    for step in range(steps):
        mine = run(model, image(step))
        left = torch.rand(1)
        theirs = run(stock, image(step))
        assert torch.equal(left, torch.rand(1))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model.state_dict(), stock.state_dict())


def converted(model, **options):
    """(converted model, stock copy, report), with batch norms that are not the identity."""
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    stock = copy.deepcopy(model)
    return model, stock, fastcnn.convert(model, **options)


def test_a_converted_model_does_the_same_and_can_be_reverted():
    model = Net()
    parameters, keys, text = list(model.parameters()), list(model.state_dict()), repr(model)
    model, stock, report = converted(model)
    assert type(model.blocks[0].conv1) is ours.Conv2d and isinstance(model, Net)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys and repr(model) == text
    # 5 convolutions, 5 batch norms, the relu of each block
    assert len(report.fused) == 12 and report.fused["blocks.0.conv2"] == "with blocks.0.bn2"
    assert report.swapped == {"fc": "fastcnn.nn.Linear"} and report.kept == {}
    assert "12 fused, 1 swapped, 0 kept" in str(report)
    assert_same(model, stock)
    for mode in (False, True):
        model.train(mode), stock.train(mode)
        assert_same(model, stock)
        with torch.no_grad():
            assert_same(model, stock)
    assert fastcnn.revert(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert [list(vars(m)) for m in model.modules()] == [list(vars(m)) for m in stock.modules()]
    assert_same(model, stock)
    assert str(fastcnn.convert(model)) == str(report)  # and again


def test_copies_and_pickles_are_converted_too():
    model, stock, report = converted(Net())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    copies.append(copy.deepcopy(copies[0]))
    for other in copies:
        assert type(other) is type(model)
        mine = copy.deepcopy(stock)
        assert_same(other, mine)
        assert other._fastcnn_unit.programs  # the graph ran, not the class's forward
        assert type(fastcnn.revert(other)) is Net and type(other.blocks[0].conv1) is nn.Conv2d
    assert_same(model, stock)
    # a part of a converted model
    part = copy.deepcopy(model.blocks)
    assert type(fastcnn.revert(part)[0].conv1) is nn.Conv2d


class Patterns(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv_bn(), conv_bn()
        self.plain, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
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
    added_to_what_is_read_again, added_to_the_argument,
    changed_by_an_unknown_step, an_activation_we_lack_in_place, input_written_between, one_half_written, item_set,
    one_layer_twice, functions_and_methods, pools_and_sizes, gates, broadcast_sums, concatenations,
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


def calls_what_is_not_registered(self, x):
    return self.hidden[0](x)


REFUSED = [
    (counts_in_an_attribute, "attribute"), (counts_in_a_global, "changes a global"), (keeps_a_list, "attribute"),
    (draws_python_numbers, "random numbers"), (draws_torch_numbers, "random numbers"),
    (branches_on_a_value, "control flow"), (branches_on_a_size, "control flow"), (without_gradients, "switches"),
    (under_autocast, "switches"), (catches_errors, "control flow"), (asks_for_the_type, "type()"),
    (asks_for_the_same_object, "same object"), (asks_for_an_instance, "type of a value"), (checkpoints, "control flow"),
    (prints, "print()"), (calls_what_is_not_registered, "not registered"),
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


def reads_an_option(self, x):
    return self.body(x) * (2.0 if self.flag else 1.0)


def reads_an_option_of_an_object(self, x):
    return self.body(x) * self.options.factor


def reads_a_global(self, x):
    return self.body(x) * (2.0 if FLAG else 1.0)


class Options:
    factor = 1.0

    def __init__(self):
        self.factor = 2.0


@pytest.mark.parametrize("forward", (reads_an_option, reads_an_option_of_an_object, reads_a_global))
def test_options_may_change_after_conversion(forward, monkeypatch):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.flag, self.options = Block(), False, Options()

    Odd.forward = forward
    model, stock, _ = converted(Odd())
    assert_same(model, stock)
    for net in (model, stock):
        net.flag, net.options.factor = True, 5.0
    monkeypatch.setitem(globals(), "FLAG", True)
    assert_same(model, stock)
    assert model._fastcnn_unit.traces == 2


def test_layers_may_change_after_conversion():
    model, stock, _ = converted(Net())
    assert_same(model, stock)
    for net in (model, stock):
        net.blocks[0].bn1.momentum = None
        net.blocks[1].bn2.eps = 0.1
        net.fc = nn.Linear(4, 2, dtype=torch.float64)
        net.blocks[1].relu = nn.LeakyReLU(0.2)
    model.fc.load_state_dict(stock.fc.state_dict())
    assert_same(model, stock)
    for net in (model, stock):
        net.blocks[0].bn1.eval()  # frozen statistics
        net.blocks[0].bn2.requires_grad_(False)
        net.blocks[1].conv1.weight.requires_grad_(False)
        net.blocks[1].relu.negative_slope = 0.5
    assert_same(model, stock)
    parametrized = [nn.utils.parametrizations.weight_norm(net.blocks[0].conv2) for net in (model, stock)]
    assert type(parametrized[0]) is not nn.Conv2d
    assert_same(model, stock)


def test_parameters_may_be_exchanged_after_conversion():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.gamma = Block(), nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x):
            return self.body(x) * self.gamma

    model, stock, _ = converted(Scaled())
    for net in (model, stock):
        net.gamma = nn.Parameter(torch.full((4, 1, 1), 3.0, dtype=torch.float64))
        net.body.conv2.weight = nn.Parameter(net.body.conv2.weight.detach() * 2)
        net.body.bn1.bias = None
    assert_same(model, stock)
    assert model._fastcnn_unit.traces == 1


def test_sync_batch_norm_after_conversion():
    model, stock, _ = converted(Net())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.eval(), stock.eval()  # SyncBatchNorm trains on GPUs alone
    for a, b in zip(model.modules(), stock.modules(), strict=True):
        assert isinstance(a, nn.SyncBatchNorm) == isinstance(b, nn.BatchNorm2d)
    assert_same(model, stock)


@pytest.mark.parametrize("kind", ("forward_pre", "forward", "full_backward"))
def test_hooks_run_before_and_after_conversion(kind):
    seen = {}

    def watch(net, key):
        def hook(module, *values):
            seen.setdefault(key, []).append([v.shape for v in values if isinstance(v, torch.Tensor)])
            if kind == "forward" and isinstance(module, nn.BatchNorm2d):
                return values[-1] * 2

        for part in (net, net.blocks[0], net.blocks[0].bn1, net.blocks[1].conv2, net.stem[0]):
            getattr(part, f"register_{kind}_hook")(hook)

    net = Net().double()
    net.blocks[0].relu = nn.ReLU()
    net.blocks[1].relu = nn.ReLU()  # full backward hooks forbid writing to what they return
    later, stock = copy.deepcopy(net), copy.deepcopy(net)
    watch(net, "before"), watch(stock, "stock")
    report = fastcnn.convert(net)
    assert report.swapped["stem.0"].endswith("it has hooks") and "blocks.0.conv2" in report.fused
    fastcnn.convert(later)
    watch(later, "later")
    expected = run(stock, image())
    torch.testing.assert_close(run(net, image()), expected)
    torch.testing.assert_close(run(later, image()), expected)
    assert seen["before"] == seen["stock"] == seen["later"] and len(seen["stock"]) == 5


def test_filter_ops_and_strict():
    model, stock, report = converted(Net(), filter_fn=lambda module, name: not name.startswith("blocks.0"))
    assert type(model.blocks[0].conv1) is nn.Conv2d and "blocks.1.conv1" in report.fused
    assert report.kept["blocks.0.conv1"] == report.kept["blocks.0.bn1"] == "not selected"
    assert_same(model, stock)
    model, stock, report = converted(Net(), ops={"conv2d", "linear"})
    assert report.fused == {} and type(model.fc) is ours.Linear and type(model.stem[1]) is nn.BatchNorm2d
    assert type(fastcnn.revert(model)) is Net
    model, stock, report = converted(Net(), fuse=False)
    assert report.fused == {} and type(model) is Net and type(model.stem[1]) is ours.BatchNorm2d
    assert_same(model, stock)
    converted(Net(), strict=True, filter_fn=lambda module, name: name != "fc")
    odd = nn.Sequential(conv_bn(), nn.GroupNorm(2, 4), nn.PReLU())
    with pytest.raises(NotImplementedError, match=r"2 \(PReLU\): no kernel for torch.nn"):
        fastcnn.convert(odd, strict=True)
    assert type(odd) is nn.Sequential and type(odd[1]) is nn.GroupNorm
    with pytest.raises(NotImplementedError, match=r"1 \(ReLU\): fastcnn.nn.ReLU; not fused: it reads a tensor"):
        fastcnn.convert(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), strict=True)
    with pytest.raises(NotImplementedError, match="0 .Conv2d.: fastcnn.nn.Conv2d; not fused: no forward that was"):
        fastcnn.convert(nn.ModuleList([nn.Conv2d(4, 4, 1)]), strict=True)


def test_mistakes_are_named():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        fastcnn.convert(F.relu)
    with pytest.raises(ValueError, match="unknown op 'conv2': did you mean 'conv2d'"):
        fastcnn.convert(Net(), ops=["conv2"])
    with pytest.raises(ValueError, match="ops must be 'auto' or a collection of op names, got 'conv2d'"):
        fastcnn.convert(Net(), ops="conv2d")
    with pytest.raises(TypeError, match="filter_fn must be a function of .module, name., got str"):
        fastcnn.convert(Net(), filter_fn="fc")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        fastcnn.revert(3)


def test_calls_that_are_no_plain_tensors():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv_bn()

        def forward(self, xs, scale=1.0, *, extra=None):
            y = F.relu(self.a(xs["x"])) * scale
            return {"y": y if extra is None else y + extra, "all": [y, (y, 3)]}

    model, stock, _ = converted(Two())
    x = image()
    for call in (
        lambda m: m({"x": x}),
        lambda m: m({"x": x}, 2.0),
        lambda m: m(xs={"x": x}, scale=torch.tensor(3.0), extra=x),
        lambda m: m({"x": x, "other": object()}),
        lambda m: m({"x": x}, extra=1),
    ):
        torch.testing.assert_close(call(model), call(stock))
    assert len(model._fastcnn_unit.programs) == 5  # one of them made by convert


def test_checkpointing_compiling_exporting_scripting():
    model, stock, _ = converted(Net())
    expected = run(copy.deepcopy(stock), image())
    again = copy.deepcopy(model)
    torch.testing.assert_close(run(lambda_module(again, checkpointed=True), image()), expected)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    torch.testing.assert_close(run(compiled, image()), expected)
    model.eval(), stock.eval()
    exported = torch.export.export(model, (image(),)).module()
    torch.testing.assert_close(exported(image()), stock(image()))
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(image()), stock(image()))
    traced = torch.jit.trace(model, image())
    torch.testing.assert_close(traced(image()), stock(image()))
    assert_same(model, stock)
    assert next(scripted.parameters()).data_ptr() == next(model.parameters()).data_ptr()


def lambda_module(model, checkpointed):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=False)

    return Wrapper()


def test_distributed_and_autocast():
    model, stock, _ = converted(Net())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        torch.testing.assert_close(run(wrapped, image()), run(copy.deepcopy(stock), image()))
    finally:
        torch.distributed.destroy_process_group()
    model.float(), stock.float()
    x = image().float()
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = run(model, x), run(stock, x)
    assert [t.dtype for t in mine] == [t.dtype for t in theirs]
    truth = run(copy.deepcopy(stock).double(), x.double())
    for a, b, true in zip(mine, theirs, truth, strict=True):
        scale = float(true.abs().max())
        assert float((a - true).abs().max()) <= 2 * float((b - true).abs().max()) + 0.05 * scale


def test_functional_transforms_and_replicas_run_the_original():
    model, stock, _ = converted(Net().eval())
    stock.eval()
    x = image()
    mine, theirs = (torch.func.grad(lambda x, net=net: net(x).sum())(x) for net in (model, stock))
    torch.testing.assert_close(mine, theirs)
    replica = model._replicate_for_data_parallel()
    replica.stem = stock.blocks[0]
    assert not torch.allclose(replica(x), model(x))  # its own children ran
    meta = copy.deepcopy(model).to("meta")
    assert meta(x.to("meta")).shape == (3, 3)


@pytest.mark.parametrize("library", ("torchvision", "timm"))
def test_drop_path_draws_the_same_numbers(library):
    from fastcnn.benchmarks.networks import import_torchvision

    drop = import_torchvision().ops.StochasticDepth(0.4, "row")
    if library == "timm":
        from timm.layers import DropPath

        drop = DropPath(0.4)

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.drop = conv_bn(), conv_bn(), drop

        def forward(self, x):
            x = self.drop(F.silu(self.a(x))) + x
            return self.drop(self.b(x)) + x

    model, stock, report = converted(Dropping())
    assert len(report.fused) == 4 and report.kept == {}
    assert_same(model, stock, steps=4)
    model.eval(), stock.eval()
    assert_same(model, stock)


def test_verify_finds_what_is_wrong(monkeypatch):
    model = Net()
    fastcnn.convert(model)
    x = torch.randn(3, 4, 6, 5)
    with fastcnn.backend("auto"):
        before = copy.deepcopy(model.state_dict())
        result = fastcnn.verify(model, x)
        assert result.ok and bool(result), str(result)
        torch.testing.assert_close(model.state_dict(), before)
        names = [row[0] for row in result.rows]
        assert "output" in names and "gradient of stem.0.weight" in names and "blocks.0.bn1.running_var" in names
        chain = __import__("fastcnn.chain").chain
        right = chain.activate
        monkeypatch.setattr(chain, "activate", lambda x, kind, slope=0.0: right(x, "silu"))
        wrong = fastcnn.verify(model, x)
        assert not wrong.ok and "exceeds twice PyTorch's" in str(wrong)
