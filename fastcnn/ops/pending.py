"""Passes over pending activations: what the chain computes where no convolution or pool does it on load or on store.

One formula covers a pending activation, squeeze-excite's gate, drop-path and the residual join:

    z = out(f(x * scale + shift) * gate + (right * right_scale + right_shift))

x, right, z [N, C, H, W]; scale, shift, right_scale, right_shift [C] in fp32 (fp64 for fp64); gate [N, C] or [N, 1], in
x's dtype; f an activation of fastcnn.ops.activation or "none"; out "relu" or "none". What is None is left out.
Saved for backward: what is there of x, the vectors, gate, right (only with right_scale), z (only where out is "relu").
Torch counterpart: none; `pending_reference` is the formula in plain PyTorch.

The gradient that goes with x is the one at u = x * scale + shift, not multiplied by scale: a join's gradient then
serves both of its sides, and whoever made x multiplies while loading it (conv_fusion.Correction). The same holds for
right, if it has a scale. The gradients of scale and shift are those at fixed x: the sums of du * x and of du.
"""

from typing import NamedTuple

import torch

from fastcnn.ops import batch_norm_passes, common
from fastcnn.ops.activation import activation_reference


class Expression(NamedTuple):
    """The tensors and the names of the formula above."""

    x: torch.Tensor
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    activation: str = "none"
    slope: float = 0.0  # of leaky_relu
    gate: torch.Tensor | None = None
    right: torch.Tensor | None = None
    right_scale: torch.Tensor | None = None
    right_shift: torch.Tensor | None = None
    out: str = "none"

    @property
    def is_plain(self):
        """Whether it is x itself."""
        return self.scale is None and self.activation == "none" and self.gate is None and self.right is None

    @property
    def is_join(self):
        """Whether it has two sides."""
        return self.right is not None

    @property
    def is_sum(self):
        """Whether its left side is x as it is."""
        return self.is_join and self.scale is None and self.activation == "none" and self.gate is None


def vector_dtype(x):
    """The dtype of vectors that go with x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(vector, like):
    return vector.to(like.dtype).view(1, -1, 1, 1)


def _per_image(gate, like):
    return gate.to(like.dtype)[:, :, None, None]


def _affine(x, scale, shift):
    return x if scale is None else x * _per_channel(scale, x) + _per_channel(shift, x)


def _activated(u, activation, slope):
    return u if activation == "none" else activation_reference(u, activation, slope)


def pending_reference(expression):
    """z in plain PyTorch, in the dtype of x, with ordinary gradients."""
    e = expression
    z = _activated(_affine(e.x, e.scale, e.shift), e.activation, e.slope)
    z = z if e.gate is None else z * _per_image(e.gate, z)
    z = z if e.right is None else z + _affine(e.right, e.right_scale, e.right_shift)
    return _activated(z, e.out, 0.0)


def _wide(tensor):
    """The tensor in the dtype its kernels compute in."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def pending_forward(x, scale, shift, activation, slope, gate, right, right_scale, right_shift, out, backend):
    """z, in the layout of x."""
    e = Expression(_wide(x), scale, shift, activation, slope, gate, right, right_scale, right_shift, out)
    e = e if right is None else e._replace(right=_wide(right))
    return pending_reference(e).to(x.dtype).contiguous(memory_format=batch_norm_passes.memory_format(x))


def pending_backward(
    grad_output, add, x, scale, shift, activation, slope, gate, join, right, right_scale, z, out, need_gate, scaled,
    backend,
):  # fmt: skip
    """Everything that the gradient of z gives.

    Args:
        grad_output: of z.
        add: a further gradient, or None: of z in a join, of u (scaled: of x) else. The sums do not contain the latter.
        join: whether there is a right side.
        x: None where no part of the left side but x itself is there. right: needed with right_scale; z: where out is "relu".
        scaled: whether grad_x is multiplied by scale, as the true gradient is.

    Returns:
        (grad_x, sums [2, C], grad_right, right_sums [2, C], grad_gate). sums: of du * x and of du; right_sums: of
        dm * right and of dm, where dm is the gradient of the sum before `out`, and grad_right too. grad_right is
        grad_x itself where they are equal. Empty: sums without scale, what belongs to a side that is not there, and
        grad_gate unless need_gate.
    """
    like = grad_output if x is None else x
    empty = like.new_empty(0)
    grad, wide = _wide(grad_output), None if x is None else _wide(x)
    dm = grad if add is None or not join else grad + _wide(add)
    dm = dm if out == "none" else torch.where(z <= 0, 0.0, dm)
    grad_gate, du = empty, dm
    u = None if x is None else _affine(wide, scale, shift)
    if gate is not None:
        if need_gate:
            grad_gate = (dm * _activated(u, activation, slope)).sum((2, 3))
            grad_gate = grad_gate.sum(1, keepdim=True) if gate.shape[1] == 1 else grad_gate
            grad_gate = grad_gate.to(gate.dtype)
        du = dm * _per_image(gate, dm)
    if activation != "none":
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            (du,) = torch.autograd.grad(_activated(u, activation, slope), u, du)
    sums = right_sums = empty
    if scale is not None:
        sums = _sums(du, wide)
    if right_scale is not None:
        right_sums = _sums(dm, _wide(right))
    grad_x = du if not scaled or scale is None else du * _per_channel(scale, du)
    if add is not None and not join:
        grad_x = grad_x + _wide(add)
    same = grad_x is dm
    layout = batch_norm_passes.memory_format(like)
    narrow = lambda t: t.to(like.dtype).contiguous(memory_format=layout)
    grad_x = narrow(grad_x)
    grad_right = empty if not join else grad_x if same else narrow(dm)
    return grad_x, sums, grad_right, right_sums, grad_gate


def _sums(grad, tensor):
    return torch.stack([(grad * tensor).sum((0, 2, 3)), grad.sum((0, 2, 3))])


def sums(grad, tensor, backend):
    """[2, C]: the sums of grad * tensor and of grad over everything but the channels."""
    return _sums(_wide(grad), _wide(tensor))


def corrected(grad_output, y, a, b, c, backend):
    """grad_output * a + b * y + c per channel: the gradient of y, whose statistics batch norm used."""
    grad, wide = _wide(grad_output), _wide(y)
    result = grad * _per_channel(a, grad) + _per_channel(b, grad) * wide + _per_channel(c, grad)
    return result.to(y.dtype).contiguous(memory_format=batch_norm_passes.memory_format(y))


def statistics(x, backend):
    """(mean, biased variance) per channel of x [N, C, H, W], in fp32 (fp64 for fp64)."""
    var, mean = torch.var_mean(_wide(x), (0, 2, 3), correction=0)
    return mean, var
