"""optim: one step over all parameters of a network. "-fused" compares with torch's fused=True, else its default."""

import torch

from fastcnn.benchmarks import cases, networks
from fastcnn.benchmarks.harness import TORCH, OptimizerProblem

# name: (class, arguments, tensors read and written per parameter, operations per parameter)
OPTIMIZERS = {
    "sgd": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}, 5, 6),
    "adam": ("Adam", {"lr": 1e-3}, 7, 14),
    "adamw": ("AdamW", {"lr": 1e-3, "weight_decay": 0.05}, 7, 16),
    "amsgrad": ("Adam", {"lr": 1e-3, "amsgrad": True}, 9, 15),
    "rmsprop": ("RMSprop", {"lr": 1e-2}, 5, 8),
    "rmsprop_centered": ("RMSprop", {"lr": 1e-2, "centered": True, "momentum": 0.9}, 9, 16),
    "adagrad": ("Adagrad", {"lr": 1e-2}, 5, 7),
    "nadam": ("NAdam", {}, 7, 18),
    "radam": ("RAdam", {}, 7, 15),
}
FUSED = ("sgd", "adam", "adamw", "amsgrad", "adagrad")  # of these torch has a fused form
NETWORKS = {"resnet50": 25.6e6, "mobilenet_v2": 3.5e6, "lenet5": 0.06e6, "vgg16": 138e6}  # parameters


def _cases():
    for turn, (network, work) in enumerate(NETWORKS.items()):
        names = list(OPTIMIZERS)
        # each network begins with another optimizer: --quick takes the first ones
        for optimizer in names[turn:] + names[:turn]:
            for fused in (False, True) if optimizer in FUSED else (False,):
                layer = {"network": network, "optimizer": optimizer, "fused": fused, "work": work / 10}
                yield cases.Case("optim", f"{network}.{optimizer}{'-fused' if fused else ''}", layer)


CASES = list(_cases())


def build(case, setting):
    name, arguments, streams, operations = OPTIMIZERS[case.layer["optimizer"]]
    with torch.device("meta"):
        shapes = [p.shape for p in networks.build(case.layer["network"]).parameters()]
    parameters = []
    for shape in shapes:
        p = cases.randn(shape, setting).requires_grad_()
        p.grad = cases.randn(shape, setting, seed=1)
        parameters.append(p)
    count = sum(p.numel() for p in parameters)

    def make(api, parameters):
        fused = {"fused": True} if case.layer["fused"] and api is TORCH else {}
        return getattr(api.optim, name)(parameters, **arguments, **fused)

    cost = {"step": (operations * count, streams * count * setting.dtype.itemsize)}
    return OptimizerProblem(f"{len(parameters)} tensors, {count / 1e6:.2f} M parameters", parameters, make, cost)
