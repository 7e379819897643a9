"""Where in an image something is: a classifier's windows with a box each (Sermanet et al.: OverFeat, 2014, section 4).

The decks draw it as feature extractor, feature maps, and on them a classifier that makes class maps (C=1000) beside a
regression network that gives [X, Y, W, H].
"""

import torch

from fastcnn import chain, nn
from fastcnn.models.fully_convolutional import FullyConvolutional, to_fully_convolutional
from fastcnn.nn.blocks import UNFUSED, Block, call, unfuse


class Detector(Block):
    """A classifier that slides over the image, and a regression network that gives every window a box.

        features   C x h x w of one window, read by both
        scores     the classifier's head
        boxes      conv h x w to 4096, ReLU, conv 1x1 to 1024, ReLU, conv 1x1 to 4

    The boxes are shared by all classes, which the paper found better than boxes of each class (its text has both). They
    are pixels of the image: x and y of the upper left corner, width, height.

        >>> detector = fastcnn.models.Detector(create_model("lenet5"), image_size=32, hidden=(16, 8))
        >>> scores, boxes = detector(torch.zeros(2, 1, 40, 48))
        >>> scores.shape, boxes.shape
        (torch.Size([2, 10, 3, 5]), torch.Size([2, 4, 3, 5]))

    Args:
        model: classifier, which `to_fully_convolutional` takes, or what that returned (which is then used, not copied).
        image_size: of the classifier's own images, one window; of a FullyConvolutional model it is not read.
        hidden: outputs of the two hidden layers of the regression network.

    Shape: images [N, in_chans, H, W] -> scores (logits) [N, classes, P, Q] and boxes [N, 4, P, Q].
    """

    def __init__(self, model, image_size=224, hidden=(4096, 1024)):
        super().__init__()
        if not isinstance(model, FullyConvolutional):
            model = to_fully_convolutional(model, image_size)
        self.classifier = model
        like = next(model.parameters())
        options = dict(device=like.device, dtype=like.dtype)
        channels, *size = model.features_shape
        steps = tuple(a // b for a, b in zip(model.stride, model.features_stride, strict=True))
        self.regressor = nn.ChainSequential(
            *(nn.Conv2d(channels, hidden[0], tuple(size), steps, **options), nn.ReLU(inplace=True)),
            *(nn.Conv2d(hidden[0], hidden[1], 1, **options), nn.ReLU(inplace=True)),
            nn.Conv2d(hidden[1], 4, 1, **options),
        )
        if vars(model).get(UNFUSED):
            unfuse(self)

    def windows(self, rows, columns, like):
        """The windows [4, rows, columns] as boxes, of the dtype and device of like."""
        (height, width), (down, right) = self.classifier.window, self.classifier.stride
        y = torch.arange(rows, dtype=like.dtype, device=like.device)[:, None].expand(rows, columns) * down
        x = torch.arange(columns, dtype=like.dtype, device=like.device).expand(rows, columns) * right
        return torch.stack([x, y, torch.full_like(x, width), torch.full_like(x, height)])

    def values(self, x):
        self.classifier.check_images(x)
        features = chain.materialize(self.classifier.features(x))
        scores = call(self.classifier.head, features)
        boxes = chain.materialize(call(self.regressor, features))
        windows = self.windows(*boxes.shape[2:], boxes)
        size = torch.cat([windows[2:], windows[2:]])
        # the network says where in its window, in units of its size
        return scores, boxes * size + torch.cat([windows[:2], torch.zeros_like(windows[2:])])

    def box_loss(self, boxes, true):
        """Squared error of the boxes in units of the window, averaged over the windows that see half of the true box.

        Args:
            boxes: [N, 4, P, Q], as a call returns them.
            true: [N, 4], the box of each image.

        Returns:
            a tensor of one number: 0 if no window sees enough.

        Raises:
            ValueError: true has another shape.
        """
        if true.shape != boxes.shape[:2]:
            shapes = f"{list(boxes.shape[:2])}, got {list(true.shape)}"
            raise ValueError(f"true must be one box [x, y, w, h] an image, {shapes}")
        windows, true = self.windows(*boxes.shape[2:], boxes), true.to(boxes.dtype)[:, :, None, None]
        sees = _intersection(windows[None], true) >= 0.5 * true[:, 2] * true[:, 3]
        error = ((boxes - true) / torch.cat([windows[2:], windows[2:]])).square().mean(1)
        return torch.where(sees, error, 0).sum() / sees.sum().clamp(min=1)

    @torch.no_grad()
    def detect(self, images, scales=(1.0,), top=1, threshold=0.5):
        """What is where: boxes of all windows of all scales, merged class by class. For a detector in evaluation.

        Args:
            images: [N, in_chans, H, W].
            scales: factors by which the images are resized, none of them to less than a window.
            top: how many classes an image may show: those with the highest probability in any window. From 1 to all.
            threshold: windows in which a class is less probable do not vote for it.

        Returns:
            of every image {"boxes": [M, 4], "labels": [M], "scores": [M]}, the highest score first. The score is the
            sum of the probabilities of the windows whose boxes were merged, and so may exceed 1.

        Raises:
            ValueError: top is not of 1 to the number of classes, or a scale leaves less than a window.
        """
        votes = [[] for _ in images]  # of every image (probabilities [windows, classes], boxes [windows, 4])
        for scale in scales:
            size = [round(side * scale) for side in images.shape[2:]]
            resized = images if scale == 1 else _resized(images, size)
            scores, boxes = self(resized)
            if top not in range(1, scores.shape[1] + 1):
                raise ValueError(f"top must be of 1 to {scores.shape[1]}, the number of classes, got {top!r}")
            factors = [a / b for a, b in zip(images.shape[2:], size, strict=True)][::-1] * 2
            boxes = boxes * boxes.new_tensor(factors)[:, None, None]
            for vote, score, box in zip(votes, scores.softmax(1), boxes, strict=True):
                vote.append((score.flatten(1).t(), box.flatten(1).t()))
        return [_merged_by_class(*map(torch.cat, zip(*vote, strict=True)), top, threshold) for vote in votes]


def merge_boxes(boxes, scores, limit=0.75):
    """Merge the two boxes that match best, again and again, until none match.

    Two boxes match by the distance of their centres, in units of their mean size, plus 1 - intersection / union. The
    paper says "the sum of the distance between centers and the intersection area": boxes that agree have a small
    distance and a large intersection, so the intersection is counted as what is missing of it. The merged box is their
    average, its score their sum.

    Args:
        boxes: [M, 4], x and y of the upper left corner, width, height.
        scores: [M].
        limit: what matches worse stays apart; 0.76 is where two squares of one size, one down and right of the other,
            share half of what they cover.

    Returns:
        (boxes, scores) of what is left, the highest score first.
    """
    while len(boxes) > 1:
        one, two = boxes.t()[:, :, None], boxes.t()[:, None, :]
        shared = _intersection(one, two)
        areas = (boxes[:, 2] * boxes[:, 3]).clamp(min=1e-9)
        overlap = shared / (areas[:, None] + areas - shared)
        centres = boxes[:, :2] + boxes[:, 2:] / 2
        size = (areas.sqrt()[:, None] + areas.sqrt()) / 2
        match = torch.cdist(centres, centres) / size + 1 - overlap
        match.fill_diagonal_(float("inf"))
        best = int(match.argmin())
        if match.flatten()[best] > limit:
            break
        pair = torch.tensor(divmod(best, len(boxes)), device=boxes.device)
        others = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device).index_fill(0, pair, False)
        boxes = torch.cat([boxes[others], boxes[pair].mean(0, keepdim=True)])
        scores = torch.cat([scores[others], scores[pair].sum(0, keepdim=True)])
    order = scores.argsort(descending=True)
    return boxes[order], scores[order]


def _merged_by_class(probabilities, boxes, top, threshold):
    labels = probabilities.amax(0).topk(top).indices
    found = {"boxes": [boxes[:0]], "labels": [labels[:0]], "scores": [probabilities[:0, 0]]}
    for label in labels:
        votes = probabilities[:, label]
        merged, scores = merge_boxes(boxes[votes >= threshold], votes[votes >= threshold])
        found["boxes"].append(merged)
        found["scores"].append(scores)
        found["labels"].append(label.expand(len(scores)))
    found = {name: torch.cat(parts) for name, parts in found.items()}
    order = found["scores"].argsort(descending=True)
    return {name: tensor[order] for name, tensor in found.items()}


def _intersection(one, two):
    """The area that boxes share; their coordinates in the dimension before the last two."""
    sides = []
    for axis in (0, 1):
        low = torch.maximum(one[..., axis, :, :], two[..., axis, :, :])
        ends = (box[..., axis, :, :] + box[..., axis + 2, :, :] for box in (one, two))
        sides.append((torch.minimum(*ends) - low).clamp(min=0))
    return sides[0] * sides[1]


def _resized(images, size):
    return nn.functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
