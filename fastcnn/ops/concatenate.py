"""Concatenation along the channels of raw tensors that their makers have written side by side: no copies.

A Buffer stands for the concatenation before anything of it is computed: the first convolution that writes a slot of it
allocates it. raws [N, C_i, H, W] -> [N, sum C_i, H, W]; the gradients are slices of the result's. What does not lie in
its place is copied there. Saved for backward: nothing. Torch counterpart: torch.cat(dim=1). Source: Pleiss et al. 2017.
"""

import torch

from fastcnn.ops import conv_layout


class Buffer:
    """Memory of a concatenation of this many channels; one for each forward pass."""

    def __init__(self, channels):
        self.channels = channels
        self.memory = None

    def slot(self, offset):
        """Where the part lies that starts at this channel."""
        return Slot(self, offset)


class Slot:
    """A part of a Buffer."""

    def __init__(self, buffer, offset):
        self.buffer, self.offset = buffer, offset

    def tensor(self, like, channels, size, channels_last):
        """[N, channels, *size] of the batch, dtype and device of `like`; None where the parts do not fit together."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        shape = (like.shape[0], self.buffer.channels, *size)
        if self.buffer.memory is None:
            self.buffer.memory = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
        memory = self.buffer.memory
        fits = (
            (memory.shape, memory.dtype, memory.device) == (shape, like.dtype, like.device)
            and memory.is_contiguous(memory_format=layout)
            and self.offset + channels <= self.buffer.channels
        )
        # data: every part has a version counter of its own, or writing one would spoil those that are kept
        return memory[:, self.offset : self.offset + channels].data if fits else None

    def filled(self, tensor):
        """The tensor, in this part of the buffer where it fits."""
        slot = self.tensor(tensor, tensor.shape[1], tensor.shape[2:], conv_layout.suggests_channels_last(tensor))
        return tensor if slot is None else slot.copy_(tensor)


def concatenate_reference(*raws):
    """The same in plain PyTorch."""
    return torch.cat(raws, 1)


def side_by_side(raws):
    """The tensor whose parts these are in memory, or None."""
    first = raws[0]
    end = first.storage_offset()
    for raw in raws:
        if raw.stride() != first.stride() or raw.storage_offset() != end:
            return None
        if raw.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += raw.shape[1] * raw.stride(1)
    shape = (first.shape[0], sum(raw.shape[1] for raw in raws), *first.shape[2:])
    return first.data.as_strided(shape, first.stride(), first.storage_offset())


class ConcatenateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *raws):
        ctx.channels = [raw.shape[1] for raw in raws]
        ctx.set_materialize_grads(False)
        together = side_by_side(raws) if len(raws) > 1 else None
        return torch.cat(raws, 1) if together is None else together.data

    @staticmethod
    def backward(ctx, grad):
        return (None,) * len(ctx.channels) if grad is None else grad.split(ctx.channels, 1)
