"""From a graph of modules and tensors to a graph of the fused chain (fastcnn/chain.py), node by node.

A node that reads a value of the chain and has no rule here gets a tensor: an explicit `materialize` before it, which
every later reader uses, too, as that node may have kept or changed the tensor.
"""

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastcnn import chain, functional
from fastcnn import nn as ours
from fastcnn.conversion import concatenations, gates
from fastcnn.conversion.aliases import Aliases
from fastcnn.conversion.layers import is_same_conv
from fastcnn.conversion.steps import ConvAlone, NormAlone, attribute, own_tensor, padded_same, size
from fastcnn.conversion.watched import has_hooks

CONVOLUTIONS = (nn.Conv2d, ours.Conv2d)
NORMS = (nn.BatchNorm2d, ours.BatchNorm2d, nn.SyncBatchNorm, ours.SyncBatchNorm)
NORM_ACTS = ("BatchNormAct2d", "SyncBatchNormAct")
ACTIVATION_MODULES = {
    "ReLU": "relu", "ReLU6": "relu6", "LeakyReLU": "leaky_relu", "SiLU": "silu", "Sigmoid": "sigmoid", "Tanh": "tanh",
    "Hardswish": "hardswish", "GELU": "gelu",
}  # fmt: skip
ACTIVATION_MODULES = {getattr(m, name): kind for name, kind in ACTIVATION_MODULES.items() for m in (nn, ours)}
ACTIVATION_FUNCTIONS = {
    **{getattr(F, kind): kind for kind in ("relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu")},
    **{torch.relu: "relu", torch.sigmoid: "sigmoid", torch.tanh: "tanh", F.sigmoid: "sigmoid", F.tanh: "tanh"},
    **{torch.relu_: "relu", F.relu_: "relu", F.leaky_relu_: "leaky_relu"},
}  # fmt: skip
ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "tanh": "tanh"}
ADD = {operator.add, operator.iadd, torch.add}
MULTIPLY = {operator.mul, operator.imul, torch.mul}
DROPOUTS = (nn.Dropout, nn.Dropout2d, ours.Dropout, ours.Dropout2d)
SPATIAL = ({2, 3}, {-1, -2}, {2, -1}, {-2, 3})
# what a forward calls by itself and that no rule takes runs on our op, as it would in a layer
FUNCTIONS = (
    "conv2d", "conv_transpose2d", "linear", "layer_norm", "group_norm", "instance_norm", "local_response_norm",
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "relu", "relu6", "leaky_relu", "silu",
    "hardswish", "gelu", "sigmoid", "tanh",
)  # fmt: skip
FUNCTIONS = {getattr(F, name): name for name in FUNCTIONS}


class Fate(NamedTuple):
    """What became of one call of a module: fused ("into what") or not (the reason)."""

    name: str
    fused: bool
    note: str


