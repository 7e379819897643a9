"""The trainer: what a run folder holds, exact resume, refusals."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from PIL import Image

import fastcnn
from fastcnn import nn, optim
from fastcnn.data import load_data
from fastcnn.models import create_model
from fastcnn.train import TrainConfig, evaluate, load_run, loop, population_statistics, train
from fastcnn.train.checkpoint import load_checkpoint, save_checkpoint
from fastcnn.train.loop import best_row, learning_rate

TIMES = ("images_per_second", "seconds")


@pytest.fixture(scope="module")
def digits():
    """A tenth of the digits: the real thing takes seconds per epoch."""
    data = load_data("digits")
    data.train = data.train.subset(torch.arange(0, len(data.train), 10))
    return data


@pytest.fixture(autouse=True)
def small(digits, monkeypatch):
    monkeypatch.setattr(loop, "load_data", lambda *args, **kwargs: digits)


def config(out, **options):
    return TrainConfig(**{"epochs": 4, "out": str(out), **options})


def rows(out):
    with open(out / "metrics.csv") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def assert_same(a, b):
    """Equal to the last bit, times excepted."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - set(TIMES):
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(one, other):
    assert rows(one) == rows(other)
    for name in ("best.pt", "last.pt"):
        assert_same(load_checkpoint(one / name), load_checkpoint(other / name))


def stop_after(monkeypatch, epochs):
    """Ctrl-C in the epoch after that many."""
    original = loop.batches

    def interrupted(*args, **kwargs):
        if kwargs.get("train") is not None and kwargs["train"][1] > epochs:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "batches", interrupted)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_data", lambda *args, **kwargs: digits)
        torch.set_num_threads(1)
        summary = train(config(out))
    return out, summary


def test_run_folder(finished):
    out, summary = finished
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["parameters"] == 61_706 and summary["test_images"] == 360 and summary["epochs"] == 4
    assert 0.2 < summary["test_accuracy"] <= 1 and summary["seconds"] > 0
    assert [int(row["epoch"]) for row in rows(out)] == [1, 2, 3, 4]
    # four steps per epoch
    rates = [learning_rate(config(out), 4 * epoch - 1, 16) for epoch in (1, 2, 3, 4)]
    assert [float(row["lr"]) for row in rows(out)] == rates
    losses = [float(row["train_loss"]) for row in rows(out)]
    assert losses[-1] < 0.9 * losses[0]
    for name, color in (("curves.png", 4), ("confusion.png", 4), ("filters.png", 4)):
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) > 50 and len(image.getbands()) == color and len(image.getcolors(10**6)) > 10
    assert "cross_entropy" in (out / "kernels.txt").read_text() or "relu" in (out / "kernels.txt").read_text()
    saved = json.loads((out / "config.json").read_text())
    assert saved["seed"] == 0 and "resume" not in saved
    assert not list(out.glob("*.tmp"))
    best = max(range(4), key=lambda i: (float(rows(out)[i]["val_accuracy"]), -float(rows(out)[i]["val_loss"])))
    assert load_checkpoint(out / "best.pt")["epoch"] == summary["best_epoch"] == best + 1
    scalars = tensorboard(out)
    assert scalars["val_accuracy"] == [
        (i + 1, pytest.approx(float(row["val_accuracy"]))) for i, row in enumerate(rows(out))
    ]


