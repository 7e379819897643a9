"""Launch of the kernel that takes both gradients of a depthwise convolution with a small filter in one pass.

Which tile, and what it has registers for, is data: what the machine code says, as no GPU was at hand.
"""

import functools
import math
from typing import NamedTuple

import torch

from fastcnn.ops.chips import chip
from fastcnn.ops.conv2d_gather import needs_int64
from fastcnn.ops.conv_layout import empty_grad_weight, empty_image
from fastcnn.ops.conv_sums import accumulator_dtype


class Tile(NamedTuple):
    """A tile of groups of columns x channels, of which every thread holds one group of some channels.

    Attributes:
        rows: groups of columns; four for every channel of a thread.
        group: columns of x.
        ahead: steps that are loaded ahead.
    """

    rows: int
    group: int
    ahead: int


# (largest side of the filter, stride): {what is done to the gradient of the output on load: tile}. What is missing has
# no registers left, and is done by a pass of its own before. From machine code of 2026-11 (Triton 3.6.0 and 3.7.1,
# sm_80, 90, 100): none spills. An H100's SM can start 79 instructions for an element in the time that memory takes for
# three reads and a write of it (98 with a fourth read, 49 with stride 2); the loops take, of a relu6 with correction,
# 67 for 3x3 and 30 with stride 2, 38 for 5x5 with stride 2. 5x5 and 7x7 are bound by their 50 and 98 multiply-adds
TILES = {
    (3, 1): {"nothing": Tile(8, 2, 2), "correction": Tile(8, 2, 2), "gate": Tile(8, 2, 2)},
    (3, 2): {"nothing": Tile(8, 2, 2), "correction": Tile(8, 2, 2), "gate": Tile(8, 2, 2)},
    (5, 1): {"nothing": Tile(8, 2, 1)},
    (5, 2): {"nothing": Tile(8, 2, 1), "correction": Tile(8, 2, 1)},
    (7, 1): {"nothing": Tile(4, 2, 1)},
    (7, 2): {"nothing": Tile(4, 2, 1)},
}
LARGEST = max(side for side, _ in TILES)
CHANNELS, WARPS = 32, 4
# programs for each SM: registers allow two or three at a time, and either makes whole rounds of six
PROGRAMS = 6
# the second pass over the programs' sums: columns of a program (64 bytes) and slabs at once
SUM_COLUMNS, SUM_SLABS, SUM_WARPS = 16, 256, 8


def tile_of(problem):
    """The Tile for a problem that `can`, or None where the gradient of its output is to be corrected before."""
    side = max(problem.weight.shape[2:])
    kinds = TILES[min(most for most, _ in TILES if side <= most), max(problem.stride)]
    kind = "gate" if problem.gated[0] is not None else "nothing" if problem.vectors[0] is None else "correction"
    if problem.input.dtype == torch.float32:  # what is loaded ahead takes twice the registers
        return kinds["nothing"]._replace(ahead=1) if kind == "nothing" else None
    if kind == "gate" and _needs_int64(problem):  # so do longer offsets
        return None
    tile = kinds.get(kind)
    # shuffled channels come one by one, each in a register of its own
    return tile._replace(ahead=1) if tile is not None and problem.shuffle > 1 else tile


def _needs_int64(problem):
    n, _, h, w = problem.input.shape
    return needs_int64(n * h * w, problem.grad_output, problem.input)


