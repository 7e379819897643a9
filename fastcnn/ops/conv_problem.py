"""A convolution's pass as numbers, and the kernel that shall run it: what choosing, predicting and tuning speak of."""

import dataclasses
import math

KINDS = ("forward", "backward_input", "backward_weight")
FAMILIES = ("images", "stem", "gather", "folded", "cudnn")
ARITHMETICS = ("16-bit", "tf32", "ieee", "fp64")
ACCESSES = ("packed", "image", "wide", "narrow")


def is_one_pixel(r, s, stride, padding):
    """Whether every output pixel reads the input pixel of its own position alone: then the pixels are rows."""
    return r == s == 1 and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)


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
    arithmetic: str  # of ARITHMETICS
    # "packed": NHWC, pixels of 16 bytes, perhaps slices of wider images; "image": without gaps, the input with rows of
    # 16 bytes; "wide": 16 bytes at a time; "narrow"
    access: str
    fused: bool = False  # something happens on load or on store
    pending: bool = False  # the input is read through a pending activation
    copied: bool = False  # the tensors are first copied to channels_last, and the result back

    @property
    def is_one_pixel(self):
        """See `is_one_pixel`."""
        return is_one_pixel(self.r, self.s, self.stride, self.padding)

    @property
    def rows(self):
        """What a row of a tile can stand for: images; pixels where every pixel is on its own."""
        return self.n * self.h * self.w if self.is_one_pixel else self.n

    @property
    def columns(self):
        """Channels of a group that the pass computes: K forward, else C."""
        return (self.k if self.kind == "forward" else self.c) // self.groups

    @property
    def depth(self):
        """Channels of a group on the other side: C forward, else K; forward and backward_input reduce over them."""
        return (self.c if self.kind == "forward" else self.k) // self.groups

    @property
    def itemsize(self):
        """Bytes of an element."""
        return {"16-bit": 2, "fp64": 8}.get(self.arithmetic, 4)

    def taps_inside(self):
        """Pairs of an output pixel of one image and a tap that falls inside the image: what has to be computed."""
        return math.prod(
            sum(_outputs_inside(*axis, tap) for tap in range(taps))
            for *axis, taps in (
                (self.h, self.p, self.stride[0], self.padding[0], self.dilation[0], self.r),
                (self.w, self.q, self.stride[1], self.padding[1], self.dilation[1], self.s),
            )
        )

    @property
    def macs(self):
        """Multiply-adds, without those with the zeros of the padding; every pass has the same."""
        return self.n * self.taps_inside() * (self.c // self.groups) * self.k

    @property
    def bytes(self):
        """Read and written at least: every tensor once. Pixels of the input that no tap reads need not be read."""
        touched = min(self.h, self.p * self.r) * min(self.w, self.q * self.s)
        pixels = self.h * self.w if self.kind == "backward_input" else touched
        elements = self.n * self.c * pixels + self.n * self.k * self.p * self.q
        return self.itemsize * (elements + self.k * self.c // self.groups * self.r * self.s)

    def __str__(self):
        """In short words: "forward 256x64x56x56, 64 filters 3x3, 16-bit"."""
        unusual = {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}
        text = f"{self.kind} {self.n}x{self.c}x{self.h}x{self.w}, {self.k} filters {self.r}x{self.s}"
        for name, value in unusual.items():
            if value not in (1, (1, 1)):
                text += f", {name} {value if isinstance(value, int) else 'x'.join(map(str, dict.fromkeys(value)))}"
        return f"{text}, {self.arithmetic}{'' if self.access == 'packed' else ', ' + self.access}" + (
            f"{', copied' if self.copied else ''}{', fused' if self.fused else ''}"
        )


def _outputs_inside(inputs, outputs, stride, pad, dil, tap):
    shift = tap * dil - pad  # output o reads o * stride + shift
    first = max(0, -(shift // stride))
    last = min(outputs - 1, (inputs - 1 - shift) // stride)
    return max(0, last + 1 - first)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A family of kernels and its tile.

    block_m, block_n, block_k are rows, columns and reduction of the tile's matrix product. Rows are output pixels or
    images, columns filters (forward) or channels. The gradient of the weight has filters as rows and channels as
    columns, in the family "images" the other way round.
    """

    family: str  # of FAMILIES
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    warps: int = 0
    stages: int = 0
    pack: int = 1  # groups that share one tile
    splits: int = 1  # backward_weight: programs that share a tile's pixels
    programs: int = 0  # images, forward and backward_input: persistent programs, multiprocessors times blocks on each

    def __str__(self):
        """In short words: "images 128x256x64, 8 warps, 3 stages"."""
        if self.family == "cudnn":
            return "cudnn"
        text = f"{self.family} {self.block_m}x{self.block_n}x{self.block_k}, {self.warps} warps, {self.stages} stages"
        text += f", {self.pack} groups a tile" if self.pack > 1 else ""
        return text + (f", {self.splits} splits" if self.splits > 1 else "")
