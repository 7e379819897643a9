"""What a network computes: its calls of torch functions, in order, with shapes, arguments and the flow of data.

The network runs once on the meta device, where tensors have shapes and no data: no memory is used, and any network
takes a fraction of a second. Calls are seen as the network's author wrote them (`F.relu(x, inplace=True)`, `x += y`,
`torch.cat`), not what they do inside.
"""

import copy
import functools
import inspect
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastcnn import backends

# what else torch calls these ops
OPS = {
    "iadd": "add",
    "radd": "add",
    "isub": "sub",
    "imul": "mul",
    "multiply": "mul",
    "rmul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "concat": "cat",
    "concatenate": "cat",
    "max_pool2d_with_indices": "max_pool2d",
}
# names of the positional arguments of the ops whose attributes are normalised: most are C++ functions without signature
SIGNATURES = {
    "conv1d": "input weight bias stride padding dilation groups",
    "conv2d": "input weight bias stride padding dilation groups",
    "conv3d": "input weight bias stride padding dilation groups",
    "conv_transpose2d": "input weight bias stride padding output_padding groups dilation",
    "linear": "input weight bias",
    "batch_norm": "input running_mean running_var weight bias training momentum eps",
    "max_pool2d": "input kernel_size stride padding dilation ceil_mode return_indices",
    "avg_pool2d": "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
    "adaptive_avg_pool2d": "input output_size",
    **dict.fromkeys(("avg_pool1d", "avg_pool3d"), "input kernel_size stride padding"),
    "fractional_max_pool2d": "input kernel_size",
    "dropout": "input p training inplace",
    "hardtanh": "input min_val max_val inplace",
    "leaky_relu": "input negative_slope inplace",
    "gelu": "input approximate",
    "cat": "tensors dim",
    "flatten": "input start_dim end_dim",
    **dict.fromkeys(("mean", "sum", "amax", "amin", "std", "var"), "input dim keepdim"),
    "getitem": "input index",
}


@dataclass(frozen=True)
class Call:
    """One call of a torch function.

    Attributes:
        name: unique; the module that is this call ("layer1.0.conv1"), or its module's name and the op ("layer1.0.add").
            A module called again appends "_1", "_2", ...
        op: torch's name of the function, without the marks of its in-place and operator forms.
        inputs: ids of the tensors it reads that depend on the network's inputs, in the order of its arguments. The
            network's inputs have ids 0, 1, ...; every result has a new one, in-place results too.
        outputs: ids of its results. After an in-place call, whoever reads the overwritten tensor, or another view of
            it, reads this id.
        input_shapes, output_shapes: their shapes, with the batch.
        attrs: arguments as plain values by name. Sizes of two dimensions are pairs; defaults of conv*, batch_norm,
            dropout and the pools are filled in; of getitem the index as a tuple, unless it has tensors; always there:
            inplace.
        parameters: name and shape of the parameters it reads; a shared one appears in every call that reads it.
    """

    name: str
    op: str
    inputs: tuple
    outputs: tuple
    input_shapes: tuple
    output_shapes: tuple
    attrs: dict
    parameters: dict

    @property
    def inplace(self):
        """Whether it overwrites one of its inputs."""
        return self.attrs["inplace"]


def trace(model, *inputs, training=True):
    """The calls of one forward pass.

    Args:
        model: any module. It is not touched: a copy without data runs.
        *inputs: a tensor (whose values do not matter) or the shape of one, e.g. (2, 3, 224, 224). Batch norm in
            training needs a batch of two where the image has shrunk to one pixel.
        training: whether the pass is one of training mode. In the other no branch is dropped and no auxiliary
            classifier runs.

    Returns:
        list of `Call`, in order.

    Raises:
        TypeError: model is no module.
        ValueError: the model's calls depend on values, which a trace does not have.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = _without_data(model).train(training)
    recorder = _Recorder(model)
    inputs = [(x if isinstance(x, torch.Tensor) else torch.empty(x, device="meta")).to("meta") for x in inputs]
    for x in inputs:
        recorder.new_value(x)
    ran = [(op, dict(op.calls)) for op in backends.OPS]
    try:
        # our own ops then call torch's functions, which the recorder sees
        with torch.no_grad(), backends.backend("torch"), backends.strict(False), recorder:
            model(*inputs)
    except (RuntimeError, TypeError) as error:
        if "meta" not in str(error).lower():
            raise
        where = f"its module {recorder.stack[-1].module}" if recorder.stack and recorder.stack[-1].module else "it"
        raise ValueError(f"cannot trace {type(model).__name__}: {where} reads values of a tensor ({error})") from error
    finally:
        # nothing ran, so `fastcnn.explain` shall not say so
        for op, calls in ran:
            op.calls = calls
    return recorder.calls()


def _without_data(model):
    """A deep copy in which every parameter and buffer is a meta tensor; the copy never holds the data."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    # those without dimensions mix with every device and keep their value: batch norm's counter may be read
    memo |= {id(b): b.to("meta") for b in model.buffers() if b.dim()}
    return copy.deepcopy(model, memo)


