"""Convolution and batch norm of the fused chain: from an expression of raw tensors to a raw tensor and two vectors.

    z = Expression (pending.py)     y = conv(z) [N, K, P, Q]     scale, shift [K]: batch norm of y is y * scale + shift

Neither z nor the normalised y is stored, except that a join's z is, which later layers read, too. On a GPU the kernels
make z while they load x and take y's statistics where they store it; backward's dgrad computes the gradient of x's
activation and batch norm's sums before it stores, and who adds these up also runs the backward of that batch norm
(batch_norm_affine.Ahead). So do the kernels of depthwise convolution, on CPU, too, and compute the gradient of y before
squeeze-excite on load (conv_fusion.GatedAhead). 1x1 convolutions on CPU do all of it in pieces that stay in the cache
(pointwise_conv2d_cpu.py). Elsewhere z is a temporary, made again in backward.

Every function that reads a value also returns it ("passed"): the next reader takes that one, and its gradient comes
back through this function, which adds it where it writes its own. So a value with many readers costs no pass for the
sum of their gradients.
Saved for backward: x (or what pool_again makes it of), y (in training), weight, vectors; of a join its z and the sides
that have a scale.
Torch counterpart: torch.nn.functional.conv2d and batch_norm. Sources: Ioffe and Szegedy 2015; the gradients of batch
norm that join the convolution's, fastcnn's documentation of the chain.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastcnn.backends import Op
from fastcnn.ops import batch_norm_affine as bn
from fastcnn.ops import (
    batch_statistics,
    conv2d,
    conv2d_backward,
    conv2d_join,
    conv_layout,
    conv_sums,
    depthwise_conv2d,
    pending,
    pending_cpu,
    pointwise_conv2d_cpu,
)
from fastcnn.ops.activation import activation_reference
from fastcnn.ops.conv_fusion import Correction, GatedAhead, Join, Pending

op = Op(
    "conv_batch_norm",
    cpu_kernel=True,
    cpu_auto=True,
    why="numba between the convolutions of oneDNN, and around BLAS in 1x1 ones; a fraction of PyTorch's saved bytes",
)


class Convolution(NamedTuple):
    """What conv2d's host functions take beside tensors; padding is (top, left)."""

    size: tuple
    stride: tuple
    padding: tuple
    dilation: tuple
    groups: int


class Norm(NamedTuple):
    """Batch norm's numbers. training: with the statistics of the batch; group: of all its processes', or None.

    batches: the module's count of batches, to which whoever moves its running statistics adds this one, or None.
    """

    training: bool
    momentum: float
    eps: float
    group: object = None
    batches: torch.Tensor | None = None


def is_depthwise(x, weight, geometry, backend):
    """Whether the kernels of depthwise convolution run this one."""
    if backend == "torch" or not depthwise_conv2d.is_depthwise(weight, geometry.groups):
        return False
    return depthwise_conv2d.why_not(backend, x, weight) is None


def _loads(e, weight, geometry, backend):
    """Whether the convolution's kernels make z while they load x: they can, and that is predicted to be faster."""
    if e.scale is None or e.is_join:
        return False
    if is_depthwise(e.x, weight, geometry, backend):
        return e.gate is None and (backend == "triton" or pending_cpu.can(e.x, e.activation))
    if backend != "triton":
        return False
    if e.gate is not None and (e.gate.shape[1], *weight.shape[1:]) != (e.x.shape[1], e.x.shape[1], 1, 1):
        return False  # not 1x1 filters of all channels
    channels_last = conv_layout.suggests_channels_last(e.x) or conv_layout.suggests_channels_last(weight)
    return not conv2d.should_materialize(e.x, weight, *geometry, channels_last, "conv")


def _joins(e, weight, geometry, backend):
    """Whether the convolution's kernel makes z, a join, and writes it: it can, and that is predicted to be faster."""
    _, stride, padding, _, groups = geometry
    return backend == "triton" and e.is_join and conv2d_join.pays(e, weight, stride, padding, groups)


def _convolve(z, weight, bias, geometry, backend, join=None, made=None, **fused):
    """What the kernels return; without ours oneDNN, through PyTorch.

    join: what z is, to be written; made: what 1x1 convolution on CPU makes z of, to be written if it is a join.
    """
    if made is not None:
        return pointwise_conv2d_cpu.forward(made, weight, bias, z if made.is_join else None, **fused)
    channels_last = conv_layout.suggests_channels_last(z) or conv_layout.suggests_channels_last(weight)
    if is_depthwise(z, weight, geometry, backend):
        return depthwise_conv2d.depthwise_forward(z, weight, bias, *geometry[:4], channels_last, backend, **fused)
    if backend != "triton":
        return F.conv2d(z, weight, bias, *geometry[1:])
    if join is not None:
        return conv2d_join.conv2d_join(join, weight, z, **fused)
    among = conv2d.among_vendors(backend, z)
    return conv2d.conv2d_forward(z, weight, bias, *geometry, channels_last, "conv", among, **fused)


