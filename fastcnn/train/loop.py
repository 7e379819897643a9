"""The training loop, in the open: one function from top to bottom, and small ones for what it writes."""

import contextlib
import csv
import io
import itertools
import json
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from fastcnn import nn
from fastcnn.backends import backend, explain
from fastcnn.data import batches, load_data
from fastcnn.graphs import graphed_step
from fastcnn.models import create_model
from fastcnn.train.checkpoint import load_checkpoint, load_weights, save_checkpoint, write_atomically
from fastcnn.train.config import FREE_ON_RESUME, OPTIMIZERS
from fastcnn.train.evaluate import (
    AMP_DTYPES,
    autocast,
    check_same,
    choose_device,
    evaluate,
    load_config,
    reader_count,
    to_input,
)
from fastcnn.train.memory import keep_freed_memory
from fastcnn.train.plots import plot_confusion, plot_curves, plot_filters
from fastcnn.train.statistics import population_statistics

# steps between looks at the loss: each look makes the CPU wait for the GPU
LOOK_EVERY = 20
# batches that the statistics of batch norm are measured on, for averaged weights
STATISTICS_BATCHES = 100


def train(config):
    """Train a model as `config` (a `TrainConfig`) says and fill its run folder.

    Returns:
        The content of summary.json: a dict with "test_accuracy", "val_accuracy", "best_epoch", "seconds" and more.

    Raises:
        ValueError: the run folder holds a run already, or none to resume, or is in use; data or checkpoint are bad.
        FloatingPointError: the loss became NaN or infinite; the last good checkpoint is kept.
    """
    out = Path(config.out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_lock(out))
        _check_folder(config, out)
        stack.enter_context(backend(config.backend))
        stack.enter_context(_deterministic_libraries())
        return _train(config, out)


