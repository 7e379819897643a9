"""create_model and what every network has of the class Network, on a small one; LeNet-5 against torch.nn's layers."""

import copy
import pickle

import pytest
import torch

import fastcnn
from fastcnn import models
from fastcnn.models import create_model, list_models

V1 = dict(num_classes=4, width_mult=0.25, layers=(1, 1, 1, 1, 1))


def torch_lenet(weights, activation, pool):
    """LeNet-5 in torch.nn alone, with the weights of ours in order."""
    from torch import nn

    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 5), activation(), pool(2), nn.Conv2d(6, 16, 5), activation(), pool(2), nn.Flatten()),
        *(nn.Linear(400, 120), activation(), nn.Linear(120, 84), activation(), nn.Linear(84, 10)),
    )
    with torch.no_grad():
        for own, given in zip(model.parameters(), weights, strict=True):
            own.copy_(given)
    return model


@pytest.mark.parametrize(
    "options, activation, pool",
    [
        ({}, torch.nn.ReLU, torch.nn.MaxPool2d),
        ({"activation": "tanh", "pool": "avg"}, torch.nn.Tanh, torch.nn.AvgPool2d),
        ({"activation": "sigmoid"}, torch.nn.Sigmoid, torch.nn.MaxPool2d),
    ],
)
def test_lenet5_is_the_torch_model(options, activation, pool):
    model = create_model("lenet5", **options)
    reference = torch_lenet(model.parameters(), activation, pool)
    images = torch.randn(3, 1, 32, 32)
    out, expected = model(images), reference(images)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for own, given in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own.grad, given.grad)


def test_lenet5_other_classes_and_channels():
    model = create_model("lenet5", num_classes=100, in_chans=3)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    assert model(torch.randn(0, 3, 32, 32)).shape == (0, 100)


@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (1, 3, 32, 32), (1, 32, 32)])
def test_lenet5_names_the_shape_it_takes(shape):
    with pytest.raises(ValueError, match=r"\[N, 1, 32, 32\], got"):
        create_model("lenet5")(torch.zeros(shape))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(name="lenet"), "unknown model 'lenet': did you mean 'lenet5'"),
        (dict(name="LeNet5"), "did you mean 'lenet5'"),
        (dict(name="zzz"), "unknown model 'zzz': there are"),
        (dict(name="lenet5", activation="relus"), "unknown activation 'relus': did you mean 'relu'"),
        (dict(name="lenet5", pool="mean"), "there are max, avg"),
        (dict(name="lenet5", activations="relu"), "unknown option of lenet5 'activations': did you mean 'activation'"),
        (dict(name="lenet5", num_classes=0), "num_classes must be a positive int, got 0"),
        (dict(name="lenet5", num_classes=True), "num_classes must be a positive int, got True"),
        (dict(name="lenet5", in_chans=1.0), "in_chans must be a positive int, got 1.0"),
        (dict(name="lenet5", pretrained=True), "pretrained must be the path of a file of weights, got True"),
        (dict(name="lenet5", out_indices=[0]), r"out_indices needs features_only=True, got \[0\] without it"),
        (
            dict(name="lenet5", features_only=True, out_indices=[2]),
            r"out_indices must be of 0 to 1 .pool1, pool2., got 2",
        ),
        (dict(name="lenet5", features_only=True, out_indices=[-1]), "out_indices must be of 0 to 1 .*, got -1"),
        (dict(name="lenet5", features_only=True, out_indices=[]), "out_indices must name at least one stage"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(**arguments)


def test_names_by_pattern():
    assert "lenet5" in list_models() and list_models() == sorted(list_models())
    assert list_models("lenet*") == ["lenet5"]
    assert set(list_models("mobilenet_v?")) == {"mobilenet_v1", "mobilenet_v2"}
    assert list_models("nothing*") == []


def test_builders_and_classes():
    model = models.mobilenet_v2(num_classes=3)
    assert type(model) is models.MobileNetV2 and model.num_classes == 3
    assert models.mobilenet_v2.__name__ == "mobilenet_v2" and "2018" in models.mobilenet_v2.__doc__
    assert models.lenet5(activation="tanh", fused=False)(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    # a name that is its file's too
    assert type(models.shufflenet_v1(num_classes=2)) is models.ShuffleNetV1
    with pytest.raises(ValueError, match="did you mean 'width_mult'"):
        models.mobilenet_v2(width=0.5)
    with pytest.raises(TypeError):
        models.mobilenet_v2(3)
    again = pickle.loads(pickle.dumps(models.mobilenet_v2))
    assert again is models.mobilenet_v2


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"features_only": True, "out_indices": (1, 3)}])
def test_copies_and_pickles(options):
    model = create_model("mobilenet_v1", **V1, **options).eval()
    images = torch.randn(1, 3, 32, 32)
    expected = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(images), expected, rtol=0, atol=0)
        assert type(other) is type(model) and other.num_classes == 4


