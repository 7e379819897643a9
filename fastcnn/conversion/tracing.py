"""Symbolic tracing that refuses what it cannot prove: torch.fx records a forward once; what Python did then is fixed.

torch.fx alone drops silently: writes to attributes and globals, `with torch.no_grad()`, random numbers, an `isinstance`
of a value, `x += y` (recorded as x + y), hooks of inner modules. Each of these raises `Untraceable` here, naming the
module. Two traces must agree. What a trace has read and may change later (attributes of modules, globals) is `Watched`.
"""

import builtins
import inspect
import operator
import sys
import threading
from collections import OrderedDict

import torch
import torch.fx
from torch.fx.proxy import Attribute

from fastcnn.conversion.surroundings import Calls, Generators, Untraceable, ambient_state, read_by
from fastcnn.conversion.watched import SIMPLE, Watched, has_hooks, put_back
from fastcnn.nn.blocks import Block

# modules of other libraries that are one step of a graph, by class name and the start of the module path: their
# forwards count batches in a buffer, draw random numbers or ask for the size of the image. None writes to its input
LEAVES = {
    "BatchNormAct2d": "timm.",
    "SyncBatchNormAct": "timm.",
    "FrozenBatchNormAct2d": "timm.",
    "DropPath": "timm.",
    "Conv2dSame": "timm.",
    "FrozenBatchNorm2d": "torchvision.",
}
TENSOR_NAMES = frozenset(dir(torch.Tensor))
INPLACE = [name for name in dir(operator) if name.startswith("__i") and hasattr(operator, name.strip("_"))]
INPLACE = [name for name in INPLACE if name not in ("__index__", "__inv__", "__invert__")]
# of these a graph knows that they return one tensor, so isinstance has an answer
TENSOR_MODULES = (
    torch.nn.modules.conv._ConvNd, torch.nn.modules.batchnorm._NormBase, torch.nn.Linear, torch.nn.Identity,
    torch.nn.modules.dropout._DropoutNd, torch.nn.ReLU, torch.nn.Hardtanh, torch.nn.SiLU, torch.nn.GELU,
    torch.nn.Sigmoid, torch.nn.Tanh, torch.nn.Hardswish, torch.nn.Hardsigmoid, torch.nn.LeakyReLU, torch.nn.Flatten,
    torch.nn.modules.pooling._AvgPoolNd, torch.nn.modules.pooling._AdaptiveAvgPoolNd,
)  # fmt: skip
TENSOR_FUNCTIONS = {torch.cat, torch.relu, torch.sigmoid, torch.tanh, torch.flatten, torch.nn.functional.relu}
SOME_TENSOR = torch.empty(0)
ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.imul}


def is_others_layer(module):
    """Whether the module is one of the layers of other libraries that are one step of a graph."""
    cls = type(module)
    return cls.__name__ in LEAVES and cls.__module__.startswith(LEAVES[cls.__name__])


def is_known_leaf(module):
    """Whether the module is one step of a graph by its class."""
    if is_others_layer(module) or isinstance(module, Block):
        return True
    if isinstance(module, (torch.nn.Sequential, torch.fx.GraphModule)):
        return False
    return type(module).__module__.startswith(("torch.", "fastcnn.nn."))


def _asked_by_tracing():
    # whether the frame two above is torch.fx itself, which has to see proxies
    asker = sys._getframe(2).f_globals.get("__name__", "")
    return asker.startswith(("torch.fx", "torch.utils._pytree", "torch.overrides"))


class _Checked:
    # what a proxy of torch.fx lets through silently
    @property
    def __class__(self):
        if _asked_by_tracing():
            return type(self)
        # C code that is told torch.Tensor goes on to read the tensor's memory: only Python's isinstance gets an answer
        self.tracer.refuse("looks inside of a value (as an autograd or scripted function and torch.tensor do)")

    def __getattr__(self, name):
        if name.startswith("__") or name not in TENSOR_NAMES:
            raise AttributeError(name)
        return _AttributeProxy(self, name)

    def __setattr__(self, name, value):
        if name not in ("tracer", "node", "root", "attr", "_node"):
            self.tracer.refuse(f"sets .{name} of a tensor")
        super().__setattr__(name, value)

    def __setitem__(self, index, value):
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _inplace(name):
    target = getattr(operator, name.strip("_"))
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _name in INPLACE:
    setattr(_Checked, _name, _inplace(_name))