def check_rows(y):
    """Raise unless batch norm has two values per channel to take statistics of."""
    if y.numel() // y.shape[1] <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(y.shape)}")


def constant_statistics(running_mean, running_var, dtype):
    """(mean, var) of batch norm in evaluation; mean, which backward reads, is a copy: training may move the other."""
    return running_mean.to(dtype, copy=True), running_var.to(dtype)


def refuse_second_derivatives():
    """Called where a backward runs: its own gradients would be silently wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused chain has no second derivatives; fastcnn.revert(model) gives back layers that have them"
        )


def _normalised(z, weight, geometry, gamma, beta, running, norm, backend, fused):
    """(y, rows, mean, scale, shift, invstd) of the batch, which moves the running statistics."""
    if backend == "triton":
        dtype = pending.vector_dtype(z)
        pivot = z.new_zeros(weight.shape[0], dtype=dtype) if running.mean is None else running.mean.to(dtype)
        y, sums = _convolve(z, weight, None, geometry, backend, pivot=pivot, **fused)
    elif "made" in fused or is_depthwise(z, weight, geometry, backend):
        y, mean, var = _convolve(z, weight, None, geometry, backend, statistics=True, **fused)
    else:
        y, mean = _convolve(z, weight, None, geometry, backend), None
    rows = y.numel() // y.shape[1]
    if norm.group is None:
        check_rows(y)
        if backend == "triton":
            running = running._replace(rows=rows)
            return y, rows, *batch_statistics.affine_from_sums(y, sums, pivot, gamma, beta, norm.eps, backend, running)
        if pending_cpu.can_normalise(y, norm, running, backend):
            if mean is None:
                return y, rows, *pending_cpu.normalised(y, gamma, beta, norm.eps, running)
            return y, rows, mean, *pending_cpu.affine(y, mean, var, gamma, beta, norm.eps, running)
    if backend == "triton":
        mean, var = batch_statistics.from_sums(y, sums, pivot)
    elif mean is None:
        mean, var = pending.statistics(y, backend)
    if norm.group is not None:
        mean, var, rows = bn.gather_statistics(mean, var, rows, norm.group)
    running = running._replace(rows=rows)
    return y, rows, mean, *bn.affine(mean, var, gamma, beta, norm.eps, backend, running)


class ConvBatchNormFunction(torch.autograd.Function):
    """(y, scale, shift, z, passed): vectors None without norm; z that of a join or None; passed x, in a join None."""

    @staticmethod
    def forward(
        ctx, x, scale, shift, gate, right, right_scale, right_shift, weight, bias, gamma, beta, running_mean,
        running_var, activation, slope, out, scaled, geometry, norm, backend, slot=None, shuffle=1, again=None,
        made_of=(),
    ):  # fmt: skip
        e = pending.Expression(x, scale, shift, activation, slope, gate, right, right_scale, right_shift, out)
        loads, fused = _loads(e, weight, geometry, backend), {}
        ctx.pointwise = pointwise_conv2d_cpu.takes(e, weight, geometry, backend, ctx.needs_input_grad[3])
        if loads:
            z, fused["pending"] = x, Pending(scale, shift, activation, slope, gate=gate)
        elif slot is None and (norm is not None or bias is None) and _joins(e, weight, geometry, backend):
            z, fused["join"] = torch.empty_like(x), e
        elif ctx.pointwise:
            z, fused["made"] = pending_cpu.Pass(x).new() if e.is_join else x, e
        else:
            z = x if e.is_plain else pending.pending_forward(*e, backend)
        ctx.depthwise = is_depthwise(x, weight, geometry, backend)
        if ctx.depthwise:
            fused["shuffle"] = shuffle
        if slot is not None and backend == "triton":
            channels_last = conv_layout.suggests_channels_last(z) or conv_layout.suggests_channels_last(weight)
            fused["out"] = slot.tensor(z, weight.shape[0], geometry.size, channels_last)
        batch = norm is not None and norm.training
        vectors, mean, invstd, rows = (None, None), None, None, 1
        if batch:
            # a constant before batch norm moves the running mean and nothing else
            running = bn.Running(running_mean, running_var, bias, momentum=norm.momentum, batches=norm.batches)
            y, rows, mean, *vectors, invstd = _normalised(
                z, weight, geometry, gamma, beta, running, norm, backend, fused
            )
        else:
            y = _convolve(z, weight, bias if norm is None else None, geometry, backend, **fused)
        if slot is not None and backend != "triton":
            y = slot.filled(y)
        if norm is not None and not batch:
            mean, var = constant_statistics(running_mean, running_var, pending.vector_dtype(x))
            mean = mean if bias is None else mean - bias
            *vectors, invstd = bn.affine(mean, var, gamma, beta, norm.eps, backend)
        ctx.save_for_backward(
            None if e.is_sum or again is not None else x, scale, shift, gate, None if right_scale is None else right,
            right_scale, z if e.is_join else None, weight, gamma, y if batch else None, mean, invstd, *made_of,
        )  # fmt: skip
        ctx.again = again
        if again is not None and any(ctx.needs_input_grad):
            again.readers += 1
        ctx.form = (activation, slope, out, e.is_join, scaled, loads, bn.Ahead.of_vectors(scale, shift), shuffle)
        ctx.ahead = None
        if backend == "triton" and norm is not None and norm.group is None:
            ctx.ahead = bn.Ahead(mean, invstd, gamma, rows, norm.training)
        ctx.gated = GatedAhead() if ctx.depthwise and norm is not None else None
        ctx.where = (geometry, norm, rows, backend)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.image = (x.shape[2:], conv_layout.suggests_channels_last(z))
        ctx.set_materialize_grads(False)
        passed = x if ctx.needs_input_grad[0] and not e.is_join else None
        return y, *vectors, z if e.is_join else None, passed

    @staticmethod
    def backward(ctx, grad_y, grad_scale, grad_shift, grad_z, grad_passed):
        refuse_second_derivatives()
        saved = ctx.saved_tensors  # once: checkpointing makes them when they are asked for, and does so once
        *inputs, weight, gamma, y, mean, invstd = saved[:12]
        if ctx.again is not None:
            inputs[0] = ctx.again.make(saved[12:], grad_y is not None)
        geometry, norm, rows, backend = ctx.where
        needs, join = ctx.needs_input_grad, ctx.form[3]
        inputs = Inputs(*inputs, *ctx.form)
        grad_weight = grad_bias = grad_gamma = grad_beta = correction = gated = None
        if ctx.gated is not None:
            grad_y, gated = ctx.gated.take(grad_y)
        if grad_y is None:
            grads = _without_convolution(inputs, grad_z if join else grad_passed, needs[3], backend)
        else:
            if norm is not None and pending_cpu.can_go_back(y, norm, backend):
                vectors = y, mean, invstd, gamma, grad_scale, grad_shift
                if ctx.depthwise or ctx.pointwise:
                    *vectors, grad_gamma, grad_beta = pending_cpu.correction(*vectors)
                    correction = Correction(y, *vectors)
                else:
                    grad_y, grad_gamma, grad_beta = pending_cpu.normalised_backward(grad_y, *vectors)
            elif norm is not None:
                done = None if ctx.ahead is None else ctx.ahead.result(grad_scale, grad_shift)
                a, b, c, grad_gamma, grad_beta = done or bn.affine_backward(
                    grad_scale, grad_shift, mean, invstd, gamma, rows, norm.training, norm.group, backend
                )
                correction = Correction(y, a, b, c)
            if needs[8]:
                grad_bias = _grad_bias(grad_y, grad_shift, norm, correction, ctx.bias_dtype)
            passes = _of_pointwise if ctx.pointwise else _of_depthwise if ctx.depthwise else None
            passes = passes or (_on_gpu if backend == "triton" else _on_cpu)
            grads, grad_weight = passes(
                inputs, grad_y, correction, weight, geometry, ctx.image, grad_z if join else grad_passed,
                any(needs[:7]), needs[3], needs[7], backend, **({} if gated is None else dict(gated=gated)),
            )  # fmt: skip
        parameters = grad_weight, grad_bias, grad_gamma, grad_beta
        return (
            *grads,
            *(grad if need else None for grad, need in zip(parameters, needs[7:11], strict=True)),
            *[None] * 13,
        )


class Inputs(NamedTuple):
    """What backward needs of an expression: see pending.Expression."""

    x: torch.Tensor | None
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    gate: torch.Tensor | None
    right: torch.Tensor | None
    right_scale: torch.Tensor | None
    z: torch.Tensor | None
    activation: str
    slope: float
    out: str
    join: bool
    scaled: bool
    loads: bool = False  # whether the convolution's kernels make z
    ahead: bn.Ahead | None = None  # of the batch norm that made scale and shift
    shuffle: int = 1  # the convolution reads channel_shuffle(z, shuffle)

    @property
    def is_plain(self):
        return not self.join and self.scale is None and self.activation == "none" and self.gate is None

    @property
    def at_z(self):
        """Whether the gradient of z goes with x: see squeeze_excite.py."""
        return self.scaled == pending.AT_Z

    @property
    def is_scaled_join(self):
        """Whether it is a join whose left side is x * scale + shift."""
        return self.join and self.scale is not None and self.activation == "none" and self.gate is None

    def sums(self, parts):
        """Gradients of scale and shift, which a kernel left in parts [S, 2, C]."""
        if len(parts) == 1 and self.ahead is None:
            return parts[0].unbind(0)
        return conv_sums.sum_parts(parts).unbind(0) if self.ahead is None else self.ahead.take(parts)

    def again(self, backend):
        """z, made again where it was not kept."""
        if self.join or self.is_plain:
            return self.z if self.join else self.x
        vectors = self.scale, self.shift, self.activation, self.slope, self.gate
        return pending.pending_forward(self.x, *vectors, None, None, None, "none", backend)

    def grads(self, grad, add, need_gate, backend, overwrite=False):
        """Gradients of (x, scale, shift, gate, right, right_scale, right_shift), given that of z."""
        if self.at_z and not self.join:
            return grad if add is None else grad + add, *[None] * 6
        if self.at_z:
            left = dict(x=None, scale=None, shift=None, gate=None, activation="none", scaled=False)
            return self._replace(**left).grads(grad, add, False, backend, overwrite)
        grad_x, sums, grad_right, right_sums, grad_gate = pending.pending_backward(
            grad, add, self.x, self.scale, self.shift, self.activation, self.slope, self.gate, self.join, self.right,
            self.right_scale, self.z, self.out, need_gate, self.scaled, backend, overwrite,
        )  # fmt: skip
        return (
            grad_x,
            *_pair(sums if self.scale is not None else None),
            grad_gate if need_gate else None,
            grad_right if self.join else None,
            *_pair(right_sums if self.right_scale is not None else None),
        )


def _pair(sums):
    return (None, None) if sums is None else sums.unbind(0)


def _grad_bias(grad_y, grad_shift, norm, correction, dtype):
    if norm is None:
        return grad_y.sum((0, 2, 3))
    # the batch's mean takes away what the bias adds
    return torch.zeros_like(grad_shift, dtype=dtype) if norm.training else grad_shift * correction.a


def _without_convolution(inputs, add, need_gate, backend):
    """Gradients of the inputs where nothing came back through y."""
    if add is None or not inputs.join:
        return add, *[None] * 6
    return inputs.grads(add, None, need_gate, backend)


def _on_cpu(
    inputs, grad_y, correction, weight, geometry, image, add, need_image, need_gate, need_weight, backend
):  # fmt: skip
    """(gradients of the seven inputs, gradient of the weight) on PyTorch's convolutions."""
    if correction is not None:
        grad_y = pending.corrected(grad_y, *correction, backend)
    _, stride, padding, dilation, groups = geometry
    z = inputs.again(backend)
    dz, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_y, z, weight, None, stride, padding, dilation, False, [0, 0], groups, [need_image, need_weight, False]
    )
    del z, grad_y
    if not need_image:
        return (None,) * 7, grad_weight
    if inputs.is_plain:
        return (dz if add is None else dz.add_(add), *[None] * 6), grad_weight
    return inputs.grads(dz, add, need_gate, backend, overwrite=True), grad_weight


