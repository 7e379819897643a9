"""Residual networks: weights drawn as in the libraries, counts by arithmetic, shortcuts, stochastic depth, dropout."""

import copy
import importlib

import pytest
import torch
from architectures import ROWS
from test_architectures import assert_same, hostile, step
from torch import nn
from torch.nn import functional as F

import fastcnn
from fastcnn import chain
from fastcnn import nn as ours
from fastcnn.benchmarks import networks
from fastcnn.models import create_model
from fastcnn.models.cifar_resnet import PlainBlock, StochasticBlock, ZeroPaddedShortcut

SMALL = {"layers": (1, 1, 1)}


def conv(inputs, outputs, size):
    return inputs * outputs * size**2


def basic_network(n, widths=(16, 32, 64), projected=False):
    """Weights of the convolutions, batch norms and the linear layer of 10 outputs of a network of basic blocks."""
    total, channels = conv(3, 16, 3), 16
    for width in widths:
        for i in range(n):
            total += conv(channels if i == 0 else width, width, 3) + conv(width, width, 3)
        total += conv(channels, width, 1) if projected and channels != width else 0
        channels = width
    return total + 10 * channels + 10


def norms_after(n, widths=(16, 32, 64)):
    """Two numbers per channel of the stem and of every convolution of the blocks."""
    return 2 * (16 + sum(2 * n * width for width in widths))


def norms_before(n, widths):
    """The same where every convolution's input is normalised, and the last output."""
    inputs = (16, *widths)
    blocks = sum((before - after) + 2 * n * after for before, after in zip(inputs, widths, strict=False))
    return 2 * (blocks + widths[-1])


def bottlenecks(n, width, groups, planes, before):
    """Bottlenecks of a network whose stages double their channels; batch norm before or after every convolution."""
    total, channels = 0, planes if before else 64
    total += conv(3, channels, 3) + (0 if before else 2 * channels)
    for stage in range(3):
        wide, outputs = width * 2**stage, 4 * planes * 2**stage
        for i in range(n):
            inputs = channels if i == 0 else outputs
            total += conv(inputs, wide, 1) + conv(wide, wide, 3) // groups + conv(wide, outputs, 1)
            total += 2 * (2 * wide + (inputs if before else outputs))
        total += conv(channels, outputs, 1) + (0 if before else 2 * outputs)
        channels = outputs
    return total + (2 * channels if before else 0) + 10 * channels + 10


# the papers' figures, in millions
COUNTS = {
    "plain20_cifar": (basic_network(3) + norms_after(3), 0.27),
    "resnet20_cifar": (basic_network(3) + norms_after(3), 0.27),
    "resnet32_cifar": (basic_network(5) + norms_after(5), 0.46),
    "resnet44_cifar": (basic_network(7) + norms_after(7), 0.66),
    "plain56_cifar": (basic_network(9) + norms_after(9), 0.85),
    "resnet56_cifar": (basic_network(9) + norms_after(9), 0.85),
    "resnet110_cifar": (basic_network(18) + norms_after(18), 1.7),
    "resnet1202_cifar": (basic_network(200) + norms_after(200), 19.4),
    "preact_resnet110_cifar": (basic_network(18) + norms_before(18, (16, 32, 64)), 1.7),
    "preact_resnet164_cifar": (bottlenecks(18, 16, 1, 16, before=True), 1.7),
    "preact_resnet1001_cifar": (bottlenecks(111, 16, 1, 16, before=True), 10.3),
    "resnext29_8x64d_cifar": (bottlenecks(3, 512, 8, 64, before=False), 34.4),
    "resnext29_16x64d_cifar": (bottlenecks(3, 1024, 16, 64, before=False), 68.2),
    "wrn28_10_cifar": (basic_network(4, (160, 320, 640), True) + norms_before(4, (160, 320, 640)), 36.5),
    "wrn40_4_cifar": (basic_network(6, (64, 128, 256), True) + norms_before(6, (64, 128, 256)), 8.9),
    "wrn16_8_cifar": (basic_network(2, (128, 256, 512), True) + norms_before(2, (128, 256, 512)), 11.0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_by_arithmetic(name):
    parameters, millions = COUNTS[name]
    assert next(row.parameters for row in ROWS if row.name == name) == parameters
    assert round(parameters / 1e6, 2 if millions < 1 else 1) == millions


def stock(name, layers, num_classes=5, **options):
    """The library's network of so many blocks."""
    torchvision = networks.import_torchvision().models
    if name == "resnetv2_50":
        return importlib.import_module("timm").create_model(name, layers=layers, num_classes=num_classes)
    block = torchvision.resnet.BasicBlock if name == "resnet18" else torchvision.resnet.Bottleneck
    return torchvision.resnet.ResNet(block, layers, num_classes, **options)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnetv2_50"])
def test_weights_are_drawn_as_in_the_library(name):
    torch.manual_seed(3)
    mine = create_model(name, num_classes=5, layers=[1, 2, 1, 1]).state_dict()
    torch.manual_seed(3)
    theirs = stock(name, [1, 2, 1, 1]).state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_features_are_timms():
    mine, theirs = create_model("resnetv2_50", layers=(1, 1, 1, 1)), stock("resnetv2_50", [1, 1, 1, 1])
    assert mine.feature_info(64) == theirs.feature_info


def test_dilation_and_zeroed_residuals_are_torchvisions():
    options = dict(
        zero_init_residual=True, replace_stride_with_dilation=[False, True, True], groups=2, width_per_group=16
    )
    torch.manual_seed(0)
    theirs = stock("resnet50", [1, 1, 2, 2], **options)
    torch.manual_seed(0)
    mine = create_model("resnet50", num_classes=5, layers=(1, 1, 2, 2), **options)
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True))
    hostile(theirs).double()
    mine.double().load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 33, 40, dtype=torch.float64)
    with fastcnn.backend("torch"):
        assert_same(step(mine, images), step(theirs, images))


