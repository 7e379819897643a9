"""Which nodes of a graph may share memory, and which write to it: what may be computed later than it was recorded."""

import inspect
import operator
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from fastcnn.conversion.tracing import INPLACE, LEAVES, is_others_layer

INPLACE_OPERATORS = {getattr(operator, name) for name in INPLACE} | {operator.setitem}
# these return fresh memory
FRESH_MODULES = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.Linear, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
FRESH_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.mul, torch.cat, torch.concat,
    torch.mean, torch.sigmoid, torch.tanh, F.avg_pool2d, F.max_pool2d, F.interpolate, F.pad,
}  # fmt: skip
FRESH_METHODS = {"add", "mul", "mean", "sum", "sigmoid", "tanh", "softmax", "size", "dim"}


def is_library(function):
    """Whether a function is PyTorch's or Python's: its name and arguments then tell what it writes."""
    module = getattr(function, "__module__", None) or ""
    return module.split(".")[0] in ("torch", "_operator", "operator", "math", "builtins", "") or function is getattr


def is_leaf_norm(module):
    """Whether the module is one of other libraries' batch norms."""
    prefix = LEAVES.get(type(module).__name__) if "Norm" in type(module).__name__ else None
    return prefix is not None and type(module).__module__.startswith(prefix)


class Aliases:
    """Args:
    graph: the graph, before it is rewritten.
    module_of: function of a node: the module that it calls, or None.
    """

    def __init__(self, graph, module_of):
        self.module_of = module_of
        self.index = {node: i for i, node in enumerate(graph.nodes)}
        self.roots = {}
        self.writes = []  # (index, roots)
        self.reads = []  # (index, node that is read)
        for node, i in self.index.items():
            written = self.written_by(node)
            if written:
                self.writes.append((i, written))
            self.reads += [(i, source) for source in node.all_input_nodes]
            inputs = node.args[:1] if self.returns_first(node) else node.all_input_nodes
            inputs = frozenset().union(*(self.roots[n] for n in inputs))
            self.roots[node] = frozenset((node,)) if self.is_fresh(node) else inputs | {node}

    def add(self, node, like):
        """A node that was inserted where `like` was computed."""
        self.index[node] = self.index[like]
        self.roots[node] = self.roots[like] | {node}

    def is_fresh(self, node):
        module = self.module_of(node)
        if module is not None:
            return isinstance(module, FRESH_MODULES) or is_leaf_norm(module)
        if node.op == "call_function":
            return node.target in FRESH_FUNCTIONS
        return node.op == "call_method" and node.target in FRESH_METHODS

    @staticmethod
    def returns_first(node):
        """Whether the node writes to its first argument, and returns that."""
        if not node.args or not isinstance(node.args[0], torch.fx.Node):
            return False
        if node.op == "call_function":
            return node.target in INPLACE_OPERATORS
        named = node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__")
        return named and node.target != "set_"

    def written_by(self, node):
        inputs = node.all_input_nodes
        first = node.args[0] if node.args and isinstance(node.args[0], torch.fx.Node) else None
        everything = frozenset().union(*(self.roots[n] for n in inputs))
        only_first = self.roots[first] if first is not None else everything
        if node.op == "call_module":
            module = self.module_of(node)
            if type(module).__module__.startswith(("torch.nn.", "fastcnn.nn.")):
                hooked = any(vars(module)[name] for name in ("_forward_hooks", "_forward_pre_hooks"))
                return everything if hooked else only_first if getattr(module, "inplace", False) else frozenset()
            return frozenset() if is_others_layer(module) else everything
        if node.op == "call_method":
            return only_first if node.target.endswith("_") and not node.target.endswith("__") else frozenset()
        if node.op != "call_function":
            return frozenset()
        if node.target in INPLACE_OPERATORS:
            return only_first
        if getattr(node.target, "__name__", "") == "stochastic_depth" or node.target is OrderedDict:
            return frozenset()
        if node.target is F.batch_norm:  # its running statistics
            statistics = (node.args[1:3], node.kwargs.get("running_mean"), node.kwargs.get("running_var"))
            return frozenset().union(*(self.roots[n] for n in _nodes(statistics)))
        if not is_library(node.target) or "out" in node.kwargs or getattr(node.target, "__name__", "_").endswith("_"):
            return everything
        try:
            bound = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
        except (TypeError, ValueError):
            bound = node.kwargs
        return only_first if bound.get("inplace") else frozenset()

    def written_between(self, first, last):
        """Whether anything is written strictly between two nodes."""
        return any(self.index[first] < i < self.index[last] for i, _ in self.writes)

    def written_after(self, node, x):
        """Whether memory of x may be written after the node."""
        return any(i > self.index[node] and roots & self.roots[x] for i, roots in self.writes)

    def may_write(self, node, x):
        """Whether the node may write to memory of x."""
        return any(i == self.index[node] and roots & self.roots[x] for i, roots in self.writes)

    def read_before(self, node, x):
        """Whether memory of x is read before the node."""
        return any(i < self.index[node] and self.roots[n] & self.roots[x] for i, n in self.reads)

    def read_after(self, node, x):
        """Whether memory of x is read after the node under another name than the node's, which has seen its result."""
        at, roots = self.index[node], self.roots[x]
        return any(i > at and self.index[n] < at and roots & self.roots[n] for i, n in self.reads)

    def made_here(self, x):
        """Whether all memory of x was allocated inside the graph."""
        return all(root.op not in ("placeholder", "get_attr") for root in self.roots[x])


def _nodes(argument):
    found = []
    torch.fx.node.map_arg(argument, found.append)
    return found
