"""Adam, with AMSGrad, AdamW, NAdam and RAdam: torch.optim's, with our kernels in `step`.

Formulas: kernels/triton/adam.py. State per parameter as in torch: step, exp_avg, exp_avg_sq, max_exp_avg_sq (AMSGrad),
mu_product (NAdam). On a GPU the scalars live there whatever the flags, as with torch's fused=True: a step never waits
for the GPU, and a CUDA graph can capture it.

Adam and AdamW take bias_correction=False: the plain form, in which the averages start at zero and are used as they are.
With amsgrad=True that is AMSGrad as its paper writes it (Reddi et al. 2018, algorithm 2; the maximum is always taken of
the uncorrected averages, and torch corrects it afterwards).
"""

import math

import torch
from torch.optim.adam import adam as torch_adam
from torch.optim.nadam import nadam as torch_nadam
from torch.optim.radam import radam as torch_radam

from fastcnn.backends import Op
from fastcnn.optim.multi_tensor import MultiTensorStep, number

WHY = "one kernel for all tensors: 2.5x torch's default step for LeNet-5, 4x for ResNet-50; its fused one 0.8x and 1.1x"
FLAGS = ("lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "differentiable", "decoupled_weight_decay")


class _AdamStep(MultiTensorStep):
    _rule = "adam"
    _scalars = ("step",)

    def _names(self, group):
        return ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"] if group.get("amsgrad") else ["exp_avg", "exp_avg_sq"]

    def _launch_cpu(self, bucket, arguments):
        from fastcnn.kernels.cpu.adam import ADAM, NADAM, RADAM, adam

        group = bucket.group
        adam(
            *arguments,
            bool(group["decoupled_weight_decay"]),
            number(group["lr"]),
            {"adam": ADAM, "nadam": NADAM, "radam": RADAM}[self._rule],
            bool(group.get("amsgrad")),
            number(group["betas"][0]),
            number(group["betas"][1]),
            number(group["eps"]),
            bool(group.get("bias_correction", True)),
            number(group.get("momentum_decay", 0.0)),
        )

    def _launch_triton(self, bucket, positional, keywords):
        from fastcnn.kernels.triton.adam import adam_kernel

        group = bucket.group
        beta1, beta2 = (number(beta) for beta in group["betas"])
        corrected = group.get("bias_correction", True)
        logarithms = [math.log(beta) if beta > 0 and corrected else -math.inf for beta in (beta1, beta2)]
        scalars = (beta1, logarithms[0], beta2, logarithms[1], number(group["eps"]))
        adam_kernel[(bucket.table.count,)](
            *positional,
            *scalars,
            number(group.get("momentum_decay", 0.0)),
            RULE=self._rule,
            AMSGRAD=bool(group.get("amsgrad")),
            **keywords,
        )

    def _torch_lists(self, group, *names):
        """torch's lists of the group's tensors, its state created where missing."""
        lists = {name: [] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", *names, "state_steps")}
        return lists.values(), self._init_group(group, *lists.values())


class _BiasCorrectedOrNot(_AdamStep):
    _more_options = {"bias_correction": True}

    def _torch_update(self, group):
        lists, has_complex = self._torch_lists(group, "max_exp_avg_sqs")
        beta1, beta2 = group["betas"]
        if group.get("bias_correction", True):
            flags = {name: group[name] for name in (*FLAGS, "amsgrad", "fused")}
            torch_adam(*lists, has_complex=has_complex, beta1=beta1, beta2=beta2, **flags)
            return
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = lists
        torch._foreach_add_(steps, 1)
        for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
            g = -g if group["maximize"] else g
            if group["decoupled_weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            elif group["weight_decay"] != 0:
                g = g.add(p, alpha=group["weight_decay"])
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            if group["amsgrad"]:
                v = torch.maximum(max_exp_avg_sqs[i], v, out=max_exp_avg_sqs[i])
            p.sub_(group["lr"] * m / (v.sqrt() + group["eps"]))


class Adam(_BiasCorrectedOrNot, torch.optim.Adam):
    """torch.optim.Adam with one launch per dtype and device: same arguments, same state_dict.

    Args:
        bias_correction: False uses the averages as they are, without the factors 1 / (1 - beta^t); with amsgrad=True,
            the form of its paper.
        l1, max_grad_norm, ema_decay, bf16_copy: see fastcnn.optim.options.

    Raises:
        ValueError, TypeError: as torch, and for values of these that are out of range.
    """

    _op = Op("adam", cpu_kernel=True, cpu_auto=True, why=WHY)


class AdamW(_BiasCorrectedOrNot, torch.optim.AdamW):
    """torch.optim.AdamW with one launch per dtype and device; more arguments as `Adam`."""

    _op = Op("adamw", cpu_kernel=True, cpu_auto=True, why=WHY)


class NAdam(_AdamStep, torch.optim.NAdam):
    """torch.optim.NAdam with one launch per dtype and device; more arguments see fastcnn.optim.options."""

    _op = Op("nadam", cpu_kernel=True, cpu_auto=True, why=WHY)
    _rule = "nadam"
    _scalars = ("step", "mu_product")

    def _new_state(self, name, p):
        state = super()._new_state(name, p)
        return state + 1 if name == "mu_product" else state

    def _after_triton(self, bucket, found):
        from fastcnn.kernels.triton.adam import nadam_advance_kernel

        group, count = bucket.group, len(bucket.params)
        row = 2 + len(self._row_names(group))
        scalars = (found, number(group["betas"][0]), number(group["momentum_decay"]))
        nadam_advance_kernel[(-(-count // 128),)](bucket.table.table, count, row, *scalars, BLOCK=128, num_warps=4)

    def _torch_update(self, group):
        lists, has_complex = self._torch_lists(group, "mu_products")
        flags = {name: group[name] for name in (*FLAGS, "momentum_decay")}
        beta1, beta2 = group["betas"]
        torch_nadam(*lists, has_complex=has_complex, beta1=beta1, beta2=beta2, **flags)


class RAdam(_AdamStep, torch.optim.RAdam):
    """torch.optim.RAdam with one launch per dtype and device; more arguments see fastcnn.optim.options."""

    _op = Op("radam", cpu_kernel=True, cpu_auto=True, why=WHY)
    _rule = "radam"

    def _torch_update(self, group):
        lists, has_complex = self._torch_lists(group)
        beta1, beta2 = group["betas"]
        flags = {name: group[name] for name in FLAGS}
        torch_radam(*lists, has_complex=has_complex, beta1=beta1, beta2=beta2, **flags)
