"""The fully convolutional form of a classifier against its windows one by one."""

import copy
import doctest

import pytest
import torch
from test_chain_bytes import saved_bytes
from torch import nn

import fastcnn
from fastcnn import chain
from fastcnn.benchmarks import networks
from fastcnn.models import Network, create_model, fully_convolutional, to_fully_convolutional
from fastcnn.nn.blocks import unfuse


def build(name, **options):
    torch.manual_seed(0)
    return hostile(create_model(name, num_classes=5, **options))


def hostile(model):
    generator = torch.Generator().manual_seed(1)
    for norm in [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]:
        norm.running_mean.add_(0.3 * torch.randn(norm.running_mean.shape, generator=generator))
        norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)
    return model.double().eval()


def windows_one_by_one(model, images, window, stride):
    """Logits [N, K, P, Q] of the classifier on each window."""
    rows = range(0, images.shape[2] - window[0] + 1, stride[0])
    columns = range(0, images.shape[3] - window[1] + 1, stride[1])
    cut = lambda i, j: images[:, :, i : i + window[0], j : j + window[1]]
    return torch.stack([torch.stack([model(cut(i, j)) for j in columns], -1) for i in rows], -2)


def assert_windows(model, size, larger, channels):
    """That the form is the classifier on every window of larger images.

    A last one may reach past their border with pixels that the classifier does not read.
    """
    window = size if isinstance(size, tuple) else (size, size)
    slid = to_fully_convolutional(model, size)
    images = torch.randn(2, channels, *larger, dtype=torch.float64)
    with fastcnn.backend("torch"), torch.no_grad():
        expected = windows_one_by_one(model, images, window, slid.stride)
        found, (rows, columns) = slid(images), expected.shape[2:]
        assert found.shape[2] - rows in (0, 1) and found.shape[3] - columns in (0, 1)
        torch.testing.assert_close(found[:, :, :rows, :columns], expected)
        torch.testing.assert_close(slid(images[:, :, : window[0], : window[1]])[:, :, 0, 0], expected[:, :, 0, 0])
    return slid


@pytest.mark.parametrize("options", [{}, {"activation": "tanh", "pool": "avg"}])
def test_windows_of_lenet(options):
    assert assert_windows(build("lenet5", **options), 32, (44, 39), 1).stride == (4, 4)


def test_windows_of_an_mlp():
    assert assert_windows(build("mlp", image_size=6, hidden=(7, 6)), 6, (8, 9), 1).stride == (1, 1)


def test_windows_of_overfeat_without_padding():
    model = build("overfeat", widths=(4, 5, 6, 7, 8), hidden=(9, 10), image_size=231)
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            layer.padding = (0, 0)
            nn.init.kaiming_normal_(layer.weight)
    model.classifier[0] = nn.Linear(8 * 9, 9).double()
    assert assert_windows(model, 231, (263, 296), 3).stride == (32, 32)


class Functional(nn.Module):
    """A classifier of 9x7 images, of functions between layers; its head reads a map [N, 6, 3, 4]."""

    def __init__(self, head):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, (2, 1), bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = head
        self.fc = nn.Linear(head(torch.zeros(1, 6, 3, 4)).shape[1], 4)

    def forward(self, x):
        x = nn.functional.relu(self.norm(self.conv(x)), inplace=True)
        x = self.head(nn.functional.max_pool2d(x, 2, 1))
        return self.fc(nn.functional.dropout(x, 0.5, self.training))


class Tiny(Network):
    """Blocks of the chain, the mean, a linear layer."""

    body = ("features",)
    heads = ("fc",)

    def __init__(self, num_classes=2):
        super().__init__(num_classes, 3)
        layers = [fastcnn.nn.ConvBNAct(3, 8, 3, 2), fastcnn.nn.ConvBNAct(8, 16, 3, 2), fastcnn.nn.ConvBNAct(16, 16)]
        self.features = fastcnn.nn.ChainSequential(*layers)
        self.fc = nn.Linear(16, num_classes)

    def classify(self, x):
        return self.fc(chain.mean(x))