class _Frame:
    """One call of a module, while it lasts."""

    def __init__(self, module, is_leaf):
        self.module = module
        self.is_leaf = is_leaf
        self.calls = 0


class _Recorder(TorchFunctionMode):
    """Sees every call of a torch function in its context; calls inside those calls do not reach it."""

    def __init__(self, model):
        super().__init__()
        self.records = []  # (frame, Call without its name)
        self.stack = []  # frames of the modules that are running
        self.ids = {}  # id(tensor) -> id of the value that it holds now
        self.count = 0
        self.aliases = {}  # storage -> {id(tensor): tensor}; keeps every tensor alive, so that no id() comes twice
        self.twins = {}  # id(tensor) -> the tensor, its stand-in on the meta device
        self.state = {id(t) for t in (*model.parameters(), *model.buffers())}
        self.parameters = {id(p): {name: tuple(p.shape)} for name, p in model.named_parameters()}
        for name, module in model.named_modules():
            is_leaf = next(module.children(), None) is None
            module.register_forward_pre_hook(lambda *_, name=name, leaf=is_leaf: self._enter(name, leaf))
            module.register_forward_hook(lambda *_: self._leave())

    def _enter(self, name, is_leaf):
        self.stack.append(_Frame(name, is_leaf))

    def _leave(self):
        self.stack.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = self._on_meta(args, kwargs or {})
        # modules ask for shapes and dtypes much more often than they compute
        if getattr(func, "__name__", "") == "__get__" and not isinstance(asked := func(*args), torch.Tensor):
            return asked
        tensors = _tensors((args, kwargs))
        read = [t for t in tensors if id(t) in self.ids]
        # ids before the call: an in-place one gives its input a new id
        inputs, input_shapes = tuple(self.ids[id(t)] for t in read), tuple(tuple(t.shape) for t in read)
        versions = [t._version for t in tensors]
        result = func(*args, **kwargs)
        made = _tensors(result)
        mutated = [
            t for t, version in zip(tensors, versions, strict=True) if t._version != version and id(t) not in self.state
        ]
        parameters = {}
        for t in tensors:
            parameters |= self.parameters.get(id(t), {})
        for t in (*tensors, *made):
            self._alias(t)
        outputs = [t for t in made if not any(t is other for other in tensors)] + mutated
        op, attrs = _describe(func, args, kwargs) if read and outputs else ("", {})
        if not op or op.startswith("new_") or op.endswith("_like"):
            # a constant, perhaps computed from parameters; the same tensor again; or what takes a shape alone
            self.parameters |= {id(t): parameters for t in outputs if parameters}
            return result
        for t in outputs:
            self.new_value(t, overwrites=any(t is other for other in mutated))
        frame = self.stack[-1]
        frame.calls += 1
        attrs["inplace"] = any(t is other for t in mutated for other in read)
        ids, shapes = tuple(self.ids[id(t)] for t in outputs), tuple(tuple(t.shape) for t in outputs)
        self.records.append((frame, (op, inputs, ids, input_shapes, shapes, attrs, parameters)))
        return result

    def _on_meta(self, args, kwargs):
        # tensors that the model makes on the CPU (positions, masks) join the others once they meet them
        tensors = _tensors((args, kwargs))
        if not any(t.is_meta or id(t) in self.twins for t in tensors):
            return args, kwargs
        for t in tensors:
            if not t.is_meta and t.dim() and id(t) not in self.twins:
                self.twins[id(t)] = t, t.to("meta")
        return pytree.tree_map_only(torch.Tensor, lambda t: self.twins.get(id(t), (t, t))[1], (args, kwargs))

    def _alias(self, tensor):
        return self.aliases.setdefault(tensor.untyped_storage()._cdata, {}).setdefault(id(tensor), tensor)

    def new_value(self, tensor, overwrites=False):
        """A new id for what the tensor now holds; if it was overwritten, for all that share its memory, too."""
        self._alias(tensor)
        overwritten = self.aliases[tensor.untyped_storage()._cdata] if overwrites else ()
        self.ids |= dict.fromkeys([id(tensor), *overwritten], self.count)
        self.count += 1

    def calls(self):
        """The records, named."""
        calls, seen = [], Counter()
        for frame, fields in self.records:
            whole_module = frame.is_leaf and frame.calls == 1 and frame.module
            name = frame.module if whole_module else f"{frame.module}.{fields[0]}".lstrip(".")
            seen[name] += 1
            calls.append(Call(name if seen[name] == 1 else f"{name}_{seen[name] - 1}", *fields))
        return calls