def _of_depthwise(
    inputs, grad_y, correction, weight, geometry, image, add, need_image, need_gate, need_weight, backend, gated=None
):  # fmt: skip
    """The same on the kernels of depthwise convolution, which do everything on load and on store."""
    window, channels_last = geometry[1:4], image[1]
    loads, finishes = inputs.loads, inputs.loads or inputs.is_plain
    z = inputs.x if loads else inputs.again(backend)
    fused = dict(correction=correction, gated=gated, shuffle=inputs.shuffle)
    if finishes:
        fused["add"] = add if need_image else None
    if loads:
        fused["pending"] = Pending(*inputs[1:3], inputs.activation, inputs.slope, inputs.scaled)
    needs = need_image, need_weight, False
    grads = depthwise_conv2d.depthwise_backward(grad_y, z, weight, *window, channels_last, needs, backend, **fused)
    if not need_image:
        return (None,) * 7, grads.weight
    if not finishes:
        return inputs.grads(grads.input, add, need_gate, backend, overwrite=True), grads.weight
    sums = inputs.sums(grads.sums) if loads else (None, None)
    return (grads.input, *sums, *[None] * 4), grads.weight


def _of_pointwise(
    inputs, grad_y, correction, weight, geometry, image, add, need_image, need_gate, need_weight, backend
):  # fmt: skip
    """The same on the kernels of 1x1 convolution on CPU, which do everything."""
    grad_x, sums, grad_right, right_sums, grad_weight = pointwise_conv2d_cpu.backward(
        inputs, grad_y, correction, weight, add, need_image, need_weight
    )
    return (grad_x, *_pair(sums), None, grad_right, *_pair(right_sums)), grad_weight


