"""Symbolic tracing that refuses what it cannot prove: torch.fx records a forward once; what Python did then is fixed.

torch.fx alone drops silently: writes to attributes and globals, `with torch.no_grad()`, random numbers, an `isinstance`
of a value, `x += y` (recorded as x + y), hooks of inner modules. Each of these raises `Untraceable` here, naming the
module. Two traces must agree. What a trace has read and may change later (attributes of modules, globals) is `Watched`.
"""

import builtins
import dis
import inspect
import operator
import random
import sys
import threading
import types

import numpy
import torch
import torch.fx
from torch.fx.proxy import Attribute

SIMPLE = (bool, int, float, str, type(None))
# modules of other libraries that are one step of a graph, by class name and the start of the module path: their
# forwards count batches in a buffer or draw random numbers
LEAVES = {
    "BatchNormAct2d": "timm.",
    "SyncBatchNormAct": "timm.",
    "FrozenBatchNormAct2d": "timm.",
    "DropPath": "timm.",
    "FrozenBatchNorm2d": "torchvision.",
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# builtins whose effect or answer a trace would fix
REFUSED_BUILTINS = {"print", "open", "input", "exec", "eval", "id", "type", "breakpoint"}
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
ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.imul}


class Untraceable(Exception):
    """A forward that a trace would change; `module` is the name of the innermost module that it happened in."""

    def __init__(self, reason, module=""):
        super().__init__(reason)
        self.reason = reason
        self.module = module


def has_hooks(module):
    """Whether calling the module runs more than its forward."""
    return any(getattr(module, name) for name in HOOKS)


def is_known_leaf(module):
    """Whether the module is one step of a graph by its class."""
    cls = type(module)
    path = cls.__module__
    if LEAVES.get(cls.__name__) is not None and path.startswith(LEAVES[cls.__name__]):
        return True
    return (path.startswith(("torch.", "fastcnn.nn."))) and not isinstance(module, torch.nn.Sequential)


class _Checked:
    # what a proxy of torch.fx lets through silently
    @property
    def __class__(self):
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if asker.startswith(("torch.fx", "torch.utils._pytree", "torch.overrides")):
            return type(self)
        if self.node.meta.get("tensor"):
            return torch.Tensor
        self.tracer.refuse("asks the type of a value that is not known before it runs")

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
            self.check_containers(result)
            return result

        return forward, ()

    def check_containers(self, value):
        # torch.fx rebuilds containers as plain ones
        if type(value) in (_Proxy, _AttributeProxy) or value is None or isinstance(value, SIMPLE):
            return
        if type(value) in (tuple, list) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            for item in value:
                self.check_containers(item)
        elif type(value) is dict:
            for item in value.values():
                self.check_containers(item)
        else:
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


