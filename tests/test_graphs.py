"""graphed_step: as it is on CPU; recording and replaying with a stand-in for the CUDA graph; for real on a GPU."""

import logging
import re

import pytest
import torch

import fastcnn
from fastcnn import graphs, nn, optim
from fastcnn.nn import functional as F

LANES = ("triton",)


class Counted(nn.Module):
    """A small network with all that training changes besides weights."""

    def __init__(self, p=0.0):
        super().__init__()
        self.conv, self.norm, self.dropout = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(p)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        return self.linear(self.dropout(F.relu(self.norm(self.conv(x))).mean((2, 3))))


def make(device="cpu", kind="SGD", p=0.0, **options):
    torch.manual_seed(0)
    model = Counted(p).to(device)
    defaults = {"momentum": 0.9} if kind == "SGD" else {}
    return model, getattr(optim, kind)(model.parameters(), **{"lr": 0.1, **defaults, **options})


def batch(i, n=6, device="cpu"):
    generator = torch.Generator().manual_seed(i)
    images = torch.randn(n, 3, 7, 7, generator=generator)
    return images.to(device), torch.randint(5, (n,), generator=generator).to(device)


def eager(model, optimizer, images, labels, autocast=None, scaler=None):
    """The loop that everybody writes."""
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return loss.detach()


def state_of(model, optimizer):
    tensors = dict(model.state_dict())
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{i}.{name}": value for name, value in state.items()}
    return tensors


def assert_same(a, b):
    left, right = state_of(*a), state_of(*b)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


