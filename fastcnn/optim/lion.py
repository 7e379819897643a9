"""Lion: the sign of an interpolated momentum. Formulas: kernels/triton/lion.py. State per parameter: exp_avg."""

import torch

from fastcnn.backends import Op
from fastcnn.optim.multi_tensor import MultiTensorStep, number


class _PlainLion(torch.optim.Optimizer):
    """Lion without our step: its arguments and their checks."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False):
        if not 0 <= lr:
            raise ValueError(f"lr must not be negative, got {lr}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        if not 0 <= weight_decay:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
        defaults = dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize, decoupled_weight_decay=True)
        super().__init__(params, defaults)


class Lion(MultiTensorStep, _PlainLion):
    """Lion: p = p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g), m = beta2 * m + (1 - beta2) * g.

    Args:
        lr: about a tenth of AdamW's, with ten times its weight_decay.
        betas: of the step's direction and of the average kept.
        weight_decay: decoupled.
        maximize: as torch.optim.
        l1, max_grad_norm, ema_decay, bf16_copy: see fastcnn.optim.options.

    Source: Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2.
    """

    _op = Op("lion", cpu_kernel=True, cpu_auto=True, why="one kernel for all tensors; PyTorch has no Lion")

    def _names(self, group):
        return ["exp_avg"]

    def _launch_cpu(self, bucket, arguments):
        from fastcnn.kernels.cpu.lion import lion

        lion(*arguments, number(bucket.group["lr"]), *map(number, bucket.group["betas"]))

    def _launch_triton(self, bucket, positional, keywords):
        from fastcnn.kernels.triton.lion import lion_kernel

        lion_kernel[(bucket.table.count,)](*positional, *map(number, bucket.group["betas"]), **keywords)

    def _torch_update(self, group):
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            state = self.state[p]
            m = state.setdefault("exp_avg", torch.zeros_like(p))
            g = -p.grad if group["maximize"] else p.grad
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(group["lr"] * torch.lerp(m, g, 1 - beta1).sign())
            m.lerp_(g, 1 - beta2)
