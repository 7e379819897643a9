"""The step that our optimizers share: all tensors of a group with one dtype and device are updated by one launch.

Constructor, param groups, hooks and state_dict are torch.optim's, so a checkpoint of one loads into the other. A step
has two passes: the first checks every gradient, chooses what runs and creates missing state; the second updates. So an
error leaves all parameters as they were.
"""

import operator
from functools import partial

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastcnn.backends import current_backend
from fastcnn.ops import common

BLOCK, WARPS = 2048, 8  # elements and warps of a program; one choice for every size: the kernels stream memory
REGISTERS = 255  # per thread: left alone, the assembler of Triton 3.6 spills to fit one more block
CPU_CHUNK = 16384  # elements per turn of a thread
NUMPY_DTYPES = {torch.float32: np.empty(0, np.float32), torch.float64: np.empty(0, np.float64)}


def in_order_of(tensor, param):
    """The tensor itself if its elements lie in memory in the order of the dense param, else a copy that does."""
    if tensor.shape != param.shape or tensor.device != param.device:
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} on {param.device} has state of shape {tuple(tensor.shape)} on "
            f"{tensor.device}: make the optimizer after changing or moving the model"
        )
    if tensor.stride() == param.stride() and tensor.dtype == param.dtype:
        return tensor
    strides = zip(tensor.stride(), param.stride(), param.shape, strict=True)
    if tensor.dtype == param.dtype and all(a == b or size == 1 for a, b, size in strides):
        return tensor
    return torch.empty_like(param).copy_(tensor)


def number(value):
    """A hyperparameter as a float. A tensor on a GPU would wait for it: `_why_not` keeps those away."""
    return value.item() if isinstance(value, torch.Tensor) else float(value)


def _is_on_gpu(value):
    return isinstance(value, torch.Tensor) and value.is_cuda


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


def _why_not(backend, bucket, slower):
    if torch.compiler.is_compiling():
        return "torch.compile traces PyTorch's own step"
    group = bucket.group
    if group["differentiable"]:
        return "differentiable=True records every operation, and a kernel is one to autograd"
    dtype = bucket.params[0].dtype
    if backend == "cpu" and dtype not in NUMPY_DTYPES:
        return f"the CPU kernels take float32 and float64 parameters and got {dtype}"
    if dtype not in common.FLOATS:
        return f"the kernels take fp16, bf16, fp32 and fp64 parameters and got {dtype}"
    for name in ("betas", "eps", "weight_decay", "momentum", "dampening"):
        values = group.get(name, ())
        if any(_is_on_gpu(v) for v in (values if isinstance(values, (tuple, list)) else (values,))):
            return f"{name} is a tensor on a GPU, and the kernels take it from the host"
    if backend == "cpu" and slower is not None and current_backend() == "auto":
        return slower
    return bucket.refusal