class _Proxy(_Checked, torch.fx.Proxy):
    pass


class _Instances:
    """Inside the block, isinstance says of a proxy what it will say of the tensor."""

    def __enter__(self):
        self.original = original = builtins.isinstance

        def isinstance_of_values(value, kinds):
            if type(value) not in (_Proxy, _AttributeProxy) or _asked_by_tracing():
                return original(value, kinds)
            if not value.node.meta.get("tensor"):
                value.tracer.refuse("asks the type of a value that is not known before it runs")
            return original(SOME_TENSOR, kinds)

        builtins.isinstance = isinstance_of_values

    def __exit__(self, *exc_info):
        builtins.isinstance = self.original


class _AttributeProxy(_Checked, Attribute):
    pass


class Tracer(torch.fx.Tracer):
    """Records one call of a module's forward as a graph.

    Args:
        forward: the module's own forward, a function of self and the arguments.
        opaque: names of inner modules to call as they are.
    """

    proxy_buffer_attributes = True

    def __init__(self, forward, opaque):
        super().__init__()
        self.forward = forward
        self.opaque = opaque
        self.stack = [""]
        self.visited = {}
        self.refusal = None
        self.state = None
        self.thread = threading.get_ident()

    def record(self, module, arguments):
        """The graph of forward(module, *args, **kwargs), where `arguments` = (args, kwargs) has a placeholder for
        every tensor, and the modules it ran through: {module: name}."""
        self.arguments = arguments
        self.state = ambient_state()
        graph = self.trace(module)
        if self.refusal is not None:  # raised, and swallowed by a try of the forward
            raise self.refusal
        return graph

    def refuse(self, reason):
        self.refusal = Untraceable(reason, self.stack[-1])
        raise self.refusal

    def create_args_for_root(self, function, is_module, concrete_args=None):
        counter = iter(range(sys.maxsize))

        def placeholder(leaf):
            if not isinstance(leaf, torch.Tensor):
                return leaf
            proxy = self.create_proxy("placeholder", f"input_{next(counter)}", (), {})
            proxy.node.meta["tensor"] = True
            return proxy

        args, kwargs = _map_containers(placeholder, self.arguments)
        before = _map_containers(lambda leaf: leaf, (args, kwargs))

        def forward():
            self.visited[self.root] = ""
            result = self.forward(self.root, *args, **kwargs)
            if not _same(before, (args, kwargs)):
                self.refuse("changes a list or dict that it was given")
            return self.returned(result)

        return forward, ()

    def returned(self, value):
        """What a forward returns; torch.fx would rebuild containers as plain ones."""
        if type(value) in (_Proxy, _AttributeProxy) or value is None or isinstance(value, SIMPLE):
            return value
        if type(value) in (tuple, list):
            return type(value)(map(self.returned, value))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.returned, value))
        if type(value) is dict:
            return {key: self.returned(item) for key, item in value.items()}
        if type(value) is OrderedDict:
            pairs = [(key, self.returned(item)) for key, item in value.items()]
            return self.create_proxy("call_function", OrderedDict, (pairs,), {})
        self.refuse(f"returns a {type(value).__name__}")

    def proxy(self, node):
        return _Proxy(node, self)

    def create_arg(self, a):
        kind = type(a)
        if kind in (_Proxy, _AttributeProxy):
            return a.node
        if isinstance(a, torch.Tensor):
            self.refuse_unless_attribute(a)
        if isinstance(a, (list, dict)) and kind not in (list, dict):
            self.refuse(f"passes a {kind.__name__}")
        return super().create_arg(a)

    def refuse_unless_attribute(self, tensor):
        owned = any(tensor is t for t in (*self.root.parameters(), *self.root.buffers()))
        if not owned and tensor not in self.tensor_attrs:
            self.refuse("makes a constant tensor")

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None):
        if kind != "output" and ambient_state() != self.state:
            self.refuse("switches gradients, autocast or another mode inside")
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["tensor"] = self.returns_tensor(node)
        node.meta["module"] = self.stack[-1]
        return node

    def returns_tensor(self, node):
        if node.op == "call_module":
            return isinstance(self.root.get_submodule(node.target), TENSOR_MODULES)
        if node.op == "call_function" and node.target in TENSOR_FUNCTIONS:
            return True
        if node.op == "call_function" and node.target in ARITHMETIC:
            return any(n.meta.get("tensor") for n in node.all_input_nodes)
        return False

    def is_leaf_module(self, module, name):
        return name in self.opaque or has_hooks(module) or is_known_leaf(module)

    def call_module(self, module, forward, args, kwargs):
        if threading.get_ident() != self.thread:  # torch.fx patches the call of modules for every thread
            return forward(*args, **kwargs)
        name = self.submodule_paths.get(module)
        if name is None:
            self.refuse(f"calls a {type(module).__name__} that is not registered as a submodule")
        if not self.is_leaf_module(module, name):
            self.visited[module] = name
            self.stack.append(name)
            generator = torch.get_rng_state()
            result = forward(*args, **kwargs)
            if not torch.equal(generator, torch.get_rng_state()):
                self.refuse("draws random numbers")
            self.stack.pop()  # not after an error: the innermost module is its place
            return result
        return super().call_module(module, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj):
        self.refuse("its control flow depends on a tensor or a size")

    def iter(self, obj):
        self.refuse("iterates over a tensor or a size")


