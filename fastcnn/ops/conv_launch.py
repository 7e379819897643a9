"""Which kernel runs a convolution, and with which tiles: measured where it was measured, else predicted."""

import dataclasses

KINDS = ("forward", "backward_input", "backward_weight")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One pass of one convolution, all that a launch depends on. Sizes are those of the whole convolution."""

    kind: str  # of KINDS
    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    p: int
    q: int
    stride: tuple
    padding: tuple  # top, left
    dilation: tuple
    groups: int
    arithmetic: str  # "16-bit", "tf32", "ieee" or "fp64"
    access: str  # "packed": NHWC without gaps, rows of 16 bytes; "wide": 16 bytes at a time; "narrow"
    fused: bool = False  # something happens on load or on store


@dataclasses.dataclass(frozen=True)
class Launch:
    """A family of kernels and its tile."""

    family: str  # "images", "gather", "folded", or "cudnn"
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    warps: int = 0
    stages: int = 0
    pack: int = 1  # groups that share one tile
    splits: int = 1  # backward_weight: programs that share a tile's pixels
    programs: int = 0  # images, forward and backward_input: persistent programs, multiprocessors times blocks on each


def is_one_pixel(r, s, stride, padding):
    """Whether every output pixel reads the input pixel of its own position alone: then the pixels are rows."""
    return r == s == 1 and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
