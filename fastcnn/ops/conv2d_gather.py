"""The families "gather" and "folded": implicit GEMM through pointers, for every chip, layout, dtype and geometry.

Host functions of kernels/triton/conv2d.py and conv_layout.py. Outputs are the caller's; a conv_launch.Launch says the
tile. "folded" is for few channels: taps and channels are one axis of the GEMM, so that no tap's channels are padded to
a block. In the gradient of the weight it also pays where a block holds several taps' channels: grad_output is read once
for them. The gradient of the input has no such form ("folded" runs as "gather"): its short axis is the output's.

In "gather", padding meets neither Inf nor NaN of input or grad_output. A folded gradient of the weight multiplies
grad_output with the zeros of the padding: a filter whose grad_output holds Inf or NaN, and whose gradient therefore is
not finite either way, may get NaN in more of its taps than PyTorch has.
"""

import math

import torch

from fastcnn.ops import common
from fastcnn.ops.conv_sums import accumulator_dtype, sum_pixels, sum_rows_in_parts, sum_slabs

BAND = 8  # row tiles that share the column tiles through L2
COPY_BLOCK = 512
PAD_BLOCK = 512  # pixels
VECTOR_CHANNELS = 8


def kernel_strides(tensor):
    """Strides for a kernel. Those of sizes of one mean nothing: the value friendliest to the compiler replaces them."""
    n, c, h, w = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return n, c if tensor.shape[1] != 1 else 1, h, w


def _is_in_vectors(tensor, elements):
    """Whether channels lie side by side, and pixels on multiples of so many elements."""
    n, c, h, w = kernel_strides(tensor)
    return c == 1 and all(number % elements == 0 for number in (n, h, w)) and tensor.data_ptr() % 16 == 0