def _train(config, out):
    summary_path, last_path, best_path = out / "summary.json", out / "last.pt", out / "best.pt"
    if config.resume and summary_path.exists():
        print(f"{out} has finished its {config.epochs} epochs: nothing to resume")
        return json.loads(summary_path.read_text())

    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    data = load_data(config.data, config.data_dir, image_size=config.image_size, channels=config.channels)
    torch.manual_seed(config.seed)
    try:
        model = create_model(config.model, len(data.classes), data.input.channels, **config.model_args)
    except TypeError as error:
        raise ValueError(f"model_args {config.model_args!r} do not fit {config.model}: {error}") from error
    model.to(device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
    if config.fuse:
        _fuse(model, out)
    optimizer = _optimizer(model, config)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)

    def loss_of(output, labels):
        # what is counted is of the main logits: validation has no others
        logits, *auxiliary = (output,) if isinstance(output, torch.Tensor) else output
        loss = criterion(logits, labels)
        # in place: a CUDA graph knows tensors by where they are
        loss_sum.add_(loss.detach() * len(labels))
        correct.add_((logits.detach().argmax(1) == labels).sum())
        for other in auxiliary:
            loss = loss + model.aux_weight * criterion(other, labels)
        return loss

    graphed = None
    if config.cuda_graph:
        graphed = graphed_step(model, loss_of, optimizer, autocast=AMP_DTYPES.get(config.amp), scaler=scaler)
    history = []
    identity = {"config": config.saved(), "classes": data.classes, "input": asdict(data.input)}

    if config.resume and last_path.exists():
        history = _restore(last_path, config, data, model, optimizer, scaler)
    else:
        write_atomically(out / "config.json", json.dumps(config.saved(), indent=2).encode())

    sizes = ", ".join(f"{len(split):,} {name}" for name, split in _splits(data) if split is not None)
    print(f"{config.model} ({_count(model):,} parameters) on {config.data} ({sizes} images); {device.type}; into {out}")
    if history:
        print(f"resuming after epoch {len(history)}")

    board = _tensorboard(out, len(history))
    for epoch in range(len(history) + 1, config.epochs + 1):
        start = time.perf_counter()
        loader = _training_batches(data, config, device, epoch)
        steps = len(loader)
        model.train()
        loss_sum.zero_()
        correct.zero_()
        bar = tqdm(loader, f"epoch {epoch}/{config.epochs}", leave=False, disable=None)
        for step, (images, labels) in enumerate(bar):
            lr = learning_rate(config, (epoch - 1) * steps + step, config.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            images, labels = to_input(images, data.input, config, device), labels.to(device, non_blocking=True)
            if graphed is None:
                with autocast(config, device):
                    loss = loss_of(model(images), labels)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss = graphed(images, labels)

            if step % LOOK_EVERY == 0:
                _stop_if_diverged(loss.item(), "training", epoch, lr, out)
                bar.set_postfix(loss=f"{loss.item():.4f}")
        trained = len(data.train)
        row = {
            "epoch": epoch,
            "lr": lr,
            "train_loss": loss_sum.item() / trained,
            "train_accuracy": correct.item() / trained,
        }
        speed = trained / (time.perf_counter() - start)
        val, weights = _validate(model, optimizer, data, config, device, epoch)
        _stop_if_diverged(row["train_loss"], "training", epoch, lr, out)
        _stop_if_diverged(val["loss"], "validation", epoch, lr, out)
        row |= {"val_loss": val["loss"], "val_accuracy": val["accuracy"]}
        history.append(row | {"images_per_second": speed, "seconds": time.perf_counter() - start})

        # before the checkpoint: what a repeated epoch writes twice is hidden, what is not written stays missing
        for name, value in history[-1].items():
            board.add_scalar(name, value, epoch)
        board.flush()
        is_best = best_row(history) is history[-1]
        # best before last: dying in between costs an epoch that resuming repeats, not the best weights
        if is_best:
            save_checkpoint(best_path, {**identity, "epoch": epoch, "model": weights})
        save_checkpoint(
            last_path,
            {
                **identity,
                "epoch": epoch,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                "history": history,
            },
        )
        _write_metrics(history, out / "metrics.csv")
        print(
            f"epoch {epoch:3}/{config.epochs}  loss {row['train_loss']:.4f}  train {row['train_accuracy']:6.2%}  "
            f"val {row['val_accuracy']:6.2%}  {speed:,.0f} img/s  lr {lr:.2e}{'  best' if is_best else ''}",
            flush=True,
        )
    board.close()

    return _finish(config, out, model, data, device, history)


def _finish(config, out, model, data, device, history):
    """Measure the best weights once on the test images, draw, and write summary.json: it says the run is finished."""
    best, best_path = best_row(history), out / "best.pt"
    load_weights(model, load_checkpoint(best_path), best_path)
    part, split = ("val", data.val) if data.test is None else ("test", data.test)
    result = evaluate(model, split, data.input, config, device)
    _write_metrics(history, out / "metrics.csv")
    plot_curves(history, out / "curves.png")
    plot_confusion(result["confusion"], data.classes, out / "confusion.png", f"{part} images")
    plot_filters(model, out / "filters.png")
    (out / "kernels.txt").write_text(explain() + "\n")
    summary = {
        "model": config.model,
        "data": config.data,
        "parameters": _count(model),
        "test_accuracy": result["accuracy"] if part == "test" else None,
        "test_images": len(split) if part == "test" else 0,
        "val_accuracy": best["val_accuracy"],
        "best_epoch": best["epoch"],
        "epochs": config.epochs,
        "seconds": sum(row["seconds"] for row in history),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
    }
    write_atomically(out / "summary.json", json.dumps(summary, indent=2).encode())
    right = int(result["confusion"].trace())
    print(
        f"{part} accuracy {result['accuracy']:.2%} ({right} of {len(split)} images) with the weights of epoch "
        f"{best['epoch']}, best on validation; {summary['seconds']:.1f} s of training"
    )
    return summary


def learning_rate(config, step, steps):
    """The learning rate of a step (from 0) in a run of so many steps."""
    if step < config.warmup:
        return config.lr * step / config.warmup
    done = (step - config.warmup) / max(steps - config.warmup, 1)
    t = done * config.epochs
    return (
        config.lr
        * {
            "cosine": lambda: 0.5 * (1 + math.cos(math.pi * done)),
            "linear": lambda: 1 - done,
            "inverse_time": lambda: 1 / (1 + config.lr_decay * t),
            "inverse_sqrt": lambda: 1 / math.sqrt(max(t, 1)),
            "constant": lambda: 1.0,
        }[config.scheduler]()
    )


def best_row(history):
    """The epoch with the highest validation accuracy; among equals the lowest loss, then the first."""
    return max(history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))


