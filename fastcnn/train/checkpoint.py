"""Checkpoints that a crash cannot damage and that a damaged disk cannot pass off as whole."""

import io
import os
import zipfile
from pathlib import Path

import torch

FORMAT = "fastcnn checkpoint 1"


def write_atomically(path, content):
    """Write bytes so that whoever reads `path`, whenever the process dies, finds the old content or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({error.strerror}); its previous content is kept") from error
    # the new name itself must reach the disk too
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_checkpoint(path, state):
    """Save a dict of tensors and plain Python values, atomically. "model" is a state_dict."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path):
    """Load what `save_checkpoint` saved, on the CPU.

    Raises:
        ValueError: the file is missing, truncated, damaged in any bit, or no checkpoint of fastcnn. Nothing in it is
            executed (`weights_only`).
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    try:
        # torch.load does not verify the checksums that torch.save wrote
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
        if damaged is None:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        # a damaged zip archive or pickle can raise nearly anything
        raise ValueError(f"{path} is not a whole checkpoint (truncated, damaged, or another kind of file)") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of fastcnn train (it lacks the mark {FORMAT!r})")
    weights = state.get("model")
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no weights of a model")
    _check_sizes(state, path)
    return state


def _check_sizes(value, path):
    """A tensor with strides of 0 may claim any number of elements in a file of a kilobyte."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path} holds a tensor of shape {list(value.shape)} without the bytes for it")
    elif isinstance(value, dict):
        for item in value.values():
            _check_sizes(item, path)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_sizes(item, path)


def load_weights(model, checkpoint, path):
    """Put the weights of a loaded checkpoint into a model of the same name and shape.

    Raises:
        ValueError: the checkpoint is of another network; the model is left as it was.
    """
    weights = checkpoint["model"]
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    other = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if missing or unknown or other:
        parts = [("lacks", missing), ("has the unknown", unknown), ("has another shape of", sorted(other))]
        told = "; ".join(f"it {verb} {', '.join(names[:3])}" for verb, names in parts if names)
        raise ValueError(f"{path} does not fit a {type(model).__name__}: {told}")
    model.load_state_dict(weights)
