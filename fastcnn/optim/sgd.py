"""SGD with momentum, dampening and Nesterov's form: torch.optim's, with our kernels in `step`; and LARS.

Formulas: kernels/triton/sgd.py. State per parameter as in torch: momentum_buffer.
"""

import numpy as np
import torch
from torch.optim.sgd import sgd as torch_sgd

from fastcnn.backends import Op, current_backend, interpreting
from fastcnn.ops import common
from fastcnn.optim.multi_tensor import MultiTensorStep, number
from fastcnn.optim.norms import SUMS_AT_ONCE, square_sums


class _SGDStep(MultiTensorStep):
    _accepts_sparse = True

    def _names(self, group):
        return ["momentum_buffer"] if group["momentum"] != 0 else []

    def _rows(self, bucket):
        if bucket.group["momentum"] == 0:
            return [*super()._rows(bucket), [0] * len(bucket.params)]
        first = [int(state.get("momentum_buffer") is None) for state in bucket.states]
        if any(first):
            for p, state, new in zip(bucket.params, bucket.states, first, strict=True):
                if new:
                    state["momentum_buffer"] = torch.zeros_like(p)
        return [*super()._rows(bucket), first]

    def _ratios(self, backend, bucket, scale, clip):
        """What the gradient of each tensor is multiplied by: fp64, or None."""

    def _launch_cpu(self, bucket, arguments):
        from fastcnn.kernels.cpu.sgd import sgd

        group, ratios = bucket.group, self._ratios("cpu", bucket, None, arguments[3][0])
        scalars = [number(group[name]) for name in ("momentum", "dampening")]
        sgd(*arguments, number(group["lr"]), NO_RATIOS if ratios is None else ratios, *scalars, bool(group["nesterov"]))

    def _launch_triton(self, bucket, positional, keywords):
        from fastcnn.kernels.triton.sgd import sgd_kernel

        group = bucket.group
        scalars = [number(group[name]) for name in ("momentum", "dampening")]
        flags = dict(MOMENTUM=int(scalars[0] != 0), NESTEROV=bool(group["nesterov"]))
        ratios = self._ratios("triton", bucket, positional[5], positional[7])
        sgd_kernel[(bucket.table.count,)](*positional, ratios, *scalars, **flags, **keywords)

    def _must_know_found_inf(self, bucket):
        # a step that is skipped on the GPU would leave buffers of zeros: the same start, but for dampening
        group = bucket.group
        started = all(self.state.get(p, {}).get("momentum_buffer") is not None for p in bucket.params)
        return group["momentum"] != 0 and group["dampening"] != 0 and not started


NO_RATIOS = np.empty(0)
PLAIN = "without momentum and decay PyTorch's loop is faster (ResNet-50: 10.0 against 10.7 ms)"


class SGD(_SGDStep, torch.optim.SGD):
    """torch.optim.SGD with one launch per dtype and device: same arguments, same state_dict.

    Args:
        l1, max_grad_norm, ema_decay, bf16_copy: see fastcnn.optim.options.
    """

    _op = Op(
        "sgd",
        cpu_kernel=True,
        cpu_auto=True,
        why="one kernel for all tensors: with momentum 1.2x torch's default step for LeNet-5, 2.3x for ResNet-50",
    )

    def _step(self):
        if current_backend() == "auto" and all(map(self._is_plain, self.param_groups)):
            # looking at the parameters as we must takes as long as PyTorch's whole step
            for group in self.param_groups:
                self._op.route(group["params"][0], lambda _: PLAIN)
                self._torch_update(group)
            return
        super()._step()

    def _is_plain(self, group):
        options = ("momentum", "weight_decay", "l1", "ema_decay", "bf16_copy")
        return (
            not any(group.get(name) for name in options)
            and not any(hasattr(self, name) for name in ("grad_scale", "found_inf"))
            and "max_grad_norm" not in self.defaults
            and len(group["params"]) > 0
            and group["params"][0].device.type == "cpu"
            and not interpreting()
        )

    def _slower(self, bucket):
        if bucket.group["momentum"] == 0 and bucket.total < 2**20:
            return "without momentum PyTorch's loop is faster for few parameters (LeNet-5: 0.09 against 0.16 ms)"
        return None

    def _torch_update(self, group):
        params, grads, buffers = [], [], []
        sparse = self._init_group(group, params, grads, buffers)
        names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize", "foreach", "fused")
        torch_sgd(params, grads, buffers, has_sparse_grad=sparse, **{name: group[name] for name in names})
        if group["momentum"] != 0:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer


