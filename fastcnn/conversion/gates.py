"""The rule of squeeze-excite: pool, 1x1 convolution, activation, 1x1 convolution, activation, and a product."""

import torch
import torch.nn.functional as F
from torch import nn

from fastcnn import chain
from fastcnn.conversion.watched import has_hooks


def squeeze_excite(rewriter, node, x, gate):
    """Whether the node, the product of x and the gate, is squeeze-excite, all of which it then becomes."""
    kinds, modules, between, last = [], [], [], gate
    for _ in range(2):
        kind = _kind_of(rewriter, last)
        conv = rewriter.module(last.args[0]) if kind is not None else None
        if conv is None or rewriter.why_not_conv(last.args[0], conv) is not None:
            return False
        if (conv.kernel_size, conv.stride, conv.padding, conv.groups) != ((1, 1), (1, 1), (0, 0), 1):
            return False
        kinds, modules = [kind, *kinds], [last.args[0].target, *modules]
        between += [last, last.args[0]]
        last = last.args[0].args[0]
    between.append(last)
    pools = [(chain.mean, x, True), (chain.adaptive_avg_pool2d, x, 1), (chain.adaptive_avg_pool2d, x, (1, 1))]
    if (last.target, *last.args) not in pools or any(len(n.users) != 1 for n in between):
        return False
    parameters = [rewriter.get_module(node, name) for name in modules]
    rewriter.become(node, chain.squeeze_excite, x, *parameters, *kinds, activated=True)
    names = set(map(rewriter.name_of, between))
    rewriter.fates = [
        fate._replace(fused=True, note="squeeze-excite") if fate.name in names else fate for fate in rewriter.fates
    ]
    for n in between:
        rewriter.graph.erase_node(n)
    return True


def _kind_of(rewriter, node):
    """The name of the activation that the node is, if chain.squeeze_excite knows it, else None."""
    if len(node.args) != 1 or not isinstance(node.args[0], torch.fx.Node) or set(node.kwargs) - {"inplace"}:
        return None
    if node.op == "call_module":
        module = rewriter.module(node)
        kind, slope = rewriter.kind_of_module(module)
        kind = "hardsigmoid" if type(module) is nn.Hardsigmoid else kind
        plain = slope == (0.01 if kind == "leaky_relu" else 0.0)
        return kind if plain and rewriter.selected(node.target, module) and not has_hooks(module) else None
    if node.target is F.hardsigmoid:
        return "hardsigmoid"
    return rewriter.ACTIVATIONS.get(node.op, {}).get("sigmoid" if node.target == "sigmoid_" else node.target)
