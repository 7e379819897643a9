"""fastcnn.convert against the model as it was: what may change afterwards, and what must go on as before."""

import copy
import inspect
import io
import pickle
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from converted_nets import Block, Net, assert_same, conv_bn, converted, image, run
from test_chain_bytes import saved_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastcnn
from fastcnn import nn as ours
from fastcnn.models import create_model

FLAG = False


@pytest.fixture(autouse=True)
def plain_torch():
    # fp64 on PyTorch: what is compared is the graph; kernels have tests of their own
    with fastcnn.backend("torch"):
        yield


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


def test_options_inside_of_options_may_change_after_conversion():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scales = Block(), {"factors": [[1.0, 2.0]]}
            self.options = SimpleNamespace(inner=SimpleNamespace(factor=3.0))

        def forward(self, x):
            return self.body(x) * self.scales["factors"][0][1] * self.options.inner.factor

    model, stock, _ = converted(Odd())
    assert_same(model, stock)
    for net in (model, stock):
        net.scales["factors"][0][1] = 5.0
    assert_same(model, stock)
    for net in (model, stock):
        net.options.inner.factor = 7.0
    assert_same(model, stock)
    assert model._fastcnn_unit.traces == 3


def test_classes_and_functions_may_be_patched_after_conversion(monkeypatch):
    class Inner(Block):
        factor = 1.0

        def forward(self, x):
            return activation_of_inner(super().forward(x)) * self.factor

    model, stock, _ = converted(Net(Inner(), Block()))
    assert_same(model, stock)
    Inner.factor = 2.0
    assert_same(model, stock)
    monkeypatch.setitem(globals(), "activation_of_inner", torch.tanh)
    assert_same(model, stock)
    Inner.forward = lambda self, x: F.relu(self.bn1(self.conv1(x)) + x)
    assert_same(model, stock)
    assert model._fastcnn_unit.traces == 4
    copy.deepcopy(model), pickle.dumps(model.stem)  # these write into classes, too
    assert_same(model, stock)
    assert model._fastcnn_unit.traces == 4


def activation_of_inner(x):
    return F.silu(x)


def test_a_module_that_changes_all_the_time_runs_as_it_is(caplog):
    model, stock, _ = converted(conv_bn())
    for step in range(30):
        for net in (model, stock):
            net[1].momentum = 0.1 + step / 100
        if step < 27:
            model(image()), stock(image())
    assert model._fastcnn_unit.traces == 25 and "changes itself between calls" in caplog.text
    assert_same(model, stock)
    model, stock, _ = converted(conv_bn())
    for step in range(30):  # a schedule
        for net in (model, stock):
            net[1].momentum = 0.1 + step / 100
        model(image()), model(image()), stock(image()), stock(image())
    assert model._fastcnn_unit.traces == 30 and len(next(iter(model._fastcnn_unit.programs.values()))) == 8
    assert_same(model, stock)


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


def test_parametrizations_come_and_go():
    def scaled(net):
        nn.utils.parametrizations.weight_norm(net.blocks[0].conv1)
        nn.utils.parametrize.register_parametrization(net.stem[1], "weight", nn.Softplus())

    model, stock, _ = converted(Net())
    scaled(model), scaled(stock)
    assert_same(model, stock)
    fastcnn.revert(model)
    for a, b in zip(model.modules(), stock.modules(), strict=True):
        assert type(a).__name__ == type(b).__name__ and type(a).__mro__[1:] == type(b).__mro__[1:]
    assert_same(model, stock)
    fastcnn.convert(model)
    assert_same(model, stock)
    for net in (model, stock):
        nn.utils.parametrize.remove_parametrizations(net.blocks[0].conv1, "weight")
        nn.utils.parametrize.remove_parametrizations(net.stem[1], "weight")
    assert_same(model, stock)
    fastcnn.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


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


def test_a_network_made_layer_by_layer_is_fused_until_it_is_reverted():
    model = create_model("mobilenet_v2", num_classes=3, width_mult=0.25, fused=False)
    images = torch.randn(2, 3, 64, 64)
    apart = saved_bytes(model, images)
    fastcnn.convert(model)
    assert saved_bytes(model, images) <= 0.5 * apart
    assert saved_bytes(fastcnn.revert(model), images) == apart
    fastcnn.convert(model, fuse=False)
    assert saved_bytes(model, images) > 0.8 * apart


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


def test_pools_in_inference_mode_and_under_checkpoints():
    class Pooled(Net):
        def forward(self, x):
            x = F.max_pool2d(F.relu(self.stem(x)), 2)
            return self.fc(F.max_pool2d(self.blocks(x), 2).mean((2, 3)))

    model, stock, _ = converted(Pooled())
    expected = run(copy.deepcopy(stock), image())
    with fastcnn.backend("cpu"):
        torch.testing.assert_close(run(lambda_module(copy.deepcopy(model), checkpointed=True), image()), expected)
    for mode in (True, False):
        model.train(mode), stock.train(mode)
        with torch.inference_mode():
            torch.testing.assert_close(model(image()), stock(image()))
        assert_same(model, stock)


@pytest.mark.parametrize("backend", ("torch", "cpu"))
def test_an_evaluation_goes_back_after_training_has_moved_the_statistics(backend):
    model, _, _ = converted(Net())
    later = copy.deepcopy(model)
    with fastcnn.backend(backend):
        for net in (model, later):
            net.eval()
            loss = net(image()).square().sum()
            net.train()
            if net is later:
                net(image(1))
            loss.backward()
    grads = ([p.grad for p in net.parameters()] for net in (model, later))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_graph_modules_and_their_edits():
    model = torch.fx.symbolic_trace(Net().double())
    stock = copy.deepcopy(model)
    report = fastcnn.convert(model)
    assert len(report.fused) == 12
    assert_same(model, stock)
    for net in (model, stock):
        for node in net.graph.nodes:
            if node.op == "call_function" and node.target is F.relu:
                node.target, node.kwargs = F.silu, {}
        net.recompile()
    assert_same(model, stock)
    assert model._fastcnn_unit.traces == 2
    assert fastcnn.revert(pickle.loads(pickle.dumps(model)))(image()).shape == (3, 3)
    fastcnn.revert(model)
    assert_same(model, stock)


def test_layers_in_lists_of_a_forward_that_cannot_be_recorded():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.named = nn.ModuleList([Block(), Block()]), nn.ModuleDict({"last": Block()})

        def forward(self, x):
            for layer in self.layers:
                if x.shape[0] > 1:
                    x = layer(x)
            return self.named["last"](x)

    model, stock, report = converted(Odd())
    assert len(report.fused) == 15 and "control flow" in report.kept[""]
    assert_same(model, stock)


def test_the_signature_and_the_type_of_the_result_stay():
    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = conv_bn(), nn.ModuleList([Block(), Block()])

        def forward(self, x, *, scale: float = 2.0):
            levels = OrderedDict()
            x = F.relu(self.stem(x))
            for i, block in enumerate(self.blocks):
                levels[f"level{i}"] = x = block(x) * scale
            return levels

    model, stock, report = converted(Levels())
    assert inspect.signature(model.forward) == inspect.signature(stock.forward)
    assert len(report.fused) == 12
    results = [net(image()) for net in (model, stock)]
    assert [type(r) for r in results] == [OrderedDict] * 2 and list(results[0]) == ["level0", "level1"]
    torch.testing.assert_close(dict(results[0]), dict(results[1]))


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
