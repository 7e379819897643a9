"""The networks, by name: `create_model("lenet5", num_classes=10, in_chans=1)`."""

import inspect

from fastcnn.models.lenet import LeNet5
from fastcnn.names import check_name

__all__ = ["LeNet5", "create_model", "list_models"]

MODELS = {
    "lenet5": LeNet5,
}


def list_models():
    """The names `create_model` knows, sorted."""
    return sorted(MODELS)


def create_model(name, num_classes=10, in_chans=1, **kwargs):
    """Build a network with fresh weights.

    Args:
        name: one of `list_models()`.
        num_classes: number of outputs.
        in_chans: channels of the images.
        **kwargs: options of that network; see its class.

    Raises:
        ValueError: no such network (the nearest name is suggested), or an impossible argument.
    """
    check_name("model", name, list_models())
    for argument, value in (("num_classes", num_classes), ("in_chans", in_chans)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{argument} must be a positive int, got {value!r}")
    for argument in kwargs:
        check_name(f"option of {name}", argument, list(inspect.signature(MODELS[name]).parameters))
    return MODELS[name](num_classes=num_classes, in_chans=in_chans, **kwargs)
