"""separable_conv2d: a depthwise convolution and the 1x1 convolution of its result, as one op.

z[n, m, p, q] = b1[m] + sum over r, s of x[n, m // M, h, w] * w1[m, 0, r, s],  h and w as in depthwise_conv2d;
y[n, k, p, q] = b2[k] + sum over m of z[n, m, p, q] * w2[k, m, 0, 0].

x [N, C, H, W], w1 [C * M, 1, R, S], w2 [K, C * M, 1, 1], y [N, K, P, Q]: (R * S + K) * C * M weights, where one
convolution has R * S * C * K. Saved for backward: x, the weights and biases; z, which two convolutions would keep, is
computed again. On a GPU forward does not even write it where TILES says so. Torch counterpart: two calls of conv2d.
Source: Sifre and Mallat 2014; Chollet 2017.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastcnn.backends import Op
from fastcnn.ops import common, conv2d, depthwise_conv2d
from fastcnn.ops.conv2d_gather import kernel_strides, needs_int64
from fastcnn.ops.conv_layout import empty_grad_weight, empty_image, padded_reference, suggests_channels_last


class Tile(NamedTuple):
    """A launch of the fused kernel: `strips` of LANES pixels, up to `filters` in a program, `channels` in a step."""

    filters: int
    strips: int
    channels: int
    warps: int


LANES = 4
VECTOR = 8  # channels: 16 bytes of 16 bits. What lies otherwise is read one by one, and spills
# The first that holds all filters, with the arithmetic of the 1x1 convolution. Eight elements of an operand of the
# depthwise convolution per thread, so that 16-bit loads take 16 bytes; no more filters than registers hold. No tile
# does fp64, or fp32 without TF32: the product is bound by arithmetic, and conv2d's tiles are larger.
TILES = {
    "16-bit": (Tile(64, 32, 32, 4), Tile(128, 16, 64, 4), Tile(256, 16, 128, 8)),
    "tf32": (Tile(128, 16, 32, 4), Tile(256, 16, 64, 8)),
}
# Filters up to which the fused kernel runs, by the taps that the depthwise filter has at most. It saves the writing and
# reading of z, 4 bytes per element of 16 bits, which take an SM of an H100 0.31 cycles. The depthwise part of sm_90's
# machine code takes 0.21 of them for 3x3 and 0.5 for 5x5, once per 256 filters, beside the 0.31 and more of x and y.
# 5x5 with 256 filters spills on sm_80
MOST_FILTERS = {9: 512, 25: 128}


def separable_conv2d_reference(
    input, depthwise_weight, pointwise_weight, bias=None, stride=1, padding=0, dilation=1, depthwise_bias=None
):
    """The same in plain PyTorch."""
    z = F.conv2d(input, depthwise_weight, depthwise_bias, stride, padding, dilation, input.shape[-3])
    return F.conv2d(z, pointwise_weight, bias)


def _why_not(backend, input, depthwise_weight):
    return depthwise_conv2d.why_not(backend, input, depthwise_weight)


def _in_vectors(tensor):
    """Whether channels lie side by side, and pixels on multiples of VECTOR of them."""
    n, c, h, w = kernel_strides(tensor)
    whole = all(number % VECTOR == 0 for number in (n, h, w, tensor.shape[1]))
    return c == 1 and whole and tensor.data_ptr() % 16 == 0


def _tile(input, depthwise_weight, pointwise_weight, y, precision):
    """The Tile of the fused kernel, or None where two kernels are predicted to be faster or it cannot run."""
    (m, _, r, s), k = depthwise_weight.shape, pointwise_weight.shape[0]
    arithmetic = "16-bit" if input.element_size() == 2 else precision if input.dtype == torch.float32 else "fp64"
    most = next((filters for taps, filters in MOST_FILTERS.items() if r * s <= taps), 0)
    if m != input.shape[1] or k > most or not (_in_vectors(input) and _in_vectors(y)):
        return None
    tiles = TILES.get(arithmetic)
    return tiles and next((tile for tile in tiles if k <= tile.filters), tiles[-1])


def _fused_forward(
    input, depthwise_weight, depthwise_bias, pointwise_weight, bias, y, stride, padding, dilation, precision, tile
):  # fmt: skip
    """y in one kernel."""
    from fastcnn.kernels.triton.separable_conv2d import separable_conv2d_kernel

    (n, c, h, w), (_, _, r, s), (k, p, q) = input.shape, depthwise_weight.shape, y.shape[1:]
    # along the channels for wide loads, and converted once
    taps = torch.empty((r * s, c), dtype=torch.float32, device=input.device)
    taps.copy_(depthwise_weight.reshape(c, r * s).t())
    pointwise_weight = pointwise_weight.contiguous()
    strips = n * p * -(-q // LANES)
    filters = min(tile.filters, max(16, 1 << (k - 1).bit_length()))
    of_x, of_y = kernel_strides(input), kernel_strides(y)
    with common.device_guard(input):
        separable_conv2d_kernel[(-(-strips // tile.strips) * -(-k // filters),)](
            *(input, taps, None if depthwise_bias is None else depthwise_bias.contiguous()),
            *(pointwise_weight, None if bias is None else bias.contiguous(), y),
            *(strips, h, w, p, q, c, k, of_x[0], *of_x[2:]),
            *(of_y[0], *of_y[2:], *padding),
            *(r, s, *stride, *dilation),
            VECTOR=VECTOR,
            PRECISION=precision,
            INT64=needs_int64(strips * LANES, input, y),
            STRIPS=tile.strips,
            LANES=LANES,
            BLOCK_N=filters,
            BLOCK_C=tile.channels,
            num_warps=tile.warps,
            num_stages=1,
        )


_PLAIN = (1, 1), (0, 0), (1, 1)  # the 1x1 convolution's stride, padding and dilation


def _depthwise(input, weight, bias, size, geometry, channels_last, backend):
    """z, written."""
    backend = "cpu" if backend == "cpu" else "triton"
    return depthwise_conv2d.depthwise_forward(input, weight, bias, size, *geometry, channels_last, backend)


def separable_conv2d_forward(
    input, depthwise_weight, depthwise_bias, pointwise_weight, bias, size, stride, padding, dilation, channels_last,
    backend,
):  # fmt: skip
    """y [N, K, *size]; padding is (top, left). backend: "cpu", "triton", or "auto" where cuDNN is a candidate, too."""
    geometry = stride, padding, dilation
    if backend != "cpu":
        y = empty_image(input, pointwise_weight.shape[0], size, channels_last)
        precision = conv2d.precision_of(input, "conv")
        tile = _tile(input, depthwise_weight, pointwise_weight, y, precision)
        if tile is not None:
            if y.numel():
                _fused_forward(
                    *(input, depthwise_weight, depthwise_bias, pointwise_weight, bias, y, *geometry, precision, tile)
                )
            return y
    z = _depthwise(input, depthwise_weight, depthwise_bias, size, geometry, channels_last, backend)
    if backend == "cpu":
        return F.conv2d(z, pointwise_weight, bias)
    return conv2d.conv2d_forward(z, pointwise_weight, bias, size, *_PLAIN, 1, channels_last, "conv", backend)


def separable_conv2d_backward(
    grad_output, input, depthwise_weight, depthwise_bias, pointwise_weight, stride, padding, dilation, channels_last,
    needs, backend,
):  # fmt: skip
    """Gradients of input, depthwise weight and bias, pointwise weight and bias; empty tensors what needs says not."""
    size, geometry = grad_output.shape[2:], (stride, padding, dilation)
    needs_z, (needs_weight, needs_bias) = needs[:3], needs[3:]
    grad_z = grad_weight = grad_bias = None
    if needs_weight:
        z = _depthwise(input, depthwise_weight, depthwise_bias, size, geometry, channels_last, backend)
    if backend == "cpu":
        shape = (input.shape[0], pointwise_weight.shape[1], *size)
        image = z if needs_weight else input.new_empty(1).expand(shape)
        wanted = [any(needs_z), needs_weight, needs_bias]
        grad_z, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_output, image, pointwise_weight, [pointwise_weight.shape[0]], *_PLAIN, False, [0, 0], 1, wanted
        )
        if needs_weight:
            grad_weight = common.with_strides_of(grad_weight, empty_grad_weight(pointwise_weight))
    else:
        how = *_PLAIN, 1
        if needs_weight:
            grad_weight = conv2d.conv2d_backward_weight(grad_output, z, pointwise_weight, *how, "conv", backend)
            del z
        if needs_bias:
            grad_bias = conv2d.conv2d_backward_bias(grad_output, backend)
        if any(needs_z):
            grad_z = conv2d.conv2d_backward_input(
                grad_output, pointwise_weight, None, size, *how, channels_last, "conv", backend
            )
    grads = (None,) * 3
    if any(needs_z):
        grads = depthwise_conv2d.depthwise_backward(
            grad_z, input, depthwise_weight, *geometry, channels_last, needs_z, "cpu" if backend == "cpu" else "triton"
        )[:3]
    return tuple(
        grad if need else input.new_empty(0) for grad, need in zip((*grads, grad_weight, grad_bias), needs, strict=True)
    )


def _fake_backward(
    grad_output, input, depthwise_weight, depthwise_bias, pointwise_weight, stride, padding, dilation, channels_last,
    needs, backend,
):  # fmt: skip
    grads = (
        empty_image(input, input.shape[1], input.shape[2:], channels_last),
        empty_grad_weight(depthwise_weight),
        input.new_empty(depthwise_weight.shape[0]),
        empty_grad_weight(pointwise_weight),
        input.new_empty(pointwise_weight.shape[0]),
    )
    return tuple(grad if need else input.new_empty(0) for grad, need in zip(grads, needs, strict=True))


_weights = "Tensor input, Tensor depthwise_weight, Tensor? depthwise_bias, Tensor pointwise_weight"
_geometry = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool channels_last"
_forward = common.register(
    f"separable_conv2d({_weights}, Tensor? bias, SymInt[] size, {_geometry}, str backend) -> Tensor",
    separable_conv2d_forward,
    lambda input, w1, b1, w2, b2, size, stride, padding, dilation, channels_last, backend: empty_image(
        input, w2.shape[0], size, channels_last
    ),
)
_backward = common.register(
    f"separable_conv2d_backward(Tensor grad_output, {_weights}, {_geometry}, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    separable_conv2d_backward,
    _fake_backward,
)


class SeparableConv2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input, depthwise_weight, depthwise_bias, pointwise_weight, bias, size, stride, padding, dilation, backend
    ):  # fmt: skip
        tensors = input, depthwise_weight, depthwise_bias, pointwise_weight, bias
        ctx.save_for_backward(*tensors)
        ctx.size, ctx.geometry, ctx.backend = size, (stride, padding, dilation), backend
        ctx.channels_last = any(map(suggests_channels_last, (input, depthwise_weight, pointwise_weight)))
        return _forward(*tensors, size, *ctx.geometry, ctx.channels_last, backend)

    @staticmethod
    def backward(ctx, grad_output):
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            grads = common.differentiable_grads(
                lambda x, w1, b1, w2, b2: F.conv2d(
                    padded_reference(x, w1, b1, ctx.size, *ctx.geometry, x.shape[1]), w2, b2
                ),
                tensors, grad_output, needs,
            )  # fmt: skip
        else:
            grads = _backward(grad_output, *tensors[:4], *ctx.geometry, ctx.channels_last, list(needs), ctx.backend)
            grads = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return *grads, *[None] * 5


_op = Op(
    "separable_conv2d",
    cpu_kernel=True,
    cpu_auto=False,
    why="PyTorch's two convolutions take 0.4 to 0.9 of the time of ours, which makes the depthwise result twice",
)


def _check_weights(input, depthwise_weight, pointwise_weight, bias, depthwise_bias):
    """Raise unless the weights and biases fit each other and the input."""
    common.check_tensor("input", input, (3, 4))
    operands = {"depthwise_weight": depthwise_weight, "pointwise_weight": pointwise_weight}
    for name, weight in operands.items():
        common.check_tensor(name, weight, (4,))
    for name, vector in (("bias", bias), ("depthwise_bias", depthwise_bias)):
        if vector is not None:
            common.check_tensor(name, vector)
            operands[name] = vector
    for name, operand in operands.items():
        common.check_alike(name, operand, "input", input, dtype=False)
        if conv2d.compute_dtype(operand) != conv2d.compute_dtype(input):
            raise TypeError(f"{name} must have the dtype of input ({input.dtype}), got {operand.dtype}")
    channels, shape, pointwise = input.shape[-3], tuple(depthwise_weight.shape), tuple(pointwise_weight.shape)
    if channels == 0:
        raise ValueError(f"input must have at least one channel, got shape {tuple(input.shape)}")
    if 0 in shape or shape[1] != 1 or shape[0] % channels:
        raise ValueError(
            f"depthwise_weight must have shape ({channels} * multiplier, 1, height, width), filters of the "
            f"{channels} channels of input, got {shape}"
        )
    if pointwise[0] == 0 or pointwise[1:] != (shape[0], 1, 1):
        raise ValueError(
            f"pointwise_weight must have shape (channels, {shape[0]}, 1, 1), for the {shape[0]} channels that "
            f"depthwise_weight makes, got {pointwise}"
        )
    for name, vector, count in (("bias", bias, pointwise[0]), ("depthwise_bias", depthwise_bias, shape[0])):
        if vector is not None and tuple(vector.shape) != (count,):
            raise ValueError(f"{name} must have shape ({count},), one element per filter, got {tuple(vector.shape)}")


def _pytorchs(input, depthwise_weight, pointwise_weight, *others, **named):
    # two convolutions take weights that are no separable convolution's, and memory that operands on "meta" do not have
    if depthwise_weight.shape[1] != 1 or pointwise_weight.shape[2:] != (1, 1) or pointwise_weight.shape[0] == 0:
        raise ValueError
    operands = depthwise_weight, pointwise_weight, *others, *named.values()
    if not all(t.is_cpu for t in operands if isinstance(t, torch.Tensor)):
        raise ValueError
    return separable_conv2d_reference(input, depthwise_weight, pointwise_weight, *others, **named)


@_op.torch_first(_pytorchs)
def separable_conv2d(
    input, depthwise_weight, pointwise_weight, bias=None, stride=1, padding=0, dilation=1, depthwise_bias=None
):
    """Depthwise separable 2-D convolution: conv2d with groups of one channel, then conv2d with a filter of 1x1.

    Args:
        input: [N, C, H, W] or [C, H, W], any strides; fp16, bf16, fp32, fp64 (others run on PyTorch).
        depthwise_weight: [C * M, 1, R, S], of input's dtype: M filters for each channel.
        pointwise_weight: [K, C * M, 1, 1].
        bias: [K] or None.
        stride, padding, dilation: of the depthwise convolution, as of conv2d.
        depthwise_bias: [C * M] or None.

    Returns:
        [N, K, P, Q] or [K, P, Q]; channels_last if input or a weight is.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, its value and what is right.
    """
    _check_weights(input, depthwise_weight, pointwise_weight, bias, depthwise_bias)
    size, strides, pads, dilations = conv2d.check_convolution(
        input, depthwise_weight, depthwise_bias, stride, padding, dilation, input.shape[-3], "depthwise_weight"
    )
    tensors = [
        None if t is None else t.to(conv2d.compute_dtype(t))
        for t in (input, depthwise_weight, depthwise_bias, pointwise_weight, bias)
    ]
    backend = _op.route(input, lambda backend: _why_not(backend, *tensors[:2]))
    if backend == "torch":
        return separable_conv2d_reference(
            input, depthwise_weight, pointwise_weight, bias, stride, padding, dilation, depthwise_bias
        )
    batch = tensors[0] if input.dim() == 4 else tensors[0].unsqueeze(0)
    backend = conv2d.among_vendors(backend, input)
    y = SeparableConv2dFunction.apply(batch, *tensors[1:], size, strides, pads, dilations, backend)
    return y if input.dim() == 4 else y.squeeze(0)
