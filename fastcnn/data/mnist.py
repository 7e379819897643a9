"""MNIST and its relatives in the IDX format: http://yann.lecun.com/exdb/mnist describes it."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch

from fastcnn.data.dataset import Arrays, Data, Input, split_by_class, statistics

PAD = 2  # 28x28 digits in a 32x32 frame, as in the LeNet-5 paper
MOST_IMAGES = 1_000_000
NAMES = {
    "train images": "train-images-idx3-ubyte",
    "train labels": "train-labels-idx1-ubyte",
    "test images": "t10k-images-idx3-ubyte",
    "test labels": "t10k-labels-idx1-ubyte",
}


def load_mnist(data_dir):
    """MNIST, Fashion-MNIST or any set of ten classes in the same four files, padded to 32x32.

    Args:
        data_dir: folder with the four IDX files, plain or as .gz, or with torchvision's MNIST/raw inside. A tenth of
            the training images is kept to choose by.
    """
    files = _find(Path(data_dir))
    train = _read_pair(files["train images"], files["train labels"])
    test = _read_pair(files["test images"], files["test labels"])
    fit, held = split_by_class(train.labels, (9, 1))
    train, val = train.subset(fit), train.subset(held)
    mean, std = statistics(train.images)
    return Data("mnist", [str(digit) for digit in range(10)], Input(1, 28 + 2 * PAD, PAD, mean, std), train, val, test)


def _find(data_dir):
    folders = [data_dir, data_dir / "MNIST" / "raw"]
    found, missing = {}, []
    for role, name in NAMES.items():
        # some copies write a dot before idx
        spellings = [name, name.replace("-idx", ".idx")]
        candidates = [folder / (s + end) for folder in folders for s in spellings for end in ("", ".gz")]
        found[role] = next((path for path in candidates if path.is_file()), None)
        if found[role] is None:
            missing.append(name)
    if missing:
        raise ValueError(
            f"mnist: no {', '.join(missing)} (IDX format, plain or .gz) in {folders[0]} or {folders[1]}; "
            "name the folder with --data-dir"
        )
    return found


def _read_pair(images_path, labels_path):
    images = _read_idx(images_path, 3)
    labels = _read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{images_path} holds images of {images.shape[1]}x{images.shape[2]} pixels, expected 28x28")
    if len(images) != len(labels):
        raise ValueError(f"{images_path} holds {len(images)} images and {labels_path} {len(labels)} labels")
    if len(labels) == 0:
        raise ValueError(f"{labels_path} holds no labels")
    if labels.max() > 9:
        raise ValueError(f"{labels_path} holds the label {labels.max()}, expected 0 to 9")
    padded = np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD)))
    return Arrays(torch.from_numpy(padded).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))


def _read_idx(path, ndim):
    """An IDX file of unsigned bytes: 0, 0, 8, number of dimensions, the dimensions as big-endian int32, the bytes."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            head = file.read(4 + 4 * ndim)
            if len(head) < 4 + 4 * ndim or head[:4] != bytes((0, 0, 8, ndim)):
                raise ValueError(f"{path} is not an IDX file of {ndim}-dimensional bytes: it begins with {head[:4]!r}")
            shape = tuple(int(n) for n in np.frombuffer(head, ">i4", offset=4))
            if min(shape) < 0 or shape[0] > MOST_IMAGES or max(shape[1:], default=0) > 1024:
                raise ValueError(f"{path} claims the absurd shape {shape}")
            size = int(np.prod(shape))
            body = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is unreadable: {error}") from error
    if len(body) != size:
        state = "is truncated" if len(body) < size else "has bytes left over"
        raise ValueError(f"{path} {state}: the shape {shape} in its head needs exactly {size} bytes after it")
    return np.frombuffer(body, np.uint8).reshape(shape)
