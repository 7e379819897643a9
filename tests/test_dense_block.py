"""chain.dense_block and the batch norm that reads it, against the same layers of torch.nn with concatenations."""

import copy

import pytest
import torch
from conftest import INTERPRET
from torch import nn

import fastcnn
from fastcnn import chain
from fastcnn.ops import conv2d_backward
from fastcnn.testing import assert_close_to_truth, make_grad

LANES = ("triton", "cpu")
N, C, H, W = 3, 5, 4, 6
CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic.*")


class Layer(nn.Module):
    def __init__(self, channels, growth, width, **options):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels, **options)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width, **options)
        self.conv2 = nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def parts(self):
        return self.norm1, self.conv1, self.norm2, self.conv2

    def forward(self, x):
        return self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())


class Network(nn.Module):
    """A dense block of layers of different widths, batch norm, ReLU and a convolution."""

    def __init__(self, channels=C, growths=(2, 3, 1), width=4, **options):
        super().__init__()
        sums = [channels + sum(growths[:i]) for i in range(len(growths) + 1)]
        self.layers = nn.ModuleList(Layer(c, k, width, **options) for c, k in zip(sums[:-1], growths, strict=True))
        self.norm = nn.BatchNorm2d(sums[-1], **options)
        self.head = nn.Conv2d(sums[-1], 3, 1)
        for bn in (module for module in self.modules() if isinstance(module, nn.BatchNorm2d)):
            if bn.affine:
                nn.init.uniform_(bn.weight, 0.5, 1.5)
                nn.init.normal_(bn.bias)
            if bn.track_running_stats:
                bn.running_mean.normal_(std=0.1)
                bn.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(self.norm(torch.cat(features, 1)).relu())

    def fused(self, x):
        block = chain.dense_block(x, [layer.parts() for layer in self.layers])
        return chain.conv(chain.activate(chain.batch_norm(block, self.norm), "relu"), self.head)


def image(n=N, c=C, h=H, w=W, dtype=torch.float32, layout=CHANNELS_LAST):
    return torch.randn(n, c, h, w, dtype=torch.float64).to(dtype).to(memory_format=layout).requires_grad_()


def results(network, forward, x, grad_output, steps=1):
    """Output, gradients and buffers after backward; the gradients of several steps add up."""
    x = x.detach().requires_grad_(x.requires_grad)
    for _ in range(steps):
        y = forward(x * 1)
        y.backward(grad_output.to(y.dtype))
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "x": x.grad, **grads, **dict(network.named_buffers())}


def compare(network, x, device="cpu", steps=1):
    """fused, against forward in its dtype as the yardstick and in fp64 as the truth."""
    with torch.no_grad():
        grad_output = make_grad(copy.deepcopy(network)(x))
    plain, true = copy.deepcopy(network), copy.deepcopy(network).double()
    with fastcnn.backend("torch"):
        expected = results(plain, plain.forward, x, grad_output, steps)
        truth = results(true, true.forward, x.detach().double().requires_grad_(x.requires_grad), grad_output, steps)
    network = network.to(device)
    ours = results(network, network.fused, x.to(device), grad_output.to(device), steps)
    assert ours.keys() == truth.keys()
    for name, tensor in ours.items():
        if tensor is not None and tensor.is_floating_point():
            assert_close_to_truth(name, tensor.cpu(), expected[name], truth[name], x.dtype)
        else:
            assert tensor is None and truth[name] is None or torch.equal(tensor.cpu(), truth[name]), name
    return ours


MODES = {
    "training": [],
    "evaluation": [""],
    "frozen block": ["layers"],
    "frozen last norm": ["norm"],
    "some frozen": ["layers.0.norm2", "layers.1.norm1"],
}


@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("mode", MODES)
def test_in_fp64(mode, layout):
    network = Network().double()
    for name in MODES[mode]:
        network.get_submodule(name).eval()
    with fastcnn.backend("torch"):
        compare(network, image(dtype=torch.float64, layout=layout))


@pytest.mark.parametrize("mode", ["training", "some frozen"])
def test_on_kernels(lane, mode):
    network = Network()
    for name in MODES[mode]:
        network.get_submodule(name).eval()
    compare(network, image(), lane.device)


def test_hostile_shapes(lane):
    compare(Network(1, (1,)), image(1, 1, 1, 2), lane.device)
    if not INTERPRET:
        compare(Network(8, (8, 8)), image(2, 8, 3, 3, layout=CONTIGUOUS), lane.device)
        compare(Network(), image(2, 2 * C, 5, 3).detach()[:, ::2].requires_grad_(), lane.device)


