"""The ledger of bytes and FLOPs: every kernel of one training step, what it computes and what it moves.

Each tensor of size S that a kernel reads or writes counts once, wherever it is used inside the kernel, and nothing
survives in the L2 cache between kernels. Three schemes of the same network:

eager   PyTorch's passes, channels_last. conv: R x, W y; with a bias R y, W y more (cuDNN adds it in a second kernel).
        Batch norm 2R 1W, activation R W (in place, all but relu: R W more, since autograd clones the input), add 2R 1W,
        cat R W, max pool with int64 indices. Backward: activation 2R 1W, batch norm 4R 1W, dgrad R dy W dx, wgrad
        R dy R x, bias R dy; a tensor with several users: 2R 1W for each beyond the first; cat and add: nothing.
fused   Batch norm with what follows it (drop-path, residual, activation) is one pass: 2R 1W and R of the residual;
        backward 4R 1W, with an activation after the residual also W of its gradient and a mask of one bit (written
        once, read twice). A bias and an activation join their convolution; their gradients are one pass of 2R 1W.
chain   No normalised or activated tensor is stored: statistics are taken in the producer's epilogue, batch norm and
        activation are applied by every consumer while it loads. Forward: conv R x(raw) W y(raw); only joins (add),
        pools and what has no fused form cost passes of their own. Backward: dgrad and wgrad read dz and, where y was
        normalised, y; dgrad's epilogue finishes the gradient of its input: it reads the partial sum of earlier users,
        the raw tensor (activation's mask and batch norm's reductions) or a mask of one bit (joins and convolutions
        without batch norm), for a join the raw tensors of its normalised operands, and writes. dgrad and wgrad of a
        depthwise convolution are one kernel. Concatenations are slices of one buffer. The gate of squeeze-and-excite is
        applied while loading; its reductions cost one pass of 2R. Max pools keep one byte per output.

Weights and optimizer: bytes per parameter and step, OPTIMIZER_BYTES. Per-channel and per-image vectors are not counted.
FLOPs are those of convolutions and linear layers, a multiply-add being two; for other kernels FLOPs per element are a
nominal count, small beside their bytes. Matrix products outside of layers (attention) count bytes alone.
"""

import math
from collections import Counter
from dataclasses import dataclass

from fastcnn.study.trace import Call

