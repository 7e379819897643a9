"""The passes of batch norm over memory, which batch_norm and batch_norm_sync put together.

A record [4, C] says what a set of rows knows of its channels: count, pivot, mean - pivot, sum of squared deviations.
Strips of a tensor and processes of a group leave the same records, and one kernel merges either.
"""

import math
import struct
from typing import NamedTuple

import numpy as np
import torch

from fastcnn.ops import common, huge_pages

TILE = 2048  # elements of a tile: 16 per thread of 4 warps; twice as many spill where rows are short and ragged
PROGRAMS = 1024  # strips times channel blocks at most: eight programs per multiprocessor of an H100
FINALIZE = dict(BLOCK_S=64, BLOCK_C=16)
MASKED = ("leaky_relu", "relu", "relu6")  # their derivative takes two values: a bit says which
LEAKY_SLOPE = 0.01
# activations as bounds, which is how the CPU kernels know them: y = low where z <= low, high where z >= high
BOUNDS = {None: (math.nan, math.nan), "relu": (0.0, math.nan), "relu6": (0.0, 6.0)}


class View(NamedTuple):
    """A tensor as rows by channels: row (o, i) of channel c lies at o * stride_o + i * stride_i + c * stride_c."""

    outer: int
    inner: int
    stride_o: int
    stride_i: int
    stride_c: int


class Affine(NamedTuple):
    """Per channel [C]: y = (x - mean) * invstd * weight + bias. spread is invstd in training, else the variance."""

    mean: torch.Tensor
    spread: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    training: bool
    eps: float

    def on_cpu(self):
        """weight, bias, mean and invstd."""
        return self.weight, self.bias, self.mean, self.spread if self.training else torch.rsqrt(self.spread + self.eps)


def channels(x):
    # torch takes an empty 1-D tensor, too
    return x.shape[1] if x.dim() > 1 else 0


def memory_format(x):
    """The layout of the output: channels_last if x is, else contiguous; as torch."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def view_of(shape, layout):
    """The View of a dense tensor in this memory format."""
    N, C = shape[:2]
    pixels = math.prod(shape[2:])
    if layout != torch.contiguous_format or pixels == 1:
        return View(1, N * pixels, 0, C, 1)
    if C == 1:
        return View(1, N * pixels, 0, 1, 0)
    return View(N, pixels, C * pixels, 1, pixels)


def statistics_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def mask_shape(x):
    """Rows and bytes per row of the mask of x: 8 neighbours to a byte."""
    view = view_of(x.shape, memory_format(x))
    if view.stride_c == 1:
        return view.inner, _cdiv(channels(x), 8)
    return view.outer * channels(x), _cdiv(view.inner, 8)


def mask_values(mask, x):
    """The mask as a bool tensor of the shape of x."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    bits = bits.flatten(1)[:, : x.numel() // mask.shape[0]].bool()
    if view_of(x.shape, memory_format(x)).stride_c == 1:
        return bits.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    return bits.reshape(x.shape)


def slope(activation):
    return LEAKY_SLOPE if activation == "leaky_relu" else 0.0


# Triton


