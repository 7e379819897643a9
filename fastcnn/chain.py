"""The fused chain at run time: values that are not yet computed, and the functions that read and make them.

`conv_batch_norm(x, conv, bn)` returns no tensor but a Pending: the convolution's raw output and batch norm as two
vectors. `activate` and `add` only note what is still to be done; the next convolution or pool does it while it reads.
Every function here takes plain tensors, too, and gives the same numbers as torch's modules one after the other;
`materialize` turns any value into a tensor. What a value can carry is in fastcnn.ops.pending; where a function cannot
go on without a tensor, it makes one.

Each reader of a value leaves in it the tensor from which the next one shall read (conv_batch_norm.py, "passed"): values
belong to one forward pass, and their functions must run in its order.
"""

import contextlib

import torch
import torch.distributed as dist
from torch import nn

from fastcnn import functional as F
from fastcnn.ops import batch_norm as batch_norm_op
from fastcnn.ops import batch_norm_module as module
from fastcnn.ops import channel_order, common, conv2d, pool_again, pooling
from fastcnn.ops import conv_batch_norm as fused
from fastcnn.ops import pending as passes
from fastcnn.ops.activation import activation_reference
from fastcnn.ops.batch_norm_affine import affine
from fastcnn.ops.concatenate import ConcatenateFunction
from fastcnn.ops.dense_block import DenseBlockFunction, Step
from fastcnn.ops.materialize import MaterializeFunction
from fastcnn.ops.pending_batch_norm import PendingBatchNormFunction
from fastcnn.ops.pending_pool import AdaptiveAvgPool, AvgPool, MaxPool, PendingPoolFunction
from fastcnn.ops.shared_batch_norm import SharedBatchNormFunction
from fastcnn.ops.squeeze_excite import MAX_SQUEEZED, Form, SqueezeExciteFunction

KINDS = ("relu", "relu6", "leaky_relu", "silu", "sigmoid", "tanh", "hardswish", "gelu", "gelu_tanh")


class Pending:
    """z = f(raw * scale + shift) * gate, which readers compute while they load raw.

    raw [N, C, H, W]; scale, shift [C] or None; f a name in KINDS or "none"; gate [N, C] or [N, 1] or None.
    """

    def __init__(self, raw, scale, shift, activation="none", slope=0.0, gate=None, scaled=False):
        self.raw, self.scale, self.shift = raw, scale, shift
        self.activation, self.slope, self.gate = activation, slope, gate
        self.scaled = scaled
        self.takes = channel_order.Takes()

    @property
    def is_affine(self):
        """Whether it is raw * scale + shift."""
        return self.activation == "none" and self.gate is None

    def expression(self):
        """The fastcnn.ops.pending.Expression of z."""
        return passes.Expression(self.raw, self.scale, self.shift, self.activation, self.slope, self.gate)

    def now_with(self, **changes):
        """The same with other parts."""
        parts = dict(
            raw=self.raw, scale=self.scale, shift=self.shift, activation=self.activation, slope=self.slope,
            gate=self.gate, scaled=self.scaled,
        )  # fmt: skip
        return Pending(**(parts | changes))


class Join:
    """z = out(left + right), computed by its first reader; out "relu" or "none".

    left: Pending. right: tensor, or an affine Pending.
    """

    def __init__(self, left, right, out="none"):
        self.left, self.right, self.out = left, right, out
        self.result = None

    def expression(self):
        """The fastcnn.ops.pending.Expression of z."""
        right, scale, shift = self.right, None, None
        if isinstance(right, Pending):
            right, scale, shift = right.raw, right.scale, right.shift
        return self.left.expression()._replace(right=right, right_scale=scale, right_shift=shift, out=self.out)


class Measured:
    """A tensor of many parts whose makers took their statistics: raw [N, C, H, W]; mean, biased var [C], or None."""

    def __init__(self, raw, mean, var):
        self.raw, self.mean, self.var = raw, mean, var