class Table:
    """The addresses of many tensors and the chunks of work, where the kernel reads them.

    Args:
        rows: lists of ints, one per tensor: addresses; the last row is the optimizer's own.
        sizes: numbers of elements of the tensors.
        device: of the tensors.
        previous: the table this one replaces, or None.
    """

    def __init__(self, rows, sizes, device, backend, previous):
        self.rows, self.sizes = rows, sizes
        self.host = []
        self.aligned = not any(address % 16 for row in rows[:-1] for address in row)  # 16-byte loads may start anywhere
        if backend == "cpu":
            self.table = np.array(rows, np.int64)
        else:
            self.table = self._send(np.array([*rows, sizes], np.int64), device)
        if previous is not None and previous.sizes == sizes:
            self.chunks, self.count = previous.chunks, previous.count
            return
        chunk = CPU_CHUNK if backend == "cpu" else BLOCK
        counts = -(-np.array(sizes, np.int64) // chunk)
        tensor = np.repeat(np.arange(len(sizes)), counts)
        index = np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.count = len(tensor)
        if backend == "cpu":
            length = np.minimum(np.array(sizes, np.int64)[tensor] - index * chunk, chunk)
            self.chunks = np.stack([tensor, index * chunk, length], axis=1)
        else:
            self.chunks = self._send(np.stack([tensor, index], axis=1).astype(np.int32), device)

    def _send(self, array, device):
        tensor = torch.from_numpy(array)
        if device.type != "cuda":
            return tensor
        # from pinned memory the copy is asynchronous; a CUDA graph repeats it at each replay: keep the memory
        self.host.append(tensor.pin_memory())
        return self.host[-1].to(device, non_blocking=True)


class Bucket:
    """The parameters of one group, device and dtype that have gradients, and what can be kept from step to step.

    Reading sizes and strides of every tensor costs as much as updating a small network. So those of the state are read
    again only when a parameter lies elsewhere or a state tensor is another one.
    """

    def __init__(self):
        self.memory = self.refusal = self.state = self.state_ints = self.backend = self.table = None

    def begin(self, index, group, params):
        """Look at the parameters of this step; raise if the memory of one and of its gradient disagree."""
        self.group, self.params = group, params
        memory = [(p.data_ptr(), p.shape, p.stride()) for p in params]
        if memory == self.memory:
            return
        for p in params:
            if p.grad.shape != p.shape or p.grad.device != p.device:
                raise RuntimeError(
                    f"a parameter of group {index} is {tuple(p.shape)} on {p.device} and its gradient "
                    f"{tuple(p.grad.shape)} on {p.grad.device}"
                )
        self.memory, self.state, self.refusal = memory, None, _memory_refusal(params)
        self.sizes = [p.numel() for p in params]
        self.total = sum(self.sizes)

    def set_state(self, rows, fit):
        """Take the rows of the state; fit(group, params, rows) brings those not seen before into shape."""
        if self.state is not None and len(rows) == len(self.state):
            if all(all(map(operator.is_, row, old)) for row, old in zip(rows, self.state, strict=True)):
                return
        fit(self.group, self.params, rows)
        self.state = rows
        self.state_ints = [
            [t.data_ptr() for t in row] if isinstance(row[0], torch.Tensor) else row for row in self.state
        ]

    def make_table(self, backend):
        """Gradients in the memory order of their parameters, and the table for this step."""
        grads = [
            p.grad if p.grad.stride() == memory[2] else in_order_of(p.grad, p)
            for p, memory in zip(self.params, self.memory, strict=True)
        ]
        rows = [[memory[0] for memory in self.memory], [g.data_ptr() for g in grads], *self.state_ints]
        if self.table is None or self.backend != backend or self.table.rows != rows or self.table.sizes != self.sizes:
            previous = self.table if self.backend == backend else None
            self.table = Table(rows, self.sizes, self.params[0].device, backend, previous)
            self.backend = backend
        return grads


class MultiTensorStep:
    """Mixin: `step` of a torch.optim optimizer by our kernels.

    A subclass has `_op`; `_names(group)`, the state tensors shaped as their parameter; `_rows(group, params)`, these
    and one row more, created where missing, as they stand in the table; `_launch_cpu` and `_launch_triton`; and
    `_torch_update`, the same step by PyTorch.
    """

    # GradScaler hands us grad_scale and found_inf instead of waiting for the GPU
    _step_supports_amp_scaling = True

    def __setstate__(self, state):
        super().__setstate__(state)
        self._buckets = {}  # let go of the state that a checkpoint replaces

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        for i, p in enumerate(self.param_groups[-1]["params"]):
            if p.is_complex() or p.layout != torch.strided:
                self.param_groups.pop()
                kind = "complex" if p.is_complex() else "sparse"
                raise ValueError(f"{type(self).__name__} does not support {kind} parameters: params[{i}] is {p.dtype}")

    def step(self, closure=None):
        """Update every parameter that has a gradient; as torch.optim.

        Args:
            closure: function that computes the loss again and returns it, or None.

        Returns:
            what closure returned, or None.

        Raises:
            RuntimeError: a gradient is sparse or complex; nothing was updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step()
        return loss

    def _step(self):
        launches = []
        for bucket in self._begin():
            why_not = partial(_why_not, bucket=bucket, slower=self._slower(bucket))
            launches.append((self._op.route(bucket.params[0], why_not), bucket))
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found is not None:
            # a kernel on the GPU asks there; others must know now, before any state is created
            launches = [
                (backend, bucket)
                for backend, bucket in launches
                if (backend == "triton" and not self._must_know_found_inf(bucket)) or not found.item()
            ]
        for backend, bucket in launches:
            if backend != "torch":
                bucket.set_state(self._rows(bucket.group, bucket.params), self._fit)
        for backend, bucket in launches:
            params = bucket.params
            if scale is not None and backend != "triton":
                torch._foreach_div_(list({id(p.grad): p.grad for p in params}.values()), number(scale))
            if backend == "torch":
                self._torch_update({**bucket.group, "params": params})
                continue
            grads = bucket.make_table(backend)
            # the kernel writes where autograd does not see it: a backward that needs the old values must notice
            torch.autograd.graph.increment_version(params)
            if backend == "cpu":
                common.cpu_threads(bucket.total // 8)  # waking a second thread costs as much as 250,000 elements
                self._launch_cpu(bucket.group, bucket.table, NUMPY_DTYPES[params[0].dtype])
            else:
                self._update_triton(bucket, grads, scale, found)

    def _begin(self):
        """The buckets of this step; raises what is wrong with a gradient before anything is changed."""
        members = {}
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided or grad.is_complex():
                    kind = "complex" if grad.is_complex() else "sparse"
                    raise RuntimeError(
                        f"{type(self).__name__} does not support {kind} gradients: parameter {i} of group {index}, of "
                        f"shape {tuple(p.shape)}, has one"
                    )
                members.setdefault((index, p.device, p.dtype), []).append(p)
        kept = self.__dict__.setdefault("_buckets", {})
        buckets = []
        for key, params in members.items():
            bucket = kept.setdefault(key, Bucket())
            bucket.begin(key[0], self.param_groups[key[0]], params)
            if params[0].is_cuda and not bucket.group.get("capturable", True):
                if torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(f"{type(self).__name__}.step in a CUDA graph needs capturable=True")
            buckets.append(bucket)
        return buckets

    def _fit(self, group, params, rows):
        for name, row in zip(self._names(group), rows, strict=False):
            for i, p in enumerate(params):
                self.state[p][name] = row[i] = in_order_of(row[i], p)

    def _slower(self, bucket):
        """None, or the sentence why PyTorch is faster on CPU."""

    def _must_know_found_inf(self, bucket):
        return False

    def _after_triton(self, bucket, found):
        pass

    def _update_triton(self, bucket, grads, scale, found):
        params, table = bucket.params, bucket.table
        device = params[0].device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.__dict__.setdefault("_captured", []).append(table)
        if scale is not None:
            scale = scale.to(device, non_blocking=True)
        if found is not None:
            found = found.to(device, non_blocking=True)
        with common.device_guard(params[0]):
            if table.count:
                self._launch_triton(bucket.group, table, *self._triton_arguments(bucket, scale, found))
            self._after_triton(bucket, found)
        if scale is not None:
            for p, grad in zip(params, grads, strict=True):
                if grad is not p.grad:
                    p.grad.copy_(grad)

    @staticmethod
    def _triton_arguments(bucket, scale, found):
        """What both kernels take alike: the positional arguments up to `sign`, and the keywords at the end."""
        import triton.language as tl

        group, table, params = bucket.group, bucket.table, bucket.params
        dtypes = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
        lr = group["lr"]
        on_device = isinstance(lr, torch.Tensor) and lr.device == params[0].device
        positional = (
            table.table,
            table.chunks,
            len(params),
            0.0 if on_device else number(lr),
            lr if on_device else None,
            scale,
            found,
            -1.0 if group["maximize"] else 1.0,
        )
        keywords = dict(
            DTYPE=dtypes.get(params[0].dtype, tl.float64),
            ALIGNED=table.aligned,
            BLOCK=BLOCK,
            num_warps=WARPS,
            maxnreg=REGISTERS,
        )
        return positional, keywords
