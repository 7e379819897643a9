"""Host side of the family "stem": few channels, where the whole window under the filter is one box of the image.

Takes 16-bit NHWC images without gaps whose rows are multiples of 16 bytes, a packed output, dilation 1 and one group.
See kernels/triton/conv2d_stem.py for the idea.
"""

import math

import torch

from fastcnn.ops import common
from fastcnn.ops.conv_sums import sum_rows_in_parts, sum_slabs

BOX = (8, 32)  # rows and elements of a row that the largest window may have: a tile of it still fits shared memory


def shifts_of(c, stride, padding):
    """Elements from 16 bytes to the window's start, for output columns 0, 1, ... until they repeat."""
    count = 8 // math.gcd(8, stride[1] * c)
    return [(q * stride[1] - padding[1]) * c % 8 for q in range(count)]


def box(c, r, s, stride, padding):
    """(ROWS, RUN): rows and elements of a row that hold the window at every shift, as powers of two."""
    run = s * c + max(shifts_of(c, stride, padding))
    rows, run = (1 << (size - 1).bit_length() for size in (r, run))
    # a step of a product has at least 16 elements, 16 bytes of which lie in a row
    return rows, max(run, 16 // rows, 8)


def box_of(problem):
    """(ROWS, RUN) of a conv_problem.Problem."""
    return box(problem.c, problem.r, problem.s, problem.stride, problem.padding)


def why_not(problem):
    """None if the family can run this problem's geometry, else the sentence that says why not."""
    if problem.kind == "backward_input":
        return "the family stem has no gradient of the input: that of an image is not asked for"
    if problem.arithmetic != "16-bit" or problem.access != "image":
        return "the family stem needs 16-bit NHWC images without gaps, rows of 16 bytes and a packed output"
    if problem.groups != 1 or problem.dilation != (1, 1):
        return f"the family stem needs one group and no dilation, got {problem}"
    rows, run = box_of(problem)
    if rows > BOX[0] or run > BOX[1]:
        return f"the family stem takes windows of {BOX[0]} rows of {BOX[1]} elements, got {problem}"
    if problem.pending:
        return "the family stem reads images as they are, without an activation on load"
    return None


def forward(
    input,
    weight,
    bias,
    y,
    stride,
    padding,
    dilation,
    groups,
    precision,
    launch,
    *,
    pending=None,
    activation=None,
    residual=None,
    pivot=None,
):
    """y = act(conv(input) + bias + residual); returns the sums [S, 2, K] about a pivot, or None."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from fastcnn.kernels.triton.conv2d_stem import conv2d_stem_kernel

    (n, c, h, w), (k, _, r, s), (p, q) = input.shape, weight.shape, y.shape[2:]
    shifts = shifts_of(c, stride, padding)
    rows, run = box(c, r, s, stride, padding)
    filters = weight.new_zeros((len(shifts), k, rows, run))
    for shifted, shift in zip(filters, shifts, strict=True):
        shifted[:, :r, shift : shift + s * c] = weight.permute(0, 2, 3, 1).reshape(k, r, s * c)
    image = TensorDescriptor(input, [n, h, w * c], [h * w * c, w * c, 1], [launch.block_m, rows, run])
    out = lambda tensor: TensorDescriptor(tensor, [n, p * q, k], [p * q * k, k, 1], [launch.block_m, 1, launch.block_n])
    columns = -(-k // launch.block_n) * len(shifts)
    tiles = -(-n // launch.block_m) * p * q
    sums = None if pivot is None else torch.empty((tiles, 2, k), dtype=torch.float32, device=y.device)
    with common.device_guard(y):
        conv2d_stem_kernel[(columns * max(1, min(tiles, launch.programs // columns)),)](
            image,
            TensorDescriptor(filters, [len(shifts) * k, rows * run], [rows * run, 1], [launch.block_n, rows * run]),
            out(y),
            None if residual is None else out(residual),
            *(None if vector is None else vector.contiguous() for vector in (bias, pivot)),
            sums,
            *(n, p, q, c, k, r, s * c, *stride, *padding),
            HAS_BIAS=bias is not None,
            HAS_ADD=residual is not None,
            ACTIVATION=activation[0] if activation else "none",
            SLOPE=activation[1] if activation else 0.0,
            SUMS=pivot is not None,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            ROWS=rows,
            RUN=run,
            SHIFTS=len(shifts),
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
        return None if sums is None else sum_rows_in_parts(sums)


def backward_weight(
    grad_output,
    input,
    grad_weight,
    stride,
    padding,
    dilation,
    groups,
    precision,
    launch,
    *,
    correction=None,
    pending=None,
):
    """Gradient of the weight, in the strides of grad_weight."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from fastcnn.kernels.triton.conv2d_stem import conv2d_stem_backward_weight_kernel

    (n, c, h, w), (k, _, r, s), (p, q) = input.shape, grad_weight.shape, grad_output.shape[2:]
    shifts = shifts_of(c, stride, padding)
    rows, run = box(c, r, s, stride, padding)
    slabs = torch.empty((launch.splits, len(shifts), k, rows, run), dtype=torch.float32, device=input.device)
    flat = lambda tensor: TensorDescriptor(tensor, [n, p * q * k], [p * q * k, 1], [launch.block_k, launch.block_m])
    with common.device_guard(input):
        conv2d_stem_backward_weight_kernel[(-(-k // launch.block_m) * len(shifts) * launch.splits,)](
            flat(grad_output),
            TensorDescriptor(input, [n, h, w * c], [h * w * c, w * c, 1], [launch.block_k, rows, run]),
            slabs,
            flat(correction.y) if correction and correction.y is not None else None,
            *(None if v is None else v.contiguous() for v in (correction[1:] if correction else (None,) * 3)),
            *(n, p, q, c, k, launch.splits, *stride, *padding),
            CORRECTED=correction is not None,
            BLOCK_M=launch.block_m,
            BLOCK_K=launch.block_k,
            ROWS=rows,
            RUN=run,
            SHIFTS=len(shifts),
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
        total = slabs[0]
        if launch.splits > 1:
            total = torch.empty_like(total)
            sum_slabs(slabs, total)
    # what lies in the box beside the filter is dropped
    parts = [part[:, :r, shift : shift + s * c] for part, shift in zip(total, shifts, strict=True)]
    grad_weight.copy_(torch.stack(parts).sum(0).view(k, r, s, c).permute(0, 3, 1, 2))
