"""Receptive fields: which pixels of the image the values of a network can depend on.

Position i along an axis of a tensor sees the pixels from first + i * jump to last + i * jump of that axis of the image;
the padding around the image counts as pixels. A convolution or pool of K taps, stride S, padding P and dilation D gives

    first - jump * P,   last + jump * (D * (K - 1) - P),   jump * S

and where branches meet, a position sees what it sees through any of them (Araujo et al.: Computing receptive fields of
convolutional neural networks, 2019). Where positions are merged (flattened, averaged) or an op moves them in an unknown
way, the field is that of all of them together: too large, if it is not exact, and never too small. Statistics of norms
over the image are left out of it, as is usual; gates of squeeze-and-excite are not.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

# ops whose every output can depend on every position
GLOBAL = (
    *("matmul", "rmatmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention", "multi_head_attention_forward"),
    *("roll", "flip", "grid_sample", "fft2", "cumsum"),
)
REDUCTIONS = ("mean", "sum", "amax", "amin", "std", "var")
RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")


@dataclass(frozen=True)
class Field:
    """What the positions along one axis of a tensor see of the same axis of the image.

    Attributes:
        first, last: pixels that position 0 sees; below 0 lies padding.
        jump: pixels from one position to the next; 0 if all see the same.
        dim: dimension of the tensor that has the positions; None if they are merged.
    """

    first: Fraction | float
    last: Fraction | float
    jump: Fraction | int = 1
    dim: int | None = None

    @property
    def size(self):
        """Pixels that one position sees; math.inf if any."""
        width = self.last - self.first + 1
        return math.inf if math.isinf(width) else math.ceil(width)

    def over(self, positions, dim=None):
        """What all positions see together."""
        return Field(self.first, self.last + self.jump * (positions - 1), 0, dim)

    def sees_all(self, pixels):
        """Whether every position sees the whole axis of an image of so many pixels."""
        return self.jump == 0 and self.first <= 0 and self.last >= pixels - 1


WHOLE = Field(-math.inf, math.inf, 0)


def fields(calls, *shapes):
    """The receptive fields of all values of a trace.

    Args:
        calls: of `trace`.
        *shapes: of the network's inputs, [N, C, ...]; those of the first two dimensions alone have no field.

    Returns:
        dict: id of a value -> a `Field` per axis of the image.
    """
    found = {
        value: tuple(Field(Fraction(0), Fraction(0), 1, dim) for dim in range(2, len(shape)))
        for value, shape in enumerate(shapes)
    }
    for call in calls:
        read = [(found[v], shape) for v, shape in zip(call.inputs, call.input_shapes, strict=True)]
        for value, shape in zip(call.outputs, call.output_shapes, strict=True):
            found[value] = _after(call, read, shape)
    return found


def _after(call, read, shape):
    """The fields of an output of this shape."""
    op, attrs = call.op, call.attrs
    own, before = read[0]
    if op in GLOBAL:
        return tuple(replace(WHOLE, dim=f.dim) for f in own)
    if op == "linear":
        return tuple(replace(WHOLE, dim=f.dim) if f.dim == len(before) - 1 else f for f in own)
    if op == "fractional_max_pool2d":
        kernel = attrs.get("kernel_size", 1)
        kernel = kernel if isinstance(kernel, tuple) else (kernel,) * len(own)
        return _on_axes(own, before, shape, lambda f, i: _fractional(f, before[f.dim], shape[f.dim], kernel[i]))
    if "kernel" in attrs or "kernel_size" in attrs:
        return _on_axes(own, before, shape, lambda f, axis: _window(call, f, axis))
    if op.startswith("adaptive_"):
        return _on_axes(own, before, shape, lambda f, axis: _adaptive(f, before[f.dim], shape[f.dim]))
    if op in ("interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle"):
        return _on_axes(own, before, shape, lambda f, axis: _resized(call, f, before[f.dim], shape[f.dim]))
    if op == "pad":
        return tuple(_padded(f, attrs["pad"], len(before)) for f in own)
    if op in ("permute", "transpose", "swapaxes", "T", "mT"):
        order = _order(op, attrs, len(before))
        return tuple(f if f.dim is None else replace(f, dim=order.index(f.dim)) for f in own)
    if op == "getitem" and "index" in attrs:
        return _indexed(own, attrs["index"], before)
    if op in RESHAPES:
        return tuple(_reshaped(f, before, shape) for f in own)
    if op in REDUCTIONS:
        return tuple(_reduced(f, attrs, before) for f in own)
    return _joined(read, shape, op == "cat")


def _on_axes(own, before, shape, change):
    # ops that take the last dimensions as the image's axes
    axes = range(len(before) - len(own), len(before))
    if [f.dim for f in own] == list(axes) and len(before) == len(shape):
        return tuple(change(f, axis) for axis, f in enumerate(own))
    return tuple(f if f.dim is None else WHOLE for f in own)


def _window(call, field, axis):
    attrs = call.attrs

    def at(name, default):
        value = attrs.get(name, default)
        return (value * (axis + 1))[axis] if isinstance(value, tuple) else value

    kernel = at("kernel", at("kernel_size", 1))
    stride, reach = at("stride", kernel), at("dilation", 1) * (kernel - 1)
    # an odd total of "same" has one more on the right
    before = reach // 2 if attrs.get("padding") == "same" else at("padding", 0)
    if call.op.startswith("conv_transpose"):
        return _spread(field, Fraction(before - reach, stride), Fraction(before, stride), Fraction(1, stride))
    return _spread(field, -before, reach - before, stride)


def _adaptive(field, size, wanted):
    # window i is from i * size / wanted, rounded down, to (i + 1) * size / wanted, rounded up
    ratio = Fraction(size, wanted)
    part = Fraction(1, ratio.denominator)
    return _spread(field, part - 1, ratio - part, ratio)


def _resized(call, field, size, wanted):
    ratio, mode = Fraction(size, wanted), call.attrs.get("mode", "nearest")
    if call.op == "pixel_unshuffle":
        return _spread(field, 0, ratio - 1, ratio)
    if mode == "area":
        return _adaptive(field, size, wanted)
    if mode.startswith("nearest") or call.op == "pixel_shuffle":
        return _spread(field, Fraction(1, ratio.denominator) - 1, 0, ratio)
    reach, centre = (2 if mode == "bicubic" else 1), (ratio - 1) / 2
    if call.attrs.get("align_corners"):
        ratio, centre = Fraction(size - 1, max(wanted - 1, 1)), 0
    return _spread(field, centre - reach, centre + reach, ratio)


def _fractional(field, size, wanted, kernel):
    # windows lie where chance has them, about (size - kernel) / (wanted - 1) apart
    return _spread(field, -1, kernel, Fraction(size - kernel, max(wanted - 1, 1)))


def _spread(field, left, right, step):
    """Position i reads positions i * step + left to i * step + right."""
    jump = field.jump
    return Field(field.first + jump * left, field.last + jump * right, jump * step, field.dim)


def _padded(field, pad, rank):
    # pairs from the last dimension on
    place = None if field.dim is None else 2 * (rank - 1 - field.dim)
    if place is None or place >= len(pad):
        return field
    moved = field.jump * pad[place]
    return replace(field, first=field.first - moved, last=field.last - moved)


def _order(op, attrs, rank):
    """Where each dimension of the output comes from."""
    order = list(range(rank))
    if op in ("T", "mT"):
        return order[::-1] if op == "T" else [*order[:-2], rank - 1, rank - 2]
    given = [value for name, value in attrs.items() if name != "inplace"]
    given = list(given[0]) if isinstance(given[0], tuple) else given
    given = [dim % rank for dim in given]
    if op == "permute":
        return given
    a, b = given
    order[a], order[b] = b, a
    return order


def _indexed(own, index, shape):
    rest = len(shape) - sum(isinstance(i, (int, slice)) for i in index)
    full = []
    for i in index if ... in index else (*index, ...):
        full += [slice(None)] * rest if i is ... else [i]
    places, dim, place = {}, 0, 0  # dimension -> its index, its place in the output
    for i in full:
        if i is not None:
            places[dim] = i, place
            dim += 1
        place += not isinstance(i, int)
    return tuple(f if f.dim is None else _sliced(f, *places[f.dim], shape[f.dim]) for f in own)


def _sliced(field, index, place, size):
    if isinstance(index, slice):
        start, _, step = index.indices(size)
        moved = field.jump * start
        return Field(field.first + moved, field.last + moved, field.jump * step, place)
    moved = field.jump * (index % size)
    return Field(field.first + moved, field.last + moved, 0)


def _reshaped(field, before, shape):
    if field.dim is None:
        return field
    size, inner = before[field.dim], math.prod(before[field.dim + 1 :])
    for dim, wanted in enumerate(shape):
        # the positions, or the blocks of them that the dimension is split into
        block = size // wanted if wanted > 1 else 0
        if block * wanted == size > 1 and math.prod(shape[dim + 1 :]) == inner * block:
            return _spread(replace(field, dim=dim), 0, block - 1, block)
    same = len(before) == len(shape) and before[field.dim :] == shape[field.dim :]
    return field if same else field.over(size)


def _reduced(field, attrs, before):
    dims = attrs.get("dim")
    dims = (
        range(len(before)) if dims is None else [d % len(before) for d in ((dims,) if isinstance(dims, int) else dims)]
    )
    if field.dim is None:
        return field
    if field.dim in dims:
        return field.over(before[field.dim], field.dim if attrs.get("keepdim") else None)
    return field if attrs.get("keepdim") else replace(field, dim=field.dim - sum(d < field.dim for d in dims))


def _joined(read, shape, cat):
    """Where tensors meet, by broadcasting or side by side; also a part of one tensor, and what is done in place."""
    if not any(own for own, _ in read):
        return ()
    return tuple(_union(parts, shape, cat) for parts in zip(*(_aligned(own, s, shape) for own, s in read if own)))  # noqa: B905


def _aligned(own, before, shape):
    # (field, positions that it has, its dimension of the output)
    shift = len(shape) - len(before)
    for f in own:
        dim = None if f.dim is None or f.dim + shift < 0 else f.dim + shift
        yield f, 1 if f.dim is None else before[f.dim], dim


def _union(parts, shape, cat):
    dims = {dim for _, _, dim in parts if dim is not None}
    if len(dims) > 1:
        return WHOLE
    dim = dims.pop() if dims else None
    positions = 1 if dim is None else shape[dim]
    moved = []
    for field, count, own_dim in parts:
        if own_dim is None or positions == 1:
            field = field.over(count)
        elif cat and count != positions:
            return replace(WHOLE, dim=dim)
        elif count > positions:
            # one of the parts of a split tensor: it may lie anywhere
            field = replace(field, last=field.last + field.jump * (count - positions))
        elif count < positions:
            field = replace(field, jump=0) if count == 1 else WHOLE
        moved.append(field)
    if len({field.jump for field in moved}) > 1:
        moved = [field.over(positions) for field in moved]
    return Field(min(f.first for f in moved), max(f.last for f in moved), moved[0].jump, dim)
