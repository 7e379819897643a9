"""The forward of a converted module: graphs of the fused chain, made when a call needs one, checked before each call.

A converted module gets a subclass of its class, so that its parameters, hooks, keys and `isinstance` stay. The subclass
is made here and found again by pickle and deepcopy; graphs are not copied but made anew.
"""

import copyreg
import functools
import inspect
import logging
import threading
from typing import NamedTuple

import torch
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from fastcnn.backends import _transformed
from fastcnn.conversion.layers import op_of
from fastcnn.conversion.program import compile_graph
from fastcnn.conversion.surroundings import Untraceable
from fastcnn.conversion.tracing import is_known_leaf, is_others_layer, trace
from fastcnn.conversion.watched import SIMPLE, Watched
from fastcnn.nn.blocks import Block

MAX_TRACES = 24  # in a row, none used twice: a module that changes itself all the time runs as it is
MAX_PROGRAMS = 8  # kept of one situation
KEY = "_fastcnn_unit"

logger = logging.getLogger("fastcnn")
_classes = {}
_lock = threading.RLock()


class Program(NamedTuple):
    """One graph, or the reason why there is none.

    function: of the tensors of a call; None: the module's own forward runs.
    watched: what must stay as it is.
    fates: of convolutions, batch norms and activations (rules.Fate).
    opaque: {name of an inner module that runs as it is: reason}.
    functions: {name of a module: names of fastcnn.functional that its forward calls now}.
    """

    function: object
    watched: Watched
    fates: tuple
    opaque: dict
    functions: dict


class Unit:
    """What a converted module remembers.

    Args:
        prefix: the module's name in the converted model, with a dot, or "".
        ops: the names of the ops to use.
        excluded: names in the model of the modules that stay as they are.
        refused: gets {name in the model: reason} of modules whose own forward cannot be recorded.
    """

    def __init__(self, prefix, ops, excluded, refused=None):
        self.prefix, self.ops, self.excluded = prefix, ops, excluded
        self.refused = {} if refused is None else refused
        self.programs = {}
        self.traces = 0  # all
        self.unused = 0  # since one was used again

    def __getstate__(self):
        return self.prefix, self.ops, self.excluded

    def __setstate__(self, state):
        self.__init__(*state)

    def selected(self, name, module):
        op = op_of(module)
        return self.prefix + name not in self.excluded and (op is None or op in self.ops)

    def selected_op(self, name, op):
        return self.prefix + name not in self.excluded and op in self.ops

    def inner(self, name):
        """The unit of a module inside this one."""
        return Unit(f"{self.prefix}{name}.", self.ops, self.excluded, self.refused)

    def program(self, module, args, kwargs, situation):
        """The program for this call; made if there is none."""
        programs = self.programs.get(situation)
        if programs is not None:
            for i, program in enumerate(programs):
                if program.watched.unchanged():
                    if i:
                        programs.insert(0, programs.pop(i))
                    self.unused = 0
                    return program
        with _lock:
            if self.unused >= MAX_TRACES:
                return Program(None, None, (), {}, {})
            self.traces += 1
            self.unused += 1
            if self.unused == MAX_TRACES:
                logger.warning(
                    "%s changes itself between calls: its own forward runs from now on",
                    self.prefix.rstrip(".") or type(module).__name__,
                )
            program = self.build(module, args, kwargs)
            programs = self.programs.setdefault(situation, [])
            programs.insert(0, program)
            del programs[MAX_PROGRAMS:]
            return program

    def build(self, module, args, kwargs):
        from fastcnn.conversion.rules import Rewriter

        opaque = {}
        while True:
            try:
                graph, visited, read = trace(module, original_class(module).forward, (args, kwargs), opaque)
                break
            except Untraceable as error:
                if error.module == "" or error.module in opaque:
                    self.install_inside(module, "")
                    return Program(None, Watched(module.modules()), (), {"": error.reason}, {})
                opaque[error.module] = error.reason
        rewriter = Rewriter(graph, module, self.selected, self.selected_op)
        fates = tuple(rewriter.rewrite())
        changed = rewriter.functions or any(fate.fused for fate in fates)
        function = compile_graph(graph, module) if changed else None
        for node in graph.nodes:
            if node.op == "call_module":
                self.install(module.get_submodule(node.target), node.target, opaque)
        watched = Watched([*visited, *rewriter.looked_at], read)
        return Program(function, watched, fates, opaque, rewriter.functions)

    def install(self, inner, name, opaque):
        # a step of the graph that is a network of its own
        if name in opaque:
            self.install_inside(inner, name + ".")
        else:
            install(inner, self.inner(name))

    def install_in_block(self, block, prefix):
        # the block itself runs on the chain, and so do containers in it; it may hold modules that do not
        for name, child in block.named_children():
            if type(child) is torch.nn.Sequential:
                self.install_in_block(child, f"{prefix}{name}.")
            else:
                install(child, self.inner(prefix + name))

    def install_inside(self, module, prefix):
        for name, child in module.named_children():
            install(child, self.inner(prefix + name))


