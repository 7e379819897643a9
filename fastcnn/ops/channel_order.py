"""Channels of several tensors in an order that is known and not made: chunks, concatenations and shuffles of channels.

A Run says where neighbouring channels of one part stand in the order. Chunking, concatenating and shuffling change
runs alone; what reads the channels gathers them, in the order (`logical`) or run after run, as it is cheapest to copy:
a convolution then takes its weight's columns in that order instead (PermuteFunction).

parts [N, C_i, H, W] with vectors scale, shift [C_i] -> [N, C, H, W] with [C]. Saved for backward: nothing. Torch
counterpart: torch.chunk, torch.cat and channel_shuffle. Source: Ma et al. 2018 (ShuffleNet v2).
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastcnn.ops.concatenate import side_by_side
from fastcnn.ops.conv_batch_norm import refuse_second_derivatives
from fastcnn.ops.conv_layout import suggests_channels_last


class Run(NamedTuple):
    """Channels first, first + 1, ... of a part, which stand at start, start + step, ... of the order."""

    part: object
    first: int
    count: int
    start: int
    step: int

    def _within(self, low, high):
        """What of it stands at low, ..., high - 1, there counted from 0; None if nothing does."""
        begin = max(0, -(-(low - self.start) // self.step))
        end = min(self.count, -(-(high - self.start) // self.step))
        if begin >= end:
            return None
        return self._replace(first=self.first + begin, count=end - begin, start=self.start + begin * self.step - low)


def concatenated(groups):
    """The runs of the channels of several lists of runs, one list's after the other's."""
    runs, offset = [], 0
    for group in groups:
        runs += [run._replace(start=run.start + offset) for run in group]
        offset += channels_of(group)
    return runs


def channels_of(runs):
    """How many channels there are."""
    return sum(run.count for run in runs)


def chunk(runs, low, high):
    """The runs of channels low, ..., high - 1."""
    return [part for run in runs if (part := run._within(low, high)) is not None]


def shuffled(runs, groups):
    """The runs after torch.nn.functional.channel_shuffle: channel a * (C / groups) + b goes to b * groups + a."""
    size = channels_of(runs) // groups
    return [
        part._replace(start=part.start * groups + a, step=part.step * groups)
        for a in range(groups)
        for part in chunk(runs, a * size, (a + 1) * size)
    ]


def by_memory(runs):
    """The same runs, part after part, each part's in the order of its memory."""
    parts = {}
    for run in runs:
        parts.setdefault(id(run.part), len(parts))
    return sorted(runs, key=lambda run: (parts[id(run.part)], run.first))


def pieces_of(runs):
    """(parts, [(number of the part, first channel, channels)]) of runs by memory; neighbours make one piece."""
    parts, pieces = [], []
    for run in runs:
        if not parts or parts[-1] is not run.part:
            parts.append(run.part)
            pieces.append((len(parts) - 1, run.first, run.count))
        elif sum(pieces[-1][1:]) == run.first:
            pieces[-1] = (*pieces[-1][:2], pieces[-1][2] + run.count)
        else:
            pieces.append((len(parts) - 1, run.first, run.count))
    return parts, pieces


def positions(runs):
    """Where the channels stand which the runs list one after the other, a tuple."""
    return tuple(run.start + k * run.step for run in runs for k in range(run.count))


def inverse(order):
    """The permutation that undoes this one."""
    result = [0] * len(order)
    for i, p in enumerate(order):
        result[p] = i
    return tuple(result)


@functools.lru_cache(maxsize=1024)
def _index(order, device):
    return torch.tensor(order, device=device)


def permuted(tensor, order, dim):
    """The tensor with entry order[i] of a dimension as its i-th, in the same layout."""
    index = _index(order, tensor.device)
    if _layout(tensor) == torch.channels_last:
        return tensor.movedim(1, 3).index_select(3 if dim == 1 else dim, index).movedim(3, 1)
    return tensor.index_select(dim, index)


def _layout(tensor):
    last = tensor.dim() == 4 and suggests_channels_last(tensor)
    return torch.channels_last if last else torch.contiguous_format


def channel_shuffle(x, groups):
    """torch.nn.functional.channel_shuffle of a tensor, in its layout, which PyTorch's loses."""
    if x.dim() != 4 or not suggests_channels_last(x) or x.shape[1] % groups != 0:
        return F.channel_shuffle(x, groups)
    return x.movedim(1, 3).unflatten(3, (groups, -1)).transpose(3, 4).flatten(3).movedim(3, 1)


