"""DropConnect: a linear layer or convolution with weight M * w / (1 - p); M drops each weight with probability p.

One mask M serves the whole batch, where the paper draws one per sample. Evaluation takes w itself, the mean of the
dropped weights, where the paper samples a normal approximation of y. The bias is never dropped. Saved for backward: x,
w and the seed; the dropped weights are computed again. The mask is dropout's (ops/dropout.py) of a tensor shaped as w.
Torch has no counterpart. Source: Wan, Zeiler, Zhang, LeCun and Fergus 2013.
"""

import torch
import torch.nn.functional as F

from fastcnn.backends import Op, current_backend
from fastcnn.ops import common, conv_layout, dropout
from fastcnn.ops import conv2d as conv
from fastcnn.ops import linear as lin

CPU_SMALLEST = 2**18  # weights; both take as long at half as many


def drop_connect_linear_reference(input, weight, bias, seed, p):
    """y for this seed (int64 tensor of one element) in plain PyTorch."""
    return F.linear(input, dropout.dropout_reference(weight, seed, p), bias)


def drop_connect_conv2d_reference(input, weight, bias, seed, p, stride=1, padding=0, dilation=1, groups=1):
    """y for this seed (int64 tensor of one element) in plain PyTorch."""
    return F.conv2d(input, dropout.dropout_reference(weight, seed, p), bias, stride, padding, dilation, groups)


def _why_not(backend, weight, product_why_not):
    if backend == "cpu" and current_backend() == "auto" and weight.numel() < CPU_SMALLEST:
        return f"PyTorch's dropout of fewer than {CPU_SMALLEST:,} weights is as fast on CPU"
    return product_why_not


def _dropped(weight, seed, p, backend):
    if backend != "cpu":
        return torch.ops.fastcnn.dropout(weight, seed, p, "triton")
    # numba has no 16-bit floats
    wide = weight.float() if weight.dtype.itemsize == 2 else weight
    return torch.ops.fastcnn.dropout(wide, seed, p, "cpu").to(weight.dtype)


def _is_matrix(input, weight):
    return tuple(input.shape[2:]) == (1, 1) and tuple(weight.shape[2:]) == (1, 1)


def _multiply(input, weight, bias, size, geometry, channels_last, switches):
    """The layer's product; on CPU PyTorch's."""
    if switches[-1] != "cpu":
        return conv.forward_op(input, weight, bias, size, *geometry, channels_last, *switches)
    if _is_matrix(input, weight):
        return F.linear(input.flatten(1), weight.flatten(1), bias)[:, :, None, None]
    stride, padding, dilation, groups = geometry
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _multiply_backward(grad_output, input, weight, needs, geometry, channels_last, switches):
    """Its gradients of input, weight and bias, None where not needed."""
    needs_input, needs_weight, needs_bias = needs
    grad_input = grad_weight = grad_bias = None
    if switches[-1] != "cpu":
        if needs_input:
            grad_input = conv.backward_input_op(
                grad_output, weight, None, input.shape[2:], *geometry, channels_last, *switches
            )
        if needs_weight:
            grad_weight = conv.backward_weight_op(grad_output, input, weight, *geometry, *switches)
        if needs_bias:
            grad_bias = conv.backward_bias_op(grad_output, switches[-1])
    elif _is_matrix(input, weight):
        dy = grad_output.flatten(1)
        if needs_input:
            grad_input = (dy @ weight.flatten(1))[:, :, None, None]
        if needs_weight:
            grad_weight = common.with_strides_of((dy.t() @ input.flatten(1))[:, :, None, None], weight)
        if needs_bias:
            grad_bias = dy.sum(0)
    else:
        stride, padding, dilation, groups = geometry
        grads = torch.ops.aten.convolution_backward(
            grad_output, input, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, list(needs)
        )
        grad_input, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
        if needs_weight:
            grad_weight = common.with_strides_of(grad_weight, weight)
    return grad_input, grad_weight, grad_bias


