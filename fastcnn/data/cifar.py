"""CIFAR-10 and CIFAR-100, in the Python version (pickles) or the binary version of Krizhevsky's page."""

import pickle
from pathlib import Path

import numpy as np
import torch

from fastcnn.data.dataset import Arrays, Data, Input, split_by_class, statistics

BYTES = 3 * 32 * 32

# name -> layouts: (folder, training files, test file, file of class names)
LAYOUTS = {
    "cifar10": [
        ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta"),
        ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", "batches.meta.txt"),
    ],
    "cifar100": [
        ("cifar-100-python", ["train"], "test", "meta"),
        ("cifar-100-binary", ["train.bin"], "test.bin", "fine_label_names.txt"),
    ],
}


def load_cifar(name, data_dir):
    """CIFAR as it is: 32x32 RGB. A tenth of the training images is kept to choose by.

    Args:
        name: "cifar10" or "cifar100" (its 100 fine labels).
        data_dir: the unpacked folder, or the one around it.
    """
    train_files, test_file, meta = _find(name, Path(data_dir))
    classes = _read_classes(meta, name)
    train, test = (_read_all(files, name, len(classes)) for files in (train_files, [test_file]))
    fit, held = split_by_class(train.labels, (9, 1))
    train, val = train.subset(fit), train.subset(held)
    return Data(name, classes, Input(3, 32, 0, *statistics(train.images)), train, val, test)


def _find(name, data_dir):
    looked = []
    for folder, train, test, meta in LAYOUTS[name]:
        for root in (data_dir / folder, data_dir):
            missing = [file for file in (*train, test, meta) if not (root / file).is_file()]
            if not missing:
                return [root / file for file in train], root / test, root / meta
            if len(missing) < len(train) + 2:
                raise ValueError(f"{name}: {root} lacks {', '.join(missing)}")
        looked.append(f"{folder}/ with {', '.join((*train, test, meta))}")
    raise ValueError(
        f"{name}: neither {' nor '.join(looked)} in {data_dir}; unpack the archive of the Python or the binary version "
        "there, or name its folder with --data-dir"
    )


def _read_classes(path, name):
    wanted = 10 if name == "cifar10" else 100
    if path.suffix == ".txt":
        classes = path.read_text(encoding="utf-8", errors="replace").split()
    else:
        meta = _load_pickle(path)
        classes = meta.get(b"label_names" if name == "cifar10" else b"fine_label_names")
        if not isinstance(classes, list):
            raise ValueError(f"{path} has no list of class names")
        classes = [label.decode("utf-8", "replace") if isinstance(label, bytes) else str(label) for label in classes]
    if len(classes) != wanted:
        raise ValueError(f"{path} names {len(classes)} classes, expected {wanted}")
    return classes


def _read_all(paths, name, num_classes):
    pixels, labels = [], []
    for path in paths:
        part, part_labels = _read_binary(path, name) if path.suffix == ".bin" else _read_pickle(path, name)
        if len(part) == 0:
            raise ValueError(f"{path} holds no images")
        if part_labels.min() < 0 or part_labels.max() >= num_classes:
            raise ValueError(f"{path} holds a label outside 0 to {num_classes - 1}")
        pixels.append(part)
        labels.append(part_labels)
    images = torch.from_numpy(np.concatenate(pixels)).view(-1, 3, 32, 32)
    return Arrays(images, torch.from_numpy(np.concatenate(labels)))


def _read_binary(path, name):
    """Rows of 1 label byte (CIFAR-100: coarse, fine) and 3,072 pixel bytes."""
    label_bytes = 1 if name == "cifar10" else 2
    content = np.fromfile(path, np.uint8)
    if len(content) % (label_bytes + BYTES):
        raise ValueError(f"{path} is truncated: {len(content)} bytes are no multiple of {label_bytes + BYTES}")
    rows = content.reshape(-1, label_bytes + BYTES)
    return rows[:, label_bytes:], rows[:, label_bytes - 1].astype(np.int64)


def _read_pickle(path, name):
    batch = _load_pickle(path)
    pixels = batch.get(b"data")
    labels = batch.get(b"labels" if name == "cifar10" else b"fine_labels")
    if not isinstance(pixels, _Array) or not isinstance(labels, list):
        raise ValueError(f"{path} is not a {name} batch: it lacks the array 'data' or the list of labels")
    if not all(type(label) is int for label in labels):
        raise ValueError(f"{path} holds labels that are no whole numbers")
    pixels = pixels.numpy(path)
    if pixels.shape != (len(labels), BYTES):
        raise ValueError(f"{path} holds an array of shape {pixels.shape} for {len(labels)} images of {BYTES} bytes")
    return pixels, np.array(labels, np.int64)


def _load_pickle(path):
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
    except Exception as error:
        # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} is not a readable CIFAR file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a CIFAR file: it holds a {type(content).__name__}, expected a dict")
    # newer tools write str keys, the original archive bytes
    return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}


class _Dtype:
    def __init__(self, code, *_):
        if code not in ("u1", b"u1"):
            raise ValueError(f"an array of {code!r}, expected bytes (u1)")

    def __setstate__(self, state):
        pass


class _Array:
    """Stands in for numpy.ndarray: nothing of numpy runs on what a pickle says, only these few lines."""

    def __init__(self, *_):
        self.shape, self.content = None, None

    def __setstate__(self, state):
        _, self.shape, _, self.fortran, self.content = state

    def numpy(self, path):
        good = isinstance(self.content, bytes) and isinstance(self.shape, tuple) and len(self.shape) == 2
        if not good or self.fortran or self.shape[0] * self.shape[1] != len(self.content):
            raise ValueError(f"{path} holds an array of a form CIFAR does not have")
        return np.frombuffer(self.content, np.uint8).reshape(self.shape)


class _Unpickler(pickle.Unpickler):
    """Admits the few names a CIFAR batch needs and gives harmless stand-ins for them."""

    ADMITTED = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        # how Python 3 writes bytes for Python 2
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
    }

    def find_class(self, module, name):
        try:
            return self.ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs") from None
