"""The passes of pending.py on CPU, in numba: every tensor is read once and nothing between the steps is stored.

Formulas, arguments and results are pending.py's and batch_norm_affine.py's.
"""

import numpy as np
import torch

from fastcnn.ops import common, huge_pages
from fastcnn.ops.conv_layout import suggests_channels_last

EMPTY = {torch.float32: np.empty(0, np.float32), torch.float64: np.empty(0)}  # what tells kernels the dtype
KINDS = ("none", "relu", "relu6", "leaky_relu", "sigmoid", "silu", "hardswish")  # as the kernels number them


def can(x, activation="none"):
    """Whether the passes over x run here; else in PyTorch."""
    return x.is_cpu and x.dtype in EMPTY and x.numel() > 0 and activation in KINDS


class Pass:
    """Passes over tensors like this one: what their kernels get, and what must live until they are through."""

    def __init__(self, like):
        self.layout = torch.channels_last if suggests_channels_last(like) else torch.contiguous_format
        self.like, self.alive = like, []
        n, c, h, w = self.shape = like.shape
        size = n * c * h * w
        rows = self.layout == torch.channels_last or h * w == 1
        self.where = (EMPTY[like.dtype], common.threads_for(size), rows, n, c, size)

    def new(self):
        """A tensor for results."""
        return huge_pages.advise(torch.empty_like(self.like, memory_format=self.layout))

    def vectors(self, *shape):
        return self.like.new_empty(shape)

    def image(self, tensor):
        """The address of a tensor's elements in the order of this layout, or 0."""
        if tensor is None:
            return 0
        if tensor.shape != self.shape:
            raise ValueError(f"expected a tensor of shape {tuple(self.shape)}, got {tuple(tensor.shape)}")
        return self._address(tensor, self.layout)

    def vector(self, vector):
        """The address of a value per channel, and of a gate's [N, C] or [N, 1] as [N, C]; 0 for None."""
        if vector is None:
            return 0
        if vector.dim() == 2:
            vector = vector.expand(self.shape[:2])
        return self._address(vector, torch.contiguous_format)

    def _address(self, tensor, layout):
        if tensor.dtype != self.like.dtype or not tensor.is_contiguous(memory_format=layout):
            tensor = tensor.detach().to(self.like.dtype).contiguous(memory_format=layout)
            self.alive.append(tensor)
        return tensor.data_ptr()


def pending_forward(x, scale, shift, activation, slope, gate, right, right_scale, right_shift, out):
    """z, in the layout of x."""
    from fastcnn.kernels.cpu import chain as kernels

    over = Pass(x)
    image, vector = over.image, over.vector
    z = over.new()
    kernels.forward(
        *over.where, image(x), vector(scale), vector(shift), KINDS.index(activation), slope, vector(gate), image(right),
        vector(right_scale), vector(right_shift), out == "relu", image(z),
    )  # fmt: skip
    return z


def pending_backward(
    grad_output, add, x, scale, shift, activation, slope, gate, join, right, right_scale, z, out, need_gate, scaled,
    overwrite,
):  # fmt: skip
    """(grad_x, sums, grad_right, right_sums, grad_gate); overwrite: grad_x may take the memory of grad_output."""
    from fastcnn.kernels.cpu import chain as kernels

    over = Pass(grad_output if x is None else x)
    image, vector = over.image, over.vector
    scaled = scaled and scale is not None
    given = grad_output.contiguous(memory_format=over.layout)
    # neither what is grad_output as it came is written, nor what both sides share
    dm_is_new = out != "none" or (join and add is not None)
    du_is_dm = gate is None and activation == "none" and not scaled and (join or add is None)
    written = written_right = None
    grad_x = grad_right = given
    if dm_is_new or not du_is_dm:
        free = (overwrite or given is not grad_output) and (dm_is_new or not join)
        grad_x = written = given if free else over.new()
        if du_is_dm:
            grad_right = grad_x
        elif join and dm_is_new:
            grad_right = written_right = over.new()
    empty = over.vectors(0)
    sums, right_sums = (empty if v is None else over.vectors(2, over.shape[1]) for v in (scale, right_scale))
    grad_gate = over.vectors(*over.shape[:2]) if need_gate else empty
    kernels.backward(
        *over.where, image(given), image(add), image(x), vector(scale), vector(shift), KINDS.index(activation), slope,
        vector(gate), join, image(right if right_scale is not None else None), image(z if out != "none" else None),
        scaled, image(written), image(written_right), sums.data_ptr(), right_sums.data_ptr(), grad_gate.data_ptr(),
    )  # fmt: skip
    if need_gate:
        grad_gate = (grad_gate.sum(1, keepdim=True) if gate.shape[1] == 1 else grad_gate).to(gate.dtype)
    return grad_x, sums, grad_right if join else empty, right_sums, grad_gate


def image_means(x, scale, shift, activation, slope):
    """[N, C, 1, 1]: the means of z over every image."""
    from fastcnn.kernels.cpu import chain as kernels

    over = Pass(x)
    means = torch.empty((*over.shape[:2], 1, 1), dtype=x.dtype, memory_format=over.layout)
    kernels.image_means(
        *over.where, over.image(x), over.vector(scale), over.vector(shift), KINDS.index(activation), slope,
        means.data_ptr(),
    )  # fmt: skip
    return means


def image_means_backward(grad, add, x, scale, shift, activation, slope, scaled):
    """(grad_x, sums) of pending.pending_backward, given the gradient [N, C, 1, 1] of the means."""
    from fastcnn.kernels.cpu import chain as kernels

    over = Pass(x)
    image, vector = over.image, over.vector
    n, c, h, w = over.shape
    grad_x, sums = over.new(), over.vectors(0) if scale is None else over.vectors(2, c)
    per_image = (grad / (h * w)).flatten(1)  # the same at every pixel: a gate on a gradient of one
    kernels.backward(
        *over.where, 0, image(add), image(x), vector(scale), vector(shift), KINDS.index(activation), slope,
        vector(per_image), False, 0, 0, scaled and scale is not None, image(grad_x), 0,
        sums.data_ptr(), 0, 0,
    )  # fmt: skip
    return grad_x, sums


