"""What is special of GoogLeNet and the Inception networks; tests/architectures.py has their lines."""

import copy

import pytest
import torch
from same_networks import assert_same_under_autocast
from test_architectures import assert_same, hostile, step, without_chance
from test_chain_bytes import saved_bytes
from torch import nn

import fastcnn
from fastcnn import chain
from fastcnn.benchmarks import networks
from fastcnn.models import GoogLeNet, Inception, NaiveInception, create_model
from fastcnn.nn.blocks import unfuse
from fastcnn.ops import concatenate

LANES = ("triton", "cpu")
try:
    models = networks.import_torchvision().models
except ImportError:
    pytest.skip("torchvision is not installed", allow_module_level=True)
timm = pytest.importorskip("timm")

NARROW = {"width_mult": 0.0625, "layers": (1, 1, 1)}
WIDTHS = (((16, 8, 16, 8, 8, 8),),) * 3


def shapes_and_products(module, images):
    """{name: outputs of a convolution [channels, height, width]}, and the multiply-adds of all of them."""
    shapes, products = {}, []

    def look(name):
        def hook(conv, inputs, output):
            shapes[name] = list(output.shape[1:])
            products.append(output[0].numel() * conv.weight[0].numel())

        return hook

    for name, conv in module.named_modules():
        if isinstance(conv, nn.Conv2d):
            conv.register_forward_hook(look(name))
    output = module(images)
    return list(output.shape[1:]), shapes, sum(products)


def test_the_decks_example_of_both_modules():
    with torch.device("meta"):
        images = torch.empty(1, 256, 28, 28)
        naive = shapes_and_products(NaiveInception(256, 128, 192, 96), images)
        reduced = shapes_and_products(Inception(256, 128, 64, 192, 64, 96, 64), images)
    assert naive[0] == [128 + 192 + 96 + 256, 28, 28] == [672, 28, 28]
    assert list(naive[1].values()) == [[128, 28, 28], [192, 28, 28], [96, 28, 28]]
    assert naive[2] == 28 * 28 * 256 * (128 + 9 * 192 + 25 * 96) and naive[2] // 10**6 == 854
    assert reduced[0] == [480, 28, 28]
    assert list(reduced[1].values()) == [[c, 28, 28] for c in (128, 64, 192, 64, 96, 64)]
    assert reduced[2] == 28 * 28 * (256 * (128 + 3 * 64) + 64 * (9 * 192 + 25 * 96))
    # the decks' total, 358 million, has the 3x3 convolution twice
    assert reduced[2] // 10**6 == 271 and (reduced[2] + 28 * 28 * 192 * 9 * 64) // 10**6 == 358


def test_googlenet_of_naive_modules():
    with torch.device("meta"):
        model = create_model("googlenet", naive=True)
    channels = [getattr(model, f"inception{name}").out_channels for name in ("3b", "4e", "5b")]
    assert channels == [832, 3344, 4944] == [model.inception4a.branch1.conv.in_channels, 3344, model.fc.in_features]
    small = create_model("googlenet", num_classes=3, naive=True, large_kernel=5, widths=WIDTHS)
    assert small.inception3a.branch3.conv.kernel_size == (5, 5)
    plain = unfuse(copy.deepcopy(small))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with fastcnn.backend("torch"):
        found, expected = (step(hostile(without_chance(model)).double(), images) for model in (small, plain))
    assert_same(found, expected)


def test_5x5_convolutions_of_googlenet():
    with torch.device("meta"):
        model = create_model("googlenet", aux_logits=False, large_kernel=5)
    # of each module 16 more weights in its filters
    more = sum(16 * row[3] * row[4] for stage in GoogLeNet.__init__.__defaults__[-1] for row in stage)
    assert sum(p.numel() for p in model.parameters()) == 6_624_904 + more
    assert model.inception3a.branch3[1].conv.padding == (2, 2)


