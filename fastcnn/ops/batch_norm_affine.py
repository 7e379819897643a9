"""Batch norm as two vectors: u = x * scale + shift, scale = weight / sqrt(var + eps), shift = bias - mean * scale.

Vectors [C] in fp32 (fp64 for fp64) beside the tensor x, which nobody reads or writes here. Saved for backward: mean and
1 / sqrt(var + eps). The backward of batch norm is affine in x, too: grad_x = a * du + b * x + c, where du is the
gradient of u. Source: Ioffe and Szegedy 2015.
"""

import torch
import torch.distributed as dist


def affine(mean, var, weight, bias, eps):
    """(scale, shift, 1 / sqrt(var + eps)); weight and bias may be None."""
    invstd = torch.rsqrt(var + eps)
    scale = invstd if weight is None else weight.to(invstd.dtype) * invstd
    shift = -mean * scale if bias is None else torch.addcmul(bias.to(invstd.dtype), mean, scale, value=-1)
    return scale, shift, invstd


def update_running(running_mean, running_var, mean, var, offset, rows, momentum):
    """Move the running statistics towards the batch's, in place; offset: what mean lacks (a convolution's bias)."""
    if running_mean is None:
        return
    mean = mean if offset is None else mean + offset.to(mean.dtype)
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (rows / (rows - 1))).to(running_var.dtype), momentum)


def affine_backward(grad_scale, grad_shift, mean, invstd, weight, rows, training, group):
    """Gradients from those of scale (sum of du * x) and shift (sum of du).

    Args:
        rows: elements per channel; with a group, of the batches of all its processes.
        training: whether mean and var were those of the batch: else b = c = 0.

    Returns:
        (a, b, c, grad_weight, grad_bias), the latter two of this process's batch.
    """
    scale = invstd if weight is None else weight.to(invstd.dtype) * invstd
    grad_bias = grad_shift
    grad_weight = (grad_scale - mean * grad_shift) * invstd
    if not training:
        return scale, torch.zeros_like(scale), torch.zeros_like(scale), grad_weight, grad_bias
    total_weight, total_bias = grad_weight, grad_bias
    if group is not None:
        total = torch.stack([grad_weight, grad_bias])
        dist.all_reduce(total, group=group)
        total_weight, total_bias = total
    b = -scale * invstd * total_weight / rows
    c = -scale * total_bias / rows - b * mean
    return scale, b, c, grad_weight, grad_bias


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