class Channels:
    """Channels of Pendings with one activation, in an order of their own that only readers make.

    runs: fastcnn.ops.channel_order.Run of each. shuffle: > 1 where they are channel_shuffle(one Pending, shuffle).
    """

    def __init__(self, runs, shuffle=1):
        self.runs, self.shuffle = runs, shuffle
        self._in_memory = self._in_order = None

    def side_by_side(self):
        """(Pending of the channels as is cheapest, of which of them its channels are or None for theirs)."""
        if self._in_order is not None:
            return self._in_order, None
        runs = channel_order.by_memory(self.runs)
        if self._in_memory is None:
            self._in_memory = _gathered(runs)
        return self._in_memory, channel_order.positions(runs)

    def in_order(self):
        """Pending of the channels in their order."""
        if self._in_order is None:
            runs = channel_order.by_memory(self.runs)
            order = channel_order.inverse(channel_order.positions(runs))
            self._in_order = _gathered(runs, None if order == tuple(range(len(order))) else order)
        return self._in_order


def _gathered(runs, order=None):
    """Pending of what the runs say, one after the other; or in an order of that."""
    parts, pieces = channel_order.pieces_of(runs)
    if order is None and pieces == [(0, 0, parts[0].raw.shape[1])]:
        return parts[0]
    tensors = [t for part in parts for t in (part.raw, part.scale, part.shift)]
    raw, scale, shift, *passed = channel_order.GatherFunction.apply(
        [part.takes for part in parts], pieces, order, *tensors
    )
    passed = [old if new is None else new for old, new in zip(tensors, passed, strict=True)]
    for i, part in enumerate(parts):
        part.raw, part.scale, part.shift = passed[3 * i : 3 * i + 3]
    return Pending(raw, scale, shift, parts[0].activation, parts[0].slope)


class Folded:
    """Evaluation without gradients: f(conv(z) with batch norm in it + residual), computed by its first reader."""

    def __init__(self, run, activation=None, slope=0.0, residual=None):
        self.run = run  # of activation, slope, residual
        self.activation, self.slope, self.residual = activation, slope, residual
        self.result = None

    def now_with(self, **changes):
        """The same with other parts."""
        parts = dict(activation=self.activation, slope=self.slope, residual=self.residual)
        return Folded(self.run, **(parts | changes))


def materialize(value):
    """The value as a tensor; tensors, and whatever is no value, as they are."""
    if isinstance(value, Folded):
        if value.result is None:
            value.result = value.run(value.activation, value.slope, value.residual)
        return value.result
    if isinstance(value, Join):
        if value.result is None:
            value.result = _stored(value.expression(), value.left.scaled)[0]
        return value.result
    if isinstance(value, Channels):
        return materialize(value.in_order())
    if isinstance(value, Pending):
        z, value.raw = _stored(value.expression(), value.scaled)
        return z
    return value.raw if isinstance(value, Measured) else value


def _stored(expression, scaled):
    """(z, x for the next reader)."""
    backend = fused.op.route(expression.x, lambda backend: None)
    z, passed = MaterializeFunction.apply(*expression, scaled, backend)
    return z, expression.x if passed is None else passed


def _readable(value):
    """(Expression, scaled, function that takes the tensors for the next reader) of a value or tensor."""
    if isinstance(value, Join) and value.result is None:

        def leave(z, passed):
            value.result = z

        return value.expression(), value.left.scaled, leave
    if isinstance(value, Pending):

        def leave(z, passed):
            value.raw = value.raw if passed is None else passed

        return value.expression(), value.scaled, leave
    if isinstance(value, Join):

        def leave(z, passed):
            value.result = value.result if passed is None else passed

        return passes.Expression(value.result), False, leave
    return passes.Expression(materialize(value)), False, lambda z, passed: None


def likeness(x):
    """A tensor of the shape, dtype and device of a tensor or value; its numbers mean nothing."""
    if isinstance(x, Join) and x.result is None:
        return x.left.raw
    if isinstance(x, Channels):
        return x.runs[0].part.raw[:, :1].expand(-1, channel_order.channels_of(x.runs), -1, -1)
    return x.raw if isinstance(x, Pending) else materialize(x)