def image_products(dz, x, scale, shift, activation, slope):
    """[5, N, C]: sums of dz * f(u), dz * f'(u) * x, dz * f'(u), f'(u) * x and f'(u) over the pixels of every image."""
    from fastcnn.kernels.cpu import squeeze_excite as kernels

    over = Pass(x)
    products = over.vectors(5, *over.shape[:2])
    kernels.sums(
        *over.where, over.image(dz), over.image(x), over.vector(scale), over.vector(shift), KINDS.index(activation),
        slope, products.data_ptr(),
    )  # fmt: skip
    return products


def gated_gradient(dz, y, gate, add, scale, shift, activation, slope):
    """(dz * gate + add) * f'(u), in the layout of y."""
    from fastcnn.kernels.cpu import squeeze_excite as kernels

    over = Pass(y)
    image, vector = over.image, over.vector
    du = over.new()
    kernels.gradient(
        *over.where, image(dz), image(y), vector(scale), vector(shift), KINDS.index(activation), slope, vector(gate),
        vector(add), image(du),
    )  # fmt: skip
    return du


def sums(grad, tensor):
    """[2, C]: the sums of grad * tensor and of grad over everything but the channels."""
    unit = grad.new_ones(grad.shape[1])
    return pending_backward(
        grad, None, tensor, unit, unit, "none", 0.0, None, False, None, None, None, "none", False, False, False
    )[1]


def corrected(grad_output, y, a, b, c):
    """grad_output * a + b * y + c per channel."""
    from fastcnn.kernels.cpu import chain as kernels

    over = Pass(y)
    image, vector = over.image, over.vector
    dy = over.new()
    kernels.correct(*over.where, image(grad_output), image(y), vector(a), vector(b), vector(c), image(dy))
    return dy


def statistics(x):
    """(mean, biased variance) per channel."""
    from fastcnn.kernels.cpu import chain as kernels

    over = Pass(x)
    mean, var = over.vectors(2, x.shape[1])
    kernels.statistics(*over.where, over.image(x), mean.data_ptr(), var.data_ptr())
    return mean, var


def can_normalise(y, norm, running, backend):
    """Whether the vectors of batch norm with y's statistics are made here."""
    if backend != "cpu" or norm.group is not None or not can(y):
        return False
    return all(t is None or (t.dtype == y.dtype and t.is_contiguous()) for t in running[:2])


def can_go_back(y, norm, backend):
    """Whether the gradient of y, normalised with its own statistics, is made here."""
    return backend == "cpu" and norm.training and norm.group is None and can(y)


def normalised(y, weight, bias, eps, running):
    """(mean, scale, shift, 1 / sqrt(var + eps)) of batch norm with y's statistics; as batch_norm_affine.affine."""
    from fastcnn.kernels.cpu import chain as kernels

    over = Pass(y)
    vector = over.vector
    vectors = [over.vectors(y.shape[1]) for _ in range(4)]
    kernels.normalise(
        *over.where, over.image(y), vector(weight), vector(bias), float(eps), vector(running.offset),
        vector(running.mean), vector(running.var), float(running.momentum), *map(torch.Tensor.data_ptr, vectors),
    )  # fmt: skip
    _moved(running)
    return vectors


def _moved(running):
    if running.batches is not None:
        running.batches.add_(1)
    if running.mean is not None:
        torch.autograd.graph.increment_version((running.mean, running.var))


def affine(y, mean, var, weight, bias, eps, running):
    """(scale, shift, 1 / sqrt(var + eps)) of batch norm of y with these statistics of it."""
    from fastcnn.kernels.cpu import chain as kernels

    over = Pass(y)
    vector, c = over.vector, y.shape[1]
    vectors = [over.vectors(c) for _ in range(3)]
    kernels.affine(
        over.where[0], c, y.numel() // c, vector(mean), vector(var), vector(weight), vector(bias), float(eps),
        vector(running.offset), vector(running.mean), vector(running.var), float(running.momentum),
        *map(torch.Tensor.data_ptr, vectors),
    )  # fmt: skip
    _moved(running)
    return vectors


def correction(y, mean, invstd, weight, grad_scale, grad_shift):
    """(a, b, c, gradients of weight and bias): dy = a * du + b * y + c, given the sums of du * y and of du."""
    from fastcnn.kernels.cpu import chain as kernels

    over = Pass(y)
    vector, c = over.vector, y.shape[1]
    vectors = [over.vectors(c) for _ in range(4)]
    kernels.correction(
        over.where[0], c, y.numel() // c, *map(vector, (mean, invstd, weight, grad_scale, grad_shift)),
        *map(torch.Tensor.data_ptr, vectors),
    )  # fmt: skip
    return *vectors, grad_shift


def normalised_backward(grad, y, mean, invstd, weight, grad_scale, grad_shift):
    """(dy, gradients of weight and bias), given the gradient of the normalised y and its sums."""
    from fastcnn.kernels.cpu import chain as kernels

    over = Pass(y)
    image, vector = over.image, over.vector
    dy, grad_weight = over.new(), over.vectors(y.shape[1])
    kernels.normalise_backward(
        *over.where, image(grad), image(y), vector(mean), vector(invstd), vector(weight), vector(grad_scale),
        vector(grad_shift), image(dy), grad_weight.data_ptr(),
    )  # fmt: skip
    return dy, grad_weight, grad_shift
