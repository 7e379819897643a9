"""What a trace does not see of the Python code that it runs: modes, random numbers, globals and other side effects."""

import builtins
import dis
import gc
import random
import sys
import types

import numpy
import torch

from fastcnn.conversion.watched import SIMPLE

# builtins whose effect or answer a trace would fix
REFUSED_BUILTINS = {"print", "open", "input", "exec", "eval", "id", "type", "breakpoint"}


class Untraceable(Exception):
    """A forward that a trace would change; `module` is the name of the innermost module that it happened in."""

    def __init__(self, reason, module=""):
        super().__init__(reason)
        self.reason = reason
        self.module = module


def ambient_state():
    """The switches that a `with` of a forward may turn, and that a graph does not hold."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in devices),
        *(torch.get_autocast_dtype(device) for device in devices),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )


class Generators:
    # the generators whose numbers a trace would fix; put back when it used one
    def __init__(self):
        self.saved = self.now()

    @staticmethod
    def now():
        name, keys, *rest = numpy.random.get_state()
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return (torch.get_rng_state(), *cuda), random.getstate(), (name, keys.tolist(), *rest)

    def restore(self):
        """Whether anything had been drawn."""
        tensors, python, array = self.now()
        if all(map(torch.equal, tensors, self.saved[0])) and python == self.saved[1] and array == self.saved[2]:
            return False
        torch.set_rng_state(self.saved[0][0])
        if len(self.saved[0]) > 1:
            torch.cuda.set_rng_state_all(list(self.saved[0][1:]))
        random.setstate(self.saved[1])
        numpy.random.set_state(self.saved[2])
        return True


class Calls:
    # every Python function that runs inside the block, outside of torch itself
    def __enter__(self):
        # what others hung on the garbage collector is not the forward's doing
        self.collects = gc.isenabled()
        gc.disable()
        self.functions = {}
        self.previous = sys.getprofile()
        sys.setprofile(self.event)
        return self

    def __exit__(self, *exc_info):
        sys.setprofile(self.previous)
        if self.collects:
            gc.enable()

    def event(self, frame, event, arg):
        if event == "call":
            name = frame.f_globals.get("__name__", "")
            top = name.split(".")[0]
            known = top in ("torch", "numpy") or top in sys.stdlib_module_names and top != "__main__"
            if not known and not name.startswith("fastcnn.conversion"):
                self.functions.setdefault(frame.f_code, frame.f_globals)


def read_by(code, names):
    """What one function reads from outside: [(namespace, name)]; raises Untraceable for what a trace would drop."""
    previous = None
    read = []
    where = f"its code ({code.co_name})"
    for instruction in dis.get_instructions(code):
        operation, argument = instruction.opname, instruction.argval
        if operation in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            raise Untraceable(f"{where} sets the global {argument}")
        if operation in ("STORE_ATTR", "DELETE_ATTR"):
            raise Untraceable(f"{where} sets the attribute {argument}")
        if operation == "STORE_DEREF" and argument in code.co_freevars:
            raise Untraceable(f"{where} sets the outer variable {argument}")
        if operation == "IS_OP" and not (previous.opname == "LOAD_CONST" and previous.argval in (None, True, False)):
            raise Untraceable(f"{where} asks whether two values are the same object")
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            if argument in REFUSED_BUILTINS and argument not in names and hasattr(builtins, argument):
                raise Untraceable(f"{where} uses {argument}()")
            value = names.get(argument)
            if isinstance(value, (*SIMPLE, list, dict, set, types.FunctionType)) and argument in names:
                read.append((names, argument))
            elif isinstance(value, types.ModuleType) and value.__name__.split(".")[0] not in ("torch", "math", "numpy"):
                inside = vars(value)
                kinds = (*SIMPLE, types.FunctionType)
                read += [(inside, name) for name in code.co_names if isinstance(inside.get(name, inside), kinds)]
        previous = instruction
    return read
