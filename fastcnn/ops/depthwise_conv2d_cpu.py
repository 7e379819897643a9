"""Depthwise convolution on CPU, in numba: the host functions of kernels/cpu/depthwise_conv2d.py.

Signatures, formulas and results are depthwise_conv2d.py's.
"""

import struct

import torch

from fastcnn.ops import common, huge_pages
from fastcnn.ops.conv_layout import empty_grad_weight, output_of, suggests_channels_last
from fastcnn.ops.depthwise_conv2d import Gradients
from fastcnn.ops.pending_cpu import EMPTY, KINDS

PASS_CACHES = 2**22  # bytes of a result from which its stores go past the caches
RING = 2**19  # bytes of rows that a task may keep: half of a small L2
# elements of the smallest inputs that were measured
LEAST = 8 * 1152 * 7 * 7
LEAST_3X3 = 8 * 192 * 28 * 28
FEWEST = 64  # channels: with 17 and 32 ours were slower
NOWHERE = (0, 0, 0, 0, 0, 0)


def why_not(input, weight):
    """None, or the sentence why the kernels cannot."""
    if input.dtype not in EMPTY:
        return f"the CPU kernels of depthwise conv2d take float32 and float64 and got {input.dtype}"
    return None


def pays(input, weight, stride, dilation):
    """Whether a plain convolution's gradients are faster here than in PyTorch, by what was measured on two cores.

    PyTorch takes several times as long for the gradient of a 5x5 weight as for the rest. Of 3x3 windows we save passes
    over memory: in large channels_last images ours take 0.55 to 0.9 of its time, in small ones more.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad) or max(stride) > 2 or max(dilation) > 1:
        return False
    if input.shape[-3] < FEWEST:
        return False
    if weight.shape[2:] == (5, 5):
        return input.numel() >= LEAST
    large = input.numel() >= LEAST_3X3 and input.shape[-1] * input.shape[-2] >= 28 * 28
    return weight.shape[2:] == (3, 3) and input.requires_grad and large and suggests_channels_last(input)


class _Call:
    """What the kernels get of a call, and what must live until they are through."""

    def __init__(self, input, weight, size, stride, padding, dilation, shuffle):
        (n, c, h, w), (k, _, r, s), (p, q) = input.shape, weight.shape, size
        self.like, self.alive = input, []
        self.geometry = (n, c, k // c, h, w, p, q, r, s, *stride, *padding, *dilation, shuffle)
        self.lanes = 64 // input.itemsize
        self.vectors = -(-k // self.lanes) * self.lanes
        self.kernel = (EMPTY[input.dtype], common.threads_for(n * (c * h * w + k * p * q)))

    def plan(self, rows):
        """(channels of a task, tasks along the images, tasks along the rows), by the geometry alone."""
        n, c, m, h, w, _, q, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, _ = self.geometry
        per_lane = (((r - 1) * dil_h + 2) * (w + (s - 1) * dil_w) + 3 * q) * self.like.itemsize * m
        most = max(1, RING // (per_lane * self.lanes)) * self.lanes
        chunk = c if c <= most else most
        strips = 1
        while n * strips * -(-c // chunk) < 8 and rows // (2 * strips) >= 4 * r:
            strips *= 2
        return chunk, min(n, 16), strips

    def image(self, tensor):
        """(address, size, strides) of an image, as far as its elements lie apart."""
        if tensor is None:
            return NOWHERE
        if tensor.dtype != self.like.dtype:
            tensor = self.keep(tensor.to(self.like.dtype))
        strides = tensor.stride()
        return (tensor.data_ptr(), 1 + sum((a - 1) * b for a, b in zip(tensor.shape, strides, strict=True)), *strides)

    def weight(self, tensor):
        if tensor is None:
            return NOWHERE[:5]
        strides = tensor.stride()
        size = 1 + sum((a - 1) * b for a, b in zip(tensor.shape, strides, strict=True))
        return (tensor.data_ptr(), size, strides[0], *strides[2:])

    def scratch(self, *shape, dtype=None):
        """The address of memory that lives as long as the call."""
        return self.keep(self.like.new_empty(shape, dtype=dtype)).data_ptr()

    def filters(self):
        """Addresses for the packed weight and a vector."""
        taps = self.geometry[7] * self.geometry[8]
        return self.scratch(self.vectors, taps), self.scratch(self.vectors)

    def keep(self, tensor):
        self.alive.append(tensor)
        return tensor

    def vector(self, tensor):
        """The address of a contiguous vector, or 0."""
        if tensor is None:
            return 0
        if tensor.dtype != self.like.dtype or not tensor.is_contiguous():
            tensor = self.keep(tensor.detach().to(self.like.dtype).contiguous())
        return tensor.data_ptr()

    def pending(self, pending):
        if pending is None:
            return 0, 0, 0, 0
        return (*map(self.vector, pending[:2]), KINDS.index(pending.activation), _bits(pending.slope))


def _bits(number):
    """An fp64 number among integers."""
    return struct.unpack("q", struct.pack("d", number))[0]


def _passes(tensor):
    """Whether the stores to a result go past the caches: 1 or 0. Its pixels must begin at multiples of 64 bytes."""
    if tensor is None or tensor.numel() * tensor.itemsize < PASS_CACHES:
        return 0
    strides = tensor.stride()
    unit = 64 // tensor.itemsize
    return int(tensor.data_ptr() % 64 == 0 and all(strides[d] % unit == 0 for d in (0, 2, 3)))


def forward(
    input, weight, bias, size, stride, padding, dilation, channels_last, *, pending=None, shuffle=1, out=None,
    statistics=False,
):  # fmt: skip
    """y, or (y, mean, biased variance) with statistics."""
    from fastcnn.kernels.cpu import depthwise_conv2d as kernels
    from fastcnn.kernels.cpu import tasks

    K = weight.shape[0]
    y = huge_pages.advise(output_of(out, input, K, tuple(size), channels_last))
    moments = input.new_empty((2, K)).unbind() if statistics else ()
    if y.numel() > 0:
        call = _Call(input, weight, size, stride, padding, dilation, shuffle)
        plan = call.plan(size[0])
        parts = plan[1] * plan[2]
        record = call.scratch(parts, 1 + 3 * call.vectors, dtype=torch.float64) if statistics else 0
        numbers = (
            *call.geometry, *plan, *call.image(input), *call.image(y), *call.pending(pending), *call.filters(),
            _passes(y), record, 0,
        )  # fmt: skip
        kernels.forward(
            *call.kernel, tasks.address(kernels.forward_tasks, input.dtype), numbers, call.weight(weight),
            call.vector(bias), *((m.data_ptr() for m in moments) if statistics else (0, 0)),
        )  # fmt: skip
    elif statistics:
        moments = [m.fill_(torch.nan) for m in moments]
    return (y, *moments) if statistics else y


def backward(
    grad_output, input, weight, stride, padding, dilation, channels_last, needs, *, correction=None, gated=None,
    pending=None, shuffle=1, add=None,
):  # fmt: skip
    """Gradients."""
    from fastcnn.kernels.cpu import depthwise_conv2d as kernels
    from fastcnn.kernels.cpu import tasks

    n, c, h, w = input.shape
    K = weight.shape[0]
    needs_input, needs_weight, needs_bias = needs
    dx = huge_pages.advise(output_of(None, input, c, (h, w), channels_last)) if needs_input else None
    grad_weight = empty_grad_weight(weight) if needs_weight else None
    grad_bias = input.new_empty(K) if needs_bias else None
    sums = input.new_empty((1, 2, c)) if needs_input and pending is not None else None
    if grad_output.numel() == 0 or input.numel() == 0:
        for result in (dx, grad_weight, grad_bias, sums):
            if result is not None:
                result.zero_()
        if dx is not None and add is not None:
            dx.copy_(add)
        return Gradients(dx, grad_weight, grad_bias, sums)
    call = _Call(input, weight, grad_output.shape[2:], stride, padding, dilation, shuffle)
    y = gated.y if gated is not None else correction.y if correction is not None else None
    if y is not None and y.stride() != grad_output.stride():
        layout = torch.channels_last if suggests_channels_last(y) else torch.contiguous_format
        y, grad_output = call.keep(y.contiguous(memory_format=layout)), grad_output.contiguous(memory_format=layout)
    if dx is None:
        add = None
    elif add is not None and add.stride() != dx.stride():
        add = call.keep(common.with_strides_of(add, dx))
    vector, plan = call.vector, call.plan(grad_output.shape[2])
    of_gate = (0,) * 6
    if gated is not None:
        of_gate = (*map(vector, gated[1:5]), KINDS.index(gated.activation), _bits(gated.slope))
    R, S = weight.shape[2:]
    record = lambda result, *shape: call.scratch(plan[1] * plan[2], *shape, dtype=torch.float64) if result else 0
    numbers = (
        *call.geometry, *plan, *call.image(input), *call.image(grad_output), *call.pending(pending), *call.filters(),
        _passes(dx), record(needs_weight, call.vectors, R * S + kernels.TAPS), pending is not None and pending.scaled,
        call.image(y)[0], *((0, 0, 0) if correction is None else map(vector, correction[1:])), *of_gate,
        call.image(add)[0], *call.image(dx), record(needs_bias, call.vectors), record(sums is not None, 2, c),
    )  # fmt: skip
    kernels.backward(
        *call.kernel, tasks.address(kernels.backward_tasks, input.dtype), tuple(map(int, numbers)),
        call.weight(weight), call.weight(grad_weight), vector(grad_bias), vector(sums),
    )  # fmt: skip
    return Gradients(dx, grad_weight, grad_bias, sums)
