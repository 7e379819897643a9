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
LOTS = 64  # of chunks on the CPU
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
            # every thread takes the same number of chunks in a row, and the first layers of a network are small: deal
            # them out by size, full ones in the order of memory. In a fixed number of lots, for sums have an order.
            order = np.argsort(-length, kind="stable")
            full = np.array_split(order[: np.count_nonzero(length == chunk)], LOTS)
            rest = order[np.count_nonzero(length == chunk) :]
            order = np.concatenate([part for i in range(LOTS) for part in (full[i], rest[i::LOTS])])
            self.chunks = np.stack([tensor, index * chunk, length], axis=1)[order]
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


class Plan:
    """How the parameters of one group are shared out among buckets, kept as long as nothing about them changes.

    Args:
        optimizer: its name, for errors.
        index: of the group.
        grads: the gradients of the group's parameters, or None.
        accepts_sparse: whether the optimizer has a step for sparse gradients.
        old: the buckets of the previous plan, {kind, device and dtype: Bucket}.

    Raises:
        RuntimeError: a gradient that no step takes.
    """

    def __init__(self, optimizer, index, group, grads, accepts_sparse, old):
        self.params = list(group["params"])
        self.positions = {}
        for i, (p, grad) in enumerate(zip(self.params, grads, strict=True)):
            if grad is None:
                continue
            kind = None
            if grad.layout is not torch.strided or grad.is_complex():
                kind = "complex" if grad.is_complex() else "sparse"
                if kind == "complex" or not accepts_sparse:
                    raise RuntimeError(
                        f"{optimizer} does not support {kind} gradients: parameter {i} of group {index}, of shape "
                        f"{tuple(p.shape)}, has one"
                    )
            elif is_dtensor(p):
                kind = "distributed"
            if grad.shape != p.shape or grad.device != p.device:
                raise RuntimeError(
                    f"a parameter of group {index} is {tuple(p.shape)} on {p.device} and its gradient "
                    f"{tuple(grad.shape)} on {grad.device}"
                )
            self.positions.setdefault((kind, p.device, p.dtype, grad.dtype), []).append(i)
        # the part of a DTensor in this process may move and its gradient be another one's: look again each time
        self.look = None if any(map(is_dtensor, self.params)) else _look(self.params, grads)
        self.buckets = {key: old.get(key) or Bucket() for key in self.positions}
        for key, positions in self.positions.items():
            self.buckets[key].hold([self.params[i] for i in positions], [grads[i] for i in positions], key)

    def fits(self, params, grads):
        """Whether these are the parameters of this plan, where they were, with gradients of the same kinds."""
        if self.look is None or len(params) != len(self.params) or not all(map(operator.is_, params, self.params)):
            return False
        return self.look == _look(params, grads)

    def take(self, group, grads):
        """Yield each bucket and the kind of its gradients, ready for a step."""
        for key, bucket in self.buckets.items():
            bucket.group = group
            bucket.raw_grads = [grads[i] for i in self.positions[key]]
            yield key[0], bucket


def _look(params, grads):
    """What must stay the same for a plan to fit."""
    return [
        g if g is None else (g.dtype, g.layout, p.data_ptr(), p.numel(), p.stride())
        for p, g in zip(params, grads, strict=True)
    ]


class Bucket:
    """The parameters of one group, device, dtype and kind of gradient, and what can be kept from step to step.

    Reading sizes and strides of every tensor costs as much as updating a small network. So those of the state are read
    again only when a parameter lies elsewhere or a state tensor is another one.

    Attributes:
        group: the param group.
        params: as the user has them; `local` is where their elements are in this process, `grads` those of the
            gradients, in the memory order of the parameters.
        states: the optimizer's dictionary of each, None where it must be looked up.
        refusal: None, or the sentence why our kernels cannot update them.
    """

    def __init__(self):
        self.backend = self.table = None

    def hold(self, params, grads, key):
        """Take these parameters, with gradients of one kind."""
        kind, _, dtype, grad_dtype = key
        self.params, self.distributed = params, kind == "distributed"
        self.local = [p._local_tensor for p in params] if self.distributed else params
        self.memory = [(p.data_ptr(), p.shape, p.stride()) for p in self.local]
        self.states = self.state = None
        self.refusal = _memory_refusal(self.local)
        if kind == "sparse":
            self.refusal = "a gradient is sparse, and the kernels read all of it"
        elif dtype != grad_dtype:
            self.refusal = f"a parameter is {dtype} and its gradient {grad_dtype}"
        elif self.distributed and not all(
            is_dtensor(g) and g.placements == p.placements for p, g in zip(params, grads, strict=True)
        ):
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
        grads = [local(g) for g in self.raw_grads] if self.distributed else self.raw_grads
        self.grads = [
            g if g.stride() == memory[2] else in_order_of(g, p, p.dtype)
            for g, p, memory in zip(grads, self.local, self.memory, strict=True)
        ]
        addresses = [g.data_ptr() for g in self.grads]
        fixed = (self.memory, self.state_ints)
        known = self.backend == backend and all(map(operator.is_, fixed, self.fixed))
        if known and backend == "cpu":
            if addresses != self.table.rows[1]:
                self.table.rows[1] = self.table.table[1] = addresses
        elif not known or addresses != self.table.rows[1]:
            rows = [[memory[0] for memory in self.memory], addresses, *self.state_ints]
            previous = self.table if self.backend == backend else None
            self.table = Table(rows, self.streamed, self.sizes, self.local[0].device, backend, previous)
            self.backend, self.fixed = backend, fixed

    def launch_keywords(self):
        """The compile-time arguments that all Triton kernels take."""
        import triton.language as tl

        dtypes = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
        dtype = dtypes.get(self.params[0].dtype, tl.float64)
        return dict(DTYPE=dtype, ALIGNED=self.table.aligned, BLOCK=BLOCK, num_warps=WARPS, maxnreg=REGISTERS)
