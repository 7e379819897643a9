"""Folders of images: ROOT/train/CLASS/*, ROOT/val/CLASS/* and, where there is one, ROOT/test/CLASS/*."""

import os
from pathlib import Path

import torch

from fastcnn.data.dataset import Data, Input, statistics
from fastcnn.data.image import read_image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
STATISTICS_FROM = 1000


class Files:
    """A split that stays on disk: paths, and labels int64 [N]. Images are read when a batch asks for them."""

    def __init__(self, paths, labels, channels, size):
        self.paths = paths
        self.labels = labels
        self.channels = channels
        self.size = size

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        """The images of these indices, uint8 [len(indices), channels, size, size]."""
        return torch.stack([read_image(self.paths[i], self.channels, self.size) for i in indices.tolist()])


def load_folder(data_dir, image_size=32, channels=3):
    """Image folders. Files with other endings and hidden ones are passed over.

    Args:
        data_dir: ROOT.
        image_size: height and width that the images are brought to.
        channels: 1 (grey) or 3 (RGB).

    Without ROOT/test the result has no test split: validation images choose the checkpoint, so they cannot also be an
    honest test.
    """
    root = Path(data_dir)
    absent = [str(root / part) for part in ("train", "val") if not (root / part).is_dir()]
    if absent:
        raise ValueError(
            f"folder: there is no {' and no '.join(absent)}; expected ROOT/train/CLASS/* and ROOT/val/CLASS/*, "
            "with --data-dir ROOT"
        )
    classes = _classes(root / "train")
    splits = {}
    for part in ("train", "val", "test"):
        folder = root / part
        if part == "test" and not folder.is_dir():
            splits[part] = None
            continue
        if _classes(folder) != classes:
            odd = ", ".join(sorted(set(_classes(folder)) ^ set(classes)))
            raise ValueError(f"{folder} and {root / 'train'} have different classes: only one has {odd}")
        splits[part] = _scan(folder, classes, channels, image_size)
    train = splits["train"]
    some = torch.arange(0, len(train), max(1, len(train) // STATISTICS_FROM))
    mean, std = statistics(train.batch(some))
    return Data("folder", classes, Input(channels, image_size, 0, mean, std), train, splits["val"], splits["test"])


def _classes(folder):
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder} has no class folders; expected {folder}/CLASS/*")
    return classes


def _scan(folder, classes, channels, size):
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(
            path
            for path in (folder / name).iterdir()
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        )
        if not found:
            raise ValueError(f"{folder / name} has no images ({', '.join(sorted(SUFFIXES))})")
        paths += found
        labels += [label] * len(found)
    return Files(paths, torch.tensor(labels), channels, size)
