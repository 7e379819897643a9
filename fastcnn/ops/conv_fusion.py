"""What a convolution can do on load and on store; the fused chain is built of it (architecture.md, section 4).

A normalised activation is never written: batch norm leaves per-channel vectors, and whoever reads the raw output y
applies them while loading. These are the plain data that say so; None means off and costs nothing.
"""

from typing import NamedTuple

import torch

from fastcnn.ops import common
from fastcnn.ops.activation import activation_reference


class Pending(NamedTuple):
    """z = act(u), u = x * scale + shift per channel, applied while x is loaded; padding is zero after it.

    scale, shift [C]: fp32 (fp64 with fp64 tensors). activation: "none", or a name of fastcnn.ops.activation. scaled:
    whether the gradient of x is stored, else that of u: then whoever made x multiplies by the scale (Correction.a).
    gate [N, C]: multiplies act(u); forward and gradient of the weight of dense convolutions know it, and nobody else.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    activation: str = "none"
    slope: float = 0.0
    scaled: bool = True
    gate: torch.Tensor | None = None

    @property
    def compiled(self):
        """What of it kernels are compiled for."""
        return self.activation, self.slope, self.scaled, self.gate is not None

    def reference(self, x):
        """The same in plain PyTorch, in the dtype of x."""
        z = x * self.scale.to(x.dtype).view(1, -1, 1, 1) + self.shift.to(x.dtype).view(1, -1, 1, 1)
        z = z if self.activation == "none" else activation_reference(z, self.activation, self.slope)
        return z if self.gate is None else z * self.gate.to(x.dtype)[:, :, None, None]


class Correction(NamedTuple):
    """grad_output * a + b * y + c per channel, applied while grad_output is loaded.

    It is the gradient of the convolution's output y [N, K, P, Q] where grad_output is that of y * scale + shift: a is
    the scale, and b and c are what the gradients of scale and shift come to through the statistics of the batch.
    a, b, c [K]: fp32 (fp64 with fp64 tensors). Where the statistics were constants, y, b and c are None: not zeros,
    whose product with an Inf is NaN.
    """

    y: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor | None
    c: torch.Tensor | None

    def beside(self, grad_output):
        """(grad_output, this correction) with the strides of one for both, which kernels read at the same places."""
        if self.y is None or self.y.stride() == grad_output.stride():
            return grad_output, self
        if common.is_dense(grad_output):
            return grad_output, self._replace(y=common.with_strides_of(self.y, grad_output))
        y = self.y if common.is_dense(self.y) else self.y.contiguous()
        return common.with_strides_of(grad_output, y), self._replace(y=y)

    def reference(self, grad_output):
        """The same in plain PyTorch, in the dtype of grad_output."""
        a, b, c = (None if t is None else t.to(grad_output.dtype).view(1, -1, 1, 1) for t in self[1:])
        corrected = grad_output * a
        return corrected if self.y is None else corrected + (b * self.y.to(grad_output.dtype) + c)


class Gated(NamedTuple):
    """du = (grad_output * gate + add) * act'(u), u = y * scale + shift, applied while grad_output is loaded.

    It is how backward goes through z = act(u) * gate, whose gradient grad_output is, and through the mean of act(u)
    over each image, of which squeeze-excite makes the gate: add is that mean's gradient over P * Q.
    y [N, K, P, Q]: the convolution's output, the very tensor of a Correction that follows, if that has one. gate, add
    [N, K], scale, shift [K]: fp32 (fp64 with fp64 tensors). activation, slope: as of Pending.
    """

    y: torch.Tensor
    gate: torch.Tensor
    add: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    activation: str = "none"
    slope: float = 0.0

    def reference(self, grad_output):
        """The same in plain PyTorch, in the dtype of grad_output."""
        wide = lambda t: t.to(grad_output.dtype)
        with torch.enable_grad():
            u = wide(self.y) * wide(self.scale).view(1, -1, 1, 1) + wide(self.shift).view(1, -1, 1, 1)
            u = u.detach().requires_grad_()
            f = u * 1 if self.activation == "none" else activation_reference(u, self.activation, self.slope)
            grad = grad_output * wide(self.gate)[:, :, None, None] + wide(self.add)[:, :, None, None]
            return torch.autograd.grad(f, u, grad)[0]


class GatedAhead:
    """Where squeeze-excite leaves its Gated for the convolution that made y, which applies it on load.

    That convolution's gradient of y is then of y's other readers alone, None where there are none: whatever autograd
    adds up there stays right.
    """

    def __init__(self):
        self._left = None

    @staticmethod
    def of_tensors(y, scale, shift):
        """That of the convolution which returned these tensors, or None."""
        made_by = y.grad_fn
        same = made_by is not None and scale.grad_fn is made_by and shift.grad_fn is made_by
        return getattr(made_by, "gated", None) if same else None

    def leave(self, grad_output, gated):
        """To be taken in the backward that runs now."""
        self._left = torch._C._current_graph_task_id(), grad_output, gated

    def take(self, grad_output):
        """(grad_output or None, Gated or None) of the backward that runs now; grad_output: of the other readers."""
        left, self._left = self._left, None
        if left is None or left[0] != torch._C._current_graph_task_id():
            return grad_output, None
        _, dz, gated = left
        if grad_output is None:
            return dz, gated
        return grad_output + gated.reference(dz.to(gated.scale.dtype)).to(grad_output.dtype), None


class Join(NamedTuple):
    """output = act(left + right), a residual join, whose gradient dgrad stores in place of its own: it is both sides'.

    dm = dz, or where output was a relu's dz wherever output > 0 (or NaN), and the sums of dm * left and of dm.
    output: the relu's output, or None where the join has no activation. left: a raw tensor, of which the join took an
    affine map per channel; both [N, C, H, W].
    """

    output: torch.Tensor | None
    left: torch.Tensor

    @property
    def activation(self):
        """What the kernels call it."""
        return "none" if self.output is None else "relu"

    def reference(self, grad):
        """(dm, sum of dm * left, sum of dm) in plain PyTorch, in the dtype of grad."""
        if self.output is not None:
            grad = torch.where(self.output <= 0, 0.0, grad)
        return grad, (grad * self.left.to(grad.dtype)).sum((0, 2, 3)), grad.sum((0, 2, 3))