HEADS = {
    "mean": lambda x: x.mean((2, 3)),
    "mean of the last dimensions, kept": lambda x: torch.mean(x, dim=[-1, -2], keepdim=True).flatten(1),
    "maximum": lambda x: x.amax((2, 3)),
    "adaptive": lambda x: nn.functional.adaptive_avg_pool2d(x, 1).squeeze(3).squeeze(2),
    "both": lambda x: (
        nn.functional.adaptive_max_pool2d(x, (1, 1)) + nn.functional.adaptive_avg_pool2d(x, (1, 1))
    ).view(x.size(0), -1),
    "average of all": lambda x: torch.flatten(nn.functional.avg_pool2d(x, (3, 4)), 1),
    "average of the image's size": lambda x: torch.flatten(nn.functional.avg_pool2d(x, x.shape[2:]), 1),
    "flattened": lambda x: x.reshape(x.shape[0], -1),
    "viewed": lambda x: (x * 2 + 1).view(-1, 6 * 3 * 4),
    "adaptive to its own size": lambda x: nn.functional.adaptive_avg_pool2d(x, (3, 4)).flatten(1),
    "shuffled": lambda x: (
        x.view(x.size(0), 2, 3, x.size(2), x.size(3)).transpose(1, 2).contiguous()
        .view(x.size(0), -1, x.size(2), x.size(3)).flatten(1)
    ),
    "subsampled": lambda x: torch.cat([x[:, 2:], x[:, :2]], 1)[:, :, ::3, ::4].flatten(1),
    "chunks": lambda x: torch.cat([part.sigmoid() for part in x.chunk(3, 1)], 1).flatten(1),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_windows_of_heads_in_functions(name):
    slid = assert_windows(hostile(Functional(HEADS[name])), (9, 7), (17, 10), 3)
    assert slid.window == (9, 7)
    # a sample of every third and fourth pixel takes only such windows
    assert slid.stride == ((6, 4) if name == "subsampled" else (2, 1))
    assert any(isinstance(m, nn.Dropout) and m.p == 0.5 for m in slid.modules())


@pytest.mark.parametrize("pool, stride", [((2, 2), (4, 4)), ((3, 3), (2, 2)), ((4, 4), (2, 2)), (1, (2, 2))])
def test_windows_of_adaptive_pools(pool, stride):
    # of a 4x4 map: windows of 2 at distance 2, of 2 at distance 1, of 1, of 4
    count = 1 if pool == 1 else pool[0]
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, 2), nn.BatchNorm2d(6), nn.PReLU(6), nn.AdaptiveAvgPool2d(pool), nn.Flatten(),
        nn.Linear(6 * count**2, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(), nn.Linear(8, 8), nn.Softmax(1),
    )  # fmt: skip
    assert assert_windows(hostile(model), 9, (17, 14), 2).stride == stride


@pytest.mark.parametrize("seed", range(8))
def test_windows_of_random_networks(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))
    layers, channels = [], 2
    for _ in range(draw(2, 4)):
        width = draw(2, 5)
        layers += [nn.Conv2d(channels, width, (draw(1, 3), draw(1, 3)), (draw(1, 2), draw(1, 2)), bias=draw(0, 1) > 0)]
        layers += [nn.BatchNorm2d(width)] if draw(0, 1) else []
        layers += [[nn.ReLU(), nn.Tanh(), nn.SiLU()][draw(0, 2)]]
        layers += [[nn.MaxPool2d(2), nn.AvgPool2d(2, 1), nn.LocalResponseNorm(3)][draw(0, 2)]]
        channels = width
    size = (50, 56)
    rows, columns = nn.Sequential(*layers)(torch.zeros(1, 2, *size)).shape[2:]
    layers += [nn.Flatten(), nn.Linear(channels * rows * columns, 6), nn.ReLU(), nn.Linear(6, 3)]
    assert_windows(hostile(nn.Sequential(*layers)), size, (size[0] + 21, size[1] + 17), 2)


def cut_features(model, name, images, counts, size):
    """Logits of the classifier whose module `name` gives the map of larger images, of which one window is cut out."""
    found = []
    for i in range(counts[0]):
        for j in range(counts[1]):
            cut = lambda module, args, out, i=i, j=j: out[:, :, i : i + size[0], j : j + size[1]]
            handle = model.get_submodule(name).register_forward_hook(cut)
            found.append(model(images))
            handle.remove()
    return torch.stack(found, -1).unflatten(-1, counts)


def torchvision_model(name, **options):
    return getattr(networks.import_torchvision().models, name)(num_classes=5, **options)


PADDED = {
    "resnet18": (lambda: torchvision_model("resnet18"), "layer4", {}),
    "densenet": (
        lambda: networks.import_torchvision().models.DenseNet(4, (1, 2, 1, 1), 8, num_classes=5), "features", None,
    ),
    "mobilenet_v2": (lambda: torchvision_model("mobilenet_v2", width_mult=0.25), "features", {"width_mult": 0.25}),
    "squeezenet1_1": (lambda: torchvision_model("squeezenet1_1"), "features", {}),
    "shufflenet_v2_x0_5": (lambda: torchvision_model("shufflenet_v2_x0_5"), "conv5", {}),
    "googlenet": (lambda: torchvision_model("googlenet", init_weights=False), "inception5b", {}),
    "resnet10t": (lambda: networks.build("timm:resnet10t", 5), "layer4", None),
}  # fmt: skip
LARGE = ("googlenet", "shufflenet_v2_x0_5")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.nightly) if n in LARGE else n for n in PADDED])
def test_padded_networks_cut_the_features(name):
    make, module, options = PADDED[name]
    torch.manual_seed(0)
    theirs = hostile(make())
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    models = [theirs]
    if options is not None:  # the same network on the chain
        models.append(create_model(name, num_classes=5, **options).double().eval())
        models[1].load_state_dict(theirs.state_dict())
    with fastcnn.backend("torch"), torch.no_grad():
        for model in models:
            slid = to_fully_convolutional(model, 64)
            found = slid(images)
            size = chain.materialize(slid.features(images[:, :, :64, :64])).shape[2:]
            torch.testing.assert_close(found, cut_features(theirs, module, images, found.shape[2:], size))
            torch.testing.assert_close(slid(images[:, :, :64, :64])[:, :, 0, 0], theirs(images[:, :, :64, :64]))


