"""Blocks of fastcnn.nn against the same layers called one by one by plain PyTorch, and networks of them."""

import copy
import io
import pickle
from functools import partial

import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastcnn
from fastcnn import chain
from fastcnn import nn as ours
from fastcnn.testing import assert_close_to_truth

LANES = ("triton", "cpu")


def downsample(inputs, outputs, stride=2, norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))


# name: function of norm_layer that makes the block; input channels
CASES = {
    "conv": (lambda norm: ours.ConvBNAct(5, 9, (3, 1), 2, norm_layer=norm, activation_layer=nn.SiLU), 5),
    "basic": (lambda norm: ours.BasicBlock(6, 6, norm_layer=norm), 6),
    "basic, downsampling": (lambda norm: ours.BasicBlock(5, 8, 2, downsample(5, 8, 2, norm), norm_layer=norm), 5),
    "bottleneck": (lambda norm: ours.Bottleneck(20, 5, norm_layer=norm), 20),
    "resnext": (lambda norm: ours.Bottleneck(6, 4, 2, downsample(6, 16), 2, 64, norm_layer=norm), 6),
    "pre-activation": (lambda norm: ours.PreActBlock(7, 7, norm_layer=norm), 7),
    "pre-activation, downsampling": (
        lambda norm: ours.PreActBlock(4, 6, 2, nn.Conv2d(4, 6, 1, 2, bias=False), norm_layer=norm), 4
    ),
    "pre-activation bottleneck": (lambda norm: ours.PreActBottleneck(8, 2, norm_layer=norm), 8),
    "pre-activation bottleneck, downsampling": (
        lambda norm: ours.PreActBottleneck(4, 3, 2, nn.Conv2d(4, 12, 1, 2, bias=False), norm_layer=norm), 4
    ),
    "dense": (lambda norm: ours.DenseBlock(2, 6, 2, 3), 6),
    "no batch norm": (
        lambda norm: ours.ChainSequential(
            nn.Conv2d(5, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, groups=2, padding=1), nn.SiLU(),
            nn.MaxPool2d(2), nn.Conv2d(8, 4, 1), nn.Hardswish(),
        ), 5
    ),
}  # fmt: skip


class Plain(nn.Module):
    """The same layers, called one by one."""

    def __init__(self, block):
        super().__init__()
        self.block = copy.deepcopy(block)

    def forward(self, x):
        return plain(self.block, x)


def plain(m, x):
    if isinstance(m, nn.Sequential):
        for layer in m:
            x = plain(layer, x)
        return x
    if isinstance(m, ours.BasicBlock):
        y = m.bn2(m.conv2(m.relu(m.bn1(m.conv1(x)))))
        return m.relu(y + (x if m.downsample is None else plain(m.downsample, x)))
    if isinstance(m, ours.Bottleneck):
        y = m.bn3(m.conv3(m.relu(m.bn2(m.conv2(m.relu(m.bn1(m.conv1(x))))))))
        return m.relu(y + (x if m.downsample is None else plain(m.downsample, x)))
    if isinstance(m, ours.PreActBlock):
        u = m.relu(m.bn1(x))
        y = m.conv2(m.relu(m.bn2(m.conv1(u))))
        return y + (x if m.downsample is None else plain(m.downsample, u))
    if isinstance(m, ours.PreActBottleneck):
        u = m.relu(m.norm1(x))
        y = m.conv3(m.relu(m.norm3(m.conv2(m.relu(m.norm2(m.conv1(u)))))))
        return y + (x if m.downsample is None else plain(m.downsample, u))
    if isinstance(m, ours.DenseBlock):
        for layer in m.children():
            y = layer.conv1(layer.relu1(layer.norm1(x)))
            x = torch.cat([x, layer.conv2(layer.relu2(layer.norm2(y)))], 1)
        return x
    return m(x)


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def hostile(model):
    """Negative and zero weights of batch norms, statistics that are not those of the start."""
    generator = torch.Generator().manual_seed(1)
    for norm in norms(model):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            if tensor is not None:
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
        if norm.running_var is not None:
            norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)
        if norm.weight is not None:
            norm.weight.data[0] = 0
    return model


def evaluated(model):
    model.eval()


def first_norm_frozen(model):
    for norm in norms(model)[:1]:
        norm.eval()


def without_gradients(model):
    # of every second parameter
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)


MODES = {
    "training": (nn.BatchNorm2d, None),
    "evaluation": (nn.BatchNorm2d, evaluated),
    "mixed": (nn.BatchNorm2d, first_norm_frozen),
    "cumulative": (partial(nn.BatchNorm2d, momentum=None, eps=1e-3), None),
    "no affine": (partial(nn.BatchNorm2d, affine=False), None),
    "no statistics": (partial(nn.BatchNorm2d, track_running_stats=False), None),
    "half of the parameters": (nn.BatchNorm2d, without_gradients),
}