def _on_gpu(
    inputs, grad_y, correction, weight, geometry, image, add, need_image, need_gate, need_weight, backend
):  # fmt: skip
    """The same on our convolutions: what they can do on load and on store costs no pass of its own."""
    size, channels_last = image
    window = stride, padding, _, groups = geometry[1:]
    among = conv2d.among_vendors(backend, grad_y)
    loads = inputs.loads
    is_pending = inputs.scale is not None and inputs.gate is None and not inputs.join
    loaded = None
    if is_pending or loads:
        loaded = Pending(*inputs[1:3], inputs.activation, inputs.slope, inputs.scaled, inputs.gate)
    z = inputs.x if loads else inputs.again(backend)
    # what dgrad's epilogue does
    fused = dict(correction=correction)
    finishes = inputs.is_plain or is_pending or inputs.is_scaled_join or inputs.at_z
    if finishes:
        fused |= dict(pending=loaded if is_pending else None, add=add)
        fused["join"] = Join(z if inputs.out == "relu" else None, inputs.x) if inputs.join else None
    grad_weight = None
    in_one = need_image and need_weight and (inputs.gate is None if loads else not is_pending)
    if in_one and conv2d_backward.pays(grad_y, z, weight, stride, padding, groups, **fused):
        dz, grad_weight, *parts = conv2d_backward.conv2d_backward(grad_y, z, weight, **fused, in_parts=True)
        need_weight = False
    elif need_image:
        raw = dict(input=inputs.x) if is_pending else {}
        dz = conv2d.conv2d_backward_input(
            grad_y, weight, None, size, *window, channels_last, "conv", among, **fused, **raw, in_parts=True
        )
        dz, *parts = (dz,) if isinstance(dz, torch.Tensor) else dz
    if need_weight:
        grad_weight = conv2d.conv2d_backward_weight(
            grad_y,
            z,
            weight,
            *window,
            "conv",
            among,
            correction=correction,
            pending=loaded if loads else None,
        )
    if not need_image:
        grads = (None,) * 7
    elif not finishes:
        grads = inputs.grads(dz, add, need_gate, backend)
    elif inputs.is_plain or (inputs.at_z and not inputs.join):
        grads = dz, *[None] * 6
    else:
        right = None if inputs.right_scale is None else pending.sums(dz, inputs.right, backend)
        left = (None, None) if inputs.at_z else inputs.sums(*parts)
        grads = dz, *left, None, dz if inputs.join else None, *_pair(right)
    return grads, grad_weight


