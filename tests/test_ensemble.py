"""The average of several networks' probabilities."""

import doctest

import pytest
import torch
from torch import nn

import fastcnn
from fastcnn.models import Ensemble, create_model, ensemble, to_fully_convolutional


def small(bias):
    torch.manual_seed(bias)
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).double().eval()


def test_is_the_mean_of_its_members_probabilities():
    models = [small(i) for i in range(3)]
    images = torch.randn(4, 2, 12, 18, dtype=torch.float64)
    found = Ensemble(models, scales=(8, None, 12, 20))(images)
    resize = lambda *size: nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    scaled = [resize(8, 12), images, images, resize(20, 30)]
    expected = torch.stack([model(x).softmax(1) for x in scaled for model in models]).mean(0)
    torch.testing.assert_close(found.exp(), expected)
    torch.testing.assert_close(found.softmax(1), expected)
    labels = torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(nn.functional.cross_entropy(found, labels), nn.functional.nll_loss(found, labels))


def test_of_one_is_its_log_softmax():
    model, images = small(0), torch.randn(2, 2, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(Ensemble([model])(images), model(images).log_softmax(1))


def test_upright_images_keep_their_proportions():
    shapes = []
    model = small(0)
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[2:])))
    Ensemble([model], scales=(10, 40))(torch.randn(1, 2, 30, 20, dtype=torch.float64))
    assert shapes == [(15, 10), (60, 40)]


def test_windows_of_a_map_are_averaged():
    model = create_model("lenet5").double().eval()
    slid = to_fully_convolutional(model, 32)
    images = torch.randn(2, 1, 36, 40, dtype=torch.float64)
    with torch.no_grad():
        expected = slid(images).softmax(1).mean((2, 3))
        torch.testing.assert_close(Ensemble([slid])(images).exp(), expected)


def test_improbable_classes_keep_their_gradients():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 3, bias=False))
    model[1].weight.data[:, 0] = torch.tensor([0.0, -200.0, -400.0])
    found = Ensemble([model, model])(torch.ones(1, 1, 1, 1))
    torch.testing.assert_close(found, torch.tensor([[0.0, -200.0, -400.0]]))
    found.sum().backward()
    assert model[1].weight.grad.isfinite().all()


def test_compiles_and_learns():
    models = [small(0), small(1)]
    together = Ensemble(models, scales=(8, 12))
    images = torch.randn(4, 2, 12, 12, dtype=torch.float64)
    found = torch.compile(together, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(found, together(images))
    nn.functional.nll_loss(found, torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None and p.grad.any() for p in together.parameters())
    assert len(together.state_dict()) == sum(len(model.state_dict()) for model in models)


class Two(nn.Module):
    def forward(self, x):
        return x, x


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one each, got 0 and 1"):
        Ensemble([])
    for scale in (0, 2.5, True):
        with pytest.raises(ValueError, match="scales must be positive ints or None, got"):
            Ensemble([small(0)], scales=(8, scale))
    images = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"same classes: models\[1\] gives \[1, 4\], the first gives \[1, 3\]"):
        Ensemble([small(0), small(0)[:4]])(images)
    with pytest.raises(ValueError, match=r"models\[0\] must give logits \[N, classes\], got a tuple"):
        Ensemble([Two()])(images)


def test_docstring_examples_run():
    names = {"torch": torch, "fastcnn": fastcnn, "create_model": create_model}
    found = doctest.DocTestFinder().find(ensemble, extraglobs=names)
    assert sum(doctest.DocTestRunner().run(test).attempted for test in found if test.examples) > 0
