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
    """grad_output * a + b * y + c per channel, applied while grad_output is loaded.

    It is the gradient of the convolution's output y [N, K, P, Q] where grad_output is that of y * scale + shift: a is
    the scale, and b and c are what the gradients of scale and shift come to through the statistics of the batch.
    a, b, c [K]: fp32 (fp64 with fp64 tensors).
    """

    y: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor

    def reference(self, grad_output):
        """The same in plain PyTorch, in the dtype of grad_output."""
        a, b, c = (t.to(grad_output.dtype).view(1, -1, 1, 1) for t in self[1:])
        return grad_output * a + (b * self.y.to(grad_output.dtype) + c)