def tensorboard(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_resume_is_bit_for_bit(finished, tmp_path, monkeypatch):
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(config(out))
    assert len(rows(out)) == 2 and not (out / "summary.json").exists()
    torch.rand(5)  # a new process has another random state
    summary = train(config(out, resume=True))
    assert_same_run(finished[0], out)
    assert summary["test_accuracy"] == finished[1]["test_accuracy"]
    assert [step for step, _ in tensorboard(out)["lr"]] == [1, 2, 3, 4]


def test_every_optimizer_of_ours_can_be_chosen(tmp_path):
    model = torch.nn.Linear(3, 2)
    for name in optim.__all__:
        options = dict(optimizer=name.lower(), lr=0.01, momentum=0.8, weight_decay=0.1, max_grad_norm=2, ema_decay=0.9)
        made = loop._optimizer(model, config(tmp_path, **options))
        assert made.defaults["max_grad_norm"] == 2 and made.param_groups[0]["ema_decay"] == 0.9
        assert type(made) is getattr(optim, name)
        assert made.defaults["lr"] == 0.01 and made.defaults["weight_decay"] == 0.1
        assert made.defaults.get("momentum", 0) == (0.8 if name in ("SGD", "LARS") else 0)


@pytest.mark.parametrize(
    "options",
    [
        dict(optimizer="sgd", lr=0.05, weight_decay=1e-3, scheduler="constant", label_smoothing=0.1, augment=False),
        dict(optimizer="adamw", channels_last=True, amp="bf16", model_args={"activation": "tanh", "pool": "avg"}),
        dict(amp="fp16", batch_size=25, seed=3),
        dict(optimizer="lars", lr=1.0, max_grad_norm=0.5, ema_decay=0.5),
    ],
    ids=["sgd", "bf16-channels_last", "fp16", "clipped-averaged"],
)
def test_options_train_and_resume(tmp_path, monkeypatch, options):
    options = {**options, "epochs": 2}
    train(config(tmp_path / "whole", **options))
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path / "stopped", **options))
    train(config(tmp_path / "stopped", **options, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    result = load_run(tmp_path / "stopped").evaluate()
    assert result["accuracy"] == json.loads((tmp_path / "whole" / "summary.json").read_text())["test_accuracy"]


def test_resume_restores_the_random_state(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "create_model", lambda *args: nn.Sequential(nn.Dropout(0.5), create_model(*args)))
    train(config(tmp_path / "whole", epochs=2))
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path / "stopped", epochs=2))
    torch.rand(5)
    train(config(tmp_path / "stopped", epochs=2, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_averaged_weights_are_judged_and_kept_and_training_does_not_notice(tmp_path, monkeypatch):
    """Also the statistics of batch norm: those of the averages in best.pt, those of the training in last.pt."""
    monkeypatch.setattr(
        loop, "create_model", lambda *args: nn.Sequential(nn.BatchNorm2d(1), create_model(*args), nn.BatchNorm1d(10))
    )
    train(config(tmp_path / "plain", epochs=2))
    train(config(tmp_path / "averaged", epochs=2, ema_decay=0.9))
    plain, last = (load_checkpoint(tmp_path / name / "last.pt") for name in ("plain", "averaged"))
    best = load_checkpoint(tmp_path / "averaged" / "best.pt")
    assert best["epoch"] == 2
    assert_same(plain["model"], last["model"])
    model = loop.create_model("lenet5", 10, 1)
    for (name, _), state in zip(model.named_parameters(), last["optimizer"]["state"].values(), strict=True):
        assert torch.equal(best["model"][name], state["ema"]) and not torch.equal(state["ema"], last["model"][name])

    data, own = loop.load_data("digits"), config("x")
    model.load_state_dict(best["model"])
    batches = [data.input.normalise(images) for images, _ in loop.batches(data.train, 32, train=(0, 2), augment=True)]
    population_statistics(model, batches)
    assert_same(dict(model.state_dict()), best["model"])
    assert not torch.equal(best["model"]["2.running_mean"], last["model"]["2.running_mean"])
    measured = evaluate(model, data.val, data.input, own, torch.device("cpu"))
    assert last["history"][1]["val_loss"] == measured["loss"] != plain["history"][1]["val_loss"]


def test_averaged_weights_before_the_first_step(tmp_path, monkeypatch):
    """A loss scale may skip every step of an epoch."""
    monkeypatch.setattr(loop.torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**126))
    train(config(tmp_path, epochs=1, amp="fp16", ema_decay=0.9))
    assert load_checkpoint(tmp_path / "last.pt")["optimizer"]["state"] == {}


def test_the_step_of_cuda_graphs_is_the_step_of_the_loop(finished, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path, cuda_graph=True))
    assert caplog.messages == ["graphed_step: the model is on cpu, so its steps run without a CUDA graph"]
    train(config(tmp_path, resume=True))
    assert rows(tmp_path) == rows(finished[0])
    for name in ("model", "optimizer"):
        assert_same(*(load_checkpoint(out / "last.pt")[name] for out in (tmp_path, finished[0])))


