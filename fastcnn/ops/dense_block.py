"""Dense blocks: every layer reads all the channels before it and writes its own behind them, in one buffer.

    y = conv1(f(batch_norm1(buffer[:, :c])))        buffer[:, c : c + k] = conv2(f(batch_norm2(y)))

buffer [N, C, P, Q]: the input x's channels and k of each layer; mean, var (biased) [C] in fp32 (fp64 for fp64), which
are taken once, where a channel is made: every batch norm that reads the buffer shares them (shared_batch_norm.py).
Nothing is concatenated, and no normalised tensor stored. Backward likewise: one tensor holds the buffer's gradient, to
which every layer adds its own, and vectors those of the statistics, which reach a channel when its maker's turn comes.
On a GPU what is [C] takes four launches of a layer, two either way, beside those of its convolutions.
Saved for backward: the buffer, y of every layer, weights, vectors. Torch counterpart: none. Sources: Huang et al. 2017
(DenseNet); Pleiss et al. 2017 (shared memory for its features).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastcnn.ops import batch_norm_affine as bn
from fastcnn.ops import (
    batch_norm_passes,
    batch_statistics,
    common,
    conv2d,
    conv2d_backward,
    conv_layout,
    pending,
    pending_cpu,
)
from fastcnn.ops.batch_norm_passes import View
from fastcnn.ops.conv_batch_norm import Convolution, Norm, check_rows, constant_statistics, refuse_second_derivatives
from fastcnn.ops.conv_fusion import Correction, Pending
from fastcnn.ops.conv_sums import sum_rows_in_parts
from fastcnn.ops.shared_batch_norm import Gradients, Statistics, parameters_backward

PARAMETERS = 6  # per layer: weight and bias of the first batch norm, filters of the first convolution; of the second


class Step(NamedTuple):
    """Batch norm, activation and convolution, but for the parameters."""

    norm: Norm
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    geometry: Convolution


def _triples(parameters, layer):
    first = PARAMETERS * layer
    return parameters[first : first + 3], parameters[first + 3 : first + PARAMETERS]


def _convolve(x, loaded, weight, geometry, backend, pivot=None, out=None):
    """(conv(z), its sums about a pivot [K], if given, or None) of z = loaded(x); out gets conv(z), too."""
    if backend == "triton":
        channels_last = conv_layout.suggests_channels_last(x) or conv_layout.suggests_channels_last(weight)
        among = conv2d.among_vendors(backend, x)
        y = conv2d.conv2d_forward(
            x, weight, None, *geometry, channels_last, "conv", among, pending=loaded, pivot=pivot, out=out
        )
        return (y, None) if pivot is None else y
    z = pending.pending_forward(x, *loaded[:4], *[None] * 4, "none", backend)
    y = F.conv2d(z, weight, None, *geometry[1:])
    if out is not None:
        out.copy_(y)
    return y, None


def _convolve_backward(grad_y, correction, x, loaded, weight, geometry, need_weight, backend, add=None, out=None):
    """(grad_x, sum of du * x, sum of du, gradient of the weight); add is added to grad_x, which out gets, if given.

    The sums are [C], on Triton [S, C] in parts to be added up.
    """
    grad_weight = None
    _, stride, padding, dilation, groups = geometry
    if backend == "triton":
        fused = dict(correction=correction, pending=loaded, add=add, out=out)
        if need_weight and conv2d_backward.pays(grad_y, x, weight, stride, padding, groups, **fused):
            grad_x, grad_weight, parts = conv2d_backward.conv2d_backward(grad_y, x, weight, in_parts=True, **fused)
            return grad_x, *parts.unbind(1), grad_weight
        among = conv2d.among_vendors(backend, grad_y)
        channels_last = conv_layout.suggests_channels_last(x) or conv_layout.suggests_channels_last(weight)
        grad_x, parts = conv2d.conv2d_backward_input(
            grad_y, weight, None, x.shape[2:], *geometry[1:], channels_last, "conv", among,
            input=x, in_parts=True, **fused,
        )  # fmt: skip
        if need_weight:
            grad_weight = conv2d.conv2d_backward_weight(
                grad_y, x, weight, *geometry[1:], "conv", among, correction=correction, pending=loaded
            )
        return grad_x, *parts.unbind(1), grad_weight
    if correction is not None:
        grad_y = pending.corrected(grad_y, *correction, backend)
    x = x.contiguous(memory_format=pending.layout_of(x))  # once for two passes
    scale, shift, activation, slope, scaled = loaded[:5]
    z = pending.pending_forward(x, scale, shift, activation, slope, *[None] * 4, "none", backend)
    dz, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_y, z, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, need_weight, False]
    )
    del z, grad_y
    grad_x, sums, *_ = pending.pending_backward(
        dz, None, x, scale, shift, activation, slope, None, False, None, None, None, "none", False, scaled, backend,
        overwrite=True,
    )  # fmt: skip
    return grad_x if out is None else torch.add(grad_x, add, out=out), *sums, grad_weight


class DenseBlockFunction(torch.autograd.Function):
    """(buffer, mean, var); the vectors None where no batch norm of the block takes the batch's statistics.

    One function for the whole block: so the tensor that gathers the gradient is nobody else's.
    """

    @staticmethod
    def forward(ctx, x, steps, activation, slope, backend, *parameters):
        n, channels, *size = x.shape
        total = channels + sum(parameters[i].shape[0] for i in range(PARAMETERS - 1, len(parameters), PARAMETERS))
        layout = pending.layout_of(x)
        buffer = torch.empty((n, total, *size), dtype=x.dtype, device=x.device, memory_format=layout)
        rows, dtype = x.numel() // channels, pending.vector_dtype(x)
        if any(step.norm.training for step in steps):
            check_rows(x)
        statistics = Statistics(buffer, backend) if any(step.norm.training for step in steps[::2]) else None
        firsts = [step.running_mean for step in steps[::2]]

        def pivot(running_mean, first, end):
            return x.new_zeros(end - first, dtype=dtype) if running_mean is None else running_mean[first:end].to(dtype)

        enter(x, buffer, statistics, pivot(firsts[0], 0, channels) if statistics and backend == "triton" else None)
        saved = []
        for i in range(len(steps) // 2):
            first, second = steps[2 * i : 2 * i + 2]
            (gamma1, beta1, weight1), (gamma2, beta2, weight2) = _triples(parameters, i)
            mean1 = None
            if first.norm.training:
                scale1, shift1, invstd1 = statistics.affine(gamma1, beta1, first.norm.eps, _running(first, rows))
            else:
                mean1, scale1, shift1, invstd1 = _constant(first, gamma1, beta1, dtype, backend)
            k, width = weight2.shape[0], weight1.shape[0]
            about = None
            if second.norm.training and backend == "triton":
                about = pivot(second.running_mean, 0, width)
            loaded = Pending(scale1, shift1, activation, slope)
            y, sums = _convolve(buffer[:, :channels], loaded, weight1, first.geometry, backend, about)
            if not second.norm.training:
                mean2, scale2, shift2, invstd2 = _constant(second, gamma2, beta2, dtype, backend)
            else:
                mean2, scale2, shift2, invstd2 = _normalised(y, sums, about, gamma2, beta2, second, rows, backend)
            about = None
            if statistics and backend == "triton":
                about = pivot((*firsts, None)[i + 1], channels, channels + k)
            loaded = Pending(scale2, shift2, activation, slope)
            made = buffer[:, channels : channels + k]
            images, sums = _convolve(y, loaded, weight2, second.geometry, backend, about, made)
            if statistics:
                statistics.add(images, sums, about)
            channels += k
            saved += [y, scale1, shift1, mean1, invstd1, gamma1, weight1]
            saved += [scale2, shift2, mean2, invstd2, gamma2, weight2]
        mean = var = None
        if statistics:
            statistics.store()
            mean, var = statistics.mean, statistics.var
        ctx.save_for_backward(buffer, mean, *saved)
        ctx.arguments = (steps, activation, slope, backend, x.shape[1], rows)
        ctx.set_materialize_grads(False)
        return buffer, mean, var

    @staticmethod
    def backward(ctx, grad, grad_mean, grad_var):
        refuse_second_derivatives()
        buffer, mean, *saved = ctx.saved_tensors
        steps, activation, slope, backend, channels, rows = ctx.arguments
        needs = ctx.needs_input_grad[5:]
        # channels that a layer made: their gradient is complete where the layers after it have added theirs
        grad = torch.zeros_like(buffer) if grad is None else grad
        statistics = None if mean is None else Gradients(mean, rows, grad_mean, grad_var, backend)
        gathered = torch.empty_like(buffer)
        end, grads = buffer.shape[1], []
        for i in reversed(range(len(steps) // 2)):
            first, second = steps[2 * i : 2 * i + 2]
            y, scale1, shift1, mean1, invstd1, gamma1, weight1 = saved[13 * i : 13 * i + 7]
            scale2, shift2, mean2, invstd2, gamma2, weight2 = saved[13 * i + 7 : 13 * i + 13]
            start = end - weight2.shape[0]
            correction = None if statistics is None else statistics.correction(buffer, start, end)
            loaded = Pending(scale2, shift2, activation, slope, scaled=False)
            du, grad_scale, grad_shift, grad_weight2 = _convolve_backward(
                grad[:, start:end], correction, y, loaded, weight2, second.geometry, needs[PARAMETERS * i + 5], backend
            )
            correction = None
            if pending_cpu.can_go_back(y, second.norm, backend):
                du, *affine2 = pending_cpu.normalised_backward(du, y, mean2, invstd2, gamma2, grad_scale, grad_shift)
            else:
                a, b, c, *affine2 = bn.affine_backward(
                    grad_scale, grad_shift, mean2, invstd2, gamma2, rows, second.norm.training, None, backend
                )
                correction = Correction(y if second.norm.training else None, a, b, c)
            loaded = Pending(scale1, shift1, activation, slope, scaled=True)
            _, *sums, grad_weight1 = _convolve_backward(
                du, correction, buffer[:, :start], loaded, weight1, first.geometry, needs[PARAMETERS * i + 2], backend,
                add=grad[:, :start], out=gathered[:, :start],
            )  # fmt: skip
            if first.norm.training:
                affine1 = statistics.add(*sums, invstd1, gamma1)
            else:
                affine1 = parameters_backward(*sums, mean1, invstd1, gamma1, backend)
            grads = [*affine1, grad_weight1, *affine2, grad_weight2, *grads]
            grad, end = gathered, start
        grad_x = leave(grad, buffer, channels, statistics, backend) if ctx.needs_input_grad[0] else None
        return grad_x, *[None] * 4, *(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _running(step, rows):
    return bn.Running(step.running_mean, step.running_var, None, rows, step.norm.momentum, step.norm.batches)


def _constant(step, weight, bias, dtype, backend):
    """(mean, scale, shift, invstd) of batch norm with its running statistics."""
    mean, var = constant_statistics(step.running_mean, step.running_var, dtype)
    return mean, *bn.affine(mean, var, weight, bias, step.norm.eps, backend)


def _normalised(y, sums, pivot, weight, bias, step, rows, backend):
    """(mean, scale, shift, invstd) of batch norm with the statistics of y."""
    norm, running = step.norm, _running(step, rows)
    if backend == "triton":
        return batch_statistics.affine_from_sums(y, sums, pivot, weight, bias, norm.eps, backend, running)
    if pending_cpu.can_normalise(y, norm, running, backend):
        return pending_cpu.normalised(y, weight, bias, norm.eps, running)
    mean, var = pending.statistics(y, backend)
    return mean, *bn.affine(mean, var, weight, bias, norm.eps, backend, running)


def enter(x, buffer, statistics, pivot):
    """Copy x into the buffer's first channels, and take their statistics, if any: about a pivot on Triton."""
    channels = buffer[:, : x.shape[1]]
    if pivot is None:
        channels.copy_(x)
        if statistics:
            statistics.add(x)
        return
    from fastcnn.kernels.triton.dense_block import dense_block_enter_kernel

    x = x.contiguous(memory_format=pending.layout_of(x))
    grid, where, how = _launch_of(x, buffer)
    partial = torch.empty((grid[0], 2, x.shape[1]), dtype=pivot.dtype, device=x.device)
    with common.device_guard(x):
        dense_block_enter_kernel[grid](x, channels, pivot.contiguous(), partial, *where, **how)
        statistics.add(channels, sum_rows_in_parts(partial), pivot)


