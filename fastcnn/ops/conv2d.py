"""conv2d: y[n, k, p, q] = bias[k] + sum over c, r, s of x[n, c, h, w] * w[k, c, r, s], with

h = p * stride - padding + r * dilation, w = q * stride - padding + s * dilation, and x = 0 outside the image.

x [N, C, H, W], w [K, C/G, R, S], bias [K], y [N, K, P, Q]; any strides. Saved for backward: x and w. Torch counterpart:
torch.nn.functional.conv2d. Source: implicit GEMM, Chetlur et al. 2014 (cuDNN).

The host functions take sizes and the top and left padding only, so padding that differs at the far side ('same' with an
even filter) needs no copy. conv_transpose2d and linear run on them, too.
"""

import torch
import torch.nn.functional as F

from fastcnn.backends import Op
from fastcnn.ops import common

# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) by arithmetic and by whether loads are 16 bytes wide. The first row whose
# BLOCK_N holds all columns is taken, else the last. Chosen 2026-11 by compiling for sm_80, sm_90 and sm_100, not by
# timing: large tiles that spill on none and fit the 99 KiB of shared memory of consumer chips. Narrow loads keep
# one address per element in registers, hence their small tiles.
LAUNCHES = {
    ("16-bit", "wide"): ((128, 16, 64, 4, 3), (128, 32, 64, 4, 3), (128, 64, 64, 8, 3), (128, 128, 64, 8, 3)),
    ("16-bit", "narrow"): ((64, 16, 16, 4, 2), (64, 32, 16, 4, 2)),
    ("tf32", "wide"): ((64, 16, 32, 4, 3), (64, 32, 32, 4, 3), (64, 64, 32, 4, 3)),
    ("tf32", "narrow"): ((64, 16, 16, 4, 2), (64, 32, 16, 4, 2)),
    ("ieee", "wide"): ((64, 16, 16, 4, 2), (64, 32, 16, 4, 2), (64, 64, 16, 4, 2)),
    ("ieee", "narrow"): ((64, 16, 16, 4, 2), (64, 32, 16, 4, 2)),
    ("fp64", "wide"): ((32, 16, 16, 4, 2), (32, 32, 16, 4, 2)),
    ("fp64", "narrow"): ((32, 16, 16, 4, 2),),
}
REGISTERS = 255  # per thread: without a word, the assembler spills a little to fit one more block on a multiprocessor
BAND = 8  # row tiles that share the column tiles through L2
PROGRAMS = 264  # two waves of an H100: a gradient of the weight with fewer tiles is split over pixels
MIN_STEPS = 4  # steps of BLOCK_K pixels that a split is worth
BIAS_TILE = (64, 32)
SUM_BLOCK = 256

CPU_WHY = (
    "oneDNN, through PyTorch, runs dense convolution near the CPU's multiply-add peak; numba has no GEMM to match it"
)

_op = Op("conv2d", cpu_kernel=False, cpu_auto=False, why=CPU_WHY)


