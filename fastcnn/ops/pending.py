"""Passes over pending activations: what the chain computes where no convolution or pool does it on load or on store.

One formula covers a pending activation, squeeze-excite's gate, drop-path and the residual join:

    z = out(f(x * scale + shift) * gate + (right * right_scale + right_shift))

x, right, z [N, C, H, W]; scale, shift, right_scale, right_shift [C] in fp32 (fp64 for fp64); gate [N, C] or [N, 1], in
x's dtype; f an activation of fastcnn.ops.activation or "none"; out "relu" or "none". What is None is left out.
Saved for backward: what is there of x, the vectors, gate, right (only with right_scale), z (only where out is "relu").
Torch counterpart: none; `pending_reference` is the formula in plain PyTorch.

The gradient that goes with x is the one at u = x * scale + shift, not multiplied by scale: a join's gradient then
serves both of its sides, and whoever made x multiplies while loading it (conv_fusion.Correction). The same holds for
right, if it has a scale. The gradients of scale and shift are those at fixed x: the sums of du * x and of du.
"""

from typing import NamedTuple

import torch

from fastcnn.ops import batch_norm_passes, common, pending_cpu
from fastcnn.ops.activation import activation_reference
from fastcnn.ops.conv_layout import suggests_channels_last

# in place of whether the gradient of x is scaled: it is that of z, as it is, and scale, shift and gate have none
AT_Z = "z"
SUM_PARTS = 256  # partial sums that one program adds at a time
SUM_COLUMNS = 8


class Expression(NamedTuple):
    """The tensors and the names of the formula above."""

    x: torch.Tensor
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    activation: str = "none"
    slope: float = 0.0  # of leaky_relu
    gate: torch.Tensor | None = None
    right: torch.Tensor | None = None
    right_scale: torch.Tensor | None = None
    right_shift: torch.Tensor | None = None
    out: str = "none"

    @property
    def is_plain(self):
        """Whether it is x itself."""
        return self.scale is None and self.activation == "none" and self.gate is None and self.right is None

    @property
    def is_join(self):
        """Whether it has two sides."""
        return self.right is not None

    @property
    def is_sum(self):
        """Whether its left side is x as it is."""
        return self.is_join and self.scale is None and self.activation == "none" and self.gate is None


def vector_dtype(x):
    """The dtype of vectors that go with x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def layout_of(x):
    """The layout of what is computed from x: channels_last also where x is some of the channels of wider images."""
    return torch.channels_last if suggests_channels_last(x) else torch.contiguous_format


def _per_channel(vector, like):
    return vector.to(like.dtype).view(1, -1, 1, 1)


def _per_image(gate, like):
    return gate.to(like.dtype)[:, :, None, None]


def _affine(x, scale, shift):
    return x if scale is None else x * _per_channel(scale, x) + _per_channel(shift, x)


def _activated(u, activation, slope):
    return u if activation == "none" else activation_reference(u, activation, slope)


def pending_reference(expression):
    """z in plain PyTorch, in the dtype of x, with ordinary gradients."""
    e = expression
    z = _activated(_affine(e.x, e.scale, e.shift), e.activation, e.slope)
    z = z if e.gate is None else z * _per_image(e.gate, z)
    z = z if e.right is None else z + _affine(e.right, e.right_scale, e.right_shift)
    return _activated(z, e.out, 0.0)


def _wide(tensor):
    """The tensor in the dtype its kernels compute in."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def pending_forward(x, scale, shift, activation, slope, gate, right, right_scale, right_shift, out, backend):
    """z, in the layout of x."""
    if backend == "triton":
        return _forward(x, scale, shift, activation, slope, gate, right, right_scale, right_shift, out)
    if backend == "cpu" and pending_cpu.can(x, activation):
        return pending_cpu.pending_forward(
            x, scale, shift, activation, slope, gate, right, right_scale, right_shift, out
        )  # fmt: skip
    e = Expression(_wide(x), scale, shift, activation, slope, gate, right, right_scale, right_shift, out)
    e = e if right is None else e._replace(right=_wide(right))
    return pending_reference(e).to(x.dtype).contiguous(memory_format=layout_of(x))