def test_unfused_runs_the_layers_one_by_one(monkeypatch):
    calls = []
    for kind in (torch.nn.BatchNorm2d, fastcnn.nn.BatchNorm2d):
        forward = kind.forward
        counted = lambda norm, x, forward=forward: calls.append(norm) or forward(norm, x)
        monkeypatch.setattr(kind, "forward", counted)
    fused, unfused = (create_model("mobilenet_v1", **V1, fused=fused) for fused in (True, False))
    unfused.load_state_dict(fused.state_dict())
    images = torch.randn(2, 3, 64, 64)
    expected = fused(images)
    assert calls == []
    torch.testing.assert_close(unfused(images), expected, rtol=1e-3, atol=1e-4)
    assert len(calls) == len(set(calls)) == 11


def test_features_are_what_the_whole_network_computes():
    whole = create_model("mobilenet_v1", **V1).eval()
    features = create_model("mobilenet_v1", **V1, features_only=True, out_indices=[3, 0]).eval()
    kept = features.state_dict()
    assert not any(key.startswith(("blocks.4", "classifier")) for key in kept) and "blocks.3.0.bn2.bias" in kept
    features.load_state_dict({key: tensor for key, tensor in whole.state_dict().items() if key in kept})
    images = torch.randn(2, 3, 64, 64)
    seen = []
    for name in ("blocks.0", "blocks.3"):
        whole.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    whole(images)
    for found, expected in zip(features(images), seen, strict=True):
        torch.testing.assert_close(found, expected)
    assert [stage["module"] for stage in features.feature_info()] == ["blocks.0", "blocks.3"]
    assert [stage["reduction"] for stage in features.feature_info()] == [2, 16]


def test_another_classifier():
    model = create_model("mobilenet_v1", **V1)
    kept = model.conv_stem.weight
    model.double().reset_classifier(7)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert model(images).shape == (2, 7) and model.get_classifier().weight.dtype == torch.float64
    model.reset_classifier(0)
    assert model(images).shape == (2, 256) and model.conv_stem.weight is kept
    with pytest.raises(ValueError, match=r"the classifier was removed \(num_classes was 0\); make the network anew"):
        model.reset_classifier(3)
    for wrong in (-1, 2.0, True, None):
        with pytest.raises(ValueError, match=f"num_classes must be an int of at least 0, got {wrong!r}"):
            create_model("lenet5").reset_classifier(wrong)
    with pytest.raises(ValueError, match="made with features_only=True has no classifier to replace"):
        create_model("lenet5", features_only=True).reset_classifier(3)


def test_images_of_another_shape_are_named():
    model = create_model("mobilenet_v1", **V1, in_chans=1)
    with pytest.raises(ValueError, match=r"MobileNetV1 takes images of shape \[N, 1, H, W\], got \[2, 3, 8, 8\]"):
        model(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"MobileNetV1 takes images .*, got \[1, 8, 8\]"):
        model.to_features()(torch.zeros(1, 8, 8))
