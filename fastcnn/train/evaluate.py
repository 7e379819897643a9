"""Measure a model on a split, and use the result of a finished run."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from fastcnn.backends import backend
from fastcnn.data import Input, batches, load_data
from fastcnn.models import create_model
from fastcnn.train.checkpoint import load_checkpoint, load_weights
from fastcnn.train.config import FREE_ON_RESUME, TrainConfig

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name):
    """The torch.device that "auto", "cpu" or "cuda" means on this machine."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda' and PyTorch finds no GPU here; use --device cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def reader_count(config):
    """How many processes read images."""
    if config.workers is not None:
        return config.workers
    return torch.get_num_threads() if config.data == "folder" else 0


def autocast(config, device):
    """The autocast context that the option `amp` asks for."""
    return torch.autocast(device.type, dtype=AMP_DTYPES.get(config.amp), enabled=config.amp != "none")


def to_input(images, input, config, device):
    """A batch of uint8 images as the network takes it: on its device, normalised, in its memory order."""
    images = input.normalise(images.to(device, non_blocking=True))
    return images.contiguous(memory_format=torch.channels_last) if config.channels_last else images


@torch.no_grad()
def evaluate(model, split, input, config, device):
    """Loss, accuracy and confusion matrix of a model on a split.

    Returns:
        dict: "loss" (mean cross-entropy), "accuracy" (0 to 1), "confusion" (int64 [C, C]: true class, predicted class).
    """
    model.eval()
    loss, confusion, workers = 0.0, None, reader_count(config)
    for images, labels in batches(
        split, max(config.batch_size, 256), workers=workers, pin_memory=device.type == "cuda"
    ):
        labels = labels.to(device, non_blocking=True)
        with autocast(config, device):
            logits = model(to_input(images, input, config, device))
        loss = loss + F.cross_entropy(logits.float(), labels, reduction="sum").double()
        classes = logits.shape[1]
        counts = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)
        confusion = counts if confusion is None else confusion + counts
    confusion = confusion.cpu()
    total = int(confusion.sum())
    return {"loss": float(loss) / total, "accuracy": int(confusion.trace()) / total, "confusion": confusion}


@dataclass
class Run:
    """A trained model with what is needed to use it.

    Attributes:
        model: in eval mode, with the weights of best.pt.
        config: the run's `TrainConfig`.
        input: how the model wants its images.
        classes: their names.
        epoch: of these weights, from 1.
        device: where the model is.
    """

    model: torch.nn.Module
    config: TrainConfig
    input: Input
    classes: list[str]
    epoch: int
    device: torch.device

    def evaluate(self, data_dir=None):
        """Measure on the data set's test split, or on its validation split where it has no test.

        Args:
            data_dir: where the data lies now, if it moved.

        Returns:
            What `evaluate` returns, plus "split" ("test" or "val").
        """
        config = self.config
        data = load_data(
            config.data, data_dir or config.data_dir, image_size=config.image_size, channels=config.channels
        )
        if data.classes != self.classes:
            raise ValueError(f"the model knows {len(self.classes)} classes and {config.data} now has other ones")
        split = data.test or data.val
        with backend(config.backend):
            result = evaluate(self.model, split, self.input, config, self.device)
        return {**result, "split": "test" if data.test else "val"}

    @torch.no_grad()
    def predict(self, paths, invert=False):
        """Class probabilities of image files of any size.

        Args:
            paths: image files. Digits and MNIST models expect light ink on a dark ground, as they were trained.
            invert: turn light into dark first, for ink on paper.

        Returns:
            float32 [len(paths), C].
        """
        images = torch.stack([self.input.read(path, invert) for path in paths])
        with backend(self.config.backend), autocast(self.config, self.device):
            chunks = [self.model(to_input(part, self.input, self.config, self.device)) for part in images.split(256)]
        return torch.cat(chunks).float().softmax(1).cpu()


def load_config(folder, **changes):
    """The `TrainConfig` of a run folder.

    Args:
        folder: the run folder.
        **changes: fields to set otherwise.
    """
    path = Path(folder) / "config.json"
    try:
        return TrainConfig(**{**json.loads(path.read_text()), "out": str(folder), **changes})
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no run of fastcnn train: there is no config.json") from None
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error}") from error


def load_run(folder, device="auto"):
    """Load the best model of a run folder.

    Args:
        folder: what `fastcnn train` wrote.
        device: "auto", "cpu" or "cuda".

    Returns:
        `Run`.

    Raises:
        ValueError: no run there, or a damaged one, or a checkpoint of another model.
    """
    config = load_config(folder)
    path = Path(folder) / "best.pt"
    if not path.exists():
        raise ValueError(f"{folder} has no best.pt: no epoch was finished yet")
    checkpoint = load_checkpoint(path)
    check_same(checkpoint, config, path)
    device = choose_device(device)
    model, input, classes = build(checkpoint, path)
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    return Run(model.to(device, memory_format=layout).eval(), config, input, classes, checkpoint["epoch"], device)


def build(checkpoint, path):
    """(model, input, classes) from a loaded checkpoint."""
    try:
        config, classes, input = checkpoint["config"], checkpoint["classes"], Input(**checkpoint["input"])
        model = create_model(config["model"], len(classes), input.channels, **config["model_args"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint of this version of fastcnn: {error}") from error
    load_weights(model, checkpoint, path)
    return model, input, classes


def check_same(checkpoint, config, path):
    """Refuse a checkpoint that was made with other options than the run's."""
    theirs = checkpoint.get("config")
    if not isinstance(theirs, dict):
        raise ValueError(f"{path} does not say how it was made")
    # an option that came after the checkpoint was at its default
    theirs = {**TrainConfig().saved(), **theirs}
    for name, mine in config.saved().items():
        if name not in FREE_ON_RESUME and theirs[name] != mine:
            raise ValueError(f"{path} is of another run: its {name} is {theirs[name]!r}, here it is {mine!r}")