def _norm(bn, like, channels, size):
    """(Norm, running_mean, running_var) of this call of a batch norm module on images of these channels and this size.

    Raises TypeError or ValueError if the module does not fit, before anything changes.
    """
    group = module.group_of(bn)
    # nothing but its shape, dtype and device is looked at
    y = like.new_empty(1, dtype=conv2d.compute_dtype(like)).expand(like.shape[0], channels, *size)
    parameters = bn.running_mean, bn.running_var, bn.weight, bn.bias
    batch_norm_op.check(y, *parameters, module.uses_batch(bn), 0.0, bn.eps, alone=group is None)
    *running, batch, momentum, batches = module.arguments_and_counter(bn)
    return fused.Norm(batch, momentum, bn.eps, group, batches), *running


def _in_one_dtype(value, weight):
    """The value and the weight as the convolution takes them: in autocast's dtype where that is on."""
    tensor = likeness(value)
    dtype = conv2d.compute_dtype(tensor)
    if tensor.dtype != dtype:
        value = materialize(value).to(dtype)
    return value, weight.to(conv2d.compute_dtype(weight))


def _without_autocast(tensor):
    """Context in which PyTorch's convolutions, where they run, take the dtypes as they are."""
    if common.autocast_enabled(tensor):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


def _geometry(x, conv, padding=None):
    """The fused.Convolution of this module on an image of x's size; with a padding in place of its own."""
    padding = conv.padding if padding is None else padding
    size, *where = conv2d.check_convolution(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)
    return fused.Convolution(tuple(size), *where, conv.groups)


