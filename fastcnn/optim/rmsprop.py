"""RMSprop and Adagrad: torch.optim's, with our kernels in `step`.

Formulas: kernels/triton/rmsprop.py and adagrad.py. State per parameter as in torch: step, and of RMSprop square_avg,
momentum_buffer and grad_avg, of Adagrad sum.
"""

import torch
from torch.optim.adagrad import adagrad as torch_adagrad
from torch.optim.rmsprop import rmsprop as torch_rmsprop

from fastcnn.backends import Op
from fastcnn.optim.multi_tensor import MultiTensorStep, number


class RMSprop(MultiTensorStep, torch.optim.RMSprop):
    """torch.optim.RMSprop with one launch per dtype and device; more arguments see fastcnn.optim.options."""

    _op = Op(
        "rmsprop",
        cpu_kernel=True,
        cpu_auto=True,
        why="one kernel for all tensors: 2x torch's step for LeNet-5, 3x for MobileNetV2",
    )
    _scalars = ("step",)

    def _names(self, group):
        momentum = ["momentum_buffer"] if group["momentum"] != 0 else []
        return ["square_avg", *momentum, *(["grad_avg"] if group["centered"] else [])]

    def _launch_cpu(self, bucket, arguments):
        from fastcnn.kernels.cpu.rmsprop import rmsprop

        group = bucket.group
        scalars = [number(group[name]) for name in ("alpha", "eps")]
        rmsprop(*arguments, number(group["lr"]), number(group["momentum"]), bool(group["centered"]), *scalars)

    def _launch_triton(self, bucket, positional, keywords):
        from fastcnn.kernels.triton.rmsprop import rmsprop_kernel

        group = bucket.group
        scalars = [number(group[name]) for name in ("alpha", "eps", "momentum")]
        flags = dict(MOMENTUM=int(scalars[2] != 0), CENTERED=int(bool(group["centered"])))
        rmsprop_kernel[(bucket.table.count,)](*positional, *scalars, **flags, **keywords)

    def _torch_update(self, group):
        lists = [[] for _ in range(6)]
        params, grads, square_avgs, buffers, grad_avgs, steps = lists
        has_complex = self._init_group(group, *lists)
        names = (
            "lr", "alpha", "eps", "weight_decay", "momentum", "centered", "foreach", "maximize", "differentiable",
            "capturable",
        )  # fmt: skip
        flags = {name: group[name] for name in names}
        torch_rmsprop(params, grads, square_avgs, grad_avgs, buffers, steps, has_complex=has_complex, **flags)


class Adagrad(MultiTensorStep, torch.optim.Adagrad):
    """torch.optim.Adagrad with one launch per dtype and device; more arguments see fastcnn.optim.options."""

    _op = Op(
        "adagrad",
        cpu_kernel=True,
        cpu_auto=True,
        why="one kernel for all tensors: 1.8x torch's default step for LeNet-5, 2.6x for ResNet-50",
    )
    _scalars = ("step",)
    _accepts_sparse = True

    def _names(self, group):
        return ["sum"]

    def _new_state(self, name, p):
        if name == "sum":
            return torch.full_like(p, self.defaults["initial_accumulator_value"])
        return super()._new_state(name, p)

    def _launch_cpu(self, bucket, arguments):
        from fastcnn.kernels.cpu.adagrad import adagrad

        group = bucket.group
        adagrad(*arguments, *[number(group[name]) for name in ("lr", "lr_decay", "eps")])

    def _launch_triton(self, bucket, positional, keywords):
        from fastcnn.kernels.triton.adagrad import adagrad_kernel

        scalars = [number(bucket.group[name]) for name in ("lr_decay", "eps")]
        adagrad_kernel[(bucket.table.count,)](*positional, *scalars, **keywords)

    def _torch_update(self, group):
        lists = [[] for _ in range(4)]
        sparse, has_complex = self._init_group(group, *lists)
        names = ("lr", "lr_decay", "eps", "weight_decay", "foreach", "maximize", "differentiable", "fused")
        flags = {name: group[name] for name in names}
        torch_adagrad(*lists, has_sparse_grad=sparse, has_complex=has_complex, **flags)
