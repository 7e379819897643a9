"""What GoogLeNet and Inception v3 share: classifiers of earlier feature maps, and images as their weights want them."""

import torch

from fastcnn.models.network import Network
from fastcnn.nn.blocks import call, in_turn

# mean and standard deviation of the channels: what images are normalised with, and what the first training took
IMAGENET = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))
HALF = (0.5, 0.5)


class AuxiliaryNetwork(Network):
    """A Network that in training also returns the logits of auxiliary classifiers, which read earlier feature maps.

    A subclass sets, besides what Network asks for:
        auxiliary: ((module of the body, classifier of its output), ...) in the order of the body; the classifiers are
            Blocks.
        aux_weight: what the loss of each of them counts, where the main one's counts 1.
        outputs: namedtuple of the main logits and those of the classifiers, the last first, as torchvision has it.

    Args:
        num_classes, in_chans: as of Network.
        transform_input: whether the images come normalised with ImageNet's mean and standard deviation, and are to be
            brought to the range -1 to 1 that torchvision's weights, from TensorFlow, were trained on.
    """

    auxiliary = ()

    def __init__(self, num_classes, in_chans, transform_input):
        super().__init__(num_classes, in_chans)
        if transform_input and in_chans != len(IMAGENET):
            raise ValueError(f"transform_input=True needs in_chans = {len(IMAGENET)}, got {in_chans}")
        self.transform_input = transform_input

    def values(self, x):
        if self.features_only or not self.training or not self.auxiliary:
            return super().values(x)
        self.check_images(x)
        x, waiting, logits = self.transformed(x), [], []
        for name in self.body:
            waiting.append(self.get_submodule(name))
            for head in [head for after, head in self.auxiliary if after == name]:
                x, waiting = in_turn(waiting, x), []
                logits.insert(0, call(self.get_submodule(head), x))
        return self.outputs(self.classify(in_turn(waiting, x)), *logits)

    def run(self, x, taps=()):
        return super().run(self.transformed(x), taps)

    def transformed(self, x):
        """The images, with transform_input between -1 and 1."""
        if not self.transform_input:
            return x
        channels = [
            x[:, i : i + 1] * (std / HALF[1]) + (mean - HALF[0]) / HALF[1] for i, (mean, std) in enumerate(IMAGENET)
        ]
        last = x.is_contiguous(memory_format=torch.channels_last)
        return torch.cat(channels, 1).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
