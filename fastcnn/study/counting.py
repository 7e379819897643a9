"""The table that the lectures draw of a network: output, memory, parameters, multiply-adds, receptive field by layer.

    print(fastcnn.study.summary(model, image_size=224))        fastcnn study summary vgg16

The network runs once on the meta device, in eval mode, so that every branch and no auxiliary classifier is counted.

A row is a convolution, a linear layer, a pool, a join (sum, product, concatenation) or what else makes a tensor that
must exist. Norms, activations and other ops on every number of one tensor belong to the row before them, as in the
lectures' tables: they could write over what they read. So the memory is the same however a network is written.
Multiply-adds are those of convolutions, linear layers and matrix products; `Summary.uncounted` names the other ops.
"""

import csv
import io
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fastcnn.study import ledger
from fastcnn.study.receptive import fields
from fastcnn.study.trace import trace

BYTES = 4  # of a number in fp32
MATRIX_PRODUCTS = ("matmul", "rmatmul", "bmm")
COUNTED = (*ledger.CONVS, "linear", *MATRIX_PRODUCTS, "einsum", "scaled_dot_product_attention")
# besides those of the ledger
VIEWS = {*ledger.VIEWS, "swapaxes", "T", "mT", "narrow", "select", "expand_as", "view_as", "reshape_as", "tensor_split"}
SHORT = {
    **{"conv2d": "conv", "max_pool2d": "max pool", "avg_pool2d": "avg pool", "conv_transpose2d": "transposed conv"},
    **{"adaptive_avg_pool2d": "avg pool", "adaptive_max_pool2d": "max pool"},
}


@dataclass(frozen=True)
class Row:
    """A layer, with the norms and activations after it, or several layers added up.

    Attributes:
        name: of the module, or of the module and the op in it.
        kind: the op, its window and its channels: "conv 3x3/2, 64".
        output: shape without the batch; images as [H, W, C].
        activations: numbers in the output.
        weights: numbers in the weights of convolutions and linear layers.
        parameters: all of them, biases and norms too; a shared one counts where it is read first.
        macs: multiply-adds.
        field: height and width of the receptive field in pixels, None for the whole image.
        jump: pixels from one position to the next; 0 where there is one position.
    """

    name: str
    kind: str
    output: tuple
    activations: int
    weights: int = 0
    parameters: int = 0
    macs: int = 0
    field: tuple | None = (1, 1)
    jump: tuple = (1, 1)