def is_wide(tensor):
    """Whether loads along dimension 1 can take 16 bytes at once."""
    return _is_in_vectors(tensor, 16 // tensor.element_size())


def _vector(c, k, *tensors):
    """Elements that loads of all these tensors may take at once, where the compiler does not see it by itself, else 1.

    It looks for multiples of 16 among strides and channels c and k; 16 bytes are fewer elements.
    """
    elements = 16 // tensors[0].element_size()
    for number in (16, elements):
        if c % number == k % number == 0 and all(_is_in_vectors(tensor, number) for tensor in tensors):
            return elements if number < 16 else 1
    return 1


def needs_int64(pixels, *tensors):
    """Whether offsets or pixel numbers leave 32 bits."""
    return common.exceeds_int32(*tensors) or pixels >= 2**31 - 2**20


def _tile(launch):
    return dict(
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


def _in_vectors(tensor, channels):
    """The tensor itself if it lies so, else a copy in channels_last with zeros as further channels."""
    from fastcnn.kernels.triton.conv_layout import pad_channels_kernel

    n, c, h, w = tensor.shape
    if c == channels and _is_in_vectors(tensor, channels):
        return tensor
    like = dict(dtype=tensor.dtype, device=tensor.device, memory_format=torch.channels_last)
    out = torch.empty((n, channels, h, w), **like)
    pixels = n * h * w
    pad_channels_kernel[(-(-pixels // PAD_BLOCK),)](
        *(tensor, out, pixels, c, h, w),
        *kernel_strides(tensor),
        INT64=needs_int64(pixels, tensor, out),
        CHANNELS=channels,
        BLOCK=PAD_BLOCK,
    )
    return out


def _folded(launch, groups, c, s, vector, *tensors):
    """The tensors as the family "folded" reads them, others keep theirs (and vector), and the compile-time options.

    Up to 8 channels are read at once: they are copied where they do not lie so. That is a small part of what a first
    layer moves, and the only way to have its loads asynchronous.
    """
    if launch.family != "folded":
        return *tensors, dict(FOLDED=False, FOLDED_C=0, FOLDED_S=0, VECTOR=vector)
    tensors, channels = list(tensors), c
    if groups == 1 and 1 < c <= VECTOR_CHANNELS:
        channels = vector = 1 << (c - 1).bit_length()
        tensors = [_in_vectors(tensor, channels) for tensor in tensors]
    else:
        vector = _vector(c, 0, *tensors) if groups == 1 else 1
    return *tensors, dict(FOLDED=True, FOLDED_C=channels, FOLDED_S=s, VECTOR=vector)


def _pending_arguments(pending):
    """(scale, shift) and the compile-time options."""
    if pending is None:
        return (None, None), dict(PENDING=None, PENDING_SLOPE=0.0)
    vectors = (pending.scale.contiguous(), pending.shift.contiguous())
    return vectors, dict(PENDING=pending.activation, PENDING_SLOPE=pending.slope)


def _gate(pending):
    return None if pending is None or pending.gate is None else pending.gate.contiguous()


def _corrected_arguments(grad_output, correction):
    """grad_output and (y, a, b, c), where y has the strides of grad_output."""
    if correction is None:
        return grad_output, (None,) * 4
    grad_output, correction = correction.beside(grad_output)
    return grad_output, (correction.y, *(None if t is None else t.contiguous() for t in correction[1:]))


def forward(
    input, weight, bias, y, stride, padding, dilation, groups, precision, launch, *,
    pending=None, activation=None, residual=None, pivot=None,
):  # fmt: skip
    """y = act(conv(pending(input)) + bias + residual), written to y.

    Args:
        activation: (name, slope) or None.
        residual: a tensor like y, or None.
        pivot: [K] in fp32 (fp64 for fp64), or None.

    Returns:
        With a pivot [S, 2, K] in its dtype, to be added up: sums of y - pivot and of its square over the rounded y.
        Else None.
    """
    from fastcnn.kernels.triton.conv2d import conv2d_forward_kernel

    (n, _, h, w), (k, c, r, s), (p, q) = input.shape, weight.shape, y.shape[2:]
    k //= groups
    pixels = n * p * q
    tiles_m = -(-pixels // launch.block_m)
    sums = None
    if pivot is not None:
        sums = torch.empty((tiles_m, 2, k * groups), dtype=accumulator_dtype(y.dtype), device=y.device)
    vectors, options = _pending_arguments(pending)
    with common.device_guard(input):
        vector = _vector(c, k, input, weight, y)
        input, weight, folded = _folded(launch, groups, c, s, vector, input, weight)
        conv2d_forward_kernel[(tiles_m * -(-k // launch.block_n) * groups,)](
            *(input, weight, None if bias is None else bias.contiguous(), y, *vectors, _gate(pending)),
            *(None if residual is None else common.with_strides_of(residual, y),),
            *(None if pivot is None else pivot.contiguous(), sums),
            *(pixels, h, w, p, q, c, k, r, s, groups),
            *(*kernel_strides(input), *kernel_strides(weight), *kernel_strides(y)),
            *(*stride, *padding, *dilation),
            ACTIVATION=None if activation is None else activation[0],
            SLOPE=0.0 if activation is None else activation[1],
            **folded,
            PRECISION=precision,
            INT64=needs_int64(pixels, input, weight, y),
            BAND=BAND,
            **options,
            **_tile(launch),
        )
        return None if sums is None else sum_rows_in_parts(sums)


def backward_input(
    grad_output, weight, bias, grad_input, stride, padding, dilation, groups, precision, launch, *,
    correction=None, pending=None, input=None, join=None, add=None,
):  # fmt: skip
    """The gradient of conv's input for corrected(grad_output), written to grad_input: dz = conv_transpose + bias.

    Without pending grad_input = dz + add. With pending, and its input, du = dz * act'(input * scale + shift) and
    grad_input = du * scale + add, or du + add. With a join dm of dz + add: see there. bias is for the forward of
    conv_transpose2d. add may be grad_input itself.

    Returns:
        With pending [S, 2, C] in fp32 (fp64 for fp64), to be added up: the sums of du * input and of du; with a join
        those of dm * left and of dm. Else None.
    """
    from fastcnn.kernels.triton.conv2d import conv2d_backward_input_kernel

    (n, _, p, q), (k, c, r, s), (h, w) = grad_output.shape, weight.shape, grad_input.shape[2:]
    k //= groups
    # pixels of one parity class; the number of classes
    pixels = n * -(-h // stride[0]) * -(-w // stride[1])
    classes = stride[0] * stride[1]
    tiles_m = -(-pixels // launch.block_m)
    sums = None
    if pending is not None or join is not None:
        dtype = accumulator_dtype(grad_input.dtype)
        sums = torch.empty((classes * tiles_m, 2, c * groups), dtype=dtype, device=grad_input.device)
    vectors, options = _pending_arguments(pending)
    raw = join.left if join else input if pending else None
    grad_output, correction = _corrected_arguments(grad_output, correction)
    with common.device_guard(grad_output):
        conv2d_backward_input_kernel[(tiles_m * -(-c // launch.block_n) * groups * classes,)](
            *(grad_output, weight, None if bias is None else bias.contiguous(), grad_input, *correction),
            *(None if t is None else common.with_strides_of(t, grad_input) for t in (raw, join and join.output)),
            *(*vectors, sums, None if add is None else common.with_strides_of(add, grad_input)),
            *(pixels, h, w, p, q, c, k, r, s, groups),
            *(*kernel_strides(grad_output), *kernel_strides(weight), *kernel_strides(grad_input)),
            *(*stride, *padding, *dilation, *map(math.gcd, stride, dilation)),
            SCALED=pending is not None and pending.scaled,
            JOIN=join and join.activation,
            VECTOR=_vector(c, k, grad_output, weight, grad_input),
            PRECISION=precision,
            INT64=needs_int64(pixels, grad_output, weight, grad_input),
            BAND=BAND,
            **options,
            **_tile(launch),
        )
        return None if sums is None else sum_rows_in_parts(sums)


def _split(pixels, launch):
    """(number of shares, pixels per share): as many as the launch asks for, if there are as many steps."""
    share = -(-pixels // (launch.splits * launch.block_k)) * launch.block_k
    return -(-pixels // share), share


def _divisor(d):
    """(multiplier, shift) for the kernels' division by d; the multiplier's 32 bits as a signed number."""
    shift = (d - 1).bit_length()
    multiplier = ((1 << 32) * ((1 << shift) - d)) // d + 1
    return multiplier - (multiplier >> 31 << 32), shift


def backward_weight(
    grad_output, input, grad_weight, stride, padding, dilation, groups, precision, launch, *,
    correction=None, pending=None,
):  # fmt: skip
    """The gradient of the weight of conv(pending(input)) for corrected(grad_output), written to grad_weight."""
    from fastcnn.kernels.triton.conv2d import conv2d_backward_weight_kernel

    (n, _, p, q), (_, _, h, w), (k, c, r, s) = grad_output.shape, input.shape, grad_weight.shape
    k //= groups
    pixels = n * p * q
    with common.device_guard(input):
        vector = _vector(c, k, grad_output, input)
        input, folded = _folded(launch, groups, c, s, vector, input)
    columns = -(-c // launch.block_n) * r * s
    if launch.family == "folded":
        columns = -(-folded["FOLDED_C"] * r * s // launch.block_n)
    tiles = -(-k // launch.block_m) * columns * groups
    splits, share = _split(pixels, launch)
    out = grad_weight
    if splits > 1:
        out = grad_weight.new_empty((splits, grad_weight.numel()), dtype=accumulator_dtype(grad_weight.dtype))
    vectors, options = _pending_arguments(pending)
    grad_output, correction = _corrected_arguments(grad_output, correction)
    with common.device_guard(input):
        conv2d_backward_weight_kernel[(tiles * splits,)](
            *(grad_output, input, out, *correction, *vectors, _gate(pending)),
            *(pixels, h, w, p, q, c, k, r, s, groups, share),
            *(*_divisor(p * q), *_divisor(q), grad_weight.numel()),
            *(*kernel_strides(grad_output), *kernel_strides(input), *kernel_strides(grad_weight)),
            *(*stride, *padding, *dilation),
            **folded,
            PRECISION=precision,
            INT64=needs_int64(pixels, grad_output, input, grad_weight),
            **options,
            **_tile(launch),
        )
        if splits > 1:
            # slabs lie in the memory order of the gradient, which is dense
            sum_slabs(out, grad_weight)


def backward_bias(grad_output, grad_bias):
    """The gradient of the bias [K], the sum over everything but the channels, written to grad_bias."""
    with common.device_guard(grad_output):
        sum_pixels(grad_output, grad_bias)


def expand_groups(weight, groups, pack):
    """The weight as [K, pack * C/groups, R, S] for groups / pack, channels_last: blocks on the diagonal, else zero."""
    from fastcnn.kernels.triton.conv_layout import expand_groups_kernel

    k, c, r, s = weight.shape
    shape = (k, pack * c, r, s)
    out = torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)
    with common.device_guard(weight):
        expand_groups_kernel[(-(-out.numel() // COPY_BLOCK),)](
            *(weight, out, out.numel(), k // groups, c, r, s),
            *kernel_strides(weight),
            PACK=pack,
            BLOCK=COPY_BLOCK,
        )
    return out


def contract_groups(packed_grad, grad_weight, groups, pack):
    """grad_weight = the diagonal blocks of the expanded weight's gradient, which is in channels_last."""
    from fastcnn.kernels.triton.conv_layout import contract_groups_kernel

    k, c, r, s = grad_weight.shape
    with common.device_guard(grad_weight):
        contract_groups_kernel[(-(-grad_weight.numel() // COPY_BLOCK),)](
            *(packed_grad, grad_weight, grad_weight.numel(), k // groups, c, r, s),
            *kernel_strides(grad_weight),
            PACK=pack,
            BLOCK=COPY_BLOCK,
        )
