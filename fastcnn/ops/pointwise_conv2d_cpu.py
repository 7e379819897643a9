"""1x1 convolutions of the fused chain on CPU: the host functions of kernels/cpu/pointwise_conv2d.py.

y [N, K, H, W] = conv(z, weight [K, C, 1, 1]), z [N, C, H, W] an expression (pending.py). What the passes of
pending_cpu.py and PyTorch's convolution do one after the other is done here to pieces that stay in a core's cache.
Not here: a gate whose own gradient is wanted, which squeeze-excite's and stochastic depth's are not.
"""

import torch

from fastcnn.ops import blas, common, huge_pages, pending_cpu
from fastcnn.ops.conv_layout import empty_grad_weight, suggests_channels_last
from fastcnn.ops.pending_cpu import EMPTY, KINDS, Pass

FORWARD, BACKWARD = 2**20, 2**20  # bytes of a piece of z and of y
TASKS = 16  # at most: each keeps a gradient of the weight of its own
PIECES = 2  # that a task has, where there are enough for two tasks


def takes(e, weight, geometry, backend, need_gate):
    """Whether the convolution of this expression runs here; need_gate: whether the gradient of its gate is wanted."""
    x, (size, stride, padding, _, groups) = e.x, geometry
    if backend != "cpu" or need_gate or groups != 1 or weight.shape[2:] != (1, 1) or weight.dtype != x.dtype:
        return False
    if any(step != 1 for step in stride) or any(padding) or tuple(size) != x.shape[2:]:
        return False
    rows = suggests_channels_last(x) or x.shape[2:] == (1, 1)
    if not rows or not pending_cpu.can(x, e.activation) or weight.numel() == 0 or blas.addresses(x.dtype) is None:
        return False
    n, c, h, w = x.shape
    # where images are too small for all threads, oneDNN is faster: it shares out channels, too
    return _plan(n * h * w, c, weight.shape[0], x.itemsize, BACKWARD, True)[0] >= common.threads_for(x.numel())


def _plan(m, c, k, itemsize, piece, parts):
    """(tasks, rows of a piece); parts: whether every task has a gradient of the weight."""
    rows = max(1, piece // ((c + k) * itemsize))
    most = min(TASKS, -(-m // rows) // PIECES, m * (c + k) // (2 * k * c) if parts else TASKS)
    tasks = 1 << max(1, most.bit_length() - 1)  # a power of two: as many for every thread
    each = -(-m // tasks)
    return tasks, -(-each // -(-each // rows))


class _Call(Pass):
    """A pass over x that makes or reads y."""

    def __init__(self, like, weight, piece, parts):
        super().__init__(like)
        n, c, h, w = like.shape
        if h * w > 1:
            self.layout = torch.channels_last  # strides do not tell where there is one channel
        k, m = weight.shape[0], n * h * w
        self.tasks, piece = _plan(m, c, k, like.itemsize, piece, parts)
        self.head = (blas.addresses(like.dtype), EMPTY[like.dtype], self.where[1], n, c, k, m, self.tasks, piece)

    def other(self, tensor):
        """The address of an image with any number of channels, or 0."""
        return 0 if tensor is None else self._address(tensor, self.layout)

    def matrix(self, weight):
        """The address of the weight as [K, C]."""
        return self._address(weight.detach().flatten(1), torch.contiguous_format)


def forward(e, weight, bias, z, statistics=False):
    """y, or with statistics (y, mean, biased variance); z: where the expression goes if others read it, or None."""
    from fastcnn.kernels.cpu import pointwise_conv2d as kernels

    x = e.x
    call = _Call(x, weight, FORWARD, False)
    image, vector = call.image, call.vector
    n, k = x.shape[0], weight.shape[0]
    y = huge_pages.advise(torch.empty((n, k, *x.shape[2:]), dtype=x.dtype, memory_format=call.layout))
    moments = x.new_empty((2, k)) if statistics else None
    kernels.forward(
        *call.head, image(x), vector(e.scale), vector(e.shift), KINDS.index(e.activation), e.slope, vector(e.gate),
        image(e.right), vector(e.right_scale), vector(e.right_shift), e.out == "relu", call.matrix(weight),
        vector(bias), image(z), _at(y), *(map(_at, moments) if statistics else (0, 0)),
    )  # fmt: skip
    return (y, *moments) if statistics else y


def backward(inputs, grad_y, correction, weight, add, need_image, need_weight):
    """(grad_x, sums, grad_right, right_sums, grad_weight), of pending.pending_backward; what is not wanted is None.

    inputs: conv_batch_norm.Inputs; add: a further gradient of x, in a join of z.
    """
    from fastcnn.kernels.cpu import pointwise_conv2d as kernels

    i, like = inputs, inputs.z if inputs.join else inputs.x
    c, k = like.shape[1], weight.shape[0]
    call = _Call(like, weight, BACKWARD, need_weight)
    image, other, vector = call.image, call.other, call.vector
    left = (0, 0, 0, 0, 0.0, 0)
    if not (i.join and i.at_z):
        left = (image(i.x), vector(i.scale), vector(i.shift), KINDS.index(i.activation), i.slope, vector(i.gate))
    finish = i.join or not (i.is_plain or i.at_z)
    scaled = bool(i.scaled) and i.scale is not None and not i.at_z
    grad_x = grad_right = sums = right_sums = grad_weight = parts = None
    if need_image:
        grad_x = call.new()
        if finish and i.scale is not None and not i.at_z:
            sums = call.vectors(2, c)
        if i.right_scale is not None:
            right_sums = call.vectors(2, c)
        if i.join:
            same = i.at_z or (i.activation == "none" and i.gate is None and not scaled)
            grad_right = grad_x if same else call.new()
    if need_weight:
        grad_weight = empty_grad_weight(weight)
        parts = call.vectors(call.tasks, k, c)
    matrix = grad_weight
    if need_weight and not grad_weight.flatten(1).is_contiguous():
        matrix = call.vectors(k, c, 1, 1)
    kernels.backward(
        *call.head, other(grad_y), *_of_correction(call, correction), *left, image(i.z), finish,
        image(add if need_image else None), i.join, image(None if right_sums is None else i.right),
        image(i.z if i.out == "relu" else None), scaled, call.matrix(weight), _at(grad_x),
        _at(None if grad_right is grad_x else grad_right), _at(sums), _at(right_sums), _at(parts), _at(matrix),
    )  # fmt: skip
    if matrix is not grad_weight:
        grad_weight.copy_(matrix)
    return grad_x, sums, grad_right, right_sums, grad_weight


def _at(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _of_correction(call, correction):
    """Addresses of y, a, b and c."""
    if correction is None:
        return 0, 0, 0, 0
    return call.other(correction.y), *map(call.vector, correction[1:])