SCHEMES = ("eager", "fused", "chain")
# mixed precision, SGD with momentum. 20: R parameter, momentum, gradient, W parameter, momentum, 4 each; 6: R W of the
# 16-bit copy's cast; 6: R in forward, R in dgrad, W of the gradient. In the chain the optimizer writes the copy itself
# and reads a 16-bit gradient, and nothing is cast: 26.
OPTIMIZER_BYTES = {"eager": 32, "fused": 32, "chain": 26}
CONVS = ("conv1d", "conv2d", "conv3d", "conv_transpose2d")
POOLS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")
ACTIVATIONS = (
    *("relu", "relu6", "leaky_relu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "gelu", "elu"),
    *("mish", "softplus"),
)
VIEWS = (
    *("flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "expand", "getitem"),
    *("chunk", "split", "unbind", "detach"),
)
FAMILIES = {
    **dict.fromkeys((*CONVS, "linear"), "conv, linear"),
    "batch_norm": "norm",
    **dict.fromkeys(ACTIVATIONS, "activation"),
    **dict.fromkeys(POOLS, "pool"),
    **dict.fromkeys(("add", "cat", "mul"), "add, cat, mul"),
}
# nominal FLOPs per element, forward and backward; else 1
ELEMENT_FLOPS = {"norm": (6, 9), "activation": (1, 2), "add, cat, mul": (1, 1)}


@dataclass(frozen=True)
class Kernel:
    """One kernel. FLOPs and bytes are per image.

    Attributes:
        call: the `Call` it belongs to; None for the optimizer.
        phase: "forward", "backward" or "optimizer".
        flops, bytes: useful work, fewest traffic.
        on_tensor_cores: whether its FLOPs run there (dense convolutions and linear layers).
    """

    call: Call | None
    phase: str
    flops: float
    bytes: float
    on_tensor_cores: bool = False

    @property
    def family(self):
        """ "conv, linear", "depthwise", "norm", "activation", "pool", "add, cat, mul", "optimizer" or "other"."""
        if self.call is None:
            return "optimizer"
        return "depthwise" if is_depthwise(self.call) else FAMILIES.get(self.call.op, "other")


def kernels(calls, scheme, batch, itemsize, images):
    """The kernels of a training step.

    Args:
        calls: of `trace`, with a batch of `batch` images.
        scheme: one of SCHEMES.
        itemsize: bytes per element of activations.
        images: the batch that shares the optimizer's traffic.

    Returns:
        list of `Kernel`; the last is the optimizer.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    graph = _Graph(calls, batch, itemsize)
    if scheme == "chain":
        _Chain(graph).run()
    else:
        _separate_passes(graph, fuse=scheme == "fused")
    shapes = {name: shape for call in calls for name, shape in call.parameters.items()}
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return [*graph.kernels, Kernel(None, "optimizer", 0, OPTIMIZER_BYTES[scheme] * parameters / images)]


def is_depthwise(call):
    """Whether the call is a convolution with a filter per channel."""
    return call.op == "conv2d" and call.attrs["groups"] == call.input_shapes[0][1] > 1


def is_layer(call):
    """Whether the call is a convolution or linear."""
    return call.op in CONVS or call.op == "linear"


class _Graph:
    """The flow of data without views, in bytes per image; and the kernels found so far."""

    def __init__(self, calls, batch, itemsize):
        self.batch, self.itemsize = batch, itemsize
        self.calls, self.kernels = [], []
        self.size = {}  # value -> bytes per image
        self.inputs, self.output = {}, {}  # name of a call -> values
        self.users, self.maker = {}, {}  # value -> calls, call
        self.has_grad = set()
        viewed = {}
        for call in calls:
            inputs = [viewed.get(v, v) for v in call.inputs]
            shapes = zip((*call.inputs, *call.outputs), (*call.input_shapes, *call.output_shapes), strict=True)
            for value, shape in shapes:
                self.size.setdefault(value, math.prod(shape) / batch * itemsize)
            if call.op in VIEWS:
                viewed |= dict.fromkeys(call.outputs, inputs[0])
                continue
            out = call.outputs[0]
            viewed |= dict.fromkeys(call.outputs, out)
            self.calls.append(call)
            self.inputs[call.name], self.output[call.name] = inputs, out
            self.maker[out] = call
            for v in inputs:
                self.users.setdefault(v, []).append(call)
            if call.parameters or any(v in self.has_grad for v in inputs):
                self.has_grad.add(out)

    def emit(self, call, phase, bytes, flops=None):
        layer = is_layer(call)
        if flops is None and not layer:
            # a pool adds or compares each element of its windows once
            windows = math.prod(call.attrs.get("kernel", (1,))) * self.elements(self.output[call.name])
            largest = max(windows, self.elements(self.inputs[call.name][0]))
            per_element = ELEMENT_FLOPS.get(FAMILIES.get(call.op), (1, 1))[phase == "backward"]
            flops = per_element * largest
        on_tensor_cores = layer and not is_depthwise(call) and bool(flops)
        self.kernels.append(Kernel(call, phase, flops or 0, bytes, on_tensor_cores))

    def elements(self, value):
        return self.size[value] / self.itemsize

    def sole_user(self, value):
        users = self.users.get(value, ())
        return users[0] if len(users) == 1 else None

    def flops(self, call):
        """Of one pass of a convolution or linear."""
        weight = next(shape for shape in call.parameters.values() if len(shape) > 1)
        pixels = call.input_shapes[0] if call.op == "conv_transpose2d" else call.output_shapes[0]
        return 2 * math.prod(pixels) / self.batch * math.prod(weight[1:])

    def index_bytes(self, call, bytes_each):
        return bytes_each * self.elements(self.output[call.name]) if call.op == "max_pool2d" else 0


def _separate_passes(graph, fuse):
    """Schemes eager and fused."""
    tails = _tails(graph) if fuse else {}
    absorbed = {call.name for tail in tails.values() for call in tail}
    for call in graph.calls:
        if call.name not in absorbed:
            _passes(graph, call, tails.get(call.name, ()), fuse)
    for value in graph.has_grad:
        for user in graph.users.get(value, ())[1:]:
            graph.emit(user, "backward", 3 * graph.size[value], 0)


def _tails(graph):
    """For every batch norm and layer the calls that become part of it: name -> list."""
    tails, taken = {}, set()
    for call in graph.calls:
        if call.op != "batch_norm" and not is_layer(call):
            continue
        tail = []
        while user := graph.sole_user(graph.output[(tail or [call])[-1].name]):
            drop_path = user.op == "mul" and len(user.inputs) == 1
            join = user.op == "add" and all(done.op != "add" for done in tail)
            if user.name in taken or not (user.op in ACTIVATIONS or call.op == "batch_norm" and (drop_path or join)):
                break
            tail.append(user)
            if user.op in ACTIVATIONS:
                break
        tails[call.name] = tail
        taken |= {done.name for done in tail}
    return tails


def _passes(graph, call, tail, fuse):
    value = graph.output[call.name]
    x, y = [graph.size[v] for v in graph.inputs[call.name]], graph.size[value]
    wanted = [graph.size[v] for v in graph.inputs[call.name] if v in graph.has_grad]
    emit = lambda phase, bytes, flops=None: graph.emit(call, phase, bytes, flops)
    activation = bool(tail) and tail[-1].op in ACTIVATIONS
    if is_layer(call):
        flops, bias = graph.flops(call), call.attrs["bias"]
        emit("forward", x[0] + y, flops)
        if bias and not fuse and call.op != "linear":
            emit("forward", 2 * y, 0)
        for _ in ("dgrad", "wgrad") if wanted else ("wgrad",):
            emit("backward", x[0] + y, flops)
        if activation:
            emit("backward", 3 * y, 0)
        elif bias:
            emit("backward", y, 0)
        return
    if call.op == "batch_norm":
        residual = any(done.op == "add" for done in tail)
        mask = graph.elements(value) / 8 if residual and activation else 0
        emit("forward", 3 * y + residual * y + mask)
        emit("backward", 5 * y + (y + 2 * mask if mask else 0))
        return
    clone = 2 * y if call.inplace and call.op in ACTIVATIONS and call.op != "relu" else 0
    index = graph.index_bytes(call, 8)
    emit("forward", (2 * y if call.op == "cat" else sum(x) + y) + index)
    if clone:
        emit("forward", clone, 0)
    if not wanted or call.op in ("add", "cat"):
        return
    if call.op in ACTIVATIONS:
        emit("backward", 3 * y)
    elif call.op in POOLS:
        emit("backward", x[0] + y + index)
    elif call.op in ("mul", "dropout"):
        for size in wanted:
            emit("backward", y + sum(x) - size + y)
            if size < y:  # the gradient of what was broadcast is summed in a second kernel
                emit("backward", y + size, 0)
    else:
        emit("backward", y + sum(x) + sum(wanted))


class _Chain:
    """Scheme chain. Reads of a kernel are a set of (what, value), so that what is read for two reasons counts once."""

    def __init__(self, graph):
        self.graph = graph
        self.delivered = Counter()  # value -> users whose part of its gradient is there

    def run(self):
        graph = self.graph
        for call in graph.calls:
            self.forward(call)
        for call in reversed(graph.calls):
            if graph.output[call.name] in graph.has_grad:
                self.backward(call)

    def forward(self, call):
        graph, out = self.graph, self.graph.output[call.name]
        if self.is_free(call):
            return
        user = graph.sole_user(out)
        masked = (call.op == "add" or is_layer(call)) and user is not None and user.op in ACTIVATIONS
        bytes = sum(graph.size[v] for v in graph.inputs[call.name]) + graph.size[out] + graph.index_bytes(call, 1)
        bytes += graph.elements(out) / 8 if masked else 0
        graph.emit(call, "forward", bytes, graph.flops(call) if is_layer(call) else None)

    def backward(self, call):
        graph, inputs, out = self.graph, self.graph.inputs[call.name], self.graph.output[call.name]
        # the part of batch norm's backward that is affine in y is added while loading
        dy = {("gradient", out)} | ({("value", out)} if self.is_normalised(out) else set())
        emit = lambda bytes, flops=None: graph.emit(call, "backward", bytes, flops)
        if is_layer(call):
            x, flops, wanted = inputs[0], graph.flops(call), inputs[0] in graph.has_grad
            raw = {("value", self.stored(x))}
            if wanted and is_depthwise(call):
                emit(self.bytes(dy | raw | self.deliver(x)) + graph.size[x], 2 * flops)
                return
            if wanted:
                emit(self.bytes(dy | self.deliver(x)) + graph.size[x], flops)
            emit(self.bytes(dy | raw), flops)
        elif call.op in POOLS:
            x = inputs[0]
            if call.op == "adaptive_avg_pool2d" and self.delivered[x]:
                # squeeze-and-excite: the mean's gradient is added on load, which leaves the reductions
                emit(self.bytes({("gradient", out)} | self.deliver(x)))
            elif x in graph.has_grad:
                emit(self.bytes(dy | self.deliver(x)) + graph.size[x] + graph.index_bytes(call, 1))
        elif self.is_free(call) or call.op == "add":
            if not graph.users.get(out):  # the network's output: whoever makes its gradient finishes it
                emit(self.bytes(self.finish(out)))
        else:
            wanted = [v for v in inputs if v in graph.has_grad]
            reads = {("gradient", out), *(("value", self.stored(v)) for v in inputs)}
            reads = reads.union(*(self.deliver(v) for v in wanted))
            emit(self.bytes(reads) + sum(graph.size[v] for v in wanted))

    def is_free(self, call):
        """Whether consumers apply it while they load."""
        return call.op in ("batch_norm", "cat", "mul") or call.op in ACTIVATIONS

    def stored(self, value):
        """The tensor in memory from which a consumer computes this value while loading."""
        call = self.graph.maker.get(value)
        while call is not None and self.is_free(call) and call.op != "cat":
            value = max(self.graph.inputs[call.name], key=self.graph.size.get)
            call = self.graph.maker.get(value)
        return value

    def is_normalised(self, value):
        users = self.graph.users.get(value, ())
        return any(
            user.op == "batch_norm" or user.op == "cat" and self.is_normalised(self.graph.output[user.name])
            for user in users
        )

    def deliver(self, value):
        """Reads of an epilogue that adds its part to the gradient of this value, and finishes it if it is the last."""
        if value not in self.graph.has_grad:
            return set()
        reads = {("gradient", value)} if self.delivered[value] else set()
        self.delivered[value] += 1
        last = self.delivered[value] == len(self.graph.users[value])
        return reads | (self.finish(value) if last else set())

    def finish(self, value):
        """Reads that carry a complete gradient on to what the value was made from, as far as no kernel is needed."""
        call = self.graph.maker[value]
        if not self.is_free(call) and call.op != "add":
            return set()
        inputs = self.graph.inputs[call.name]
        reads = set().union(*(self.deliver(v) for v in inputs))
        if call.op in ACTIVATIONS:
            maker = self.graph.maker.get(inputs[0])
            masked = maker is not None and (maker.op == "add" or is_layer(maker))
            reads.add(("mask", inputs[0]) if masked else ("value", self.stored(inputs[0])))
        elif call.op == "batch_norm" or (call.op == "mul" and len(inputs) > 1):
            # for the sums that give gamma's, beta's and the gate's gradients
            reads.add(("value", self.stored(max(inputs, key=self.graph.size.get))))
        return reads

    def bytes(self, reads):
        sizes = (self.graph.elements(value) / 8 if what == "mask" else self.graph.size[value] for what, value in reads)
        return sum(sizes)
