"""conv_transpose2d: the gradient of conv2d with respect to its input, as a layer.

y[n, k, h, w] = bias[k] + sum of x[n, c, p, q] * w[c, k, r, s] over all c, p, q, r, s with
h = p * stride - padding + r * dilation and w = q * stride - padding + s * dilation.

x [N, Cin, P, Q], w [Cin, Cout/G, R, S], bias [Cout], y [N, Cout, H, W]. Saved for backward: x and w. Torch counterpart:
torch.nn.functional.conv_transpose2d. Source: Zeiler et al. 2010.

Its kernels are conv2d's in other roles: forward is conv2d's gradient of the input, the gradient of the input is
conv2d's forward, and in the gradient of the weight input and grad_output change places.
"""

import torch
import torch.nn.functional as F

from fastcnn.backends import Op
from fastcnn.ops import common, conv2d, conv_layout

_op = Op("conv_transpose2d", cpu_kernel=False, cpu_auto=False, why=conv2d.CPU_WHY)


def conv_transpose2d_reference(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """The same in plain PyTorch."""
    return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)


def _why_not(backend, input, weight):
    if input.dtype not in common.FLOATS:
        return f"the convolution kernels take floating-point tensors and got {input.dtype}"
    return None


class ConvTranspose2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, size, stride, padding, output_padding, dilation, groups, backend):
        ctx.save_for_backward(input, weight, bias)
        ctx.geometry = (stride, padding, dilation, groups)
        ctx.output_padding = output_padding
        ctx.channels_last = conv_layout.suggests_channels_last(input) or conv_layout.suggests_channels_last(weight)
        ctx.switches = ("conv", backend)
        return conv2d.backward_input_op(input, weight, bias, size, *ctx.geometry, ctx.channels_last, *ctx.switches)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, bias = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = needs = ctx.needs_input_grad[:3]
        unused = (None,) * 7
        if torch.is_grad_enabled():
            stride, padding, dilation, groups = ctx.geometry
            reference = lambda *inputs: conv_transpose2d_reference(
                *inputs, stride, padding, ctx.output_padding, groups, dilation
            )
            return *common.differentiable_grads(reference, (input, weight, bias), grad_output, needs), *unused
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            size = input.shape[2:]
            grad_input = conv2d.forward_op(
                grad_output, weight, None, size, *ctx.geometry, ctx.channels_last, *ctx.switches
            )
        if needs_weight:
            grad_weight = conv2d.backward_weight_op(input, grad_output, weight, *ctx.geometry, *ctx.switches)
        if needs_bias:
            grad_bias = conv2d.backward_bias_op(grad_output, ctx.switches[-1])
        return grad_input, grad_weight, grad_bias, *unused


def _pytorchs(input, weight, bias=None, *others, **named):
    # PyTorch reads memory that operands on "meta" do not have, and takes a padding that leaves nothing
    if not weight.is_cpu or not (bias is None or bias.is_cpu):
        raise ValueError
    y = F.conv_transpose2d(input, weight, bias, *others, **named)
    if y.numel() == 0:
        raise ValueError
    return y


@_op.torch_first(_pytorchs)
def conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """2-D transposed convolution, as torch.nn.functional.conv_transpose2d.

    Args:
        input: [N, Cin, H, W] or [Cin, H, W], any strides; fp16, bf16, fp32, fp64 (others run on PyTorch).
        weight: [Cin, Cout / groups, R, S], of input's dtype.
        bias: [Cout] or None.
        stride, dilation: int or (height, width), at least 1.
        padding: int or (height, width), at least 0; it takes that much off every side of the output.
        output_padding: int or (height, width), added at the output's far side; smaller than stride or dilation.
        groups: divides Cin.

    Returns:
        [N, Cout, ...] or [Cout, ...], channels_last if input or weight is, of height and width
        (in - 1) * stride - 2 * padding + dilation * (filter - 1) + output_padding + 1.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, its value and what is right.
    """
    common.check_tensor("input", input, (3, 4))
    conv2d.check_operands(input, weight, bias, (4,))
    strides = common.pair("stride", stride, 1)
    pads = common.pair("padding", padding, 0)
    output_pads = common.pair("output_padding", output_padding, 0)
    dilations = common.pair("dilation", dilation, 1)
    conv2d.check_groups(groups)
    conv2d.check_image(input, weight)
    c_in, c_out, *kernel = weight.shape
    if c_in == 0 or c_out == 0:
        raise ValueError(f"weight must have no dimension of size 0, got shape {tuple(weight.shape)}")
    if input.shape[-3] != c_in:
        raise ValueError(f"input must have weight.shape[0] = {c_in} channels, got {input.shape[-3]}")
    if c_in % groups:
        raise ValueError(f"groups must divide the {c_in} channels of input, got {groups}")
    conv2d.check_bias(bias, c_out * groups)
    for d in (0, 1):
        if output_pads[d] >= max(strides[d], dilations[d]):
            raise ValueError(
                f"output_padding must be below stride {stride!r} or dilation {dilation!r}, got {output_padding!r}"
            )
    size = [
        (input.shape[-2 + d] - 1) * strides[d] - 2 * pads[d] + dilations[d] * (kernel[d] - 1) + output_pads[d] + 1
        for d in (0, 1)
    ]
    if size[0] < 1 or size[1] < 1:
        raise ValueError(
            f"padding must leave an output of at least 1 x 1, got {padding!r}, which gives {size[0]} x {size[1]}"
        )

    backend = conv2d.among_vendors(_op.route(input, lambda backend: _why_not(backend, input, weight)), input)
    if backend == "torch":
        return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    operands = (None if t is None else t.to(conv2d.compute_dtype(t)) for t in (input, weight, bias))
    input, weight, bias = operands
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    y = ConvTranspose2dFunction.apply(batch, weight, bias, size, strides, pads, output_pads, dilations, groups, backend)
    return y if input.dim() == 4 else y.squeeze(0)