class Recording:
    """Stands in for the CUDA graph: a replay runs the function again, with all that a graph would not look at as it was
    when it was recorded: the batch's memory, the options of the optimizer, the modes of the modules."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.log = []

    def warm_up(self, function):
        self.log.append("run")
        return function()

    def rehearse(self, function):
        self.log.append("rehearse")
        return function()

    def record(self, function):
        self.log.append("record")
        assert all(isinstance(group["lr"], torch.Tensor) for group in self.optimizer.param_groups)
        assert all(group.get("capturable", True) for group in self.optimizer.param_groups)
        self.function = function
        self.groups = [dict(group) for group in self.optimizer.param_groups]
        self.modes = [module.training for module in self.model.modules()]
        loss = torch.full((), torch.nan)
        clipping = "max_grad_norm" in self.optimizer.defaults
        norm = torch.full((), torch.nan, dtype=torch.float64) if clipping else None
        self.results = loss, norm
        return self.results

    def replay(self):
        self.log.append("replay")
        groups, modules = self.optimizer.param_groups, list(self.model.modules())
        before = [dict(group) for group in groups], [module.training for module in modules]
        self._set(groups, self.groups, modules, self.modes)
        grad_norm = getattr(self.optimizer, "grad_norm", None)
        loss, norm = self.function()
        self.optimizer.grad_norm = grad_norm
        self._set(groups, before[0], modules, before[1])
        self.results[0].copy_(loss)
        if norm is not None:
            self.results[1].copy_(norm)

    def _set(self, groups, values, modules, modes):
        for group, value in zip(groups, values, strict=True):
            group.update(value)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode

    def drop(self):
        self.log.append("drop")
        self.function = None


def recorded(model, optimizer, autocast=None, scaler=None, warmup=3):
    """A graphed step around a `Recording`, and that."""
    recording = Recording(model, optimizer)
    device = torch.device("cpu")
    step = graphs._GraphedStep(model, F.cross_entropy, optimizer, autocast, scaler, device, warmup, recording)
    return step, recording


def test_on_cpu_the_same_loop_bit_for_bit(caplog):
    a, b = make(p=0.3), make(p=0.3)
    seen = []

    def loss_fn(output, target):
        seen.append(output.shape)
        return F.cross_entropy(output, target)

    with caplog.at_level(logging.WARNING, "fastcnn"):
        step = fastcnn.graphed_step(a[0], loss_fn, a[1])
    assert caplog.messages == ["graphed_step: the model is on cpu, so its steps run without a CUDA graph"]
    a[0].linear.weight.grad = torch.ones_like(a[0].linear.weight)  # left from something else
    losses = {}
    for which in "ab":
        torch.manual_seed(1)
        model, optimizer = {"a": a, "b": b}[which]
        for i in range(6):
            optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
            images, labels = batch(i, 6 if i != 4 else 3)
            loss = step(images, labels) if which == "a" else eager(model, optimizer, images, labels)
            losses.setdefault(which, []).append(loss)
    assert torch.equal(torch.stack(losses["a"]), torch.stack(losses["b"]))
    assert_same(a, b)
    assert len(caplog.messages) == 1 and len(seen) == 6
    assert all(p.grad is None for p in a[0].parameters()) and not losses["a"][0].requires_grad


@pytest.mark.parametrize(
    "kind, options, amp",
    [
        ("SGD", {"dampening": 0.5, "weight_decay": 0.01}, False),
        ("Adam", {"max_grad_norm": 0.1, "ema_decay": 0.9}, False),
        ("AdamW", {}, True),
    ],
    ids=["sgd", "adam", "amp"],
)
def test_every_call_is_one_step_of_the_loop(kind, options, amp):
    """Steps before the recording are steps of the training; schedules and odd batches are followed; the user's
    learning rate stays a float."""
    a, b = make(kind=kind, **options), make(kind=kind, **options)
    # a scale so large that the first steps are skipped, and one that grows
    amps = [(torch.bfloat16, torch.amp.GradScaler("cpu", init_scale=2.0**125, growth_interval=2)) for _ in "ab"]
    (dtype, scaler), (_, other) = amps if amp else [(None, None)] * 2
    step, recording = recorded(*a, dtype, scaler)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9) for _, optimizer in (a, b)]
    losses = []
    for i in range(9):
        images, labels = batch(i, 4 if i in (1, 6) else 6)
        losses.append((step(images, labels), eager(*b, images, labels, dtype, other)))
        if kind == "Adam":
            assert torch.equal(a[1].grad_norm, b[1].grad_norm)
        for schedule in schedules:
            schedule.step()
        assert type(a[1].param_groups[0]["lr"]) is float and not a[1].param_groups[0].get("capturable")
    # the odd batches, the second and the seventh, are nothing to the recording
    assert recording.log == ["run", "run", "rehearse", "record", "replay", "replay", "replay", "replay"]
    assert all(torch.equal(*pair) for pair in losses) and len({loss.data_ptr() for loss, _ in losses}) == 9
    assert_same(a, b)
    if amp:
        assert scaler.state_dict() == other.state_dict() and scaler.get_scale() != 2.0**125


CHANGES = {
    "mode": lambda model, optimizer: model.norm.eval(),
    "requires_grad": lambda model, optimizer: model.conv.weight.requires_grad_(False),
    "option": lambda model, optimizer: optimizer.param_groups[0].update(l1=0.1),
    "clipping": lambda model, optimizer: optimizer.defaults.update(max_grad_norm=0.1),
    "momentum": lambda model, optimizer: optimizer.param_groups[0].update(momentum=0.5),
    "state": lambda model, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "memory": lambda model, optimizer: setattr(model.conv.weight, "data", model.conv.weight.data.clone()),
    "group": lambda model, optimizer: optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_recorded_again(change, caplog):
    a, b = make(), make()
    step, recording = recorded(*a, warmup=2)
    for i in range(8):
        if i == 4:
            for model, optimizer in (a, b):
                CHANGES[change](model, optimizer)
        images, labels = batch(i)
        assert torch.equal(step(images, labels), eager(*b, images, labels))
    once = ["run", "rehearse", "record", "replay", "replay"]
    assert recording.log == [*once, "drop", *once]
    assert_same(a, b)
    assert [message[:40] for message in caplog.messages] == ["graphed_step: model or optimizer changed"]


def test_a_learning_rate_tensor_of_the_user_is_read_where_it_is():
    a, b = make(), make()
    a[1].param_groups[0]["lr"] = rate = torch.tensor(0.1)
    step, recording = recorded(*a)
    for i in range(6):
        rate.fill_(0.1 / (i + 1))
        b[1].param_groups[0]["lr"] = rate.item()
        assert torch.equal(step(*batch(i)), eager(*b, *batch(i)))
    assert a[1].param_groups[0]["lr"] is rate and "drop" not in recording.log
    assert_same(a, b)


@pytest.mark.parametrize("kind", optim.__all__)
def test_a_learning_rate_in_memory_gives_the_same_bits(lane, kind):
    optimizers = []
    for _ in "ab":
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, device=lane.device)) for shape in [(3, 5), (7,)]]
        optimizers.append(getattr(optim, kind)(parameters, lr=0.1, weight_decay=0.01))
    a, b = optimizers
    rates = graphs._Rates(a, lane.device)
    for i in range(3):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
            for p in optimizer.param_groups[0]["params"]:
                p.grad = p.detach().sin()
        rates.refresh()
        with rates.in_groups():
            a.step()
        b.step()
    for p, q in zip(*(optimizer.param_groups[0]["params"] for optimizer in optimizers), strict=True):
        assert torch.equal(p, q)


def test_what_may_not_be_recorded_is_not_tried():
    step, recording = recorded(*make(), warmup=2)

    def rehearse(function):
        function()
        raise RuntimeError("it waits")

    recording.rehearse = rehearse
    step(*batch(0))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="it waits"):
            step(*batch(0))
    assert recording.log == ["run"]


def test_a_failing_step_leaves_the_groups_as_they_were():
    model, optimizer = make(kind="Adam")
    step, _ = recorded(model, optimizer)
    with pytest.raises(ValueError, match="3 channels, got 4"):
        step(torch.randn(2, 4, 7, 7), torch.zeros(2, dtype=torch.long))
    assert optimizer.param_groups[0]["lr"] == 0.1 and optimizer.param_groups[0]["capturable"] is False


def test_layout_and_requires_grad_of_a_batch():
    """The graph's own batch has the layout of the first; later ones only lend their values."""
    model, optimizer = make()
    step, _ = recorded(model, optimizer)
    images, labels = batch(0)
    for i in range(5):
        step(images.contiguous(memory_format=torch.channels_last).requires_grad_(i > 2), labels)
    assert step.batch[0].is_contiguous(memory_format=torch.channels_last) and not step.batch[0].requires_grad
    assert torch.equal(step.batch[0], images) and step.batch[0].data_ptr() != images.data_ptr()