@pytest.mark.parametrize(
    "name",
    ["googlenet", *(pytest.param(f"inception_{n}", marks=pytest.mark.nightly) for n in ("v3", "v4", "resnet_v2"))],
)
def test_initialisation_is_theirs(name):
    torch.manual_seed(3)
    mine = create_model(name, num_classes=7).state_dict()
    torch.manual_seed(3)
    if name in ("googlenet", "inception_v3"):
        theirs = models.get_model(name, weights=None, num_classes=7, init_weights=True)
    else:
        theirs = timm.create_model(name, num_classes=7)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(mine[key], tensor), key


def test_auxiliary_logits_and_input_of_googlenet_are_torchvisions():
    options = dict(num_classes=5, transform_input=True, dropout=0.0, dropout_aux=0.0)
    theirs = hostile(models.googlenet(init_weights=False, **options)).double()
    mine = create_model("googlenet", **options).double()
    mine.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 47, 33, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    with fastcnn.backend("torch"):
        found, expected = mine(images), theirs(images)
    assert type(found).__name__ == type(expected).__name__
    for name in expected._fields:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    mine.eval(), theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(mine(images), theirs(images))
    assert mine.transformed(images).is_contiguous(memory_format=torch.channels_last)


def test_auxiliary_classifier_of_inception_v3_is_torchvisions():
    theirs = hostile(models.inception.InceptionAux(24, 5)).double()
    head = create_model("inception_v3", num_classes=5, **NARROW).AuxLogits
    mine = type(head)(24, 5, fastcnn.nn.inception_blocks.Convolutions()).double()
    mine.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 24, 17, 18, dtype=torch.float64)
    with fastcnn.backend("torch"):
        assert_same(step(mine, images), step(theirs, images))


def test_what_training_and_evaluation_return():
    model = create_model("inception_v3", num_classes=3, **NARROW)
    with pytest.raises(ValueError, match=r"InceptionV3 takes images .* of at least 299, got \[1, 3, 298, 299\]"):
        model(torch.zeros(1, 3, 298, 299))
    with torch.no_grad():
        output = model(torch.zeros(2, 3, 299, 299))
    assert output._fields == ("logits", "aux_logits") and [t.shape for t in output] == [(2, 3)] * 2
    model = create_model("inception_v3", num_classes=3, **NARROW).eval()
    assert model(torch.zeros(1, 3, 75, 75)).shape == (1, 3)
    assert create_model("googlenet", aux_logits=False, widths=WIDTHS)(torch.zeros(2, 3, 15, 15)).shape == (2, 1000)


