"""What is special of MLP, AlexNet, ZFNet, network in network and SqueezeNet; tests/architectures.py has their lines."""

import pytest
import torch
import torch.nn.functional as F
from same_networks import assert_same_under_autocast
from test_architectures import assert_same, hostile, step, without_chance
from test_chain_bytes import saved_bytes
from torch import nn

import fastcnn
from fastcnn import chain
from fastcnn.benchmarks import networks
from fastcnn.models import Fire, create_model
from fastcnn.nn.blocks import conv_act, unfuse
from fastcnn.ops.concatenate import Buffer

LANES = ("triton", "cpu")


def sizes(name, *kinds, **options):
    """[channels, height, width] of what comes out of the layers of these kinds, for an image of the network's size."""
    found = []
    with torch.device("meta"):
        model = unfuse(create_model(name, **options)).eval()
        for module in model.modules():
            if isinstance(module, kinds):
                module.register_forward_hook(lambda module, inputs, output: found.append(list(output.shape[1:])))
        with torch.no_grad():
            model(torch.empty(1, 3, *[fastcnn.models.MODELS[name].image_size] * 2))
    return found


@pytest.mark.parametrize("name", ["alexnet_lrn", "alexnet_towers"])
def test_the_decks_alexnet_layer_by_layer(name):
    layers = nn.Conv2d, nn.MaxPool2d, nn.LocalResponseNorm, nn.Linear
    if name == "alexnet_lrn":
        assert sizes(name, *layers) == [
            [96, 55, 55], [96, 27, 27], [96, 27, 27], [256, 27, 27], [256, 13, 13], [256, 13, 13], [384, 13, 13],
            [384, 13, 13], [256, 13, 13], [256, 6, 6], [4096], [4096], [1000],
        ]  # fmt: skip
    else:
        # [55x55x48] x 2, normalised where they are
        assert sizes(name, nn.LocalResponseNorm) == [[48, 27, 27]] * 2 + [[128, 13, 13]] * 2
    with torch.device("meta"):
        model = create_model(name)
    weights = model.conv1.weight.numel()
    assert weights == 11 * 11 * 3 * 96 and round(weights / 1e3) == 35
    groups = {"alexnet_lrn": 1, "alexnet_towers": 2}[name]
    assert [getattr(model, f"conv{i}").groups for i in range(1, 6)] == [1, groups, 1, groups, groups]


def test_the_papers_zfnet_layer_by_layer():
    assert sizes("zfnet", nn.Conv2d, nn.MaxPool2d) == [
        [96, 110, 110], [96, 55, 55], [256, 26, 26], [256, 13, 13], [512, 13, 13], [1024, 13, 13], [512, 13, 13],
        [512, 6, 6],
    ]  # fmt: skip


def test_network_in_network_layer_by_layer():
    pools = nn.MaxPool2d, nn.AvgPool2d
    assert sizes("nin_cifar", *pools) == [[96, 16, 16], [192, 8, 8]]
    assert sizes("nin_cifar", nn.Conv2d)[-1] == [10, 8, 8]
    assert sizes("nin", *pools) == [[96, 27, 27], [256, 13, 13], [384, 6, 6]]
    assert sizes("nin", nn.Conv2d)[-1] == [1000, 6, 6]


def drawn(name, **options):
    """Without dropout, in fp64, with weights and biases that leave no layer idle."""
    model = without_chance(create_model(name, num_classes=5, **options)).double()
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return model


def test_two_towers_run_apart():
    model = drawn("alexnet_towers", width_mult=0.125)
    images = torch.randn(2, 3, 99, 83, dtype=torch.float64)

    def half(layer, tower):
        return [tensor.chunk(2)[tower] for tensor in (layer.weight, layer.bias)]

    def norm(x):  # of the paper, on one GPU's maps
        squares = F.pad(x.square(), (0, 0, 0, 0, 2, 2))
        sums = sum(squares[:, i : i + x.shape[1]] for i in range(5))
        return x / (2 + 1e-4 * sums) ** 0.75

    def first(tower):
        x = F.conv2d(images, *half(model.conv1, tower), 4).relu()
        x = F.conv2d(norm(F.max_pool2d(x, 3, 2)), *half(model.conv2, tower), padding=2).relu()
        return norm(F.max_pool2d(x, 3, 2))

    def second(tower, x):
        x = F.conv2d(x, *half(model.conv3, tower), padding=1).relu()  # of both towers' maps
        x = F.conv2d(x, *half(model.conv4, tower), padding=1).relu()
        x = F.conv2d(x, *half(model.conv5, tower), padding=1).relu()
        return F.adaptive_avg_pool2d(F.max_pool2d(x, 3, 2), 6)

    maps = torch.cat([first(0), first(1)], 1)
    x = torch.cat([second(0, maps), second(1, maps)], 1).flatten(1)
    for layer in (model.fc6, model.fc7):
        x = F.linear(x, layer.weight, layer.bias).relu()
    with fastcnn.backend("torch"):
        torch.testing.assert_close(model(images), model.fc8(x))


