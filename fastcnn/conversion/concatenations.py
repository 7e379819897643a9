"""Concatenations along the channels: dense blocks as one step, and convolutions that write where a cat wants them."""

import torch

from fastcnn import chain
from fastcnn.conversion.watched import has_hooks
from fastcnn.ops.concatenate import Buffer


def concatenated(node):
    """The nodes that a node puts side by side along the channels, or None."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat):
        return None
    tensors, dim = ([*node.args, None, None])[:2]
    dim = node.kwargs.get("dim", 0 if dim is None else dim)
    if dim not in (1, -3) or set(node.kwargs) - {"dim"} or not isinstance(tensors, (list, tuple)):
        return None
    return list(tensors) if all(isinstance(n, torch.fx.Node) for n in tensors) else None


class _Layer:
    """A dense layer's nodes, found from its last convolution's: steps [(norm, convolution)], all in order of calls."""

    def __init__(self, rewriter, last):
        self.rewriter = rewriter
        self.nodes, self.steps, self.forms = [], [], set()
        self.first = None  # what the first batch norm reads
        node = last
        for _ in range(2):
            node = self.step(node)
            if node is None:
                return
        self.first = node

    def step(self, conv):
        """The node that is read by norm, activation and this convolution; None where they are no step of the chain."""
        rewriter = self.rewriter
        module = rewriter.module(conv)
        if not isinstance(module, torch.nn.Conv2d) or rewriter.why_not_conv(conv, module) is not None:
            return None
        nodes = [conv.args[0]]
        act = norm = rewriter.module(nodes[0])
        if act is not None and not rewriter.is_norm(act):
            if not rewriter.plain_call(nodes[0], act) or not rewriter.selected(nodes[0].target, act):
                return None
            nodes = [nodes[0].args[0], *nodes]
            norm = rewriter.module(nodes[0])
        if norm is None or not rewriter.is_norm(norm) or rewriter.why_not_norm(nodes[0], norm) is not None:
            return None
        if hasattr(norm, "act"):  # timm's batch norm has its activation inside
            if act is not norm or has_hooks(norm.act):
                return None
            act = norm.act
            rewriter.looked_at.add(act)
        form = rewriter.kind_of_module(act)
        if form[0] is None or any(len(node.users) != 1 for node in nodes):
            return None
        self.forms.add(form)
        self.nodes = [*nodes, conv, *self.nodes]
        self.steps = [(nodes[0], conv), *self.steps]
        return nodes[0].args[0]


def find_dense_blocks(rewriter):
    """Turn the concatenation at the end of every dense block into a call of chain.dense_block."""
    for node in list(rewriter.graph.nodes):
        features = concatenated(node)
        if features is None or len(features) < 2:
            continue
        layers = []
        for i, feature in enumerate(features[1:], 1):
            layer = _Layer(rewriter, feature)
            if layer.first is None or concatenated(layer.first) != features[:i] or len(layer.first.users) != 1:
                break
            layers.append(layer)
        else:
            inside = {node, *(n for layer in layers for n in (layer.first, *layer.nodes))}
            forms = set().union(*(layer.forms for layer in layers))
            alone = all(set(feature.users) <= inside for feature in features[1:])
            if alone and len(forms) == 1 and not _written(rewriter.aliases, features, node):
                _replace(rewriter, node, features[0], layers, *forms)


def _written(aliases, features, last):
    # any feature between where it was made and the end of the block
    return any(
        aliases.index[feature] < i <= aliases.index[last] and roots & aliases.roots[feature]
        for feature in features
        for i, roots in aliases.writes
    )


def _replace(rewriter, node, x, layers, form):
    graph = rewriter.graph
    arguments = []
    for layer in layers:
        modules = []
        for norm, conv in layer.steps:
            modules += [rewriter.get_norm(node, norm.target), rewriter.get_module(node, conv.target)]
        arguments.append(tuple(modules))
        for inner in layer.nodes:
            rewriter.tell(inner, True, "in a dense block")
    inside = [n for layer in layers for n in (layer.first, *layer.nodes)]
    rewriter.become(node, chain.dense_block, x, arguments, *form, activated=True)
    for inner in reversed(inside):
        graph.erase_node(inner)


def assign_slots(rewriter):
    """Let convolutions whose one reader is a concatenation write into its memory."""
    order = {node: i for i, node in enumerate(rewriter.graph.nodes)}
    nested = {part for node in order if node.target is chain.cat for part in node.args[0]}
    for node in order:
        if node.target is not chain.cat or (node in nested and len(node.users) == 1):
            continue
        parts = _parts(node)
        if parts is None or len({form for _, form in parts}) != 1 or len({conv for conv, _ in parts}) != len(parts):
            continue
        channels = [rewriter.root.get_submodule(conv.args[1].target).out_channels for conv, _ in parts]
        with rewriter.graph.inserting_before(min((conv for conv, _ in parts), key=order.get)):
            buffer = rewriter.graph.call_function(Buffer, (sum(channels),))
        offset = 0
        for (conv, _), width in zip(parts, channels, strict=True):
            with rewriter.graph.inserting_before(conv):
                conv.kwargs = conv.kwargs | {"out": rewriter.graph.call_function(Buffer.slot, (buffer, offset))}
            offset += width


def _parts(cat):
    """[(node of chain.conv_batch_norm, its activation)] in order; None where there is anything else in a cat."""
    found = []
    for part in cat.args[0]:
        if len(part.users) != 1:
            return None
        if part.target is chain.cat:
            inner = _parts(part)
            if inner is None:
                return None
            found += inner
            continue
        form = None
        if part.target is chain.activate:
            part, *form = part.args
        if part.target is not chain.conv_batch_norm or len(part.users) != 1 or part.args[1].op != "get_attr":
            return None
        found.append((part, None if form is None else tuple(form)))
    return found
