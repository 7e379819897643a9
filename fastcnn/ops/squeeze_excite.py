"""Squeeze-excite as a gate on load: of a pending activation f(u), u = x * scale + shift, of batch norm just made,

    mean [N, C] = mean of f(u) over the pixels of an image      gate [N, C] = g(w2 @ h(w1 @ mean + b1) + b2)

after which readers take z = f(u) * gate while they load x. x [N, C, H, W], scale, shift [C], w1 [S, C], b1 [S],
w2 [C, S], b2 [C]. Saved for backward: x, the vectors, the weights, and per image the means and what the two layers
return before their activations. Torch counterpart: the modules one by one. Source: Hu et al. 2018.

Who reads x with a gate of squeeze_excite gives back the gradient of z, as it is, for x, and nothing for scale, shift
and gate (pending.AT_Z): x is returned for these readers alone. Backward reads that gradient and x once, for five sums
per image and channel: of dz * f(u), which is the gradient of the gate, and dz * f'(u) * x, dz * f'(u), f'(u) * x and
f'(u). From the gate's follows `add`, the gradient of the mean over H * W, and so

    du = (dz * gate + add) * f'(u)      its sums per channel = sum over n of gate * (of dz * f'(u)) + add * (of f'(u))

without another pass. du itself is left to the convolution that made x, where that computes it on load (GatedAhead).
"""

import contextlib
from typing import NamedTuple

import torch

from fastcnn.ops import batch_norm_affine, batch_norm_passes, common, conv_fusion, pending, pending_cpu
from fastcnn.ops.activation import activation_reference
from fastcnn.ops.conv_batch_norm import refuse_second_derivatives

PROGRAMS = 1024  # at least, where images have tiles for so many
MIN_TILES = 4  # that a share of an image has
MAX_SQUEEZED = 1024  # hidden channels that one program of the kernels holds
BLOCK_N, BLOCK_S, BLOCK_C = 16, 32, 32  # images of a step, hidden channels and channels of the parameters' gradients


class Form(NamedTuple):
    """Names of the activations: f, with its slope, h and g; "hardsigmoid" is one for the latter two."""

    activation: str
    slope: float
    squeeze: str
    excite: str


class Layers(NamedTuple):
    """Parameters of the two layers; a bias may be None."""

    w1: torch.Tensor
    b1: torch.Tensor | None
    w2: torch.Tensor
    b2: torch.Tensor | None


class Gradients(NamedTuple):
    """gate, add [N, C]; vectors: [1, 2, C], of scale and of shift; layers: Layers of gradients. None: not wanted."""

    gate: torch.Tensor
    add: torch.Tensor
    vectors: torch.Tensor | None
    layers: Layers


def squeeze_excite_reference(x, scale, shift, layers, form):
    """The gate in plain PyTorch, in the dtype of x."""
    z = pending.pending_reference(pending.Expression(x, scale, shift, form.activation, form.slope))
    return _small_layers(z.mean((2, 3)), layers, form)[2]


def _small_layers(mean, layers, form):
    """(squeezed, excited, gate)"""
    w1, b1, w2, b2 = (None if t is None else t.to(mean.dtype) for t in layers)
    squeezed = torch.nn.functional.linear(mean, w1.flatten(1), b1)
    excited = torch.nn.functional.linear(activation_reference(squeezed, form.squeeze), w2.flatten(1), b2)
    return squeezed, excited, activation_reference(excited, form.excite)


def pooled(x, scale, shift, form, backend):
    """[N, C] in the dtype of the vectors: means over the pixels of every image; in backend "triton" sums."""
    if backend == "triton":
        return _image_sums(x, scale, shift, form)[:, 0]
    if backend == "cpu" and pending_cpu.can(x, form.activation):
        return pending_cpu.image_means(x, scale, shift, form.activation, form.slope).flatten(1)
    wide = pending.Expression(x.to(scale.dtype), scale, shift, form.activation, form.slope)
    return pending.pending_reference(wide).mean((2, 3))


def _without_autocast(tensor):
    # of devices that know it: "meta" does not
    if common.autocast_enabled(tensor):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


def gate_forward(pooled, layers, form, dtype, pixels, backend):
    """(squeezed [N, S], excited [N, C] before their activations, gate [N, C] in this dtype)."""
    if backend != "triton":
        with _without_autocast(pooled):
            squeezed, excited, gate = _small_layers(pooled, layers, form)
        return squeezed, excited, gate.to(dtype)
    from fastcnn.kernels.triton.squeeze_excite import squeeze_excite_gate_kernel

    n, c = pooled.shape
    s = len(layers.w1)
    squeezed, excited = pooled.new_empty((n, s)), pooled.new_empty((n, c))
    gate = torch.empty((n, c), dtype=dtype, device=pooled.device)
    with common.device_guard(gate):
        squeeze_excite_gate_kernel[(n,)](
            pooled, *_dense(*layers), squeezed, excited, gate, c, s, pixels, SQUEEZE=form.squeeze, EXCITE=form.excite,
            **_blocks(pooled, s),
        )  # fmt: skip
    return squeezed, excited, gate


