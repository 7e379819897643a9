"""The networks, by name: `create_model("resnet50", num_classes=10)`, or `models.resnet50(num_classes=10)`.

Every file here is one family: its classes, and `MODELS`, the names it builds. A new file needs no entry anywhere else.
Weights of torchvision's (or timm's) network of that name load unchanged: `model.load_state_dict(theirs.state_dict())`,
or from a file of them: `create_model(name, pretrained=PATH)`.
"""

import fnmatch
import importlib
import inspect
import pkgutil

from fastcnn.models import weights
from fastcnn.models.detection import Detector, merge_boxes
from fastcnn.models.ensemble import Ensemble
from fastcnn.models.fully_convolutional import FullyConvolutional, to_fully_convolutional
from fastcnn.models.network import Entry, Network
from fastcnn.names import check_name
from fastcnn.nn.blocks import unfuse

__all__ = [
    "Detector", "Ensemble", "Entry", "FullyConvolutional", "Network", "create_model", "list_models", "merge_boxes",
    "to_fully_convolutional",
]  # fmt: skip
MODELS = {}


def list_models(pattern="*"):
    """The names `create_model` knows, sorted.

    Args:
        pattern: of the names wanted, as of file names: "resnet*", "*_cifar".
    """
    return sorted(fnmatch.filter(MODELS, pattern))


def create_model(
    name, num_classes=None, in_chans=None, *, pretrained=None, fused=True, features_only=False, out_indices=None,
    **kwargs,
):  # fmt: skip
    """Build a network.

    Args:
        name: one of `list_models()`.
        num_classes: number of outputs; None for the network's own, mostly 1000.
        in_chans: channels of the images; None for the network's own, mostly 3.
        pretrained: file of weights, of torch.save or safetensors, with the network's keys; None for fresh weights. If
            it is of another number of classes, the classifier keeps its fresh weights.
        fused: whether the blocks run as the fused chain; off, layer by layer, which torch.compile takes as one graph.
        features_only: return a list of the outputs of the network's stages, see `Network.feature_info`; what comes
            after them is left out.
        out_indices: with features_only: which stages, counted from 0; None for all.
        **kwargs: options of that network; see its class.

    Returns:
        Network: in training mode, on the CPU.

    Raises:
        ValueError: no such network (the nearest name is suggested), an impossible argument, or a file of weights that
            do not fit.
    """
    check_name("model", name, list_models())
    given = {"num_classes": num_classes, "in_chans": in_chans}
    given = {argument: value for argument, value in given.items() if value is not None}
    for argument, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{argument} must be a positive int, got {value!r}")
    build = MODELS[name].build
    options = [p.name for p in inspect.signature(build).parameters.values() if p.kind != p.VAR_KEYWORD]
    for argument in kwargs:
        check_name(f"option of {name}", argument, options)
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices needs features_only=True, got {out_indices!r} without it")
    model = build(**given, **kwargs)
    if pretrained is not None:
        weights.load(model, pretrained)
    if features_only:
        model.to_features(out_indices)
    return model if fused else unfuse(model)


def _builder(name, entry):
    # models.resnet50(...), as torchvision has them
    def build(**kwargs):
        return create_model(name, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"create_model({name!r}, ...); its network ({entry.year}) is described there and in its class."
    return build


for _file in pkgutil.iter_modules(__path__):
    _family = importlib.import_module(f"{__name__}.{_file.name}")
    _entries = getattr(_family, "MODELS", {})
    MODELS.update(_entries)
    if _entries:
        # a network's classes, and then its names, of which some are also its file's
        _own = {n: c for n, c in vars(_family).items() if getattr(c, "__module__", "") == _family.__name__}
        globals().update({n: c for n, c in _own.items() if n[0] != "_"})
        globals().update({name: _builder(name, entry) for name, entry in _entries.items()})
