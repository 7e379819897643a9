"""fastcnn.nn against torch.nn: the same constructors, state, results, and an ordinary script with one line swapped."""

import copy
import inspect
import io
import pickle

import pytest
import torch

import fastcnn
from fastcnn import nn

LANES = ("triton", "cpu")
OURS = [
    cls for cls in vars(nn).values() if inspect.isclass(cls) and cls.__module__.startswith("fastcnn.nn.")
    if issubclass(cls, torch.nn.Module) and hasattr(torch.nn, cls.__name__)
]  # fmt: skip
# what torch.nn does not have
OWN = {
    "DecorrelatedBatchNorm2d": (4, 2),
    "DropConnectConv2d": (2, 4, 3),
    "DropConnectLinear": (6, 3),
    "PlainDropout": (0.2,),
    "StochasticDepth": (0.2, "batch"),
}

# an ordinary PyTorch script, as people write it; only its first line is ours to change
SCRIPT = """
import torch.nn as nn
import torch


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, groups=2, padding="same", padding_mode="reflect"),
            nn.SiLU(),
            nn.AvgPool2d(2, ceil_mode=True),
            nn.ConvTranspose2d(8, 8, 2, stride=2),
            nn.LeakyReLU(0.1),
            nn.AdaptiveAvgPool2d((2, 2)),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.Tanh(), nn.Dropout(0.0), nn.Linear(16, 10))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")

    def forward(self, x):
        return self.head(self.features(x))


torch.manual_seed(0)
net = Net()
images, labels = torch.randn(8, 1, 12, 12), torch.randint(0, 10, (8,))
criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
losses = []
for _ in range(STEPS):
    optimizer.zero_grad()
    loss = criterion(net(images), labels)
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 5.0)
    optimizer.step()
    losses.append(loss.item())
net.eval()
with torch.no_grad():
    logits = nn.functional.softmax(net(images), dim=1)
"""


def run_script(first_line, steps):
    names = {"STEPS": steps, "__name__": "script"}
    exec(SCRIPT.replace("import torch.nn as nn", first_line, 1), names)
    return names


def test_a_script_with_one_line_swapped(lane):
    if lane.name == "gpu":
        torch.set_default_device(lane.device)
    try:
        fastcnn.strict(lane.name != "cpu")  # on CPU some of these ops are PyTorch's
        steps = 3 if lane.name == "interpret" else 15
        theirs = run_script("import torch.nn as nn", steps)
        ours = run_script("from fastcnn import nn", steps)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours["logits"], theirs["logits"], rtol=1e-2, atol=1e-3)
    mine, his = ours["net"].state_dict(), theirs["net"].state_dict()
    assert list(mine) == list(his)
    theirs["net"].load_state_dict(mine)
    ours["net"].load_state_dict(his)
    assert repr(ours["net"]) == repr(theirs["net"])


def test_every_name_of_torch_nn_is_there():
    missing = [name for name in dir(torch.nn) if not name.startswith("_") and not hasattr(nn, name)]
    assert missing == []
    for cls in OURS:
        assert getattr(nn, cls.__name__) is cls
        assert issubclass(cls, getattr(torch.nn, cls.__name__))
        assert inspect.signature(cls) == inspect.signature(getattr(torch.nn, cls.__name__))


ARGUMENTS = {
    "Conv2d": (2, 4, 3),
    "ConvTranspose2d": (2, 4, 3),
    "Linear": (6, 3),
    "MaxPool2d": (2,),
    "AvgPool2d": (2,),
    "AdaptiveAvgPool2d": (1,),
    "AdaptiveMaxPool2d": (1,),
    "FractionalMaxPool2d": (2, (3, 3)),
    "LPPool2d": (2, 3),
    "BatchNorm1d": (2,),
    "BatchNorm2d": (2,),
    "BatchNorm3d": (2,),
    "GroupNorm": (2, 4),
    "InstanceNorm1d": (2,),
    "InstanceNorm2d": (2,),
    "InstanceNorm3d": (2,),
    "LayerNorm": (6,),
    "LocalResponseNorm": (5,),
    "SyncBatchNorm": (2,),
}


@pytest.mark.parametrize("name", OWN)
def test_modules_that_torch_lacks_copy_and_pickle(name):
    ours = getattr(nn, name)(*OWN[name])
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is type(ours) and repr(again) == repr(ours)
        torch.testing.assert_close(again.state_dict(), ours.state_dict())


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_modules_copy_pickle_and_exchange_state(cls):
    theirs_cls = getattr(torch.nn, cls.__name__)
    torch.manual_seed(0)
    ours = cls(*ARGUMENTS.get(cls.__name__, ()))
    torch.manual_seed(0)
    theirs = theirs_cls(*ARGUMENTS.get(cls.__name__, ()))
    assert repr(ours) == repr(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        assert type(again) is cls
        torch.testing.assert_close(again.state_dict(), ours.state_dict())


@pytest.mark.parametrize("momentum", (0.1, None, 0.0))
@pytest.mark.parametrize("track", (True, False))
def test_batch_norm_module_statistics(lane, track, momentum):
    modules = [
        namespace.BatchNorm2d(3, momentum=momentum, track_running_stats=track).to(lane.device)
        for namespace in (nn, torch.nn)
    ]
    for step in range(3):
        x = torch.randn(4, 3, 5, 5, device=lane.device) * 2 + step
        for module in modules:
            module.train(step != 2)
        ours, theirs = (module(x) for module in modules)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict())


def test_conv_transpose_output_size(lane):
    if lane.name == "cpu":
        fastcnn.strict(False)
    ours = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1).to(lane.device)
    theirs = torch.nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1).to(lane.device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 2, 5, 4, device=lane.device)
    torch.testing.assert_close(ours(x, output_size=(10, 8)), theirs(x, output_size=(10, 8)))


def test_frozen_layers_and_hooks(lane):
    fastcnn.strict(lane.name != "cpu")
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).to(lane.device)
    net[0].requires_grad_(False)
    seen = []
    net[1].register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    net[2].register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_in))
    net(torch.randn(1, 1, 7, 7, device=lane.device)).sum().backward()
    assert seen[0] == (1, 4, 5, 5)
    assert net[0].weight.grad is None and net[2].weight.grad is not None


def test_dtype_moves_and_channels_last(lane):
    fastcnn.strict(lane.name != "cpu")
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)).to(lane.device)
    net = net.to(memory_format=torch.channels_last).bfloat16()
    y = net(torch.randn(2, 3, 8, 8, device=lane.device, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.float().sum().backward()
    assert net[0].weight.grad.is_contiguous(memory_format=torch.channels_last)
    meta = nn.Conv2d(3, 8, 3, device="meta")
    assert meta.to_empty(device=lane.device).weight.shape == (8, 3, 3, 3)
