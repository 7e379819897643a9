"""Everything that depthwise convolution can do on load and on store, in plain PyTorch with ordinary gradients."""

import torch
import torch.nn.functional as F

from fastcnn.ops.conv_layout import padded_reference


def forward(x, weight, bias, size, stride, padding, dilation, pending=None, shuffle=1):
    """y, in the dtype of x."""
    z = x if pending is None else pending.reference(x)
    z = z if shuffle == 1 else F.channel_shuffle(z, shuffle)
    return padded_reference(z, weight, bias, size, stride, padding, dilation, x.shape[1])


def backward(
    grad_output, x, weight, size, stride, padding, dilation, dtype, *, correction=None, gated=None, pending=None,
    shuffle=1, add=None,
):  # fmt: skip
    """(grad_input, grad_weight, grad_bias, sums [2, C] or None), computed in dtype."""
    wide = lambda t: None if t is None else t.to(dtype)
    g = wide(grad_output)
    if gated is not None:
        g = gated.reference(g)
    if correction is not None:
        g = correction.reference(g)
    w = wide(weight).detach().requires_grad_()
    b = w.new_zeros(w.shape[0], requires_grad=True)
    u = wide(x).detach().requires_grad_()
    act = None
    if pending is not None:
        scale, shift = wide(pending.scale).view(1, -1, 1, 1), wide(pending.shift).view(1, -1, 1, 1)
        u = (wide(x) * scale + shift).detach().requires_grad_()
        one, zero = torch.ones_like(pending.scale), torch.zeros_like(pending.shift)
        act = pending._replace(scale=one, shift=zero)
    with torch.enable_grad():
        y = forward(u, w, b, size, stride, padding, dilation, act, shuffle)
        du, dw, db = torch.autograd.grad(y, (u, w, b), g)
    sums = None
    if pending is not None:
        sums = torch.stack([(du * wide(x)).sum((0, 2, 3)), du.sum((0, 2, 3))])
        du = du * scale if pending.scaled else du
    return du if add is None else du + wide(add), dw, db, sums
