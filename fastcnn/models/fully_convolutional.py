"""Classifiers as sliding windows (Sermanet et al.: OverFeat, 2014; LeCun et al. 1998 called them replicated networks).

The decks' "sliding window with ConvNet": no need to compute two separate windows, just one big input window, in a
single pass. A classifier of 224x224 images is a filter that can be slid over a larger image; what neighbouring windows
share is computed once.
"""

import copy

import torch
import torch.fx

from fastcnn.conversion import revert
from fastcnn.models.network import Network
from fastcnn.models.sliding import Rewriter, Tracer
from fastcnn.nn.blocks import UNFUSED, Block, call, unfuse

# functions that a recorded evaluation would lose
RANDOM = {
    "rand", "rand_like", "randn", "randn_like", "randint", "bernoulli", "bernoulli_", "uniform_", "normal_",
    "row_noise", "stochastic_depth",
}  # fmt: skip


class FullyConvolutional(Block):
    """A classifier that slides over images larger than its own: `to_fully_convolutional` makes it.

    Attributes:
        trunk: from images to the map of features.
        head: from features to the map of logits.
        window: (height, width) of the images that the classifier reads.
        stride: (vertical, horizontal) distance in pixels from one window to the next.
        features_shape: (channels, height, width) of the features of one window.
        features_stride: as stride, from one of the features to the next.
        in_chans: channels of the images.

    Shape: images [N, in_chans, H, W] -> logits [N, classes, (H - window) / stride + 1, (W - window) / stride + 1],
        where window (i, j) begins at pixel (i * stride, j * stride). If that is no whole number, there may be a last
        window that reaches past the image's border: with padding, or with pixels that the classifier does not read.

    Raises:
        ValueError: the images have other channels or are smaller than the window.
    """

    def __init__(self, trunk, head, window, stride, features_shape, features_stride, in_chans):
        super().__init__()
        self.trunk, self.head = trunk, head
        self.window, self.stride, self.in_chans = window, stride, in_chans
        self.features_shape, self.features_stride = features_shape, features_stride

    def check_images(self, x):
        """Raise ValueError unless x is [N, in_chans, H, W], no smaller than the window."""
        least = " x ".join(map(str, self.window))
        if x.ndim != 4 or x.shape[1] != self.in_chans or x.shape[2] < self.window[0] or x.shape[3] < self.window[1]:
            raise ValueError(
                f"the windows need images of shape [N, {self.in_chans}, H, W] of at least {least}, got {list(x.shape)}"
            )

    def features(self, x):
        """What the head reads, a value or tensor: [N, C, H', W']."""
        return self.trunk.run(x)[0] if isinstance(self.trunk, Network) else call(self.trunk, x)

    def values(self, x):
        self.check_images(x)
        return call(self.head, self.features(x))

    def extra_repr(self):
        return f"window={self.window}, stride={self.stride}"


