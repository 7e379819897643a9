"""What a graph takes for granted and may change later: attributes, classes, hooks and children of modules, globals."""

import argparse
import dataclasses
import types

import torch

SIMPLE = (bool, int, float, str, type(None))
CONTAINERS = (list, dict, set)
OPTIONS = (types.SimpleNamespace, argparse.Namespace)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# parameters and buffers are read when a graph runs; children are looked at on their own
NOT_OPTIONS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_fastcnn_unit")
PLAIN = (torch.nn.Module, torch.Tensor, dict, type, types.ModuleType, types.FunctionType, types.MethodType)


def has_hooks(module):
    """Whether calling the module runs more than its forward."""
    return any(getattr(module, name) for name in HOOKS)


def _copied(value):
    return type(value)(value) if type(value) in CONTAINERS else value


def _nested(value, found):
    # all lists, dicts and sets inside of a value, and the attributes of objects that hold options
    if type(value) in OPTIONS or (dataclasses.is_dataclass(value) and hasattr(value, "__dict__")):
        value = vars(value)
    if type(value) in CONTAINERS:
        if any(value is other for other in found):
            return
        found.append(value)
    if type(value) in (*CONTAINERS, tuple):
        for item in value.values() if type(value) is dict else value:
            if type(item) not in SIMPLE:
                _nested(item, found)


def _attributes(module):
    own = [value for name, value in vars(module).items() if name not in NOT_OPTIONS and type(value) not in SIMPLE]
    found = [vars(module)]
    for value in own:
        _nested(value, found)
    # one level into other objects that hold options, too
    objects = [vars(value) for value in own if not isinstance(value, PLAIN) and hasattr(value, "__dict__")]
    return found + [d for d in objects if not any(d is other for other in found)]


def _users_classes(modules):
    found = dict.fromkeys(cls for kind in dict.fromkeys(map(type, modules)) for cls in kind.__mro__)
    return [cls for cls in found if cls.__module__.split(".")[0] not in ("torch", "fastcnn", "builtins")]


def _public(namespace):
    # copy and pickle put names of their own into classes
    return {name: value for name, value in namespace.items() if not name.startswith("__")}


class Watched:
    """What a graph took for granted: attributes, classes, hooks and children of modules, and globals.

    Args:
        modules: the modules that a trace ran through or whose attributes a rule looked at.
        read: [(namespace, name)] of globals.
    """

    def __init__(self, modules, read=()):
        self.modules = list(modules)
        self.types = list(map(type, self.modules))
        self.classes = [(vars(cls), dict(vars(cls))) for cls in _users_classes(self.modules)]
        owned = [(module, attributes) for module in self.modules for attributes in _attributes(module)]
        owned += [(module, module._modules) for module in self.modules if module._modules]
        self.owners = [module for module, _ in owned]
        self.live = [container for _, container in owned]
        self.saved = list(map(_copied, self.live))
        self.read = [(names, name, _copied(names[name])) for names, name in read]
        # hooks are counted: their owner is called as it is, as soon as it has one
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
                and all(now == saved or _public(now) == _public(saved) for now, saved in self.classes)
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


def put_back(watched):
    """Undo what has changed in attributes since, in the same lists and dicts, as others may hold them."""
    for live, saved in zip(watched.live, watched.saved, strict=True):
        if type(live) is list:
            live[:] = saved
        elif type(live) is set:
            live.clear()
            live.update(saved)
        else:
            for key in [key for key in live if key not in saved]:
                del live[key]
            for key, value in saved.items():
                if key not in live or live[key] is not value:
                    live[key] = value
