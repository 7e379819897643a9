"""What the networks share: stages, heads, features, the check of images, rounded widths, first weights."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastcnn import chain, nn
from fastcnn.nn.blocks import UNFUSED, Block, in_turn, unfuse


@dataclass(frozen=True)
class Entry:
    """A network that has a name: a line of its family's MODELS.

    Attributes:
        build: function of (num_classes=..., in_chans=..., options of the network) that makes it with fresh weights.
        year: of its paper.
        image_size: height and width of the images that the paper's, or the decks', figures are of.
    """

    build: Callable
    year: int
    image_size: int = 224


class Network(Block):
    """A classifier of images: modules that run in turn up to the last feature map, then its head.

    A subclass sets, as attributes of the class or of the instance:
        body: names of the modules that run in turn.
        feature_stages: names of the modules, in the body or inside of its modules ("features.4"), whose outputs are
            its features.
        heads: names of the layers that make logits, the main one first (then those of auxiliary classifiers).
        min_size: height and width of the smallest images.
    and defines `classify`, from the last feature map to the logits. What is no chain of modules redefines `run`.

    Args:
        num_classes: number of outputs.
        in_chans: channels of the images.

    Shape: images [N, in_chans, H, W] -> logits [N, num_classes]; with features_only a list of the stages' outputs.
    """

    body = ()
    feature_stages = ()
    heads = ()
    min_size = 1
    features_only = False

    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans

    def values(self, x):
        self.check_images(x)
        if self.features_only:
            return list(self.run(x, self.feature_stages)[1].values())
        return self.classify(self.run(x)[0])

    def check_images(self, x):
        """Raise ValueError unless x is [N, in_chans, H, W], large enough."""
        if x.ndim != 4 or x.shape[1] != self.in_chans or min(x.shape[2:]) < self.min_size:
            least = f" with H, W of at least {self.min_size}" if self.min_size > 1 else ""
            shape = f"[N, {self.in_chans}, H, W]{least}"
            raise ValueError(f"{type(self).__name__} takes images of shape {shape}, got {list(x.shape)}")

    def run(self, x, taps=()):
        """The body's output, a value or tensor, and {name: output, a tensor} of the modules that taps names."""
        waiting, tapped = [], {}
        for name in self.body:
            for inner, module in _opened(name, self.get_submodule(name), taps):
                waiting.append(module)
                if inner in taps:
                    x = tapped[inner] = chain.materialize(in_turn(waiting, x))
                    waiting = []
        return in_turn(waiting, x), tapped

    def classify(self, x):
        """Logits [N, num_classes] of the last feature map."""
        raise NotImplementedError(f"{type(self).__name__} does not define classify")

    def names_elsewhere(self):
        """{a layer's name in another library's form of the very same network: its name here}, for weights.load."""
        return {}

    def get_classifier(self):
        """The layer that makes the logits."""
        return self.get_submodule(self.heads[0])

    def reset_classifier(self, num_classes):
        """Replace the layers that make logits by new ones of so many outputs; 0 for none: their inputs come out.

        Raises:
            ValueError: num_classes is no int of at least 0, or the network gives features alone.
        """
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 0:
            raise ValueError(f"num_classes must be an int of at least 0, got {num_classes!r}")
        if self.features_only:
            raise ValueError("a network made with features_only=True has no classifier to replace")
        for name in self.heads:
            self.set_submodule(name, _head_like(self.get_submodule(name), num_classes, self.num_classes))
        self.num_classes = num_classes

    def to_features(self, out_indices=None):
        """Make the network return its stages' outputs, in place, without the modules that come after them.

        Args:
            out_indices: which stages, counted from 0; None for all.

        Returns:
            the network.
        """
        stages = self.feature_stages
        chosen = range(len(stages)) if out_indices is None else sorted(out_indices)
        for index in chosen:
            if index not in range(len(stages)):
                raise ValueError(f"out_indices must be of 0 to {len(stages) - 1} ({', '.join(stages)}), got {index!r}")
        if not chosen:
            raise ValueError("out_indices must name at least one stage")
        self.feature_stages = tuple(stages[index] for index in chosen)
        self.body = self.drop_after(self.feature_stages[-1])
        self.heads = ()
        self.features_only = True
        return self

    def drop_after(self, last):
        """Delete the modules that run after the stage `last`, and the heads; returns what is left of the body."""
        top = last.partition(".")[0]
        body = self.body[: self.body.index(top) + 1]
        for name in [name for name, _ in self.named_children() if name not in body]:
            delattr(self, name)
        path = last.split(".")
        for depth in range(1, len(path)):
            parent = self.get_submodule(".".join(path[:depth]))
            names = [name for name, _ in parent.named_children()]
            for name in names[names.index(path[depth]) + 1 :]:
                delattr(parent, name)
        return body

    def feature_info(self, image_size=224):
        """Of every stage {"module": name, "num_chs": channels, "reduction": how many times smaller than the image}; the
        reduction of [N, C] is None."""
        model = copy.deepcopy(self).to("meta").eval()
        with torch.no_grad():
            images = torch.empty(1, self.in_chans, image_size, image_size, device="meta")
            tapped = model.run(images, self.feature_stages)[1]
        reduction = lambda x: 2 ** round(math.log2(image_size / x.shape[2])) if x.ndim == 4 else None
        return [{"module": name, "num_chs": x.shape[1], "reduction": reduction(x)} for name, x in tapped.items()]