def original_class(module):
    """The class that the module had before it was converted."""
    return getattr(type(module), "_fastcnn_original", type(module))


def why_not_unit(module):
    """None, or the sentence why this module's forward cannot be exchanged."""
    if "forward" in vars(module):
        return "its forward was exchanged on the instance"
    if type(module).forward is torch.nn.Module.forward or isinstance(
        module, (torch.nn.ModuleList, torch.nn.ModuleDict)
    ):
        return "it has no forward"
    if is_known_leaf(module):
        return "it is one layer"
    return None


def install(module, unit):
    """Convert a module, or what is inside if its own forward cannot be recorded."""
    if KEY in vars(module) or is_others_layer(module) or isinstance(module, parametrize.ParametrizationList):
        return
    if isinstance(module, Block):
        unit.install_in_block(module, "")
        return
    why = why_not_unit(module)
    if why is None:
        arguments = example_arguments(original_class(module).forward)
        situation = _situation(*arguments) if arguments is not None else None
        vars(module)[KEY] = unit
        module.__class__ = unit_class(type(module))
        if situation is not None:
            why = unit.program(module, *arguments, situation).opaque.get("")
            if why is not None:
                unit.refused[unit.prefix.rstrip(".")] = why
                module.__class__ = original_class(module)
                del vars(module)[KEY]  # its inner modules were tried with it
        return
    unit.install_inside(module, "")


def example_arguments(forward):
    """(args, kwargs) of a call with a tensor for every argument that has no default; None if nobody can tell."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        parameters = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not parameters:
            return None
    needed = [p for p in parameters if p.default is p.empty]
    if any(p.kind == p.KEYWORD_ONLY for p in needed):
        return None
    return tuple(torch.empty(0) for _ in needed), {}


def _situation(args, kwargs):
    # what, beside the module itself, decides how a forward runs; None: nothing we could fix in a graph
    key = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    key += (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    if not kwargs and all(type(a) is torch.Tensor for a in args):
        return len(args), *key
    skeleton = _skeleton((args, kwargs))
    return None if skeleton is None else (skeleton, *key)


def _skeleton(value):
    kind = type(value)
    if kind in (torch.Tensor, torch.nn.Parameter):
        return "tensor"
    if kind in SIMPLE or kind in (torch.dtype, torch.device):
        return kind, value
    if kind in (tuple, list):
        parts = tuple(map(_skeleton, value))
    elif kind is dict:
        parts = tuple((key, _skeleton(item)) for key, item in value.items())
        if any(part[1] is None for part in parts):
            return None
    else:
        return None
    return None if None in parts else (kind, parts)


def _tensors(value, found):
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif type(value) in (tuple, list):
        for item in value:
            _tensors(item, found)
    elif type(value) is dict:
        for item in value.values():
            _tensors(item, found)
    return found


def run(module, args, kwargs):
    """The forward of a converted module."""
    unit = vars(module)[KEY]
    situation = None
    if not (
        _transformed() or _has_any_global_hook() or torch.jit.is_tracing() or vars(module).get("_is_replica")
    ):  # fmt: skip
        situation = _situation(args, kwargs)
    if situation is not None:
        program = unit.program(module, args, kwargs, situation)
        if program.function is not None:
            tensors = args if type(situation[0]) is int else _tensors((args, kwargs), [])
            return program.function(*tensors)
    return type(module)._fastcnn_original.forward(module, *args, **kwargs)


# as torch.compile sees it: one call that it leaves alone
run_uncompiled = torch._disable_dynamo(run)


def unit_class(original):
    """The subclass of a module's class whose forward is `run`."""
    if original in _classes:
        return _classes[original]

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():
                return original.forward(self, *args, **kwargs)
            return run_uncompiled(self, args, kwargs)
        return run(self, args, kwargs)

    def __reduce_ex__(self, protocol):
        function, arguments, *rest = original.__reduce_ex__(self, protocol)
        if function is copyreg.__newobj__ and arguments[0] is type(self):
            return _new, (original, *arguments[1:]), *rest
        return function, arguments, *rest

    def __prepare_scriptable__(self):
        import copy

        from fastcnn.conversion import revert

        shared = {id(t): t for t in (*self.parameters(), *self.buffers())}
        return revert(copy.deepcopy(self, shared))

    def recompile(self):
        # torch.fx writes the forward of an edited graph into the class
        cls = type(self)
        self.__class__ = original
        try:
            return self.recompile()
        finally:
            self.__class__ = cls

    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_fastcnn_original": original,
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__prepare_scriptable__": __prepare_scriptable__,
    }
    if issubclass(original, torch.fx.GraphModule):
        namespace["recompile"] = recompile
    _classes[original] = type(original)(original.__name__, (original,), namespace)
    return _classes[original]


def _new(original, *arguments):
    cls = unit_class(original)
    return cls.__new__(cls, *arguments)