def pending_backward(
    grad_output, add, x, scale, shift, activation, slope, gate, join, right, right_scale, z, out, need_gate, scaled,
    backend, overwrite=False,
):  # fmt: skip
    """Everything that the gradient of z gives.

    Args:
        grad_output: of z.
        add: a further gradient, or None: of z in a join, of u (scaled: of x) else. The sums do not contain the latter.
        join: whether there is a right side.
        x: None where no part of the left side but x itself is there.
        right: needed with right_scale. z: where out is "relu".
        scaled: whether grad_x is multiplied by scale, as the true gradient is.
        overwrite: grad_output is the caller's own, and may become grad_x.

    Returns:
        (grad_x, sums [2, C], grad_right, right_sums [2, C], grad_gate). sums: of du * x and of du; right_sums: of
        dm * right and of dm, where dm is the gradient of the sum before `out`, and grad_right too. grad_right is
        grad_x itself where they are equal. Empty: sums without scale, what belongs to a side that is not there, and
        grad_gate unless need_gate.
    """
    if backend == "triton":
        return _backward(
            grad_output, add, x, scale, shift, activation, slope, gate, join, right, right_scale, z, out, need_gate,
            scaled,
        )  # fmt: skip
    if backend == "cpu" and pending_cpu.can(grad_output, activation):
        return pending_cpu.pending_backward(
            grad_output, add, x, scale, shift, activation, slope, gate, join, right, right_scale, z, out, need_gate,
            scaled, overwrite,
        )  # fmt: skip
    like = grad_output if x is None else x
    empty = like.new_empty(0)
    grad, wide = _wide(grad_output), None if x is None else _wide(x)
    dm = grad if add is None or not join else grad + _wide(add)
    dm = dm if out == "none" else torch.where(z <= 0, 0.0, dm)
    grad_gate, du = empty, dm
    u = None if x is None else _affine(wide, scale, shift)
    if gate is not None:
        if need_gate:
            grad_gate = (dm * _activated(u, activation, slope)).sum((2, 3))
            grad_gate = grad_gate.sum(1, keepdim=True) if gate.shape[1] == 1 else grad_gate
            grad_gate = grad_gate.to(gate.dtype)
        du = dm * _per_image(gate, dm)
    if activation != "none":
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            (du,) = torch.autograd.grad(_activated(u, activation, slope), u, du)
    sums = right_sums = empty
    if scale is not None:
        sums = _sums(du, wide)
    if right_scale is not None:
        right_sums = _sums(dm, _wide(right))
    grad_x = du if not scaled or scale is None else du * _per_channel(scale, du)
    if add is not None and not join:
        grad_x = grad_x + _wide(add)
    same = grad_x is dm
    layout = layout_of(like)
    narrow = lambda t: t.to(like.dtype).contiguous(memory_format=layout)
    grad_x = narrow(grad_x)
    grad_right = empty if not join else grad_x if same else narrow(dm)
    return grad_x, sums, grad_right, right_sums, grad_gate


def _sums(grad, tensor):
    return torch.stack([(grad * tensor).sum((0, 2, 3)), grad.sum((0, 2, 3))])


def sums(grad, tensor, backend):
    """[2, C]: the sums of grad * tensor and of grad over everything but the channels."""
    if backend == "triton":
        return _gradients(grad, tensor)[0]
    if backend == "cpu" and pending_cpu.can(tensor):
        return pending_cpu.sums(grad, tensor)
    return _sums(_wide(grad), _wide(tensor))


def corrected(grad_output, y, a, b, c, backend):
    """conv_fusion.Correction(y, a, b, c) of grad_output, as a pass of its own; y, b and c may be None."""
    if y is None:
        return pending_forward(grad_output, a, torch.zeros_like(a), "none", 0.0, *[None] * 4, "none", backend)
    if backend == "triton":
        return _forward(grad_output, a, c, "none", 0.0, None, y, b, None, "none", y)
    if backend == "cpu" and pending_cpu.can(y):
        return pending_cpu.corrected(grad_output, y, a, b, c)
    grad, wide = _wide(grad_output), _wide(y)
    result = grad * _per_channel(a, grad) + _per_channel(b, grad) * wide + _per_channel(c, grad)
    return result.to(y.dtype).contiguous(memory_format=layout_of(y))


def statistics(x, backend):
    """(mean, biased variance) per channel of x [N, C, H, W], in fp32 (fp64 for fp64)."""
    if backend == "triton" and x.numel() > 0:
        layout = layout_of(x)
        with common.device_guard(x):
            records = batch_norm_passes.strip_records(
                x.contiguous(memory_format=layout), batch_norm_passes.view_of(x.shape, layout)
            )
            count, pivot, distance, squares = batch_norm_passes.merge_to_record(records)
        return pivot + distance, squares / count
    if backend == "cpu" and pending_cpu.can(x):
        return pending_cpu.statistics(x)
    var, mean = torch.var_mean(_wide(x), (0, 2, 3), correction=0)
    return mean, var


# Triton


class _Launch(NamedTuple):
    """The layout of a pass over x, and its launch; with a gate every tile lies within one image."""

    layout: torch.memory_format
    grid: tuple
    where: tuple  # integers that say where tiles lie
    tiles: int
    how: dict  # compile-time values

    @classmethod
    def over(cls, x, gate):
        n, c, h, w = x.shape
        layout = layout_of(x)
        view = batch_norm_passes.view_of(x.shape, layout)
        if gate is not None:
            rows = layout == torch.channels_last or h * w == 1
            view = batch_norm_passes.View(n, h * w, c * h * w, *((c, 1) if rows else (1, h * w)))
        # four sums per element of a tile in fp64 take more registers than there are
        grid, where, how = batch_norm_passes.launch_plan(x, view, c, part=2 if x.dtype == torch.float64 else 1)
        one_gate = gate is not None and gate.shape[1] == 1
        return cls(layout, grid, (c, *where), where[1], how | dict(ONE_GATE=one_gate))

    def ordered(self, *tensors):
        """The tensors in this layout."""
        return [None if t is None else t.contiguous(memory_format=self.layout) for t in tensors]


