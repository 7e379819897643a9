"""What a graph takes for granted and may change later: attributes, classes, hooks and children of modules, globals."""

import types

import torch

SIMPLE = (bool, int, float, str, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module):
    """Whether calling the module runs more than its forward."""
    return any(getattr(module, name) for name in HOOKS)


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


def put_back(watched):
    """Undo what has changed since."""
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
