"""The passes of pending.py on CPU, in numba: every tensor is read once and nothing between the steps is stored.

Formulas, arguments and results are pending.py's. What is None is an empty array to the kernels.
"""

import numpy as np
import torch

from fastcnn.ops import batch_norm_passes, common, huge_pages
from fastcnn.ops.conv2d import suggests_channels_last

# elements; PyTorch's passes over fewer take less time than the call of a kernel
SMALLEST = 2**13
SMALLEST_FORWARD = 2**17  # whose passes are few
KINDS = ("none", "relu", "relu6", "leaky_relu", "sigmoid", "silu", "hardswish")  # as the kernels number them


def can(x, activation="none"):
    """Whether the passes over x run here; else in PyTorch."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() >= SMALLEST
        and activation in KINDS
    )


def can_forward(x, activation):
    """Whether z of x is made here."""
    return x.numel() >= SMALLEST_FORWARD and can(x, activation)


class _Pass:
    """What a pass over tensors like this one needs beside them."""

    def __init__(self, like):
        self.layout = torch.channels_last if suggests_channels_last(like) else torch.contiguous_format
        n, c, h, w = like.shape
        self.where = (self.layout == torch.channels_last or h * w == 1, n, c)
        self.like = like
        self.empty = np.empty(0, like.detach().numpy().dtype)
        common.cpu_threads(like.numel())

    def new(self):
        """A tensor for results."""
        return huge_pages.advise(torch.empty_like(self.like, memory_format=self.layout))

    def flat(self, tensor):
        """The elements in the order of this layout."""
        if tensor is None:
            return self.empty
        tensor = tensor.detach().contiguous(memory_format=self.layout)
        return tensor.as_strided((tensor.numel(),), (1,)).numpy()

    def vector(self, vector):
        """A value per channel, and a gate's [N, C] or [N, 1] as N * C."""
        if vector is None:
            return self.empty
        if vector.dim() == 2:
            vector = vector.expand(self.where[1:])
        return vector.detach().to(self.like.dtype).contiguous().view(-1).numpy()


def pending_forward(x, scale, shift, activation, slope, gate, right, right_scale, right_shift, out):
    """z, in the layout of x."""
    from fastcnn.kernels.cpu import pending as kernels

    over = _Pass(x)
    z = over.new()
    kernels.forward(
        over.flat(x), over.vector(scale), over.vector(shift), KINDS.index(activation), slope, over.vector(gate),
        over.flat(right), over.vector(right_scale), over.vector(right_shift), out == "relu", *over.where, over.flat(z),
    )  # fmt: skip
    return z


def pending_backward(
    grad_output, add, x, scale, shift, activation, slope, gate, join, right, right_scale, z, out, need_gate, scaled,
    overwrite,
):  # fmt: skip
    """(grad_x, sums, grad_right, right_sums, grad_gate); overwrite: grad_x may take the memory of grad_output."""
    from fastcnn.kernels.cpu import pending as kernels

    over = _Pass(grad_output if x is None else x)
    empty = over.like.new_empty(0)
    scaled = scaled and scale is not None
    given = grad_output.contiguous(memory_format=over.layout)
    # neither what is grad_output as it came is written, nor what both sides share
    dm_is_new = out != "none" or (join and add is not None)
    du_is_dm = gate is None and activation == "none" and not scaled and (join or add is None)
    written = written_right = None
    grad_x = grad_right = given
    if dm_is_new or not du_is_dm:
        free = (overwrite or given is not grad_output) and (dm_is_new or not join)
        grad_x = written = given if free else over.new()
        if du_is_dm:
            grad_right = grad_x
        elif join and dm_is_new:
            grad_right = written_right = over.new()
    sums, right_sums = (np.zeros((2, over.where[2] if v is not None else 0)) for v in (scale, right_scale))
    grad_gate = np.zeros(over.where[1] * over.where[2] if need_gate else 0)
    kernels.backward(
        over.flat(given), over.flat(add), over.flat(x), over.vector(scale), over.vector(shift), KINDS.index(activation),
        slope, over.vector(gate), join, over.flat(right if right_scale is not None else None), right_scale is not None,
        over.flat(z if out != "none" else None), scaled, *over.where,
        over.flat(written), over.flat(written_right), sums, right_sums, grad_gate,
    )  # fmt: skip
    of_sums = lambda total, there: torch.from_numpy(total).to(over.like.dtype) if there else empty
    if need_gate:
        grad_gate = torch.from_numpy(grad_gate).view(over.where[1:])
        grad_gate = (grad_gate.sum(1, keepdim=True) if gate.shape[1] == 1 else grad_gate).to(gate.dtype)
    return (
        grad_x,
        of_sums(sums, scale is not None),
        grad_right if join else empty,
        of_sums(right_sums, right_scale is not None),
        grad_gate if need_gate else empty,
    )


def sums(grad, tensor):
    """[2, C]: the sums of grad * tensor and of grad over everything but the channels."""
    unit = grad.new_ones(grad.shape[1])
    return pending_backward(
        grad, None, tensor, unit, unit, "none", 0.0, None, False, None, None, None, "none", False, False, False
    )[1]


def corrected(grad_output, y, a, b, c):
    """grad_output * a + b * y + c per channel."""
    from fastcnn.kernels.cpu import pending as kernels

    over = _Pass(y)
    dy = over.new()
    kernels.correct(
        over.flat(grad_output), over.flat(y), over.vector(a), over.vector(b), over.vector(c), *over.where, over.flat(dy)
    )
    return dy


def statistics(x):
    """(mean, biased variance) per channel."""
    over = _Pass(x)
    c = over.where[2]
    record = torch.empty(4, c, dtype=torch.float64)
    mean, invstd = x.new_empty(c), x.new_empty(c)
    batch_norm_passes.run_on_cpu(
        "forward", batch_norm_passes.view_of(x.shape, over.layout), c,
        (x.contiguous(memory_format=over.layout), None), (None,), None, (None, None, mean, invstd, None, None),
        record.numpy(), True, 0.0, 1.0, *batch_norm_passes.BOUNDS[None],
    )  # fmt: skip
    return mean, (record[3] / record[0]).to(x.dtype)
