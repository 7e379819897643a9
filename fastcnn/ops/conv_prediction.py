"""Which launches can run a convolution's pass, and how long each would take: a first guess without a GPU.

The model counts tiles, what a step of a tile's reduction moves and multiplies, and how many tiles an SM works on at
the same time. A step takes as long as the slowest of tensor cores, shared memory, L2 and latency; the kernel as long as
its steps or as its bytes, whichever is more, and a little of the other. Numbers of the chips: chips.py. What is assumed
here stands in the constants below.
"""

import dataclasses
import functools
import math

from fastcnn.ops import conv2d_stem
from fastcnn.ops.chips import L2_BYTES_PER_CYCLE, REGISTERS, SHARED_BYTES_PER_CYCLE
from fastcnn.ops.conv_problem import FAMILIES, Launch
from fastcnn.ops.conv_tiles import TILES

# (images, filters, warps, stages) of the family stem; the rest of its tile is the window's box
STEM = {
    "forward": ((128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 8, 3)),
    "backward_weight": ((64, 64, 8, 3), (64, 64, 8, 4), (32, 64, 8, 4), (64, 32, 4, 4)),
}
FOLDED_CHANNELS = 8  # per group, up to which a step's reduction is filled from several taps
PERSISTENT = ("images", "stem")  # forward and backward_input
PACKED_DEPTH = (32, 64)  # channels and filters that groups packed into one tile shall reach
MIN_STEPS = 4  # steps of a reduction that a split is worth
MAX_SLABS = 256 << 20  # bytes of the slabs of all splits together
WAVES = (1, 2, 3, 4)  # how often the splits of a gradient of the weight may fill the chip

