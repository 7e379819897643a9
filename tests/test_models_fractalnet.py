"""What is FractalNet's own; the rest is in tests/test_architectures.py."""

import copy

import pytest
import torch

import fastcnn
from fastcnn.models import create_model


def small(columns=3, **options):
    torch.manual_seed(0)
    options = {"channels": (6, 8), "dropout": (0.0, 0.0)} | options
    return create_model("fractalnet20_cifar", num_classes=4, columns=columns, **options)


@pytest.mark.parametrize("name, columns", [("fractalnet20_cifar", 3), ("fractalnet40_cifar", 4)])
def test_parameters(name, columns):
    with torch.device("meta"):
        model = create_model(name)
        deepest = model.column(0)
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    total, inputs = 0, 3
    for outputs in (m.out_channels for m in convs[:: 2**columns - 1]):
        first, others = columns, 2**columns - 1 - columns
        total += 9 * (first * inputs * outputs + others * outputs**2) + 2 * (first + others) * outputs
        inputs = outputs
    assert sum(p.numel() for p in model.parameters()) == total + 10 * inputs + 10
    depth = sum(isinstance(m, torch.nn.Conv2d) for m in deepest.modules())
    assert depth == 5 * 2 ** (columns - 1) == int(name[10:12])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_column_alone_is_a_plain_network(index, fused, monkeypatch):
    """Outputs and gradients, in training, where all images chose the column."""
    model = small(fused=fused).double()
    plain = copy.deepcopy(model).column(index)
    monkeypatch.setattr("fastcnn.models.fractalnet.ALONE", 1.1)
    monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.full(size, index))
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    with fastcnn.backend("torch"):
        found, expected = model(images), plain(images)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward(), expected.square().sum().backward()
    column = model.column(index)
    assert column(images).shape == (4, 4)
    for mine, theirs in zip(column.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="0 to 2"):
        model.column(3)


def test_weights_are_drawn_uniformly_after_xavier():
    model = small(channels=(24, 32))
    for conv in (m for m in model.modules() if isinstance(m, torch.nn.Conv2d)):
        bound = (6 / (9 * (conv.in_channels + conv.out_channels))) ** 0.5
        assert 0.95 * bound < float(conv.weight.detach().abs().max()) <= bound


def test_at_test_time_joins_are_means():
    model, x = small().eval(), torch.randn(2, 3, 16, 16)
    a, b, c = model.block1.columns
    half = (a[1](a[0](x)) + b[0](x)) / 2
    whole = (a[3](a[2](half)) + b[1](half) + c[0](x)) / 3
    with torch.no_grad():
        torch.testing.assert_close(model.block1(x, model.shares(x)[0]), model.block1.pool(whole))


def test_drop_path():
    model = small(drop_path=0.3)
    count = 4000
    shares = model.shares(torch.empty(count, 3, 1, 1))
    assert shares.shape == (2, 2, 3, count)  # blocks, joins, columns, images
    torch.testing.assert_close(shares.sum(2), torch.ones(2, 2, count))
    assert not shares[:, 0, 2].any()  # the shallowest column ends in the last join alone
    last = shares[:, 1]
    for k in range(3):
        # local drop-path leaves one of three alone by chance, in both blocks seldom; 0.5 / 3 are the global choice
        everywhere = (last[:, k] == 1).all(0).float().mean()
        assert abs(float(everywhere) - (0.5 / 3 + 0.5 * (0.7 * 0.09 + 0.009) ** 2)) < 0.03
    full = (last > 0).all(1).float().mean()
    assert abs(float(full) - 0.5 * 0.7**3) < 0.03
    torch.manual_seed(1)
    first = model.shares(torch.empty(count, 3, 1, 1))
    torch.manual_seed(1)
    assert torch.equal(first, model.shares(torch.empty(count, 3, 1, 1)))
    assert torch.equal(model.eval().shares(torch.empty(2, 3, 1, 1))[0, 1], torch.full((3, 2), 1 / 3))


def test_drop_path_and_dropout_layer_by_layer():
    """The chain with its random choices, and torch.compile of the layers one by one with theirs: the same ones."""
    model, plain = (small(columns=2, dropout=(0.0, 0.1), fused=fused) for fused in (True, False))
    images = torch.randn(4, 3, 16, 16)
    outputs = []
    for form in (model, torch.compile(plain, fullgraph=True, backend="eager")):
        torch.manual_seed(5)
        outputs.append(form(images))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [({"columns": 0}, "columns"), ({"dropout": (0.1,)}, "dropout"), ({"drop_path": 1.0}, "drop_path")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
