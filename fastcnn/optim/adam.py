"""Adam, with AMSGrad, and AdamW: torch.optim's, with our kernels in `step`. Formulas: kernels/triton/adam.py.

State per parameter as in torch: step, exp_avg, exp_avg_sq, max_exp_avg_sq (AMSGrad). On a GPU the step count lives
there whatever the flags, as with torch's fused=True: a step never waits for the GPU, and a CUDA graph can capture it.
"""

import math

import numpy as np
import torch
from torch.optim.adam import adam as torch_adam

from fastcnn.backends import Op
from fastcnn.optim.multi_tensor import MultiTensorStep, number

WHY = "one kernel for all tensors: 3x torch's default step, equal to its fused one (LeNet-5, ResNet-50)"


class _AdamStep(MultiTensorStep):
    def _names(self, group):
        return ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"] if group["amsgrad"] else ["exp_avg", "exp_avg_sq"]

    def _rows(self, group, params):
        names = self._names(group)
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                for name in names:
                    state[name] = torch.zeros_like(p)
        return [[state[name] for state in states] for name in (*names, "step")]

    def _fit(self, group, params, rows):
        super()._fit(group, params, rows)
        for i, p in enumerate(params):
            # a number in old checkpoints; on the CPU in those of torch's default
            self.state[p]["step"] = rows[-1][i] = torch.as_tensor(rows[-1][i], dtype=torch.float32, device=p.device)

    def _launch_cpu(self, group, table, like):
        from fastcnn.kernels.cpu.adam import adam

        adam(
            table.table,
            table.chunks,
            like,
            np.empty(0, np.float32),
            number(group["lr"]),
            number(group["betas"][0]),
            number(group["betas"][1]),
            number(group["eps"]),
            number(group["weight_decay"]),
            bool(group["decoupled_weight_decay"]),
            bool(group["amsgrad"]),
            bool(group["maximize"]),
        )

    def _launch_triton(self, group, table, positional, keywords):
        from fastcnn.kernels.triton.adam import adam_kernel

        beta1, beta2 = (number(beta) for beta in group["betas"])
        weight_decay = number(group["weight_decay"])
        decay = "none" if weight_decay == 0 else "decoupled" if group["decoupled_weight_decay"] else "l2"
        logarithms = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]
        scalars = (beta1, logarithms[0], beta2, logarithms[1], number(group["eps"]), weight_decay)
        adam_kernel[(table.count,)](*positional, *scalars, DECAY=decay, AMSGRAD=bool(group["amsgrad"]), **keywords)

    def _after_triton(self, bucket, found):
        # the programs of one tensor all read its step: it grows when they are done
        one = 1 if found is None else (found == 0).to(torch.float32)
        torch._foreach_add_(bucket.state[-1], one)

    def _torch_update(self, group):
        names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")
        lists = {name: [] for name in names}
        has_complex = self._init_group(group, *lists.values())
        torch_adam(
            *lists.values(),
            has_complex=has_complex,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            **{
                name: group[name]
                for name in (
                    "amsgrad",
                    "lr",
                    "weight_decay",
                    "eps",
                    "maximize",
                    "foreach",
                    "capturable",
                    "differentiable",
                    "fused",
                    "decoupled_weight_decay",
                )
            },
        )


class Adam(_AdamStep, torch.optim.Adam):
    """torch.optim.Adam with one launch per dtype and device: same arguments, same state_dict."""

    _op = Op("adam", cpu_kernel=True, cpu_auto=True, why=WHY)


class AdamW(_AdamStep, torch.optim.AdamW):
    """torch.optim.AdamW with one launch per dtype and device: same arguments, same state_dict."""

    _op = Op("adamw", cpu_kernel=True, cpu_auto=True, why=WHY)