class _PlainLARS(torch.optim.Optimizer):
    """LARS without our step: its arguments and their checks."""

    def __init__(
        self,
        params,
        lr=1e-3,
        momentum=0,
        dampening=0,
        weight_decay=0,
        nesterov=False,
        *,
        trust_coefficient=1e-3,
        eps=1e-8,
        maximize=False,
    ):
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            trust_coefficient=trust_coefficient,
            eps=eps,
            maximize=maximize,
        )
        for name in ("lr", "momentum", "weight_decay", "trust_coefficient", "eps"):
            if not 0 <= defaults[name]:
                raise ValueError(f"{name} must not be negative, got {defaults[name]}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        super().__init__(params, defaults)


class LARS(_SGDStep, _PlainLARS):
    """SGD whose gradient is scaled per tensor by the norm of the parameter over that of the gradient.

    ratio = trust_coefficient * |p| / (|g| + weight_decay * |p| + eps), 1 where |p| or |g| is 0; then SGD's step on
    ratio * (g + weight_decay * p), with torch's momentum forms: the learning rate stays outside the buffer (the paper
    has it inside, which differs where it changes). In a param group with trust_coefficient=0 the ratio is 1: SGD, as is
    usual for biases and batch norm.

    Args:
        lr, momentum, dampening, weight_decay, nesterov, maximize: as torch.optim.SGD.
        trust_coefficient: the paper's eta.
        eps: keeps the denominator from 0.
        l1, max_grad_norm, ema_decay, bf16_copy: see fastcnn.optim.options. The norm is that of the clipped
            gradient without the L1 penalty.

    Source: You et al. 2017, "Large batch training of convolutional networks", algorithm 1.
    """

    _op = Op("lars", cpu_kernel=True, cpu_auto=True, why="one kernel for all tensors; PyTorch has no LARS")
    _accepts_sparse = False

    def _check_kind(self, kind, group):
        super()._check_kind(kind, group)
        if kind == "distributed" and group["trust_coefficient"]:
            raise NotImplementedError("LARS would take the norm of one process's part of DTensor parameters")

    def _ratios(self, backend, bucket, scale, clip):
        group, table, tensors = bucket.group, bucket.table, len(bucket.params)
        trust, weight_decay, eps = (number(group[name]) for name in ("trust_coefficient", "weight_decay", "eps"))
        if trust == 0:
            return None
        sums = torch.empty(2 * table.count, dtype=torch.float64, device=bucket.params[0].device)
        square_sums(backend, bucket, sums, parameters=True)
        if backend == "cpu":
            sums = sums.view(2, -1).numpy()
            # bincount adds the chunks in their order
            g, p = (np.sqrt(np.bincount(table.chunks[:, 0], weights=row, minlength=tensors)) for row in sums)
            g = g * clip
            zero = (g == 0) | (p == 0)
            return np.where(zero, 1.0, trust * p / np.where(zero, 1.0, g + weight_decay * p + eps))
        from fastcnn.kernels.triton.multi_tensor_norm import lars_kernel

        ratios = torch.empty(tensors, dtype=torch.float64, device=sums.device)
        with common.device_guard(sums):
            lars_kernel[(tensors,)](
                sums, table.starts, table.count, ratios, scale, clip, trust, weight_decay, eps, BLOCK=SUMS_AT_ONCE
            )
        return ratios

    def _torch_update(self, group):
        for p in group["params"]:
            g, decay = p.grad, group["weight_decay"]
            ratio = 1.0
            if group["trust_coefficient"]:
                # without the L1 penalty that `_update_torch` has added
                l1 = group.get("l1", 0.0) * (-1 if group["maximize"] else 1)
                p_norm, g_norm = p.norm(), g.sub(p.sign(), alpha=l1).norm()
                ratio = group["trust_coefficient"] * p_norm / (g_norm + decay * p_norm + group["eps"])
                ratio = torch.where((p_norm == 0) | (g_norm == 0), 1.0, ratio)
            g = ratio * ((-g if group["maximize"] else g) + decay * p)
            if group["momentum"] != 0:
                state = self.state[p]
                b = state.get("momentum_buffer")
                b = g.clone() if b is None else b.mul_(group["momentum"]).add_(g, alpha=1 - group["dampening"])
                state["momentum_buffer"] = b
                g = g + group["momentum"] * b if group["nesterov"] else b
            p.sub_(group["lr"] * g)