def test_both_gradients_of_a_convolution_in_one_kernel(lane, monkeypatch):
    if lane.name == "cpu":
        pytest.skip("kernels of Triton")
    ran = []

    def pays(*args, **options):
        ran.append(conv2d_backward.why_not(*args, **options) is None)
        return ran[-1]

    monkeypatch.setattr(conv2d_backward, "pays", pays)
    compare(Network(16, (8, 8), 8).bfloat16(), image(2, 16, 4, 4, dtype=torch.bfloat16), lane.device)
    # the head with its 3 filters; of each layer the 3x3 convolution, then the 1x1
    assert ran == [False, False, True, False, True]


def test_options_of_batch_norm():
    for options in (dict(affine=False), dict(momentum=None), dict(track_running_stats=False)):
        with fastcnn.backend("torch"):
            compare(Network(**options).double(), image(dtype=torch.float64), steps=2)


def test_nan_spreads_as_in_torch(lane):
    x = image().detach()
    x[1, 2, 1, 1] = torch.nan
    ours = compare(Network(), x.requires_grad_(), lane.device)
    assert ours["output"].isnan().all()


def test_frozen_parameters_and_inputs():
    network = Network().double()
    for parameter in network.layers.parameters():
        parameter.requires_grad_(False)
    network.layers[1].conv1.weight.requires_grad_()
    with fastcnn.backend("torch"):
        compare(network, image(dtype=torch.float64).detach())


def test_backward_twice_gives_the_same_and_leaves_the_gradient_it_got_alone():
    network, x = Network().double(), image(dtype=torch.float64)
    with fastcnn.backend("torch"):
        block = chain.dense_block(x, [layer.parts() for layer in network.layers])
        grad = torch.randn_like(block.raw)
        kept = grad.clone()
        inputs = [x, *network.layers.parameters()]
        first = torch.autograd.grad(block.raw, inputs, grad, retain_graph=True)
        second = torch.autograd.grad(block.raw, inputs, grad)
    assert torch.equal(grad, kept)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_accumulate():
    with fastcnn.backend("torch"):
        compare(Network().double(), image(dtype=torch.float64), steps=3)


def test_block_with_several_readers():
    network, x = Network().double(), image(dtype=torch.float64)
    copied = copy.deepcopy(network)
    with fastcnn.backend("torch"):
        block = chain.dense_block(x, [layer.parts() for layer in network.layers])
        y = chain.conv(chain.activate(chain.batch_norm(block, network.norm), "relu"), network.head)
        z = chain.materialize(chain.add(chain.batch_norm(block, network.norm), chain.materialize(block)))
        (y.square().sum() + (z * z.sin()).sum()).backward()
        ours, x.grad = x.grad, None
        features = [x]
        for layer in copied.layers:
            features.append(layer(torch.cat(features, 1)))
        features = torch.cat(features, 1)
        y = copied.head(copied.norm(features).relu())
        z = copied.norm(features) + features
        (y.square().sum() + (z * z.sin()).sum()).backward()
    torch.testing.assert_close(ours, x.grad)
    for a, b in zip(network.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(lane, training):
    network, x = Network().train(training), image().detach()
    truth = copy.deepcopy(network).double()
    with torch.no_grad():
        ours = network.to(lane.device).fused(x.to(lane.device))
        torch.testing.assert_close(ours.cpu(), truth(x.double()).float(), rtol=1e-5, atol=1e-5)


def test_what_the_buffer_cannot_hold_runs_layer_by_layer():
    network = Network().double()
    network.layers[1].conv2 = nn.Conv2d(4, 3, 3, padding=1).double()  # with a bias
    with fastcnn.backend("torch"):
        assert isinstance(chain.dense_block(image(), []), torch.Tensor)
        compare(network, image(dtype=torch.float64))


def test_autocast_computes_in_its_dtype():
    network, x = Network(), image()
    with torch.autocast("cpu", torch.bfloat16):
        block = chain.dense_block(x, [layer.parts() for layer in network.layers])
        assert block.raw.dtype == torch.bfloat16 and block.mean.dtype == torch.float32
        y = network.fused(x)
    y.float().sum().backward()
    assert network.layers[0].conv1.weight.grad.dtype == torch.float32


def test_second_derivatives_are_refused():
    network, x = Network().double(), image(dtype=torch.float64)
    with fastcnn.backend("torch"), pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(network.fused(x).sum(), x, create_graph=True)


def test_one_value_per_channel_is_refused():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        Network().fused(image(1, C, 1, 1))


def test_saved_bytes():
    x, network = image(2, C, 8, 8), Network()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chain.dense_block(x, [layer.parts() for layer in network.layers])
    images = [t for at, t in kept.items() if at not in parameters and t.dim() == 4]
    # the buffer and the output of every first convolution, of four channels
    assert sum(t.numel() for t in images) == 2 * 8 * 8 * (C + 2 + 3 + 1 + 3 * 4)
