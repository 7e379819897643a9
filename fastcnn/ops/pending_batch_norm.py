"""Batch norm of a stored tensor as two vectors: x and (scale, shift), of which readers make x * scale + shift on load.

For what no convolution has just made, e.g. the sums of residual networks with pre-activation. Saved for backward: x.
Torch counterpart: torch.nn.functional.batch_norm. Source: Ioffe and Szegedy 2015.
"""

import torch

from fastcnn.ops import batch_norm_affine as bn
from fastcnn.ops import pending, pending_cpu
from fastcnn.ops.conv_batch_norm import check_rows, constant_statistics, refuse_second_derivatives


class PendingBatchNormFunction(torch.autograd.Function):
    """(raw, scale, shift, passed): raw and passed are x; raw's gradient is that before the scale, passed's x's."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, norm, backend):
        rows, running = x.numel() // x.shape[1], None
        if norm.training:
            running = bn.Running(running_mean, running_var, None, rows, norm.momentum, norm.batches)
            if norm.group is None:
                check_rows(x)
        if norm.training and pending_cpu.can_normalise(x, norm, running, backend):
            mean, scale, shift, invstd = pending_cpu.normalised(x, weight, bias, norm.eps, running)
        else:
            if norm.training:
                mean, var = pending.statistics(x, backend)
                if norm.group is not None:
                    mean, var, rows = bn.gather_statistics(mean, var, rows, norm.group)
                    running = running._replace(rows=rows)
            else:
                mean, var = constant_statistics(running_mean, running_var, pending.vector_dtype(x))
            scale, shift, invstd = bn.affine(mean, var, weight, bias, norm.eps, backend, running)
        ctx.save_for_backward(x if norm.training else None, weight, mean, invstd)
        ctx.arguments = (norm, rows, backend)
        ctx.set_materialize_grads(False)
        return x.detach(), scale, shift, x

    @staticmethod
    def backward(ctx, grad_raw, grad_scale, grad_shift, grad_passed):
        refuse_second_derivatives()
        if grad_raw is None:
            return grad_passed, *[None] * 6
        x, weight, mean, invstd = ctx.saved_tensors
        norm, rows, backend = ctx.arguments
        if ctx.needs_input_grad[0] and pending_cpu.can_go_back(x, norm, backend):
            grad_x, grad_weight, grad_bias = pending_cpu.normalised_backward(
                grad_raw, x, mean, invstd, weight, grad_scale, grad_shift
            )
        else:
            a, b, c, grad_weight, grad_bias = bn.affine_backward(
                grad_scale, grad_shift, mean, invstd, weight, rows, norm.training, norm.group, backend
            )
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = pending.corrected(grad_raw, x, a, b, c, backend)
        if grad_x is not None and grad_passed is not None:
            grad_x = grad_x.add_(grad_passed)
        grads = (
            grad if need else None
            for grad, need in zip((grad_weight, grad_bias), ctx.needs_input_grad[1:3], strict=True)
        )
        return grad_x, *grads, *[None] * 4
