"""The networks, by name: `create_model("mobilenet_v2", num_classes=10)`.

Weights of torchvision's network of that name load unchanged: `model.load_state_dict(theirs.state_dict())`.
"""

import inspect
from functools import partial

from fastcnn.models.efficientnet import SCALES, EfficientNet
from fastcnn.models.lenet import LeNet5
from fastcnn.models.mobilenet_v1 import MobileNetV1
from fastcnn.models.mobilenet_v2 import MobileNetV2
from fastcnn.models.mobilenet_v3 import MobileNetV3
from fastcnn.names import check_name

__all__ = ["EfficientNet", "LeNet5", "MobileNetV1", "MobileNetV2", "MobileNetV3", "create_model", "list_models"]

MODELS = {
    "lenet5": LeNet5,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3_large": partial(MobileNetV3, "large"),
    "mobilenet_v3_small": partial(MobileNetV3, "small"),
    **{f"efficientnet_{scale}": partial(EfficientNet, scale) for scale in SCALES},
}


def list_models():
    """The names `create_model` knows, sorted."""
    return sorted(MODELS)


def create_model(name, num_classes=None, in_chans=None, **kwargs):
    """Build a network with fresh weights.

    Args:
        name: one of `list_models()`.
        num_classes: number of outputs; None for the network's own: 1000, of LeNet-5 10.
        in_chans: channels of the images; None for the network's own: 3, of LeNet-5 1.
        **kwargs: options of that network; see its class.

    Raises:
        ValueError: no such network (the nearest name is suggested), or an impossible argument.
    """
    check_name("model", name, list_models())
    given = {"num_classes": num_classes, "in_chans": in_chans}
    given = {argument: value for argument, value in given.items() if value is not None}
    for argument, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{argument} must be a positive int, got {value!r}")
    for argument in kwargs:
        check_name(f"option of {name}", argument, list(inspect.signature(MODELS[name]).parameters))
    return MODELS[name](**given, **kwargs)
