"""fastcnn.convert on networks that nobody here wrote: torchvision's families and timm's, against themselves."""

import copy

import pytest
import torch
from torch import nn

import fastcnn
from fastcnn.benchmarks.networks import import_torchvision

models = import_torchvision().models
timm = pytest.importorskip("timm")

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


@pytest.mark.parametrize("name", TORCHVISION)
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


# timm's networks: batch norms fused with their convolution, in a dense block, and of other tensors (the input, a sum,
# a concatenation, the output of a convolution that is not torch.nn's or has other readers). None stays
TIMM = {
    "resnet18": (20, 0, 0), "resnetblur18": (20, 0, 0), "resnetv2_18": (8, 0, 9),
    "seresnet18": (20, 0, 0), "skresnet18": (36, 0, 0), "ecaresnet26t": (31, 0, 0), "resnest14d": (23, 0, 0),
    "legacy_seresnet18": (20, 0, 0), "dla34": (37, 0, 0), "dpn48b": (33, 0, 21), "densenet121": (1, 116, 4),
    "ese_vovnet19b_dw": (23, 0, 0), "repvgg_a0": (44, 0, 17),
    "mobilenetv1_100": (27, 0, 0), "mobilenetv2_050": (52, 0, 0), "mobilenetv3_small_050": (34, 0, 0),
    "lcnet_050": (27, 0, 0), "mnasnet_small": (46, 0, 0), "semnasnet_050": (49, 0, 0), "spnasnet_100": (64, 0, 0),
    "fbnetc_100": (65, 0, 0), "hardcorenas_a": (34, 0, 0), "tinynet_e": (31, 0, 0), "mixnet_s": (15, 0, 34),
    "efficientnet_lite0": (49, 0, 0), "tf_efficientnet_b0": (44, 0, 5), "tf_mobilenetv3_small_075": (29, 0, 5),
    "regnetx_002": (44, 0, 0), "regnety_002": (44, 0, 0), "ghostnet_050": (80, 0, 0), "rexnet_100": (62, 0, 0),
    "starnet_s1": (35, 0, 1), "repghostnet_050": (80, 0, 32),
}  # fmt: skip
KINDS = ("with ", "in a dense block", "of what")


@pytest.mark.parametrize("name", TIMM)
def test_one_step_of_timm_in_fp64(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).double()
    stock = copy.deepcopy(model)
    report = fastcnn.convert(model)
    norms = [name for name, m in stock.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    notes = [report.fused[name] for name in norms]
    assert tuple(sum(note.startswith(kind) for note in notes) for kind in KINDS) == TIMM[name], report
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with fastcnn.backend("torch"):
        results = []
        for net in (model, stock):
            torch.manual_seed(1)
            output = net(images)
            output.square().sum().backward()
            results.append([output.detach(), torch.rand(1), *(p.grad for p in net.parameters())])
        largest = max(float(t.abs().max()) for t in results[1][2:] if t is not None)
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9 * largest)
        torch.testing.assert_close(model.state_dict(), stock.state_dict(), rtol=1e-8, atol=1e-10)
    fastcnn.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
