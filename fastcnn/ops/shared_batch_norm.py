"""Batch norms that share their statistics: each has its own scale and shift of the same mean and variance.

    scale = weight / sqrt(var + eps)        shift = bias - mean * scale

Vectors [C] in fp32 (fp64 for fp64) of the channels of a buffer of images, which are made one after the other.
Backward: the gradients of mean and var add up over the norms, and come to grad_x = ... + b * x + c of each channel x.
Torch counterpart: torch.nn.functional.batch_norm, which takes the statistics every time. Source: Pleiss et al. 2017.
"""

import torch

from fastcnn.ops import batch_norm_affine as bn
from fastcnn.ops import batch_statistics, common, pending
from fastcnn.ops.conv2d_gather import kernel_strides
from fastcnn.ops.conv_batch_norm import refuse_second_derivatives
from fastcnn.ops.conv_fusion import Correction


class Statistics:
    """mean and biased var [C] of the buffer's channels up to `count`, to which more are added."""

    def __init__(self, buffer, backend):
        self.mean, self.var = (
            torch.empty(buffer.shape[1], dtype=pending.vector_dtype(buffer), device=buffer.device) for _ in range(2)
        )
        self.backend, self.count = backend, 0
        self._new = None

    def add(self, images, sums=None, pivot=None):
        """The next channels are those of images [N, K, P, Q]; sums, pivot: as batch_statistics.from_sums takes them."""
        self.store()
        known, self.count = self.count, self.count + images.shape[1]
        if sums is not None:
            self._new = images, sums, pivot, known
            return
        made = slice(known, self.count)
        self.mean[made], self.var[made] = pending.statistics(images, self.backend)

    def store(self):
        """Take the statistics of the last images from their sums, if that has not been done."""
        if self._new is not None:
            self._launch((None,) * 8, (0.0, 0.0), 0.0)

    def affine(self, weight, bias, eps, running):
        """(scale, shift, 1 / sqrt(var + eps)) of the channels so far; moves the batch_norm_affine.Running."""
        if self._new is None or not running.fits_kernels(self.mean):
            self.store()
            mean, var = self.mean[: self.count], self.var[: self.count]
            return bn.affine(mean, var, weight, bias, eps, self.backend, running)
        vectors = [torch.empty_like(self.mean[: self.count]) for _ in range(3)]
        weight, bias = (None if vector is None else vector.contiguous() for vector in (weight, bias))
        (mean, var, _, batches), momentum = running.in_kernels()
        self._launch((weight, bias, *vectors, mean, var, batches), momentum, eps)
        running.changed()
        return vectors

    def _launch(self, norm, momentum, eps):
        from fastcnn.kernels.triton.shared_batch_norm import shared_batch_norm_kernel

        (images, sums, pivot, known), self._new = self._new, None
        n, made, p, q = images.shape
        options = batch_statistics.launch_options(images)
        programs = -(-made // options["BLOCK_C"])
        if norm[2] is not None:
            programs += -(-known // options["BLOCK_C"])
        with common.device_guard(images):
            shared_batch_norm_kernel[(programs,)](
                *(images, sums, pivot.contiguous(), self.mean, self.var, *norm),
                *(n * p * q, p, q, made, known, sums.numel() // (2 * made)),
                *(*kernel_strides(images), *momentum),
                EPS=eps,
                **options,
            )


class Gradients:
    """Gradients of mean and var [C], statistics of `rows` values per channel: given, plus those of norms."""

    def __init__(self, mean, rows, grad_mean, grad_var, backend):
        self.rows, self.backend = rows, backend
        self.mean = mean
        self.ones = torch.ones_like(mean)
        self.grad_mean, self.grad_var, self.b, self.c = (torch.empty_like(mean) for _ in range(4))
        if backend == "triton":
            given = (None if grad is None else grad.contiguous() for grad in (grad_mean, grad_var))
            _launch_backward(
                None, None, mean, *[None] * 4, given, (self.grad_mean, self.grad_var, self.b, self.c), rows
            )
            return
        for vector, grad in ((self.grad_mean, grad_mean), (self.grad_var, grad_var)):
            vector.zero_() if grad is None else vector.copy_(grad)

    def add(self, grad_scale, grad_shift, invstd, weight):
        """Those of a norm of the first channels: see affine_backward, of which (grad_weight, grad_bias) is returned."""
        c = len(invstd)
        mean, grad_mean, grad_var, of_x, constant = (
            vector[:c] for vector in (self.mean, self.grad_mean, self.grad_var, self.b, self.c)
        )
        if self.backend == "triton":
            grads = grad_mean, grad_var
            written = *grads, of_x, constant
            return _launch_parameters(grad_scale, grad_shift, mean, invstd, weight, grads, written, self.rows)
        grad_weight, grad_bias, scale = _of_parameters(grad_scale, grad_shift, mean, invstd, weight)
        grad_mean.addcmul_(scale, grad_bias, value=-1)
        grad_var.addcmul_(scale * invstd, grad_weight, value=-0.5)
        return grad_weight, grad_bias

    def correction(self, buffer, first, end):
        """conv_fusion.Correction of the gradient of these channels of the buffer."""
        made = slice(first, end)
        if self.backend == "triton":
            return Correction(buffer[:, made], self.ones[made], self.b[made], self.c[made])
        b = self.grad_var[made] * (2 / self.rows)
        c = torch.addcmul(self.grad_mean[made] / self.rows, b, self.mean[made], value=-1)
        return Correction(buffer[:, made], self.ones[made], b, c)


def affine_backward(grad_scale, grad_shift, mean, invstd, weight, backend):
    """(grad_mean, grad_var, grad_weight, grad_bias) of batch_norm_affine.affine.

    Args:
        grad_scale, grad_shift: [C], on Triton also [S, C] in parts to be added up: the sums of du * x and of du.
    """
    if backend == "triton":
        sums, of_statistics, none = (
            (grad_scale, grad_shift),
            (torch.empty_like(mean), torch.empty_like(mean)),
            (None,) * 2,
        )
        return *of_statistics, *_launch_parameters(*sums, mean, invstd, weight, none, (*of_statistics, *none), 1)
    grad_weight, grad_bias, scale = _of_parameters(grad_scale, grad_shift, mean, invstd, weight)
    return -scale * grad_bias, -0.5 * (scale * invstd) * grad_weight, grad_weight, grad_bias


def parameters_backward(grad_scale, grad_shift, mean, invstd, weight, backend):
    """(grad_weight, grad_bias) alone: of a batch norm whose statistics are constants."""
    if backend == "triton":
        return _launch_parameters(grad_scale, grad_shift, mean, invstd, weight, (None,) * 2, (None,) * 4, 1)
    return _of_parameters(grad_scale, grad_shift, mean, invstd, weight)[:2]


def _of_parameters(grad_scale, grad_shift, mean, invstd, weight):
    """(grad_weight, grad_bias, scale)"""
    scale = invstd if weight is None else weight.to(invstd.dtype) * invstd
    return torch.addcmul(grad_scale, mean, grad_shift, value=-1) * invstd, grad_shift, scale


def _launch_parameters(grad_scale, grad_shift, mean, invstd, weight, given, written, rows):
    grad_weight, grad_bias = (torch.empty_like(invstd if weight is None else weight) for _ in range(2))
    weight = None if weight is None else weight.contiguous()
    _launch_backward(grad_scale, grad_shift, mean, invstd, weight, grad_weight, grad_bias, given, written, rows)
    return grad_weight, grad_bias


def _launch_backward(grad_scale, grad_shift, mean, invstd, weight, grad_weight, grad_bias, given, written, rows):
    """given: (grad_mean, grad_var); written: these and (b, c); all may be None."""
    from fastcnn.kernels.triton.shared_batch_norm import shared_batch_norm_backward_kernel

    parts, how = bn.parts_of(mean if grad_scale is None else grad_scale)
    with common.device_guard(mean):
        shared_batch_norm_backward_kernel[(-(-len(mean) // how["BLOCK"]),)](
            *(grad_scale, grad_shift, mean, invstd, weight, grad_weight, grad_bias),
            *(*given, *written, len(mean), rows, *parts),
            **how,
        )


class SharedBatchNormFunction(torch.autograd.Function):
    """(raw, scale, shift) of batch norm with statistics that are known; raw is x, its gradient the true one."""

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, running_mean, running_var, norm, backend):
        rows = x.numel() // x.shape[1]
        running = bn.Running(running_mean, running_var, None, rows, norm.momentum, norm.batches)
        scale, shift, invstd = bn.affine(mean, var, weight, bias, norm.eps, backend, running)
        ctx.save_for_backward(mean, invstd, weight)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return x.detach(), scale, shift

    @staticmethod
    def backward(ctx, grad_raw, grad_scale, grad_shift):
        refuse_second_derivatives()
        if grad_scale is None:
            return grad_raw, *[None] * 8
        vectors = affine_backward(grad_scale.contiguous(), grad_shift.contiguous(), *ctx.saved_tensors, ctx.backend)
        needs = ctx.needs_input_grad[1:5]
        return grad_raw, *(grad if need else None for grad, need in zip(vectors, needs, strict=True)), *[None] * 4
