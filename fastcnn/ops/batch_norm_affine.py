"""Batch norm as two vectors: u = x * scale + shift, scale = weight / sqrt(var + eps), shift = bias - mean * scale.

Vectors [C] in fp32 (fp64 for fp64) beside the tensor x, which nobody reads or writes here. Saved for backward: mean and
1 / sqrt(var + eps). The backward of batch norm is affine in x, too: grad_x = a * du + b * x + c, where du is the
gradient of u. Source: Ioffe and Szegedy 2015.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from fastcnn.ops import batch_norm_passes, common, conv_sums

BLOCK = 256  # channels per program


class Running(NamedTuple):
    """The running statistics and how a batch moves them: running += momentum * (batch - running)."""

    mean: torch.Tensor | None = None
    var: torch.Tensor | None = None  # unbiased
    offset: torch.Tensor | None = None  # what the batch's mean lacks: a convolution's bias
    rows: int | torch.Tensor = 1  # elements per channel
    momentum: float = 0.0
    batches: torch.Tensor | None = None  # int64: how many there were, to which this one is added

    def fits_kernels(self, like):
        """Whether the kernels that make vectors like this one can move these statistics."""
        contiguous = self.mean is None or (self.mean.is_contiguous() and self.var.is_contiguous())
        return contiguous and (self.batches is None or self.batches.device == like.device)

    def in_kernels(self):
        """(mean, var, offset, batches), (momentum and what its rounding took), as kernels take them."""
        offset = self.offset if self.mean is not None else None
        offset = None if offset is None else offset.contiguous()
        return (self.mean, self.var, offset, self.batches), batch_norm_passes.two_floats(self.momentum)

    def changed(self):
        """Tell autograd that a kernel moved them."""
        written = [t for t in (self.mean, self.var, self.batches) if t is not None]
        if written:
            torch.autograd.graph.increment_version(written)


def affine(mean, var, weight, bias, eps, backend="torch", running=None):
    """(scale, shift, 1 / sqrt(var + eps)); weight and bias may be None. Moves what there is of running, a Running."""
    running = Running() if running is None else running
    if backend == "triton" and running.fits_kernels(mean):
        return _affine(mean, var, weight, bias, eps, running)
    invstd = torch.rsqrt(var + eps)
    scale = invstd if weight is None else weight.to(invstd.dtype) * invstd
    shift = -mean * scale if bias is None else torch.addcmul(bias.to(invstd.dtype), mean, scale, value=-1)
    if running.mean is not None:
        batch = mean if running.offset is None else mean + running.offset.to(mean.dtype)
        running.mean.lerp_(batch.to(running.mean.dtype), running.momentum)
        unbiased = var * (running.rows / (running.rows - 1))
        running.var.lerp_(unbiased.to(running.var.dtype), running.momentum)
    if running.batches is not None:
        running.batches.add_(1)
    return scale, shift, invstd


def affine_backward(grad_scale, grad_shift, mean, invstd, weight, rows, training, group, backend="torch"):
    """Gradients from those of scale (sum of du * x) and shift (sum of du).

    Args:
        grad_scale, grad_shift: [C]; in backend "triton" without a group also [S, C], in parts to be added up.
        rows: elements per channel; with a group, of the batches of all its processes.
        training: whether mean and var were those of the batch: else grad_x = a * du.

    Returns:
        (a, b, c, grad_weight, grad_bias), the latter two of this process's batch; b and c None without training.
    """
    if backend == "triton" and group is None:
        return _affine_backward(grad_scale, grad_shift, mean, invstd, weight, rows, training)
    scale = invstd if weight is None else weight.to(invstd.dtype) * invstd
    grad_bias = grad_shift
    grad_weight = (grad_scale - mean * grad_shift) * invstd
    if not training:
        return scale, None, None, grad_weight, grad_bias
    total_weight, total_bias = grad_weight, grad_bias
    if group is not None:
        total = torch.stack([grad_weight, grad_bias])
        dist.all_reduce(total, group=group)
        total_weight, total_bias = total
    b = -scale * invstd * total_weight / rows
    c = -scale * total_bias / rows - b * mean
    return scale, b, c, grad_weight, grad_bias


class Ahead:
    """The backward of one batch norm, for who takes the sums: it runs in the launch that adds up their parts.

    Autograd then carries the two sums to the batch norm, which finds the rest done if it gets these very tensors: where
    a second reader's were added, or a hook wrote to them, it does not. Triton, without a group.
    """

    def __init__(self, mean, invstd, weight, rows, training):
        self.of = mean, invstd, weight, rows, training
        self.done = None

    @staticmethod
    def of_vectors(scale, shift):
        """That of the batch norm which returned these vectors, or None."""
        made_by = None if scale is None else scale.grad_fn
        return getattr(made_by, "ahead", None) if made_by is not None and shift.grad_fn is made_by else None

    def take(self, parts):
        """(sum of du * x, sum of du) [C] of both sums in parts [S, 2, C]."""
        sums = tuple(torch.empty_like(self.of[0]) for _ in range(2))
        result = _affine_backward(*parts.unbind(1), *self.of, sums)
        self.done = sums, self._state(sums), result
        return sums

    def result(self, grad_scale, grad_shift):
        """What affine_backward returns, or None if it is to be called."""
        done, self.done = self.done, None
        if done is None or done[0][0] is not grad_scale or done[0][1] is not grad_shift:
            return None
        return done[2] if self._state(done[0]) == done[1] else None

    @staticmethod
    def _state(sums):
        # on another stream the vectors might not be there yet
        stream = torch.cuda.current_stream(sums[0].device) if sums[0].is_cuda else None
        return *(t._version for t in sums), stream


def gather_statistics(mean, var, rows, group):
    """(mean, var, rows) of the batches of all processes of the group, in the order of the ranks."""
    record = torch.cat([mean.new_tensor([float(rows)]), mean, var])
    records = record.new_empty((dist.get_world_size(group), record.numel()))
    dist.all_gather(list(records.unbind(0)), record, group=group)
    counts, (means, variances) = records[:, :1], records[:, 1:].view(len(records), 2, -1).unbind(1)
    total = counts.sum()
    # from the first process that has a batch: sums of large means would cancel
    pivot = means[counts[:, 0].argmax()]
    # an empty batch has no mean
    distances = torch.where(counts > 0, means - pivot, 0.0)
    shift = (counts * distances).sum(0) / total
    squares = torch.where(counts > 0, counts * (variances + (distances - shift) ** 2), 0.0)
    return pivot + shift, squares.sum(0) / total, total


# Triton


def _dense(*vectors):
    return [None if vector is None else vector.contiguous() for vector in vectors]


def _affine(mean, var, weight, bias, eps, running):
    from fastcnn.kernels.triton.batch_norm_affine import batch_norm_affine_kernel

    mean, var, weight, bias = _dense(mean, var, weight, bias)
    scale, shift, invstd = (torch.empty_like(mean) for _ in range(3))
    c = mean.numel()
    counted = isinstance(running.rows, torch.Tensor)  # of all processes
    moved, momentum = running.in_kernels()
    with common.device_guard(mean):
        batch_norm_affine_kernel[(-(-c // BLOCK),)](
            mean, var, weight, bias, scale, shift, invstd, *moved, running.rows if counted else None, c,
            0 if counted else running.rows, *momentum, EPS=eps, BLOCK=BLOCK,
        )  # fmt: skip
    running.changed()
    return scale, shift, invstd


def _affine_backward(grad_scale, grad_shift, mean, invstd, weight, rows, training, sums=(None, None)):
    """affine_backward; sums: where the parts' are written."""
    from fastcnn.kernels.triton.batch_norm_affine import batch_norm_affine_backward_kernel

    mean, invstd, weight = _dense(mean, invstd, weight)
    if grad_scale.dim() == 1:
        grad_scale, grad_shift = _dense(grad_scale, grad_shift)
    a = torch.empty_like(mean)
    b, c = (torch.empty_like(mean) if training else None for _ in range(2))
    grad_weight, grad_bias = (torch.empty_like(mean if weight is None else weight) for _ in range(2))
    channels = mean.numel()
    parts, how = parts_of(grad_scale)
    with common.device_guard(mean):
        batch_norm_affine_backward_kernel[(-(-channels // how["BLOCK"]),)](
            grad_scale, grad_shift, mean, invstd, weight, a, b, c, grad_weight, grad_bias, *sums, channels, rows,
            *parts,
            **how,
        )  # fmt: skip
    return a, b, c, grad_weight, grad_bias


def parts_of(vector):
    """(number of parts, their distance) of a vector [C] or [S, C], and how kernels that add them are launched."""
    if vector.dim() == 1:
        return (1, 0), dict(AT_ONCE=1, BLOCK=BLOCK)
    how = dict(AT_ONCE=conv_sums.AT_ONCE, BLOCK=conv_sums.COLUMNS, num_warps=conv_sums.WARPS)
    return (len(vector), vector.stride(0)), how