# Assumptions, in cycles: from asking for the first block until it is multiplied; what a tile's end costs beside its
# stores; instructions for the address and the mask of one access of a gather, of which an SM issues 128 a cycle
LATENCY = 1000
TILE_END = 500
GATHER_INSTRUCTIONS = 10
# Instructions for one element of a pending activation with a relu, counted in the machine code of sm_90 (silu: 13).
# An SM issues 128 a cycle, and a program multiplies a block only when it is transformed
TRANSFORM_INSTRUCTIONS = 4
START = 2e-6  # seconds from one kernel's end to the next one's first step
EXPOSED = 0.1  # share of the shorter of compute and memory that the longer one does not hide
OTHER_REGISTERS = 64  # of a thread beside its accumulators, in a tile that is in no table


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a launch is predicted to take.

    Attributes:
        seconds: all of it.
        tiles: of all programs, splits counted.
        occupancy: programs that an SM holds at the same time.
        waves: tiles over the programs that the chip holds.
        compute: seconds if memory were infinitely fast.
        memory: seconds that its bytes alone take.
        limit: what a step waits for: "tensor cores" (or the fp32 units), "shared memory", "L2", "addresses", "latency",
            "transform"; "memory" where the bytes take longer than all steps.
    """

    seconds: float
    tiles: int
    occupancy: int
    waves: float
    compute: float
    memory: float
    limit: str


def resources(problem, launch, chip):
    """(registers per thread, bytes of shared memory) of a program: as compiled, else estimated."""
    if launch.family == "stem":
        return _stem_resources(problem, launch)
    m, n, k = launch.block_m, launch.block_n, launch.block_k
    tiles = TILES.get(_table(problem, launch.family, launch.pack), {})
    compiled = _on_chip(problem, tiles.get((m, n, k, launch.warps, launch.stages), {}), chip)
    if compiled is not None:
        registers, kib = compiled
        return registers, 1024 * kib
    accumulators = m * n * (2 if problem.arithmetic == "fp64" else 1) // (32 * launch.warps)
    # what is fused reads a second block like the accumulators, and keeps vectors
    registers = OTHER_REGISTERS + accumulators * (2 if problem.fused else 1)
    return min(255, registers), (m + n) * k * problem.itemsize * launch.stages + 1024


def _stem_resources(problem, launch):
    # the image's block passes through registers, two elements in each; forward, one block of the weight stays
    m, n, k, threads = launch.block_m, launch.block_n, launch.block_k, 32 * launch.warps
    weight = problem.kind == "backward_weight"
    registers = 48 + (m * n + (k * n if weight else m * k) // 2) // threads + (40 if problem.fused else 0)
    shared = launch.stages * (m + n) * k * 2 if weight else (launch.stages * m * k + n * k + m * n) * 2
    return min(255, registers), shared + 1024


def _table(problem, family, pack=1):
    """The key of TILES."""
    if family == "images":
        access = "packed"
    elif family == "folded":
        access = "wide" if _vector(problem) > 1 else "narrow"
    else:
        access = "wide" if _is_wide(problem, pack) else "narrow"
    return family, problem.kind, problem.arithmetic, access


def _on_chip(problem, compiled, chip):
    """(registers, KiB) in a row of TILES, of the chip or of the next one below it; None if it cannot run there."""
    known = max((arch for arch in compiled if arch <= chip.arch), default=None)
    return None if known is None else compiled[known][problem.fused]


def _listed(problem, family, chip, pack=1):
    """The tiles of a family that the chip can run."""
    rows = TILES.get(_table(problem, family, pack), {})
    return [tile for tile, compiled in rows.items() if _on_chip(problem, compiled, chip) is not None]


def occupancy(problem, launch, chip):
    """Programs that an SM holds at the same time."""
    threads = 32 * launch.warps
    registers, shared = resources(problem, launch, chip)
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    # 1 KiB of every program's shared memory is CUDA's
    return max(1, min(by_registers, chip.shared_per_sm // (shared + 1024), chip.threads_per_sm // threads))


def why_not(problem, launch, chip):
    """None if this launch gives right results for this problem on this chip, else the sentence that says why not."""
    if launch.family not in FAMILIES:
        return f"there is no family {launch.family!r}: there are {', '.join(FAMILIES)}"
    if launch.family == "cudnn":
        return None
    for name in ("block_m", "block_n", "block_k", "warps"):
        value = getattr(launch, name)
        if value < 1 or value & (value - 1):
            return f"{name} must be a power of two, got {value}"
    if min(launch.block_m, launch.block_n, launch.block_k) < 16:
        return f"tiles have at least 16 rows, columns and steps, got {launch}"
    if min(launch.stages, launch.pack, launch.splits) < 1:
        return f"stages, pack and splits must be at least 1, got {launch}"
    if launch.splits > 1 and problem.kind != "backward_weight":
        return f"only the gradient of the weight is split, not {problem.kind}"
    if launch.pack > 1 and (launch.family != "gather" or problem.groups % launch.pack):
        return f"pack must divide the {problem.groups} groups, in the family gather, got {launch}"
    _, shared = resources(problem, launch, chip)
    if shared > chip.shared_per_block:
        return f"{launch} needs {shared >> 10} KiB of shared memory, a block may have {chip.shared_per_block >> 10}"
    if launch.family == "folded" and (
        problem.kind == "backward_input" or problem.c // problem.groups > FOLDED_CHANNELS
    ):
        return f"the family folded is for forward and backward_weight of up to {FOLDED_CHANNELS} channels per group"
    if launch.family == "stem":
        return _why_not_stem(problem, launch, chip)
    return _why_not_images(problem, launch, chip) if launch.family == "images" else None


def _why_not_stem(problem, launch, chip):
    if chip.arch < 90:
        return f"the family stem needs compute capability 9.0, not {chip.arch / 10}"
    reason = conv2d_stem.why_not(problem)
    if reason is None:
        name = "block_n" if problem.kind == "backward_weight" else "block_k"
        box = math.prod(conv2d_stem.box_of(problem))
        if getattr(launch, name) != box:
            reason = f"{name} must be the {box} elements of the window's box, got {getattr(launch, name)}"
        elif problem.kind == "forward" and launch.programs < 1:
            reason = f"programs must be at least 1, got {launch.programs}"
    return reason


def _why_not_images(problem, launch, chip):
    if chip.arch < 90:
        return f"the family images needs compute capability 9.0, not {chip.arch / 10}"
    if problem.access != "packed":
        return "the family images needs NHWC tensors without gaps and rows of a multiple of 16 bytes"
    if problem.arithmetic != "16-bit" and (problem.arithmetic, problem.kind) != ("tf32", "forward"):
        return f"the family images has no {problem.kind} in {problem.arithmetic}"
    if problem.is_one_pixel and (problem.p, problem.q) != (problem.h, problem.w):
        return f"the family images has no 1x1 filters that leave pixels without one, got {problem}"
    if problem.kind == "backward_weight":
        return None
    if launch.programs < 1:
        return f"programs must be at least 1, got {launch.programs}"
    # the channels behind a pixel's or a group's last one are those of the next
    if problem.depth % launch.block_k and not (problem.is_one_pixel and problem.groups == 1):
        return f"block_k must divide the {problem.depth} reduced channels of a group, got {launch.block_k}"
    if problem.columns % launch.block_n and problem.groups > 1:
        return f"block_n must divide the {problem.columns} computed channels of a group, got {launch.block_n}"
    return None


def candidates(problem, chip):
    """Every launch worth a thought: right on this chip, and with tiles that the problem's sizes fill by half."""
    found = [*_images(problem, chip), *_stem(problem), *_gather(problem, chip)]
    found = [launch for launch in dict.fromkeys(found) if why_not(problem, launch, chip) is None]
    return [filled for launch in found for filled in _filling(problem, launch, chip)]