class PermuteFunction(torch.autograd.Function):
    """A weight with column order[i] as its i-th; the gradient's columns go back to their places."""

    @staticmethod
    def forward(ctx, weight, order):
        ctx.order = order
        return permuted(weight, order, 1)

    @staticmethod
    def backward(ctx, grad):
        return PermuteFunction.apply(grad, inverse(ctx.order)), None


class Takes:
    """What GatherFunctions take of one part: the channels, and the gradient that they make together."""

    def __init__(self):
        self.ranges = []
        self.gradients = [None] * 3  # of raw, scale, shift: (tensor, its version)

    def add(self, ranges):
        """Which of the functions the one is that takes these, too."""
        self.ranges.append(ranges)
        return len(self.ranges) - 1

    def _alone(self, number):
        """Whether of what this function takes nothing is taken twice."""
        mine = self.ranges[number]
        ranges = mine + [r for i, others in enumerate(self.ranges) if i != number for r in others]
        return all(
            a + n <= b or b + m <= a for i, (a, n) in enumerate(mine) for b, m in ranges[i + 1 :] if n > 0 and m > 0
        )

    def gradient(self, which, number, grads, rest, like):
        """The part's gradient: those of the channels that a function takes, and the rest, those of later readers."""
        if all(grad is None for grad in grads):
            return rest
        known = self.gradients[which]
        ours = rest is None or (known is not None and known[0] is rest and known[1] == rest._version)
        if rest is None:
            shape, dtype, device, layout = like
            rest = torch.empty(shape, dtype=dtype, device=device, memory_format=layout).zero_()
        elif not ours:
            rest = rest.clone(memory_format=torch.preserve_format)
        into = ours and self._alone(number)  # what is there is zero
        for (first, count), grad in zip(self.ranges[number], grads, strict=True):
            if grad is not None:
                there = rest.narrow(1 if rest.dim() == 4 else 0, first, count)
                there.copy_(grad) if into else there.add_(grad)
        self.gradients[which] = None if number == 0 else (rest, rest._version)
        return rest


class GatherFunction(torch.autograd.Function):
    """(raw, scale, shift, *passed): channels of several parts side by side; passed: the parts again, for later readers.

    takes: the Takes of every part. pieces: (number of the part, first channel, channels) in the order of the result,
    each part's in the order of its channels; order: None, or which of these channels is the i-th of the result.
    tensors: raw, scale and shift of every part.
    """

    @staticmethod
    def forward(ctx, takes, pieces, order, *tensors):
        ctx.pieces, ctx.order = pieces, order
        ctx.takes = [
            (take, take.add([(first, count) for part, first, count in pieces if part == i]))
            for i, take in enumerate(takes)
        ]
        ctx.likes = [(t.shape, t.dtype, t.device, _layout(t)) for t in tensors]
        ctx.set_materialize_grads(False)
        raws = [tensors[3 * part].narrow(1, first, count) for part, first, count in pieces]
        together = side_by_side(raws)
        raw = torch.cat(raws, 1) if together is None else together.data
        scale, shift = (
            torch.cat([tensors[3 * part + i].narrow(0, first, count) for part, first, count in pieces]) for i in (1, 2)
        )
        if order is not None:
            raw, scale, shift = (permuted(t, order, min(1, t.dim() - 1)) for t in (raw, scale, shift))
        passed = (t if need else None for t, need in zip(tensors, ctx.needs_input_grad[3:], strict=True))
        return raw, scale, shift, *passed

    @staticmethod
    def backward(ctx, *grads):
        refuse_second_derivatives()
        own, passed = list(grads[:3]), grads[3:]
        if ctx.order is not None:
            back = inverse(ctx.order)
            own = [None if g is None else permuted(g, back, min(1, g.dim() - 1)) for g in own]
        sizes = [count for _, _, count in ctx.pieces]
        slices = [[None] * len(sizes) if g is None else g.split(sizes, min(1, g.dim() - 1)) for g in own]
        results = []
        for i, rest in enumerate(passed):
            part, which = divmod(i, 3)
            mine = [grad for piece, grad in zip(ctx.pieces, slices[which], strict=True) if piece[0] == part]
            take, number = ctx.takes[part]
            needed = ctx.needs_input_grad[3 + i]
            results.append(take.gradient(which, number, mine, rest, ctx.likes[i]) if needed else None)
        return None, None, None, *results