def ambient_state():
    """The switches that a `with` of a forward may turn, and that a graph does not hold."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in devices),
        *(torch.get_autocast_dtype(device) for device in devices),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )


class _Random:
    # the generators whose numbers a trace would fix; put back when it used one
    def __init__(self):
        self.saved = self.now()

    @staticmethod
    def now():
        name, keys, *rest = numpy.random.get_state()
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return (torch.get_rng_state(), *cuda), random.getstate(), (name, keys.tolist(), *rest)

    def restore(self):
        """Whether anything had been drawn."""
        tensors, python, array = self.now()
        if all(map(torch.equal, tensors, self.saved[0])) and python == self.saved[1] and array == self.saved[2]:
            return False
        torch.set_rng_state(self.saved[0][0])
        if len(self.saved[0]) > 1:
            torch.cuda.set_rng_state_all(list(self.saved[0][1:]))
        random.setstate(self.saved[1])
        numpy.random.set_state(self.saved[2])
        return True


class _Calls:
    # every Python function that runs inside the block, outside of torch itself
    def __enter__(self):
        self.functions = {}
        self.previous = sys.getprofile()
        sys.setprofile(self.event)
        return self

    def __exit__(self, *exc_info):
        sys.setprofile(self.previous)

    def event(self, frame, event, arg):
        if event == "call":
            name = frame.f_globals.get("__name__", "")
            top = name.split(".")[0]
            known = top in ("torch", "numpy") or top in sys.stdlib_module_names and top != "__main__"
            if not known and not name.startswith("fastcnn.conversion"):
                self.functions.setdefault(frame.f_code, frame.f_globals)


def _read_by(code, names):
    """What one function reads from outside: [(namespace, name)]; raises Untraceable for what a trace would drop."""
    previous = None
    read = []
    where = f"its code ({code.co_name})"
    for instruction in dis.get_instructions(code):
        operation, argument = instruction.opname, instruction.argval
        if operation in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            raise Untraceable(f"{where} sets the global {argument}")
        if operation in ("STORE_ATTR", "DELETE_ATTR"):
            raise Untraceable(f"{where} sets the attribute {argument}")
        if operation == "STORE_DEREF" and argument in code.co_freevars:
            raise Untraceable(f"{where} sets the outer variable {argument}")
        if operation == "IS_OP" and not (previous.opname == "LOAD_CONST" and previous.argval in (None, True, False)):
            raise Untraceable(f"{where} asks whether two values are the same object")
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            if argument in REFUSED_BUILTINS and argument not in names and hasattr(builtins, argument):
                raise Untraceable(f"{where} uses {argument}()")
            value = names.get(argument)
            if isinstance(value, (*SIMPLE, list, dict, set)) and argument in names:
                read.append((names, argument))
            elif isinstance(value, types.ModuleType) and value.__name__.split(".")[0] not in ("torch", "math", "numpy"):
                inside = vars(value)
                read += [(inside, name) for name in code.co_names if isinstance(inside.get(name, inside), SIMPLE)]
        previous = instruction
    return read


def _copied(value):
    return type(value)(value) if type(value) in (list, dict, set) else value


PLAIN = (torch.nn.Module, torch.Tensor, dict, type, types.ModuleType, types.FunctionType, types.MethodType)


def _attributes(module):
    # one level into objects that hold options, too
    objects = [v for name, v in vars(module).items() if name != "_fastcnn_unit" and not isinstance(v, PLAIN)]
    return [vars(module), *(vars(value) for value in objects if hasattr(value, "__dict__"))]


class Watched:
    """What a graph took for granted: attributes, classes, hooks and children of modules, and globals.

    Args:
        modules: the modules that a trace ran through or whose attributes a rule looked at.
        read: [(namespace, name)] of globals.
    """

    def __init__(self, modules, read=()):
        self.modules = list(modules)
        self.types = list(map(type, self.modules))
        parents = [module for module in self.modules if module._modules]
        self.owners = [module for module in self.modules for _ in _attributes(module)] + parents
        self.live = [attributes for module in self.modules for attributes in _attributes(module)]
        self.live += [module._modules for module in parents]
        self.saved = [{key: _copied(value) for key, value in d.items() if key not in ("_modules",)} for d in self.live]
        self.read = [(names, name, _copied(names[name])) for names, name in read]
        # parameters, buffers and hooks may change inside: graphs read them when they run, hooks are counted
        for saved, live in zip(self.saved, self.live, strict=True):
            for key in ("_parameters", "_buffers", "_modules"):
                if key in live:
                    saved[key] = live[key]
        self.hooks = [getattr(module, name) for module in self.modules for name in HOOKS]
        self.hook_counts = list(map(len, self.hooks))

    def unchanged(self):
        """Whether the graph still is what a new trace would give."""
        try:
            return (
                self.live == self.saved
                and list(map(type, self.modules)) == self.types
                and list(map(len, self.hooks)) == self.hook_counts
                and all(names.get(name) == value for names, name, value in self.read)
            )
        except (RuntimeError, ValueError, TypeError):  # a tensor or an array was exchanged: == gives no bool
            return False

    def changed_module(self):
        """The first module of which an attribute is another one now."""
        for owner, live, saved in zip(self.owners, self.live, self.saved, strict=True):
            try:
                if live != saved:
                    return owner
            except (RuntimeError, ValueError, TypeError):
                return owner
        return None


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
    generators = _Random()
    graphs = []
    read = after = None
    for _ in range(2):
        tracer = Tracer(forward, opaque)
        try:
            with _Calls() as calls:
                graphs.append(tracer.record(module, arguments))
        except Untraceable:
            _put_back(before)
            generators.restore()
            raise
        except Exception as error:
            _put_back(before)
            generators.restore()
            text = str(error).strip().split("\n")[0]
            raise Untraceable(f"it cannot be traced ({type(error).__name__}: {text})", tracer.stack[-1]) from error
        if generators.restore():
            raise Untraceable("draws random numbers")
        if not before.unchanged():
            changed = before.changed_module()
            _put_back(before)
            names = {m: name for name, m in module.named_modules()}
            raise Untraceable("changes attributes of modules", names.get(changed, ""))
        if any(t._version != version for t, version in versions.items()):
            raise Untraceable("changes a buffer or parameter")
        read = []
        for code, names in calls.functions.items():
            try:
                read += _read_by(code, names)
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


def _put_back(watched):
    for live, saved in zip(watched.live, watched.saved, strict=True):
        for key in [key for key in live if key not in saved]:
            del live[key]
        for key, value in saved.items():
            now = live.get(key)
            if now is value:
                continue
            if type(value) is list and type(now) is list:
                now[:] = value  # the same list, as others may hold it
            elif type(value) in (dict, set) and type(now) is type(value):
                now.clear()
                now.update(value)
            else:
                live[key] = value