def test_network_in_network_by_hand():
    model = drawn("nin_cifar")
    images = x = torch.randn(2, 3, 18, 15, dtype=torch.float64)
    for i, pool in enumerate((F.max_pool2d, F.avg_pool2d, None), 1):
        for j, padding in enumerate((1 if i == 3 else 2, 0, 0)):
            layer = model.get_submodule(f"mlpconv{i}.{2 * j}")
            x = F.conv2d(x, layer.weight, layer.bias, padding=padding).relu()
        x = x.mean((2, 3)) if pool is None else pool(x, 3, 2, ceil_mode=True)
    with fastcnn.backend("torch"):
        torch.testing.assert_close(model(images), x)


def test_zfnet_by_hand():
    model = drawn("zfnet", width_mult=0.125)
    images = x = torch.randn(2, 3, 99, 83, dtype=torch.float64)
    for i, (stride, padding) in enumerate(((2, 1), (2, 0), (1, 1), (1, 1), (1, 1)), 1):
        layer = model.get_submodule(f"conv{i}")
        x = F.conv2d(x, layer.weight, layer.bias, stride, padding).relu()
        x = x if i in (3, 4) else F.max_pool2d(x, 3, 2, ceil_mode=True)
        x = F.local_response_norm(x, 5, 5e-4, 0.75, 2.0) if i < 3 else x
    x = F.adaptive_avg_pool2d(x, 6).flatten(1)
    for layer in (model.fc6, model.fc7):
        x = F.linear(x, layer.weight, layer.bias).relu()
    with fastcnn.backend("torch"):
        torch.testing.assert_close(model(images), model.fc8(x))


def test_mlp_by_hand():
    model = drawn("mlp", hidden=(7, 6), in_chans=2, image_size=3)
    images = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    x = F.linear(images.flatten(1), model.hidden[1].weight, model.hidden[1].bias).relu()
    x = F.linear(x, model.hidden[3].weight, model.hidden[3].bias).relu()
    torch.testing.assert_close(model(images), F.linear(x, model.fc.weight, model.fc.bias))


def test_alexnet_starts_as_in_the_paper():
    model = create_model("alexnet_lrn", width_mult=0.125)
    biases = {name: module.bias for name, module in model.named_children() if hasattr(module, "bias")}
    assert {name for name, bias in biases.items() if bool((bias == 1).all())} == {
        "conv2",
        "conv4",
        "conv5",
        "fc6",
        "fc7",
    }
    assert all(not biases[name].any() for name in ("conv1", "conv3", "fc8"))
    assert float(model.conv3.weight.detach().std()) == pytest.approx(0.01 * 8**0.5, rel=0.05)


def test_squeezenet_starts_as_torchvisions():
    torch.manual_seed(5)
    theirs = networks.build("torchvision:squeezenet1_1", 7).state_dict()
    torch.manual_seed(5)
    assert all(
        torch.equal(theirs[key], tensor) for key, tensor in create_model("squeezenet1_1", 7).state_dict().items()
    )


def test_squeezenet_has_50_times_fewer_parameters_than_alexnet():
    with torch.device("meta"):
        count = lambda name: sum(p.numel() for p in create_model(name).parameters())
        assert [round(count(name) / count("squeezenet1_0")) for name in ("alexnet_towers", "alexnet_lrn")] == [49, 50]


class Plain(nn.Module):
    """Fire module and convolution in PyTorch, whose halves other layers read, too."""

    def __init__(self):
        super().__init__()
        self.fire, self.head, self.other = Fire(4, 6, 5), nn.Conv2d(10, 3, 3), nn.Conv2d(5, 3, 3)

    def forward(self, x):
        fire = self.fire
        x = fire.squeeze(x).relu()
        ones, threes = fire.expand1x1(x).relu(), fire.expand3x3(x).relu()
        return self.head(torch.cat([ones, threes], 1)) + self.other(threes)

    def fused(self, x):
        fire, buffer = self.fire, Buffer(10)
        x = conv_act(x, fire.squeeze, fire.squeeze_activation)
        ones = conv_act(x, fire.expand1x1, fire.expand1x1_activation, buffer.slot(0))
        threes = conv_act(x, fire.expand3x3, fire.expand3x3_activation, buffer.slot(5))
        both = chain.cat([ones, threes])
        assert isinstance(both, chain.Pending) and both.activation == "relu"
        parts = [value.raw.untyped_storage().data_ptr() for value in (ones, threes, both)]
        assert len(set(parts)) == 1, "the halves were copied"
        return chain.conv(both, self.head) + chain.conv(threes, self.other)