class DropConnectFunction(torch.autograd.Function):
    """On images; those of one pixel with filters of one tap are the rows of a linear layer."""

    @staticmethod
    def forward(ctx, input, weight, bias, seed, p, size, stride, padding, dilation, groups, tf32_switch, backend):
        ctx.save_for_backward(input, weight, bias, seed)
        ctx.p = p
        ctx.size, ctx.geometry = size, (stride, padding, dilation, groups)
        ctx.channels_last = conv_layout.suggests_channels_last(input) or conv_layout.suggests_channels_last(weight)
        ctx.switches = (tf32_switch, backend)
        weight = _dropped(weight, seed, p, backend)
        return _multiply(input, weight, bias, size, ctx.geometry, ctx.channels_last, ctx.switches)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, bias, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            factors = _dropped(torch.ones_like(weight), seed, ctx.p, ctx.switches[-1])
            grads = common.differentiable_grads(
                lambda x, w, b: conv_layout.padded_reference(x, w * factors, b, ctx.size, *ctx.geometry),
                (input, weight, bias), grad_output, needs,
            )  # fmt: skip
            return *grads, *[None] * 9
        dropped = _dropped(weight, seed, ctx.p, ctx.switches[-1])
        grad_input, grad_weight, grad_bias = _multiply_backward(
            grad_output, input, dropped, needs, ctx.geometry, ctx.channels_last, ctx.switches
        )
        if needs[1]:
            grad_weight = _dropped(grad_weight, seed, ctx.p, ctx.switches[-1])
        return grad_input, grad_weight, grad_bias, *[None] * 9


_ops = {
    name: Op(
        name,
        cpu_kernel=True,
        cpu_auto=True,
        why="our dropout of the weights under PyTorch's product: 2.7x for VGG's head, equal at 65,536 weights",
    )
    for name in ("drop_connect_linear", "drop_connect_conv2d")
}


def _route(name, input, weight, product_why_not):
    backend = _ops[name].route(input, lambda backend: _why_not(backend, weight, product_why_not(backend)))
    return conv.among_vendors(backend, input)


def drop_connect_linear(input, weight, bias=None, p=0.5, training=True):
    """linear with each element of weight zeroed with probability p and the others scaled by 1 / (1 - p).

    Args:
        input, weight, bias: as of linear.
        p: probability of dropping, between 0 and 1.
        training: False is linear itself.

    Returns:
        [..., out], as linear.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, its value and what is right.
    """
    lin.check_linear(input, weight, bias)
    dropout.check_p_and_flags(p, training=training)
    if not training or p == 0:
        return lin.linear(input, weight, bias)
    backend = _route("drop_connect_linear", input, weight, lambda backend: lin._why_not(backend, input, weight, bias))
    if backend == "torch":
        return F.linear(input, F.dropout(weight, p), bias)
    if bias is not None:
        bias = bias.to(conv.compute_dtype(bias)).expand(weight.shape[0])
    rows = input.to(conv.compute_dtype(input)).reshape(-1, weight.shape[1])[:, :, None, None]
    filters = weight.to(conv.compute_dtype(weight))[:, :, None, None]
    one = (1, 1)
    seed = dropout.draw_seed(weight)
    y = DropConnectFunction.apply(rows, filters, bias, seed, float(p), one, one, (0, 0), one, 1, "matmul", backend)
    return y.view(*input.shape[:-1], weight.shape[0])


def drop_connect_conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, p=0.5, training=True):
    """conv2d with each element of weight zeroed with probability p and the others scaled by 1 / (1 - p).

    Args:
        input, weight, bias, stride, padding, dilation, groups: as of conv2d.
        p: probability of dropping, between 0 and 1.
        training: False is conv2d itself.

    Returns:
        [N, K, P, Q] or [K, P, Q], as conv2d.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, its value and what is right.
    """
    size, strides, pads, dilations = conv.check_convolution(input, weight, bias, stride, padding, dilation, groups)
    dropout.check_p_and_flags(p, training=training)
    if not training or p == 0:
        return conv.conv2d(input, weight, bias, stride, padding, dilation, groups)
    backend = _route("drop_connect_conv2d", input, weight, lambda backend: conv._why_not(backend, input, weight))
    if backend == "torch":
        return F.conv2d(input, F.dropout(weight, p), bias, stride, padding, dilation, groups)
    operands = (None if t is None else t.to(conv.compute_dtype(t)) for t in (input, weight, bias))
    batch, weight, bias = operands
    if padding == "same" and any(d * (k - 1) % 2 for d, k in zip(dilations, weight.shape[2:], strict=True)):
        # one more zero at the far side, which a symmetric padding cannot say
        total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        batch = F.pad(batch, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
        pads = (0, 0)
    batch = batch if input.dim() == 4 else batch.unsqueeze(0)
    seed = dropout.draw_seed(weight)
    y = DropConnectFunction.apply(
        batch, weight, bias, seed, float(p), size, strides, pads, dilations, groups, "conv", backend
    )
    return y if input.dim() == 4 else y.squeeze(0)
