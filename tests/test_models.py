import pytest
import torch

from fastcnn.models import create_model, list_models


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
        (dict(name="lenet5", in_chans=1.0), "in_chans must be a positive int, got 1.0"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(**arguments)


def test_list_models():
    assert "lenet5" in list_models()
