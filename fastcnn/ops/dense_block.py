"""Dense blocks: every layer reads all the channels before it and writes its own behind them, in one buffer.

    y = conv1(f(batch_norm1(buffer[:, :c])))        buffer[:, c : c + k] = conv2(f(batch_norm2(y)))

buffer [N, C, P, Q]: the input x's channels and k of each layer; mean, var (biased) [C] in fp32 (fp64 for fp64), which
whoever makes a channel takes once: every batch norm that reads the buffer shares them. Nothing is concatenated, and no
normalised tensor stored. Backward likewise: one tensor holds the buffer's gradient, to which every layer adds its own,
and two vectors those of the statistics, which reach a channel when its maker's turn comes.
Saved for backward: the buffer, y of every layer, weights, vectors. Torch counterpart: none. Sources: Huang et al. 2017
(DenseNet); Pleiss et al. 2017 (shared memory for its features).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastcnn.ops import batch_norm_affine as bn
from fastcnn.ops import batch_statistics, conv2d, pending
from fastcnn.ops.conv_batch_norm import Convolution, Norm, check_rows, refuse_second_derivatives
from fastcnn.ops.conv_fusion import Correction, Pending

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
    """(conv(z), mean, var) of z = loaded(x); the vectors None without a pivot [K], zero or near the mean."""
    mean = var = None
    if backend == "triton":
        channels_last = conv2d.suggests_channels_last(x) or conv2d.suggests_channels_last(weight)
        among = conv2d.among_vendors(backend, x)
        y = conv2d.conv2d_forward(
            x, weight, None, *geometry, channels_last, "conv", among, pending=loaded, pivot=pivot, out=out
        )
        if pivot is not None:
            y, sums = y
            mean, var = batch_statistics.from_sums(y, sums, pivot, backend)
        return y, mean, var
    z = pending.pending_forward(x, *loaded[:4], *[None] * 4, "none", backend)
    y = F.conv2d(z, weight, None, *geometry[1:])
    if pivot is not None:
        mean, var = pending.statistics(y, backend)
    return y if out is None else out.copy_(y), mean, var


def _convolve_backward(grad_y, correction, x, loaded, weight, geometry, need_weight, backend, add=None, out=None):
    """(grad_x, sum of du * x, sum of du, gradient of the weight); add is added to grad_x, which out gets, if given."""
    grad_weight = None
    if backend == "triton":
        among = conv2d.among_vendors(backend, grad_y)
        channels_last = conv2d.suggests_channels_last(x) or conv2d.suggests_channels_last(weight)
        grads = conv2d.conv2d_backward_input(
            grad_y, weight, None, x.shape[2:], *geometry[1:], channels_last, "conv", among,
            correction=correction, pending=loaded, input=x, add=add, out=out,
        )  # fmt: skip
        if need_weight:
            grad_weight = conv2d.conv2d_backward_weight(
                grad_y, x, weight, *geometry[1:], "conv", among, correction=correction, pending=loaded
            )
        return *grads, grad_weight
    if correction is not None:
        grad_y = pending.corrected(grad_y, *correction, backend)
    scale, shift, activation, slope, scaled = loaded
    z = pending.pending_forward(x, scale, shift, activation, slope, *[None] * 4, "none", backend)
    _, stride, padding, dilation, groups = geometry
    dz, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_y, z, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, need_weight, False]
    )
    del z, grad_y
    grad_x, sums, *_ = pending.pending_backward(
        dz, None, x, scale, shift, activation, slope, None, False, None, None, None, "none", False, scaled, backend,
        overwrite=True,
    )  # fmt: skip
    return grad_x if out is None else torch.add(grad_x, add, out=out), *sums, grad_weight


class GradientOfStatistics:
    """Gradients of mean and var [C], of rows values per channel each, and what they come to in the channels' own."""

    def __init__(self, grad_mean, grad_var, mean, var, rows):
        new = lambda grad: torch.zeros_like(mean) if grad is None else grad.clone()
        self.grad_mean, self.grad_var, self.mean, self.rows = new(grad_mean), new(grad_var), mean, rows

    def add(self, grad_mean, grad_var):
        """Add to those of the first channels."""
        self.grad_mean[: len(grad_mean)] += grad_mean
        self.grad_var[: len(grad_var)] += grad_var

    def correction(self, buffer, first, end):
        """conv_fusion.Correction of the gradient of these channels of the buffer."""
        b = self.grad_var[first:end] * (2 / self.rows)
        c = self.grad_mean[first:end] / self.rows - b * self.mean[first:end]
        return Correction(buffer[:, first:end], torch.ones_like(b), b, c)


def _affine_of_shared_backward(grad_scale, grad_shift, mean, invstd, weight):
    """(grad_mean, grad_var, grad_weight, grad_bias) of batch_norm_affine.affine, given the sums du * x and du."""
    scale = invstd if weight is None else weight.to(invstd.dtype) * invstd
    total = grad_scale - mean * grad_shift
    return -scale * grad_shift, -0.5 * scale * invstd * invstd * total, total * invstd, grad_shift