class Thing(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(model=F.relu), TypeError, "model must be a torch.nn.Module, got function"),
        (dict(loss_fn=None), TypeError, "loss_fn must be a function of output and target, got None"),
        (dict(optimizer=3), TypeError, "optimizer must be a torch.optim.Optimizer, got int"),
        (dict(autocast="bf16"), TypeError, "autocast must be torch.bfloat16, torch.float16 or None, got 'bf16'"),
        (dict(scaler=True), TypeError, "scaler must be a torch.amp.GradScaler or None, got bool"),
        (dict(warmup=1), ValueError, "warmup must be at least 2, got 1"),
        (dict(warmup=2.0), TypeError, "warmup must be an int, got 2.0"),
    ],
)
def test_mistakes_are_named(change, error, message):
    model, optimizer = make()
    arguments = {"model": model, "loss_fn": F.cross_entropy, "optimizer": optimizer, **change}
    with pytest.raises(error, match=re.escape(message)):
        fastcnn.graphed_step(**arguments)


def test_two_devices_are_named():
    model, optimizer = make()
    model.register_buffer("table", torch.zeros(2, device="meta"))
    message = "must be on one device, and conv.weight is on cpu, table on meta"
    with pytest.raises(ValueError, match=message):
        fastcnn.graphed_step(model, F.cross_entropy, optimizer)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, device="meta"))]})
    del model.table
    with pytest.raises(ValueError, match=r"param_groups\[1\] of the optimizer on meta"):
        fastcnn.graphed_step(model, F.cross_entropy, optimizer)


def test_batches_are_tensors():
    step = fastcnn.graphed_step(make()[0], F.cross_entropy, make()[1])
    with pytest.raises(TypeError, match="target must be a tensor, got int"):
        step(torch.zeros(2, 3, 7, 7), 1)


def test_optimizers_whose_rate_would_be_frozen_are_refused():
    model = Counted()
    torchs = torch.optim
    for optimizer, message in [
        (
            Thing(model.parameters(), 0.1),
            "rate of this Thing for ever.*fused=True, where it has that",
        ),
        (torchs.Adam(model.parameters()), "this Adam for ever: use fastcnn.optim, or make it with capturable=True"),
        (torchs.Adam(model.parameters(), fused=True), "capturable=True"),
    ]:
        assert re.search(message, graphs._why_not(optimizer, None))
    scaler = torch.amp.GradScaler("cpu")
    adam = torchs.Adam(model.parameters(), capturable=True)
    assert re.search("GradScaler makes the CPU wait in every step of this Adam", graphs._why_not(adam, scaler))
    for optimizer in (
        optim.SGD(model.parameters(), 0.1),
        optim.Adam(model.parameters()),
        torchs.SGD(model.parameters(), 0.1, fused=True),
        torchs.Adam(model.parameters(), capturable=True, fused=True),
    ):
        assert graphs._why_not(optimizer, scaler) is None