class TwoClassifiers(nn.Module):
    """Logits that are the weights themselves, for all images, and in training those of a second classifier."""

    aux_weight = 0.25

    def __init__(self, *args):
        super().__init__()
        self.main, self.auxiliary = (nn.Parameter(torch.linspace(0, 1, 10)) for _ in range(2))

    def forward(self, x):
        logits = self.main.expand(len(x), 10)
        return (logits, self.auxiliary.expand(len(x), 10)) if self.training else logits


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_the_loss_of_auxiliary_logits_counts_as_the_network_says(tmp_path, monkeypatch, digits, cuda_graph):
    monkeypatch.setattr(loop, "create_model", TwoClassifiers)
    start = TwoClassifiers()
    options = dict(optimizer="sgd", momentum=0.0, lr=0.1, scheduler="constant", warmup=0, weight_decay=0.0, epochs=1)
    train(config(tmp_path, batch_size=len(digits.train), cuda_graph=cuda_graph, **options))
    after = load_checkpoint(tmp_path / "last.pt")["model"]
    steps = {name: after[name] - tensor.detach() for name, tensor in start.named_parameters()}
    assert steps["main"].abs().max() > 1e-3
    torch.testing.assert_close(steps["auxiliary"], 0.25 * steps["main"], rtol=1e-4, atol=1e-7)
    counts = torch.bincount(torch.cat([labels for _, labels in loop.batches(digits.train, 32)]), minlength=10)
    loss = -(counts * start.main.detach().log_softmax(0)).sum() / counts.sum()
    assert float(rows(tmp_path)[0]["train_loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(rows(tmp_path)[0]["train_accuracy"]) == pytest.approx(int(counts[9]) / int(counts.sum()))


def test_a_network_with_auxiliary_classifiers_trains(tmp_path):
    widths = [[[8, 4, 8, 4, 8, 8]]] * 3
    train(config(tmp_path, model="googlenet", model_args={"widths": widths}, epochs=1))
    (row,) = rows(tmp_path)
    # the main loss alone: with the others it would be 1.6 times as much
    assert 1.5 < float(row["train_loss"]) < 3 and math.isfinite(float(row["val_loss"]))
    assert load_run(tmp_path).model.aux2.fc2.out_features == 10


@pytest.mark.gpu
def test_training_from_a_cuda_graph(tmp_path):
    for name, graphs in (("eager", False), ("graphs", True)):
        train(config(tmp_path / name, device="cuda", cuda_graph=graphs))
    for eager, graphed in zip(rows(tmp_path / "eager"), rows(tmp_path / "graphs"), strict=True):
        for name in ("lr", "train_loss", "val_loss", "train_accuracy"):
            assert float(graphed[name]) == pytest.approx(float(eager[name]), rel=1e-3, abs=1e-6)


def test_a_model_is_fused_before_its_optimizer_is_made(tmp_path, monkeypatch):
    def convert(model, fuse):
        assert fuse is True
        model.fc3 = nn.Linear(84, 10)
        torch.nn.init.zeros_(model.fc3.weight)
        return "the report"

    monkeypatch.setattr(fastcnn, "convert", convert, raising=False)
    train(config(tmp_path, epochs=1, fuse=True))
    assert (tmp_path / "fused.txt").read_text() == "the report\n"
    assert load_checkpoint(tmp_path / "last.pt")["model"]["fc3.weight"].count_nonzero() > 0


def test_a_fused_run_is_the_plain_one_but_for_rounding(tmp_path, monkeypatch):
    def network(*args):
        return nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.ReLU(), create_model(*args))

    monkeypatch.setattr(loop, "create_model", network)
    for fuse in (False, True):
        train(config(tmp_path / str(fuse), epochs=2, fuse=fuse, ema_decay=0.9))
    report = (tmp_path / "True" / "fused.txt").read_text()
    assert re.search("BatchNorm2d +fused", report), report
    for plain, fused in zip(rows(tmp_path / "False"), rows(tmp_path / "True"), strict=True):
        for name in ("train_loss", "val_loss"):
            assert float(fused[name]) == pytest.approx(float(plain[name]), rel=1e-4)
    plain, fused = (load_checkpoint(tmp_path / name / "best.pt")["model"] for name in ("False", "True"))
    assert plain.keys() == fused.keys()


def test_checkpoints_from_before_an_option_are_at_its_default(finished, tmp_path):
    for name in ("last.pt", "best.pt"):
        checkpoint = load_checkpoint(finished[0] / name)
        for option in ("fuse", "ema_decay", "cuda_graph"):
            del checkpoint["config"][option]
        save_checkpoint(tmp_path / name, checkpoint)
    saved = json.loads((finished[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in saved.items() if k != "fuse"}))
    assert load_run(tmp_path).config.fuse is False


def test_resume_from_before_the_first_epoch(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path))
    train(config(tmp_path, resume=True))
    assert_same_run(finished[0], tmp_path)


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "metrics.csv", "summary.json"])
def test_resume_after_dying_while_writing(finished, tmp_path, monkeypatch, name):
    """The process dies just before one of its files gets its name, the last time that it is written."""
    history = load_checkpoint(finished[0] / "last.pt")["history"]
    best = [row["epoch"] for i, row in enumerate(history) if best_row(history[: i + 1]) is row]
    writes = {"best.pt": len(best), "summary.json": 1}.get(name, 4)
    original, seen = os.replace, []

    def dies(source, target):
        seen.append(target.name)
        if target.name == name and seen.count(name) == writes:
            raise SystemExit("killed")
        return original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(SystemExit):
            train(config(tmp_path))
    train(config(tmp_path, resume=True))
    assert_same_run(finished[0], tmp_path)
    assert [step for step, _ in tensorboard(tmp_path)["lr"]] == [1, 2, 3, 4]


