"""conv2d: y[n, k, p, q] = bias[k] + sum over c, r, s of x[n, c, h, w] * w[k, c, r, s], with

h = p * stride - padding + r * dilation, w = q * stride - padding + s * dilation, and x = 0 outside the image.

x [N, C, H, W], w [K, C/G, R, S], bias [K], y [N, K, P, Q]; any strides. Saved for backward: x and w. Torch counterpart:
torch.nn.functional.conv2d. Source: implicit GEMM, Chetlur et al. 2014 (cuDNN).

The host functions take sizes and the top and left padding only, so padding that differs at the far side ('same' with an
even filter) needs no copy. conv_transpose2d and linear run on them, too. Each pass is a conv_launch.Problem, which
conv_launch.choose gives to one family of kernels: "images", "gather", "folded", or, in backend "auto" on a GPU, cuDNN.
One filter per channel is depthwise_conv2d's.
"""

import dataclasses

import torch
import torch.nn.functional as F

from fastcnn.backends import Op, current_backend, is_strict
from fastcnn.ops import (
    common,
    conv2d_gather,
    conv2d_images,
    conv2d_stem,
    conv2d_vendor,
    conv_launch,
    depthwise_conv2d,
)
from fastcnn.ops.conv_fusion import Join, Pending
from fastcnn.ops.conv_layout import empty_grad_weight, empty_image, output_of, padded_reference, suggests_channels_last
from fastcnn.ops.conv_sums import accumulator_dtype, sum_parts
from fastcnn.ops.depthwise_conv2d import DepthwiseConv2dFunction

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


def is_packed(tensor, gaps=True):
    """Whether the tensor is NHWC and every pixel starts on 16 bytes; gaps: also a slice of a wider one's channels."""
    pitch, c, size = conv2d_images.pixel_pitch(tensor), tensor.shape[1], tensor.element_size()
    in_units = pitch is not None and c * size % 16 == 0 and pitch * size % 16 == 0
    return in_units and (gaps or pitch == c) and tensor.data_ptr() % 16 == 0


def _has_packed_rows(tensor):
    """Whether the tensor is NHWC without gaps and every row starts on 16 bytes."""
    _, c, _, w = tensor.shape
    dense = conv2d_images.pixel_pitch(tensor) == c
    return dense and w * c * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0


def precision_of(tensor, tf32_switch):
    """tf32 where torch's own switch for convolutions ("conv") or matrix products ("matmul") allows it, else ieee."""
    if tensor.dtype != torch.float32 or tensor.device.type == "cpu":
        return "ieee"
    switch = torch.backends.cudnn.conv if tf32_switch == "conv" else torch.backends.cuda.matmul
    return "tf32" if switch.fp32_precision == "tf32" else "ieee"


def _access(kind, image, weight, output, groups, others):
    """How a pass can read and write these tensors: one of conv_problem.ACCESSES."""
    outputs = [output, *others]
    unit = 16 // image.element_size()
    # the gradient of the weight is written in any strides; filters of shorter pixels are only read expanded or singly
    filters = [] if kind == "backward_weight" or (groups > 1 and weight.shape[1] % unit) else [weight]
    if all(map(is_packed, [image, *outputs])) and all(is_packed(weight, gaps=False) for weight in filters):
        return "packed"
    if kind != "backward_input" and all(is_packed(t, gaps=False) for t in outputs) and _has_packed_rows(image):
        return "image"
    # both tensors that are read
    read = {"forward": (image, weight), "backward_input": (output, weight), "backward_weight": (output, image)}
    whole = weight.shape[1] % unit == 0 and weight.shape[0] // groups % unit == 0
    return "wide" if whole and all(map(conv2d_gather.is_wide, read[kind])) else "narrow"


def problem_of(kind, image, weight, output, geometry, precision, others=(), pending=None):
    """The conv_launch.Problem of a pass.

    image is the convolution's input side, output its output side; others are further tensors that something on load or
    on store reads, or None. Planes of channels apart would be read one element at a time: copying them first costs two
    passes over memory, and the convolution many.
    """
    stride, padding, dilation, groups = geometry
    (n, c, h, w), (k, _, r, s), (p, q) = image.shape, weight.shape, output.shape[2:]
    others = [t for t in others if t is not None]
    access, copied = _access(kind, image, weight, output, groups, others), False
    if access == "narrow":
        *ordered, filters = (
            torch.empty_like(t, memory_format=torch.channels_last, device="meta") for t in (image, output, weight)
        )
        access = _access(kind, ordered[0], filters, ordered[1], groups, ())
        copied = access != "narrow"
    arithmetic = {torch.float32: precision, torch.float64: "fp64"}.get(image.dtype, "16-bit")
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    fused = pending is not None or len(others) > 0
    sizes = n, c, h, w, k, r, s, p, q
    state = fused, pending is not None, copied
    return conv_launch.Problem(kind, *sizes, *geometry, groups, arithmetic, access, *state)