def launch_plan(x, view, C, masked=False, part=1):
    """Grid, positional and keyword arguments of a launch: tiles of whole memory rows, strips enough to fill a GPU.

    part: tiles have so many times fewer elements than others.
    """
    tile = TILE // part
    by_channel = view.stride_c == 1
    if by_channel:
        block_c = min(max(_power_of_two(C), 8 if masked else 1), 64)
        block_i = tile // block_c
    else:
        block_i = min(max(_power_of_two(view.inner), 8 if masked else 1), 1024, tile)
        block_c = min(_power_of_two(C), tile // block_i)
    tiles = view.outer * _cdiv(view.inner, block_i)
    c_blocks = _cdiv(C, block_c)
    tiles_per_strip = _cdiv(tiles, max(1, PROGRAMS // c_blocks))
    grid = (_cdiv(tiles, tiles_per_strip), c_blocks)
    where = (view.inner, tiles, tiles_per_strip, view.stride_o, view.stride_i, view.stride_c)
    align = align_of(C if by_channel else view.inner)
    return grid, where, dict(
        BY_CHANNEL=by_channel, ALIGN=align, INT64=common.exceeds_int32(x), BLOCK_I=block_i, BLOCK_C=block_c
    )  # fmt: skip


def align_of(row):
    """What kernels are told to divide the length of a memory row, where the compiler does not know it by itself."""
    return row & -row if row % 4 == 0 and row % 16 != 0 else 1


def _cdiv(a, b):
    return -(-a // b)


def _power_of_two(n):
    return 1 << (n - 1).bit_length()


def _finalize_grid(C):
    return (_cdiv(C, FINALIZE["BLOCK_C"]),)


def two_floats(value):
    # a float argument reaches a kernel in fp32; fp64 kernels add what rounding took
    (high,) = struct.unpack("f", struct.pack("f", value))
    return high, value - high


def strip_records(x, view):
    """[strips, 4, C]: the record of every strip."""
    from fastcnn.kernels.triton.batch_norm import batch_norm_statistics_kernel

    C = channels(x)
    grid, where, how = launch_plan(x, view, C)
    records = torch.empty((grid[0], 4, C), dtype=statistics_dtype(x), device=x.device)
    batch_norm_statistics_kernel[grid](x, records, C, *where, **how)
    return records


def merge(records, mean, invstd, running_mean, running_var, momentum, eps):
    """Write mean and invstd of all the records, and update the running statistics, if any."""
    from fastcnn.kernels.triton.batch_norm import batch_norm_finalize_kernel

    count, _, C = records.shape
    batch_norm_finalize_kernel[_finalize_grid(C)](
        records, None, mean, invstd, running_mean, running_var, C, count, *two_floats(momentum), EPS=eps, **FINALIZE
    )


def merge_to_record(records):
    """The records as one."""
    from fastcnn.kernels.triton.batch_norm import batch_norm_finalize_kernel

    count, _, C = records.shape
    record = records.new_empty(4, C)
    batch_norm_finalize_kernel[_finalize_grid(C)](
        records, record, None, None, None, None, C, count, 0.0, 0.0, EPS=0.0, **FINALIZE
    )
    return record


def apply(x, residual, y, mask, view, affine, activation):
    """Write y = f(z), and the mask of f'(z) unless None."""
    from fastcnn.kernels.triton.batch_norm import batch_norm_apply_kernel

    C = channels(x)
    grid, where, how = launch_plan(x, view, C, mask is not None)
    batch_norm_apply_kernel[grid](
        x, residual, y, mask, affine.mean, affine.spread, affine.weight, affine.bias, C, *where,
        EPS=affine.eps, TRAINING=affine.training, KIND=activation, SLOPE=slope(activation), **how,
    )  # fmt: skip


def backward_sums(grad_output, x, residual, mask, view, affine, activation, grad_weight, grad_bias):
    """[2, C]: the sums of dz and of dz * xhat, which are also written to grad_bias and grad_weight unless None."""
    from fastcnn.kernels.triton import batch_norm as kernels

    C = channels(x)
    grid, where, how = launch_plan(x, view, C, mask is not None)
    partial = torch.empty((grid[0], 2, C), dtype=statistics_dtype(x), device=x.device)
    sums = torch.empty((2, C), dtype=partial.dtype, device=x.device)
    kernels.batch_norm_backward_reduce_kernel[grid](
        grad_output, x, residual, mask, affine.mean, affine.spread, affine.weight, affine.bias, partial, C, *where,
        EPS=affine.eps, TRAINING=affine.training, KIND=activation, SLOPE=slope(activation), **how,
    )  # fmt: skip
    kernels.batch_norm_backward_finalize_kernel[_finalize_grid(C)](
        partial, affine.spread, sums, grad_weight, grad_bias, C, grid[0],
        EPS=affine.eps, TRAINING=affine.training, **FINALIZE,
    )  # fmt: skip
    return sums


def backward_apply(
    grad_output, x, residual, mask, grad_input, grad_residual, view, affine, activation, sums, rows
):  # fmt: skip
    """Write grad_input and grad_residual, each unless None. rows: what the sums went over."""
    from fastcnn.kernels.triton.batch_norm import batch_norm_backward_apply_kernel

    C = channels(x)
    grid, where, how = launch_plan(x, view, C, mask is not None)
    batch_norm_backward_apply_kernel[grid](
        grad_output, x, residual, mask, grad_input, grad_residual,
        affine.mean, affine.spread, affine.weight, affine.bias, sums, rows, C, *where,
        EPS=affine.eps, TRAINING=affine.training, KIND=activation, SLOPE=slope(activation), **how,
    )  # fmt: skip


# CPU


def run_on_cpu(name, view, C, inputs, outputs, mask, parameters, *scalars):
    """Call a numba kernel on flat tensors; what is None or empty becomes an empty array of the right type.

    Args:
        name: "forward" or "backward".
        inputs, outputs: of the size of x, in its layout; None for those that are not wanted.
        parameters: of the size C.
    """
    from fastcnn.kernels.cpu import batch_norm as kernels

    common.cpu_threads(view.outer * view.inner * C)
    empty = np.empty(0, inputs[0].detach().numpy().dtype)
    arrays = [_flat(t, empty) for t in inputs]
    arrays += [_flat(t if t is None else huge_pages.advise(t), empty) for t in outputs]
    arrays.append(np.empty(0, np.uint8) if mask is None else mask.numpy().reshape(-1))
    arrays += [empty if t is None else t.detach().numpy() for t in parameters]
    if view.stride_c == 1:
        getattr(kernels, f"rows_{name}")(*arrays, *scalars)
    else:
        getattr(kernels, f"planes_{name}")(*arrays, view.outer, *scalars)


def no_record():
    """What a CPU kernel gets that need not say what the batch was like."""
    return np.empty((0, 0))


def _flat(tensor, empty):
    if tensor is None or tensor.numel() == 0:
        return empty
    return tensor.detach().as_strided((tensor.numel(),), (1,)).numpy()