def backward(dz, x, scale, shift, layers, saved, form, needs, backend):
    """Gradients. saved: (pooled, squeezed, excited); needs: whether vectors, w1, b1, w2 and b2 are wanted."""
    pixels = x.shape[2] * x.shape[3]
    if backend == "triton":
        return _gate_backward(_image_sums(x, scale, shift, form, dz), layers, saved, form, needs, pixels)
    mean, squeezed, excited = saved
    products = _products(dz, x, scale, shift, form, backend)
    with _without_autocast(x):
        gate, de = _activation_backward(products[0], excited, form.excite)
        hidden, dt = _activation_backward(de @ layers.w2.flatten(1).to(de.dtype), squeezed, form.squeeze)
        add = (dt @ layers.w1.flatten(1).to(dt.dtype)) / pixels
        of_weights = (needs[1] and dt.T @ mean, needs[3] and de.T @ hidden)
        vectors = None
        if needs[0]:
            vectors = (gate * products[1:3] + add * products[3:5]).sum(1)[None]
    found = of_weights[0], needs[2] and dt.sum(0), of_weights[1], needs[4] and de.sum(0)
    grads = [
        grad.to(p.dtype).view_as(p) if need else None for grad, p, need in zip(found, layers, needs[1:], strict=True)
    ]
    return Gradients(gate, add, vectors, Layers(*grads))


def _activation_backward(grad, t, kind, slope=0.01):
    """(f(t), grad * f'(t))"""
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        f = activation_reference(t, kind, slope)
    return f.detach(), torch.autograd.grad(f, t, grad)[0]


def _products(dz, x, scale, shift, form, backend):
    """[5, N, C], the five sums per image."""
    if backend == "cpu" and pending_cpu.can(x, form.activation):
        return pending_cpu.image_products(dz, x, scale, shift, form.activation, form.slope)
    dz, x = dz.to(scale.dtype), x.to(scale.dtype)
    u = pending.pending_reference(pending.Expression(x, scale, shift))
    if form.activation == "none":
        f, du, slope = u, dz, torch.ones_like(u)
    else:
        f, du = _activation_backward(dz, u, form.activation, form.slope)
        slope = _activation_backward(torch.ones_like(u), u, form.activation, form.slope)[1]
    return torch.stack([t.sum((2, 3)) for t in (dz * f, du * x, du, slope * x, slope)])


def gradient(dz, gated, backend):
    """du of a conv_fusion.Gated as a pass of its own, in the layout of y."""
    y = gated.y
    if backend == "triton":
        return _gradient(dz, gated)
    if backend == "cpu" and pending_cpu.can(y, gated.activation):
        return pending_cpu.gated_gradient(dz, *gated)
    du = gated.reference(dz.to(gated.scale.dtype))
    return du.to(y.dtype).contiguous(memory_format=pending.layout_of(y))


class SqueezeExciteFunction(torch.autograd.Function):
    """(gate, x for readers with this gate)."""

    @staticmethod
    def forward(ctx, x, scale, shift, w1, b1, w2, b2, form, backend):
        layers = Layers(w1, b1, w2, b2)
        sums = pooled(x, scale, shift, form, backend)
        squeezed, excited, gate = gate_forward(sums, layers, form, x.dtype, x.shape[2] * x.shape[3], backend)
        ctx.save_for_backward(x, scale, shift, *layers, sums, squeezed, excited)
        ctx.form, ctx.backend = form, backend
        ctx.ahead = batch_norm_affine.Ahead.of_vectors(scale, shift)
        loads = backend != "cpu" or pending_cpu.can(x, form.activation)
        ctx.gated = conv_fusion.GatedAhead.of_tensors(x, scale, shift) if loads else None
        ctx.mark_non_differentiable(gate)
        ctx.set_materialize_grads(False)
        return gate, x

    @staticmethod
    def backward(ctx, _, dz):
        refuse_second_derivatives()
        if dz is None:
            return (None,) * 9
        x, scale, shift, *layers = ctx.saved_tensors
        layers, saved = Layers(*layers[:4]), layers[4:]
        form, backend, needs = ctx.form, ctx.backend, ctx.needs_input_grad
        wanted = needs[1] or needs[2], *needs[3:7]
        grads = backward(dz, x, scale, shift, layers, saved, form, wanted, backend)
        grad_x = None
        if needs[0]:
            gated = conv_fusion.Gated(x, grads.gate, grads.add, scale, shift, form.activation, form.slope)
            if ctx.gated is not None:
                ctx.gated.leave(dz, gated)
            else:
                grad_x = gradient(dz, gated, backend)
        vectors = None, None
        if wanted[0]:
            vectors = grads.vectors[0].unbind(0) if ctx.ahead is None else ctx.ahead.take(grads.vectors)
        return grad_x, *vectors, *grads.layers, None, None


