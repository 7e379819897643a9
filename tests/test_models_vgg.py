"""What is special of VGG: the decks' table, its features, how it grows; tests/architectures.py has its lines."""

import pytest
import torch
from test_architectures import assert_same, hostile, step, without_chance
from test_chain_bytes import saved_bytes
from torch import nn

import fastcnn
from fastcnn.benchmarks import networks
from fastcnn.models import VGG, create_model, grow
from fastcnn.nn.blocks import UNFUSED, unfuse

NARROW = {"width_mult": 0.125}
# the decks' lines of VGG-16: kind, output [channels, height, width], weights
TABLE = [
    ("conv", (64, 224, 224), 1_728), ("conv", (64, 224, 224), 36_864), ("pool", (64, 112, 112), 0),
    ("conv", (128, 112, 112), 73_728), ("conv", (128, 112, 112), 147_456), ("pool", (128, 56, 56), 0),
    ("conv", (256, 56, 56), 294_912), ("conv", (256, 56, 56), 589_824), ("conv", (256, 56, 56), 589_824),
    ("pool", (256, 28, 28), 0),
    ("conv", (512, 28, 28), 1_179_648), ("conv", (512, 28, 28), 2_359_296), ("conv", (512, 28, 28), 2_359_296),
    ("pool", (512, 14, 14), 0),
    ("conv", (512, 14, 14), 2_359_296), ("conv", (512, 14, 14), 2_359_296), ("conv", (512, 14, 14), 2_359_296),
    ("pool", (512, 7, 7), 0),
    ("fc", (4096,), 102_760_448), ("fc", (4096,), 16_777_216), ("fc", (1000,), 4_096_000),
]  # fmt: skip
# and their rounded numbers of activations, in thousands
THOUSANDS = [3200, 3200, 800, 1600, 1600, 400, 800, 800, 800, 200, 400, 400, 400, 100, 100, 100, 100, 25, 4, 4, 1]


def test_the_decks_table_of_vgg16():
    kinds, lines = {nn.Conv2d: "conv", nn.MaxPool2d: "pool", nn.Linear: "fc"}, []

    def look(module, inputs, output):
        kind = next(name for base, name in kinds.items() if isinstance(module, base))
        weights = 0 if kind == "pool" else module.weight.numel()
        lines.append((kind, tuple(output.shape[1:]), weights))

    with torch.device("meta"):
        model = unfuse(create_model("vgg16")).eval()
        for module in model.modules():
            if isinstance(module, tuple(kinds)):
                module.register_forward_hook(look)
        with torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    assert lines == TABLE
    numbers = [torch.Size(shape).numel() for _, shape, _ in lines]
    assert all(abs(n / 1000 - told) <= 0.03 * max(told, 4) for n, told in zip(numbers, THOUSANDS, strict=True))
    # the decks say 24M; what their lines add up to is
    assert 3 * 224 * 224 + sum(numbers) == 15_237_608
    assert round(sum(weights for *_, weights in lines) / 1e6) == 138
    assert sum(p.numel() for p in model.parameters()) == 138_357_544


@pytest.mark.parametrize("name", ["vgg11", "vgg13_bn", "vgg16", "vgg19_bn"])
def test_features_are_timms(name):
    networks.import_torchvision()
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model(name, features_only=True).feature_info.info
        mine = create_model(name, features_only=True).feature_info()
    assert mine == [{key: line[key] for key in ("module", "num_chs", "reduction")} for line in theirs]