def to_fully_convolutional(model, image_size=224):
    """The classifier as a network of convolutions alone, which gives the logits of all windows of larger images.

        >>> model = create_model("lenet5")
        >>> slid = fastcnn.models.to_fully_convolutional(model, image_size=32)
        >>> slid(torch.zeros(1, 1, 40, 48)).shape, slid.stride
        (torch.Size([1, 10, 3, 5]), (4, 4))

    A linear layer becomes a convolution: the first of the size of the map that it reads, its weights in that shape, the
    others 1x1. Flattening goes away. Means over the image and adaptive pools become pools of the window's size with
    stride 1 (6x6 of a 6x6 map: nothing). Dropout and batch norms stay; in training, batch norms take the statistics of
    all windows together.

    One window gives what the classifier gives, up to rounding. On larger images it is as if each window's features were
    cut out of the whole image's features: without padding that is exactly the classifier on that window. A layer
    that pads sees, at a window's border, zeros when the window is alone and the image's own pixels here; only the
    image's border is padded. Logits of such a network differ by that, and no more.

    Args:
        model: torch.nn.Module, of fastcnn, torchvision, timm or your own, that torch.fx can trace. It is not changed:
            the result has copies of its parameters, can be trained, and is in the model's mode. What runs only in
            training (auxiliary heads) is left out. If `fastcnn.convert` converted the model, the result is to be
            converted again.
        image_size: int or (height, width) of the images that the classifier was made for.

    Returns:
        FullyConvolutional: with `window` and `stride`.

    Raises:
        TypeError: model is no module.
        ValueError: image_size is not one or two positive ints, the model makes features alone, or it cannot take such
            images.
        NotImplementedError: a layer looks at all of the image (squeeze-excite, group norm, attention), pads by its size
            (NASNet) or is not known here, or the forward cannot be traced; the message names the module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    sizes = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sizes) != 2 or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes):
        raise ValueError(f"image_size must be a positive int or two of them, got {image_size!r}")
    if getattr(model, "features_only", False):
        raise ValueError("the model gives features alone (features_only=True), a classifier is needed")
    window = tuple(sizes)
    in_chans = _channels(model, window)
    network = revert(copy.deepcopy(model))
    plain = unfuse(_on_meta(network)).eval()
    tracer = Tracer()
    graph = tracer.trace(plain)
    rewriter = Rewriter(torch.fx.GraphModule(plain, graph), network, tracer.ends)
    images = torch.empty(2, in_chans, *window, device="meta", dtype=_dtype(model))
    try:
        with torch.no_grad():
            rewriter.run(images)
    except NotImplementedError:
        raise
    except (RuntimeError, ValueError) as error:
        size = " x ".join(map(str, window))
        raise ValueError(f"image_size: the model cannot take images of {size}: {str(error).splitlines()[0]}") from error
    stride, features = rewriter.stride[rewriter.result], rewriter.cut
    features = tuple(rewriter.shape[features][1:]), rewriter.stride[features]
    converted = FullyConvolutional(*rewriter.parts(), window, stride, *features, in_chans).train(model.training)
    for part in (converted.trunk, converted.head):
        _same_modes(part, model)
    if rewriter.last is not None:  # the blocks hand each other values there
        network.body, network.heads = network.drop_after(rewriter.last), ()
        converted.trunk = network
    else:
        _refuse_chance(network)
    if vars(network).get(UNFUSED):
        unfuse(converted)
    return converted


def _refuse_chance(network):
    # recorded in evaluation, it would be gone in training
    tracer = Tracer()
    state = torch.get_rng_state()
    nodes = tracer.trace(unfuse(_on_meta(network)).train()).nodes
    drawn = not torch.equal(state, torch.get_rng_state())
    torch.set_rng_state(state)
    names = {getattr(node.target, "__name__", node.target) for node in nodes} & RANDOM
    if drawn or names:
        what = f" ({', '.join(sorted(names))})" if names else ""
        raise NotImplementedError(f"{type(network).__name__} draws random numbers in its forward{what}, in training")


def _same_modes(new, old):
    # frozen parts stay in evaluation
    for name, module in new.named_modules():
        try:
            module.training = old.get_submodule(name).training
        except AttributeError:  # not of the classifier
            module.training = old.training


def _on_meta(model):
    """A copy of the model without memory for its parameters and buffers."""
    memo = {}
    for tensor in model.parameters():
        memo[id(tensor)] = torch.nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
    for tensor in model.buffers():
        memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    return copy.deepcopy(model, memo)


def _dtype(model):
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _channels(model, window):
    for module in model.modules():
        if isinstance(getattr(module, "in_chans", None), int):
            return module.in_chans
        if isinstance(module, torch.nn.Conv2d):
            return module.in_channels
        if isinstance(module, torch.nn.Linear):
            return max(1, module.in_features // (window[0] * window[1]))
    raise NotImplementedError(f"{type(model).__name__} has neither a convolution nor a linear layer")
