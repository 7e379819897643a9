"""A classifier's graph, recorded and rewritten so that it slides over larger images: to_fully_convolutional's work."""

import torch
import torch.fx

from fastcnn import chain, nn
from fastcnn import functional as F
from fastcnn.conversion.tracing import is_others_layer
from fastcnn.models.network import Network
from fastcnn.nn.blocks import Block

# every output pixel is made of the input's pixels around it
LOCAL_LAYERS = (
    torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.MaxPool2d, torch.nn.AvgPool2d, torch.nn.LPPool2d,
    torch.nn.LocalResponseNorm, torch.nn.Dropout2d, nn.SeparableConv2d,
)  # fmt: skip
ELEMENTWISE_LAYERS = (
    torch.nn.Identity, torch.nn.ReLU, torch.nn.Hardtanh, torch.nn.LeakyReLU, torch.nn.PReLU, torch.nn.ELU,
    torch.nn.SELU, torch.nn.SiLU, torch.nn.GELU, torch.nn.Mish, torch.nn.Sigmoid, torch.nn.Tanh, torch.nn.Softplus,
    torch.nn.Hardswish, torch.nn.Hardsigmoid, torch.nn.Dropout, nn.StochasticDepth,
)  # fmt: skip
NORMS = (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d)
LOCAL = {"max_pool2d", "avg_pool2d", "lp_pool2d", "local_response_norm", "channel_shuffle", "pad", "conv2d"}
ELEMENTWISE = {
    "relu", "relu_", "relu6", "hardtanh", "leaky_relu", "elu", "silu", "gelu", "mish", "sigmoid", "tanh", "hardswish",
    "hardsigmoid", "clamp", "activate", "add", "add_", "iadd", "sub", "isub", "mul", "mul_", "imul", "multiply", "div",
    "truediv", "neg", "square", "abs", "sqrt", "exp", "contiguous", "clone", "float",
}  # fmt: skip
RESHAPING = {"flatten", "Flatten", "view", "reshape", "squeeze", "unsqueeze", "transpose", "getitem"}
JOINING = {"cat", "concat"}
SPLITTING = {"chunk", "split"}
ADAPTIVE_POOLS = {
    "adaptive_avg_pool2d": "avg", "AdaptiveAvgPool2d": "avg", "adaptive_max_pool2d": "max", "AdaptiveMaxPool2d": "max",
}  # fmt: skip
MEANS = {"mean": "avg", "amax": "max"}


class Tracer(torch.fx.Tracer):
    """Records an unfused classifier layer by layer: blocks are opened, functions of the chain are steps.

    Attributes:
        ends: {node: name} of the last nodes of a Network's body's modules.
    """

    def __init__(self):
        super().__init__(autowrap_modules=(chain, F))
        self.ends = {}
        self.path = [""]

    def trace(self, model):
        try:
            return super().trace(model)
        except NotImplementedError:
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise NotImplementedError(f"{self.place()} cannot be traced by torch.fx: {reason}") from error

    def place(self):
        name = self.path[-1]
        kind = type(self.root.get_submodule(name)).__name__
        return f"{name} ({kind})" if name else kind

    def create_args_for_root(self, function, is_module, concrete_args=None):
        images = self.create_proxy("placeholder", "images", (), {})
        return lambda: self.forward(images), ()

    def forward(self, images):
        if not isinstance(self.root, Network):
            return type(self.root).forward(self.root, images)
        features = self.root.run(images)[0]
        self.ends[features.node] = self.root.body[-1]
        return self.root.classify(features)

    def is_leaf_module(self, module, name):
        if isinstance(module, (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)):
            return False
        if isinstance(module, Block):
            return False
        return type(module).__module__.startswith(("torch.nn", "fastcnn.nn")) or is_others_layer(module)

    def call_module(self, module, forward, args, kwargs):
        self.path.append(self.path_of_module(module))
        result = super().call_module(module, forward, args, kwargs)
        self.path.pop()  # not after an error: the innermost module is its place
        if isinstance(self.root, Network) and self.path_of_module(module) in self.root.body:
            self.ends[result.node] = self.path_of_module(module)
        return result

    def iter(self, obj):
        if getattr(obj.node.target, "__name__", obj.node.target) == "chunk":
            return iter([obj[i] for i in range(obj.node.args[1])])
        return super().iter(obj)

    def create_node(self, *args, **kwargs):
        node = super().create_node(*args, **kwargs)
        node.meta["place"] = self.place()
        return node