def _map_containers(function, value):
    if type(value) in (tuple, list):
        return type(value)(_map_containers(function, item) for item in value)
    if type(value) is dict:
        return {key: _map_containers(function, item) for key, item in value.items()}
    return function(value)


def _same(a, b):
    if type(a) in (tuple, list) and type(a) is type(b):
        return len(a) == len(b) and all(map(_same, a, b))
    if type(a) is dict and type(b) is dict:
        return list(a) == list(b) and all(map(_same, a.values(), b.values()))
    return a is b


def trace(module, forward, arguments, opaque):
    """The graph of one call, proven to be what the call does.

    Args:
        module: whose forward is recorded.
        forward: the forward of its class, a function of self and the arguments.
        arguments: (args, kwargs) of the call; tensors become placeholders, the rest stays.
        opaque: names of inner modules to call as they are.

    Returns:
        (graph, {module: name} that the trace ran through, [(namespace, name)] of the globals it read)

    Raises:
        Untraceable: with the reason and the name of the innermost module.
    """
    before = Watched(module.modules())
    versions = {t: t._version for t in (*module.parameters(), *module.buffers())}
    generators = Generators()
    graphs = []
    read = after = None
    for _ in range(2):
        tracer = Tracer(forward, opaque)
        try:
            with Calls() as calls, _Instances():
                graphs.append(tracer.record(module, arguments))
        except Untraceable:
            put_back(before)
            generators.restore()
            raise
        except Exception as error:
            put_back(before)
            generators.restore()
            text = str(error).strip().split("\n")[0]
            raise Untraceable(f"it cannot be traced ({type(error).__name__}: {text})", tracer.stack[-1]) from error
        if generators.restore():
            raise Untraceable("draws random numbers")
        if not before.unchanged():
            changed = before.changed_module()
            put_back(before)
            names = {m: name for name, m in module.named_modules()}
            raise Untraceable("changes attributes of modules", names.get(changed, ""))
        if any(t._version != version for t, version in versions.items()):
            raise Untraceable("changes a buffer or parameter")
        read = []
        for code, names in calls.functions.items():
            try:
                read += read_by(code, names)
            except Untraceable as error:
                raise Untraceable(error.reason, _owner(tracer, code)) from None
        if after is not None and not after.unchanged():
            raise Untraceable("changes a global")
        after = Watched([], read)
    if _listing(graphs[0]) != _listing(graphs[1]):
        raise Untraceable("does not do the same every time")
    return graphs[1], tracer.visited, read


def _listing(graph):
    return [(node.op, str(node.target), str(node.args), str(node.kwargs)) for node in graph.nodes]


def _owner(tracer, code):
    # the innermost module whose forward is this code
    for module, name in tracer.visited.items():
        if getattr(inspect.unwrap(type(module).forward), "__code__", None) is code:
            return name
    return ""
