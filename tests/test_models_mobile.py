"""What is special of MobileNet v1, v2, v3, EfficientNet and their blocks; tests/architectures.py has their lines."""

import copy
import math

import pytest
import torch
from same_networks import assert_same_under_autocast
from test_architectures import assert_same, hostile, step
from test_chain_bytes import saved_bytes
from torch import nn

import fastcnn
from fastcnn import chain
from fastcnn import nn as ours
from fastcnn.benchmarks import bench_models, networks
from fastcnn.benchmarks.training_step import errors
from fastcnn.models import create_model
from fastcnn.models.mobilenet_v3 import SMALL
from fastcnn.testing import FLOORS, assert_close_to_truth

LANES = ("triton", "cpu")
try:
    models = networks.import_torchvision().models
except ImportError:
    pytest.skip("torchvision is not installed", allow_module_level=True)
timm = pytest.importorskip("timm")

TRAINED = ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0")


def stock(name, **options):
    if name == "mobilenet_v1":
        return timm.create_model("mobilenetv1_100", **options)
    return models.get_model(name, weights=None, dropout=0.0, **options)


def pair(name, dtype=torch.float64, **options):
    """Ours, and theirs with the same weights, loaded by their names."""
    theirs = hostile(stock(name, num_classes=5, **options)).to(dtype)
    mine = create_model(name, num_classes=5, dropout=0.0, **options).to(dtype)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
def test_initialisation_is_torchvisions(name):
    torch.manual_seed(3)
    mine = create_model(name, num_classes=7).state_dict()
    torch.manual_seed(3)
    for key, tensor in stock(name, num_classes=7).state_dict().items():
        assert torch.equal(mine[key], tensor), key


def test_initialisation_of_mobilenet_v1():
    model = create_model("mobilenet_v1", num_classes=10)
    assert float(model.blocks[0][0].conv_dw.weight.detach().std()) == pytest.approx(math.sqrt(2 / 9), rel=0.2)
    assert float(model.blocks[4][1].conv_pw.weight.detach().std()) == pytest.approx(math.sqrt(2 / 1024), rel=0.02)
    assert 0.3 < float(model.classifier.weight.detach().abs().max()) <= 10**-0.5
    assert not model.classifier.bias.any()


@pytest.mark.parametrize("width", [0.35, 1.25])
def test_width_is_torchvisions(width):
    for name in ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"):
        with torch.device("meta"):
            mine, theirs = create_model(name, width_mult=width), stock(name, width_mult=width)
        shapes = lambda model: {key: tensor.shape for key, tensor in model.state_dict().items()}
        assert shapes(mine) == shapes(theirs)


def test_timms_wide_mobilenet_v1_loads():
    with torch.device("meta"):
        mine, theirs = create_model("mobilenet_v1", width_mult=1.25), timm.create_model("mobilenetv1_125")
    mine.load_state_dict(theirs.state_dict(), assign=True)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
def test_networks_in_fp64(name):
    # drawn as theirs: efficientnet_b0 drops branches
    mine, theirs = pair(name)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with fastcnn.backend("torch"):
        assert_same(step(mine, images), step(theirs, images))
        mine.eval(), theirs.eval()
        assert_same(step(mine, images[:1]), step(theirs, images[:1]))