def _ordered(copied, *tensors):
    """The tensors, or copies in channels_last."""
    if not copied:
        return tensors
    return tuple(None if t is None else t.contiguous(memory_format=torch.channels_last) for t in tensors)


def _ordered_correction(copied, correction):
    return correction and correction._replace(y=_ordered(copied, correction.y)[0])


def _family(launch):
    return {"images": conv2d_images, "stem": conv2d_stem}.get(launch.family, conv2d_gather)


def _chosen(problem, run, backend, image, **options):
    """run(launch) with the launch that conv_launch chooses; cuDNN stands for election in backend "auto" only.

    options: what compiles into the kernel where it is not None, a pending activation and a join with their own options.
    """
    allowed = backend == "auto" and conv2d_vendor.can(problem)
    variant = [image.dtype]
    for option in options.values():
        if isinstance(option, Pending):
            variant.append(option.compiled)
        else:
            variant.append(option.activation if isinstance(option, Join) else option is not None)
    return run(conv_launch.choose(problem, image.device, run, allowed, tuple(variant)))


def _kept(result, target, out):
    """The result in target's memory if `out` was asked for, else in its strides."""
    if result is target:
        return target
    return common.with_strides_of(result, target) if out is None else target.copy_(result)


def conv2d_forward(
    input,
    weight,
    bias,
    size,
    stride,
    padding,
    dilation,
    groups,
    channels_last,
    tf32_switch,
    backend,
    *,
    pending=None,
    activation=None,
    residual=None,
    pivot=None,
    out=None,
):
    """y [N, K, *size]; padding is (top, left). Also the gradient of the input of conv_transpose2d.

    Args:
        pending: conv_fusion.Pending, applied to input as it is loaded, or None.
        activation: (name, slope) of the activation of y, or None.
        residual: added before the activation, shaped as y, or None.
        pivot: [K]; with it, returns (y, sums [S, 2, K]): of y - pivot and of its square over everything but the
            channels, in S parts, for batch_statistics.from_sums.
        out: where y is written, a slice of wider images' channels for example, or None; it is what is returned.

    Raises:
        TypeError, ValueError: out is not of y's shape, dtype and device.
    """
    y = output_of(out, input, weight.shape[0], size, channels_last)
    if y.numel() == 0:
        return y if pivot is None else (y, torch.zeros((1, 2, y.shape[1]), dtype=pivot.dtype, device=y.device))
    geometry = stride, padding, dilation, groups
    precision = precision_of(input, tf32_switch)
    if residual is not None:
        residual = common.with_strides_of(residual, y)
    problem = problem_of("forward", input, weight, y, geometry, precision, (residual,), pending)
    if activation is not None or pivot is not None:
        problem = dataclasses.replace(problem, fused=True)

    def run(launch):
        if launch.family == "cudnn":
            return _kept(conv2d_vendor.forward(input, weight, bias, *geometry, tf32_switch), y, out), None
        x, filters, added = _ordered(problem.copied, input, weight, residual)
        written = torch.empty_like(y, memory_format=torch.channels_last) if problem.copied else y
        filters = filters if launch.pack == 1 else conv2d_gather.expand_groups(filters, groups, launch.pack)
        fusion = dict(pending=pending, activation=activation, residual=added, pivot=pivot)
        how = (stride, padding, dilation, groups // launch.pack, precision, launch)
        sums = _family(launch).forward(x, filters, bias, written, *how, **fusion)
        return _kept(written, y, out), sums

    options = dict(bias=bias, pending=pending, activation=activation, residual=residual, pivot=pivot)
    y, sums = _chosen(problem, run, backend, input, **options)
    return y if pivot is None else (y, sums)


def conv2d_backward_input(
    grad_output,
    weight,
    bias,
    size,
    stride,
    padding,
    dilation,
    groups,
    channels_last,
    tf32_switch,
    backend,
    *,
    correction=None,
    pending=None,
    input=None,
    join=None,
    add=None,
    out=None,
    in_parts=False,
):
    """Gradient of the input [N, C, *size]. With a bias [C] it is the forward of conv_transpose2d.

    Args:
        correction: conv_fusion.Correction, applied to grad_output as it is loaded, or None.
        pending: the conv_fusion.Pending through which the convolution read its input, or None; with it, input is the
            raw tensor, and the result is (grad_input, grad_scale [C], grad_shift [C]).
        join: the conv_fusion.Join whose output is the convolution's input, or None; with it, the result is (dm, sum of
            dm * left [C], sum of dm [C]), where dz is the gradient of the input and add. Not with pending.
        add: a gradient that is added, shaped as the result, or None; the sums of pending are without it.
        out: where the result is written, or None; it is what is returned. It may be add: then that is accumulated.
        in_parts: with pending or join, the result is (grad_input or dm, the two sums [S, 2, C] in S parts): for who
            adds up a few as easily as one.

    Raises:
        TypeError, ValueError: out is not of the result's shape, dtype and device; join and pending are both given.
    """
    if pending is not None and join is not None:
        raise ValueError("join must be None where pending is given: a convolution's input is one of them")
    grad_input = output_of(out, grad_output, weight.shape[1] * groups, size, channels_last)
    summed = pending is not None or join is not None
    if grad_input.numel() == 0:
        dtype = accumulator_dtype(grad_input.dtype)
        zeros = torch.zeros((1, 2, grad_input.shape[1]), dtype=dtype, device=grad_input.device)
        return _with_sums(grad_input, zeros, in_parts) if summed else grad_input
    geometry = stride, padding, dilation, groups
    precision = precision_of(grad_output, tf32_switch)
    if correction is not None:
        grad_output, correction = correction.beside(grad_output)
    raw, joined, add = (
        None if t is None else common.with_strides_of(t, grad_input)
        for t in (join.left if join else input if pending else None, join and join.output, add)
    )
    others = (correction and correction.y, raw, joined, add)
    problem = problem_of("backward_input", grad_input, weight, grad_output, geometry, precision, others)
    problem = dataclasses.replace(problem, fused=problem.fused or correction is not None)

    def run(launch):
        if launch.family == "cudnn":
            result = conv2d_vendor.backward_input(grad_output, weight, bias, size, *geometry, tf32_switch)
            return _kept(result, grad_input, out), None
        dy, filters, x, z, added = _ordered(problem.copied, grad_output, weight, raw, joined, add)
        written = torch.empty_like(grad_input, memory_format=torch.channels_last) if problem.copied else grad_input
        filters = filters if launch.pack == 1 else conv2d_gather.expand_groups(filters, groups, launch.pack)
        fusion = dict(correction=_ordered_correction(problem.copied, correction), pending=pending, input=x, add=added)
        fusion["join"] = join and Join(z, x)
        how = (stride, padding, dilation, groups // launch.pack, precision, launch)
        sums = _family(launch).backward_input(dy, filters, bias, written, *how, **fusion)
        return _kept(written, grad_input, out), sums

    options = dict(bias=bias, correction=correction, pending=pending, join=join, add=add)
    grad_input, sums = _chosen(problem, run, backend, grad_output, **options)
    return _with_sums(grad_input, sums, in_parts) if summed else grad_input


def _with_sums(result, parts, in_parts):
    return (result, parts) if in_parts else (result, *sum_parts(parts))


def conv2d_backward_weight(
    grad_output,
    input,
    weight,
    stride,
    padding,
    dilation,
    groups,
    tf32_switch,
    backend,
    *,
    correction=None,
    pending=None,
):
    """Gradient of the weight, whose values are not read: it gives the shape and the strides of the gradient.

    correction and pending as in conv2d_backward_input, both applied on load.
    """
    grad_weight = empty_grad_weight(weight)
    if grad_output.numel() == 0:
        return grad_weight.zero_()
    geometry = stride, padding, dilation, groups
    precision = precision_of(input, tf32_switch)
    if correction is not None:
        grad_output, correction = correction.beside(grad_output)
    others = (correction and correction.y,)
    problem = problem_of("backward_weight", input, weight, grad_output, geometry, precision, others, pending)
    problem = dataclasses.replace(problem, fused=problem.fused or correction is not None)

    def run(launch):
        if launch.family == "cudnn":
            result = conv2d_vendor.backward_weight(grad_output, input, weight, *geometry, tf32_switch)
            return common.with_strides_of(result, grad_weight)
        dy, x = _ordered(problem.copied, grad_output, input)
        fusion = dict(correction=_ordered_correction(problem.copied, correction), pending=pending)
        how = (stride, padding, dilation, groups // launch.pack, precision, launch)
        if launch.pack == 1:
            _family(launch).backward_weight(dy, x, grad_weight, *how, **fusion)
            return grad_weight
        shape = weight.shape[0], weight.shape[1] * launch.pack, *weight.shape[2:]
        packed = torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)
        _family(launch).backward_weight(dy, x, packed, *how, **fusion)
        conv2d_gather.contract_groups(packed, grad_weight, groups, launch.pack)
        return grad_weight

    return _chosen(problem, run, backend, input, correction=correction, pending=pending)


def should_materialize(input, weight, size, stride, padding, dilation, groups, channels_last, tf32_switch):
    """Whether to write a pending activation of input before forward, and once more in backward: the predicted faster.

    Arguments as for conv2d_forward; see conv_launch.should_materialize.
    """
    geometry = stride, padding, dilation, groups
    precision = precision_of(input, tf32_switch)
    y = empty_image(input.to("meta"), weight.shape[0], size, channels_last)
    if y.numel() == 0:
        return False
    problem = problem_of("forward", input, weight, y, geometry, precision)
    return conv_launch.should_materialize(problem, input.device)


def conv2d_backward_bias(grad_output, backend):
    """Gradient of the bias [K]: the sum over everything but the channels."""
    grad_bias = torch.empty(grad_output.shape[1], dtype=grad_output.dtype, device=grad_output.device)
    conv2d_gather.backward_bias(grad_output, grad_bias)
    return grad_bias


_geometry = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
forward_op = common.register(
    f"conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[] size, {_geometry}, bool channels_last,"
    " str tf32_switch, str backend) -> Tensor",
    conv2d_forward,
    lambda input, weight, bias, size, stride, padding, dilation, groups, channels_last, *_: empty_image(
        input, weight.shape[0], size, channels_last
    ),
)
backward_input_op = common.register(
    f"conv2d_backward_input(Tensor grad_output, Tensor weight, Tensor? bias, SymInt[] size, {_geometry},"
    " bool channels_last, str tf32_switch, str backend) -> Tensor",
    conv2d_backward_input,
    lambda grad_output, weight, bias, size, stride, padding, dilation, groups, channels_last, *_: empty_image(
        grad_output, weight.shape[1] * groups, size, channels_last
    ),
)
backward_weight_op = common.register(
    f"conv2d_backward_weight(Tensor grad_output, Tensor input, Tensor weight, {_geometry}, str tf32_switch,"
    " str backend) -> Tensor",
    conv2d_backward_weight,
    lambda grad_output, input, weight, *_: empty_grad_weight(weight),
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
            reference = lambda *inputs: padded_reference(*inputs, ctx.size, *ctx.geometry)
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


def among_vendors(backend, input):
    """The backend for the host functions: "auto" where cuDNN is a candidate, else what Op.route said."""
    free = input.is_cuda and current_backend() == "auto" and not is_strict()
    return "auto" if backend == "triton" and free else backend


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


def _pytorchs(input, weight, bias=None, *others, **named):
    # PyTorch reads memory that operands on "meta" do not have
    if not weight.is_cpu or not (bias is None or bias.is_cpu) or _has_own_gradients(input, weight, *others, **named):
        raise ValueError
    return F.conv2d(input, weight, bias, *others, **named)


def _has_own_gradients(input, weight, stride=1, padding=0, dilation=1, groups=1):
    return depthwise_conv2d.pays_on_cpu(input, weight, stride, dilation, groups)


def check_convolution(input, weight, bias, stride, padding, dilation, groups, name="weight"):
    """Raise unless conv2d can take these arguments; (size, stride, padding, dilation) of the host functions.

    name: what the caller calls its weight.
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
            f"{name} must not reach beyond the padded input ({padded[0]} x {padded[1]}), got a filter of "
            f"{extent[0]} x {extent[1]} with its dilation"
        )
    size = [(padded[d] - extent[d]) // strides[d] + 1 for d in (0, 1)]
    return size, strides, pads, dilations


@_op.torch_first(_pytorchs)
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
        [N, K, P, Q] or [K, P, Q]; channels_last if input or weight is. NaN and Inf stay under the filters that read
        them, except that groups of few channels share tiles: there they may reach other groups at the same pixel.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, its value and what is right.
    """
    size, strides, pads, dilations = check_convolution(input, weight, bias, stride, padding, dilation, groups)
    depthwise = depthwise_conv2d.is_depthwise(weight, groups)
    operands = [None if t is None else t.to(compute_dtype(t)) for t in (input, weight, bias)]
    if depthwise:
        backend = depthwise_conv2d.op.route(input, lambda backend: depthwise_conv2d.why_not(backend, *operands[:2]))
        backend = "auto" if backend == "cpu" and current_backend() == "auto" and not is_strict() else backend
    else:
        backend = among_vendors(_op.route(input, lambda backend: _why_not(backend, input, weight)), input)
    if backend == "torch":
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    input, weight, bias = operands
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    if depthwise:
        y = DepthwiseConv2dFunction.apply(batch, weight, bias, size, strides, pads, dilations, backend)
    else:
        y = Conv2dFunction.apply(batch, weight, bias, size, strides, pads, dilations, groups, "conv", backend)
    return y if input.dim() == 4 else y.squeeze(0)
