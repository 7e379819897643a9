"""Whether one kernel for both gradients of a 1x1 convolution pays, and with which tile: a first guess without a GPU.

One kernel reads the gradient of the output and the input once, two kernels twice. Against it counts that its tile is
bound by the registers that hold the gradient of the weight: with more channels than that, programs share the channels,
and each reads the gradient of the output. How much of what is read again L2 has is not measured; it counts in full
here. Two kernels are predicted by conv_prediction, with the bytes of everything fused. Numbers of the chips: chips.py.
"""

import dataclasses
import functools
from typing import NamedTuple

from fastcnn.ops.chips import L2_BYTES_PER_CYCLE, REGISTERS, SHARED_BYTES_PER_CYCLE
from fastcnn.ops.conv_prediction import EXPOSED, START, ranked
from fastcnn.ops.conv_problem import Problem


class Tile(NamedTuple):
    """A block of pixels x channels; all filters, of which block_k is not below the number."""

    block_m: int
    block_c: int
    block_k: int
    warps: int
    stages: int


# tile: {chip: {what x is: (registers per thread, KiB of shared memory)}}, compiled in 2026-11 with Triton 3.7.1 with a
# correction and an addend, a pending activation with relu and with silu, of which the higher numbers count; "alone" is
# without the addend. What is missing spills there or does not fit. With all the registers that there are (255, or 128
# for 16 warps) Triton 3.6.0, 64-bit offsets, a join without an activation and ones like gelu may spill a few bytes. A
# chip that is not named has the numbers of the next one below it
TILES = {
    Tile(32, 64, 64, 4, 3): {
        80: {"pending": (221, 52)},
        90: {"pending": (144, 52)},
        100: {"pending": (141, 56)},
    },
    Tile(64, 64, 64, 4, 3): {
        80: {"plain": (248, 90), "join": (254, 98)},
        90: {"plain": (147, 90), "join": (188, 98)},
        100: {"plain": (102, 98), "join": (142, 114), "pending alone": (254, 84)},
    },
    Tile(32, 128, 64, 8, 3): {
        80: {"pending": (242, 82)},
        90: {"pending": (186, 82)},
    },
    Tile(64, 128, 64, 8, 3): {
        80: {"plain": (250, 142), "join": (255, 162)},
        90: {"plain": (160, 138), "join": (187, 154), "pending": (207, 142)},
        100: {"plain": (102, 154), "join": (138, 186), "pending": (255, 158)},
    },
    Tile(32, 256, 64, 8, 3): {
        80: {"plain": (250, 102), "join": (255, 162)},
        90: {"plain": (179, 134), "join": (237, 150)},
        100: {"plain": (109, 142), "join": (151, 174), "pending": (229, 146)},
    },
    Tile(32, 64, 128, 4, 3): {
        80: {"plain": (255, 80), "join": (255, 83), "pending": (255, 81)},
        90: {"plain": (192, 80), "join": (192, 83), "pending": (255, 81)},
    },
    Tile(32, 128, 128, 8, 3): {
        80: {"plain": (255, 120), "join": (255, 123), "pending": (255, 119)},
        90: {"plain": (173, 120), "join": (173, 123), "pending": (187, 119)},
    },
    # with 8 warps Triton 3.6.0 spills on sm_90; with 16, sm_100 has no tensor memory for it
    Tile(32, 256, 128, 16, 3): {
        90: {"plain": (128, 187), "join": (128, 203)},
        100: {},
    },
    Tile(32, 256, 128, 8, 3): {
        100: {"plain": (216, 195), "pending": (232, 199)},
    },
    Tile(32, 64, 256, 8, 3): {
        80: {"plain": (236, 140), "join": (236, 142), "pending": (242, 140)},
        90: {"plain": (178, 140), "join": (178, 142), "pending": (214, 140)},
    },
    Tile(64, 64, 256, 8, 3): {
        90: {"pending alone": (248, 224)},
        100: {},
    },
    Tile(32, 128, 256, 8, 3): {
        90: {"plain": (255, 190), "join": (255, 198), "pending": (255, 194)},
    },
}
NOT_COMPILED = 120  # the first capability that nothing above was compiled for

# Assumptions: instructions for an element of the gradient of the output (correction, rounding, its way to shared
# memory and back) and of the input (activation, epilogue, sums), of which an SM issues 128 a cycle; cycles of a step in
# which a program waits for itself: barriers, the first product, the sums over rows
DY_INSTRUCTIONS = 8
X_INSTRUCTIONS = 24
STEP = 1500


@dataclasses.dataclass(frozen=True)
class Backward:
    """Both gradients of a 1x1 convolution of 16-bit tensors as numbers.

    Attributes:
        rows: pixels of all images.
        c, k: channels and filters.
        corrected: whether a correction reads a second tensor beside the gradient of the output.
        x: "plain", "pending", or "join", whose left side is read, too.
        masked: whether the join has an activation.
        added: whether a gradient is added.
    """

    rows: int
    c: int
    k: int
    corrected: bool = True
    x: str = "plain"
    masked: bool = False
    added: bool = False

    @property
    def dy(self):
        """Bytes of the gradient of the output, as read."""
        return 2 * self.rows * self.k * (1 + self.corrected)

    @property
    def images(self):
        """(bytes of one tensor with c channels, how many of them one kernel reads and writes)."""
        return 2 * self.rows * self.c, 2 + (self.x == "join") + self.added

    @property
    def bytes_apart(self):
        """That two kernels read and write, without slabs and weights."""
        image, count = self.images
        # a plain input and a join without an activation are only read for the weight
        input_again = self.x == "pending" or self.masked
        return 2 * self.dy + (count + input_again) * image

    def bytes_together(self, blocks):
        """That one kernel reads and writes, where `blocks` programs share the channels."""
        image, count = self.images
        return blocks * self.dy + count * image


