"""fastcnn.convert on torchvision's families, small ones of them, against themselves. test_world.py has timm's."""

import copy

import pytest
import torch
from torch import nn

import fastcnn
from fastcnn.benchmarks.networks import import_torchvision

models = import_torchvision().models

# of every family one that is small, and the size of its images
TORCHVISION = {
    "resnet": (lambda: models.resnet18(num_classes=3), 32),
    "bottleneck": (lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=3), 48),
    "resnext": (lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], 3, groups=8, width_per_group=4), 48),
    "wide_resnet": (lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], 3, width_per_group=128), 32),
    "densenet": (lambda: models.DenseNet(8, (3, 2, 2), 16, num_classes=3), 48),
    "vgg_bn": (lambda: models.vgg.make_layers([8, "M", 16, "M", 16, 16, "M"], batch_norm=True), 48),
    "googlenet": (lambda: models.GoogLeNet(3, init_weights=False, dropout_aux=0.0), 64),
    "inception": (lambda: models.Inception3(3, aux_logits=False, init_weights=False), 80),
    "mobilenet_v2": (lambda: models.mobilenet_v2(num_classes=3, width_mult=0.5), 64),
    "mobilenet_v3": (lambda: models.mobilenet_v3_small(num_classes=3), 64),
    "efficientnet": (lambda: models.efficientnet_b0(num_classes=3, stochastic_depth_prob=0.4), 64),
    "shufflenet": (lambda: models.shufflenet_v2_x0_5(num_classes=3), 64),
    "mnasnet": (lambda: models.mnasnet0_5(num_classes=3), 64),
    "regnet": (lambda: models.regnet_y_400mf(num_classes=3), 64),
}


def outputs(result):
    found = [result] if isinstance(result, torch.Tensor) else [t for t in result if t is not None]
    return [t.flatten(1) for t in found]


def three_steps(model, size):
    """Losses, gradients of the last step, and the state after it."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        images = torch.randn(4, 3, size, size, dtype=torch.float64)
        loss = sum(nn.functional.cross_entropy(out, torch.tensor([0, 2, 1, 1])) for out in outputs(model(images)))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, {name: p.grad for name, p in model.named_parameters()}, model.state_dict(), torch.rand(1)


# whose blocks the others have, too, or that take seconds; tests/test_world.py has all of them
NIGHTLY = ("resnext", "wide_resnet", "inception", "efficientnet", "mnasnet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name in NIGHTLY)) for name in TORCHVISION]
)
def test_three_steps_of_torchvision_in_fp64(name):
    make, size = TORCHVISION[name]
    torch.manual_seed(0)
    model = make().double()
    stock = copy.deepcopy(model)
    report = fastcnn.convert(model)
    norms = [name for name, m in stock.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert [name for name in norms if name not in report.fused] == []
    assert all(note.startswith("no kernel for") for note in report.kept.values()), report
    with fastcnn.backend("torch"):
        mine, theirs = three_steps(model, size), three_steps(stock, size)
        # batch norm of four numbers per channel magnifies rounding with every step; what is wrong is off by factors
        largest = max(float(t.abs().max()) for t in theirs[1].values())
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-7, atol=0)
        torch.testing.assert_close(mine[1], theirs[1], rtol=1e-5, atol=1e-7 * largest)
        torch.testing.assert_close(mine[2:], theirs[2:], rtol=1e-5, atol=1e-7)
        model.eval(), stock.eval()
        images = torch.randn(2, 3, size, size, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(model(images), stock(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(images), stock(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("resnet", "densenet", "vgg_bn"))
def test_torchvision_in_fp32_within_the_error_rule(name):
    make, size = TORCHVISION[name]
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fastcnn.convert(model)
    result = fastcnn.verify(model, torch.randn(8, 3, size, size))
    assert result.ok, result