def plain_zeros(m, x):
    y = m.bn2(m.conv2(F.relu(m.bn1(m.conv1(x)))))
    kept = x[:, :, ::2, ::2]
    return F.relu(y + torch.cat([kept, torch.zeros_like(kept)], 1))


def test_zero_padded_shortcut():
    block = hostile(ours.BasicBlock(4, 8, 2, ZeroPaddedShortcut(4, 8, 2))).double()
    theirs = copy.deepcopy(block)
    theirs.forward = lambda x: plain_zeros(theirs, x)
    images = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    with fastcnn.backend("torch"):
        assert_same(step(block, images), step(theirs, images))
    assert isinstance(block.values(images.requires_grad_()), chain.Join)


def test_plain_networks_are_residual_ones_without_shortcuts():
    plain, residual = (create_model(name, **SMALL) for name in ("plain56_cifar", "resnet56_cifar"))
    shapes = lambda model: {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert shapes(plain) == shapes(residual)
    block = hostile(PlainBlock(4, 6, 2)).double()
    layers = copy.deepcopy(block)
    layers.forward = lambda x: F.relu(branch(layers, x))
    images = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with fastcnn.backend("torch"):
        assert_same(step(block, images), step(layers, images))
        layers = ours.blocks.unfuse(copy.deepcopy(hostile(plain).double()))
        assert_same(step(plain, images[:, :3]), step(layers, images[:, :3]))


def test_projections_in_place_of_zeros():
    model = create_model("resnet20_cifar", shortcut="projection", **SMALL)
    assert [len(model.get_submodule(f"layer{i}.0").downsample or ()) for i in (1, 2, 3)] == [0, 2, 2]


def branch(block, x):
    return block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))


def stochastic(p=0.4, mode="batch"):
    torch.manual_seed(0)
    return hostile(StochasticBlock(4, 8, 2, ZeroPaddedShortcut(4, 8, 2), p, mode)).double()