def test_resume_when_finished_says_so(finished, capsys):
    out, summary = finished
    before = (out / "last.pt").read_bytes()
    assert train(config(out, resume=True)) == summary
    assert "has finished its 4 epochs: nothing to resume" in capsys.readouterr().out
    assert (out / "last.pt").read_bytes() == before


def test_a_run_is_never_overwritten(finished):
    out, _ = finished
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="already holds a run .last.pt.; continue it with --resume or choose another"):
        train(config(out))
    with pytest.raises(ValueError, match="was begun with lr 0.004 and cannot be resumed with 0.1"):
        train(config(out, lr=0.1, resume=True))
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="holds no run of fastcnn train: there is no config.json"):
        train(config(tmp_path, resume=True))


def test_two_trainers_on_one_folder(tmp_path):
    with loop._lock(tmp_path):
        with pytest.raises(ValueError, match="another process is training in"):
            train(config(tmp_path))
    assert train(config(tmp_path, epochs=1))["epochs"] == 1


def test_nan_stops_before_the_checkpoint_is_overwritten(tmp_path, monkeypatch):
    original = loop.to_input

    def poisoned(*args):
        images = original(*args)
        return images * math.nan if len(rows(tmp_path) if (tmp_path / "metrics.csv").exists() else ()) == 2 else images

    monkeypatch.setattr(loop, "to_input", poisoned)
    with pytest.raises(FloatingPointError, match="training loss became nan in epoch 3.*last.pt keeps epoch 2.*--lr"):
        train(config(tmp_path))
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert checkpoint["epoch"] == 2
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_too_high_a_rate_is_told(tmp_path):
    with pytest.raises(FloatingPointError, match="loss became (nan|inf) in epoch 1 .*no checkpoint was written"):
        train(config(tmp_path, optimizer="sgd", lr=1e30))