def small(name, dtype, features):
    """The first features of a network of few channels, and a classifier of what they give; ours and theirs."""
    if name == "efficientnet_b0":
        settings, _ = models.efficientnet._efficientnet_conf("efficientnet_b0", width_mult=0.4, depth_mult=1.0)
        theirs = models.EfficientNet(settings, 0.2, 0.5, num_classes=5, last_channel=512)
        mine = create_model(name, num_classes=5, width_mult=0.4, dropout=0.0, stochastic_depth_prob=0.5)
    elif name == "mobilenet_v1":
        theirs = timm.models.efficientnet._gen_mobilenet_v1("mobilenetv1_100", 0.25, num_classes=5)
        mine = create_model(name, num_classes=5, width_mult=0.25)
        for model in (mine, theirs):
            model.blocks = model.blocks[:features]
            model.classifier = nn.Linear(model.blocks[-1][-1].bn2.num_features, 5)
    else:
        theirs = stock(name, num_classes=5, width_mult=0.35)
        mine = create_model(name, num_classes=5, width_mult=0.35, dropout=0.0)
    if name != "mobilenet_v1":
        for model in (mine, theirs):
            model.features = model.features[:features]
            channels = [m for m in model.features.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features
            model.classifier = nn.Linear(channels, 5)
    mine.load_state_dict(hostile(theirs).state_dict())
    return mine.to(dtype), theirs.to(dtype)


FIRST = {"mobilenet_v1": 2, "mobilenet_v2": 4, "mobilenet_v3_small": 4, "efficientnet_b0": 3}


@pytest.mark.parametrize("name", FIRST)
def test_first_blocks_in_fp32(lane, name):
    mine, theirs = small(name, torch.float32, FIRST[name])
    truth = copy.deepcopy(theirs).double()
    images = torch.randn(2, 3, 22, 26).to(memory_format=torch.channels_last)
    with fastcnn.strict(False):  # theirs, and the linear layer
        found, expected, true = step(mine.to(lane.device), images), step(theirs, images), step(truth, images.double())
    for key, tensor in found.items():
        assert_close_to_truth(key, tensor.cpu(), expected[key], true[key].double(), torch.float32)


@pytest.mark.parametrize("name", TRAINED)
def test_networks_in_fp32(lane, name):
    if lane.name == "interpret":
        pytest.skip("whole networks take minutes in the interpreter; their first blocks run there")
    mine, theirs = pair(name, torch.float32)
    truth = copy.deepcopy(theirs).double()
    images = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    results = []
    with fastcnn.strict(False):
        for model, batch in ((mine, images), (theirs, images), (truth, images.double())):
            found = step(model, batch)
            output = found.pop("output 0")
            grads = {key: found[key] for key, _ in model.named_parameters()} | {"images": found["images"]}
            results.append((output.square().sum(), grads))
    loss, relative = errors(results[0], results[2])
    stock_loss, stock_relative = errors(results[1], results[2])
    floor = FLOORS[torch.float32] * (1 + float(results[2][0]))
    # rounding grows through the network: a tensor's error is measured by the largest of PyTorch's
    assert loss <= 2 * stock_loss + floor
    worst = max(relative, key=relative.get)
    assert relative[worst] <= 2 * max(stock_relative.values()), worst


def test_values_are_not_stored():
    images = torch.randn(2, 3, 64, 64)
    for name in ("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"):
        mine, theirs = pair(name, torch.float32)
        eager = saved_bytes(theirs, images)
        assert saved_bytes(mine, images) <= 0.45 * eager
        fastcnn.convert(mine)  # nothing is left to fuse, and nothing comes apart
        assert saved_bytes(mine, images) <= 0.45 * eager


def test_a_network_in_a_chain_is_still_converted():
    inner = models.resnet.BasicBlock(4, 4)
    model = ours.ChainSequential(ours.ConvBNAct(3, 4), nn.Sequential(inner))
    report = fastcnn.convert(model)
    assert set(report.fused) >= {"1.0.conv1", "1.0.bn1"}, report
    inner.forward = lambda x: x
    report = fastcnn.convert(model)
    assert "not fused" in report.swapped["1.0.conv1"] and "not fused" not in report.swapped["0.0"]


def test_compiles_with_the_chain_in_it():
    model = create_model("mobilenet_v3_small", num_classes=3, blocks=SMALL[:2], dropout=0.0)
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(images), model(images))


def test_dropout_is_theirs():
    for name in ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b1", "efficientnet_b4"):
        with torch.device("meta"):
            mine, theirs = create_model(name), models.get_model(name, weights=None)
        for kind in ("StochasticDepth", "Dropout"):
            probabilities = lambda model, kind=kind: [m.p for m in model.modules() if type(m).__name__ == kind and m.p]
            assert probabilities(mine) == probabilities(theirs)


def test_stages_are_timms():
    theirs_of = {"mobilenet_v3_small": "mobilenetv3_small_100", "efficientnet_b1": "efficientnet_b1"}
    for name, theirs in theirs_of.items():
        with torch.device("meta"):
            mine, theirs = create_model(name), timm.create_model(theirs)
        sizes = lambda told: [(stage["num_chs"], stage["reduction"]) for stage in told]
        assert sizes(mine.feature_info()) == sizes(theirs.feature_info)


def test_mbconv_drops_whole_images():
    # the statistics are those of the batch: the branch is the same with and without dropping
    block = ours.MBConv(3, 6, 3, squeeze_excite=lambda c: ours.SqueezeExcite(c, 2), p=0.3).double()
    images = torch.randn(3000, 3, 2, 2, dtype=torch.float64)
    dropped = (block(images) - images).detach()
    block.stochastic_depth.p = 0.0
    branch = (block(images) - images).detach()
    kept = dropped.flatten(1).abs().amax(1) > 1e-9
    torch.testing.assert_close(dropped, branch / 0.7 * kept.view(-1, 1, 1, 1))
    assert abs(float(kept.double().mean()) - 0.7) < 4 * math.sqrt(0.3 * 0.7 / 3000)
    block.stochastic_depth.p = 0.3
    block.eval()
    torch.testing.assert_close(block(images), images + block.block(images))
    block.train().stochastic_depth.p = 1.0
    assert torch.equal(block(images), images)


