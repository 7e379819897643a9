"""fastcnn.convert against the world: a slice of tests/world.py here, all of it under `pytest -m nightly`."""

import gc
import math

import pytest
import torch
import world_table
from torch import nn
from world import KERNELS_PARAMETERS, LEFT_OUT, MODELS, TIMM, check, check_kernels, difference

from fastcnn.benchmarks.networks import import_torchvision

models = import_torchvision().models
_registry = pytest.importorskip("timm.models._registry")

# quick ones of many kinds; batch norms fused with their convolution, in a dense block, and of other tensors (the input,
# a sum, a concatenation, the output of a convolution that has other readers)
SLICE = {
    "torchvision:squeezenet1_1": (0, 0, 0), "torchvision:shufflenet_v2_x0_5": (56, 0, 0),
    "timm:test_resnet": (15, 0, 0), "timm:test_byobnet": (14, 0, 0), "timm:test_efficientnet": (13, 0, 0),
    "timm:test_convnext": (0, 0, 0), "timm:test_nfnet": (0, 0, 0), "timm:test_mambaout": (0, 0, 0),
    "timm:regnetx_002": (44, 0, 0), "timm:tf_mobilenetv3_small_minimal_100": (34, 0, 0),
}  # fmt: skip
NORMS = SLICE | {
    "timm:resnet18": (20, 0, 0), "timm:resnetblur18": (20, 0, 0), "timm:resnetv2_18": (8, 0, 9),
    "timm:seresnet18": (20, 0, 0), "timm:skresnet18": (36, 0, 0), "timm:ecaresnet26t": (31, 0, 0),
    "timm:resnest14d": (23, 0, 0), "timm:legacy_seresnet18": (20, 0, 0), "timm:dla34": (37, 0, 0),
    "timm:dpn48b": (33, 0, 21), "timm:densenet121": (1, 116, 4), "timm:ese_vovnet19b_dw": (23, 0, 0),
    "timm:repvgg_a0": (44, 0, 17), "timm:mobilenetv1_100": (27, 0, 0), "timm:mobilenetv2_050": (52, 0, 0),
    "timm:mobilenetv3_small_050": (34, 0, 0), "timm:lcnet_050": (27, 0, 0), "timm:mnasnet_small": (46, 0, 0),
    "timm:semnasnet_050": (49, 0, 0), "timm:spnasnet_100": (64, 0, 0), "timm:fbnetc_100": (65, 0, 0),
    "timm:hardcorenas_a": (34, 0, 0), "timm:tinynet_e": (31, 0, 0), "timm:mixnet_s": (15, 0, 34),
    "timm:efficientnet_lite0": (49, 0, 0), "timm:tf_efficientnet_b0": (49, 0, 0),
    "timm:tf_mobilenetv3_small_075": (34, 0, 0), "timm:regnetx_002": (44, 0, 0), "timm:regnety_002": (44, 0, 0),
    "timm:ghostnet_050": (80, 0, 0), "timm:rexnet_100": (62, 0, 0), "timm:starnet_s1": (35, 0, 1),
    "timm:repghostnet_050": (80, 0, 32),
}  # fmt: skip
KINDS = ("with ", "in a dense block", "of what")


def compare(name):
    model = MODELS[name]
    stock, report, _, _ = check(model)
    if name in NORMS:
        norms = [n for n, m in stock.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        notes = [report.fused[n] for n in norms]
        assert tuple(sum(note.startswith(kind) for note in notes) for kind in KINDS) == NORMS[name], report
    result = world_table.read().get(name)
    if result is not None:
        expected = [result.fused, result.swapped, result.kept]
        assert list(map(str, world_table.counts(stock, report)[:3])) == expected, report
    return sum(p.numel() for p in stock.parameters())


@pytest.mark.parametrize("name", SLICE)
def test_slice(name):
    compare(name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    if compare(name) <= KERNELS_PARAMETERS:
        check_kernels(MODELS[name])
    gc.collect()


def test_kernels():
    check_kernels(MODELS["timm:test_resnet"])


def test_difference_sees_small_tensors():
    theirs = {"output 0": torch.ones(2), "gradient of a": torch.tensor([1.0, 2.0]), "gradient of b": None}
    mine = theirs | {"gradient of a": torch.tensor([1.0, 2.5])}
    assert difference(theirs, theirs)[0] == 0.0
    assert difference(mine, theirs) == (0.25, "gradient of a")
    assert difference(theirs | {"output 0": torch.tensor([1.0, torch.nan])}, theirs) == (math.inf, "output 0")
    with pytest.raises(AssertionError, match="gradient of b"):
        difference(theirs | {"gradient of b": torch.ones(1)}, theirs)


def test_every_classifier_is_named():
    left_out = {name for names in LEFT_OUT.values() for name in names.split()}
    named = {name for name in MODELS if name.startswith("torchvision:")}
    assert {f"torchvision:{name}" for name in models.list_models(module=models)} == named | {
        name for name in left_out if ":" in name
    }
    assert set(_registry._module_to_models) - {name for name in left_out if ":" not in name} == set(TIMM)


def test_page_is_the_table():
    """Written by `python tests/world_table.py`."""
    results = world_table.read()
    assert world_table.PAGE.read_text() == world_table.page(list(results.values()))
    assert all(result.agrees == "yes" for result in results.values())