def narrowed(name):
    """Ours with an eighth of the filters, and torchvision's network of these, with the same weights."""
    models = networks.import_torchvision().models
    plain, _, batch_norm = name.partition("_")
    widths = [v if v == "M" else v // 8 for v in models.vgg.cfgs[{"vgg11": "A", "vgg19": "E"}[plain]]]
    with torch.device("meta"):
        theirs = models.VGG(models.vgg.make_layers(widths, bool(batch_norm)), num_classes=5)
        theirs.classifier[0], theirs.classifier[3] = nn.Linear(64 * 49, 512), nn.Linear(512, 512)
        theirs.classifier[6] = nn.Linear(512, 5)
    mine = hostile(create_model(name, num_classes=5, **NARROW))
    theirs.to_empty(device="cpu").load_state_dict(mine.state_dict())
    return mine, theirs


@pytest.mark.parametrize("name", ["vgg11", "vgg19_bn"])
def test_a_narrow_network_is_torchvisions(name):
    mine, theirs = (without_chance(model).double() for model in narrowed(name))
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with fastcnn.backend("torch"):
        assert_same(step(mine, images), step(theirs, images))
        with torch.no_grad():
            torch.testing.assert_close(mine.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("name, bar", [("vgg11", 0.8), ("vgg19_bn", 0.5)])
def test_values_are_not_stored(name, bar):
    mine, theirs = (model.to(memory_format=torch.channels_last) for model in narrowed(name))
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    assert saved_bytes(mine, images) <= bar * saved_bytes(theirs, images)


def test_initialisation():
    model = create_model("vgg11", **NARROW)
    conv, linear = model.features[16].weight.detach(), model.classifier[3].weight.detach()
    assert float(conv.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert float(linear.std()) == pytest.approx(0.01, rel=0.02)
    assert not any(bool(p.any()) for name, p in model.named_parameters() if name.endswith("bias"))


def convolutions(model):
    """Of each stage the weights of its convolutions."""
    stages = [[]]
    for module in model.features:
        if isinstance(module, nn.MaxPool2d):
            stages.append([])
        elif isinstance(module, nn.Conv2d):
            stages[-1].append(module.weight)
    return stages[:-1]


def carried(old, new):
    """[stage][convolution] of the deeper network: whether it has the weights of the shallower one's."""
    return [
        [i < len(a) and torch.equal(a[i], weight) for i, weight in enumerate(b)]
        for a, b in zip(convolutions(old), convolutions(new), strict=True)
    ]


def test_grows_from_11_to_19_layers():
    a = create_model("vgg11", num_classes=5, in_chans=2, dropout=0.3, **NARROW).double().eval()
    before = {key: tensor.clone() for key, tensor in a.state_dict().items()}
    b = grow(a, "vgg13")
    # the first four convolutions of net A: one, one and two in the first three stages
    assert carried(a, b) == [[True, False], [True, False], [True, True], [False, False], [False, False]]
    d = grow(b, "vgg16", first=None)
    assert carried(b, d) == [[True] * 2, [True] * 2] + [[True, True, False]] * 3
    e = grow(d, "vgg19", first=3)
    assert carried(d, e) == [[True, True], [True, False]] + [[False] * 4] * 3
    assert sum(p.numel() for p in e.features.parameters()) > sum(p.numel() for p in d.features.parameters())
    for model in (b, d, e):
        assert isinstance(model, VGG) and not model.training and model.num_classes == 5 and model.in_chans == 2
        assert all(torch.equal(model.classifier[i].weight, a.classifier[i].weight) for i in (0, 3, 6))
        assert all(torch.equal(model.classifier[i].bias, a.classifier[i].bias) for i in (0, 3, 6))
        assert {p.dtype for p in model.parameters()} == {torch.float64} and model.classifier[2].p == 0.3
        assert model(torch.zeros(1, 2, 32, 32, dtype=torch.float64)).shape == (1, 5)
    e.classifier[0].weight.data.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in a.state_dict().items())


def test_growing_carries_batch_norms_along():
    a = hostile(create_model("vgg11_bn", num_classes=5, fused=False, **NARROW))
    b = grow(a, "vgg13")
    assert b.batch_norm and UNFUSED in b.__dict__ and UNFUSED in b.features[0].__dict__
    # the second convolution of the third stage, and what was injected into the first
    for old, new in ((12, 18), (0, 0)):
        for i in (old, old + 1):
            mine, theirs = b.features[new + i - old].state_dict(), a.features[i].state_dict()
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert bool((b.features[4].running_mean == 0).all()) and b.features[4].num_features == 8


def test_what_cannot_grow():
    a = create_model("vgg13", num_classes=5, **NARROW)
    with pytest.raises(ValueError, match=r"name must be of a deeper network than the model with \(2, 2, 2, 2, 2\)"):
        grow(a, "vgg11")
    with pytest.raises(ValueError, match="name must be of a deeper network"):
        grow(a, "vgg13")
    with pytest.raises(ValueError, match="unknown VGG 'vgg16_bn': did you mean 'vgg16'"):
        grow(a, "vgg16_bn")
    for first in (-1, 11, True, 1.5):
        with pytest.raises(ValueError, match=rf"first must be an int of 0 to 10, or None, got {first}"):
            grow(a, "vgg16", first=first)
    with pytest.raises(TypeError, match="model must be a fastcnn.models.VGG, got Linear"):
        grow(nn.Linear(2, 2), "vgg16")
    with pytest.raises(ValueError, match="model must have its classifier"):
        grow(create_model("vgg11", features_only=True, **NARROW), "vgg16")
    a.reset_classifier(0)
    with pytest.raises(ValueError, match="model must have its classifier"):
        grow(a, "vgg16")
    with pytest.raises(ValueError, match=r"layers must be 5 positive ints"):
        VGG((1, 2))


@pytest.mark.nightly
def test_weights_are_drawn_as_torchvision_draws_them():
    torch.manual_seed(5)
    theirs = networks.build("torchvision:vgg11_bn", 7).state_dict()
    torch.manual_seed(5)
    assert all(torch.equal(theirs[key], tensor) for key, tensor in create_model("vgg11_bn", 7).state_dict().items())