class Prediction(NamedTuple):
    """seconds: all of it; compute, memory: seconds if the other took no time; bytes: without slabs and weights."""

    seconds: float
    compute: float
    memory: float
    bytes: int


def _resources(tile, problem, chip):
    """(registers, KiB) of a program on the chip, or None where it cannot run."""
    chips = TILES[tile]
    known = max((arch for arch in chips if arch <= chip.arch < NOT_COMPILED), default=None)
    if known is None:
        return None
    found = chips[known].get(problem.x) or (None if problem.added else chips[known].get(f"{problem.x} alone"))
    return found if found and found[1] * 1024 <= chip.shared_per_block else None


def tiles(problem, chip):
    """The tiles that the chip can run and the problem fills: of the smallest block_k."""
    fitting = [
        tile
        for tile in TILES
        if tile.block_k >= problem.k
        and tile.block_c < 2 * max(64, problem.c)
        and _resources(tile, problem, chip) is not None
    ]
    least = min((tile.block_k for tile in fitting), default=0)
    return [tile for tile in fitting if tile.block_k == least]


def bands(problem, tile, chip):
    """(programs that share the pixels, pixels of each, programs on an SM at the same time)."""
    registers, kib = _resources(tile, problem, chip)
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * tile.warps)
    # 1 KiB of every program's shared memory is CUDA's
    resident = max(1, min(by_registers, chip.shared_per_sm // ((kib + 1) * 1024)))
    blocks = -(-problem.c // tile.block_c)
    steps = max(1, -(-problem.rows // tile.block_m))
    count = max(1, min(chip.sms * resident // blocks, steps))
    share = -(-steps // count) * tile.block_m
    return max(1, -(-problem.rows // share)), share, resident


def together(problem, tile, chip):
    """The Prediction of one kernel."""
    count, share, resident = bands(problem, tile, chip)
    blocks = -(-problem.c // tile.block_c)
    m, c, k = tile.block_m, tile.block_c, tile.block_k
    image, images = problem.images
    loaded = 2 * m * (k * (1 + problem.corrected) + c * (images - 1))
    # wgmma m64nNk16 reads both operands from shared memory every time
    operands = 2 * (-(-c // 64) * ((64 + m) * k + (64 + k) * m))
    products = max(2 * m * c * k / chip.macs_per_cycle("16-bit"), operands / SHARED_BYTES_PER_CYCLE)
    # into shared memory, out of it, and once more what was computed
    copies = (2 * loaded + 2 * m * (k + c)) / SHARED_BYTES_PER_CYCLE
    elementwise = m * (k * DY_INSTRUCTIONS + c * X_INSTRUCTIONS) / 128
    busy = products + copies + elementwise
    together = min(resident, -(-count * blocks // chip.sms))
    l2 = min(L2_BYTES_PER_CYCLE, chip.l2 * 1e12 / chip.sms / chip.hertz)
    # programs of an SM wait at different times
    step = max(busy, (busy + STEP) / together, loaded / l2)
    compute = -(-count * blocks // chip.sms) * (share // m) * step / chip.hertz
    slabs = 2 * 4 * count * problem.k * problem.c
    weight = 2 * count * problem.k * problem.c / blocks
    memory = (problem.bytes_together(blocks) + slabs + weight) / chip.bytes_per_second
    seconds = 2 * START + max(compute, memory) + EXPOSED * min(compute, memory)
    return Prediction(seconds, compute, memory, problem.bytes_together(blocks))


def apart(problem, chip):
    """The Prediction of a kernel for either gradient."""
    found = []
    for kind in ("backward_input", "backward_weight"):
        of_kind = Problem(
            *(kind, problem.rows, problem.c, 1, 1, problem.k, 1, 1, 1, 1, (1, 1), (0, 0), (1, 1), 1),
            arithmetic="16-bit",
            access="packed",
            fused=True,
            pending=problem.x == "pending" and kind == "backward_weight",
        )
        found.append(ranked(of_kind, chip)[0][0])
    # conv_prediction counts every tensor of a plain convolution once
    image, count = problem.images
    more = (problem.corrected * problem.dy // 2, (count - 2 + (problem.x == "pending" or problem.masked)) * image)
    extra = sum(more) / chip.bytes_per_second, more[0] / chip.bytes_per_second
    seconds = compute = memory = 0.0
    for prediction, added in zip(found, extra, strict=True):
        longer, shorter = sorted((prediction.compute, prediction.memory), reverse=True)
        others = prediction.seconds - longer - EXPOSED * shorter
        longer, shorter = sorted((prediction.compute, prediction.memory + added), reverse=True)
        seconds += others + longer + EXPOSED * shorter
        compute += prediction.compute
        memory += prediction.memory + added
    return Prediction(seconds, compute, memory, problem.bytes_apart)


@functools.lru_cache(maxsize=1024)
def choose(problem, chip):
    """The Tile predicted to be fastest, or None if the chip has none for it."""
    found = tiles(problem, chip)
    return min(found, key=lambda tile: together(problem, tile, chip).seconds) if found else None


@functools.lru_cache(maxsize=1024)
def pays(problem, chip):
    """Whether one kernel is predicted to be faster than two."""
    tile = choose(problem, chip)
    return tile is not None and together(problem, tile, chip).seconds < apart(problem, chip).seconds
