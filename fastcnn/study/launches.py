"""What a training step really launches, and what each launch moves: counted without a GPU.

Host functions run on the meta device, whose tensors have no memory, while a stand-in claims a GPU and every launch of a
Triton kernel is written down in place of being made. A launch counts every tensor that it gets once, at its full size,
whatever caches do; PyTorch's own ops count what they read and write. So the figures are those of the launches that a
GPU would see, with partial sums and slabs, and can stand beside the ledger's (ledger.py).
"""

import contextlib
import math
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn import backends

# read in a pass that may write over it: counts beside what is written
READ_APART = ("add_ptr",)
# passed for the rare case that the pivot of a sum was far from the mean
SELDOM_READ = {("batch_statistics_kernel", "y_ptr"), ("shared_batch_norm_kernel", "y_ptr")}


@dataclass(frozen=True)
class Launch:
    """One kernel of ours, or one op ("aten::add").

    Attributes:
        name: the function's.
        bytes: read and written, of all tensors.
    """

    name: str
    bytes: int


class _Driver:
    """Stands in for Triton's driver. Device index = compute capability: Triton keeps compiled kernels per device."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_device_interface(self):
        return None


@contextlib.contextmanager
def intercepted(capability, seen):
    """Inside the block every launch of a kernel becomes seen(JITFunction, args, kwargs, compile).

    Args:
        capability: of the GPU that is claimed, e.g. 90.
        seen: args and kwargs are the kernel's, with grid; compile() gives the CompiledKernel.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    run, previous = JITFunction.run, driver._active

    def launch(self, *args, grid, warmup, **kwargs):
        compile = lambda: run(self, *args, grid=grid, warmup=True, **kwargs)
        return seen(self, grid, args, kwargs, compile)

    driver._active, JITFunction.run = _Driver(capability), launch
    try:
        yield
    finally:
        driver._active, JITFunction.run = previous, run


@contextlib.contextmanager
def recorded(capability=90):
    """Inside the block tensors of the meta device count as a GPU's; yields the list of `Launch` that grows there."""
    launches = []

    def seen(kernel, grid, args, kwargs, compile):
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        name = kernel.fn.__name__
        read = {key: value for key, value in arguments.items() if (name, key) not in SELDOM_READ}
        launches.append(Launch(name, _kernel_bytes(read)))

    ran = [(op, dict(op.calls)) for op in backends.OPS]
    claimed = mock.patch.object(backends.Op, "_candidate", lambda self, tensor: ("triton", None))
    try:
        with claimed, intercepted(capability, seen), _Recorder(launches):
            yield launches
    finally:
        # nothing ran, so `fastcnn.explain` shall not say so
        for op, calls in ran:
            op.calls = calls


def _kernel_bytes(arguments):
    counted = {}
    for name, value in arguments.items():
        tensor = getattr(value, "base", value)  # of a tensor descriptor
        if isinstance(tensor, torch.Tensor):
            place = _place(tensor), tuple(tensor.shape), tensor.stride()
            counted[place, name if name in READ_APART else None] = _bytes(tensor)
    return sum(counted.values())


def _place(tensor):
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def _bytes(tensor):
    """Of the elements that have places of their own."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


class _Recorder(TorchDispatchMode):
    """Writes down the ops that move data."""

    def __init__(self, launches):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = lambda tree: [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        read, given = tensors((args, kwargs)), tensors(result)
        storages = {tensor.untyped_storage()._cdata for tensor in read}
        made = [tensor for tensor in given if tensor.untyped_storage()._cdata not in storages]
        written = made + (given[:1] if function._schema.is_mutable else [])
        # ops of ours that are registered with PyTorch launch nothing on this device: they count as one kernel each
        on_gpu = written and written[0].is_meta
        if function.namespace in ("aten", "fastcnn") and on_gpu and "empty" not in function._schema.name:
            name = function._schema.name
            read = [] if "new_" in name or "_like" in name else read  # they ask for the shape alone
            distinct = {(_place(t), tuple(t.shape), t.stride()): _bytes(t) for t in read}
            self.launches.append(Launch(name, sum(distinct.values()) + sum(map(_bytes, written))))
        return result


def megabytes(launches, images):
    """{name: (launches, megabytes per image)}, most first."""
    bytes, count = Counter(), Counter()
    for launch in launches:
        bytes[launch.name] += launch.bytes
        count[launch.name] += 1
    return {name: (count[name], total / images / 1e6) for name, total in bytes.most_common()}