def _images(problem, chip):
    weight = problem.kind == "backward_weight"
    found = []
    for tile in _listed(problem, "images", chip):
        m, n, k, *_ = tile
        # a tile's sides are not twice as large as what they hold
        sides = ((m, problem.columns), (n, problem.depth)) if weight else ((n, problem.columns), (k, problem.depth))
        launch = Launch("images", *tile, programs=1)
        full = 2 * problem.rows >= (k if weight else m)
        if full and all(block <= max(32, _power_of_two(size)) for block, size in sides):
            if why_not(problem, launch, chip) is None:
                found.append(launch)
    # short rows of memory are only for channels that long ones do not divide
    deepest = max((launch.block_k for launch in found), default=0)
    return [launch for launch in found if launch.block_k == deepest]


def _stem(problem):
    if problem.access != "image" or conv2d_stem.why_not(problem) is not None:
        return
    box = math.prod(conv2d_stem.box_of(problem))
    for images, filters, warps, stages in STEM[problem.kind]:
        if 2 * problem.n >= images:
            if problem.kind == "forward":
                yield Launch("stem", images, filters, box, warps, stages, programs=1)
            else:
                yield Launch("stem", filters, box, images, warps, stages)


def _gather(problem, chip):
    folds = problem.groups == 1 and problem.c <= FOLDED_CHANNELS and problem.kind != "backward_input"
    for family in ("gather", "folded") if folds and problem.r * problem.s > 1 else ("gather",):
        for pack in _packs(problem) if family == "gather" else (1,):
            tiles = _listed(problem, family, chip, pack)
            sizes = _matrix(problem, family, pack)
            if not tiles:  # "gather" has one for every problem
                continue
            full = [tile for tile in tiles if _fills(tile, sizes)]
            for tile in full or [min(tiles, key=lambda tile: math.prod(tile[:3]))]:
                yield Launch(family, *tile, pack=pack)


def _fills(tile, sizes):
    """Whether no side of a tile is twice as large as what it holds, or 16."""
    return all(side <= max(16, _power_of_two(size)) for side, size in zip(tile[:3], sizes, strict=True))


def _is_wide(problem, pack):
    """Whether a block is read 16 bytes at a time: its channels are multiples of that."""
    unit = 16 // problem.itemsize
    return problem.access != "narrow" and problem.columns * pack % unit == 0 and problem.depth * pack % unit == 0


def _vector(problem):
    """Channels that the family folded reads at once: all of them and zeros up to a power of two."""
    channels = _power_of_two(problem.c)
    return channels if problem.groups == 1 and channels <= FOLDED_CHANNELS else 1