class Rewriter:
    """Rewrites the graph in place.

    Args:
        graph: of tracing.trace.
        root: its module.
        selected: function of (name, module): whether the user wants this module fused.
        selected_op: function of (name, op): whether the user wants this op in this module's forward.

    Attributes:
        functions: {name of a module: names of fastcnn.functional that its forward calls now}.
    """

    ACTIVATIONS = {"call_function": ACTIVATION_FUNCTIONS, "call_method": ACTIVATION_METHODS}

    def __init__(self, graph, root, selected, selected_op):
        self.graph = graph
        self.root = root
        self.selected = selected
        self.selected_op = selected_op
        self.functions = {}
        self.fates = []
        self.values = {}  # node that returns a value of the chain: whether an activation was applied
        self.tensors = {}  # such a node: the node that materialised it
        self.looked_at = set()
        self.paired = {}  # batch norm node: convolution node

    def rewrite(self):
        """The fates of all convolutions, batch norms and activations, in order of their calls."""
        self.skip_identities()
        self.aliases = Aliases(self.graph, self.module)
        concatenations.find_dense_blocks(self)
        nodes = list(self.graph.nodes)
        for node in nodes:
            self.find_pair(node)
        convolutions = set(self.paired.values())
        for node in nodes:
            if node in convolutions:
                continue
            node.args = self.current(node.args)
            node.kwargs = self.current(node.kwargs)
            if not self.apply(node):
                self.use_tensors(node)
        for conv in self.paired.values():
            self.graph.erase_node(conv)
        concatenations.assign_slots(self)
        self.swap_functions()
        return self.fates

    # nodes

    def module(self, node):
        if node.op != "call_module":
            return None
        module = self.root.get_submodule(node.target)
        self.looked_at.add(module)
        return module

    def current(self, argument):
        return torch.fx.node.map_arg(argument, lambda n: self.tensors.get(n, n))

    def is_value(self, argument):
        return isinstance(argument, torch.fx.Node) and argument in self.values

    def use_tensors(self, node):
        for value in [n for n in node.all_input_nodes if n in self.values]:
            # earlier readers that wait hold the memory that is written, here or later through a view
            written = self.aliases.may_write(node, value) or self.aliases.written_after(node, value)
            shared = written and self.aliases.read_before(node, value)
            with self.graph.inserting_before(node):
                tensor = self.graph.call_function(own_tensor if shared else chain.materialize, (value,))
            self.aliases.add(tensor, value)
            self.tensors[value] = tensor
        node.args = self.current(node.args)
        node.kwargs = self.current(node.kwargs)

    def become(self, node, function, *args, activated=None):
        """Let the node call a function of the chain; activated: None if it returns a tensor."""
        node.op, node.target, node.args, node.kwargs = "call_function", function, args, {}
        if activated is not None:
            self.values[node] = activated
        return True

    def get_module(self, node, name):
        with self.graph.inserting_before(node):
            return self.graph.create_node("get_attr", name, (), {})

    def get_norm(self, node, name):
        module = self.get_module(node, name)
        if type(self.root.get_submodule(name)).__name__ not in NORM_ACTS:
            return module
        with self.graph.inserting_before(node):
            return self.graph.call_function(NormAlone, (module,))

    def tell(self, node, fused, note):
        self.fates.append(Fate(self.name_of(node), fused, note))

    @staticmethod
    def name_of(node):
        """The name of the module that a node calls, or a name of its own inside the module that calls a function."""
        return node.target if node.op == "call_module" else f"{node.meta['module']}.{node.name}".lstrip(".")

    # before

    def skip_identities(self):
        for node in list(self.graph.nodes):
            module = self.module(node)
            if module is not None:
                idle = not has_hooks(module) and (
                    type(module) is nn.Identity
                    or type(module) in DROPOUTS
                    and (not module.training or module.p == 0)
                    or type(module).__name__ == "DropPath"
                    and (not module.training or not module.drop_prob)
                )
            else:
                idle = self.is_stochastic_depth(node) and (not node.args[3:] or node.args[1] == 0 or not node.args[3])
                idle = idle and len(node.args) == 4 and not node.kwargs
            if idle and len(node.args) >= 1 and isinstance(node.args[0], torch.fx.Node):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)

    @staticmethod
    def is_stochastic_depth(node):
        return (
            node.op == "call_function"
            and getattr(node.target, "__name__", "") == "stochastic_depth"
            and getattr(node.target, "__module__", "").startswith("torchvision.")
        )

    def plain_call(self, node, module):
        # one positional tensor, nothing else, and no hooks
        return (
            len(node.args) == 1
            and not node.kwargs
            and isinstance(node.args[0], torch.fx.Node)
            and not has_hooks(module)
        )

    def is_norm(self, module):
        if type(module) in NORMS:
            return True
        return type(module).__name__ in NORM_ACTS and type(module).__module__.startswith("timm.")

    def why_not_norm(self, node, module):
        if has_hooks(module):
            return "it has hooks"
        if not self.selected(node.target, module):
            return "not selected"
        if type(module).__name__ in NORM_ACTS and hasattr(module, "drop") and type(module.drop) is not nn.Identity:
            return f"it drops between norm and activation ({type(module.drop).__name__})"
        if not self.plain_call(node, module):
            return "it is called with other arguments"
        return None

    def find_pair(self, node):
        conv = self.module(node)
        if not isinstance(conv, nn.Conv2d):
            return
        why = self.why_not_conv(node, conv, pads_itself=is_same_conv(conv))
        if why is not None:
            self.tell(node, False, why)
            return
        users = list(node.users)
        norm = self.module(users[0]) if len(users) == 1 else None
        if norm is None or not self.is_norm(norm):
            if any(self.is_norm(self.module(user)) for user in users):
                self.tell(node, False, "its output is read before batch norm, too")
            else:
                self.tell(node, False, "no batch norm follows")
            return
        why = self.why_not_norm(users[0], norm)
        if why is not None:
            self.tell(node, False, f"its batch norm {users[0].target}: {why}")
        elif self.aliases.written_between(node, users[0]):
            self.tell(node, False, "something is written between it and its batch norm")
        else:
            self.paired[users[0]] = node
            self.tell(node, True, f"with {users[0].target}")

    def why_not_conv(self, node, conv, pads_itself=False):
        if type(conv) not in CONVOLUTIONS and not pads_itself:
            return f"{type(conv).__module__}.{type(conv).__name__} has a forward of its own"
        if has_hooks(conv):
            return "it has hooks"
        if not self.selected(node.target, conv):
            return "not selected"
        if conv.padding_mode != "zeros":
            return f"padding_mode {conv.padding_mode!r}"
        if not self.plain_call(node, conv):
            return "it is called with other arguments"
        return None

    # after

    def swap_functions(self):
        for node in self.graph.nodes:
            name = FUNCTIONS.get(node.target) if node.op == "call_function" and "out" not in node.kwargs else None
            if name is not None and self.selected_op(node.meta["module"], name):
                node.target = getattr(functional, name)
                self.functions.setdefault(node.meta["module"], []).append(name)

    # the rules: True if the node was rewritten

    def apply(self, node):
        if node.op == "call_module":
            module = self.module(node)
            if node in self.paired or self.is_norm(module):
                return self.norm(node, module)
            if type(module) in ACTIVATION_MODULES or type(module) is nn.Hardtanh:
                return self.activation(
                    node, *self.kind_of_module(module), module.__dict__.get("inplace", False), module
                )
            if not self.plain_call(node, module) or not (self.reads_value(node) or self.pools_a_pool(node, module)):
                return False
            return self.layer(node, module)
        if node.op == "call_function" and node.target in ACTIVATION_FUNCTIONS:
            return self.activation_function(node)
        if node.op == "call_method" and node.target in ACTIVATION_METHODS and len(node.args) == 1 and not node.kwargs:
            return self.activation(node, ACTIVATION_METHODS[node.target], 0.0, node.target.endswith("_"), None)
        if not self.reads_value(node):
            return False
        if node.op == "call_method":
            return self.method(node)
        if node.op == "call_function":
            return self.function(node)
        return False

    @staticmethod
    def pools_a_pool(node, module):
        # a tensor that backward can make again; so the chain's max_pool2d lets its own result be
        return type(module) in (nn.MaxPool2d, ours.MaxPool2d) and node.args[0].target is chain.max_pool2d

    def reads_value(self, node):
        return any(n in self.values for n in node.all_input_nodes)

    def norm(self, node, norm):
        why = self.why_not_norm(node, norm)
        if why is None and node not in self.paired and self.aliases.written_after(node, node.args[0]):
            why = "its input is changed in place later"
        if why is not None:
            self.tell(node, False, why)
            return False
        name = node.target
        module = self.get_norm(node, name)
        if node in self.paired:
            conv = self.paired[node]
            conv.args = self.current(conv.args)
            same = is_same_conv(self.module(conv))
            if same:
                self.use_tensors(conv)
            x = conv.args[0]
            written = x not in self.values and self.aliases.written_after(node, x)
            layer = self.get_module(node, conv.target)
            if same:
                with self.graph.inserting_before(node):
                    x = self.graph.call_function(padded_same, (x, layer))
                    layer = self.graph.call_function(ConvAlone, (layer,))
            self.become(node, chain.conv_batch_norm, x, layer, module, activated=False)
            if written:
                node.kwargs = {"at_once": True}
            self.fates.append(Fate(name, True, f"with {conv.target}"))
        else:
            self.become(node, chain.batch_norm, node.args[0], module, activated=False)
            self.fates.append(Fate(name, True, "of what is no convolution's output alone"))
        if type(norm).__name__ in NORM_ACTS and hasattr(norm, "act"):
            self.norm_act(node, norm.act, f"{name}.act")
        return True

    def norm_act(self, node, act, name):
        # timm's batch norm with its activation inside
        self.looked_at.add(act)
        if type(act) is nn.Identity:
            return
        users = list(node.users)
        kind, slope = self.kind_of_module(act)
        with self.graph.inserting_after(node):
            if kind is not None and not has_hooks(act):
                after = self.graph.call_function(chain.activate, (node, kind, slope))
                self.values[after] = True
                self.fates.append(Fate(name, True, kind))
            else:
                tensor = self.graph.call_function(chain.materialize, (node,))
                self.fates.append(Fate(name, False, f"no kernel for {type(act).__name__}"))
                with self.graph.inserting_after(tensor):
                    after = self.graph.call_module(name, (tensor,))
        for user in users:
            user.replace_input_with(node, after)
        self.aliases.add(after, node)

    @staticmethod
    def kind_of_module(module):
        """(kind, slope) of an activation module, (None, 0) if the chain has none."""
        if type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (0, 6):
            return "relu6", 0.0
        kind = ACTIVATION_MODULES.get(type(module))
        if kind == "gelu" and module.approximate == "tanh":
            kind = "gelu_tanh"
        return kind, getattr(module, "negative_slope", 0.0) if kind == "leaky_relu" else 0.0

    def activation_function(self, node):
        kind = ACTIVATION_FUNCTIONS[node.target]
        args, kwargs = list(node.args), dict(node.kwargs)
        inplace = bool(kwargs.pop("inplace", False)) or node.target in (torch.relu_, F.relu_, F.leaky_relu_)
        slope = 0.0
        if kind == "leaky_relu":
            slope = kwargs.pop("negative_slope", args[1] if len(args) > 1 else 0.01)
            inplace = inplace or (len(args) > 2 and bool(args[2]))
        elif kind == "gelu":
            kind = "gelu_tanh" if kwargs.pop("approximate", "none") == "tanh" else "gelu"
        elif len(args) > 1:
            inplace = inplace or bool(args[1])
        kwargs.pop("input", None)
        if kwargs or not args or isinstance(slope, torch.fx.Node):
            return False
        return self.activation(node, kind, slope, inplace, None)

    def activation(self, node, kind, slope, inplace, module):
        why = None
        x = node.args[0] if node.args else None
        if kind is None:
            why = f"no kernel for {type(module).__name__}"
        elif not self.is_value(x):
            why = "it reads a tensor, not a batch norm or a sum"
        elif module is not None and has_hooks(module):
            why = "it has hooks"
        elif module is not None and not self.selected(node.target, module):
            why = "not selected"
        elif self.values[x]:
            why = "it reads what another activation returned"
        elif inplace and self.aliases.read_after(node, x):
            why = "it works in place and its input is read again"
        self.tell(node, why is None, why or kind)
        return why is None and self.become(node, chain.activate, x, kind, slope, activated=True)

    def layer(self, node, module):
        x = node.args[0]
        kind = type(module)
        if kind in CONVOLUTIONS and self.why_not_conv(node, module) is None:
            return self.become(node, chain.conv, x, self.get_module(node, node.target))
        if kind in (nn.MaxPool2d, ours.MaxPool2d) and not module.return_indices:
            options = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
            return self.become(node, chain.max_pool2d, x, *options)
        if kind in (nn.AvgPool2d, ours.AvgPool2d):
            options = (module.kernel_size, module.stride, module.padding)
            options += (module.ceil_mode, module.count_include_pad, module.divisor_override)
            return self.become(node, chain.avg_pool2d, x, *options)
        if kind in (nn.AdaptiveAvgPool2d, ours.AdaptiveAvgPool2d):
            return self.become(node, chain.adaptive_avg_pool2d, x, module.output_size)
        if kind.__name__ == "DropPath" and kind.__module__.startswith("timm."):
            return self.drop_rows(node, x, module.drop_prob, module.scale_by_keep)
        return False

    def drop_rows(self, node, x, probability, scaled=True):
        with self.graph.inserting_before(node):
            noise = self.graph.call_function(chain.row_noise, (x, probability, scaled))
        return self.become(node, chain.multiply, x, noise, activated=True)

    def method(self, node):
        x, *rest = node.args
        name = node.target
        if name == "size" and self.is_value(x):
            node.op, node.target = "call_function", size
            return True
        if name in ("dim", "ndimension") and self.is_value(x):
            node.op, node.target, node.args = "call_function", attribute, (x, "ndim")
            return True
        if name in ("add", "add_") and len(rest) == 1 and not node.kwargs:
            return self.add(node, name == "add_")
        if name in ("mul", "mul_") and len(rest) == 1 and not node.kwargs:
            return self.multiply(node, name == "mul_")
        if name == "mean":
            return self.mean(node)
        return False

    def function(self, node):
        target, args = node.target, node.args
        if target is getattr and self.is_value(args[0]) and args[1] in ("shape", "ndim", "dtype", "device"):
            node.target = attribute
            return True
        if target in ADD and len(args) == 2 and not node.kwargs:
            return self.add(node, target is operator.iadd)
        if target in MULTIPLY and len(args) == 2 and not node.kwargs:
            return self.multiply(node, target is operator.imul)
        if target is torch.mean:
            return self.mean(node)
        if target in (torch.cat, torch.concat):
            return self.cat(node)
        if self.is_stochastic_depth(node) and len(args) == 4 and not node.kwargs and args[2] == "row":
            return self.is_value(args[0]) and args[3] is True and self.drop_rows(node, args[0], args[1])
        return self.pool_function(node)

    def two_tensors(self, node, inplace):
        """Whether both operands are nodes that may wait, the written one with nobody to see it."""
        left, right = node.args
        if not (isinstance(left, torch.fx.Node) and isinstance(right, torch.fx.Node)) or left is right:
            return False
        if inplace and (self.aliases.read_after(node, left) or not self.aliases.made_here(left)):
            return False
        return not any(self.aliases.written_after(node, n) for n in (left, right) if n not in self.values)

    def add(self, node, inplace):
        return self.two_tensors(node, inplace) and self.become(node, chain.add, *node.args, activated=False)

    def multiply(self, node, inplace):
        if not self.two_tensors(node, inplace):
            return False
        left, right = node.args if self.is_value(node.args[0]) else reversed(node.args)
        if gates.squeeze_excite(self, node, left, right):
            return True
        if right in self.values:  # a gate is a tensor
            with self.graph.inserting_before(node):
                tensor = self.graph.call_function(chain.materialize, (right,))
            self.aliases.add(tensor, right)
            self.tensors[right] = right = tensor
        return self.become(node, chain.multiply, left, right, activated=True)

    def mean(self, node):
        x, *rest = node.args
        kwargs = dict(node.kwargs)
        dim = kwargs.pop("dim", rest.pop(0) if rest else None)
        keepdim = kwargs.pop("keepdim", rest.pop(0) if rest else False)
        if kwargs or rest or not self.is_value(x) or not isinstance(dim, (list, tuple)) or type(keepdim) is not bool:
            return False
        return len(dim) == 2 and set(dim) in SPATIAL and self.become(node, chain.mean, x, keepdim)

    def cat(self, node):
        tensors = concatenations.concatenated(node)
        if tensors is None or any(self.aliases.written_after(node, n) for n in tensors if n not in self.values):
            return False
        return self.become(node, chain.cat, tensors, activated=True)

    def pool_function(self, node):
        target, args, kwargs = node.target, node.args, dict(node.kwargs)
        if not args or not self.is_value(args[0]):
            return False
        if target is F.adaptive_avg_pool2d and len(args) + len(kwargs) == 2:
            return self.become(node, chain.adaptive_avg_pool2d, args[0], *args[1:], *kwargs.values())
        names = {
            F.max_pool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
            F.avg_pool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
        }.get(target)
        if names is None:
            return False
        defaults = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
        defaults |= {"count_include_pad": True, "divisor_override": None}
        kwargs.pop("return_indices", None)
        given = dict(zip(names, args[1:], strict=False)) | kwargs
        if set(given) - set(names) or len(args) - 1 > len(names) or "kernel_size" not in given:
            return False
        function = chain.max_pool2d if target is F.max_pool2d else chain.avg_pool2d
        return self.become(node, function, args[0], *(given.get(name, defaults.get(name)) for name in names))