def run(model, x, steps=1):
    """Outputs, gradients and buffers of some forward and backward passes."""
    results = {}
    for step in range(steps):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = model(leaf + step)
        y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape).contiguous())
        results[f"output {step}"], results[f"input {step}"] = y.detach(), leaf.grad
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    results |= {name.removeprefix("block."): t for name, t in grads.items()}
    return results | {name.removeprefix("block."): b.clone() for name, b in model.named_buffers()}


def compare(mine, theirs, truth, dtype):
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert_close_to_truth(name, tensor, theirs[name], truth[name].double(), dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_blocks_are_their_layers(case, mode):
    (make, channels), (norm, change) = CASES[case], MODES[mode]
    block = hostile(make(norm)).double()
    if change is not None:
        change(block)
    stock = Plain(block)
    x = torch.randn(3, channels, 6, 7, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if mode != "mixed" else x
    with fastcnn.backend("torch"):
        mine, theirs = run(block, x, 2), run(stock, x, 2)
        compare(mine, theirs, theirs, torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(block(x), stock(x))
    torch.testing.assert_close(block.state_dict(), stock.block.state_dict())


@pytest.mark.parametrize(
    "case", ["conv", "basic, downsampling", "bottleneck", "pre-activation", "dense", "no batch norm"]
)
def test_blocks_in_fp32(lane, case):
    make, channels = CASES[case]
    block = hostile(make(nn.BatchNorm2d)).to(lane.device)
    stock = Plain(block)
    truth = Plain(block).double()
    x = torch.randn(2, channels, 5, 6, device=lane.device).to(memory_format=torch.channels_last)
    compare(run(block, x), run(stock, x), run(truth, x.double()), torch.float32)


def small_resnet(classes=10, width=8):
    w, w2, w4 = width, 2 * width, 4 * width
    return ours.ChainSequential(
        ours.ConvBNAct(1, w), nn.MaxPool2d(3, 2, 1),
        nn.Sequential(ours.BasicBlock(w, w), ours.BasicBlock(w, w2, 2, downsample(w, w2))),
        ours.Bottleneck(w2, w, 1, downsample(w2, w4, 1)), ours.Bottleneck(w4, w),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w4, classes),
    )  # fmt: skip


def test_a_network_of_blocks(lane):
    model = small_resnet(3, 4).to(lane.device)
    stock, truth = Plain(model), Plain(model).double()
    x = torch.randn(2, 1, 8, 10, device=lane.device)
    with fastcnn.strict(False):  # small pools and the plain network's layers
        compare(run(model, x), run(stock, x), run(truth, x.double()), torch.float32)


def test_blocks_hand_each_other_values():
    model = ours.ChainSequential(ours.ConvBNAct(3, 4), ours.Bottleneck(4, 1), ours.PreActBlock(4, 4), nn.Identity())
    x = torch.randn(2, 3, 5, 5)
    assert isinstance(model.values(x), chain.Join) and isinstance(model[0].values(x), chain.Pending)
    assert isinstance(model[:1].values(x), chain.Pending)
    with torch.no_grad():
        assert isinstance(model.eval()[:2].values(x), chain.Folded)


def test_values_save_memory():
    def saved(model, x):
        storages = {}
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t,
            lambda t: t,
        ):
            y = model(x)
        del y
        return sum(size for pointer, size in storages.items() if pointer not in own)

    model = ours.ChainSequential(*[ours.BasicBlock(16, 16) for _ in range(4)])
    x = torch.randn(2, 16, 20, 20, requires_grad=True)
    image = x.numel() * 4
    # two raw tensors and one join per block, and the vectors; PyTorch: the activation between, too
    assert saved(model, x) <= 12.2 * image < 15.9 * image <= saved(Plain(model), x)


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck", "_DenseBlock", "_DenseLayer", "Conv2dNormActivation"])
def test_keys_and_initialisation_are_torchvisions(name):
    pytest.importorskip("PIL")
    from fastcnn.benchmarks import networks

    try:
        torchvision = networks.import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")
    stock, mine = {
        "BasicBlock": (torchvision.models.resnet.BasicBlock, partial(ours.BasicBlock, 4, 4, 1, downsample(4, 4, 1))),
        "Bottleneck": (torchvision.models.resnet.Bottleneck, partial(ours.Bottleneck, 8, 2, 1, downsample(8, 8, 1))),
        "_DenseBlock": (torchvision.models.densenet._DenseBlock, partial(ours.DenseBlock, 2, 4, 2, 3)),
        "_DenseLayer": (torchvision.models.densenet._DenseLayer, partial(ours.DenseLayer, 4, 3, 2)),
        "Conv2dNormActivation": (torchvision.ops.Conv2dNormActivation, partial(ours.ConvBNAct, 3, 4, 5, 2)),
    }[name]
    arguments = (*mine.args, 0.0) if name.startswith("_") else mine.args
    torch.manual_seed(0)
    theirs = stock(*arguments)
    torch.manual_seed(0)
    block = mine()
    for (key, value), (expected_key, expected) in zip(
        block.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert key == expected_key and (torch.equal(value, expected) or "downsample" in key)
    theirs.load_state_dict(block.state_dict()), block.load_state_dict(theirs.state_dict())
    x = torch.randn(2, next(theirs.parameters()).shape[0 if "Dense" in name else 1], 6, 6)
    torch.testing.assert_close(block(x), theirs(x))


def test_resnet_of_torchvision_takes_our_blocks():
    from fastcnn.benchmarks import networks

    try:
        resnet = networks.import_torchvision().models.resnet
    except ImportError:
        pytest.skip("torchvision is not installed")
    torch.manual_seed(0)
    stock = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], 5, False, 2, 4).double()
    torch.manual_seed(0)
    mine = resnet.ResNet(ours.Bottleneck, [1, 1, 1, 1], 5, False, 2, 4).double()
    x = torch.randn(3, 3, 96, 64, dtype=torch.float64)
    with fastcnn.backend("torch"):
        theirs = run(stock, x)
        compare(run(mine, x), theirs, theirs, torch.float64)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    block = hostile(ours.BasicBlock(4, 6, 1, downsample(4, 6, 1))).double()
    stock = Plain(block)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    again = lambda model: lambda x: checkpoint(model, x, use_reentrant=reentrant)
    for model in (block, stock):
        model.run = again(model)
    results = []
    for model in (block, stock):
        leaf = x.clone().requires_grad_()
        y = model.run(leaf)
        y.sin().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(*results)