def test_what_a_gpu_refuses(monkeypatch):
    monkeypatch.setattr(graphs, "_device", lambda model, optimizer: torch.device("cuda"))
    monkeypatch.setattr(graphs, "_Recorder", lambda device: None)
    model, optimizer = make()
    assert isinstance(fastcnn.graphed_step(model, F.cross_entropy, optimizer), graphs._GraphedStep)
    with pytest.raises(ValueError, match="keep the learning rate of this Thing for ever"):
        fastcnn.graphed_step(model, F.cross_entropy, Thing(model.parameters(), 0.1))
    with pytest.raises(NotImplementedError, match="on one GPU, and this DataParallel is on several"):
        fastcnn.graphed_step(torch.nn.DataParallel(model), F.cross_entropy, optimizer)


def test_the_first_error_of_a_capture_is_told():
    def capture_end():
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")

    try:
        try:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing.\nmore")  # this line
        finally:
            capture_end()
    except RuntimeError as error:
        told = graphs._first_error(error)
    assert told.startswith("CUDA error: operation not permitted when stream is capturing at test_graphs.py:")
    assert told.endswith("# this line`")


def test_lines_that_wait(monkeypatch):
    import warnings

    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.warns(UserWarning, match="another"), graphs._lines_that_wait() as lines:
        assert modes == [0, "warn"]
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally ...)", stacklevel=1)  # here
        warnings.warn("Synchronization debug mode is a prototype feature and does not ...", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert len(lines) == 1 and lines[0].startswith("test_graphs.py:") and lines[0].endswith("# here`")
    assert modes == [0, "warn", 0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind, options, dtype, tolerance",
    [
        ("SGD", {"dampening": 0.5, "weight_decay": 0.01}, None, 1e-4),
        ("Adam", {"lr": 0.01, "max_grad_norm": 0.1, "ema_decay": 0.9}, torch.float16, 1e-2),
    ],
    ids=["sgd", "adam-fp16"],
)
def test_a_graph_trains_as_the_loop_does(kind, options, dtype, tolerance):
    """With a schedule, an odd batch, clipping, a loss scale; and no call after the recording waits for the GPU."""
    a, b = make("cuda", kind, **options), make("cuda", kind, **options)
    scaler, other = (None, None) if dtype is None else (torch.amp.GradScaler("cuda"), torch.amp.GradScaler("cuda"))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10) for _, optimizer in (a, b)]
    with fastcnn.backend("triton"):
        step = fastcnn.graphed_step(a[0], F.cross_entropy, a[1], autocast=dtype, scaler=scaler)
        losses = []
        for i in range(10):
            images, labels = (t.pin_memory() for t in batch(i, 4 if i in (1, 6) else 6))
            torch.cuda.set_sync_debug_mode("error" if i > 6 else "default")
            try:
                loss = step(images, labels)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            losses.append((loss, eager(*b, images.cuda(), labels.cuda(), dtype, other)))
            for schedule in schedules:
                schedule.step()
    assert step.premises is not None and int(a[0].norm.num_batches_tracked) == 10
    torch.testing.assert_close(*(torch.stack(row) for row in zip(*losses, strict=True)), rtol=tolerance, atol=tolerance)
    left, right = state_of(*a), state_of(*b)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance, msg=name)
    if dtype is not None:
        assert scaler.state_dict() == other.state_dict()
        torch.testing.assert_close(a[1].grad_norm, b[1].grad_norm, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_replays_drop_anew_and_follow_the_seed():
    model, optimizer = make("cuda", p=0.5, lr=0.0)
    images, labels = batch(0, device="cuda")
    with fastcnn.backend("triton"):
        step = fastcnn.graphed_step(model, F.cross_entropy, optimizer)
        losses = [step(images, labels).item() for _ in range(6)]
        assert len(set(losses)) == 6
        torch.cuda.manual_seed(7)
        first = [step(images, labels).item() for _ in range(3)]
        torch.cuda.manual_seed(7)
        assert first == [step(images, labels).item() for _ in range(3)]


@pytest.mark.gpu
def test_a_step_that_waits_is_refused_with_its_line():
    model, optimizer = make("cuda")

    def loss_fn(output, target):
        loss = F.cross_entropy(output, target)
        return loss * 2 if loss > 1 else loss  # looks

    step = fastcnn.graphed_step(model, loss_fn, optimizer)
    for _ in range(2):
        step(*batch(0))
    with pytest.raises(RuntimeError, match=r"waits for the GPU at test_graphs.py:\d+ `return loss.*# looks`.*no .item"):
        step(*batch(0))
    assert int(model.norm.num_batches_tracked) == 3
