"""What a convolution can do on load and on store; the fused chain is built of it (architecture.md, section 4).

A normalised activation is never written: batch norm leaves per-channel vectors, and whoever reads the raw output y
applies them while loading. These are the plain data that say so; None means off and costs nothing.
"""

from typing import NamedTuple

import torch

from fastcnn.ops.activation import activation_reference


class Pending(NamedTuple):
    """z = act(x * scale + shift) per channel, applied while x is loaded; padding is zero after it.

    scale, shift [C]: fp32 (fp64 with fp64 tensors). activation: "none", or a name of fastcnn.ops.activation.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    activation: str = "none"
    slope: float = 0.0

    def reference(self, x):
        """The same in plain PyTorch, in the dtype of x."""
        z = x * self.scale.to(x.dtype).view(1, -1, 1, 1) + self.shift.to(x.dtype).view(1, -1, 1, 1)
        return z if self.activation == "none" else activation_reference(z, self.activation, self.slope)


class Correction(NamedTuple):
    """grad_output + d1 + 2 * d2 * (y - pivot) per channel, applied while grad_output is loaded.

    It is the gradient of y where its sums about the pivot have the gradients d1 (of the sum of y - pivot) and d2 (of
    the sum of its square). y: the convolution's output [N, K, P, Q]; d1, d2, pivot [K], fp32 (fp64 with fp64 tensors).
    """

    y: torch.Tensor
    d1: torch.Tensor
    d2: torch.Tensor
    pivot: torch.Tensor

    def reference(self, grad_output):
        """The same in plain PyTorch, in the dtype of grad_output."""
        d1, d2, pivot = (t.to(grad_output.dtype).view(1, -1, 1, 1) for t in (self.d1, self.d2, self.pivot))
        return grad_output + d1 + 2 * d2 * (self.y.to(grad_output.dtype) - pivot)
