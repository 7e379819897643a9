"""torch.optim.lr_scheduler and what it lacks: 1/t and inverse square root decay, a warm-up before any decay.

Every other name is torch's own: StepLR, ExponentialLR, CosineAnnealingLR, LinearLR, CyclicLR, ReduceLROnPlateau,
CosineAnnealingWarmRestarts (SGDR), ... t counts the calls of `step`.
"""

import numbers

import torch.optim.lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, SequentialLR

__all__ = ["InverseSquareRootLR", "InverseTimeLR", "scaled_lr", "with_warmup"]


def __getattr__(name):
    return getattr(torch.optim.lr_scheduler, name)


def _check_positive(name, value, kind):
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {'an int' if kind is int else 'a number'}, got {value!r}")
    if not value > 0:
        raise ValueError(f"{name} must be more than 0, got {value}")


class InverseTimeLR(LRScheduler):
    """1/t decay: lr = lr0 / (1 + k t).

    Args:
        optimizer: torch.optim.Optimizer; each group has its own lr0.
        k: above 0; after 1/k steps the rate has halved.
        last_epoch: t to go on from, -1 for a new run.
    """

    def __init__(self, optimizer, k, last_epoch=-1):
        _check_positive("k", k, numbers.Real)
        self.k = k
        super().__init__(optimizer, last_epoch)

    def get_lr(self):
        return [lr / (1 + self.k * self.last_epoch) for lr in self.base_lrs]


class InverseSquareRootLR(LRScheduler):
    """lr = lr0 / sqrt(t), with lr0 for t = 0 and 1. Source: Vaswani et al. 2017.

    Args:
        optimizer: torch.optim.Optimizer; each group has its own lr0.
        last_epoch: t to go on from, -1 for a new run.
    """

    def get_lr(self):
        return [lr / max(self.last_epoch, 1) ** 0.5 for lr in self.base_lrs]


class _Ramp:
    # a class, so that a schedule can be pickled
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, t):
        return t / self.steps


def with_warmup(optimizer, steps, make):
    """A schedule that rises from 0 in a straight line, lr = lr0 t / steps, and then goes on as another from its t = 0.

    Source: Goyal et al. 2017. The other's rate must be a function of its t, as all of torch's are but MultiplicativeLR
    and ReduceLROnPlateau.

    Args:
        optimizer: torch.optim.Optimizer.
        steps: calls of `step` until lr0 is reached, e.g. 5000 iterations.
        make: function of the optimizer that returns the schedule after it, e.g. lambda o: CosineAnnealingLR(o, 90000).

    Returns:
        torch.optim.lr_scheduler.SequentialLR.
    """
    _check_positive("steps", steps, int)
    schedules = [LambdaLR(optimizer, _Ramp(steps)), make(optimizer)]
    if isinstance(
        schedules[1], (torch.optim.lr_scheduler.MultiplicativeLR, torch.optim.lr_scheduler.ReduceLROnPlateau)
    ):
        raise TypeError(f"make must return a schedule that is a function of t, got {type(schedules[1]).__name__}")
    return SequentialLR(optimizer, schedules, milestones=[steps])


def scaled_lr(base_lr, batch_size, base_batch_size=256):
    """The linear scaling rule: the rate that was right for base_batch_size, times what the batch grew by.

    Source: Goyal et al. 2017.
    """
    for name, value in (("base_lr", base_lr), ("batch_size", batch_size), ("base_batch_size", base_batch_size)):
        _check_positive(name, value, numbers.Real)
    return base_lr * batch_size / base_batch_size
