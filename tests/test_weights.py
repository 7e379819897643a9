"""Files of weights: every form that trainers save, the names of other libraries, and files that do not fit."""

import copy
import os
import pickle
import random
import re

import pytest
import safetensors.torch
import torch
from test_architectures import assert_same, hostile, step, without_chance
from torch import nn

import fastcnn
from fastcnn.benchmarks import networks
from fastcnn.models import create_model, weights
from fastcnn.train.checkpoint import save_checkpoint

NAME = "mobilenet_v1"
SMALL = dict(num_classes=4, width_mult=0.25, layers=(1, 1, 1, 1, 1))


def small(seed=0, **options):
    torch.manual_seed(seed)
    return hostile(create_model(NAME, **(SMALL | options)))


def assert_holds(model, tensors):
    found = model.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor.to(found[key].dtype)) for key, tensor in tensors.items())


def prefixed(prefix):
    return lambda tensors: {prefix + key: tensor for key, tensor in tensors.items()}


FORMS = {
    "state_dict": lambda tensors: tensors,
    "trainer": lambda tensors: {"state_dict": tensors, "epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}},
    "model": lambda tensors: {"model": tensors, "args": {"lr": 0.1}},
    "ddp": prefixed("module."),
    "compiled ddp": lambda tensors: {"state_dict": prefixed("_orig_mod.module.")(tensors)},
    "ddp of compiled": prefixed("module._orig_mod."),
    "bf16": lambda tensors: {k: t.bfloat16() if t.is_floating_point() else t for k, t in tensors.items()},
    "views of one storage": lambda tensors: {k: torch.stack([t, t])[0] for k, t in tensors.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_files(form, tmp_path):
    tensors = {key: tensor.clone() for key, tensor in small(1).state_dict().items()}
    if form == "bf16":
        tensors = FORMS[form](tensors)
    torch.save(FORMS[form](tensors), tmp_path / "weights.pth")
    assert_holds(create_model(NAME, **SMALL, pretrained=tmp_path / "weights.pth"), tensors)
    torch.save(FORMS[form](tensors), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_holds(create_model(NAME, **SMALL, pretrained=str(tmp_path / "old.pt")), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_safetensors(dtype, tmp_path):
    tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in small(1).state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = create_model(NAME, **SMALL, pretrained=tmp_path / "model.safetensors", fused=False)
    assert_holds(model, tensors)
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in model.parameters())


def test_files_without_counters_of_batches(tmp_path):
    tensors = {k: t for k, t in small(1).state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(tensors, tmp_path / "old.pth")
    model = create_model(NAME, **SMALL, pretrained=tmp_path / "old.pth")
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in tensors.items())
    assert model.bn1.num_batches_tracked == 0


def test_the_best_weights_of_a_training(tmp_path):
    model = small(1)
    fastcnn.convert(model)
    save_checkpoint(tmp_path / "best.pt", {"config": {"model": NAME}, "epoch": 2, "model": model.state_dict()})
    again = create_model(NAME, **SMALL, pretrained=tmp_path / "best.pt")
    images = torch.randn(2, 3, 32, 32)
    assert_holds(again, model.state_dict())
    torch.testing.assert_close(again.eval()(images), model.eval()(images))


def test_features_alone(tmp_path):
    torch.save(small(1).state_dict(), tmp_path / "weights.pt")
    model = create_model(NAME, **SMALL, pretrained=tmp_path / "weights.pt", features_only=True, out_indices=[1])
    assert torch.equal(model.conv_stem.weight, small(1).conv_stem.weight)


def test_another_number_of_classes_keeps_the_fresh_classifier(tmp_path):
    tensors = small(1, num_classes=9).state_dict()
    torch.save(tensors, tmp_path / "nine.pt")
    fresh = small(2, num_classes=4).classifier.state_dict()
    torch.manual_seed(2)
    message = r"nine.pt is not of 4 classes: classifier.weight, classifier.bias keep their fresh weights"
    with pytest.warns(UserWarning, match=message) as told:
        model = create_model(NAME, **SMALL, pretrained=tmp_path / "nine.pt")
    assert len(told) == 1 and told[0].filename == __file__
    assert_holds(model, tensors | {f"classifier.{key}": tensor for key, tensor in fresh.items()})


def test_auxiliary_classifiers_stay_fresh_together(tmp_path):
    class Two(fastcnn.models.Network):
        heads = ("main", "aux.fc")

        def __init__(self, num_classes):
            super().__init__(num_classes, 3)
            self.body_conv, self.main = nn.Conv2d(3, 2, 1), nn.Linear(2, num_classes)
            self.aux = nn.Sequential()
            self.aux.add_module("fc", nn.Linear(2, num_classes))

    theirs, mine = Two(5), Two(3)
    torch.save(theirs.state_dict(), tmp_path / "five.pt")
    fresh = copy.deepcopy(mine)
    with pytest.warns(UserWarning, match="main.weight, main.bias, aux.fc.weight, aux.fc.bias keep"):
        weights.load(mine, tmp_path / "five.pt")
    assert torch.equal(mine.body_conv.weight, theirs.body_conv.weight)
    assert torch.equal(mine.main.weight, fresh.main.weight) and torch.equal(mine.aux.fc.bias, fresh.aux.fc.bias)


def renamed(tensors):
    tensors["conv_stem2.weight"] = tensors.pop("conv_stem.weight")


BAD = {
    "lacks": (lambda t: t.pop("bn1.bias"), "does not fit a MobileNetV1: it lacks bn1.bias$"),
    "lacks its classifier": (lambda t: t.pop("classifier.bias"), "it lacks classifier.bias$"),
    "unknown": (lambda t: t.update(fc9=torch.zeros(1)), "it has the unknown fc9$"),
    "another name": (renamed, "it lacks conv_stem.weight; it has the unknown conv_stem2.weight$"),
    "another shape": (lambda t: t.update({"bn1.bias": torch.zeros(7)}), r"it has another shape of bn1.bias \[7\]"),
    "a shape that would broadcast": (
        lambda t: t.update({"bn1.bias": torch.zeros(())}),
        r"another shape of bn1.bias \[\]",
    ),
    "another classifier": (
        lambda t: t.update({"classifier.weight": torch.zeros(4, 3)}),
        r"another shape of classifier.weight \[4, 3\]",
    ),
    "quantised": (
        lambda t: t.update({"bn1.bias": torch.zeros(8, dtype=torch.int8)}),
        "it has no numbers of the model's kind in bn1.bias",
    ),
    "some counters": (lambda t: t.pop("bn1.num_batches_tracked"), "it lacks bn1.num_batches_tracked"),
    "more than three": (lambda t: [t.pop(k) for k in list(t)[:4]], "it lacks .*, .*, .*, ...$"),
    "other channels": (
        lambda t: t.update({"conv_stem.weight": torch.zeros(8, 1, 3, 3)}),
        r"conv_stem.weight \[8, 1, 3, 3\]; it is for images of 1 channels, the model for 3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_weights_of_another_network(case, tmp_path):
    change, message = BAD[case]
    tensors = small(1).state_dict()
    change(tensors)
    torch.save(tensors, tmp_path / "other.pt")
    model = small()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        weights.load(model, tmp_path / "other.pt")
    assert_holds(model, before)


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_hold_no_weights(tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "file.pt"
    model = small()

    def refused(message, path=path):
        with pytest.raises(ValueError, match=message):
            weights.load(model, path)

    for content in (b"", b"PK", b"<html>not found</html>", pickle.dumps({}), pickle.dumps(Hostile(mark))):
        path.write_bytes(content)
        refused("file.pt is not a whole file of weights")
    torch.save({"model": Hostile(mark)}, path)
    refused("not a whole file of weights .*code, which is not run")
    torch.save(model, path)  # a pickled module
    refused("not a whole file of weights")
    assert not mark.exists()
    for other in (torch.zeros(3), {"epoch": 1}, {}, {"model": None}, {"state_dict": {"bn1.bias": 5}}, [torch.ones(1)]):
        torch.save(other, path)
        refused("file.pt holds no weights: neither a state_dict nor")
    torch.save(model.state_dict() | {"bn1.bias": torch.zeros(1).expand(10**12)}, path)
    refused("without the bytes for it")
    refused("cannot read the file of weights .*none.pt: No such file", tmp_path / "none.pt")
    refused("cannot read the file of weights", tmp_path)
    for given in (True, 5, {}):
        refused("pretrained must be the path of a file of weights, got", given)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_damaged_files(kind, tmp_path):
    path, model = tmp_path / f"file.{kind}", small()
    tensors = small(1).state_dict()
    torch.save(tensors, path) if kind == "pt" else safetensors.torch.save_file(tensors, path)
    content = path.read_bytes()
    for keep in (0, 1, 7, 100, 0.5, 0.99, -1):
        path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
        with pytest.raises(ValueError, match="is not a whole file of weights"):
            weights.load(model, path)
    random.seed(1)
    for _ in range(60):
        # of safetensors the header alone; its numbers have no checksum
        bit = random.randrange(len(content) * 8 if kind == "pt" else 2000 * 8)
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            weights.load(model, path)
        except ValueError:
            continue
        if kind == "pt":
            assert_holds(model, tensors)


@pytest.fixture
def timm():
    networks.import_torchvision()
    return pytest.importorskip("timm")


def narrow(timm, name):
    """timm's network of few channels."""
    make = timm.models.efficientnet
    if name == "mobilenet_v2":
        return make._gen_mobilenet_v2("mobilenetv2_050", 0.5, num_classes=5)
    if name.startswith("efficientnet"):
        return make._gen_efficientnet(name, 0.25, 0.1, num_classes=5)
    with torch.device("meta"):
        widths = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]
        model = timm.models.vgg.VGG(widths, num_classes=5, norm_layer=nn.BatchNorm2d)
        model.pre_logits = timm.models.vgg.ConvMlp(64, 512, drop_rate=0.0)
        model.head.fc = nn.Linear(512, 5)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.reset_running_stats()
    return model


OF_TIMM = {
    "mobilenet_v2": {"width_mult": 0.5},
    "efficientnet_b0": {"width_mult": 0.25, "depth_mult": 0.1},
    "vgg11_bn": {"width_mult": 0.125},
}


@pytest.mark.parametrize("name", OF_TIMM)
def test_timms_names(timm, name, tmp_path):
    theirs = hostile(without_chance(narrow(timm, name))).double()
    torch.save(theirs.state_dict(), tmp_path / "timm.pt")
    mine = create_model(name, num_classes=5, **OF_TIMM[name], pretrained=tmp_path / "timm.pt")
    without_chance(mine.double())
    weights.load(mine, tmp_path / "timm.pt")
    names = mine.names_elsewhere()
    # VGG's linear layers are the same at 224 pixels
    size = 224 if name == "vgg11_bn" else 64
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with fastcnn.backend("torch"):
        found, expected = step(mine, images), step(theirs, images)
        for key in [key for key in expected if "." in key]:
            layer, _, kind = key.rpartition(".")
            expected[f"{names.get(layer, layer)}.{kind}"] = expected.pop(key)
        for key in found.keys() & expected.keys():
            expected[key] = expected[key].view_as(found[key])
        assert_same(found, expected)
        mine.eval(), theirs.eval()
        torch.testing.assert_close(mine(images), theirs(images))


def test_timms_other_networks_are_refused(timm, tmp_path):
    # B5 elsewhere has another eps
    cases = [("efficientnet_b5", narrow(timm, "efficientnet_b5"), dict(width_mult=0.25, depth_mult=0.1))]
    v3 = timm.models.mobilenetv3._gen_mobilenet_v3("mobilenetv3_small_050", 0.5, num_classes=5)
    deeper = timm.models.efficientnet._gen_mobilenet_v2("mobilenetv2_110d", 0.5, 1.2, num_classes=5)
    cases += [("mobilenet_v3_small", v3, dict(width_mult=0.5)), ("mobilenet_v2", deeper, dict(width_mult=0.5))]
    for name, theirs, options in cases:
        torch.save(theirs.state_dict(), tmp_path / "timm.pt")
        with pytest.raises(ValueError, match="timm.pt does not fit .* it has the unknown"):
            create_model(name, num_classes=5, **options, pretrained=tmp_path / "timm.pt")


def test_torchvisions_first_names_of_densenet(tmp_path):
    torch.manual_seed(0)
    options = dict(num_classes=3, block_config=(2, 1), growth_rate=4, num_init_features=8)
    tensors = create_model("densenet121", **options).state_dict()
    dotted = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): tensor for key, tensor in tensors.items()}
    assert len(dotted.keys() - tensors.keys()) == 3 * 2 * (5 + 1)
    torch.save(dotted, tmp_path / "first.pth")
    assert_holds(create_model("densenet121", **options, pretrained=tmp_path / "first.pth"), tensors)