def test_resume_refuses_a_damaged_or_foreign_checkpoint(finished, tmp_path):
    out, _ = finished
    for name in ("config.json", "last.pt", "best.pt"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    last = load_checkpoint(out / "last.pt")
    cases = [
        ({**last, "config": {**last["config"], "model": "resnet18"}}, "is of another run: its model is 'resnet18'"),
        ({**last, "config": None}, "does not say how it was made"),
        ({**last, "optimizer": {"state": {}, "param_groups": []}}, "cannot be resumed"),
        ({k: v for k, v in last.items() if k != "optimizer"}, "cannot be resumed: 'optimizer'"),
        ({**last, "input": {**last["input"], "mean": [0.0]}}, "images of digits are no longer those"),
    ]
    for content, message in cases:
        save_checkpoint(tmp_path / "last.pt", content)
        with pytest.raises(ValueError, match=message):
            train(config(tmp_path, resume=True))
    (tmp_path / "last.pt").write_bytes((out / "last.pt").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="last.pt is not a whole checkpoint"):
        train(config(tmp_path, resume=True))
    (tmp_path / "best.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="best.pt is not a whole checkpoint"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text('{"model": "lenet5", "epochz": 3}')
    with pytest.raises(ValueError, match="config.json is damaged or of another version"):
        load_run(tmp_path)


def test_kill_9_while_training_then_resume(finished, tmp_path):
    """A real process, killed at a real time, with the real subset through a small wrapper."""
    script = (
        "import torch\n"
        "from fastcnn.train import TrainConfig, loop\n"
        "data = loop.load_data('digits')\n"
        "data.train = data.train.subset(torch.arange(0, len(data.train), 10))\n"
        "loop.load_data = lambda *args, **kwargs: data\n"
        "torch.set_num_threads(1)\n"
        f"loop.train(TrainConfig(epochs=4, out={str(tmp_path)!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "last.pt").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "last.pt").exists() and not (tmp_path / "summary.json").exists()
    train(config(tmp_path, resume=True))
    assert_same_run(finished[0], tmp_path)


def test_folder_without_a_test_split(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "load_data", load_data)
    for part in ("train", "val"):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(9):
                image = Image.new("L", (40, 36), 200 * label + 5 * i)
                image.save(tmp_path / "data" / part / name / f"{i}.png")
    options = dict(data="folder", data_dir=str(tmp_path / "data"), channels=1, epochs=3, batch_size=4)
    summary = train(config(tmp_path / "run", **options))
    assert summary["test_accuracy"] is None and summary["val_accuracy"] == 1
    run = load_run(tmp_path / "run")
    assert run.evaluate()["split"] == "val"
    light = tmp_path / "data" / "val" / "light" / "8.png"
    assert run.classes[run.predict([light])[0].argmax()] == "light"
    assert run.classes[run.predict([light], invert=True)[0].argmax()] == "dark"


def test_learning_rate_and_best():
    cosine, constant = config("x", lr=1.0), config("x", lr=1.0, scheduler="constant")
    assert [round(learning_rate(cosine, step, 4), 3) for step in range(5)] == [1.0, 0.854, 0.5, 0.146, 0.0]
    assert learning_rate(constant, 3, 4) == 1.0
    history = [
        {"epoch": 1, "val_accuracy": 0.9, "val_loss": 0.1},
        {"epoch": 2, "val_accuracy": 0.95, "val_loss": 0.3},
        {"epoch": 3, "val_accuracy": 0.95, "val_loss": 0.2},
        {"epoch": 4, "val_accuracy": 0.95, "val_loss": 0.2},
    ]
    assert best_row(history)["epoch"] == 3


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(epochs=0), ValueError, "epochs must be at least 1, got 0"),
        (dict(epochs=True), TypeError, "epochs must be int, got True"),
        (dict(epochs=2.0), TypeError, "epochs must be int, got 2.0"),
        (dict(lr=0), ValueError, "lr must be more than 0, got 0.0"),
        (dict(lr=math.nan), ValueError, "lr must be finite, got nan"),
        (dict(lr="fast"), TypeError, "lr must be float, got 'fast'"),
        (dict(momentum=-1), ValueError, "momentum must be at least 0, got -1.0"),
        (dict(label_smoothing=1.5), ValueError, "label_smoothing must be at most 1, got 1.5"),
        (dict(max_grad_norm=0), ValueError, "max_grad_norm must be more than 0, got 0.0"),
        (dict(ema_decay=1.0), ValueError, "ema_decay must be less than 1, got 1.0"),
        (dict(cuda_graph=1), TypeError, "cuda_graph must be bool, got 1"),
        (dict(optimizer="adma"), ValueError, "unknown optimizer 'adma': did you mean 'adam'"),
        (dict(amp="bfloat16"), ValueError, "unknown amp 'bfloat16': did you mean 'bf16'"),
        (dict(channels=2), ValueError, "channels must be one of 1, 3, got 2"),
        (dict(workers=-1), ValueError, "workers must be at least 0, got -1"),
        (dict(data_dir=5), TypeError, "data_dir must be str or None, got 5"),
        (dict(model="lenet6"), ValueError, "did you mean 'lenet5'"),
        (dict(data="mnits"), ValueError, "did you mean 'mnist'"),
        (dict(model_args={"in_chans": 3}), ValueError, "model_args must leave in_chans to the trainer, got 3 for it"),
    ],
)
def test_config_mistakes_are_named(options, error, message):
    with pytest.raises(error, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    "model, args, message",
    [
        ("resnet20_cifar", {"stochastic_depth": "x"}, "model_args {'stochastic_depth': 'x'} do not fit resnet20_cifar"),
        ("resnet20_cifar", {"layers": [1, 1]}, r"layers must be 3 positive ints.* got \[1, 1\]"),
        ("resnet20_cifar", {"depth": 20}, "unknown option of resnet20_cifar 'depth'"),
        ("zfnet", {"width_mult": 0.1}, r"ZFNet takes images of shape .* of at least 47, got \[32, 1, 32, 32\]"),
    ],
)
def test_options_that_do_not_fit_the_network(tmp_path, model, args, message):
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path / "run", model=model, model_args=args))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match="device is 'cuda' and PyTorch finds no GPU"):
        train(config(tmp_path, device="cuda"))
