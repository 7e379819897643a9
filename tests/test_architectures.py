"""Every network of fastcnn.models, by its line in tests/architectures.py."""

import copy
import doctest
import importlib
import inspect
import math

import pytest
import torch
from architectures import ROWS
from same_networks import assert_same_layers
from torch import nn

import fastcnn
from fastcnn.benchmarks import networks
from fastcnn.models import MODELS, create_model, list_models

BY_NAME = {row.name: row for row in ROWS}
SMALL = [row.name for row in ROWS if row.small is not None]
THEIRS = [row.name for row in ROWS if row.theirs]


def _class_of(name):
    build = MODELS[name].build
    return getattr(build, "func", build)


def build(name, **options):
    """The small form of a network, without dropout."""
    row = BY_NAME[name]
    torch.manual_seed(0)
    model = create_model(name, **{"num_classes": 4} | row.small | options)
    return without_chance(model)


def without_chance(model):
    for module in model.modules():
        for probability in ("p", "drop_prob"):
            if isinstance(getattr(module, probability, None), float):
                setattr(module, probability, 0.0)
    return model


def hostile(model):
    """Weights of batch norms of both signs, statistics that are not those of the start."""
    generator = torch.Generator().manual_seed(1)
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.data.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)
        norm.weight.data[::5] *= -1
    return model


def images_of(model, name, count=2, dtype=torch.float32, size=None):
    size = size or BY_NAME[name].size
    return torch.randn(count, model.in_chans, size, size, dtype=dtype)


def tensors(output):
    return [output] if isinstance(output, torch.Tensor) else [t for t in output if t is not None]


def step(model, images):
    """Outputs, gradients and buffers of one step."""
    torch.manual_seed(7)
    leaf = images.detach().clone().requires_grad_()
    outputs = tensors(model(leaf))
    seeds = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t) for t in outputs]
    torch.autograd.backward(outputs, seeds)
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)} | {"images": leaf.grad}
    return found | {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())


def assert_same(mine, theirs):
    """Equal but for rounding in fp64: what is wrong is off by factors. Some gradients are zero but for rounding."""
    assert mine.keys() == theirs.keys()
    largest = max(float(t.abs().max()) for t in theirs.values() if t is not None and t.is_floating_point())
    for name, tensor in theirs.items():
        assert (tensor is None) == (mine[name] is None), name
        if tensor is not None:
            close = dict(rtol=1e-6, atol=1e-10 * largest, msg=lambda m, name=name: f"{name}: {m}")
            torch.testing.assert_close(mine[name], tensor, **close)


def test_every_network_has_a_line():
    assert sorted(row.name for row in ROWS) == list_models()


def test_every_family_is_tried():
    tried = {inspect.getmodule(_class_of(name)) for name in SMALL}
    assert tried == {inspect.getmodule(_class_of(name)) for name in MODELS}


@pytest.mark.parametrize("name", BY_NAME)
def test_parameters(name):
    row = BY_NAME[name]
    with torch.device("meta"):
        mine = create_model(name)
        assert sum(p.numel() for p in mine.parameters()) == row.parameters
        if row.theirs:
            assert_same_layers(mine, networks.build(row.theirs), row.parameters)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if BY_NAME[n].small == {} else pytest.mark.nightly) for n in THEIRS]
)
def test_their_weights_give_their_outputs_and_gradients(name):
    row = BY_NAME[name]
    torch.manual_seed(0)
    theirs = hostile(without_chance(networks.build(row.theirs, 5))).double()
    mine = without_chance(create_model(name, num_classes=5)).double()
    mine.load_state_dict(theirs.state_dict())
    images = images_of(mine, name, dtype=torch.float64, size=row.whole)
    with fastcnn.backend("torch"):
        assert_same(step(mine, images), step(theirs, images))
        mine.eval(), theirs.eval()
        with torch.no_grad():
            torch.testing.assert_close(mine(images), theirs(images))


@pytest.mark.parametrize("name", SMALL)
def test_chain_is_the_layers_one_by_one(name):
    model = hostile(build(name)).double()
    plain = build(name, fused=False).double()
    plain.load_state_dict(model.state_dict())
    images = images_of(model, name, dtype=torch.float64)
    with fastcnn.backend("torch"):
        assert_same(step(model, images), step(plain, images))


@pytest.mark.parametrize("name", SMALL)
def test_learns_synthetic_images(name):
    model = build(name)
    optimizer = fastcnn.optim.Adam(model.parameters(), lr=BY_NAME[name].lr)
    patterns = images_of(model, name, 4)
    losses = []
    for _ in range(24):
        labels = torch.arange(8) % 4
        images = patterns[labels] + 0.3 * torch.randn(8, *patterns.shape[1:])
        loss = sum(nn.functional.cross_entropy(logits, labels) for logits in tensors(model(images)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    first, last = sum(losses[:4]), sum(losses[-4:])
    assert math.isfinite(last) and last < 0.7 * first, losses


@pytest.mark.parametrize("name", SMALL)
def test_converts(name):
    model = hostile(build(name)).double()
    converted = copy.deepcopy(model)
    report = fastcnn.convert(converted)
    assert not any("not fused" in note for note in report.swapped.values()), report
    images = images_of(model, name, dtype=torch.float64)
    with fastcnn.backend("torch"):
        assert_same(step(converted, images), step(model, images))


@pytest.mark.parametrize("name", SMALL)
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()  # it takes but a few kinds of network, which all share a forward
    model = build(name, fused=False)
    images = images_of(model, name)
    expected = step(copy.deepcopy(model), images)
    found = step(torch.compile(model, fullgraph=True, backend="eager"), images)
    for key, value in expected.items():
        if key.startswith("output"):
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_exports(name):
    model = build(name).eval()
    images = images_of(model, name)
    exported = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_features_of_every_stage(name):
    model = build(name, features_only=True)
    images = images_of(model, name)
    maps = model(images)
    info = model.feature_info(BY_NAME[name].size)
    assert len(maps) == len(model.feature_stages) == len(info) >= 1
    for found, told in zip(maps, info, strict=True):
        assert found.shape[:2] == (2, told["num_chs"])
    sum(t.square().mean() for t in maps).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    whole = build(name).state_dict()
    assert all(torch.equal(whole[key], tensor) for key, tensor in build(name, features_only=True).state_dict().items())
    assert len(build(name, features_only=True, out_indices=[0])(images)) == 1


@pytest.mark.parametrize("name", SMALL)
def test_classifier_is_replaced(name):
    model = build(name)
    # what weights.load leaves fresh in a network of other classes
    other = build(name, num_classes=3).state_dict()
    changed = {key for key, tensor in model.state_dict().items() if tensor.shape != other[key].shape}
    assert {key.rpartition(".")[0] for key in changed} == set(model.heads)
    model.reset_classifier(3)
    assert all(logits.shape == (2, 3) for logits in tensors(model(images_of(model, name))))
    assert model.num_classes == 3


@pytest.mark.parametrize("file", sorted({_class_of(name).__module__ for name in MODELS}))
def test_docstring_examples_run(file):
    module = importlib.import_module(file)
    names = {"torch": torch, "fastcnn": fastcnn, "create_model": create_model, **vars(module)}
    finder = doctest.DocTestFinder(recurse=True)
    examples = [test for test in finder.find(module, file, module, extraglobs=names) if test.examples]
    assert examples, f"{file} has no example"
    for test in examples:
        assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0