def _tensors(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _describe(func, args, kwargs):
    """The op's name and its plain arguments."""
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        name = func.__self__.__name__  # a property of Tensor, such as T
    op = name.strip("_")
    op = OPS.get(op, op)
    if op in SIGNATURES:
        names = SIGNATURES[op].split()
    else:
        names = list(_signature(func))
    names += [f"arg{i}" for i in range(len(names), len(args))]
    given = dict(zip(names, args)) | kwargs  # noqa: B905 (names may be more)
    if op == "hardtanh" and (given.get("min_val"), given.get("max_val")) == (0, 6):
        return "relu6", {}
    return op, _NORMALISED[op](given) if op in _NORMALISED else _plain_items(given)


@functools.cache
def _signature(func):
    try:
        return tuple(inspect.signature(func).parameters)
    except (TypeError, ValueError):
        return ()


def _plain_items(given):
    return {name: _plain(value) for name, value in given.items() if _is_plain(value)}


def _is_plain(value):
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return isinstance(value, (bool, int, float, str))


def _plain(value):
    return tuple(_plain(v) for v in value) if isinstance(value, (tuple, list)) else value


def _sizes(value, rank=2):
    """An int or a sequence of one or `rank` ints as `rank` ints."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * rank if len(values) == 1 else values


def _conv(given):
    kernel = tuple(given["weight"].shape[2:])
    rank = len(kernel)
    attrs = {"kernel": kernel}
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = given.get(name, default)
        attrs[name] = value if isinstance(value, str) else _sizes(value, rank)
    if attrs["padding"] == "valid":
        attrs["padding"] = (0,) * rank
    elif attrs["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(attrs["dilation"], kernel, strict=True)]
        # an odd total pads the two sides differently, which no pair of numbers says
        attrs["padding"] = "same" if any(t % 2 for t in total) else tuple(t // 2 for t in total)
    if "output_padding" in given:
        attrs["output_padding"] = _sizes(given["output_padding"], rank)
    return attrs | {"groups": given.get("groups", 1), "bias": given.get("bias") is not None}


def _pool(given):
    kernel = _sizes(given["kernel_size"])
    stride = given.get("stride")
    attrs = {"kernel": kernel, "stride": kernel if stride is None or stride == [] else _sizes(stride)}
    return attrs | {"padding": _sizes(given.get("padding", 0)), "ceil_mode": given.get("ceil_mode", False)}


def _index(given):
    index = given["index"] if isinstance(given["index"], tuple) else (given["index"],)
    return {"index": index} if all(isinstance(i, (int, slice, type(None), type(...))) for i in index) else {}


def _adaptive_pool(given):
    sizes = zip(_sizes(given["output_size"]), given["input"].shape[-2:], strict=True)
    return {"output_size": tuple(size if wanted is None else wanted for wanted, size in sizes)}


_NORMALISED = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    "conv_transpose2d": lambda given: {"output_padding": (0, 0)} | _conv(given),
    "linear": lambda given: {"bias": given.get("bias") is not None},
    "batch_norm": lambda given: {
        "affine": given.get("weight") is not None,
        "training": given.get("training", False),
        "momentum": given.get("momentum", 0.1),
        "eps": given.get("eps", 1e-5),
    },
    "max_pool2d": lambda given: _pool(given) | {"dilation": _sizes(given.get("dilation", 1))},
    "avg_pool2d": lambda given: (
        _pool(given)
        | {"count_include_pad": given.get("count_include_pad", True), "divisor": given.get("divisor_override") or 0}
    ),
    "adaptive_avg_pool2d": _adaptive_pool,
    "dropout": lambda given: {"p": given.get("p", 0.5)},
    "getitem": _index,
}