def _opened(name, module, taps):
    # its children, where one of them is tapped
    if not any(tap.startswith(f"{name}.") for tap in taps):
        return [(name, module)]
    children = [_opened(f"{name}.{inner}", child, taps) for inner, child in module.named_children()]
    return [part for parts in children for part in parts]


def _head_like(old, num_classes, before):
    if num_classes == 0:
        return nn.Identity()
    weight = getattr(old, "weight", None)
    if weight is None:
        raise ValueError(f"the classifier was removed (num_classes was {before}); make the network anew")
    options = dict(bias=old.bias is not None, device=weight.device, dtype=weight.dtype)
    if isinstance(old, torch.nn.Conv2d):
        new = nn.Conv2d(old.in_channels, num_classes, old.kernel_size, old.stride, old.padding, **options)
    else:
        new = nn.Linear(old.in_features, num_classes, **options)
    return unfuse(new) if old.__dict__.get(UNFUSED) else new


def he_normal(model):
    """He initialisation (He et al. 2015): weights of convolutions normal with the variance 2 / (outputs * filter's
    size), all biases 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


def check_multiplier(name, value):
    """Raise ValueError unless the argument `name` is a positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def check_layers(layers, stages):
    """Raise ValueError unless layers are as many positive ints as there are stages."""
    counts = layers if isinstance(layers, (tuple, list)) else ()
    if len(counts) != stages or not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(f"layers must be {stages} positive ints, blocks of each stage, got {layers!r}")


def last_of_each_size(strides):
    """Indices of the modules, of these strides and run in turn, whose outputs are the last of their size."""
    return [i for i in range(len(strides)) if i + 1 == len(strides) or strides[i + 1] > 1]


def round_channels(channels, width_mult=1.0, divisor=8):
    """channels * width_mult as a multiple of divisor, no less than nine tenths of it.

    Raises:
        ValueError: width_mult is no positive number.
    """
    check_multiplier("width_mult", width_mult)
    wanted = channels * width_mult
    rounded = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * wanted else rounded


class MobileNetwork(Network):
    """A classifier of the mean over the image of what features returns: torchvision's mobile networks and their keys.

    Args:
        num_classes, in_chans: as of Network.
        features: ChainSequential whose first layer reads the images.
        classifier: module that takes [N, C] and ends in a linear layer.
        linear: function that initialises the weight of a linear layer.
    """

    body = ("features",)

    def __init__(self, num_classes, in_chans, features, classifier, linear):
        super().__init__(num_classes, in_chans)
        self.features = features
        self.classifier = classifier
        self.heads = (f"classifier.{len(classifier) - 1}",)
        he_normal(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                linear(module.weight)

    def classify(self, x):
        return self.classifier(chain.mean(x))

    def names_in_timm(self, layers, squeezed):
        """names_elsewhere, for timm's form of a network whose first stage alone lacks the first 1x1 convolutions.

        Args:
            layers: blocks of each stage.
            squeezed: whether they have squeeze-excite.
        """
        gate = ("se.conv_reduce", "se.conv_expand") if squeezed else ()
        first = ("conv_dw", "bn1", *gate, "conv_pw", "bn2")
        later = ("conv_pw", "bn1", "conv_dw", "bn2", *gate, "conv_pwl", "bn3")
        theirs = ["conv_stem", "bn1"]
        for stage, count in enumerate(layers):
            theirs += [f"blocks.{stage}.{i}.{name}" for i in range(count) for name in (later if stage else first)]
        theirs += ["conv_head", "bn2"]
        kinds = (torch.nn.Conv2d, torch.nn.BatchNorm2d)
        ours = [name for name, module in self.named_modules() if isinstance(module, kinds)]
        return dict(zip(theirs, ours, strict=True)) | {"classifier": self.heads[0]}
