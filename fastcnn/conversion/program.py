"""A graph as a Python function under the graph's names: modules are bound once, parameters are read at each call."""

import itertools
import linecache
import weakref

import torch
from torch.fx.node import map_arg

_numbers = itertools.count()


class _Name:
    # how a node, or a constant that has no literal, is written
    def __init__(self, text):
        self.text = text

    def __repr__(self):
        return self.text


def compile_graph(graph, root):
    """A function of the graph's tensors, in the order of its placeholders.

    Args:
        graph: torch.fx.Graph.
        root: the module that its names start from. A submodule that is exchanged later is not seen.
    """
    names = {}
    constants = {}

    def constant(value):
        name = f"c{len(constants)}"
        constants[name] = value
        return _Name(name)

    def literal(argument):
        if isinstance(argument, torch.fx.Node):
            return _Name(names[argument])
        if type(argument) is tuple:
            return tuple(map(literal, argument))
        if isinstance(argument, (list, torch.fx.immutable_collections.immutable_list)) and type(argument) is not tuple:
            return list(map(literal, argument))
        if isinstance(argument, dict):
            return {key: literal(value) for key, value in argument.items()}
        if isinstance(argument, slice):
            return _Name(f"slice({literal(argument.start)!r}, {literal(argument.stop)!r}, {literal(argument.step)!r})")
        if argument is None or type(argument) in (bool, int, str):
            return argument
        return constant(argument)

    def call(node):
        arguments = [repr(literal(a)) for a in node.args] + [f"{k}={literal(a)!r}" for k, a in node.kwargs.items()]
        if node.op == "call_method":
            return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
        target = root.get_submodule(node.target) if node.op == "call_module" else node.target
        return f"{constant(target)}({', '.join(arguments)})"

    def attribute(node):
        holder, _, name = node.target.rpartition(".")
        holder = root.get_submodule(holder)
        value = getattr(holder, name)
        if isinstance(value, torch.nn.Module):
            return repr(constant(value))
        return f"getattr({constant(holder)}, {name!r})"

    last_reader = {}
    for node in graph.nodes:
        map_arg((node.args, node.kwargs), lambda n, node=node: last_reader.__setitem__(n, node))
    ends = {}
    for node, reader in last_reader.items():
        ends.setdefault(reader, []).append(node)
    parameters, lines = [], []
    for node in graph.nodes:
        names[node] = f"v_{node.name}"
        if node.op == "placeholder":
            parameters.append(names[node])
            continue
        if node.op == "output":
            lines.append(f"return {literal(node.args[0])!r}")
            break
        if node.op == "get_attr" and isinstance(_get(root, node.target), torch.nn.Module):
            names[node] = attribute(node)
            continue
        lines.append(f"{names[node]} = {attribute(node) if node.op == 'get_attr' else call(node)}")
        # what nobody reads any more is freed, as a forward's own names are
        done = [names[n] for n in ends.get(node, ()) if n.op != "get_attr" or names[n].startswith("v_")]
        done += [names[node]] if node not in last_reader else []
        if done:
            lines.append(f"{' = '.join(done)} = None")
    source = f"def forward({', '.join(parameters)}):\n" + "".join(f"    {line}\n" for line in lines)
    filename = f"<fastcnn graph {next(_numbers)} of {type(root).__name__}>"
    # a traceback shows the line
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(source, filename, "exec"), constants)
    weakref.finalize(constants["forward"], linecache.cache.pop, filename, None)
    return constants["forward"]


def _get(root, target):
    holder, _, name = target.rpartition(".")
    return getattr(root.get_submodule(holder), name)
