"""Checkpoints that a crash cannot damage and that a damaged disk cannot pass off as whole."""

import io
import os
from pathlib import Path

import torch

from fastcnn.models import weights

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
    state = weights.read(path, "checkpoint")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of fastcnn train (it lacks the mark {FORMAT!r})")
    model = state.get("model")
    if not isinstance(model, dict) or not all(isinstance(value, torch.Tensor) for value in model.values()):
        raise ValueError(f"{path} holds no weights of a model")
    return state


def load_weights(model, checkpoint, path):
    """Put the weights of a loaded checkpoint into a model of the same name and shape.

    Raises:
        ValueError: the checkpoint is of another network; the model is left as it was.
    """
    weights.put(model, checkpoint["model"], path)