def _optimizer(model, config):
    momentum = {"momentum": config.momentum} if config.optimizer in ("sgd", "lars") else {}
    options = {"max_grad_norm": config.max_grad_norm, "ema_decay": config.ema_decay, **momentum}
    return OPTIMIZERS[config.optimizer](model.parameters(), config.lr, weight_decay=config.weight_decay, **options)


def _fuse(model, out):
    """Fuse what can be fused; fused.txt says what was, and why the rest was not."""
    import fastcnn

    write_atomically(out / "fused.txt", f"{fastcnn.convert(model, fuse=True)}\n".encode())


def _training_batches(data, config, device, epoch):
    return batches(
        data.train,
        config.batch_size,
        workers=reader_count(config),
        pin_memory=device.type == "cuda",
        train=(config.seed, epoch),
        augment=config.augment,
    )


def _validate(model, optimizer, data, config, device, epoch):
    """Measure on the validation images; (what `evaluate` returns, the weights it was measured with).

    With ema_decay those are the averages. The running statistics of batch norm belong to the weights of the training:
    for the averages they are measured anew, on the first images of this epoch.
    """
    # there are no averages before the first step, and a loss scale may have skipped all so far
    if not any("ema" in state for state in optimizer.state.values()):
        return evaluate(model, data.val, data.input, config, device), model.state_dict()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    with optimizer.ema_weights():
        try:
            if buffers:
                loader = _training_batches(data, config, device, epoch)
                images = (to_input(images, data.input, config, device) for images, _ in loader)
                with autocast(config, device):
                    population_statistics(model, itertools.islice(images, STATISTICS_BATCHES))
            val = evaluate(model, data.val, data.input, config, device)
            return val, {name: value.clone() for name, value in model.state_dict().items()}
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)


def _count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def _splits(data):
    return ("training", data.train), ("validation", data.val), ("test", data.test)


def _stop_if_diverged(loss, which, epoch, lr, out):
    if math.isfinite(loss):
        return
    kept = f"{out / 'last.pt'} keeps epoch {epoch - 1}" if epoch > 1 else "no checkpoint was written"
    raise FloatingPointError(
        f"the {which} loss became {loss} in epoch {epoch} at a learning rate of {lr:.3g}; {kept}. "
        "Try a lower --lr, or --amp none, and look for broken images"
    )


@contextlib.contextmanager
def _lock(out):
    """One trainer per run folder; the lock goes with the process, however it dies."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process is training in {out}; choose another --out") from None
    try:
        yield
    finally:
        lock.release()


def _check_folder(config, out):
    """Refuse to overwrite a run, to resume none, and to resume with other options than the run began with."""
    # config.json alone is a run that died in its first epoch: nothing to lose
    used = next((name for name in ("last.pt", "best.pt", "metrics.csv") if (out / name).exists()), None)
    if not config.resume:
        if used is not None:
            raise ValueError(f"{out} already holds a run ({used}); continue it with --resume or choose another --out")
        return
    began = load_config(out).saved()
    for name, value in config.saved().items():
        if name not in FREE_ON_RESUME and value != began[name]:
            raise ValueError(f"{out} was begun with {name} {began[name]!r} and cannot be resumed with {value!r}")


@contextlib.contextmanager
def _deterministic_libraries():
    # where PyTorch runs an op, its libraries too must give the same bits every time
    cudnn, onednn = torch.backends.cudnn, torch.backends.mkldnn
    before = cudnn.deterministic, cudnn.benchmark, onednn.deterministic
    cudnn.deterministic, cudnn.benchmark, onednn.deterministic = True, False, True
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, onednn.deterministic = before


def _restore(path, config, data, model, optimizer, scaler):
    """Put model, optimizer, scaler and random state back to the end of the last finished epoch; returns the history."""
    checkpoint = load_checkpoint(path)
    check_same(checkpoint, config, path)
    if checkpoint["classes"] != data.classes or checkpoint["input"] != asdict(data.input):
        raise ValueError(f"the images of {config.data} are no longer those that {path} was trained on")
    load_weights(model, checkpoint, path)
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"])
        if checkpoint["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        return checkpoint["history"]
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be resumed: {error}") from error


def _write_metrics(history, path):
    """metrics.csv, whole, every time: a resumed run neither repeats nor loses a row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, history[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(path, text.getvalue().encode())


def _tensorboard(out, finished):
    from torch.utils.tensorboard import SummaryWriter

    # hides what a killed run had written of an epoch that is now repeated
    return SummaryWriter(out / "tensorboard", purge_step=finished + 1)
