"""The networks, by name: `create_model("mobilenet_v2", num_classes=10)`.

Weights of torchvision's (or timm's) network of that name load unchanged: `model.load_state_dict(theirs.state_dict())`.
"""

import inspect
from functools import partial

from fastcnn.models.efficientnet import SCALES, EfficientNet
from fastcnn.models.lenet import LeNet5
from fastcnn.models.mobilenet_v1 import MobileNetV1
from fastcnn.models.mobilenet_v2 import MobileNetV2
from fastcnn.models.mobilenet_v3 import MobileNetV3
from fastcnn.models.senet import SENet
from fastcnn.models.shufflenet_v1 import ShuffleNetV1
from fastcnn.models.shufflenet_v2 import WIDTHS, ShuffleNetV2
from fastcnn.names import check_name

__all__ = [
    "EfficientNet", "LeNet5", "MobileNetV1", "MobileNetV2", "MobileNetV3", "SENet", "ShuffleNetV1", "ShuffleNetV2",
    "create_model", "list_models",
]  # fmt: skip

MODELS = {
    "lenet5": LeNet5,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3_large": partial(MobileNetV3, "large"),
    "mobilenet_v3_small": partial(MobileNetV3, "small"),
    **{f"efficientnet_{scale}": partial(EfficientNet, scale) for scale in SCALES},
    "shufflenet_v1": ShuffleNetV1,
    **{f"shufflenet_v2_{width}": partial(ShuffleNetV2, width) for width in WIDTHS},
    "seresnet50": partial(SENet, (3, 4, 6, 3)),
    "seresnext50_32x4d": partial(SENet, (3, 4, 6, 3), cardinality=32, base_width=4),
    "senet154": partial(
        SENet, (3, 8, 36, 3), cardinality=64, base_width=4, reduce_first=2, deep_stem=True, down_kernel_size=3
    ),
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
