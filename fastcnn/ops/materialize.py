"""z of an expression (pending.py) as a tensor, for readers that know no pending activations.

Saved for backward: as pending.py says; z itself only in a join with a ReLU, so whoever reads z may drop it.
"""

import torch

from fastcnn.ops import pending
from fastcnn.ops.conv_batch_norm import Inputs, refuse_second_derivatives


class MaterializeFunction(torch.autograd.Function):
    """(z, passed): passed is x again for the next reader, but None in a join."""

    @staticmethod
    def forward(
        ctx, x, scale, shift, activation, slope, gate, right, right_scale, right_shift, out, scaled, backend
    ):  # fmt: skip
        e = pending.Expression(x, scale, shift, activation, slope, gate, right, right_scale, right_shift, out)
        z = pending.pending_forward(*e, backend)
        ctx.save_for_backward(
            None if e.is_sum else x, scale, shift, gate, None if right_scale is None else right, right_scale,
            z if out != "none" else None,
        )  # fmt: skip
        ctx.form = (activation, slope, out, e.is_join, scaled)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return z, x if ctx.needs_input_grad[0] and not e.is_join else None

    @staticmethod
    def backward(ctx, grad_z, grad_passed):
        refuse_second_derivatives()
        if grad_z is None:
            return grad_passed, *[None] * 11
        inputs = Inputs(*ctx.saved_tensors, *ctx.form)
        grads = inputs.grads(grad_z, grad_passed, ctx.needs_input_grad[5], ctx.backend)
        grad_x, grad_scale, grad_shift, grad_gate, *right = grads
        return grad_x, grad_scale, grad_shift, None, None, grad_gate, *right, *[None] * 3