def pixel_distance(image):
    """Elements from one pixel to the next of an image whose pixels lie in order with their channels together, or None.

    Some channels of wider images are such, too.
    """
    n, c, h, w = image.shape
    distance = next((image.stride(d) // per for d, per in ((3, 1), (2, w), (0, w * h)) if image.shape[d] > 1), c)
    expected = {0: h * w * distance, 1: 1, 2: w * distance, 3: distance}
    fits = all(image.shape[d] == 1 or image.stride(d) == expected[d] for d in range(4))
    return distance if fits and distance >= c else None


def can(problem):
    """Whether the kernel computes such gradients, of a gradient of the output that needs no correction."""
    dy, x, weight = problem.grad_output, problem.input, problem.weight
    return (
        problem.channels_last
        and dy.numel() > 0
        and dy.dtype != torch.float64
        and dy.shape[1] == x.shape[1]
        and problem.dilation == (1, 1)
        and max(problem.stride) <= 2
        and all(pad < size for pad, size in zip(problem.padding, weight.shape[2:], strict=True))
        # every pixel of the output lies over the pixels of a step
        and all(dy.shape[d] <= -(-x.shape[d] // problem.stride[d - 2]) for d in (2, 3))
        and max(weight.shape[2:]) <= LARGEST
    )


@functools.lru_cache(maxsize=1024)
def bands_of(column_blocks, steps, window, shares):
    """Into how many bands the steps of a column are split: the longest way of a program becomes the shortest.

    window: rows that a band reads before its first step.
    """

    def longest(bands):
        return -(-column_blocks * bands // shares) * (-(-steps // bands) + window)

    return min(range(1, steps + 1), key=longest)


def _in_order(image):
    """(the image or a copy with its pixels in order, distance of pixels)."""
    if image is None:
        return None, None
    distance = pixel_distance(image)
    if distance is not None:
        return image, distance
    return image.contiguous(memory_format=torch.channels_last), image.shape[1]


def corrects(problem):
    """Whether the kernel corrects the gradient of the output itself."""
    return tile_of(problem) is not None


def run(problem, needs, add):
    """(grad_input, grad_weight, grad_bias, sums) of the gradients that are needed."""
    from fastcnn.kernels.triton.depthwise_conv2d_sliding_backward import depthwise_conv2d_sliding_backward_kernel

    weight, pending = problem.weight, problem.pending
    dy, dy_q = _in_order(problem.grad_output)
    y, _ = _in_order(problem.y)
    x, x_w = _in_order(problem.input)
    add, add_w = _in_order(add)
    n, c, h, w = x.shape
    p, q = dy.shape[2:]
    r, s = weight.shape[2:]
    of_weight = needs[1] or needs[2]
    tile = tile_of(problem)
    columns, steps = n * -(-w // tile.group), -(-h // problem.stride[0])
    column_blocks, blocks = -(-columns // tile.rows), -(-c // CHANNELS)
    most = max(1, chip(x.device).sms * PROGRAMS // blocks)
    bands = bands_of(column_blocks, steps, -(-r // problem.stride[0]) + 1, most)
    band = -(-steps // bands)
    units = column_blocks * bands
    shares = min(most, units)

    new = lambda wanted, *size: (
        torch.empty((shares, *size), dtype=accumulator_dtype(x.dtype), device=x.device) if wanted else None
    )
    grad = empty_image(x, c, (h, w), True) if needs[0] else None
    grad_weight = empty_grad_weight(weight) if of_weight else None
    weights, biases = new(of_weight, c * r * s), new(needs[2], c)
    sums = new(needs[0] and pending is not None, 2, c)
    x = x if of_weight or sums is not None else None
    distances = [distance for distance in (c, dy_q, x_w, add_w) if distance is not None]
    depthwise_conv2d_sliding_backward_kernel[(shares * blocks,)](
        *(dy, y, *problem.vectors, weight, x, *problem.vectors_of_input, add, grad, weights, biases, sums),
        *(c, h, w, p, q, columns, bands, band, units, shares),
        *(None if distance == c else distance for distance in (dy_q, x_w, add_w)),
        *(weight.stride(0), weight.stride(2), weight.stride(3)),
        *([0] * 3 if grad_weight is None else [grad_weight.stride(d) for d in (0, 2, 3)]),
        **problem.constants,
        GATED=problem.gated[0],
        GATED_SLOPE=problem.gated[1],
        R=r,
        S=s,
        PAD_H=problem.padding[0],
        PAD_W=problem.padding[1],
        SHUFFLE=problem.shuffle,
        SCALED=pending is not None and pending.scaled,
        RAGGED=h % problem.stride[0] != 0 or w % tile.group != 0,
        VECTOR=math.gcd(8, *distances),
        INT64=_needs_int64(problem) or needs_int64(0, dy, x, add, grad),
        GROUP=tile.group,
        AHEAD=tile.ahead,
        ROWS=tile.rows,
        BLOCK_C=CHANNELS,
        num_warps=WARPS,
    )
    grad_bias = torch.empty(c, dtype=weight.dtype, device=weight.device) if needs[2] else None
    for slabs, out in ((weights, grad_weight), (biases, grad_bias)):
        if out is not None:
            _sum(slabs, out)
    return grad, grad_weight if needs[1] else None, grad_bias, sums


def _sum(slabs, out):
    """out = the sum of the slabs: many programs, each with many loads at the same time."""
    from fastcnn.kernels.triton.conv_sums import sum_slabs_kernel

    numel = out.numel()
    sum_slabs_kernel[(-(-numel // SUM_COLUMNS),)](
        *(slabs, out, numel, len(slabs)),
        INT64=False,
        BLOCK=SUM_COLUMNS,
        AT_ONCE=SUM_SLABS,
        num_warps=SUM_WARPS,
    )