def test_stochastic_depth_rises_to_the_last_block():
    model = create_model("efficientnet_b0", stochastic_depth_prob=0.32)
    found = [m.stochastic_depth.p for m in model.modules() if isinstance(m, ours.MBConv)]
    assert found == pytest.approx([0.02 * i for i in range(16)])


def fc1_hooked(block):
    block.fc1.register_forward_hook(lambda module, args, output: output * 1.0)


def own_gate(block):
    block.scale_activation = nn.Softsign()


@pytest.mark.parametrize("change", [None, fc1_hooked, own_gate])
@pytest.mark.parametrize("activation, gate", [(nn.ReLU, nn.Hardsigmoid), (nn.SiLU, nn.Sigmoid)])
def test_squeeze_excite_is_torchvisions(change, activation, gate):
    theirs = networks.import_torchvision().ops.SqueezeExcitation(6, 3, activation, gate).double()
    mine = ours.SqueezeExcite(6, 3, activation, gate).double()
    mine.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    for block in (mine, theirs) if change else ():
        change(block)
    before = ours.ConvBNAct(6, 6, activation_layer=nn.SiLU).double()
    with fastcnn.backend("torch"):
        assert_same(step(copy.deepcopy(mine), images), step(copy.deepcopy(theirs), images))
        expected = step(nn.Sequential(nn.Sequential(*copy.deepcopy(before)), theirs), images)
        assert_same(step(ours.ChainSequential(before, mine), images), expected)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
def test_autocast(name):
    assert_same_under_autocast(*pair(name, torch.float32))


def test_some_layers_frozen():
    mine, theirs = pair("efficientnet_b0")
    for model in (mine, theirs):
        model.features[:4].requires_grad_(False)
        model.features[2:6].eval()
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with fastcnn.backend("torch"):
        results = []
        for model in (mine, theirs):
            torch.manual_seed(7)
            model(images).square().sum().backward()
            results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert_same(*results)


def test_values_pass_between_blocks():
    model = create_model("mobilenet_v2", width_mult=0.35)
    images = torch.randn(2, 3, 32, 32)
    assert isinstance(model.features[:1].values(images), chain.Pending)
    assert isinstance(model.features[:4].values(images), chain.Join)
    assert isinstance(model.features.values(images), chain.Pending)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: create_model("mobilenet_v2", width_mult=0), "width_mult must be a positive number, got 0"),
        (lambda: create_model("mobilenet_v3_small", width_mult="1"), "width_mult must be a positive number, got '1'"),
        (lambda: create_model("mobilenet_v3_small", size="tiny"), "unknown option of mobilenet_v3_small 'size'"),
        (lambda: create_model("mobilenet_v2", layers=(1, 2)), r"layers must be 7 positive ints, .* got \(1, 2\)"),
        (lambda: create_model("mobilenet_v1", layers=(1, 1, 0, 1, 1)), "layers must be 5 positive ints"),
        (lambda: create_model("efficientnet_b0", depth_mult=-1), "depth_mult must be a positive number, got -1"),
        (lambda: create_model("efficientnet_b0", stochastic_depth_prob=1.5), "stochastic_depth_prob must be between"),
        (lambda: create_model("efficientnet_b0", num_classes=0), "num_classes must be a positive int, got 0"),
        (lambda: create_model("mobilenet-v2"), "did you mean 'mobilenet_v2'"),
        (lambda: ours.MBConv(4, 4, 4, stride=3), "stride must be 1 or 2, got 3"),
        (lambda: ours.MBConv(4, 4, 4, p=-0.1), "p must be between 0 and 1, got -0.1"),
        (lambda: ours.InvertedResidual(4, 4, 0, 6), "stride must be 1 or 2, got 0"),
        (lambda: create_model("mobilenet_v1", in_chans=1)(torch.ones(1, 3, 8, 8)), r"\[N, 1, H, W\], got \[1, 3, 8"),
        (lambda: create_model("mobilenet_v2")(torch.ones(3, 64, 64)), r"MobileNetV2 takes images of .*\[3, 64, 64\]"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_baseline_of_the_benchmark_is_pytorchs_network(tmp_path):
    assert type(networks.build("mobilenet_v2")).__module__.startswith("torchvision.")
    assert type(networks.build("fastcnn:mobilenet_v2", 3)) is type(create_model("mobilenet_v2"))
    with pytest.raises(ValueError, match="fastcnn:mobilenet_v2 runs on fastcnn's fused chain"):
        bench_models.run(["fastcnn:mobilenet_v2"], ["torch"], torch.device("cpu"), True, tmp_path)