def test_backward_twice_and_accumulation():
    block = hostile(ours.ChainSequential(ours.BasicBlock(4, 4), ours.Bottleneck(4, 1), ours.PreActBlock(4, 4))).double()
    stock = Plain(block)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    for model in (block, stock):
        for _ in range(2):
            y = model(x)
            y.cos().sum().backward(retain_graph=True)
            y.sin().sum().backward()
    for (name, p), q in zip(block.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_second_derivatives_are_refused():
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    for block in (ours.BasicBlock(4, 4), ours.PreActBlock(4, 4), ours.ConvBNAct(4, 4)):
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(block(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("case", ["basic, downsampling", "pre-activation", "conv"])
def test_autocast(case):
    make, channels = CASES[case]
    block = make(nn.BatchNorm2d)
    stock, truth = Plain(block), Plain(block).double()
    x = torch.randn(3, channels, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = block(x), stock(x)
    assert mine.dtype == theirs.dtype
    assert_close_to_truth("output", mine.detach(), theirs.detach(), truth(x.double()).detach(), torch.bfloat16)
    grad = torch.randn_like(mine)
    for y, model in ((mine, block), (theirs, stock), (truth(x.double()), truth)):
        model.zero_grad()
        y.backward(grad.to(y.dtype))
    for (name, p), q, t in zip(block.named_parameters(), stock.parameters(), truth.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert_close_to_truth(name, p.grad, q.grad, t.grad, torch.bfloat16)


def test_grad_scaler_copies_and_files():
    model = small_resnet()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    x, losses = torch.randn(4, 1, 8, 8), []
    for m in (model, *copies):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        for _ in range(2):
            loss = m(x).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        losses.append(loss.item())
    assert len(set(losses)) == 1
    infinite = model(x * torch.inf).sum()
    before = [p.clone() for p in model.parameters()]
    scaler.scale(infinite).backward()
    scaler.step(torch.optim.SGD(model.parameters(), 0.1)), scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_what_the_chain_does_not_know_is_called():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    calls = []
    model = ours.ChainSequential(
        ours.ConvBNAct(3, 4), Double(), ours.BasicBlock(4, 4, norm_layer=partial(nn.GroupNorm, 2)), nn.Dropout(0.0),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), nn.ELU(inplace=True)),
        nn.Conv2d(4, 6, 1), nn.AvgPool2d(2), nn.MaxPool2d(2, return_indices=False),
    )  # fmt: skip
    model[2].conv1 = nn.utils.parametrizations.weight_norm(model[2].conv1)
    model.double()
    stock = Plain(model)
    model[4][0].register_forward_hook(lambda *_: calls.append("conv"))
    model[2].relu.register_forward_pre_hook(lambda *_: calls.append("relu"))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with fastcnn.backend("torch"):
        mine, theirs = run(model, x), run(stock, x)
    compare(mine, theirs, theirs, torch.float64)
    assert calls == ["relu", "relu", "conv"]
    with pytest.raises(ValueError, match="groups = 2, base_width = 64"):
        ours.BasicBlock(4, 4, groups=2)
    with pytest.raises(NotImplementedError, match="Block does not define values"):
        ours.Block()(x)


FIRST = 1  # of 4 rows the first process has one


def record(model, x):
    x.requires_grad_()
    y = model(x)
    y.sin().sum().backward()
    return y.detach(), x.grad, [p.grad for p in model.parameters()], list(model.buffers())


def worker(rank, path):
    fastcnn.backend("torch")
    model, x = torch.load(f"{path}/model.pt", weights_only=False)
    x = x[:FIRST] if rank == 0 else x[FIRST:]
    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(model), broadcast_buffers=False)
    results = {"parallel": record(parallel, x.clone())}
    calls = {"all_gather": 0, "all_reduce": 0}

    def counted(function):
        def count(*args, **kwargs):
            calls[function.__name__] += 1
            return function(*args, **kwargs)

        return count

    dist.all_gather, dist.all_reduce = counted(dist.all_gather), counted(dist.all_reduce)
    # DistributedDataParallel refuses SyncBatchNorm on a CPU
    results["synchronised"] = record(nn.SyncBatchNorm.convert_sync_batchnorm(model), x.clone())
    torch.save((results, calls), f"{path}/{rank}.pt")


def test_two_processes(tmp_path):
    layers = ours.ConvBNAct(3, 4), ours.BasicBlock(4, 6, 1, downsample(4, 6, 1)), ours.PreActBlock(6, 6)
    model = hostile(ours.ChainSequential(*layers)).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) + torch.arange(4.0).view(4, 1, 1, 1)
    torch.save((model, x), tmp_path / "model.pt")
    processes.run(worker, tmp_path)
    (first, calls), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(processes.WORLD))
    # statistics of all processes: one process with all rows
    y, grad, grads, buffers = record(Plain(model), x.clone())
    parts = first["synchronised"], second["synchronised"]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), y)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad)
    torch.testing.assert_close([a + b for a, b in zip(parts[0][2], parts[1][2], strict=True)], grads)
    for part in parts:
        torch.testing.assert_close(part[3], buffers)
    # one of each per batch norm
    assert calls == {"all_gather": 6, "all_reduce": 6}
    # statistics of its own rows in each
    expected = record(Plain(model), x[:FIRST].clone()), record(Plain(model), x[FIRST:].clone())
    for part, (y, grad, _, buffers) in zip((first["parallel"], second["parallel"]), expected, strict=True):
        torch.testing.assert_close([part[0], part[1], part[3]], [y, grad, buffers])
        mean = [(a + b) / 2 for a, b in zip(expected[0][2], expected[1][2], strict=True)]
        torch.testing.assert_close(part[2], mean)


