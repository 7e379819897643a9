"""Networks to measure, by name: fastcnn's own, torchvision's and timm's, with random weights."""

import importlib
import inspect
import sys

import torch

# in the order in which pages list them
NETWORKS = ("resnet50", "vgg16", "mobilenet_v2", "efficientnet_b0", "densenet121", "googlenet")


def build(name, num_classes=None, in_chans=None):
    """A network with random weights, in training mode.

    Args:
        name: "resnet50" (looked up in torchvision, timm and fastcnn, in this order: PyTorch's form is what
            is measured against, and what `fastcnn.convert` takes), or "fastcnn:lenet5",
            "torchvision:resnet50", "timm:convnext_tiny".
        num_classes: outputs of the classifier; default: the network's own.
        in_chans: channels of the images; default: the network's own. torchvision's networks know no other.

    Raises:
        ValueError: nobody has a network of this name, or its library is not installed, or in_chans is impossible.
    """
    source, _, plain = name.rpartition(":")
    if source not in ("", *_SOURCES):
        raise ValueError(f"model must be NAME or SOURCE:NAME with a source of {', '.join(_SOURCES)}, got {name!r}")
    options = {"num_classes": num_classes, "in_chans": in_chans}
    options = {option: value for option, value in options.items() if value is not None}
    missing = []
    for candidate in [source] if source else _SOURCES:
        try:
            make = _SOURCES[candidate](plain)
        except ImportError:
            missing.append(candidate)
            continue
        if make is not None:
            return make(**options).train()
    hint = f" (not installed: {', '.join(missing)})" if missing else ""
    raise ValueError(f"there is no network {name!r} in {', '.join(_SOURCES)}{hint}")


def build_on_meta(name, num_classes=None, in_chans=None):
    """The same without data, where the network's author lets it: on the meta device."""
    try:
        with torch.device("meta"):
            return build(name, num_classes, in_chans)
    except RuntimeError:  # it computes its sizes with tensors, as RegNet does
        return build(name, num_classes, in_chans)


def input_shape(name):
    """[C, H, W] of the images a network is measured on: those of its paper."""
    from fastcnn.models import MODELS

    source, _, plain = name.rpartition(":")
    if plain in MODELS:
        entry = MODELS[plain]
        return inspect.signature(entry.build).parameters["in_chans"].default, entry.image_size, entry.image_size
    if source == "timm" and _from_timm(plain):
        import timm

        return timm.get_pretrained_cfg(plain).input_size
    return 3, 224, 224


def import_torchvision():
    """The torchvision package. Its CPU wheel registers no box operators, without which it refuses to be imported."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    # declared and never called: no classifier has boxes
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


_library = torch.library.Library("torchvision", "FRAGMENT")


def _from_fastcnn(name):
    from fastcnn import models

    return (lambda **options: models.create_model(name, **options)) if name in models.list_models() else None


def _from_torchvision(name):
    models = import_torchvision().models
    # models.list_models() also names detectors and segmenters, which take other inputs
    if name not in models.list_models(module=models):
        return None
    # GoogLeNet and Inception draw their weights from SciPy one by one: a minute that changes no timing
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}

    def make(in_chans=3, **more):
        if in_chans != 3:
            raise ValueError(f"in_chans must be 3 for torchvision's networks, got {in_chans}; fastcnn:{name} may do")
        return models.get_model(name, weights=None, **options, **more)

    return make


def _from_timm(name):
    import_torchvision()
    import timm

    return (lambda **options: timm.create_model(name, **options)) if name in timm.list_models() else None


_SOURCES = {"torchvision": _from_torchvision, "timm": _from_timm, "fastcnn": _from_fastcnn}
