"""The one-to-one layers: torch's classes, fastcnn's that replace them, and the op that runs in each."""

import torch

from fastcnn import nn

OP_NAMES = {
    "ConvTranspose2d": "conv_transpose2d",
    "CrossEntropyLoss": "cross_entropy",
    "BCEWithLogitsLoss": "binary_cross_entropy_with_logits",
    "MSELoss": "mse_loss",
    "L1Loss": "l1_loss",
    "SmoothL1Loss": "smooth_l1_loss",
    "HuberLoss": "huber_loss",
    "MultiMarginLoss": "multi_margin_loss",
    "AdaptiveAvgPool2d": "adaptive_avg_pool2d",
    "AdaptiveMaxPool2d": "adaptive_max_pool2d",
    "AvgPool2d": "avg_pool2d",
    "MaxPool2d": "max_pool2d",
    "LPPool2d": "lp_pool2d",
    "FractionalMaxPool2d": "fractional_max_pool2d",
    "BatchNorm1d": "batch_norm",
    "BatchNorm2d": "batch_norm",
    "BatchNorm3d": "batch_norm",
    "SyncBatchNorm": "batch_norm",
    "GroupNorm": "group_norm",
    "InstanceNorm1d": "instance_norm",
    "InstanceNorm2d": "instance_norm",
    "InstanceNorm3d": "instance_norm",
    "LayerNorm": "layer_norm",
    "LocalResponseNorm": "local_response_norm",
    "LeakyReLU": "leaky_relu",
    **{name: name.lower() for name in ("Conv2d", "Linear", "ReLU", "ReLU6", "SiLU", "Sigmoid", "Tanh", "Hardswish")},
    **{name: name.lower() for name in ("GELU", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d")},
}
OURS = {getattr(torch.nn, name): getattr(nn, name) for name in OP_NAMES}
OP_OF = {cls: OP_NAMES[cls.__name__] for pair in OURS.items() for cls in pair}
OPS = sorted(set(OP_OF.values()))


def is_same_conv(module):
    """Whether the module is timm's convolution that pads its input at each call, as TensorFlow's "SAME" does."""
    return type(module).__name__ == "Conv2dSame" and type(module).__module__.startswith("timm.")


def op_of(module):
    """The name of the op that a module's class runs, or None."""
    if type(module).__name__ in ("BatchNormAct2d", "SyncBatchNormAct"):
        return "batch_norm"
    if is_same_conv(module):
        return "conv2d"
    return OP_OF.get(type(module))