def test_halves_of_a_fire_module_are_written_side_by_side(lane):
    model = Plain().double()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    with fastcnn.strict(False):  # dense convolution on CPU
        expected = step(model, x)
        model.zero_grad()
        model.to(lane.device)
        model.forward = model.fused
        found = step(model, x.to(lane.device))
    assert_same({key: tensor.cpu() for key, tensor in found.items()}, expected)


def test_values_that_differ_in_more_than_numbers_are_put_together_as_tensors():
    x = [torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    pending = lambda x, kind, slope=0.0: chain.Pending(x, None, None, kind, slope)
    with fastcnn.backend("torch"):
        for left, right, truth in (
            (pending(x[0], "relu"), pending(x[1], "silu"), [x[0].relu(), F.silu(x[1])]),
            (pending(x[0], "leaky_relu", 0.1), pending(x[1], "leaky_relu", 0.2), None),
            (pending(x[0], "relu"), x[1], [x[0].relu(), x[1]]),
            (
                chain.multiply(pending(x[0], "relu"), torch.full((1, 2, 1, 1), 3.0).double()),
                pending(x[1], "relu"),
                None,
            ),
        ):
            both = chain.cat([left, right])
            assert isinstance(both, torch.Tensor)
            if truth is not None:
                torch.testing.assert_close(both, torch.cat(truth, 1))


@pytest.mark.parametrize("how", [(2, 2), (3, 2, 1), (3, 2, 0, 1, True)])
def test_max_pools_of_activations_without_batch_norm(lane, how):
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64).to(memory_format=torch.channels_last)
    x[0, :, :4], x[1, 0, 2, 2], x[1, 1, 4, 3] = (
        -x[0, :, :4].abs(),
        0.0,
        float("nan"),
    )  # windows of which nothing is left
    found = []
    for fused in (True, False):
        leaf = x.to(lane.device if fused else "cpu").requires_grad_()
        again, raw = nn.Conv2d(8, 8, 1).double().to(leaf.device), leaf * 1
        again.weight.data.copy_(torch.eye(8).view(8, 8, 1, 1))
        again.bias.data.zero_()
        if fused:
            value = chain.Pending(raw, None, None, "relu")
            y = chain.max_pool2d(value, *how)
            z = chain.materialize(value)
        else:
            z = raw.relu()
            y = F.max_pool2d(z, *how)
        with fastcnn.strict(False):  # a reader, for which backward makes the pool again
            read = chain.conv(chain.Pending(y, None, None), again) if fused else again(y)
            loss = (read * torch.linspace(1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).nansum()
            (loss + 3 * z.nansum()).backward()
        found.append([t.detach().cpu() for t in (y, leaf.grad, again.weight.grad)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("name, bar", [("squeezenet1_1", 0.62), ("nin_cifar", 1.0)])
def test_values_are_not_stored(name, bar):
    model = create_model(name, 10).to(memory_format=torch.channels_last)
    theirs = unfuse(create_model(name, 10)).to(memory_format=torch.channels_last)
    size = 128 if name == "squeezenet1_1" else 32
    images = torch.randn(2, 3, size, size).to(memory_format=torch.channels_last)
    with fastcnn.backend("torch"):
        eager = saved_bytes(theirs, images)
    assert saved_bytes(model, images) <= bar * eager


def test_squeezenet_under_autocast():
    theirs = hostile(without_chance(networks.build("torchvision:squeezenet1_1", 5)))
    mine = create_model("squeezenet1_1", num_classes=5)
    mine.load_state_dict(theirs.state_dict())
    assert_same_under_autocast(mine, theirs)


@pytest.mark.parametrize(
    "name, smallest", [("alexnet", 63), ("alexnet_lrn", 67), ("zfnet", 47), ("nin", 39), ("nin_cifar", 4),
                       ("squeezenet1_0", 21), ("squeezenet1_1", 17)],
)  # fmt: skip
def test_smallest_images(name, smallest):
    narrow = {"width_mult": 0.02} if "net" in name and "squeeze" not in name else {}
    model = create_model(name, 2, **narrow).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, smallest, smallest)).shape == (1, 2)
    with pytest.raises(ValueError, match=rf"H, W of at least {smallest}, got \[1, 3, {smallest - 1}"):
        model(torch.zeros(1, 3, smallest - 1, smallest))
    model.min_size = 1
    with pytest.raises((RuntimeError, ValueError)), torch.no_grad():
        model(torch.zeros(1, 3, smallest - 1, smallest - 1))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"groups must be 1 or 2, got 3"):
        create_model("alexnet_lrn", groups=3)
    with pytest.raises(ValueError, match=r"hidden must give the units of at least one layer, got \(\)"):
        create_model("mlp", hidden=())
    with pytest.raises(ValueError, match=r"MLP takes images of shape \[N, 1, 28, 28\], got \[2, 1, 32, 32\]"):
        create_model("mlp")(torch.zeros(2, 1, 32, 32))
    assert create_model("mlp", hidden=(7, 5)).hidden[3].weight.shape == (5, 7)
