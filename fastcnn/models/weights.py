"""Files of weights, of torch.save or safetensors: read without running what is in them, put into a network whole or not
at all."""

import io
import os
import warnings
import zipfile
from pathlib import Path

import safetensors.torch
import torch


def read(path, what="file of weights"):
    """What a file holds, on the CPU: of safetensors if its name ends so, else of torch.save. Nothing in it is executed.

    Args:
        path: of the file.
        what: kind of file, for messages.

    Raises:
        ValueError: the file is missing, truncated, damaged (in any bit that torch.save's checksums cover; safetensors
            has none), of another kind, or it holds code.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the {what} {path}: {error.strerror}") from error
    damaged = None
    try:
        if Path(path).suffix == ".safetensors":
            found = safetensors.torch.load(content)
        else:
            # torch.load does not verify the checksums that torch.save wrote; files of its first format have none
            if content.startswith(b"PK"):
                damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
            if damaged is None:
                found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        # a damaged zip archive or pickle can raise nearly anything
        raise ValueError(
            f"{path} is not a whole {what} (truncated, damaged, another kind of file, or code, which is not run)"
        ) from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
    check_sizes(found, path)
    return found


def check_sizes(value, path):
    """Refuse tensors that are larger than their file: with strides of 0 one may claim any number of elements."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path} holds a tensor of shape {list(value.shape)} without the bytes for it")
    elif isinstance(value, dict):
        for item in value.values():
            check_sizes(item, path)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_sizes(item, path)


def put(model, tensors, path):
    """Load a state_dict that must have exactly the model's keys and shapes.

    Raises:
        ValueError: it is of another network; the model is left as it was.
    """
    own = model.state_dict()
    missing, unknown = (sorted(a.keys() - b.keys()) for a, b in ((own, tensors), (tensors, own)))
    shared = own.keys() & tensors.keys()
    shapes = [f"{name} {list(tensors[name].shape)}" for name in shared if own[name].shape != tensors[name].shape]
    dtypes = [name for name in shared if own[name].is_floating_point() != tensors[name].is_floating_point()]
    parts = [
        ("lacks", missing),
        ("has the unknown", unknown),
        ("has another shape of", sorted(shapes)),
        ("has no numbers of the model's kind in", sorted(dtypes)),
    ]
    told = [f"it {verb} {', '.join(names[:3])}{', ...' if names[3:] else ''}" for verb, names in parts if names]
    if told:
        raise ValueError(f"{path} does not fit a {type(model).__name__}: {'; '.join(told)}{_of_channels(own, tensors)}")
    model.load_state_dict(tensors)


def _of_channels(own, tensors):
    # a network for images of other channels: only its first convolution differs
    first = next((name for name, tensor in own.items() if tensor.dim() == 4), None)
    mine, theirs = (list(t[first].shape) if first in t else [] for t in (own, tensors))
    if len(theirs) != 4 or mine[1] == theirs[1] or mine[:1] + mine[2:] != theirs[:1] + theirs[2:]:
        return ""
    return f"; it is for images of {theirs[1]} channels, the model for {mine[1]}"


def load(model, path):
    """Put the weights of a file into a network of `create_model`.

    The file has a state_dict with this network's keys, by itself, or as "state_dict" or "model" of a dict as trainers
    save it (`fastcnn train` too), with or without the prefixes "module." and "_orig_mod." of DDP and torch.compile.
    Names of the same network in another library are known for some (`Network.names_elsewhere`). Numbers of any floating
    dtype are converted to the network's. If the file is of another number of classes, the layers that make logits keep
    the weights they have, and a warning names them.

    Args:
        model: Network.
        path: of a file of torch.save or, if its name ends in .safetensors, of safetensors.

    Raises:
        ValueError: `read` refuses the file, it holds no weights, or they are of another network; the model is left as
            it was.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"pretrained must be the path of a file of weights, got {path!r}")
    tensors = _named_as(model, _state_dict(read(path), path))
    own = model.state_dict()
    heads = [key for key in own if key.rpartition(".")[0] in model.heads]
    if any(key in tensors and _of_other_classes(tensors[key], own[key]) for key in heads):
        tensors = {key: tensor for key, tensor in tensors.items() if key not in heads}
        put(model, tensors | {key: own[key] for key in heads}, path)
        told = f"{path} is not of {model.num_classes} classes: {', '.join(heads)} keep their fresh weights"
        warnings.warn(told, stacklevel=3)
    else:
        put(model, tensors, path)


def _of_other_classes(theirs, own):
    return theirs.shape[:1] != own.shape[:1] and theirs.shape[1:] == own.shape[1:]


def _state_dict(found, path):
    def is_one(value):
        return isinstance(value, dict) and all(
            isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in value.items()
        )

    candidates = [found, *(found.get(key) for key in ("state_dict", "model") if isinstance(found, dict))]
    tensors = next((value for value in candidates if is_one(value) and value), None)
    if tensors is None:
        raise ValueError(f'{path} holds no weights: neither a state_dict nor one as "state_dict" or "model" of a dict')
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return dict(tensors)


def _named_as(model, tensors):
    """The tensors under the model's names, where they are known under others."""
    own = model.state_dict()
    if not model.features_only and not tensors.keys() <= own.keys():
        names = model.names_elsewhere()
        renamed = {}
        for key, tensor in tensors.items():
            layer, _, kind = key.rpartition(".")
            renamed[f"{names.get(layer, layer)}.{kind}" if layer else key] = tensor
        # two of one name: it is another network
        tensors = renamed if len(renamed) == len(tensors) else tensors
    for key in own.keys() & tensors.keys():
        # a linear layer as a convolution of its whole input
        if own[key].dim() == 2 and tensors[key].dim() == 4:
            tensors[key] = tensors[key].flatten(1)
    counters = {key: tensor for key, tensor in own.items() if key.endswith(".num_batches_tracked")}
    # before PyTorch 0.4.1 batch norm did not count
    return tensors if counters.keys() & tensors.keys() else counters | tensors