def leave(grad, buffer, channels, statistics, backend):
    """The gradient of the buffer's first channels, images of their own."""
    grad = grad[:, :channels]
    if statistics is None:
        return grad
    correction = statistics.correction(buffer, 0, channels)
    if backend != "triton":
        return pending.corrected(grad, *correction, backend)
    from fastcnn.kernels.triton.dense_block import dense_block_leave_kernel

    grad_x = torch.empty_like(correction.y, memory_format=pending.layout_of(buffer))
    grid, where, how = _launch_of(grad_x, buffer)
    with common.device_guard(buffer):
        dense_block_leave_kernel[grid](grad, correction.y, correction.b, correction.c, grad_x, *where, **how)
    return grad_x


def _launch_of(x, buffer):
    """Grid, positional and keyword arguments of a pass over x and as many channels of the buffer."""
    n, c, h, w = x.shape
    total = buffer.shape[1]
    if pending.layout_of(buffer) == torch.channels_last or h * w == 1:
        view, pitches, row = View(1, n * h * w, 0, c, 1), (0, total), math.gcd(c, total)
    else:
        view, pitches, row = View(n, h * w, c * h * w, 1, h * w), (total * h * w, 1), h * w
    # two sums per element of a tile in fp64 take as many registers as four in fp32
    grid, where, how = batch_norm_passes.launch_plan(x, view, c, part=2 if x.dtype == torch.float64 else 1)
    how |= dict(ALIGN=batch_norm_passes.align_of(row), INT64=common.exceeds_int32(buffer))
    return grid, (c, *where, *pitches), how
