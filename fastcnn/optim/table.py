"""Where the kernels find the tensors of a step, kept from step to step as far as it can be."""

import operator

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastcnn.ops import common

BLOCK = 2048  # elements of a program; one choice for every size: the kernels stream memory
WARPS = 8
REGISTERS = 255  # per thread: left alone, the assembler of Triton 3.6 spills to fit one more block
CPU_CHUNK = 16384  # elements per turn of a thread
NUMPY_LIKE = {torch.float32: np.empty(0, np.float32), torch.float64: np.empty(0, np.float64)}


def in_order_of(tensor, param, dtype):
    """The tensor itself if it has this dtype and its elements the memory order of the dense param, else a copy."""
    if tensor.shape != param.shape or tensor.device != param.device:
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} on {param.device} has state of shape {tuple(tensor.shape)} on "
            f"{tensor.device}: make the optimizer after changing or moving the model"
        )
    if tensor.dtype == dtype:
        strides = zip(tensor.stride(), param.stride(), param.shape, strict=True)
        if tensor.stride() == param.stride() or all(a == b or size == 1 for a, b, size in strides):
            return tensor
    return torch.empty_like(param, dtype=dtype).copy_(tensor)


def is_dtensor(tensor):
    """Whether a tensor is distributed over processes (FSDP2, tensor parallelism)."""
    return isinstance(tensor, _dtensor())


def local(tensor):
    """The part of a tensor that is in this process."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def _dtensor():
    # torch.distributed.tensor takes long to import, and nobody has a DTensor without it
    import sys

    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", ())


def _memory_refusal(params):
    """None if the memory of each parameter is one block of its own, else the sentence that says why not."""
    for p in params:
        if is_traceable_wrapper_subclass(p):
            return f"a parameter is a {type(p).__name__}, whose memory is not one tensor's"
        if not common.is_dense(p):
            return f"the elements of a parameter do not fill one block of memory: {tuple(p.shape)} strided {p.stride()}"
    addresses = [p.data_ptr() for p in params if p.numel()]
    if len(set(addresses)) != len(addresses):
        return "two parameters share their memory, and PyTorch updates them one after the other"
    return None


class Table:
    """The addresses of many tensors and the chunks of work, where the kernel reads them.

    Args:
        rows: lists of ints, one per tensor: addresses, or numbers of the optimizer's own.
        streamed: how many of the rows, from the first, are addresses of tensors as large as the parameters.
        sizes: numbers of elements of the tensors.
        device: of the tensors.
        previous: the table this one replaces, or None.
    """

    def __init__(self, rows, streamed, sizes, device, backend, previous):
        self.rows, self.sizes = rows, sizes
        self.host = []
        # 16-byte loads may start anywhere
        self.aligned = not any(address % 16 for row in rows[:streamed] for address in row)
        if backend == "cpu":
            self.table = np.array(rows, np.int64)
        else:
            self.table = self._send(np.array([*rows, sizes], np.int64), device)
        if previous is not None and previous.sizes == sizes:
            self.chunks, self.count, self.starts = previous.chunks, previous.count, previous.starts
            return
        chunk = CPU_CHUNK if backend == "cpu" else BLOCK
        counts = -(-np.array(sizes, np.int64) // chunk)
        starts = np.concatenate([[0], np.cumsum(counts)])
        tensor = np.repeat(np.arange(len(sizes)), counts)
        index = np.arange(len(tensor)) - np.repeat(starts[:-1], counts)
        self.count = len(tensor)
        if backend == "cpu":
            length = np.minimum(np.array(sizes, np.int64)[tensor] - index * chunk, chunk)
            self.chunks = np.stack([tensor, index * chunk, length], axis=1)
            self.starts = starts
        else:
            self.chunks = self._send(np.stack([tensor, index], axis=1).astype(np.int32), device)
            self.starts = self._send(starts.astype(np.int32), device)

    def _send(self, array, device):
        tensor = torch.from_numpy(array)
        if device.type != "cuda":
            return tensor
        # from pinned memory the copy is asynchronous; a CUDA graph repeats it at each replay: keep the memory
        self.host.append(tensor.pin_memory())
        return self.host[-1].to(device, non_blocking=True)


class Bucket:
    """The parameters of one group, device, dtype and kind of gradient, and what can be kept from step to step.

    Reading sizes and strides of every tensor costs as much as updating a small network. So those of the state are read
    again only when a parameter lies elsewhere or a state tensor is another one.

    Attributes:
        params: as the user has them; `local` is where their elements are in this process, `grads` those of the
            gradients, in the memory order of the parameters.
        refusal: None, or the sentence why our kernels cannot update them.
    """

    def __init__(self):
        self.memory = self.refusal = self.state = self.state_ints = self.backend = self.table = None

    def begin(self, index, group, params, kind):
        """Look at the parameters of this step; raise if the memory of one and of its gradient disagree."""
        self.group, self.params, self.distributed = group, params, kind == "distributed"
        self.local = [p._local_tensor for p in params] if self.distributed else params
        memory = [(p.data_ptr(), p.shape, p.stride()) for p in self.local]
        if memory == self.memory:
            return
        for p in params:
            if p.grad.shape != p.shape or p.grad.device != p.device:
                raise RuntimeError(
                    f"a parameter of group {index} is {tuple(p.shape)} on {p.device} and its gradient "
                    f"{tuple(p.grad.shape)} on {p.grad.device}"
                )
        self.memory, self.state, self.refusal = memory, None, _memory_refusal(self.local)
        if kind == "sparse":
            self.refusal = "a gradient is sparse, and the kernels read all of it"
        if self.distributed and not all(is_dtensor(p.grad) and p.grad.placements == p.placements for p in params):
            self.refusal = "a parameter is a DTensor and its gradient not one of the same placements"
        self.sizes = [p.numel() for p in self.local]
        self.total = sum(self.sizes)

    def set_state(self, rows, own, fit):
        """Take the rows of the state, the last `own` of them not shaped as the parameters.

        fit(group, params, rows) brings those not seen before into shape.
        """
        self.streamed = 2 + len(rows) - own
        if self.state is not None and len(rows) == len(self.state):
            if all(all(map(operator.is_, row, old)) for row, old in zip(rows, self.state, strict=True)):
                return
        fit(self.group, self.params, rows)
        self.state = rows
        self.state_ints = [
            [local(t).data_ptr() for t in row] if isinstance(row[0], torch.Tensor) else row for row in rows
        ]

    def make_table(self, backend):
        """Gradients in the memory order of their parameters, and the table for this step."""
        grads = [p.grad for p in self.params]
        if self.distributed:
            grads = [local(g) for g in grads]
        self.grads = [
            g if g.stride() == memory[2] else in_order_of(g, p, p.dtype)
            for g, p, memory in zip(grads, self.local, self.memory, strict=True)
        ]
        rows = [[memory[0] for memory in self.memory], [g.data_ptr() for g in self.grads], *self.state_ints]
        if self.table is None or self.backend != backend or self.table.rows != rows or self.table.sizes != self.sizes:
            previous = self.table if self.backend == backend else None
            self.table = Table(rows, self.streamed, self.sizes, self.local[0].device, backend, previous)
            self.backend = backend

    def launch_keywords(self):
        """The compile-time arguments that all Triton kernels take."""
        import triton.language as tl

        dtypes = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
        dtype = dtypes.get(self.params[0].dtype, tl.float64)
        return dict(DTYPE=dtype, ALIGNED=self.table.aligned, BLOCK=BLOCK, num_warps=WARPS, maxnreg=REGISTERS)
