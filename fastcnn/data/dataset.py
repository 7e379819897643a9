"""What every data set becomes: splits of uint8 images with labels, and how a network wants to see them.

Order and augmentation are functions of (seed, epoch, sample index) alone. So a resumed run and any number of worker
processes see the same images as a run that was never stopped.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from fastcnn.data.image import read_image

MAX_SHIFT = 2


@dataclass
class Input:
    """How a network wants its images: kept in every checkpoint, so that predictions see what training saw.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        size: height and width in pixels, `pad` included.
        pad: black pixels around the picture on every side.
        mean, std: per channel, of pixels in [0, 1], from the training images.
    """

    channels: int
    size: int
    pad: int
    mean: list[float]
    std: list[float]

    def normalise(self, images):
        """uint8 [N, C, H, W] -> float32 of the same shape, every channel with mean 0 and deviation 1."""
        shape = (1, self.channels, 1, 1)
        # non_blocking: otherwise the CPU waits here, in every step, until the GPU has finished the one before
        mean, std = (torch.tensor(t).view(shape).to(images.device, non_blocking=True) for t in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def read(self, path, invert=False):
        """The image file at `path` as uint8 [C, size, size]; `invert` swaps light and dark."""
        image = read_image(path, self.channels, self.size - 2 * self.pad)
        image = 255 - image if invert else image
        return torch.nn.functional.pad(image, [self.pad] * 4)


class Arrays:
    """A split in memory: images uint8 [N, C, H, W], labels int64 [N]."""

    def __init__(self, images, labels):
        self.images = images
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        """The images of these indices, uint8 [len(indices), C, H, W]."""
        return self.images[indices]

    def subset(self, indices):
        """The split of these indices only."""
        return Arrays(self.images[indices], self.labels[indices])


@dataclass
class Data:
    """A data set: training images, validation images to choose by, and test images to report once.

    `test` is None where there is none. A split has `labels` (int64 [N]), `batch(indices)` and a length.
    """

    name: str
    classes: list[str]
    input: Input
    train: Arrays
    val: Arrays
    test: Arrays | None


def statistics(images):
    """Mean and standard deviation per channel of uint8 images [N, C, H, W], in units of 255, exact."""
    means, stds = [], []
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in range(images.shape[1]):
        share = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        share /= share.sum()
        mean = (share * values).sum()
        means.append(mean.item())
        # images of one flat colour have no deviation to divide by
        stds.append(max((share * (values - mean) ** 2).sum().sqrt().item(), 1 / 255))
    return means, stds


def split_by_class(labels, tenths):
    """Split indices into parts of so many tenths, each with its share of every class. Always the same split.

    Args:
        labels: int64 [N].
        tenths: sizes of the parts, e.g. (7, 1, 2).

    Returns:
        One sorted int64 tensor of indices per part.
    """
    labels = labels.numpy()
    # RandomState's stream is frozen for ever, unlike that of newer generators
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    # deal them out to ten hands like cards, the last hand first: even a tiny set has one to choose by
    turn = 9 - np.arange(len(labels)) % 10
    edges = np.cumsum((0, *tenths))
    return [
        torch.from_numpy(np.sort(by_class[(turn >= low) & (turn < high)]))
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]


def shift_images(images, offsets, pad=MAX_SHIFT):
    """Move every image by its own (down, right) offset; what comes in from outside is black.

    Args:
        images: uint8 [N, C, H, W].
        offsets: int64 [N, 2], each in [-pad, pad].
        pad: the largest offset.
    """
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, [pad] * 4)
    rows = torch.arange(height) + pad - offsets[:, :1]
    cols = torch.arange(width) + pad - offsets[:, 1:]
    sample = torch.arange(len(images))
    # advanced indices around a slice go first: [N, H, W, C]
    shifted = padded[sample[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
    # contiguous() would leave grey images as they are, with strides that PyTorch then takes for channels_last
    return shifted.flatten(1).view(images.shape)


class _EpochBatches:
    """One epoch as a list of batches, which DataLoader can share out to worker processes."""

    def __init__(self, split, chunks, offsets):
        self.split = split
        self.chunks = chunks
        self.offsets = offsets

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, i):
        indices = self.chunks[i]
        try:
            images = self.split.batch(indices)
        except ValueError as error:
            # handed over, not raised: a worker would wrap it in its own traceback
            return error
        if self.offsets is not None:
            images = shift_images(images, self.offsets[indices])
        return images, self.split.labels[indices]


def batches(split, batch_size, *, workers=0, pin_memory=False, train=None, augment=False):
    """Iterate over a split as (images uint8 [n, C, H, W], labels int64 [n]).

    Args:
        split: `Arrays` or `Files`.
        batch_size: images per batch. The last batch has what is left; a single left-over image joins the batch before
            it, because batch norm cannot train on one value.
        workers: processes that read; they do not change what comes out.
        pin_memory: as in `torch.utils.data.DataLoader`.
        train: None for the images in order, or (seed, epoch), which shuffles.
        augment: shift training images by up to `MAX_SHIFT` pixels.

    Raises:
        ValueError: an image file is unreadable (while iterating).
    """
    order, offsets = torch.arange(len(split)), None
    if train is not None:
        random = np.random.default_rng(train)
        order = torch.from_numpy(random.permutation(len(split)))
        if augment:
            offsets = torch.from_numpy(random.integers(-MAX_SHIFT, MAX_SHIFT, (len(split), 2), endpoint=True))
    chunks = list(order.split(batch_size))
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    return _Loader(
        _EpochBatches(split, chunks, offsets),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        # DataLoader draws a seed for its workers: not from the run's own stream
        generator=torch.Generator(),
    )


class _Loader(DataLoader):
    def __iter__(self):
        for batch in super().__iter__():
            if isinstance(batch, ValueError):
                raise batch
            yield batch