class Renormalised(nn.Module):
    """torchvision's transform_input, for weights of another source."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        red = torch.unsqueeze(x[:, 0], 1) * 0.4 - 0.1
        green, blue = (torch.unsqueeze(x[:, i], 1) * 0.5 + 0.1 * i for i in (1, 2))
        return self.fc(self.conv(torch.cat((red, green, blue), 1)).square().mean((2, 3)))


def test_channels_taken_apart():
    assert_windows(Renormalised().double(), 6, (8, 9), 3)


def test_padding_alone_tells_windows_from_windows():
    # away from the border of its window a padded network's map is that of the larger image
    model = nn.Sequential(nn.Conv2d(1, 2, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 6 * 6, 2)).double()
    slid = to_fully_convolutional(model, 6)
    images = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    differing = lambda: (slid(images)[:, :, 1, 1] - model(images[:, :, 1:7, 1:7])).abs().max()
    assert differing() > 1e-3
    ring = torch.ones(8, 8, dtype=torch.bool)
    ring[1:7, 1:7] = False
    images[:, :, ring] = 0  # what padding would have put there
    assert differing() < 1e-12


def test_gradients_are_those_of_the_windows():
    model = build("lenet5")
    slid = to_fully_convolutional(model, 32)
    images = torch.randn(2, 1, 40, 36, dtype=torch.float64)
    seeds = torch.randn(2, 5, 3, 2, dtype=torch.float64)
    mine, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    with fastcnn.backend("torch"):
        slid(mine).backward(seeds)
        windows_one_by_one(model, theirs, (32, 32), (4, 4)).backward(seeds)
    torch.testing.assert_close(mine.grad, theirs.grad)
    for part in (slid.trunk, slid.head):
        for name, parameter in part.named_parameters():
            expected = model.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, expected.view_as(parameter))
    assert sum(p.numel() for p in slid.parameters()) == sum(p.numel() for p in model.parameters())


def test_learns_and_leaves_the_classifier_as_it_was():
    model = Tiny()
    model.features[0].eval().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    slid = to_fully_convolutional(model, 32)
    assert slid.training and not slid.trunk.features[0].training and slid.trunk.features[1].training
    frozen = [name for name, p in slid.trunk.named_parameters() if not p.requires_grad]
    assert frozen == [name for name, _ in model.named_parameters() if name.startswith("features.0.")]
    optimizer = fastcnn.optim.Adam([p for p in slid.parameters() if p.requires_grad], lr=1e-2)
    images = torch.randn(4, 3, 64, 64)
    labels = torch.arange(4)[:, None, None].expand(4, 9, 9) % 2
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(slid(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.training and model.fc.weight.dim() == 2


def test_frozen_parts_stay_frozen():
    model = head(nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    model[1].eval()
    model[5].eval()
    model[4].weight.requires_grad_(False)
    model[6].bias.requires_grad_(False)
    slid = to_fully_convolutional(model, 8)
    training = {name: slid.head.get_submodule(name).training for name in "456"}
    assert training == {"4": True, "5": False, "6": True}
    assert not slid.trunk.get_submodule("1").training and slid.trunk.get_submodule("2").training
    frozen = [name for name, p in slid.named_parameters() if not p.requires_grad]
    assert frozen == ["head.4.weight", "head.6.bias"]


def test_dropout_is_a_layer_again():
    slid = to_fully_convolutional(Functional(HEADS["flattened"]).train(), (9, 7))
    images = torch.randn(1, 3, 11, 9)
    assert not torch.equal(slid(images), slid(images))
    slid.eval()
    assert torch.equal(slid(images), slid(images))


def test_values_are_not_stored():
    slid, plain = (to_fully_convolutional(model, 32) for model in (Tiny(), unfuse(Tiny())))
    images = torch.randn(2, 3, 64, 64)
    assert saved_bytes(slid, images) <= 0.7 * saved_bytes(plain, images)


def test_compiles_exports_copies_and_converts():
    model = hostile(Tiny())
    plain = to_fully_convolutional(unfuse(copy.deepcopy(model)), 32)
    slid = to_fully_convolutional(model, 32)
    images = torch.randn(1, 3, 64, 40, dtype=torch.float64)
    with fastcnn.backend("torch"), torch.no_grad():
        expected = slid(images)
        compiled = torch.compile(plain, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), expected)
        torch.testing.assert_close(torch.export.export(slid, (images,)).module()(images), expected)
        torch.testing.assert_close(copy.deepcopy(slid)(images), expected)
        assert fastcnn.convert(plain).swapped
        torch.testing.assert_close(plain(images), expected)


def test_of_a_converted_model():
    model = hostile(Functional(HEADS["mean"]))
    slid = to_fully_convolutional(model, (9, 7))
    assert fastcnn.convert(model).swapped
    images = torch.randn(1, 3, 14, 9, dtype=torch.float64)
    with torch.no_grad():
        again = to_fully_convolutional(model, (9, 7))
        torch.testing.assert_close(again(images), slid(images))
        assert fastcnn.convert(again).swapped
        torch.testing.assert_close(again(images), slid(images))


class Chance(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        x = self.conv(x)
        return (x * torch.rand_like(x) if self.training else x).mean((2, 3))


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Linear(8, 8)

    def forward(self, x):
        return self.rows(x).mean((2, 3))


class TwoMaps(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride)

    def forward(self, x):
        x = self.one(x)
        return torch.cat([self.two(x).mean((2, 3)), x.mean((2, 3))], 1)


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ReLU()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        while x.shape[2] > 4:
            x = self.conv(x)
        return x.mean((2, 3))


def head(*layers):
    return nn.Sequential(nn.Conv2d(3, 4, 3), *layers)


REFUSED = {
    "squeeze-excite": (
        lambda: create_model("efficientnet_b0"), 64, r"^features\.1\.0\.block\.1 \(SqueezeExcite\) .* whole image",
    ),
    "group norm": (lambda: head(nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 2)), 8, r"^1 \(GroupNorm\) "),
    "batch norm without running statistics": (
        lambda: head(nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(144, 2)), 8,
        r"^1 \(BatchNorm2d\) normalises with the statistics",
    ),
    "uneven pool": (
        lambda: head(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 2)), 8, "pools a map of 6 x 6 to 4 x 4",
    ),
    "global pool and back": (lambda: head(nn.Upsample(scale_factor=2), nn.Flatten()), 8, r"^1 \(Upsample\)"),
    "no flattening": (lambda: head(), 8, "no logits"),
    "rows": (Rows, 8, r"^rows \(Linear\) is a linear layer over the pixels of a row"),
    "two maps": (lambda: TwoMaps(1), 8, "is read by the classifier besides its map of features"),
    "two maps of two strides": (lambda: TwoMaps(2), 8, "combines maps of different strides"),
    "chance": (Chance, 8, r"draws random numbers in its forward \(rand_like\), in training"),
    "control flow": (Loop, 8, "^Loop cannot be traced by torch.fx"),
    "another linear layer": (
        lambda: head(nn.Flatten(), fastcnn.nn.DropConnectLinear(144, 2)), 8, r"^2 \(DropConnectLinear\)",
    ),
    "batch norm of a map's numbers": (lambda: head(nn.Flatten(), nn.BatchNorm1d(144)), 8, r"^2 \(BatchNorm1d\)"),
    "softmax of the last dimension": (lambda: head(nn.Flatten(), nn.Linear(144, 2), nn.Softmax(-1)), 8, r"^3 \(Soft"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_slide(name):
    make, size, message = REFUSED[name]
    with pytest.raises(NotImplementedError, match=message):
        to_fully_convolutional(make(), size)


def test_bad_arguments():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        to_fully_convolutional("lenet5")
    for size in (0, True, 3.5, (3,), (3, -1)):
        with pytest.raises(ValueError, match="image_size must be a positive int or two of them, got"):
            to_fully_convolutional(build("lenet5"), size)
    with pytest.raises(ValueError, match="image_size: the model cannot take images of 33 x 40"):
        to_fully_convolutional(build("lenet5"), (33, 40))
    with pytest.raises(ValueError, match="features_only"):
        to_fully_convolutional(create_model("mobilenet_v2", features_only=True))
    slid = to_fully_convolutional(build("lenet5"), 32)
    with pytest.raises(ValueError, match=r"shape \[N, 1, H, W\] of at least 32 x 32, got \[1, 1, 31, 40\]"):
        slid(torch.zeros(1, 1, 31, 40))


def test_docstring_examples_run():
    names = {"torch": torch, "fastcnn": fastcnn, "create_model": create_model}
    found = doctest.DocTestFinder().find(fully_convolutional, extraglobs=names, globs=vars(fully_convolutional))
    assert sum(doctest.DocTestRunner().run(test).attempted for test in found if test.examples) > 0
