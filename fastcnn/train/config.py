"""Everything that decides a training run, with its default and its meaning. The command line is made from it."""

import math
import types
import typing
from dataclasses import asdict, dataclass, field, fields

from fastcnn import optim
from fastcnn.backends import BACKENDS
from fastcnn.names import check_name

OPTIMIZERS = {name.lower(): getattr(optim, name) for name in optim.__all__}
# these may differ between a run and its continuation: they change where and how fast, not what
FREE_ON_RESUME = ("data_dir", "device", "workers", "cuda_graph", "out", "resume")


def option(default, help, *, low=None, above=None, choices=None):
    """A field with its help text and its limits: at least `low`, more than `above`, one of `choices`."""
    metadata = {"help": help, "low": low, "above": above, "choices": choices}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """The options of `fastcnn train`. A value that cannot be raises TypeError or ValueError at once."""

    model: str = option("lenet5", "network (fastcnn.models.list_models())")
    model_args: dict[str, typing.Any] = option({}, "options of the network, e.g. --model-args.activation tanh")
    data: str = option("digits", "digits, mnist, cifar10, cifar100 or folder (ROOT/train/CLASS/*, ROOT/val/CLASS/*)")
    data_dir: str | None = option(None, "folder with the data set's files, default data/NAME; digits needs none")
    image_size: int = option(32, "for folder: height and width the images are brought to", low=1)
    channels: int = option(3, "for folder: 3 for RGB, 1 for grey", choices=(1, 3))
    augment: bool = option(True, "shift every training image by up to 2 pixels, anew in every epoch")
    epochs: int = option(40, "passes over the training images", low=1)
    batch_size: int = option(32, "images per step", low=1)
    optimizer: str = option("adam", ", ".join(OPTIMIZERS), choices=tuple(OPTIMIZERS))
    lr: float = option(4e-3, "learning rate at the start", above=0)
    momentum: float = option(0.9, "for sgd and lars", low=0)
    weight_decay: float = option(0.0, "weight decay, as the optimizer defines it", low=0)
    max_grad_norm: float | None = option(None, "scale gradients down to this norm, that of all together", above=0)
    ema_decay: float | None = option(
        None, "validate and keep the moving average of the weights, with this decay per step, e.g. 0.999", low=0
    )
    scheduler: str = option(
        "cosine",
        "cosine or linear (fall to 0 over the run), inverse_time (lr / (1 + lr_decay t)), inverse_sqrt (lr / sqrt(t)), "
        "t in epochs, or constant",
        choices=("cosine", "linear", "inverse_time", "inverse_sqrt", "constant"),
    )
    lr_decay: float = option(1.0, "for inverse_time: how fast the learning rate falls", above=0)
    warmup: int = option(0, "steps in which the learning rate first rises from 0", low=0)
    label_smoothing: float = option(0.0, "share of every target spread over all classes", low=0)
    seed: int = option(0, "of the weights, the order and the augmentation", low=0)
    device: str = option("auto", "cpu, cuda, or auto: a GPU where there is one", choices=("auto", "cpu", "cuda"))
    amp: str = option("none", "automatic mixed precision: none, bf16 or fp16", choices=("none", "bf16", "fp16"))
    channels_last: bool = option(False, "keep images and filters in NHWC memory order")
    backend: str = option("auto", "what runs the ops: auto, triton, cpu (numba) or torch", choices=BACKENDS)
    fuse: bool = option(False, "fuse convolution, batch norm, activation and residual (fastcnn.convert)")
    cuda_graph: bool = option(False, "on a GPU: repeat the training step from a CUDA graph (fastcnn.graphed_step)")
    workers: int | None = option(
        None, "processes that read image files; default: one per core for folder, else 0", low=0
    )
    out: str | None = option(None, "run folder; default runs/MODEL-DATA")
    resume: bool = option(False, "continue the run in the run folder, with its own options")

    def __post_init__(self):
        from fastcnn.data import DATA
        from fastcnn.models import list_models

        for spec in fields(self):
            setattr(self, spec.name, _check(spec, getattr(self, spec.name)))
        check_name("model", self.model, list_models())
        check_name("data set", self.data, DATA)
        for name in ("num_classes", "in_chans", "features_only", "out_indices"):
            if name in self.model_args:
                raise ValueError(f"model_args must leave {name} to the trainer, got {self.model_args[name]!r} for it")
        if self.label_smoothing > 1:
            raise ValueError(f"label_smoothing must be at most 1, got {self.label_smoothing}")
        if self.ema_decay is not None and self.ema_decay >= 1:
            raise ValueError(f"ema_decay must be less than 1, got {self.ema_decay}")
        if self.out is None:
            self.out = f"runs/{self.model}-{self.data}"

    def saved(self):
        """What config.json and checkpoints keep: all but where the run lies and that it was continued."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "resume")}


def _check(spec, value):
    """The value of one field, or TypeError / ValueError with its name, the value and what is right."""
    name, limits = spec.name, spec.metadata
    allowed = [typing.get_origin(kind) or kind for kind in _alternatives(spec.type)]
    if float in allowed and type(value) is int:
        value = float(value)
    # bool is a subclass of int, and epochs=True a mistake
    if type(value) not in allowed:
        kinds = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in allowed)
        raise TypeError(f"{name} must be {kinds}, got {value!r}")
    if value is None:
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if limits["choices"] is not None and value not in limits["choices"]:
        if isinstance(value, str):
            check_name(name, value, limits["choices"])
        raise ValueError(f"{name} must be one of {', '.join(map(str, limits['choices']))}, got {value!r}")
    if limits["low"] is not None and value < limits["low"]:
        raise ValueError(f"{name} must be at least {limits['low']}, got {value}")
    if limits["above"] is not None and value <= limits["above"]:
        raise ValueError(f"{name} must be more than {limits['above']}, got {value}")
    return value


def _alternatives(kind):
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
