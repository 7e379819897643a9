"""The step that our optimizers share: all tensors of a group with one dtype and device are updated by one launch.

Constructor, param groups, hooks and state_dict are torch.optim's, so a checkpoint of one loads into the other. A step
has two passes: the first checks every gradient, chooses what runs and creates missing state; the second updates. An error
leaves all parameters as they were.
"""

from functools import partial

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastcnn.ops import common

BLOCK, WARPS = 2048, 8  # elements and warps of a program; one choice for every size: the kernels stream memory
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


def _why_not(backend, group, params):
    if torch.compiler.is_compiling():
        return "torch.compile traces PyTorch's own step"
    if group["differentiable"]:
        return "differentiable=True records every operation, and a kernel is one to autograd"
    dtype = params[0].dtype
    if backend == "cpu" and dtype not in NUMPY_DTYPES:
        return f"the CPU kernels take float32 and float64 parameters and got {dtype}"
    if dtype not in common.FLOATS:
        return f"the kernels take fp16, bf16, fp32 and fp64 parameters and got {dtype}"
    for name in ("betas", "eps", "weight_decay", "momentum", "dampening"):
        values = group.get(name, ())
        if any(_is_on_gpu(v) for v in (values if isinstance(values, (tuple, list)) else (values,))):
            return f"{name} is a tensor on a GPU, and the kernels take it from the host"
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


class MultiTensorStep:
    """Mixin: `step` of a torch.optim optimizer by our kernels.

    A subclass has `_op`, `_rows(group, params)` (state, created where missing, as rows of the table after parameters
    and gradients), `_launch_cpu`, `_launch_triton` and `_torch_update` (the same step by PyTorch).
    """

    # GradScaler hands us grad_scale and found_inf instead of waiting for the GPU
    _step_supports_amp_scaling = True

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        for i, p in enumerate(self.param_groups[-1]["params"]):
            if p.is_complex() or p.layout != torch.strided:
                self.param_groups.pop()
                kind = "complex" if p.is_complex() else "sparse"
                raise ValueError(f"{type(self).__name__} does not support {kind} parameters: params[{i}] is {p.dtype}")

    def _validate(self):
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if p.grad.shape != p.shape or p.grad.device != p.device:
                    raise RuntimeError(
                        f"parameter {i} of group {index} is {tuple(p.shape)} on {p.device} and its gradient "
                        f"{tuple(p.grad.shape)} on {p.grad.device}"
                    )
                if p.grad.layout != torch.strided or p.grad.is_complex():
                    kind = "complex" if p.grad.is_complex() else "sparse"
                    raise RuntimeError(
                        f"{type(self).__name__} does not support {kind} gradients: parameter {i} of group {index}, of "
                        f"shape {tuple(p.shape)}, has one"
                    )

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
        self._validate()
        launches = []
        for index, group in enumerate(self.param_groups):
            buckets = {}
            for p in group["params"]:
                if p.grad is not None:
                    buckets.setdefault((p.device, p.dtype), []).append(p)
            for key, params in buckets.items():
                if params[0].is_cuda and torch.cuda.is_current_stream_capturing() and not group.get("capturable", True):
                    raise RuntimeError(f"capturing {type(self).__name__}.step in a CUDA graph needs capturable=True")
                backend = self._op.route(params[0], partial(_why_not, group=group, params=params))
                launches.append((backend, (index, *key), group, params))
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found is not None:
            # a kernel on the GPU asks there; others must know now, before any state is created
            launches = [
                (backend, key, group, params)
                for backend, key, group, params in launches
                if (backend == "triton" and not self._must_know_found_inf(group, params)) or not found.item()
            ]
        prepared = [backend != "torch" and self._rows(group, params) for backend, _, group, params in launches]
        for (backend, key, group, params), rows in zip(launches, prepared, strict=True):
            if scale is not None and backend != "triton":
                torch._foreach_div_(list({id(p.grad): p.grad for p in params}.values()), number(scale))
            if backend == "torch":
                self._torch_update({**group, "params": params})
            else:
                self._update(backend, key, group, params, rows, scale, found)

    def _must_know_found_inf(self, group, params):
        return False

    def _after_triton(self, rows, found):
        pass

    def _update(self, backend, key, group, params, rows, scale, found):
        """Run our kernel on parameters of one device and dtype; rows are what `_rows` returned."""
        device = params[0].device
        grads = [in_order_of(p.grad, p) for p in params]
        rows = [params, grads, *rows]
        ints = [[t.data_ptr() for t in row] if isinstance(row[0], torch.Tensor) else row for row in rows]
        sizes = [p.numel() for p in params]
        tables = self.__dict__.setdefault("_tables", {})
        key = (backend, *key)
        table = tables.get(key)
        if table is None or table.rows != ints or table.sizes != sizes:
            table = tables[key] = Table(ints, sizes, device, backend, table)
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                self.__dict__.setdefault("_captured", []).append(table)
        if backend == "cpu":
            common.cpu_threads(sum(sizes))
            self._launch_cpu(group, table, NUMPY_DTYPES[params[0].dtype])
            return
        if scale is not None:
            scale = scale.to(device, non_blocking=True)
        if found is not None:
            found = found.to(device, non_blocking=True)
        with common.device_guard(params[0]):
            self._launch_triton(group, table, *self._triton_arguments(group, table, params, scale, found))
            self._after_triton(rows, found)
        if scale is not None:
            for p, grad in zip(params, grads, strict=True):
                if grad is not p.grad:
                    p.grad.copy_(grad)

    @staticmethod
    def _triton_arguments(group, table, params, scale, found):
        """What both kernels take alike: the positional arguments up to `sign`, and the keywords at the end."""
        import triton.language as tl

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
            DTYPE=dtypes.get(params[0].dtype, tl.float64), ALIGNED=table.aligned, BLOCK=BLOCK, num_warps=WARPS
        )
        return positional, keywords