# Triton


def _dense(*tensors):
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _blocks(sums, s):
    """The tile of the kernels with a program per image: all hidden channels."""
    elements = 2048 if sums.dtype == torch.float64 else 4096
    block_s = 1 << max(4, (s - 1).bit_length())
    return dict(BLOCK_S=block_s, BLOCK_C=max(4, min(128, elements // block_s)))


def _plan(x, part):
    """(layout, grid, where, how) of batch_norm_passes.launch_plan, with tiles that lie within an image."""
    n, c, h, w = x.shape
    layout = pending.layout_of(x)
    rows = layout == torch.channels_last or h * w == 1
    view = batch_norm_passes.View(n, h * w, c * h * w, *((c, 1) if rows else (1, h * w)))
    part = 2 * part if x.dtype == torch.float64 else part
    return layout, *batch_norm_passes.launch_plan(x, view, c, part=part)


def _image_sums(x, scale, shift, form, dz=None):
    """[N, 1, C], sums of f(u) over the pixels of every image, or with dz [N, 5, C]."""
    from fastcnn.kernels.triton.squeeze_excite import squeeze_excite_sums_kernel

    n, c = x.shape[:2]
    # five sums per element of a tile
    part = 1 if dz is None and x.dtype != torch.float64 else 2
    layout, (_, blocks), (inner, tiles, _, *strides), how = _plan(x, part)
    tiles //= n
    shares = max(1, min(PROGRAMS // (n * blocks), tiles // MIN_TILES))
    per_share = -(-tiles // shares)
    shares = -(-tiles // per_share)
    count = 1 if dz is None else 5
    x, dz = (None if t is None else t.to(x.dtype).contiguous(memory_format=layout) for t in (x, dz))
    parts = torch.empty((n, shares, count * c), dtype=scale.dtype, device=x.device)
    with common.device_guard(x):
        squeeze_excite_sums_kernel[(n * shares, blocks)](
            x, *_dense(scale, shift), dz, parts, c, inner, tiles, shares, per_share, *strides,
            ACTIVATION=form.activation, SLOPE=form.slope, **how,
        )  # fmt: skip
        sums = parts if shares == 1 else pending.added(parts, parts.dtype)
    return sums.view(n, count, c)


def _gate_backward(sums, layers, saved, form, needs, pixels):
    """Gradients from the five sums [N, 5, C]."""
    from fastcnn.kernels.triton.squeeze_excite import (
        squeeze_excite_gate_backward_kernel,
        squeeze_excite_parameters_kernel,
    )

    n, _, c = sums.shape
    s = len(layers.w1)
    total, squeezed, excited = saved
    gate, add, dexcited, dsqueezed = (sums.new_empty((n, width)) for width in (c, c, c, s))
    vectors = sums.new_empty((1, 2, c)) if needs[0] else None
    grads = [p.new_empty(p.shape) if need else None for p, need in zip(layers, needs[1:], strict=True)]
    block_s = min(BLOCK_S, 1 << max(4, (s - 1).bit_length()))
    with common.device_guard(sums):
        squeeze_excite_gate_backward_kernel[(n,)](
            sums, *_dense(layers.w1, layers.w2), squeezed, excited, dsqueezed, dexcited, gate, add, c, s, pixels,
            SQUEEZE=form.squeeze, EXCITE=form.excite, **_blocks(sums, s),
        )  # fmt: skip
        squeeze_excite_parameters_kernel[(-(-c // BLOCK_C), -(-s // block_s))](
            sums, total, squeezed, dsqueezed, dexcited, gate, add, *grads, vectors, n, c, s, pixels,
            SQUEEZE=form.squeeze, BLOCK_N=BLOCK_N, BLOCK_S=block_s, BLOCK_C=BLOCK_C,
        )  # fmt: skip
    return Gradients(gate, add, vectors, Layers(*grads))


def _gradient(dz, gated):
    from fastcnn.kernels.triton.squeeze_excite import squeeze_excite_gradient_kernel

    y = gated.y
    layout, grid, where, how = _plan(y, 1)
    dz, y = (t.to(y.dtype).contiguous(memory_format=layout) for t in (dz, y))
    du = torch.empty_like(y)
    with common.device_guard(y):
        squeeze_excite_gradient_kernel[grid](
            dz, y, *_dense(gated.scale, gated.shift, gated.gate, gated.add), du, y.shape[1], *where,
            ACTIVATION=gated.activation, SLOPE=gated.slope, **how,
        )  # fmt: skip
    return du