class Rewriter(torch.fx.Interpreter):
    """Runs the graph of a classifier on its own images, and writes that of its fully convolutional form.

    What a tensor is of the map of features: (height, width) of a map that was flattened, or None for a map, whose last
    two dimensions are height and width. A map's size in numbers is that of the classifier's own images.

    Args:
        module: GraphModule of the classifier on meta tensors.
        network: copy of the classifier, whose layers the new graph calls.
        ends: the Tracer's.

    Attributes:
        cut: node of the new graph that makes the features: the last map before the first pool or flattening of a whole
            map; of a Network, the end of the last module of the body before that.
        last: name of that module; None if there is none.
        result: node of the new graph that makes the logits.
        stride: {node of the new graph: pixels of the image from one output to the next, (vertical, horizontal)}.
    """

    def __init__(self, module, network, ends):
        super().__init__(module)
        self.extra_traceback = False
        self.network, self.ends = network, ends
        self.graph_out = torch.fx.Graph()
        self.new, self.flat, self.shape, self.stride = {}, {}, {}, {}
        self.linear_sizes = {}
        self.cut = self.last = self.result = None
        self.whole = False  # whether a pool or flattening of a whole map was seen

    def refuse(self, node, reason):
        raise NotImplementedError(f"{node.meta.get('place', node.name)} {reason}")

    def run_node(self, node):
        found = super().run_node(node)
        inputs = [n for n in node.all_input_nodes if n in self.flat]
        if node.op == "placeholder":
            self.keep(node, found, None)
            self.stride[self.new[node]] = (1, 1)
        elif node.op == "output":
            self.finish(node)
        elif node.target is torch._assert:  # of one image size
            pass
        elif not inputs:  # a parameter, or arithmetic of sizes
            self.new[node] = self.graph_out.node_copy(node, self.new.get)
            self.shape[node] = getattr(found, "shape", None)
        elif not _has_tensor(found) or (node.target == "new_full" and found.shape[1:].numel() == 1):
            self.shape[node] = getattr(found, "shape", None)
            self.new[node] = self.graph_out.node_copy(node, self.new.get)
        else:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            self.rewrite(node, inputs, found, args, kwargs)
        if node in self.ends and not self.whole:
            self.cut, self.last = self.new[node], self.ends[node]
        return found

    def keep(self, node, found, flat, step=(1, 1)):
        """The node as it is."""
        self.become(node, self.graph_out.node_copy(node, self.new.get), found, flat, step)

    def become(self, node, new, found, flat, step=(1, 1)):
        """The node is that one now, which takes one of `step` of its inputs' pixels."""
        strides = {self.stride[self.new[n]] for n in node.all_input_nodes if n in self.flat}
        if len(strides) > 1:
            self.refuse(node, "combines maps of different strides")
        for stride in strides:
            self.stride.setdefault(new, (stride[0] * step[0], stride[1] * step[1]))
        self.new[node], self.flat[node] = new, flat
        self.shape[node] = _shape(found)
        self.shape.setdefault(new, _shape(found))

    def rewrite(self, node, inputs, found, args, kwargs):
        source = inputs[0]
        flat = self.flat[source]
        module = self.fetch_attr(node.target) if node.op == "call_module" else None
        name = type(module).__name__ if module is not None else getattr(node.target, "__name__", node.target)
        if name in ("materialize", "likeness"):
            self.become(node, self.new[source], found, flat)
        elif isinstance(module, ELEMENTWISE_LAYERS) or (module is not None and is_others_layer(module)):
            self.keep(node, found, flat)
        elif name in ELEMENTWISE:
            self.elementwise(node, inputs, found)
        elif name in ADAPTIVE_POOLS and flat is None:
            self.pool(node, source, found, ADAPTIVE_POOLS[name])
        elif name in MEANS and flat is None:
            self.mean(node, source, found, MEANS[name], args, kwargs)
        elif name in ("AvgPool2d", "avg_pool2d") and flat is None and self.pools_all(source, module, args, kwargs):
            # its stride is of no account
            self.window_pool(node, source, found, "avg", tuple(self.shape[source][-2:]), (1, 1))
        elif name in RESHAPING:
            self.reshape(node, source, found, name, args)
        elif isinstance(module, NORMS) and module.running_mean is None:
            self.refuse(node, "normalises with the statistics of the whole image")
        elif isinstance(module, LOCAL_LAYERS) or (name in LOCAL and module is None):
            self.local(node, inputs, found, _step(name, module, args, kwargs))
        elif name in JOINING or name in SPLITTING:
            self.channelwise(node, inputs, found, name, args, kwargs)
        elif name == "dropout":
            self.dropout(node, source, found, kwargs, args)
        elif isinstance(module, torch.nn.Linear):
            self.linear(node, source, found, module)
        elif isinstance(module, torch.nn.BatchNorm1d) and flat == (1, 1):
            self.replace(node, source, found, _batch_norm_2d(self.network.get_submodule(node.target)), flat)
        elif isinstance(module, (torch.nn.Softmax, torch.nn.LogSoftmax)) and module.dim == 1:
            self.keep(node, found, flat)
        else:
            what = f"({name}) " if module is None else ""
            self.refuse(node, f"{what}has no form here that slides over larger images")

    def elementwise(self, node, inputs, found):
        kinds = {self.flat[n] for n in inputs}
        sizes = {self.shape[n][2:] if self.flat[n] is None else () for n in inputs}
        if len(kinds) > 1 or len(sizes) > 1:
            self.refuse(node, "combines a map with numbers of the whole image, which windows of their own do not have")
        (flat,) = kinds
        for other in (n for n in node.all_input_nodes if n not in self.flat):
            shape = self.shape.get(other)
            if shape is None or (any(s != 1 for s in shape[-2:]) if flat is None else shape.numel() > 1):
                self.refuse(node, "combines a map with a tensor or number of one image size")
        self.keep(node, found, flat)

    def local(self, node, inputs, found, step):
        if any(self.shape.get(n) is None for n in node.all_input_nodes):
            self.refuse(node, "has a window that is computed from the image's size")
        if any(self.flat[n] is not None for n in inputs):
            self.refuse(node, "reads a map that was flattened")
        self.keep(node, found, None, step)

    def channelwise(self, node, inputs, found, name, args, kwargs):
        of_chain = getattr(node.target, "__module__", "") == chain.__name__
        dim = kwargs.get("dim", args[-1] if len(args) > (1 if name in JOINING else 2) else 0)
        flats = {self.flat[n] for n in inputs}
        if not (of_chain or dim in (1, -3)) or not flats <= {None, (1, 1)} or len(flats) > 1:
            self.refuse(node, f"({name}) is not along the channels of maps")
        self.keep(node, found, flats.pop())

    def pool(self, node, source, found, kind):
        """An adaptive pool, as one of fixed windows."""
        if isinstance(found, tuple):
            self.refuse(node, "returns indices")
        windows = [_windows(*sizes) for sizes in zip(self.shape[source][-2:], found.shape[-2:], strict=True)]
        if None in windows:
            sizes = " x ".join(map(str, self.shape[source][-2:])), " x ".join(map(str, found.shape[-2:]))
            self.refuse(node, f"pools a map of {sizes[0]} to {sizes[1]} with windows of different sizes")
        self.window_pool(node, source, found, kind, *zip(*windows, strict=True))

    def window_pool(self, node, source, found, kind, size, stride):
        self.leave_map(source)
        new = self.new[source]
        if size != (1, 1) or stride != (1, 1):
            pool = F.avg_pool2d if kind == "avg" else F.max_pool2d
            new = self.graph_out.call_function(pool, (new, size, stride))
        self.become(node, new, found, None if found.dim() == 4 else (1, 1), stride)

    def pools_all(self, source, module, args, kwargs):
        if module is not None:
            size, padding = module.kernel_size, module.padding
        else:
            size = kwargs.get("kernel_size", args[1] if len(args) > 1 else None)
            padding = kwargs.get("padding", args[3] if len(args) > 3 else 0)
        return _two(size) == tuple(self.shape[source][-2:]) and _two(padding) == (0, 0)

    def mean(self, node, source, found, kind, args, kwargs):
        rank = len(self.shape[source])
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        of_chain = getattr(node.target, "__module__", "") == chain.__name__
        wanted = isinstance(dims, (tuple, list)) and sorted(d % rank for d in dims) == [2, 3] and rank == 4
        if not (of_chain or wanted):
            self.refuse(node, f"takes a {node.target} that is not over height and width of a map")
        self.window_pool(node, source, found, kind, tuple(self.shape[source][-2:]), (1, 1))

    def reshape(self, node, source, found, name, args):
        before, after, flat = self.shape[source], _shape(found), self.flat[source]
        if name == "getitem" and isinstance(self.env[source], (tuple, list)):
            self.keep(node, found, flat)
        elif flat is None and self.moves_no_pixels(node, before, after, name, args):
            subsampled = name == "getitem" and isinstance(args[1], tuple) and len(args[1]) == 4
            self.keep(node, found, None, [index.step or 1 for index in args[1][2:]] if subsampled else (1, 1))
        elif name in ("transpose", "getitem"):
            self.refuse(node, f"({name}) takes the map's pixels apart")
        elif flat is None and len(before) == 4 and after == (before[0], before[1:].numel()):
            self.leave_map(source)
            self.become(node, self.new[source], found, tuple(before[-2:]))
        elif tuple(before[-2:] if flat is None else flat) == (1, 1) and after[:2] == before[:2]:
            self.leave_map(source)
            self.become(node, self.new[source], found, None if len(after) == 4 else (1, 1))
        elif flat is not None and after == before:
            self.become(node, self.new[source], found, flat)
        else:
            self.refuse(node, f"({name}) makes {list(after)} of {list(before)}")

    def moves_no_pixels(self, node, before, after, name, args):
        rank = len(before)
        if name == "getitem" and isinstance(args[1], tuple) and len(args[1]) == rank == len(after) == 4:
            return all(_is_every(index) for index in args[1][2:])
        if len(after) < 3 or after[-2:] != before[-2:]:
            return False
        if name == "transpose":
            return max(d % rank for d in args[1:3]) < rank - 2
        if name == "getitem":
            return not isinstance(args[1], tuple) or len(args[1]) <= rank - 2
        if name in ("view", "reshape"):
            sizes = node.args[1:] if len(node.args) > 2 else node.args[1]
            return all(isinstance(size, torch.fx.Node) or size == -1 for size in sizes[-2:])
        return name == "unsqueeze" and args[1] % (rank + 1) < rank - 1

    def leave_map(self, source):
        self.whole = True
        if self.cut is None:
            self.cut = self.new[source]

    def linear(self, node, source, found, module):
        flat = self.flat[source]
        if flat is None:
            self.refuse(node, "is a linear layer over the pixels of a row")
        if type(module) not in (torch.nn.Linear, nn.Linear):
            self.refuse(node, f"is a {type(module).__name__}, which may be more than a linear layer")
        if self.linear_sizes.setdefault(node.target, flat) != flat:
            self.refuse(node, "reads maps of different sizes")
        linear = self.network.get_submodule(node.target)
        if isinstance(linear, nn.Conv2d):  # replaced at its first call
            conv = linear
        else:
            channels = linear.in_features // (flat[0] * flat[1])
            with torch.device("meta"):
                conv = nn.Conv2d(channels, linear.out_features, flat, bias=linear.bias is not None)
            weight = linear.weight.detach().view(linear.out_features, channels, *flat)
            conv.weight = nn.Parameter(weight, linear.weight.requires_grad)
            conv.bias = linear.bias
        self.replace(node, source, found, conv, (1, 1))

    def dropout(self, node, source, found, kwargs, args):
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        self.replace(node, source, found, nn.Dropout(p), self.flat[source], f"dropout_of_{node.name}")

    def replace(self, node, source, found, module, flat, name=None):
        name = name or node.target
        self.network.set_submodule(name, module)
        self.become(node, self.graph_out.call_module(name, (self.new[source],)), found, flat)

    def finish(self, node):
        result = node.args[0]
        if not isinstance(result, torch.fx.Node):
            self.refuse(node, f"returns a {type(result).__name__}, not logits alone")
        if result not in self.flat or len(self.shape[result]) < 2 or self.shape[result][2:].numel() != 1:
            self.refuse(node, "returns no logits [N, classes]")
        self.result = self.new[result]
        self.graph_out.output(self.result)

    def parts(self):
        """Trunk and head, two GraphModules: what comes before and after the map that the head reads."""
        needed = set()
        for node in reversed(self.graph_out.nodes):
            if node.op == "output" or any(user in needed for user in node.users):
                needed.add(node)
        nodes = [node for node in self.graph_out.nodes if node in needed]
        end = nodes.index(self.cut) + 1
        trunk, head = torch.fx.Graph(), torch.fx.Graph()
        before, after = {}, {self.cut: head.placeholder("features")}
        for node in nodes[:end]:
            before[node] = trunk.node_copy(node, before.get)
        trunk.output(before[self.cut])
        for node in nodes[end:]:
            for read in node.all_input_nodes:
                if read.op == "get_attr" and read not in after:
                    after[read] = head.node_copy(read)
                if read not in after:
                    self.refuse(read, "is read by the classifier besides its map of features")
            after[node] = head.node_copy(node, after.get)
        return torch.fx.GraphModule(self.network, trunk), torch.fx.GraphModule(self.network, head)