class DenseBlockFunction(torch.autograd.Function):
    """(buffer, mean, var); the vectors None where no batch norm of the block takes the batch's statistics.

    One function for the whole block: so the tensor that gathers the gradient is nobody else's.
    """

    @staticmethod
    def forward(ctx, x, steps, activation, slope, backend, *parameters):
        n, channels, *size = x.shape
        total = channels + sum(parameters[i].shape[0] for i in range(PARAMETERS - 1, len(parameters), PARAMETERS))
        layout = torch.channels_last if conv2d.suggests_channels_last(x) else torch.contiguous_format
        buffer = torch.empty((n, total, *size), dtype=x.dtype, device=x.device, memory_format=layout)
        buffer[:, :channels] = x
        rows, dtype = x.numel() // channels, pending.vector_dtype(x)
        zeros = lambda k: x.new_zeros(k, dtype=dtype)
        shared = any(step.norm.training for step in steps[::2])
        if any(step.norm.training for step in steps):
            check_rows(x)
        mean = var = None
        if shared:
            mean, var = (x.new_empty(total, dtype=dtype) for _ in range(2))
            mean[:channels], var[:channels] = pending.statistics(x, backend)
        saved = []
        for i in range(len(steps) // 2):
            first, second = steps[2 * i : 2 * i + 2]
            (gamma1, beta1, weight1), (gamma2, beta2, weight2) = _triples(parameters, i)
            used = mean[:channels] if first.norm.training else first.running_mean.to(dtype)
            spread = var[:channels] if first.norm.training else first.running_var.to(dtype)
            scale1, shift1, invstd1 = bn.affine(
                used, spread, gamma1, beta1, first.norm.eps, backend, _running(first, rows)
            )
            pivot = None
            if second.norm.training:
                pivot = zeros(weight1.shape[0]) if second.running_mean is None else second.running_mean.to(dtype)
            loaded = Pending(scale1, shift1, activation, slope)
            y, mean2, var2 = _convolve(buffer[:, :channels], loaded, weight1, first.geometry, backend, pivot)
            if not second.norm.training:
                mean2, var2 = second.running_mean.to(dtype), second.running_var.to(dtype)
            scale2, shift2, invstd2 = bn.affine(
                mean2, var2, gamma2, beta2, second.norm.eps, backend, _running(second, rows)
            )
            k = weight2.shape[0]
            pivot = zeros(k) if shared else None
            if shared and 2 * i + 2 < len(steps) and steps[2 * i + 2].running_mean is not None:
                pivot = steps[2 * i + 2].running_mean[channels : channels + k].to(dtype)
            loaded = Pending(scale2, shift2, activation, slope)
            made = slice(channels, channels + k)
            _, *vectors = _convolve(y, loaded, weight2, second.geometry, backend, pivot, buffer[:, made])
            if shared:
                mean[made], var[made] = vectors
            channels += k
            saved += [y, scale1, shift1, None if first.norm.training else used, invstd1, gamma1, weight1]
            saved += [scale2, shift2, mean2, invstd2, gamma2, weight2]
        ctx.save_for_backward(buffer, mean, var, *saved)
        ctx.arguments = (steps, activation, slope, backend, x.shape[1], rows)
        ctx.set_materialize_grads(False)
        return buffer, mean, var

    @staticmethod
    def backward(ctx, grad, grad_mean, grad_var):
        refuse_second_derivatives()
        buffer, mean, var, *saved = ctx.saved_tensors
        steps, activation, slope, backend, channels, rows = ctx.arguments
        needs = ctx.needs_input_grad[5:]
        # channels that a layer made: their gradient is complete where the layers after it have added theirs
        grad = torch.zeros_like(buffer) if grad is None else grad
        statistics = None if mean is None else GradientOfStatistics(grad_mean, grad_var, mean, var, rows)
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
            a, b, c, *affine2 = bn.affine_backward(
                grad_scale, grad_shift, mean2, invstd2, gamma2, rows, second.norm.training, None, backend
            )
            loaded = Pending(scale1, shift1, activation, slope, scaled=True)
            correction = Correction(y if second.norm.training else None, a, b, c)
            _, grad_scale, grad_shift, grad_weight1 = _convolve_backward(
                du, correction, buffer[:, :start], loaded, weight1, first.geometry,
                needs[PARAMETERS * i + 2], backend, add=grad[:, :start], out=gathered[:, :start],
            )  # fmt: skip
            used = mean[:start] if first.norm.training else mean1
            *of_statistics, grad_gamma, grad_beta = _affine_of_shared_backward(
                grad_scale, grad_shift, used, invstd1, gamma1
            )
            if first.norm.training:
                statistics.add(*of_statistics)
            grads = [grad_gamma, grad_beta, grad_weight1, *affine2, grad_weight2, *grads]
            grad, end = gathered, start
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad[:, :channels]
            if statistics is not None:
                grad_x = pending.corrected(grad_x, *statistics.correction(buffer, 0, channels), backend)
        return grad_x, *[None] * 4, *(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _running(step, rows):
    if not step.norm.training:
        return None
    return bn.Running(step.running_mean, step.running_var, None, rows, step.norm.momentum, step.norm.batches)


class SharedBatchNormFunction(torch.autograd.Function):
    """(raw, scale, shift) of batch norm with statistics that are known; raw is x, its gradient the true one."""

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, running_mean, running_var, norm, backend):
        rows = x.numel() // x.shape[1]
        running = bn.Running(running_mean, running_var, None, rows, norm.momentum, norm.batches)
        scale, shift, invstd = bn.affine(mean, var, weight, bias, norm.eps, backend, running)
        ctx.save_for_backward(mean, invstd, weight)
        ctx.set_materialize_grads(False)
        return x.detach(), scale, shift

    @staticmethod
    def backward(ctx, grad_raw, grad_scale, grad_shift):
        refuse_second_derivatives()
        if grad_scale is None:
            return grad_raw, *[None] * 8
        vectors = _affine_of_shared_backward(grad_scale, grad_shift, *ctx.saved_tensors)
        needs = ctx.needs_input_grad[1:5]
        return grad_raw, *(grad if need else None for grad, need in zip(vectors, needs, strict=True)), *[None] * 4