def convolve_folded(x, weight, scale, shift, geometry, backend, activation, slope, residual):
    """activation(conv(x) * scale + shift + residual) without gradients.

    The vectors go into the weight where that is the smaller tensor, else over the output.
    """
    outputs = x.shape[0] * weight.shape[0] * geometry.size[0] * geometry.size[1]
    if weight.numel() > outputs:
        y = _convolve(x, weight, None, geometry, backend)
        # f(y * scale + shift), or f applied to the sum
        if residual is None:
            return pending.pending_forward(y, scale, shift, activation or "none", slope, *[None] * 4, "none", backend)
        out = activation if activation == "relu" else "none"
        z = pending.pending_forward(y, scale, shift, "none", 0.0, None, residual, None, None, out, backend)
        return z if activation in (None, "relu") else activation_reference(z, activation, slope)
    weight = (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)
    bias = shift.to(weight.dtype)
    if backend == "triton":
        fused = {} if activation is None else dict(activation=(activation, slope))
        return _convolve(x, weight, bias, geometry, backend, residual=residual, **fused)
    y = _convolve(x, weight, bias, geometry, backend)
    y = y if residual is None else y.add_(residual)
    return (
        F.relu_(y) if activation == "relu" else y if activation is None else activation_reference(y, activation, slope)
    )