@pytest.mark.parametrize("unfused", [False, True])
def test_a_batch_drops_a_branch_without_computing_it(unfused):
    block = stochastic(0.2)
    if unfused:
        ours.blocks.unfuse(block)
    x = torch.rand(3, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    kept = dropped = 0
    with fastcnn.backend("torch"):
        for _ in range(40):
            block.zero_grad()
            counted = int(block.bn1.num_batches_tracked)
            y = block(x)
            y.sum().backward()
            if int(block.bn1.num_batches_tracked) > counted:
                kept += 1
                torch.testing.assert_close(y, F.relu(branch(copy.deepcopy(block), x) + block.downsample(x)))
                assert block.conv1.weight.grad is not None
            else:
                dropped += 1
                assert torch.equal(y, block.downsample(x)) and block.conv1.weight.grad is None
    assert 25 <= kept <= 38 and kept + dropped == 40


@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_scales_the_branch_by_how_often_it_was_there(grad):
    block = stochastic().eval()
    x = torch.rand(3, 4, 6, 6, dtype=torch.float64)
    with fastcnn.backend("torch"), torch.set_grad_enabled(grad):
        torch.testing.assert_close(block(x), F.relu(0.6 * branch(block, x) + block.downsample(x)))


def test_rows_are_dropped_one_by_one():
    block, x = stochastic(mode="row"), torch.rand(64, 4, 6, 6, dtype=torch.float64)
    with fastcnn.backend("torch"):
        y, whole = block(x), F.relu(branch(copy.deepcopy(block), x) + block.downsample(x))
    shortcut = block.downsample(x)
    is_whole = [torch.allclose(y[i], whole[i]) for i in range(64)]
    is_shortcut = [torch.allclose(y[i], shortcut[i]) for i in range(64)]
    assert all(a != b for a, b in zip(is_whole, is_shortcut, strict=True)) and 28 <= sum(is_whole) <= 50


def test_stochastic_depth_grows_linearly():
    model = create_model("resnet110_stodepth_cifar", layers=(1, 1, 2), stochastic_depth_mode="row")
    blocks = [block for layer in (model.layer1, model.layer2, model.layer3) for block in layer]
    assert [(block.p, block.mode) for block in blocks] == [(p, "row") for p in (0.125, 0.25, 0.375, 0.5)]
    with torch.device("meta"):
        model = create_model("resnet110_stodepth_cifar")
    assert model.layer3[-1].p == 0.5 and model.layer1[0].mode == "batch"


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_stochastic_depth_is_one_graph(mode):
    block = ours.blocks.unfuse(stochastic(0.75, mode))
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    x = torch.rand(2, 4, 6, 6, dtype=torch.float64)
    shortcuts = [torch.equal(compiled(x), block.downsample(x)) for _ in range(20)]
    assert (11 if mode == "batch" else 6) <= sum(shortcuts) < 20  # 15, or 11 of both images
    torch.testing.assert_close(compiled.eval()(x), block.eval()(x))


def test_dropout_stands_between_the_convolutions():
    model = create_model("wrn16_8_cifar", widen=1, dropout=0.5, **SMALL)
    read = {}
    for name, block in ((f"stages.{i}", model.stages[i].blocks[0]) for i in range(3)):
        assert isinstance(block.dropout, nn.Dropout) and block.dropout.p == 0.5
        block.conv1.register_forward_pre_hook(lambda m, args, n=name: read.update({f"{n}.1": args[0]}))
        block.conv2.register_forward_pre_hook(lambda m, args, n=name: read.update({f"{n}.2": args[0]}))
    with fastcnn.strict(False):
        model(torch.randn(4, 3, 16, 16))
    for name, tensor in read.items():
        zeros = float((tensor == 0).double().mean())
        assert (0.65 < zeros < 0.85) if name.endswith("2") else (0.3 < zeros < 0.7), (name, zeros)
    assert isinstance(create_model("wrn16_8_cifar", widen=1, **SMALL).stages[0].blocks[0].dropout, nn.Identity)


def test_first_blocks_read_their_shortcut_from_the_activation():
    model = create_model("preact_resnet110_cifar", num_classes=3, layers=(2, 1, 1)).double()
    hostile(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def block(m, x, shortcut):
        u = F.relu(m.bn1(x))
        y = m.conv2(F.relu(m.bn2(m.conv1(u))))
        return y + shortcut(u, x)

    with fastcnn.backend("torch"):
        found = model(x)
        plain = copy.deepcopy(model)
        first, second = plain.stages[0].blocks
        y = block(first, plain.stem.conv(x), lambda u, x: u)
        y = block(second, y, lambda u, x: x)
        for stage in (1, 2):
            m = plain.stages[stage].blocks[0]
            y = block(m, y, lambda u, x: torch.cat([u[:, :, ::2, ::2], torch.zeros_like(u[:, :, ::2, ::2])], 1))
        y = F.relu(plain.norm(y)).mean((2, 3))
        torch.testing.assert_close(found, y @ plain.head.fc.weight.flatten(1).T + plain.head.fc.bias)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("resnet50", {"layers": (3, 4, 6)}, r"layers must be 4 positive ints, .* got \(3, 4, 6\)"),
        ("resnet50", {"block": "basics"}, "unknown block 'basics': did you mean 'basic'"),
        (
            "resnet50",
            {"replace_stride_with_dilation": (True,)},
            "must have 3 entries, for layer2 to layer4, got",
        ),
        ("resnet18", {"replace_stride_with_dilation": (False, False, True)}, "dilation = 1, got"),
        ("resnet20_cifar", {"shortcut": "none", "stochastic_depth": 0.5}, "stochastic_depth needs shortcuts"),
        ("resnet20_cifar", {"stochastic_depth": 1.0}, "stochastic_depth must be at least 0 and less than 1, got 1.0"),
        ("resnet20_cifar", {"stochastic_depth_mode": "rows"}, "did you mean 'row'"),
        ("preact_resnet164_cifar", {"dropout": 0.3}, "bottlenecks have shortcut = 'projection' and dropout = 0, got"),
        ("wrn28_10_cifar", {"widen": 2.5}, "widen must be a positive int, got 2.5"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)
