"""Batch norm with the statistics of all processes of a group: y = f(z) as in batch_norm, whose kernels it runs.

Forward: each process reduces its batch to a record [4, C] (batch_norm_passes), the records are gathered and merged in
the order of the ranks. Backward: the sums of dz and of dz * xhat are added up over the processes; the gradients of
weight and bias are those of the own batch, as DistributedDataParallel wants them. Batches may differ in size, and one
may be empty. Saved for backward: as batch_norm, and the number of rows of all batches.
Torch counterpart: torch.nn.SyncBatchNorm in training; this one takes CPU tensors, too. Source: Ioffe and Szegedy 2015.
"""

import torch
import torch.distributed as dist

from fastcnn.ops import batch_norm as bn
from fastcnn.ops import batch_norm_passes as passes
from fastcnn.ops import common


class _Sum(torch.autograd.Function):
    """Sum over the processes; so is its gradient, whose derivative is one again."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, ctx.group), None


def sync_batch_norm_reference(x, weight, bias, eps, group):
    """(y, mean, biased variance, rows of all batches) in plain PyTorch, differentiable."""
    dims = [d for d in range(x.dim()) if d != 1]
    wide = x.to(passes.statistics_dtype(x))
    total = lambda t: _Sum.apply(t, group)
    rows = total(wide.new_tensor(float(x.numel() // x.shape[1])))
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean = total(wide.sum(dims)) / rows
    centred = wide - mean.view(shape)
    var = total(centred.square().sum(dims)) / rows
    y = centred * torch.rsqrt(var + eps).view(shape)
    y = y if weight is None else y * weight.view(shape)
    y = y if bias is None else y + bias.view(shape)
    return y.to(x.dtype), mean.detach(), var.detach(), rows


def _record(x, backend):
    """[4, C] of this process's batch; zeros of an empty one."""
    dtype = torch.float64 if backend == "cpu" else passes.statistics_dtype(x)
    record = torch.zeros((4, passes.channels(x)), dtype=dtype, device=x.device)
    if x.numel() == 0:
        return record
    x, _, view, C = bn.as_views(x, None)
    if backend == "cpu":
        mean, invstd = x.new_empty(C), x.new_empty(C)
        passes.run_on_cpu(
            "forward", view, C, (x, None), (None,), None, (None, None, mean, invstd, None, None),
            record.numpy(), True, 0.0, 1.0, *passes.BOUNDS[None],
        )  # fmt: skip
        return record
    with common.device_guard(x):
        return passes.merge_to_record(passes.strip_records(x, view))


def _gathered(record, group):
    records = record.new_empty((dist.get_world_size(group), *record.shape))
    dist.all_gather(list(records.unbind(0)), record, group=group)
    # everything is measured from the first record's pivot: an empty batch has none
    return records[(records[:, 0, 0] == 0).to(torch.int8).argsort(stable=True)]


def _merge(records, mean, invstd, running_mean, running_var, momentum, eps, backend):
    if backend != "cpu":
        with common.device_guard(records):
            passes.merge(records, mean, invstd, running_mean, running_var, momentum, eps)
        return
    count, pivot, distance, squares = records.unbind(1)
    distance = distance + (pivot - pivot[0])
    rows, s1 = count.sum(0), (count * distance).sum(0)
    squares = ((squares + count * distance**2).sum(0) - s1**2 / rows).clamp(min=0)
    mean.copy_(pivot[0] + s1 / rows)
    invstd.copy_(torch.rsqrt(squares / rows + eps))
    if running_mean is not None:
        running_mean.lerp_((pivot[0] + s1 / rows).to(running_mean.dtype), momentum)
        running_var.lerp_((squares / (rows - 1)).to(running_var.dtype), momentum)


class SyncBatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, residual, running_mean, running_var, momentum, eps, activation, graph, group, backend
    ):  # fmt: skip
        records = _gathered(_record(x, backend), group)
        rows = records[:, 0].sum(0)
        need_mask = graph and residual is not None and activation in passes.MASKED
        y, mean, invstd, mask = bn.allocate_forward(x, need_mask)
        _merge(records, mean, invstd, running_mean, running_var, momentum, eps, backend)
        if x.numel() > 0:
            like_x, like_residual, view, C = bn.as_views(x, residual)
            affine = passes.Affine(mean, invstd, weight, bias, True, eps)
            into = mask if need_mask else None
            if backend == "cpu":
                passes.run_on_cpu(
                    "forward", view, C, (like_x, like_residual), (y,), into, (*affine.on_cpu(), None, None),
                    passes.no_record(), False, 0.0, eps, *passes.BOUNDS[activation],
                )  # fmt: skip
            else:
                with common.device_guard(x):
                    passes.apply(like_x, like_residual, y, into, view, affine, activation)
        bn.save(ctx, (x, weight, bias, mean, invstd), residual, mask if need_mask else None, activation)
        ctx.rows, ctx.arguments = rows, (eps, activation, group, backend)
        return y

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, bias, mean, invstd, residual, mask = ctx.saved_tensors
        eps, activation, group, backend = ctx.arguments
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            grads = bn.differentiable_backward(
                lambda x, weight, bias: sync_batch_norm_reference(x, weight, bias, eps, group)[0],
                grad_output, x, weight, bias, residual, mask, activation, needs,
            )  # fmt: skip
        else:
            grads = _backward(
                grad_output, x, weight, bias, mean, invstd, residual, mask, ctx.rows, eps, activation, needs, group,
                backend,
            )  # fmt: skip
        grads = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return *bn.restrided(ctx, grads), *[None] * 8


def _backward(
    grad_output, x, weight, bias, mean, invstd, residual, mask, rows, eps, activation, needs, group, backend
):  # fmt: skip
    need_input, need_weight, need_bias, need_residual = needs
    passes_on = need_residual and activation is None
    grads = bn.allocate_backward(x, weight, need_input, need_weight or need_bias, need_residual and not passes_on)
    grad_input, grad_weight, grad_bias, grad_residual = (g if g.numel() > 0 else None for g in grads)
    affine = passes.Affine(mean, invstd, weight, bias, True, eps)
    sums = torch.zeros((2, passes.channels(x)), dtype=torch.float64 if backend == "cpu" else mean.dtype).to(x.device)
    grad = grad_output.contiguous(memory_format=passes.memory_format(x))
    x, residual, view, C = bn.as_views(x, residual)
    run = lambda outputs, reduce, sums: passes.run_on_cpu(
        "backward", view, C, (grad, x), outputs, mask, affine.on_cpu(),
        sums.numpy(), reduce, True, 1.0, *passes.BOUNDS[activation],
    )  # fmt: skip
    if x.numel() > 0:
        if backend == "cpu":
            run((None, None), True, sums)
        else:
            with common.device_guard(x):
                sums = passes.backward_sums(grad, x, residual, mask, view, affine, activation, None, None)
    if grad_weight is not None:
        grad_bias.copy_(sums[0])
        grad_weight.copy_(sums[1])
    if need_input:
        dist.all_reduce(sums, group=group)
        sums /= rows
    if x.numel() > 0:
        if backend == "cpu":
            run((grad_input, grad_residual), False, sums)
        else:
            with common.device_guard(x):
                passes.backward_apply(
                    grad, x, residual, mask, grad_input, grad_residual, view, affine, activation, sums, 1
                )  # fmt: skip
    return *grads[:3], grad_output if passes_on else grads[3]


@torch.compiler.disable
def sync_batch_norm(
    input, running_mean, running_var, weight=None, bias=None, momentum=0.1, eps=1e-5, group=None, *, activation=None,
    residual=None,
):  # fmt: skip
    """Batch norm in training over the batches of all processes of a group; every one of them has to call it.

    Args:
        input: [N, C, ...] of this process; N may differ between processes and be 0.
        group: torch.distributed process group; None is all processes.
        others: as in fastcnn.functional.batch_norm. torch.compile leaves this function alone.

    Raises:
        TypeError, ValueError: as fastcnn.functional.batch_norm.
    """
    bn.check(input, running_mean, running_var, weight, bias, True, momentum, eps, alone=False)
    bn.check_fused(input, activation, residual)
    parameters = (weight, bias, running_mean, running_var)
    backend = bn._op.route(input, lambda backend: bn.cannot(backend, input, parameters, activation))
    if backend == "torch":
        y, mean, var, rows = sync_batch_norm_reference(input, weight, bias, eps, group)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * rows / (rows - 1)).to(running_var.dtype), momentum)
        return bn.finished(y, activation, residual)
    tensors = (input, weight, bias, residual)
    graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return SyncBatchNormFunction.apply(
        input, weight, bias, residual, running_mean, running_var, float(momentum), float(eps), activation, graph,
        group, backend,
    )  # fmt: skip