def conv2d_reference(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """The same in plain PyTorch."""
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _why_not(backend, input, weight):
    if input.dtype not in common.FLOATS:
        return f"the convolution kernels take floating-point tensors and got {input.dtype}"
    if weight.shape[1] == 0:
        return "the convolution kernels need at least one input channel"
    return None


def suggests_channels_last(tensor):
    """Whether torch reads these strides as channels_last, also where sizes of one leave it open.

    Strides must not fall from C over W and H to N; those that a contiguous tensor has, too, do not count.
    """
    strides, sizes = tensor.stride(), tensor.shape
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * max(sizes[d], 1)
    return True


def _empty_image(like, channels, size, channels_last):
    """An output of like's batch, in the layout torch gives it."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (like.shape[0], channels, *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _empty_grad_weight(weight):
    """The parameter's own strides, so that the optimizer reads both alike; contiguous where its elements lie apart."""
    if common.is_dense(weight):
        return torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _strides(tensor):
    """Strides for a kernel. Those of sizes of one mean nothing: the value friendliest to the compiler replaces them."""
    n, c, h, w = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return n, c if tensor.shape[1] != 1 else 1, h, w


def _is_wide(tensor):
    """Whether the compiler knows that loads along dimension 1 are aligned to 16 bytes: it looks for multiples of 16."""
    n, c, h, w = _strides(tensor)
    divisible = all(number % 16 == 0 for number in (n, h, w, tensor.data_ptr()))
    return c == 1 and divisible


def _precision(tensor, tf32_switch):
    """tf32 where torch's own switch for convolutions ("conv") or matrix products ("matmul") allows it, else ieee."""
    if tensor.dtype != torch.float32 or tensor.device.type == "cpu":
        return "ieee"
    switch = torch.backends.cudnn.conv if tf32_switch == "conv" else torch.backends.cuda.matmul
    return "tf32" if switch.fp32_precision == "tf32" else "ieee"


def _launch(dtype, precision, wide, columns, depth):
    """A row of LAUNCHES as kernel arguments; no tile is deeper than the inner reduction, of length depth, needs."""
    arithmetic = {torch.float32: precision, torch.float64: "fp64"}.get(dtype, "16-bit")
    rows = LAUNCHES[arithmetic, "wide" if wide else "narrow"]
    block_m, block_n, block_k, warps, stages = next((row for row in rows if row[1] >= columns), rows[-1])
    block_k = min(block_k, max(16, 1 << (depth - 1).bit_length()))
    return dict(
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages, maxnreg=REGISTERS
    )


def _int64(pixels, *tensors):
    return common.exceeds_int32(*tensors) or pixels >= 2**31 - 2**20


def conv2d_forward(input, weight, bias, size, stride, padding, dilation, groups, channels_last, tf32_switch, backend):
    """y [N, K, *size]; padding is (top, left). Also the gradient of the input of conv_transpose2d."""
    from fastcnn.kernels.triton.conv2d import conv2d_forward_kernel

    (n, _, h, w), (k, c, r, s) = input.shape, weight.shape
    p, q = size
    k //= groups
    y = _empty_image(input, k * groups, size, channels_last)
    if y.numel() == 0:
        return y
    pixels = n * p * q
    precision = _precision(input, tf32_switch)
    wide = c % 16 == 0 and k % 16 == 0 and _is_wide(input) and _is_wide(weight)
    launch = _launch(input.dtype, precision, wide, k, c)
    grid = -(-pixels // launch["BLOCK_M"]) * -(-k // launch["BLOCK_N"]) * groups
    with common.device_guard(input):
        conv2d_forward_kernel[(grid,)](
            *(input, weight, None if bias is None else bias.contiguous(), y),
            *(pixels, h, w, p, q, c, k, r, s),
            *(*_strides(input), *_strides(weight), *_strides(y)),
            *(*stride, *padding, *dilation),
            HAS_BIAS=bias is not None,
            PRECISION=precision,
            INT64=_int64(pixels, input, weight, y),
            BAND=BAND,
            **launch,
        )
    return y


def conv2d_backward_input(
    grad_output, weight, bias, size, stride, padding, dilation, groups, channels_last, tf32_switch, backend
):
    """Gradient of the input [N, C, *size]. With a bias [C] it is the forward of conv_transpose2d."""
    from fastcnn.kernels.triton.conv2d import conv2d_backward_input_kernel

    (n, _, p, q), (k, c, r, s) = grad_output.shape, weight.shape
    h, w = size
    k //= groups
    grad_input = _empty_image(grad_output, c * groups, size, channels_last)
    if grad_input.numel() == 0:
        return grad_input
    # pixels of one parity class; the number of classes
    pixels = n * -(-h // stride[0]) * -(-w // stride[1])
    classes = min(stride[0], h) * min(stride[1], w)
    precision = _precision(grad_output, tf32_switch)
    wide = c % 16 == 0 and k % 16 == 0 and _is_wide(grad_output) and _is_wide(weight)
    launch = _launch(grad_output.dtype, precision, wide, c, k)
    grid = -(-pixels // launch["BLOCK_M"]) * -(-c // launch["BLOCK_N"]) * groups * classes
    with common.device_guard(grad_output):
        conv2d_backward_input_kernel[(grid,)](
            *(grad_output, weight, None if bias is None else bias.contiguous(), grad_input),
            *(pixels, h, w, p, q, c, k, r, s),
            *(*_strides(grad_output), *_strides(weight), *_strides(grad_input)),
            *(*stride, *padding, *dilation),
            HAS_BIAS=bias is not None,
            PRECISION=precision,
            INT64=_int64(pixels, grad_output, weight, grad_input),
            BAND=BAND,
            **launch,
        )
    return grad_input


def _shares(pixels, tiles, block):
    """Split pixels over programs: (number of shares, pixels per share). The order of summation hangs on sizes only."""
    steps = -(-pixels // block)
    shares = max(1, min(-(-PROGRAMS // tiles), steps // MIN_STEPS))
    share = max(1, -(-steps // shares)) * block
    return max(1, -(-pixels // share)), share


def _accumulator_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sum_slabs(slabs, out):
    """out = the sum of the slabs, which lie in out's memory order."""
    from fastcnn.kernels.triton.conv2d import sum_slabs_kernel

    numel = out.numel()
    int64 = common.exceeds_int32(slabs)
    sum_slabs_kernel[(-(-numel // SUM_BLOCK),)](slabs, out, numel, slabs.shape[0], INT64=int64, BLOCK=SUM_BLOCK)


def conv2d_backward_weight(grad_output, input, weight, stride, padding, dilation, groups, tf32_switch, backend):
    """Gradient of the weight, whose values are not read: it gives the shape and the strides of the gradient."""
    from fastcnn.kernels.triton.conv2d import conv2d_backward_weight_kernel

    (n, _, p, q), (_, _, h, w), (k, c, r, s) = grad_output.shape, input.shape, weight.shape
    k //= groups
    grad_weight = _empty_grad_weight(weight)
    pixels = n * p * q
    precision = _precision(input, tf32_switch)
    wide = c % 16 == 0 and k % 16 == 0 and _is_wide(grad_output) and _is_wide(input)
    launch = _launch(input.dtype, precision, wide, c, pixels)
    launch["BLOCK_M"] = min(launch["BLOCK_M"], max(16, 1 << (k - 1).bit_length()))
    tiles = -(-k // launch["BLOCK_M"]) * -(-c // launch["BLOCK_N"]) * r * s * groups
    shares, share = _shares(pixels, tiles, launch["BLOCK_K"])
    out = grad_weight
    if shares > 1:
        out = torch.empty((shares, grad_weight.numel()), dtype=_accumulator_dtype(weight.dtype), device=weight.device)
    with common.device_guard(input):
        conv2d_backward_weight_kernel[(tiles * shares,)](
            *(grad_output, input, out),
            *(pixels, h, w, p, q, c, k, r, s, groups, share, grad_weight.numel()),
            *(*_strides(grad_output), *_strides(input), *_strides(grad_weight)),
            *(*stride, *padding, *dilation),
            PRECISION=precision,
            INT64=_int64(pixels, grad_output, input, grad_weight),
            **launch,
        )
        if shares > 1:
            _sum_slabs(out, grad_weight)
    return grad_weight


def conv2d_backward_bias(grad_output, backend):
    """Gradient of the bias [K]: the sum over everything but the channels."""
    from fastcnn.kernels.triton.conv2d import conv2d_backward_bias_kernel

    n, k, p, q = grad_output.shape
    block_m, block_n = BIAS_TILE
    pixels = n * p * q
    tiles = -(-k // block_n)
    shares, share = _shares(pixels, tiles, block_m)
    grad_bias = torch.empty(k, dtype=grad_output.dtype, device=grad_output.device)
    out = grad_bias
    if shares > 1:
        out = torch.empty((shares, k), dtype=_accumulator_dtype(grad_output.dtype), device=grad_output.device)
    with common.device_guard(grad_output):
        conv2d_backward_bias_kernel[(tiles * shares,)](
            *(grad_output, out, pixels, p, q, k, share),
            *_strides(grad_output),
            INT64=_int64(pixels, grad_output),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
        )
        if shares > 1:
            _sum_slabs(out, grad_bias)
    return grad_bias


_geometry = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
forward_op = common.register(
    f"conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[] size, {_geometry}, bool channels_last,"
    " str tf32_switch, str backend) -> Tensor",
    conv2d_forward,
    lambda input, weight, bias, size, stride, padding, dilation, groups, channels_last, *_: _empty_image(
        input, weight.shape[0], size, channels_last
    ),
)
backward_input_op = common.register(
    f"conv2d_backward_input(Tensor grad_output, Tensor weight, Tensor? bias, SymInt[] size, {_geometry},"
    " bool channels_last, str tf32_switch, str backend) -> Tensor",
    conv2d_backward_input,
    lambda grad_output, weight, bias, size, stride, padding, dilation, groups, channels_last, *_: _empty_image(
        grad_output, weight.shape[1] * groups, size, channels_last
    ),
)
backward_weight_op = common.register(
    f"conv2d_backward_weight(Tensor grad_output, Tensor input, Tensor weight, {_geometry}, str tf32_switch,"
    " str backend) -> Tensor",
    conv2d_backward_weight,
    lambda grad_output, input, weight, *_: _empty_grad_weight(weight),
)
backward_bias_op = common.register(
    "conv2d_backward_bias(Tensor grad_output, str backend) -> Tensor",
    conv2d_backward_bias,
    lambda grad_output, *_: grad_output.new_empty(grad_output.shape[1]),
)


class Conv2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, size, stride, padding, dilation, groups, tf32_switch, backend):
        """padding is (top, left); with size it says all."""
        ctx.save_for_backward(input, weight, bias)
        ctx.geometry = (stride, padding, dilation, groups)
        ctx.size = size
        ctx.channels_last = suggests_channels_last(input) or suggests_channels_last(weight)
        ctx.switches = (tf32_switch, backend)
        return forward_op(input, weight, bias, size, *ctx.geometry, ctx.channels_last, *ctx.switches)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, bias = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = needs = ctx.needs_input_grad[:3]
        unused = (None,) * 7
        if torch.is_grad_enabled():
            reference = lambda *inputs: _padded_reference(*inputs, ctx.size, *ctx.geometry)
            return *common.differentiable_grads(reference, (input, weight, bias), grad_output, needs), *unused
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            size = input.shape[2:]
            grad_input = backward_input_op(
                grad_output, weight, None, size, *ctx.geometry, ctx.channels_last, *ctx.switches
            )
        if needs_weight:
            grad_weight = backward_weight_op(grad_output, input, weight, *ctx.geometry, *ctx.switches)
        if needs_bias:
            grad_bias = backward_bias_op(grad_output, ctx.switches[-1])
        return grad_input, grad_weight, grad_bias, *unused


def _padded_reference(input, weight, bias, size, stride, padding, dilation, groups):
    """conv2d_reference for the host functions' geometry. Negative padding at the far side crops what no tap reads."""
    far = [
        (size[d] - 1) * stride[d] + dilation[d] * (weight.shape[2 + d] - 1) + 1 - input.shape[2 + d] - padding[d]
        for d in (0, 1)
    ]
    padded = F.pad(input, (padding[1], far[1], padding[0], far[0]))
    return conv2d_reference(padded, weight, bias, stride, 0, dilation, groups)


def compute_dtype(tensor):
    """The dtype in which this operand of a convolution enters the kernel: autocast's, or its own."""
    return (common.autocast_dtype(tensor) if tensor.is_floating_point() else None) or tensor.dtype


def check_operands(input, weight, bias, weight_ranks):
    """Raise unless weight and bias are tensors that go with the input, after autocast."""
    common.check_tensor("weight", weight, weight_ranks)
    operands = {"weight": weight}
    if bias is not None:
        common.check_tensor("bias", bias)
        operands["bias"] = bias
    for name, operand in operands.items():
        common.check_alike(name, operand, "input", input, dtype=False)
        if compute_dtype(operand) != compute_dtype(input):
            raise TypeError(f"{name} must have the dtype of input ({input.dtype}), got {operand.dtype}")


def check_groups(groups):
    """Raise unless groups is a positive int."""
    if isinstance(groups, bool) or not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")


def check_image(input, weight):
    """Raise unless the image and the filter have pixels and there are filters."""
    if input.shape[-1] == 0 or input.shape[-2] == 0:
        raise ValueError(f"input must have a height and width of at least 1, got shape {tuple(input.shape)}")
    for d in (0, 2, 3):
        if weight.shape[d] == 0 and (d or input.shape[-3]):
            raise ValueError(f"weight must have no dimension of size 0, got shape {tuple(weight.shape)}")


def check_bias(bias, channels):
    """Raise unless bias is None or has one element per output channel."""
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias must have shape ({channels},), one element per output channel, got {tuple(bias.shape)}")


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """2-D convolution, as torch.nn.functional.conv2d.

    Args:
        input: [N, C, H, W] or [C, H, W], any strides; fp16, bf16, fp32, fp64 (others run on PyTorch).
        weight: [K, C / groups, R, S], of input's dtype.
        bias: [K] or None.
        stride, dilation: int or (height, width), at least 1.
        padding: int or (height, width), at least 0; 'valid' for none; 'same' for an output as large, with stride 1.
        groups: divides C and K.

    Returns:
        [N, K, P, Q] or [K, P, Q]; channels_last if input or weight is.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, its value and what is right.
    """
    common.check_tensor("input", input, (3, 4))
    check_operands(input, weight, bias, (4,))
    strides = common.pair("stride", stride, 1)
    dilations = common.pair("dilation", dilation, 1)
    check_groups(groups)
    check_image(input, weight)
    k, c, *kernel = weight.shape
    if input.shape[-3] != groups * c:
        raise ValueError(
            f"input must have groups * weight.shape[1] = {groups} * {c} = {groups * c} channels, got {input.shape[-3]}"
        )
    if k % groups:
        raise ValueError(f"groups must divide the {k} filters of weight, got {groups}")
    check_bias(bias, k)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be an int, a pair of ints, 'same' or 'valid', got {padding!r}")
        if padding == "same" and strides != (1, 1):
            raise ValueError(f"padding must not be 'same' when stride is not 1, got stride {stride!r}")
        total = [dilations[d] * (kernel[d] - 1) if padding == "same" else 0 for d in (0, 1)]
        pads = (total[0] // 2, total[1] // 2)
    else:
        pads = common.pair("padding", padding, 0)
        total = [2 * pads[0], 2 * pads[1]]
    extent = [dilations[d] * (kernel[d] - 1) + 1 for d in (0, 1)]
    padded = [input.shape[-2 + d] + total[d] for d in (0, 1)]
    if extent[0] > padded[0] or extent[1] > padded[1]:
        raise ValueError(
            f"weight must not reach beyond the padded input ({padded[0]} x {padded[1]}), got a filter of "
            f"{extent[0]} x {extent[1]} with its dilation"
        )
    size = [(padded[d] - extent[d]) // strides[d] + 1 for d in (0, 1)]

    backend = _op.route(input, lambda backend: _why_not(backend, input, weight))
    if backend == "torch":
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    operands = (None if t is None else t.to(compute_dtype(t)) for t in (input, weight, bias))
    input, weight, bias = operands
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    y = Conv2dFunction.apply(batch, weight, bias, size, strides, pads, dilations, groups, "conv", backend)
    return y if input.dim() == 4 else y.squeeze(0)
