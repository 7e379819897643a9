"""Several networks' mean opinion (Shao et al.: Good practices for deep feature fusion, 2016, ILSVRC'16's winner)."""

import math

import torch

from fastcnn import functional as F
from fastcnn import nn


class Ensemble(nn.Module):
    """The average of the probabilities that several networks give at several scales.

    The decks: train several independent models, at test time average their predicted probability distributions, then
    choose argmax, "enjoy 2% extra performance". Seven AlexNets: 18.2% -> 15.4%. Multi-scale ensembling of the families
    below won ILSVRC'16; the errors in percent:

        Inception-v3   Inception-v4   Inception-ResNet-v2   ResNet-200   WRN-68-3   fusion (val.)   fusion (test)
            4.20           4.01              3.52              4.26        4.65      2.92 (-0.6)        2.99

    What comes out is the logarithm of the averaged probabilities: in the place of logits, they have the same argmax,
    softmax makes the probabilities of them, and cross entropy takes them as they are.

        >>> models = [create_model(name, num_classes=5).eval() for name in ("squeezenet1_1", "shufflenet_v2_x0_5")]
        >>> together = fastcnn.models.Ensemble(models, scales=(64, 80))
        >>> with torch.no_grad():
        ...     together(torch.rand(2, 3, 96, 120)).softmax(1).sum(1)
        tensor([1.0000, 1.0000])

    Args:
        models: classifiers of the same classes, ours or others'. Snapshots of one network are models, too.
        scales: for each the length of the image's shorter side, to which it is resized, its proportions kept; None for
            images as they are.

    Shape: images [N, C, H, W] -> log-probabilities [N, classes]. A model may also give a map of logits [N, classes, P,
        Q] (to_fully_convolutional): the probabilities of its windows are averaged.

    Raises:
        ValueError: no models or scales, a scale that is no positive int or None, or, in the call, outputs that are not
            logits of the same classes.
    """

    def __init__(self, models, scales=(None,)):
        super().__init__()
        models, scales = list(models), tuple(scales)
        if not models or not scales:
            raise ValueError(f"models and scales must have at least one each, got {len(models)} and {len(scales)}")
        for scale in scales:
            if scale is not None and (not isinstance(scale, int) or isinstance(scale, bool) or scale < 1):
                raise ValueError(f"scales must be positive ints or None, got {scale!r}")
        self.models = nn.ModuleList(models)
        self.scales = scales

    def forward(self, x):
        opinions = []
        for scale in self.scales:
            images = _resized(x, scale)
            for index, model in enumerate(self.models):
                opinion = _log_probabilities(model(images), f"models[{index}]")
                if opinions and opinion.shape != opinions[0].shape:
                    shapes = f"{list(opinion.shape)}, the first gives {list(opinions[0].shape)}"
                    raise ValueError(f"models must have the same classes: models[{index}] gives {shapes}")
                opinions.append(opinion)
        return torch.stack(opinions).logsumexp(0) - math.log(len(opinions))

    def extra_repr(self):
        return f"scales={self.scales}"


def _resized(images, scale):
    shorter = min(images.shape[2:])
    if scale is None or scale == shorter:
        return images
    size = [round(side * scale / shorter) for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def _log_probabilities(logits, name):
    if not isinstance(logits, torch.Tensor) or logits.ndim not in (2, 4):
        what = list(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"{name} must give logits [N, classes], got {what}; in evaluation auxiliary heads are silent")
    opinion = logits.log_softmax(1)
    if opinion.ndim == 4:
        opinion = opinion.flatten(2).logsumexp(2) - math.log(opinion[0, 0].numel())
    return opinion
