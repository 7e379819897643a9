"""Converting models that nobody here wrote: `fastcnn.convert(model)`, `fastcnn.revert(model)`, `fastcnn.verify`.

The model is edited in place and nothing global is touched. Layers keep their parameters, keys and hooks, and get
fastcnn's classes; forwards are recorded with torch.fx, where that is proven to be safe (tracing.py), rewritten to the
fused chain (rules.py) and run as long as nothing they took for granted has changed (unit.py).
"""

from torch import nn
from torch.nn.utils import parametrize

from fastcnn.conversion.layers import OP_OF, OPS, OURS, op_of
from fastcnn.conversion.report import Report, Row
from fastcnn.conversion.verify import verify
from fastcnn.names import check_name
from fastcnn.nn.blocks import UNFUSED, Block

__all__ = ["convert", "revert", "verify"]

SWAPPED = "_fastcnn_swapped"
FUSIBLE = ("Conv2d", "BatchNorm2d", "SyncBatchNorm", "ReLU", "ReLU6", "LeakyReLU", "SiLU", "Hardswish", "GELU")
WITH_PARAMETERS = ("conv2d", "conv_transpose2d", "linear", "layer_norm", "group_norm", "instance_norm")
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


def convert(model, *, ops="auto", fuse=True, filter_fn=None, strict=False):
    """Run a model on fastcnn's kernels, in place: layers one by one, convolution chains fused.

    torch.nn's layers, not subclasses of them, become fastcnn.nn's: parameters, buffers, state_dict keys, hooks and the
    optimizer's references stay. With fuse, forwards of modules that torch.fx can record safely run Conv-BN-activation
    (-add) chains without storing normalised tensors, and call fastcnn.functional where they called torch.nn.functional.
    What cannot be proven to give the same stays as it is, and the report says why. The rewritten forward follows the
    model: training and evaluation, frozen layers, hooks, exchanged layers, changed options and patched classes are seen
    at the next call. Globals of other modules that a forward reads through functions it does not call by name,
    variables of enclosing functions and lists or dicts that are default arguments are not. Under torch.compile the
    chain is one graph break; torch.export and torch.jit see the original.

    Args:
        model: torch.nn.Module; converted again if it was converted before.
        ops: "auto" for all, or names of ops as in `fastcnn.explain()`.
        fuse: whether to fuse chains. Off: layers alone. On CPU the chain saves memory: it was measured at 0.97 to 1.07
            times the speed of PyTorch's layers on large images, 0.77 to 0.88 on small ones.
        filter_fn: function of (module, name) that says whether a layer may be changed.
        strict: raise if a convolution, batch norm or activation that was selected is not fused (without fuse: if a
            layer that was selected has no class of ours).

    Returns:
        Report: what became of every layer.

    Raises:
        TypeError, ValueError: a bad argument.
        NotImplementedError: strict, and something stays as it is; the model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(ops, str) and ops != "auto":
        raise ValueError(f"ops must be 'auto' or a collection of op names, got {ops!r}")
    ops = frozenset(OPS if ops == "auto" else ops)
    for name in ops:
        check_name("op", name, OPS)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function of (module, name), got {type(filter_fn).__name__}")
    revert(model)
    named = [(name, module) for name, module in model.named_modules()]
    excluded = frozenset(name for name, m in named if filter_fn is not None and not filter_fn(m, name))
    rows = {}
    for name, module in named:
        rows[name] = _swap(module, name, name not in excluded, ops)
    if fuse:
        for name, module in named:
            if UNFUSED in vars(module) and name not in excluded:
                vars(module)[UNFUSED] = False
        _fuse(model, named, rows, ops, excluded)
    report = Report([row for row in rows.values() if row is not None])
    if strict:
        kept = [row for row in report.rows if row.done == "kept" and row.note != "not selected"]
        kept += [row for row in report.rows if row.done == "swapped" and "; not fused: " in row.note]
        if kept:
            revert(model)
            lines = "\n".join(f"{row.name} ({row.cls}): {row.note}" for row in kept[:20])
            raise NotImplementedError(f"{len(kept)} selected modules would stay as they are:\n{lines}")
    return report


def _swap(module, name, selected, ops):
    cls = type(module)
    op = op_of(module)
    if op is None:
        # a line for what has parameters and is no container; a norm may have an activation inside
        inside = any(list(child.parameters()) for child in module.children())
        of_pytorch = isinstance(module, parametrize.ParametrizationList)
        if inside or of_pytorch or not list(module.parameters(recurse=False)):
            return None
        return Row(name, cls.__name__, "kept", f"no kernel for {cls.__module__}.{cls.__name__}")
    if not selected or op not in ops:
        return Row(name, cls.__name__, "kept", "not selected")
    if cls in OURS:
        module.__class__ = OURS[cls]
        vars(module)[SWAPPED] = True
    elif cls not in OP_OF:
        return Row(name, cls.__name__, "kept", f"{cls.__module__}.{cls.__name__} is no class of torch.nn")
    return Row(name, cls.__name__, "swapped", f"fastcnn.nn.{cls.__name__}")


def _fuse(model, named, rows, ops, excluded):
    from fastcnn.conversion.unit import KEY, Unit, install

    refused = {}
    install(model, Unit("", ops, excluded, refused))
    for name, reason in refused.items():
        rows[name] = Row(name, type(model.get_submodule(name)).__name__, "kept", reason)
    fates, called = {}, {}
    for _, module in named:
        unit = vars(module).get(KEY)
        if unit is None:
            continue
        for programs in unit.programs.values():
            for program in programs:
                for fate in program.fates:
                    fates.setdefault(unit.prefix + fate.name, []).append(fate)
                for inner, reason in program.opaque.items():
                    inner = (unit.prefix + inner).rstrip(".")
                    rows[inner] = Row(inner, type(model.get_submodule(inner)).__name__, "kept", reason)
                for inner, functions in program.functions.items():
                    called.setdefault((unit.prefix + inner).rstrip("."), functions)
    modules = dict(named)
    inside = {}  # by module: what became of the functions that its forward calls
    for name in fates:
        inside.setdefault(name.rpartition(".")[0], []).extend(fates[name])
    for name, module in named:
        row = rows[name]
        found = fates.get(name, ())
        if not found and not list(module.children()) and not list(module.parameters(recurse=False)):
            found = inside.get(name, ())
        missed = [fate for fate in found if not fate.fused]
        functions = _functions_of(module, called.get(name, ()))
        if found and not missed:
            rows[name] = Row(name, type(module).__name__, "fused", found[0].note)
        elif functions and (row is None or (row.done == "kept" and row.note != "not selected")):
            functions = ", ".join(f"fastcnn.functional.{function}" for function in functions)
            rows[name] = Row(name, type(module).__name__, "swapped", f"its forward calls {functions}")
        elif found:
            if row is not None and row.done == "swapped":
                rows[name] = row._replace(note=f"{row.note}; not fused: {missed[0].note}")
            elif row is None or row.note != "not selected":
                rows[name] = Row(name, type(module).__name__, "kept", missed[0].note)
        elif row is not None and row.done == "swapped" and row.cls in FUSIBLE and not _in_a_block(name, modules):
            rows[name] = row._replace(note=f"{row.note}; not fused: no forward that was recorded calls it")


def _functions_of(module, called):
    # those that are what a module of another library is: a container has them beside its layers
    if not list(module.parameters()):
        return [] if list(module.children()) else list(dict.fromkeys(called))
    if any(list(child.parameters()) for child in module.children()):
        return []
    return [function for function in dict.fromkeys(called) if function in WITH_PARAMETERS]


def _in_a_block(name, modules):
    # whose own forward runs it on the chain
    while name:
        name = name.rpartition(".")[0]
        if type(modules[name]) is not nn.Sequential:
            return isinstance(modules[name], Block)
    return False


def revert(model):
    """Undo `convert`, in place.

    Args:
        model: torch.nn.Module; also a copy, or a part, of a converted one.

    Returns:
        the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if UNFUSED in vars(module):
            vars(module)[UNFUSED] = True
        if vars(module).pop("_fastcnn_unit", None) is not None:
            _put_back_class(module, getattr(type(module), "_fastcnn_original", type(module)))
        if vars(module).pop(SWAPPED, None) is not None:
            _put_back_class(module, next(THEIRS[cls] for cls in type(module).__mro__ if cls in THEIRS))
    return model


def _put_back_class(module, cls):
    now = type(module)
    if now.__module__ == parametrize.__name__:
        # PyTorch's class for this one module, which it derived from ours
        namespace = {key: value for key, value in vars(now).items() if key not in ("__dict__", "__weakref__")}
        cls = type(now.__name__, (cls,), namespace)
    module.__class__ = cls