def _has_tensor(value):
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (tuple, list)) and len(value) > 0 and all(isinstance(item, torch.Tensor) for item in value)
    )


def _shape(found):
    return found.shape if isinstance(found, torch.Tensor) else found[0].shape


def _two(size):
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


def _step(name, module, args, kwargs):
    """The stride of a layer or function of maps."""
    if isinstance(module, nn.SeparableConv2d):
        module = module.depthwise
    if module is not None:
        size, stride = getattr(module, "kernel_size", 1), getattr(module, "stride", 1)
    elif name == "conv2d":
        size, stride = 1, kwargs.get("stride", args[3] if len(args) > 3 else 1)
    elif name.endswith("pool2d"):
        at = 2 if name == "lp_pool2d" else 1
        size = kwargs.get("kernel_size", args[at] if len(args) > at else None)
        stride = kwargs.get("stride", args[at + 1] if len(args) > at + 1 else None)
    else:
        size = stride = 1
    return _two(size if stride in (None, [], ()) else stride)


def _is_every(index):
    # x[..., ::2]
    return isinstance(index, slice) and index.start in (None, 0) and index.stop is None


def _windows(size, count):
    """(size, stride) of the windows of an adaptive pool of `size` pixels to `count`; None if they are not alike."""
    starts = [i * size // count for i in range(count)]
    ends = [-(-(i + 1) * size // count) for i in range(count)]
    sizes = {end - start for start, end in zip(starts, ends, strict=True)}
    strides = {b - a for a, b in zip(starts, starts[1:], strict=False)} or {1}
    return (*sizes, *strides) if len(sizes) == len(strides) == 1 and strides != {0} else None


def _batch_norm_2d(norm):
    new = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
        setattr(new, name, tensor)
    return new