@dataclass(frozen=True)
class Summary:
    """The rows of a network and what they add up to, for one image.

    Attributes:
        title: the network and its input.
        rows: list of `Row`; the first is the input.
        parameters: of the whole model, whether the pass reads them or not.
        batch: images, for the last line of the table.
        uncounted: {op: calls} of the ops without multiply-adds.
    """

    title: str
    rows: list
    parameters: int
    batch: int
    uncounted: dict

    @property
    def macs(self):
        """Multiply-adds."""
        return sum(row.macs for row in self.rows)

    @property
    def activations(self):
        """Numbers in all outputs and the input: forward. With backward twice as many."""
        return sum(row.activations for row in self.rows)

    @property
    def weights(self):
        """Numbers in the weights of convolutions and linear layers."""
        return sum(row.weights for row in self.rows)

    @property
    def unread(self):
        """Parameters that the pass does not read, such as those of auxiliary classifiers."""
        return self.parameters - sum(row.parameters for row in self.rows)

    def by_depth(self, depth):
        """The same with one row for all layers whose names begin with the same `depth` parts.

        Raises:
            ValueError: depth is no positive int.
        """
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
            raise ValueError(f"depth must be a positive int, got {depth!r}")
        groups = [[self.rows[0]]]
        for row in self.rows[1:]:
            if groups[-1] is not groups[0] and _head(row.name, depth) == _head(groups[-1][0].name, depth):
                groups[-1].append(row)
            else:
                groups.append([row])
        return replace(self, rows=[_merged(group, depth) for group in groups])

    def __str__(self):
        head = ["layer", "kind", "output", "memory", "MB", "parameters", "multiply-adds", "receptive field", "jump"]
        table = [head, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [self.title, ""]
        for cells in table:
            padded = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
            lines.append("  ".join(padded).rstrip())
        return "\n".join([*lines, "", *self._totals()])

    def _totals(self):
        unread = f"; {self.unread:,} of them not read in this pass" if self.unread else ""
        yield f"parameters      {self.parameters:,}, {_mb(self.parameters)} MB{unread}"
        yield f"weights         {self.weights:,}, without biases and norms"
        yield f"multiply-adds   {self.macs:,}"
        if self.uncounted:
            yield f"  not of        {', '.join(f'{op} ({calls})' for op, calls in self.uncounted.items())}"
        for images in sorted({1, self.batch}):
            forward = images * self.activations
            of = "an image" if images == 1 else f"{images} images"
            both = f"{_mb(forward)} MB forward, {_mb(2 * forward)} MB with backward"
            yield f"memory          {forward:,} numbers of {of}: {both}"

    def csv(self):
        """The rows as CSV."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row.__dataclass_fields__)
        for row in self.rows:
            writer.writerow([_joined(value) for value in asdict(row).values()])
        return file.getvalue()

    def json(self):
        """Rows and totals as JSON."""
        totals = {n: getattr(self, n) for n in ("parameters", "weights", "macs", "activations", "unread", "uncounted")}
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"title": self.title, "batch": self.batch, **totals, "rows": rows}, indent=1) + "\n"


def summary(model, input_shape=None, image_size=None, batch=1, name=None):
    """Count a network, layer by layer.

    Args:
        model: any module that takes images; it is not run and not changed.
        input_shape: of one image, [C, H, W].
        image_size: instead of it height and width of RGB images.
        batch: images, for the memory of a batch.
        name: for the title; default: the class.

    Returns:
        Summary.

    Raises:
        TypeError: model is no module.
        ValueError: no size or two, or a model that cannot be traced.
    """
    if (input_shape is None) == (image_size is None):
        raise ValueError(f"give either input_shape or image_size, got {input_shape!r} and {image_size!r}")
    shape = tuple(input_shape) if image_size is None else (3, image_size, image_size)
    for what, value in (("input_shape", shape), ("batch", (batch,))):
        if not value or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in value):
            raise ValueError(f"{what} must be positive ints, got {value if what == 'input_shape' else batch!r}")
    calls = trace(model, (1, *shape), training=False)
    rows = _Rows(calls, shape)
    uncounted = Counter(call.op for call in calls if call.op not in COUNTED and call.op not in VIEWS)
    title = f"{name or type(model).__name__}, input {_joined(_output((1, *shape), rows.seen[0]))}"
    parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    return Summary(title, rows.made, parameters, batch, dict(uncounted.most_common()))


def command(name, image_size=None, in_chans=None, num_classes=None, batch=1, depth=None, csv=None, json=None):
    """`fastcnn study summary NAME`: print the table; write it to files, too.

    Args:
        name: a network, as `networks.build` knows it.
        image_size: height and width; default: those of its paper.
        in_chans, num_classes: default: the network's own.
        batch: images, for the memory of a batch.
        depth: rows for modules of so many parts of the name instead of layers.
        csv, json: files; None: not written.
    """
    from fastcnn.benchmarks import networks

    channels, *size = networks.input_shape(name)
    size = size if image_size is None else (image_size, image_size)
    model = networks.build_on_meta(name, num_classes, in_chans)
    found = summary(model, (in_chans or channels, *size), batch=batch, name=name)
    found = found if depth is None else found.by_depth(depth)
    print(found)
    for path, text in ((csv, found.csv), (json, found.json)):
        if path is not None:
            Path(path).write_text(text())


class _Rows:
    """Goes through the calls and makes rows of them."""

    def __init__(self, calls, shape):
        self.image = shape[1:]
        self.seen = fields(calls, (1, *shape))
        self.counted = set()  # names of parameters
        whole = {}  # value -> value of which it is a view
        readers = Counter()
        for call in calls:
            read = {whole.get(v, v) for v in call.inputs}
            if call.op in VIEWS:
                whole |= dict.fromkeys(call.outputs, next(iter(read)))
            else:
                readers.update(read)
        sight = self._sight(0, (1, *shape))
        self.made = [Row("input", "", _output((1, *shape), self.seen[0]), math.prod(shape), **sight)]
        row_of = {0: 0}  # value -> the row that makes it, if it can be overwritten
        for call in calls:
            if call.op in VIEWS:
                continue
            read = {whole.get(v, v) for v in call.inputs}
            value = next(iter(read))
            if len(read) == 1 and readers[value] == 1 and value in row_of and _is_elementwise(call):
                row_of[call.outputs[0]] = row_of[value]
                self._extend(row_of[value], call)
            else:
                row_of[call.outputs[0]] = len(self.made)
                self.made.append(self._row(call))

    def _row(self, call):
        shape, seen = call.output_shapes[0], self.seen[call.outputs[0]]
        new = self._new_parameters(call)
        layer = call.op in ledger.CONVS or call.op == "linear"
        return Row(
            call.name,
            _kind(call),
            _output(shape, seen),
            math.prod(shape),
            sum(math.prod(s) for s in new if len(s) > 1) if layer else 0,
            sum(map(math.prod, new)),
            multiply_adds(call),
            **self._sight(call.outputs[0], shape),
        )

    def _extend(self, place, call):
        row = self.made[place]
        kind = ", ".join(part for part in (row.kind, call.op) if part)
        parameters = row.parameters + sum(map(math.prod, self._new_parameters(call)))
        self.made[place] = replace(row, kind=kind, parameters=parameters)

    def _new_parameters(self, call):
        new = {name: shape for name, shape in call.parameters.items() if name not in self.counted}
        self.counted |= new.keys()
        return list(new.values())

    def _sight(self, value, shape):
        seen = self.seen[value]
        positions = [1 if f.dim is None else shape[f.dim] for f in seen]
        merged = [f.over(n) if n == 1 else f for f, n in zip(seen, positions, strict=True)]
        whole = [f.sees_all(n) or math.isinf(f.size) for f, n in zip(merged, self.image, strict=True)]
        if all(whole):
            return {"field": None, "jump": tuple(0 for _ in seen)}
        sizes = tuple(n if all_ else f.size for f, n, all_ in zip(merged, self.image, whole, strict=True))
        return {"field": sizes, "jump": tuple(_number(f.jump) for f in merged)}


def multiply_adds(call):
    """Multiply-adds of a call of `trace`; 0 of what is no convolution, linear layer or matrix product."""
    before, after = call.input_shapes[0], call.output_shapes[0]
    if call.op in ledger.CONVS:
        pixels, channels = (before, after[1]) if call.op == "conv_transpose2d" else (after, before[1])
        return math.prod(pixels) * channels // call.attrs["groups"] * math.prod(call.attrs["kernel"])
    if call.op == "linear":
        return math.prod(after) * before[-1]
    if call.op in MATRIX_PRODUCTS:
        # with a constant matrix on one side: on the right if the rows are still there
        on_right = len(call.inputs) > 1 or before[:-1] == after[:-1]
        return math.prod(after) * before[-1 if on_right else -2]
    if call.op == "scaled_dot_product_attention":
        query, key, value = call.input_shapes[:3]
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if call.op == "einsum":
        terms = call.attrs["args"].replace(" ", "").partition("->")[0].split(",")
        if len(terms) == len(call.input_shapes) and "." not in call.attrs["args"]:
            sizes = {}
            for term, shape in zip(terms, call.input_shapes, strict=True):
                sizes |= dict(zip(term, shape, strict=True))
            return math.prod(sizes.values())
    return 0


def _is_elementwise(call):
    if call.op in COUNTED or "kernel" in call.attrs or "kernel_size" in call.attrs:
        return False
    # adaptive pools of windows of one pixel do nothing
    return math.prod(call.output_shapes[0]) == math.prod(call.input_shapes[0])


def _kind(call):
    op, attrs = SHORT.get(call.op, call.op), call.attrs
    text = op
    kernel = attrs.get("kernel", attrs.get("kernel_size"))
    if kernel is not None:
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        text += f" {_joined(kernel)}"
        stride = attrs.get("stride", kernel)
        stride = stride if isinstance(stride, tuple) else (stride,) * len(kernel)
        if any(s != 1 for s in stride):
            text += f"/{_joined(stride) if len(set(stride)) > 1 else stride[0]}"
        if any(d != 1 for d in attrs.get("dilation", ()) if isinstance(attrs["dilation"], tuple)):
            text += f" dilated {_joined(attrs['dilation'])}"
    if call.op in ledger.CONVS:
        channels = call.output_shapes[0][1]
        if call.op == "conv2d" and attrs["groups"] == call.input_shapes[0][1] > 1:
            return text.replace("conv", "depthwise") + f", {channels}"
        return text + f", {channels}" + (f" in {attrs['groups']} groups" if attrs["groups"] > 1 else "")
    if call.op.startswith("adaptive_"):
        return f"{text} to {_joined(call.output_shapes[0][2:])}"
    return f"{text}, {call.output_shapes[0][-1]}" if call.op == "linear" else text


def _output(shape, seen):
    # images in the lectures' order
    if len(shape) > 2 and [f.dim for f in seen] == list(range(2, len(shape))):
        return (*shape[2:], shape[1])
    return tuple(shape[1:]) or (1,)


def _cells(row):
    field = "whole image" if row.field is None else _square(row.field)
    counts = [f"{n:,}" if n else "" for n in (row.parameters, row.macs)]
    jump = _square(row.jump) if any(row.jump) else ""
    return [row.name, row.kind, _joined(row.output), f"{row.activations:,}", _mb(row.activations), *counts, field, jump]


def _square(pair):
    return f"{pair[0]:g}" if len(set(pair)) == 1 else _joined(f"{n:g}" for n in pair)


def _joined(value):
    return value if isinstance(value, (str, int)) or value is None else "x".join(map(str, value))


def _mb(numbers):
    megabytes = BYTES * numbers / 1e6
    return f"{megabytes:,.1f}" if megabytes >= 10 else f"{megabytes:.3f}"


def _number(value):
    return int(value) if value == int(value) else float(value)


def _head(name, depth):
    return name.split(".")[:depth]


def _merged(rows, depth):
    if len(rows) == 1:
        return rows[0]
    sums = {n: sum(getattr(row, n) for row in rows) for n in ("activations", "weights", "parameters", "macs")}
    return replace(rows[-1], name=".".join(_head(rows[0].name, depth)), kind=f"{len(rows)} layers", **sums)
