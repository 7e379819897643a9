"""The step that our optimizers share: all tensors of a group with one dtype and device are updated by one launch.

Constructor, param groups, hooks and state_dict are torch.optim's, so a checkpoint of one loads into the other. A step
has two passes: the first checks every gradient, chooses what runs and creates missing state; the second updates. So an
error leaves all parameters as they were. What may be asked for besides torch's arguments: see options.py.
"""

import operator
from functools import partial

import torch

from fastcnn.backends import current_backend
from fastcnn.ops import common
from fastcnn.optim.norms import clip_factor
from fastcnn.optim.options import AVERAGE_DTYPES, Options
from fastcnn.optim.table import NUMPY_LIKE, Plan, in_order_of, is_dtensor, local


def number(value):
    """A hyperparameter as a float. A tensor on a GPU would wait for it: `_why_not` keeps those away."""
    return value.item() if isinstance(value, torch.Tensor) else float(value)


def _is_on_gpu(value):
    return isinstance(value, torch.Tensor) and value.is_cuda


def _why_not(backend, bucket, slower):
    if torch.compiler.is_compiling():
        return "torch.compile traces PyTorch's own step"
    group = bucket.group
    if group.get("differentiable"):
        return "differentiable=True records every operation, and a kernel is one to autograd"
    dtype = bucket.params[0].dtype
    if backend == "cpu" and dtype not in NUMPY_LIKE:
        return f"the CPU kernels take float32 and float64 parameters and got {dtype}"
    if dtype not in common.FLOATS:
        return f"the kernels take fp16, bf16, fp32 and fp64 parameters and got {dtype}"
    for name, value in group.items() if backend == "triton" else ():
        values = value if isinstance(value, (tuple, list)) else (value,)
        if name not in ("params", "lr") and any(map(_is_on_gpu, values)):
            return f"{name} is a tensor on a GPU, and the kernels take it from the host"
    if bucket.refusal is None and backend == "cpu" and slower is not None and current_backend() == "auto":
        return slower
    return bucket.refusal


