"""Whether a residual join made in the 1x1 convolution that reads it pays, and with which tile: a guess without a GPU.

A pass over memory reads two sides and writes the join, which the convolution reads again. One kernel does not, and is
one launch less. Against it counts that programs which share the pixels all read both sides, where a tile does not hold
all filters, and that every program makes the join before it multiplies. How much of what is read again L2 has is not
measured; it counts in full here. Pass and convolution are predicted by conv_prediction. Numbers of the chips: chips.py.
"""

import functools
from typing import NamedTuple

from fastcnn.ops.chips import L2_BYTES_PER_CYCLE, REGISTERS, SHARED_BYTES_PER_CYCLE
from fastcnn.ops.conv_prediction import EXPOSED, LATENCY, START, TILE_END, ranked
from fastcnn.ops.conv_problem import Problem


class Tile(NamedTuple):
    """A block of pixels x filters, and how many channels a step multiplies."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# tile: {chip: (registers per thread, KiB of shared memory)}, compiled in 2026-11 with Triton 3.7.1 and vectors on both
# sides. What is missing spills there, or with Triton 3.6.0, or does not fit. A chip that is not named has the numbers
# of the next one below it
TILES = {
    Tile(64, 64, 64, 4, 3): {90: (146, 66), 100: (144, 67)},
    Tile(128, 64, 64, 8, 3): {80: (190, 82), 90: (144, 106), 100: (142, 107)},
    Tile(64, 128, 64, 8, 3): {80: (186, 66), 90: (128, 90), 100: (108, 91)},
    Tile(64, 256, 32, 4, 3): {90: (244, 69), 100: (161, 70)},
    Tile(64, 256, 64, 8, 3): {80: (255, 98), 90: (176, 138), 100: (136, 139)},
}
NOT_COMPILED = 120  # the first capability that nothing above was compiled for

# Instructions of the loop for an element of the join, counted in the machine code of sm_90; an SM issues 128 a cycle.
# Assumption: cycles of a step in which a program waits for itself, at barriers and for the product
INSTRUCTIONS = 14
STEP = 800


class Joined(NamedTuple):
    """A join and the 1x1 convolution of it, of 16-bit tensors, as numbers: pixels of all images, channels, filters."""

    rows: int
    c: int
    k: int

    @property
    def side(self):
        """Bytes of one side, or of the join."""
        return 2 * self.rows * self.c

    @property
    def y(self):
        """Bytes of the convolution's output."""
        return 2 * self.rows * self.k

    @property
    def bytes_apart(self):
        """That the pass and the convolution read and write, without the weight."""
        return 4 * self.side + self.y

    def bytes_together(self, columns):
        """That one kernel reads and writes, where `columns` programs share the pixels."""
        return (2 * columns + 1) * self.side + self.y


class Prediction(NamedTuple):
    """seconds: all of it; compute, memory: seconds if the other took no time; bytes: without the weight."""

    seconds: float
    compute: float
    memory: float
    bytes: int


def _resources(tile, chip):
    """(registers, KiB) of a program on the chip, or None where it cannot run."""
    chips = TILES[tile]
    known = max((arch for arch in chips if arch <= chip.arch < NOT_COMPILED), default=None)
    found = None if known is None else chips[known]
    return found if found and found[1] * 1024 <= chip.shared_per_block else None


def tiles(problem, chip):
    """The tiles that the chip can run and whose sides are not twice as large as what they hold."""
    return [
        tile
        for tile in TILES
        if tile.block_n < 2 * max(64, problem.k)
        and tile.block_k < 2 * max(64, problem.c)
        and _resources(tile, chip) is not None
    ]


def together(problem, tile, chip):
    """The Prediction of one kernel."""
    registers, kib = _resources(tile, chip)
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * tile.warps)
    # 1 KiB of every program's shared memory is CUDA's
    resident = max(1, min(by_registers, chip.shared_per_sm // ((kib + 1) * 1024)))
    columns, steps = -(-problem.k // n), -(-problem.c // k)
    busiest = -(-(-(-problem.rows // m) * columns) // chip.sms)
    side_by_side = min(resident, busiest)
    # wgmma m64nNk16 reads both operands from shared memory every time
    operands = 2 * -(-n // 64) * (64 + m) * k / SHARED_BYTES_PER_CYCLE
    products = max(m * n * k / chip.macs_per_cycle("16-bit"), operands)
    loaded = 2 * (2 * m + n) * k
    # into shared memory, the sides out of it, and the join into it
    copies = (loaded + 2 * 3 * m * k) / SHARED_BYTES_PER_CYCLE
    elementwise = m * k * INSTRUCTIONS / 128
    l2 = min(L2_BYTES_PER_CYCLE, chip.l2 * 1e12 / chip.sms / chip.hertz)
    # a program does one after the other, and the others of the SM something else meanwhile. It asks for a block after
    # the product of the step that freed the place, stages - 1 steps before it needs it
    alone = products + copies + elementwise + STEP
    alone = max(alone, (alone + LATENCY) / (tile.stages - 1))
    step = max(products, operands + copies, elementwise, alone / side_by_side, loaded / l2)
    end = LATENCY + TILE_END + 2 * m * n / L2_BYTES_PER_CYCLE
    compute = (busiest * steps * step + -(-busiest // side_by_side) * end) / chip.hertz
    moved = problem.bytes_together(columns)
    memory = (moved + 2 * problem.c * problem.k) / chip.bytes_per_second
    return Prediction(START + max(compute, memory) + EXPOSED * min(compute, memory), compute, memory, moved)


def apart(problem, chip):
    """The Prediction of a pass over memory and a convolution."""
    convolution = Problem(
        *("forward", problem.rows, problem.c, 1, 1, problem.k, 1, 1, 1, 1, (1, 1), (0, 0), (1, 1), 1),
        arithmetic="16-bit",
        access="packed",
        fused=True,
    )
    found, _ = ranked(convolution, chip)[0]
    written = 3 * problem.side / chip.bytes_per_second
    seconds = START + written + found.seconds
    return Prediction(seconds, found.compute, written + found.memory, problem.bytes_apart)


@functools.lru_cache(maxsize=1024)
def choose(problem, chip):
    """The Tile predicted to be fastest, or None if the chip has none."""
    return min(tiles(problem, chip), key=lambda tile: together(problem, tile, chip).seconds, default=None)


@functools.lru_cache(maxsize=1024)
def pays(problem, chip):
    """Whether one kernel is predicted to be faster than a pass and a convolution."""
    tile = choose(problem, chip)
    return tile is not None and together(problem, tile, chip).seconds < apart(problem, chip).seconds