def _matrix(problem, family, pack=1):
    """Rows, columns and depth of the matrix product of a gathering family, for one tap or, folded, all of them."""
    columns, depth = problem.columns * pack, problem.depth * pack
    folded = max(problem.c // problem.groups, _vector(problem)) * problem.r * problem.s
    if problem.kind == "backward_weight":
        return depth, folded if family == "folded" else columns, problem.n * problem.p * problem.q
    if problem.kind == "forward":
        return problem.n * problem.p * problem.q, columns, folded if family == "folded" else depth
    # of one parity class
    sizes = zip((problem.h, problem.w), problem.stride, strict=True)
    return problem.n * math.prod(-(-size // stride) for size, stride in sizes), columns, depth


def _packs(problem):
    found = {1}
    smaller = min(problem.c, problem.k) // problem.groups
    for reached in PACKED_DEPTH:
        pack = 1
        while pack * smaller < reached and problem.groups % (2 * pack) == 0:
            pack *= 2
        found.add(pack)
    return sorted(found) if problem.groups > 1 and problem.access != "narrow" else [1]


def _power_of_two(n):
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _filling(problem, launch, chip):
    """The launch with as many programs as the chip holds, or with numbers of splits that fill it once, twice, ..."""
    programs = chip.sms * occupancy(problem, launch, chip)
    if problem.kind != "backward_weight":
        return [dataclasses.replace(launch, programs=programs if launch.family in PERSISTENT else 0)]
    launch = dataclasses.replace(launch, programs=0)
    tiles, steps = _tiles_and_steps(problem, launch)
    slab = 4 * problem.k * problem.c // problem.groups * problem.r * problem.s
    most = max(1, min(steps // tiles // MIN_STEPS, MAX_SLABS // max(1, slab)))
    return [
        dataclasses.replace(launch, splits=splits)
        for splits in sorted({min(most, max(1, waves * programs // tiles)) for waves in WAVES})
    ]


def _tiles_and_steps(problem, launch):
    """Tiles without their splits, and steps of BLOCK_K of all tiles together."""
    m, n, k, pack = launch.block_m, launch.block_n, launch.block_k, launch.pack
    taps, groups = problem.r * problem.s, problem.groups // pack
    if launch.family == "images":
        pairs = 1 if problem.is_one_pixel else problem.taps_inside()
        if problem.kind == "backward_weight":
            tiles = -(-problem.columns // m) * -(-problem.depth // n) * groups
            return tiles * taps, tiles * -(-problem.rows // k) * pairs
        size = (problem.p, problem.q) if problem.kind == "forward" else (problem.h, problem.w)
        tiles = -(-problem.rows // m) * -(-problem.columns // n) * groups
        return tiles * (1 if problem.is_one_pixel else math.prod(size)), tiles * pairs * -(-problem.depth // k)
    if launch.family == "stem":
        pixels = problem.p * problem.q
        if problem.kind == "backward_weight":
            blocks = -(-problem.k // m)
            shifts = len(conv2d_stem.shifts_of(problem.c, problem.stride, problem.padding))
            return blocks * shifts, blocks * -(-problem.n // k) * pixels
        tiles = -(-problem.n // m) * -(-problem.k // n) * pixels
        return tiles, tiles
    rows, columns, depth = _matrix(problem, launch.family, pack)
    tiles = -(-rows // m) * -(-columns // n) * groups
    steps = tiles * -(-depth // k)
    if launch.family == "folded":
        return tiles, steps
    if problem.kind == "backward_input":
        # a tap reaches the pixels of one parity class; a class without taps is written all the same
        return tiles * math.prod(problem.stride), steps * taps
    return (tiles * taps if problem.kind == "backward_weight" else tiles), steps * taps


def _step(problem, launch, chip, resident, active):
    """{what: cycles that an SM needs for one step of one tile}.

    Args:
        resident: programs on an SM.
        active: SMs that work.
    """
    m, n, k, size = launch.block_m, launch.block_n, launch.block_k, problem.itemsize
    # the stem's weight stays where it is
    loaded = (m if launch.family == "stem" and problem.kind == "forward" else m + n) * k * size
    l2 = min(L2_BYTES_PER_CYCLE, chip.l2 * 1e12 / active / chip.hertz)
    cycles = {
        "tensor cores": m * n * k / chip.macs_per_cycle(problem.arithmetic),
        "shared memory": (loaded + _operand_reads(problem, launch, chip) * size) / SHARED_BYTES_PER_CYCLE,
        "L2": loaded / l2,
        # the blocks of the other stages are on their way meanwhile
        "latency": LATENCY / max(1, launch.stages - 1) / resident,
    }
    if launch.family not in PERSISTENT:
        unit = 16 if _is_wide(problem, launch.pack) else size
        if launch.family == "folded":
            unit = min(16, size * _vector(problem))
        # one line of the cache is looked up in a cycle, of which a short row fills a part
        row = size * (min(m, n) if problem.kind == "backward_weight" else k)
        cycles["addresses"] = max(loaded / unit * GATHER_INSTRUCTIONS / 128, loaded / min(row, 128))
    if problem.pending:
        side = n if problem.kind == "backward_weight" and launch.family != "images" else m
        transform = side * k * TRANSFORM_INSTRUCTIONS / 128
        # other programs of the SM multiply meanwhile
        cycles["transform"] = max(transform, (transform + cycles["tensor cores"]) / resident)
    return cycles


def _operand_reads(problem, launch, chip):
    """Elements of shared memory that the tensor cores read for one step of a tile."""
    m, n, k = launch.block_m, launch.block_n, launch.block_k
    if chip.arch in (100, 103):
        return (m + n) * k  # tcgen05: each operand once
    if chip.arch == 90 and m >= 64:
        return m // 64 * (64 + n) * k  # wgmma m64nNk16: both operands every time
    # mma.sync: warps stand in a grid over the tile, each reads its rows and its columns
    down = min(launch.warps, max(1, m // 16))
    while down > 1 and m // down < n // (launch.warps // down):
        down //= 2
    return (m * (launch.warps // down) + n * down) * k


def predict(problem, launch, chip):
    """The Prediction of a launch that `candidates` gave."""
    tiles, steps = _tiles_and_steps(problem, launch)
    per_tile = steps / tiles / launch.splits
    tiles *= launch.splits
    resident = occupancy(problem, launch, chip)
    # tiles that the busiest SM computes, and how many of them at the same time
    busiest = -(-tiles // chip.sms)
    together = min(resident, busiest)
    cycles = _step(problem, launch, chip, together, min(tiles, chip.sms))
    limit = max(cycles, key=cycles.get)
    stored = launch.block_m * launch.block_n * (4 if launch.splits > 1 else problem.itemsize)
    end = TILE_END + stored / L2_BYTES_PER_CYCLE
    # a persistent program loads the next tile's blocks while it stores; others begin anew with every round
    rounds = -(-busiest // together)
    begins = 1 if launch.family in PERSISTENT and problem.kind != "backward_weight" else rounds
    compute = (busiest * per_tile * cycles[limit] + begins * LATENCY + rounds * end) / chip.hertz
    memory, others = problem.bytes / chip.bytes_per_second, 0.0
    if problem.copied:
        # what is read and written once more, and read or written by the copies
        others += 3 * START + 2 * memory
    channels = _vector(problem)
    if launch.family == "folded" and channels > 1 and (channels > problem.c or problem.access == "narrow"):
        # a copy with as many channels as are read at once
        copied = problem.itemsize * problem.n * problem.h * problem.w * (problem.c + channels)
        others += START + copied / chip.bytes_per_second
    if launch.splits > 1:
        # slabs are written, and read by a second kernel
        slabs = 4 * problem.k * problem.c // problem.groups * problem.r * problem.s * launch.splits
        others += START + slabs / chip.bytes_per_second
        memory += slabs / chip.bytes_per_second
    seconds = START + max(compute, memory) + EXPOSED * min(compute, memory) + others
    limit = "memory" if memory > compute else limit
    return Prediction(seconds, tiles, resident, tiles / (chip.sms * resident), compute, memory, limit)


def ranked(problem, chip):
    """[(Prediction, Launch)] of all candidates, the fastest first."""
    found = [(predict(problem, launch, chip), launch) for launch in candidates(problem, chip)]
    return sorted(found, key=lambda pair: pair[0].seconds)


@functools.lru_cache(maxsize=1024)
def pending_seconds(problem, chip):
    """What forward and gradient of the weight take where a pending activation is the input: the two ways to read it.

    Written once, z is a temporary tensor: a pass over memory makes it before forward, and once more in backward. On
    load nothing is written, but a filter's taps, and tiles of other columns, transform the same elements again.

    Args:
        problem: of the forward pass.

    Returns:
        (seconds with the activation applied on load, seconds with it written, of which the two passes are part).
    """
    sides = []
    for pending in (True, False):
        passes = (
            dataclasses.replace(problem, kind=kind, fused=True, pending=pending)
            for kind in ("forward", "backward_weight")
        )
        sides.append(sum(ranked(one, chip)[0][0].seconds for one in passes))
    elements = problem.n * problem.c * problem.h * problem.w
    write = START + 2 * problem.itemsize * elements / chip.bytes_per_second
    return sides[0], sides[1] + 2 * write


def roofline(problem, chip):
    """Seconds that the chip's sustained arithmetic or bandwidth take at least, whichever is more."""
    peak = 2 * chip.macs_per_cycle(problem.arithmetic) * chip.sms * chip.hertz
    return max(2 * problem.macs / peak, problem.bytes / chip.bytes_per_second)