@pytest.mark.parametrize("name", ["inception_v3", "inception_v4", "inception_resnet_v2"])
def test_smallest_images(name):
    model = create_model(name, num_classes=3, **NARROW).eval()
    assert model(torch.zeros(1, 3, 75, 76)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"with H, W of at least 75, got \[1, 3, 74, 75\]"):
        model(torch.zeros(1, 3, 74, 75))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("googlenet", dict(transform_input=True, in_chans=1), "transform_input=True needs in_chans = 3, got 1"),
        ("googlenet", dict(large_kernel=4), "large_kernel must be 3 or 5, got 4"),
        ("googlenet", dict(widths=WIDTHS[:2]), "widths must be of three stages of at least one row of six"),
        ("googlenet", dict(widths=(((8, 8),),) * 3), r"row of six numbers, got \(\(\(8, 8\),\),"),
        ("inception_v3", dict(layers=(4, 4, 2)), r"layers must be .* at most \(3, 4, 2\), got \(4, 4, 2\)"),
        ("inception_v3", dict(layers=(3, 4)), r"layers must be .* at most \(3, 4, 2\), got \(3, 4\)"),
        ("inception_v4", dict(layers=(4, 0, 3)), r"layers must be 3 positive ints, .* got \(4, 0, 3\)"),
        ("inception_v4", dict(width_mult=0.1), "width_mult must be a positive multiple of 1/16, got 0.1"),
        ("inception_resnet_v2", dict(width_mult="1"), "width_mult must be a positive multiple of 1/16, got '1'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)


def modules_of_all_kinds():
    """Every kind of module, narrow, with its input's channels."""
    v3, v4, residual = (
        create_model(name, **NARROW) for name in ("inception_v3", "inception_v4", "inception_resnet_v2")
    )
    yield "reduced", Inception(24, 8, 8, 16, 8, 8, 8), 24
    yield "naive", NaiveInception(24, 8, 8, 8), 24
    for name in ("Mixed_5b", "Mixed_6a", "Mixed_6b", "Mixed_7a", "Mixed_7b"):
        yield name, v3.get_submodule(name), None
    for i, module in enumerate(v4.features):
        if i >= 3:
            yield f"features.{i}", module, None
    for name in ("mixed_5b", "repeat.0", "mixed_6a", "repeat_1.0", "mixed_7a", "repeat_2.0", "block8"):
        yield name, residual.get_submodule(name), None


@pytest.mark.parametrize("kind", ["reduced", "repeat.0"])
def test_modules_on_our_kernels(lane, kind):
    module = {name: module for name, module, _ in modules_of_all_kinds()}[kind]
    module = hostile(module).double()
    plain = unfuse(copy.deepcopy(module))
    channels = next(m for m in module.modules() if isinstance(m, nn.Conv2d)).in_channels
    images = torch.randn(2, channels, 3, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    with fastcnn.strict(False):  # the plain one
        found = step(module.to(lane.device), images.to(lane.device))
        with fastcnn.backend("torch"):
            expected = step(plain, images)
    assert_same({key: tensor.cpu() for key, tensor in found.items()}, expected)


def test_concatenations_copy_nothing(monkeypatch):
    found = []
    original = concatenate.side_by_side
    monkeypatch.setattr(concatenate, "side_by_side", lambda raws: found.append(original(raws)) or found[-1])
    for name, module, _ in modules_of_all_kinds():
        channels = next(m for m in module.modules() if isinstance(m, nn.Conv2d)).in_channels
        value = module.values(torch.randn(2, channels, 5, 5))
        pools = any(isinstance(m, nn.MaxPool2d) for _, m in module.named_children())
        assert len(found) == (not pools) and all(together is not None for together in found), name
        assert isinstance(value, torch.Tensor if pools else (chain.Pending, chain.Join)), name
        found.clear()


def test_values_are_not_stored():
    images = torch.randn(1, 3, 112, 112).contiguous(memory_format=torch.channels_last)
    theirs = networks.build("torchvision:googlenet").to(memory_format=torch.channels_last)
    mine = create_model("googlenet").to(memory_format=torch.channels_last)
    eager, kept = saved_bytes(theirs, images), saved_bytes(mine, images)
    fastcnn.convert(theirs)
    # 0.303 of images of 224x224
    assert kept <= 0.315 * eager and kept <= saved_bytes(theirs, images)


@pytest.mark.parametrize("name, bar", [("inception_v3", 0.45), ("inception_v4", 0.45), ("inception_resnet_v2", 0.60)])
def test_values_of_inception_are_not_stored(name, bar):
    mine = create_model(name, width_mult=0.25, layers=(2, 2, 2)).to(memory_format=torch.channels_last)
    mine.auxiliary = ()
    images = torch.randn(8, 3, 107, 107).contiguous(memory_format=torch.channels_last)
    plain = unfuse(copy.deepcopy(mine))
    assert saved_bytes(mine, images) <= bar * saved_bytes(plain, images)


def test_a_hook_sees_what_a_branch_returns():
    module = hostile(Inception(16, 8, 8, 8, 8, 8, 8)).double()
    plain = unfuse(copy.deepcopy(module))
    seen = []
    module.branch2[1].register_forward_hook(lambda _, inputs, output: seen.append(output))
    images = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    with fastcnn.backend("torch"):
        assert_same(step(module, images), step(plain, images))
    torch.testing.assert_close(seen[0], module(images)[:, 8:16])


def test_autocast():
    model = hostile(create_model("googlenet", num_classes=5, widths=WIDTHS))
    assert_same_under_autocast(model, unfuse(copy.deepcopy(model)))