def _dense(*vectors):
    return [None if vector is None else vector.contiguous() for vector in vectors]


def _forward(x, scale, shift, activation, slope, gate, right, right_scale, right_shift, out, like=None):
    """z, of the dtype and layout of `like` (None: x)."""
    from fastcnn.kernels.triton.pending import pending_forward_kernel

    like = x if like is None else like
    z = torch.empty_like(like, memory_format=layout_of(like))
    if z.numel() == 0:
        return z
    launch = _Launch.over(like, gate)
    x, right = launch.ordered(x, right)
    scale, shift, gate, right_scale, right_shift = _dense(scale, shift, gate, right_scale, right_shift)
    with common.device_guard(z):
        pending_forward_kernel[launch.grid](
            x, scale, shift, gate, right, right_scale, right_shift, z, *launch.where,
            ACTIVATION=activation, SLOPE=slope, OUT=out, **launch.how,
        )  # fmt: skip
    return z


def _backward(
    grad_output, add, x, scale, shift, activation, slope, gate, join, right, right_scale, z, out, need_gate, scaled
):  # fmt: skip
    like = grad_output if x is None else x
    layout = layout_of(like)
    new = lambda: torch.empty_like(like, memory_format=layout)
    grad_output = grad_output.to(like.dtype).contiguous(memory_format=layout)
    empty = like.new_empty(0)
    scaled = scaled and scale is not None
    # what is grad_output as it came is not written again, nor what both sides share
    dm_is_new = out != "none" or (join and add is not None)
    du_is_dm = gate is None and activation == "none" and not scaled and (join or add is None)
    written_right = None
    if du_is_dm:
        written = new() if dm_is_new else None
        grad_x = grad_right = grad_output if written is None else written
    else:
        grad_x = written = new()
        written_right = new() if join and dm_is_new else None
        grad_right = grad_output if written_right is None else written_right
    sums, grad_gate = _gradients(
        grad_output, x, add, scale, shift, activation, slope, gate, right if right_scale is not None else None,
        z if out != "none" else None, written, written_right, join, scaled, scale is not None, need_gate,
    )  # fmt: skip
    left = empty if scale is None else sums[:2]
    right_sums = empty if right_scale is None else sums[-2:]
    return grad_x, left, grad_right if join else empty, right_sums, grad_gate if need_gate else empty


def _gradients(
    grad, x, add=None, scale=None, shift=None, activation="none", slope=0.0, gate=None, right=None, z=None,
    grad_x=None, grad_right=None, join=False, scaled=False, left_sums=True, need_gate=False,
):  # fmt: skip
    """Write grad_x and grad_right, unless None; (sums [2 or 4, C] or None, grad_gate or None).

    right: where its sums are wanted. z: where the gradient ends where z does not exceed 0.
    """
    from fastcnn.kernels.triton.pending import pending_backward_kernel

    n, c = grad.shape[:2]
    count = 2 * left_sums + 2 * (right is not None)
    if grad.numel() == 0:
        sums = torch.zeros((count, c), dtype=vector_dtype(grad), device=grad.device)
        return sums, torch.zeros_like(gate) if need_gate else None
    if grad_x is grad_right is None and count == 0 and not need_gate:
        return None, None
    launch = _Launch.over(grad if x is None else x, gate)
    grad, x, add, right, z = launch.ordered(grad, x, add, right, z)
    scale, shift, gate = _dense(scale, shift, gate)
    partial = per_tile = sums = None
    new = lambda *shape: torch.empty(shape, dtype=vector_dtype(grad), device=grad.device)
    if count > 0:
        partial = new(1, launch.grid[0], count * c)
    if need_gate:
        per_tile = new(n, launch.tiles // n, c)
    with common.device_guard(grad):
        pending_backward_kernel[launch.grid](
            grad, add, x, scale, shift, gate, right, z, grad_x, grad_right, partial, per_tile, *launch.where,
            ACTIVATION=activation, SLOPE=slope, JOIN=join, SCALED=scaled, LEFT_SUMS=left_sums,
            RIGHT_SUMS=right is not None, **launch.how,
        )  # fmt: skip
        if count > 0:
            sums = added(partial, vector_dtype(grad)).view(count, c)
        if not need_gate:
            return sums, None
        if gate.shape[1] == 1:
            return sums, added(per_tile, vector_dtype(grad)).sum(1, keepdim=True).to(gate.dtype)
        return sums, added(per_tile, gate.dtype)


def added(partial, dtype):
    """[groups, columns], the sum over the parts of partial [groups, parts, columns], in their order."""
    from fastcnn.kernels.triton.pending import pending_sums_kernel

    groups, parts, columns = partial.shape
    sums = torch.empty((groups, columns), dtype=dtype, device=partial.device)
    block_p = min(SUM_PARTS, 1 << (parts - 1).bit_length())
    pending_sums_kernel[(groups, -(-columns // SUM_COLUMNS))](
        partial, sums, columns, parts, INT64=common.exceeds_int32(partial), BLOCK_P=block_p, BLOCK_C=SUM_COLUMNS
    )
    return sums