@pytest.fixture(scope="module")
def train_on_digits():
    """Function of (model, noise) that trains it on real digits and returns its 200 losses."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.images).unsqueeze(1) / 16 - 0.3
    labels = torch.from_numpy(digits.target).long()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(len(images), (32,), generator=generator) for _ in range(200)]

    def train(model, noise=0):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-4)
        generator, losses = torch.Generator().manual_seed(noise), []
        dtype = next(model.parameters()).dtype
        for batch in batches:
            x = images[batch].to(dtype)
            if noise:  # of the size of one rounding of fp32
                x = x * (1 + 1e-7 * torch.randn(x.shape, generator=generator))
            loss = F.cross_entropy(model(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses, dtype=dtype)

    return train


def test_training_on_digits_is_plain_pytorchs(train_on_digits):
    # in fp64, where 200 steps do not make a rounding's difference visible
    torch.manual_seed(0)
    start = small_resnet().double()
    stock, mine = train_on_digits(Plain(start)), train_on_digits(copy.deepcopy(start))
    assert stock[0] > 2 and stock[-20:].mean() < 0.3
    torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-7)


def test_training_on_digits_in_fp32_stays_within_its_roundings(train_on_digits):
    torch.manual_seed(0)
    start = small_resnet()
    stock, *noisy = (train_on_digits(Plain(start), noise) for noise in range(3))
    mine = [train_on_digits(copy.deepcopy(start), noise) for noise in range(3)]
    apart = lambda losses: (losses - stock).abs().view(10, 20).mean(1)
    spread = torch.stack([apart(losses) for losses in noisy]).amax(0).cummax(0).values
    assert all(losses[-20:].mean() < 0.3 for losses in (stock, *mine))
    # a rounding puts one run in eight, of PyTorch's too, on another course: on the other side of a ReLU
    assert any((apart(losses) <= 2 * spread + 1e-5).all() for losses in mine), (*map(apart, mine), spread)