class MultiTensorStep(Options):
    """Mixin: `step` of a torch.optim optimizer by our kernels.

    A subclass has `_op`; `_names(group)`, the state tensors shaped as their parameter; `_launch_cpu` and
    `_launch_triton`; and `_torch_update`, the same step by PyTorch.
    """

    # GradScaler hands us grad_scale and found_inf instead of waiting for the GPU
    _step_supports_amp_scaling = True
    _scalars = ()  # the state that is one number per parameter
    _accepts_sparse = False

    def __setstate__(self, state):
        super().__setstate__(state)
        self._plans = {}  # let go of the state that a checkpoint replaces

    def step(self, closure=None):
        """Update every parameter that has a gradient; as torch.optim.

        Args:
            closure: function that computes the loss again and returns it, or None.

        Returns:
            what closure returned, or None.

        Raises:
            RuntimeError: a gradient is sparse (but for SGD and Adagrad) or complex; nothing was updated.
            NotImplementedError: an option (see the module) that gradients of this kind cannot have.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
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
        self._take_state([bucket for backend, bucket in launches if backend != "torch"])
        for backend, bucket in launches:
            if scale is not None and backend != "triton":
                for grad in {id(p.grad): p.grad for p in bucket.params}.values():
                    grad.div_(number(scale))
            if backend != "torch":
                bucket.make_table(backend)
        clip = None
        if "max_grad_norm" in self.defaults and launches:
            clip = clip_factor(launches, float(self.defaults["max_grad_norm"]), scale)
            self.grad_norm = clip[1]
        for backend, bucket in launches:
            if backend == "torch":
                self._update_torch(bucket, clip)
                continue
            # the kernel writes where autograd does not see it: a backward that needs the old values must notice
            torch.autograd.graph.increment_version(bucket.params)
            if backend == "cpu":
                common.cpu_threads(bucket.total // 8)  # waking a second thread costs as much as 250,000 elements
                self._launch_cpu(bucket, self._cpu_arguments(bucket, clip))
            else:
                self._update_triton(bucket, scale, found, clip)

    def _begin(self):
        """The buckets of this step; raises what is wrong with a gradient before anything is changed."""
        plans = self.__dict__.setdefault("_plans", {})
        buckets = []
        for index, group in enumerate(self.param_groups):
            params = group["params"]
            grads = [p.grad for p in params]
            plan = plans.get(index)
            if plan is None or not plan.fits(params, grads):
                old = {} if plan is None else plan.buckets
                plan = plans[index] = Plan(type(self).__name__, index, group, grads, self._accepts_sparse, old)
            for kind, bucket in plan.take(group, grads):
                if kind is not None:
                    self._check_kind(kind, group)
                if bucket.params[0].is_cuda and not group.get("capturable", True):
                    if torch.cuda.is_current_stream_capturing():
                        raise RuntimeError(f"{type(self).__name__}.step in a CUDA graph needs capturable=True")
                buckets.append(bucket)
        return buckets

    def _take_state(self, buckets):
        """Give the buckets their state, created where missing. Looking up a tensor in a dictionary is slow."""
        keys, values = self.__dict__.get("_seen", ((), ()))
        same = len(keys) == len(self.state) and all(map(operator.is_, self.state, keys))
        same = same and all(map(operator.is_, self.state.values(), values))
        for bucket in buckets:
            names = self._row_names(bucket.group)
            if not same or bucket.states is None:
                bucket.states = [self.state[p] for p in bucket.params] if names or self._scalars else []
            rows = self._rows(bucket)
            bucket.set_state(rows, len(rows) - len(names), self._fit)
        if not same:
            self._seen = list(self.state), list(self.state.values())

    def _check_kind(self, kind, group):
        if kind == "sparse" and (group.get("l1") or "max_grad_norm" in self.defaults):
            raise NotImplementedError("l1 and max_grad_norm do not go with sparse gradients")
        if kind == "distributed" and "max_grad_norm" in self.defaults:
            raise NotImplementedError(
                "max_grad_norm would be the norm of one process's part of DTensor parameters: call "
                "torch.nn.utils.clip_grad_norm_ before the step instead"
            )

    def _rows(self, bucket):
        """The state as it stands in the table, created where missing: `_row_names`, then the scalars."""
        names = (*self._row_names(bucket.group), *self._scalars)
        try:
            return [[state[name] for state in bucket.states] for name in names]
        except KeyError:
            for p, state in zip(bucket.params, bucket.states, strict=True):
                # as torch: all of the rule's state or nothing; half of it is an error, raised below
                started = bool(set(state) - {"ema", "bf16"})
                for name in names:
                    if name not in state and (not started or name in ("ema", "bf16")):
                        state[name] = self._new_state(name, p)
        return [[state[name] for state in bucket.states] for name in names]

    def _new_state(self, name, p):
        if name == "ema":
            return p.detach().to(AVERAGE_DTYPES.get(p.dtype, p.dtype), copy=True)
        if name == "bf16":
            return p.detach().to(torch.bfloat16)
        if name in self._scalars:
            return torch.zeros((), dtype=torch.float32, device=p.device)
        return torch.zeros_like(p)

    def _fit(self, group, params, rows):
        names = self._row_names(group)
        for name, row in zip(names, rows, strict=False):
            for i, p in enumerate(params):
                dtype = {"ema": AVERAGE_DTYPES.get(p.dtype, p.dtype), "bf16": torch.bfloat16}.get(name, p.dtype)
                self.state[p][name] = row[i] = in_order_of(row[i], p, dtype)
                if local(row[i]).stride() != local(p).stride() and is_dtensor(p):
                    raise RuntimeError(
                        f"the state {name!r} of a DTensor parameter of shape {p.shape} is laid out unlike it"
                    )
        for name, row in zip(self._scalars, rows[len(names) :], strict=False):
            for i, p in enumerate(params):
                # a number in old checkpoints; on the CPU in those of torch's default
                self.state[p][name] = row[i] = torch.as_tensor(row[i], dtype=torch.float32, device=p.device)

    def _slower(self, bucket):
        """None, or the sentence why PyTorch is faster on CPU."""

    def _must_know_found_inf(self, bucket):
        return False

    def _after_triton(self, bucket, found):
        # the programs of one tensor all read its step: it grows when they are done
        if self._scalars:
            one = 1 if found is None else (found == 0).to(torch.float32)
            torch._foreach_add_(bucket.state[-1], one)

    def _update_triton(self, bucket, scale, found, clip):
        first, table = bucket.local[0], bucket.table
        if first.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.__dict__.setdefault("_captured", []).append(table)
        scale, found = (t if t is None else t.to(first.device, non_blocking=True) for t in (scale, found))
        with common.device_guard(first):
            if table.count:
                self._launch_triton(bucket, *self._triton_arguments(bucket, scale, found, clip))
            self._after_triton(bucket, found)
        if scale is not None:
            for p, grad in zip(bucket.params, bucket.grads, strict=True):
                if grad is not local(p.grad):
                    local(p.grad).copy_(grad)

    @staticmethod
    def _triton_arguments(bucket, scale, found, clip):
        """What the kernels take alike: the positional arguments up to `ema_weight`, and the keywords at the end."""
        group, table, first = bucket.group, bucket.table, bucket.local[0]
        lr, weight_decay, decay = group["lr"], number(group["weight_decay"]), group.get("ema_decay")
        on_device = isinstance(lr, torch.Tensor) and lr.device == first.device
        l1 = number(group.get("l1", 0.0))
        positional = (
            table.table,
            table.chunks,
            len(bucket.params),
            0.0 if on_device else number(lr),
            lr if on_device else None,
            scale,
            found,
            clip,
            -1.0 if group["maximize"] else 1.0,
            weight_decay,
            l1,
            0.0 if decay is None else 1.0 - decay,
        )
        keywords = dict(
            DECAY="none" if weight_decay == 0 else "decoupled" if group.get("decoupled_weight_decay") else "l2",
            L1=l1 != 0,
            EMA=int(decay is not None),
            BF16=int(bool(group.get("bf16_copy"))),
            **bucket.launch_keywords(),
        )
        return positional, keywords

    def _cpu_arguments(self, bucket, clip):
        """What the CPU kernels take alike: their first arguments."""
        group, table = bucket.group, bucket.table
        decay = group.get("ema_decay")
        end = 2 + len(self._row_names(group))
        bf16 = end - 1 if group.get("bf16_copy") else 0
        average = 0 if decay is None else end - (2 if bf16 else 1)
        options = (
            1.0 if clip is None else clip[0].item(),
            number(group.get("l1", 0.0)),
            average,
            0.0 if decay is None else 1.0 - decay,
            bf16,
        )
        return (
            table.table,
            table.chunks,
            NUMPY_LIKE[bucket.params[0].dtype],
            options,
            bool(group["maximize"]),
            number(group["weight_decay"]),
        )

    def _update_torch(self, bucket, clip):
        """The step by PyTorch, with our options around it."""
        group, params = bucket.group, bucket.params
        l1 = number(group.get("l1", 0.0)) * (-1 if group["maximize"] else 1)
        grads = [p.grad for p in params]
        names = [name for name in self._row_names(group) if name in ("ema", "bf16")]
        # torch creates its state where there is none at all: ours waits aside
        ours = {name: [self.state[p].pop(name, None) for p in params] for name in names}
        for name, row in ours.items():
            ours[name] = [self._new_state(name, p) if t is None else t for p, t in zip(params, row, strict=True)]
        try:
            if clip is not None or l1:
                for p in params:
                    grad = p.grad if clip is None else p.grad * clip[0].to(p.dtype)
                    p.grad = grad.add(p.sign(), alpha=l1) if l1 else grad
            self._torch_update({**group, "params": params})
        finally:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
        for name, row in ours.items():
            for p, t in zip(params, row, strict=True):
                self.state[p][name] = t.copy_(p) if name == "bf16" else t.lerp_(p.to(t.dtype), 1 - group["ema_decay"])
