"""A residual join and the 1x1 convolution of stride 1 that reads it first, in one kernel: the join is not read again.

    z = out(x * scale + shift + (right * right_scale + right_shift))       y = conv(z)

x, right, z [N, C, H, W], y [N, K, H, W]. z is stored, as a pass over memory (pending.py) would: later layers read it,
and backward. Backward is that of a convolution whose input is a join. Whether it pays: conv2d_join_launch. Saved for
backward: nothing of its own.
Torch counterpart: none. Source: fastcnn's documentation of the chain.
"""

import torch
import torch.nn.functional as F

from fastcnn.ops import common, pending
from fastcnn.ops import conv2d_join_launch as launches
from fastcnn.ops.chips import chip
from fastcnn.ops.conv2d import is_packed
from fastcnn.ops.conv_problem import is_one_pixel
from fastcnn.ops.conv_sums import sum_rows_in_parts


def conv2d_join_reference(expression, weight):
    """(z, y) in plain PyTorch, in the dtype of the tensors given."""
    z = pending.pending_reference(expression)
    return z, F.conv2d(z, weight)


def why_not(expression, weight, stride=(1, 1), padding=(0, 0), groups=1):
    """None if conv2d_join gives right results for these arguments, else the sentence that says why not."""
    e, (k, _, r, s) = expression, weight.shape
    if not e.is_join or e.scale is None or e.activation != "none" or e.gate is not None:
        return "a join is made in a convolution where it is x * scale + shift, plus a right side, and nothing else"
    if groups != 1 or not is_one_pixel(r, s, stride, padding):
        return "a join is made in convolutions of 1x1 filters, stride 1, no padding and one group"
    n, c, h, w = e.x.shape
    if e.x.dtype not in (torch.float16, torch.bfloat16):
        return f"a join is made in convolutions of 16-bit tensors, not of {e.x.dtype}"
    for name, tensor, shape in (("x", e.x, e.x.shape), ("right", e.right, e.x.shape), ("weight", weight, (k, c, 1, 1))):
        if tensor.shape != shape:
            return f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}"
        if tensor.dtype != e.x.dtype:
            return f"{name} must have the dtype of x ({e.x.dtype}), got {tensor.dtype}"
        if not is_packed(tensor, gaps=False):
            return f"{name} must be channels_last without gaps, with pixels that start on 16 bytes"
    if k % 8:
        return f"a join is made in convolutions of a multiple of 8 filters, not of {k}"
    if not 0 < n * h * w < 2**30:
        return f"a join is made in convolutions of 1 to 2^30 pixels, not of {n} * {h} * {w}"
    if launches.choose(launches.Joined(n * h * w, c, k), chip(e.x.device)) is None:
        return "this chip has no tile for a join that is made in a convolution"
    return None


def pays(expression, weight, stride, padding, groups):
    """Whether conv2d_join can run and is predicted to be faster than a pass over memory and a convolution."""
    if why_not(expression, weight, stride, padding, groups) is not None:
        return False
    n, c, h, w = expression.x.shape
    return launches.pays(launches.Joined(n * h * w, c, weight.shape[0]), chip(expression.x.device))


def conv2d_join(expression, weight, z, pivot=None, tile=None):
    """The 1x1 convolution of stride 1 without padding of a join, which is written to z.

    Args:
        expression: pending.Expression, x * scale + shift and a right side, with or without vectors of its own; fp16 or
            bf16, channels_last.
        weight: [K, C, 1, 1].
        z: where the join is written, shaped and laid out as x.
        pivot: [K], or None.
        tile: a conv2d_join_launch.Tile; None for the one predicted to be fastest.

    Returns:
        y [N, K, H, W]; with a pivot (y, sums [S, 2, K]), of y - pivot and of its square, as conv2d_forward.

    Raises:
        ValueError: what why_not says.
    """
    from fastcnn.kernels.triton.conv2d_join import conv2d_join_kernel

    reason = why_not(expression, weight)
    if reason is not None:
        raise ValueError(reason)
    e, k = expression, weight.shape[0]
    n, c, h, w = e.x.shape
    problem = launches.Joined(n * h * w, c, k)
    tile = tile or launches.choose(problem, chip(e.x.device))
    y = torch.empty((n, k, h, w), dtype=e.x.dtype, device=e.x.device, memory_format=torch.channels_last)
    tiles_m = -(-problem.rows // tile.block_m)
    sums = None if pivot is None else torch.empty((tiles_m, 2, k), dtype=torch.float32, device=y.device)
    dense = lambda vector: None if vector is None else vector.contiguous()
    with common.device_guard(y):
        conv2d_join_kernel[(tiles_m * -(-k // tile.block_n),)](
            *(e.x, dense(e.scale), dense(e.shift), e.right, dense(e.right_scale), dense(e.right_shift), z),
            *(weight, y, dense(pivot), sums, problem.rows, c, k),
            OUT=e.out,
            INT64=common.exceeds_int32(e.x, y),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            STAGES=tile.stages,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return y if pivot is None else (y, sum_rows_in_parts(sums))