def _runs_plainly(value, conv):
    """Whether the layers run one by one: what they get is not what the chain is made for."""
    if not isinstance(value, torch.Tensor):
        return False
    return (
        value.dim() != 4
        or value.dtype not in common.FLOATS
        or conv2d.compute_dtype(value) != conv2d.compute_dtype(conv.weight)
        or value.numel() == 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def conv_batch_norm(x, conv, bn, out=None, at_once=False):
    """bn(conv(x)), not yet computed.

    Args:
        x: tensor [N, C, H, W] or value.
        conv: torch.nn.Conv2d with zero padding. bn: torch.nn.BatchNorm2d or SyncBatchNorm of its channels. Their
            parameters, statistics and training flags are read, and updated, as their own calls would.
        out: the fastcnn.ops.concatenate.Slot where the convolution writes, or None; cat then copies nothing.
        at_once: whether x is read now, as its memory will be written to; a Folded would read it when it is read.

    Returns:
        Pending (Folded in evaluation without gradients), or a tensor where the layers ran one by one.
    """
    if _runs_plainly(x, conv):
        return bn(conv(x))
    image = likeness(x)
    geometry = _geometry(image, conv)
    norm, running_mean, running_var = _norm(bn, image, conv.weight.shape[0], geometry.size)
    if not norm.training and not torch.is_grad_enabled():
        folded = _folded(x, conv, bn, norm, geometry)
        if at_once:
            materialize(folded)
        return folded
    y, scale, shift = _read(x, conv, geometry, bn.weight, bn.bias, running_mean, running_var, norm, out)
    return Pending(y, scale, shift)


def conv(x, conv, padding=None, factor=1.0, out=None):
    """conv(x) * factor, a tensor; a value's activation is applied on load.

    padding: what conv's forward gives an image of this size, if it is not conv.padding.
    factor: a number, which a value's convolution has in its weight and bias.
    out: as of conv_batch_norm.
    """
    if isinstance(x, torch.Tensor) or not torch.is_grad_enabled():
        return conv(materialize(x)) if factor == 1 else conv(materialize(x)) * factor
    return _read(x, conv, _geometry(likeness(x), conv, padding), slot=out, factor=factor)[0]


def _read(
    x, conv, geometry, gamma=None, beta=None, running_mean=None, running_var=None, norm=None, slot=None, factor=1.0
):  # fmt: skip
    """(y, scale, shift)"""
    x, columns, shuffle = _arranged(x, conv, geometry)
    weight, bias = conv.weight, conv.bias
    if factor != 1:
        weight, bias = weight * factor, None if bias is None else bias * factor
    x, weight = _in_one_dtype(x, weight)
    if columns is not None:
        weight = channel_order.PermuteFunction.apply(weight, columns)
    expression, scaled, leave = _readable(x)
    backend = fused.op.route(expression.x, lambda backend: None)
    if norm is None and bias is not None:
        bias = bias.to(weight.dtype)
    e = expression
    with _without_autocast(e.x):
        y, scale, shift, z, passed = fused.ConvBatchNormFunction.apply(
            e.x, e.scale, e.shift, e.gate, e.right, e.right_scale, e.right_shift, weight, bias, gamma, beta,
            running_mean, running_var, e.activation, e.slope, e.out, scaled, geometry, norm, backend, slot, shuffle,
            *pool_again.recipe_of(e.x),
        )  # fmt: skip
    leave(z, passed)
    return y, scale, shift


def _arranged(x, conv, geometry):
    """(value, of which channels its channels are or None, shuffle): how a convolution reads Channels."""
    if not isinstance(x, Channels):
        return x, None, 1
    if conv.groups == 1:
        return *x.side_by_side(), 1
    if x.shuffle > 1:
        part, weight = _in_one_dtype(x.runs[0].part, conv.weight)
        image = likeness(part)
        if fused.is_depthwise(image, weight, geometry, fused.op.route(image, lambda backend: None)):
            return part, None, x.shuffle
    return x.in_order(), None, 1


def _folded(x, conv, bn, norm, geometry):
    x, weight = _in_one_dtype(materialize(x), conv.weight)
    backend = fused.op.route(x, lambda backend: None)

    def run(activation, slope, residual):
        mean, var = (t.to(passes.vector_dtype(x)) for t in (bn.running_mean, bn.running_var))
        scale, shift, _ = affine(mean, var, bn.weight, bn.bias, norm.eps)
        if conv.bias is not None:
            shift = shift + scale * conv.bias
        return fused.convolve_folded(x, weight, scale, shift, geometry, backend, activation, slope, residual)

    return Folded(run)


def batch_norm(x, bn):
    """bn(x) of what no convolution has just made, not yet computed: a Pending, or a tensor where bn itself ran."""
    tensor = materialize(x)
    if tensor.dim() != 4 or not torch.is_grad_enabled() or tensor.numel() == 0 or tensor.dtype not in common.FLOATS:
        return bn(tensor)
    norm, running_mean, running_var = _norm(bn, tensor, tensor.shape[1], tensor.shape[2:])
    backend = fused.op.route(tensor, lambda backend: None)
    if isinstance(x, Measured) and x.mean is not None and norm.training and norm.group is None:
        vectors = SharedBatchNormFunction.apply(
            x.raw, x.mean, x.var, bn.weight, bn.bias, running_mean, running_var, norm, backend
        )
        return Pending(*vectors, scaled=True)
    raw, scale, shift, passed = PendingBatchNormFunction.apply(
        tensor, bn.weight, bn.bias, running_mean, running_var, norm, backend
    )
    if isinstance(x, Join):
        x.result = passed
    return Pending(raw, scale, shift)


def activate(x, kind, slope=0.0):
    """The activation of a value, which stays one, or of a tensor."""
    if isinstance(x, Pending) and x.is_affine:
        return x.now_with(activation=kind, slope=slope)
    if isinstance(x, Folded) and x.result is None and x.activation is None:
        return x.now_with(activation=kind, slope=slope)
    if isinstance(x, Join) and x.out == "none":
        if kind == "relu" and x.result is None:
            return Join(x.left, x.right, "relu")
        return Pending(materialize(x), None, None, kind, slope)
    return activation_reference(materialize(x), kind, slope)


def add(a, b):
    """a + b of values or tensors of one shape; a Join or Folded where one of them is a value."""
    a, b = (x.result if isinstance(x, Join) and x.result is not None else x for x in (a, b))
    # a join has one gradient
    a, b = (materialize(x) if isinstance(x, Pending) and x.scaled is True else x for x in (a, b))
    folded = [x for x in (a, b) if isinstance(x, Folded) and x.result is None and x.activation is x.residual is None]
    if folded:
        other = materialize(b if folded[0] is a else a)
        return folded[0].now_with(residual=other)
    if isinstance(b, Pending) and not (isinstance(a, Pending) and b.is_affine):
        a, b = b, a  # an activation or a gate fits on the left alone
    if not isinstance(a, Pending):
        return materialize(a) + materialize(b)
    if isinstance(b, Pending) and not b.is_affine:
        b = materialize(b)
    b = b if isinstance(b, Pending) else materialize(b)
    right = b.raw if isinstance(b, Pending) else b
    if not isinstance(right, torch.Tensor) or right.shape != a.raw.shape or right.dtype != a.raw.dtype:
        return materialize(a) + materialize(b)
    if isinstance(b, Pending) and b.scale is not None and a.scale is None and a.is_affine:
        a, b = b, a.raw
    return Join(a, b)


def multiply(a, b):
    """a * b; a Pending where one is that and the other a factor per image and channel, [N, C, 1, 1] or [N, 1, 1, 1]."""
    value, factor = (a, b) if isinstance(a, Pending) else (b, a)
    factor = materialize(factor)
    if isinstance(value, Pending) and value.gate is None and isinstance(factor, torch.Tensor):
        n, c = value.raw.shape[:2]
        if factor.dtype == value.raw.dtype and factor.shape in ((n, c, 1, 1), (n, 1, 1, 1)):
            return value.now_with(gate=factor.flatten(1))
    return materialize(value) * factor


def row_noise(x, probability, scaled=True):
    """Zeros of this probability for the samples of x, else 1 / (1 - probability), drawn as torchvision and timm do."""
    x = likeness(x)
    noise = torch.empty((x.shape[0], *[1] * (x.dim() - 1)), dtype=x.dtype, device=x.device)
    noise = noise.bernoulli_(1.0 - probability)
    return noise.div_(1.0 - probability) if scaled and probability < 1.0 else noise


def squeeze_excite(x, fc1, fc2, activation="relu", gate_activation="sigmoid"):
    """x times a gate per image and channel, made of the means of x: gate = g(fc2(f(fc1(mean of x)))).

    Args:
        x: tensor [N, C, H, W] or value.
        fc1, fc2: torch.nn.Conv2d with 1x1 filters, or torch.nn.Linear: C channels to few, and back to C.
        activation, gate_activation: f and g, names in KINDS or "hardsigmoid".

    Returns:
        Pending with a gate, or a tensor where x is none.
    """
    for name, kind in (("activation", activation), ("gate_activation", gate_activation)):
        if kind not in (*KINDS, "hardsigmoid"):
            raise ValueError(f"{name} must be one of {', '.join(KINDS)} or hardsigmoid, got {kind!r}")
    n, c = likeness(x).shape[:2]
    if _gates(x, fc1, fc2):
        form = Form(x.activation, x.slope, activation, gate_activation)
        backend = fused.op.route(x.raw, lambda backend: None)
        gate, raw = SqueezeExciteFunction.apply(
            x.raw, x.scale, x.shift, fc1.weight, fc1.bias, fc2.weight, fc2.bias, form, backend
        )
        return x.now_with(raw=raw, gate=gate, scaled=passes.AT_Z)
    hidden = activation_reference(fc1(mean(x, keepdim=fc1.weight.dim() == 4)), activation)
    gate = activation_reference(fc2(hidden), gate_activation)
    return multiply(x, gate.view(n, c, 1, 1))


def _gates(x, fc1, fc2):
    """Whether SqueezeExciteFunction makes this gate."""
    if not isinstance(x, Pending) or x.scale is None or x.gate is not None or x.scaled or x.raw.numel() == 0:
        return False
    c, s = x.raw.shape[1], len(fc1.weight)
    shapes = tuple(fc1.weight.shape[:2]), tuple(fc2.weight.shape[:2])
    return (
        shapes == ((s, c), (c, s))
        and 0 < s <= MAX_SQUEEZED
        and all(fc.weight.numel() == s * c and conv2d.compute_dtype(fc.weight) == x.raw.dtype for fc in (fc1, fc2))
        and all(getattr(fc, "padding", (0, 0)) in ((0, 0), "valid") for fc in (fc1, fc2))
    )


def max_pool2d(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    """fastcnn.functional.max_pool2d of a tensor or value, a tensor."""
    if not isinstance(x, Pending):
        x = materialize(x)
        if pool_again.recipe_of(x)[0] is None:
            return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
        return pool_again.max_pool2d(
            x, list(pooling.window(x, kernel_size, stride, padding, dilation, ceil_mode)), ceil_mode
        )
    window = pooling.window(x.raw, kernel_size, stride, padding, dilation, ceil_mode)
    return _pool(x, MaxPool(list(window), ceil_mode))


def avg_pool2d(
    x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):  # fmt: skip
    """fastcnn.functional.avg_pool2d of a tensor or value, a tensor."""
    if not isinstance(x, Pending):
        how = ceil_mode, count_include_pad, divisor_override
        return F.avg_pool2d(materialize(x), kernel_size, stride, padding, *how)
    window = pooling.window(x.raw, kernel_size, stride, padding, 1, ceil_mode)
    return _pool(x, AvgPool(list(window), ceil_mode, count_include_pad, divisor_override))


def adaptive_avg_pool2d(x, output_size):
    """fastcnn.functional.adaptive_avg_pool2d of a tensor or value, a tensor."""
    if not isinstance(x, Pending):
        return F.adaptive_avg_pool2d(materialize(x), output_size)
    return _pool(x, AdaptiveAvgPool(pooling.parts("output_size", output_size, x.raw)))


def _pool(x, pool):
    """The pool of a Pending."""
    expression, scaled, leave = _readable(x)
    backend = fused.op.route(expression.x, lambda backend: None)
    y, passed = PendingPoolFunction.apply(*expression[:6], scaled, pool, backend)
    leave(None, passed)
    # on a GPU reading x once more costs more than keeping what is a quarter of it, and a pixel an image is little
    if backend != "triton" and y.shape[2:] != (1, 1):
        pool_again.note(y, expression, pool, backend)
    return y


def mean(x, keepdim=False):
    """The mean over height and width, a tensor [N, C], with keepdim [N, C, 1, 1]."""
    pooled = adaptive_avg_pool2d(x, 1)
    return pooled if keepdim else pooled.flatten(1)


def cat(values):
    """Values or tensors side by side along the channels; a Pending where all are that, with one activation.

    Nothing is copied where the convolutions wrote slots of one fastcnn.ops.concatenate.Buffer, one behind the other.
    """
    first, runs = values[0], _runs(values)
    if runs is not None and any(isinstance(value, Channels) for value in values):
        return Channels(runs)
    if runs is not None:
        raw = ConcatenateFunction.apply(*(value.raw for value in values))
        scale, shift = (torch.cat([getattr(value, name) for value in values]) for name in ("scale", "shift"))
        return Pending(raw, scale, shift, first.activation, first.slope)
    if _share_an_activation(values):
        return first.now_with(raw=ConcatenateFunction.apply(*(value.raw for value in values)))
    return torch.cat([materialize(value) for value in values], 1)


def _share_an_activation(values):
    """Whether all are f(raw) with one f and nothing else: convolutions without batch norm."""
    forms = set()
    for value in values:
        if not isinstance(value, Pending) or value.scale is not None or value.gate is not None or value.scaled:
            return False
        forms.add((value.activation, value.slope, value.raw.dtype))
    return len(forms) == 1 and values[0].activation != "none"


def _runs(values):
    """The runs of all values' channels, or None where they are not Pendings, or Channels of such, of one form."""
    groups = []
    for value in values:
        if isinstance(value, Channels):
            groups.append(value.runs)
        elif isinstance(value, Pending) and value.scale is not None and value.gate is None and not value.scaled:
            groups.append([channel_order.Run(value, 0, value.raw.shape[1], 0, 1)])
        else:
            return None
    runs = channel_order.concatenated(groups)
    form = lambda p: (p.activation, p.slope, p.raw.dtype, p.raw.shape[:1] + p.raw.shape[2:])
    return runs if len({form(run.part) for run in runs}) == 1 else None


def chunk(x, chunks):
    """torch.chunk of a tensor or value along the channels, a list: of a Pending Channels, which copy nothing."""
    runs = _runs([x])
    if runs is None:
        return list(materialize(x).chunk(chunks, 1))
    channels = channel_order.channels_of(runs)
    size = -(-channels // chunks)
    parts = (channel_order.chunk(runs, low, min(low + size, channels)) for low in range(0, channels, size))
    return [Channels(part) for part in parts]


def channel_shuffle(x, groups):
    """torch.nn.functional.channel_shuffle of a tensor or value, or of a list of them side by side along the channels.

    Of Pendings with one activation it is Channels: a depthwise convolution then finds its channels where they are, a
    dense one reads them as they lie, with its weight's columns in their order; any other reader makes a tensor.

    Raises:
        ValueError: the channels are not a multiple of groups.
    """
    values = x if isinstance(x, list) else [x]
    runs = _runs(values)
    channels = sum(likeness(value).shape[1] for value in values)
    if groups < 1 or channels % groups != 0:
        raise ValueError(f"groups must divide the number of channels, {channels}, got {groups}")
    if runs is None:
        together = materialize(values[0]) if len(values) == 1 else cat(values)
        return channel_order.channel_shuffle(together, groups)
    alone = len(values) == 1 and isinstance(values[0], Pending)
    return Channels(channel_order.shuffled(runs, groups), groups if alone else 1)


def dense_block(features, layers, activation="relu", slope=0.0):
    """The channels of features and those of all layers side by side.

    Args:
        features: tensor [N, C, H, W] or value.
        layers: (norm1, conv1, norm2, conv2) of each, torch's modules. A layer adds the channels
            conv2(f(norm2(conv1(f(norm1(all channels before it)))))).
        activation, slope: f, a name in KINDS.

    Returns:
        Measured, or a tensor where the layers ran one by one.
    """
    layers, x = list(layers), materialize(features)
    if not layers or not _share_a_buffer(x, layers):
        features = [x]
        for norm1, conv1, norm2, conv2 in layers:
            z = activate(batch_norm(cat(features), norm1), activation, slope)
            z = activate(conv_batch_norm(z, conv1, norm2), activation, slope)
            features.append(conv(z, conv2))
        return torch.cat(features, 1)
    x, _ = _in_one_dtype(x, layers[0][1].weight)
    steps, parameters = [], []
    for layer in layers:
        for bn, convolution in (layer[:2], layer[2:]):
            geometry = _geometry(x[:, :1].expand(-1, convolution.in_channels, -1, -1), convolution)
            steps.append(Step(*_norm(bn, x, convolution.in_channels, x.shape[2:]), geometry))
            weight = convolution.weight
            parameters += [bn.weight, bn.bias, weight.to(conv2d.compute_dtype(weight))]
    backend = fused.op.route(x, lambda backend: None)
    with _without_autocast(x):
        return Measured(*DenseBlockFunction.apply(x, steps, activation, slope, backend, *parameters))


def _share_a_buffer(x, layers):
    """Whether DenseBlockFunction computes these layers."""
    if _runs_plainly(x, layers[0][1]):
        return False
    channels, dtype = x.shape[1], conv2d.compute_dtype(layers[0][1].weight)
    for norm1, conv1, norm2, conv2 in layers:
        for bn, convolution, c in ((norm1, conv1, channels), (norm2, conv2, conv1.out_channels)):
            if (
                (bn.num_features, convolution.in_channels, convolution.padding_mode) != (c, c, "zeros")
                or convolution.bias is not None
                or conv2d.compute_dtype(convolution.weight) != dtype
                or _geometry(x[:, :1].expand(-1, c, -1, -1), convolution).size != tuple(x.shape[2:])
                or (isinstance(bn, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized())
            ):
                return False
        channels += conv2.out_channels
    return True
