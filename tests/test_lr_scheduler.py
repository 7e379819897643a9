"""Every schedule of the lectures against its formula, ours and torch's, with our optimizers and lr tensors."""

import math
import pickle

import pytest
import torch

from fastcnn import optim
from fastcnn.optim import lr_scheduler as schedules
from fastcnn.train.config import TrainConfig
from fastcnn.train.loop import learning_rate

LR0, T = 2.0, 24


def cosine(t, period):
    return 0.5 * (1 + math.cos(math.pi * t / period))


# name -> (schedule of an optimizer, the formula of lr / lr0)
SCHEDULES = {
    "step": (lambda o: schedules.StepLR(o, 3, 0.5), lambda t: 0.5 ** (t // 3)),
    "step at fixed points": (
        lambda o: schedules.MultiStepLR(o, [4, 9, 15], 0.1),
        lambda t: 0.1 ** sum(t >= m for m in (4, 9, 15)),
    ),
    "exponential": (lambda o: schedules.ExponentialLR(o, math.exp(-0.3)), lambda t: math.exp(-0.3 * t)),
    "1/t": (lambda o: schedules.InverseTimeLR(o, 0.3), lambda t: 1 / (1 + 0.3 * t)),
    "cosine": (lambda o: schedules.CosineAnnealingLR(o, T), lambda t: cosine(t, T)),
    "linear": (lambda o: schedules.LinearLR(o, 1.0, 0.0, T), lambda t: 1 - t / T),
    "inverse square root": (schedules.InverseSquareRootLR, lambda t: 1 / math.sqrt(max(t, 1))),
    "constant": (lambda o: schedules.ConstantLR(o, 1.0, 0), lambda t: 1.0),
    "cyclic, triangular": (
        lambda o: schedules.CyclicLR(o, 0.1 * LR0, LR0, 4, cycle_momentum=False),
        lambda t: 0.1 + 0.9 * (1 - abs(t / 4 % 2 - 1)),
    ),
    "warm restarts": (lambda o: schedules.CosineAnnealingWarmRestarts(o, 5), lambda t: cosine(t % 5, 5)),
    "warm restarts, twice as long each": (
        lambda o: schedules.CosineAnnealingWarmRestarts(o, 4, 2),
        lambda t: next(cosine(t - a, b - a) for a, b in ((0, 4), (4, 12), (12, 28)) if t < b),
    ),
}


def optimizer(lr=LR0, kind=optim.SGD):
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))]}, {"params": [torch.nn.Parameter(torch.ones(2))]}]
    groups[1]["lr"] = 3 * lr
    for group in groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    return kind(groups, lr=lr)


def rates(o, schedule, steps):
    """Learning rates of the first group in use, step by step."""
    found = []
    for _ in range(steps):
        found.append(float(o.param_groups[0]["lr"]))
        o.step()
        schedule.step()
    return found


@pytest.mark.parametrize("warmup", (0, 5))
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_follows_its_formula(name, warmup):
    make, formula = SCHEDULES[name]

    def expected(t):
        return LR0 * (t / warmup if t < warmup else formula(t - warmup))

    o = optimizer()
    schedule = schedules.with_warmup(o, warmup, make) if warmup else make(o)
    assert rates(o, schedule, T) == pytest.approx([expected(t) for t in range(T)], rel=1e-6, abs=1e-9)
    if "cyclic" not in name:
        # each group has its own lr0
        assert o.param_groups[1]["lr"] == pytest.approx(3 * o.param_groups[0]["lr"], abs=1e-9)


@pytest.mark.parametrize("kind", (optim.SGD, optim.Adam))
@pytest.mark.parametrize("name", ("1/t", "inverse square root", "cosine"))
def test_lr_tensors_stay_tensors(name, kind):
    make, formula = SCHEDULES[name]
    o = optimizer(torch.tensor(0.5), kind)
    tensor = o.param_groups[0]["lr"]
    found = rates(o, schedules.with_warmup(o, 3, make), 8)
    assert o.param_groups[0]["lr"] is tensor
    assert found == pytest.approx([0.5 * (t / 3 if t < 3 else formula(t - 3)) for t in range(8)], rel=1e-5)


@pytest.mark.parametrize("warmup", (0, 6))
@pytest.mark.parametrize("name", ("1/t", "inverse square root", "cosine", "warm restarts"))
def test_state_goes_on_where_it_was(name, warmup):
    make, _ = SCHEDULES[name]

    def new():
        o = optimizer()
        return o, schedules.with_warmup(o, warmup, make) if warmup else make(o)

    o, schedule = new()
    rates(o, schedule, 9)
    state, expected = pickle.loads(pickle.dumps((o.state_dict(), schedule.state_dict()))), rates(o, schedule, 5)
    o, schedule = new()
    o.load_state_dict(state[0])
    schedule.load_state_dict(state[1])
    assert rates(o, schedule, 5) == expected


def test_schedules_of_ours_can_be_pickled():
    for make in (SCHEDULES["1/t"][0], lambda o: schedules.with_warmup(o, 3, schedules.InverseSquareRootLR)):
        pickle.dumps(make(optimizer()))


def test_plateau():
    o = optimizer()
    schedule = schedules.ReduceLROnPlateau(o, factor=0.1, patience=1)
    found = []
    for loss in (5, 4, 4, 4, 4, 4, 3):
        found.append(o.param_groups[0]["lr"])
        schedule.step(loss)
    assert found == pytest.approx([2, 2, 2, 2, 0.2, 0.2, 0.02])


def test_linear_scaling_rule():
    assert schedules.scaled_lr(0.1, 1024) == pytest.approx(0.4)
    assert schedules.scaled_lr(0.1, 32, base_batch_size=64) == pytest.approx(0.05)


def test_other_names_are_torchs():
    assert optim.lr_scheduler is schedules
    for name in torch.optim.lr_scheduler.__all__:
        assert getattr(schedules, name) is getattr(torch.optim.lr_scheduler, name)
    with pytest.raises(AttributeError):
        schedules.NoSuchLR  # noqa: B018


def test_bad_arguments_are_refused():
    o = optimizer()
    with pytest.raises(ValueError, match="k must be more than 0, got -1"):
        schedules.InverseTimeLR(o, -1)
    with pytest.raises(TypeError, match="steps must be an int, got 2.5"):
        schedules.with_warmup(o, 2.5, SCHEDULES["cosine"][0])
    with pytest.raises(ValueError, match="batch_size must be more than 0, got 0"):
        schedules.scaled_lr(0.1, 0)
    for make in (lambda o: schedules.MultiplicativeLR(o, lambda t: 0.9), schedules.ReduceLROnPlateau):
        with pytest.raises(TypeError, match="function of t, got (Multip|ReduceLR)"):
            schedules.with_warmup(optimizer(), 3, make)


@pytest.mark.parametrize("name, formula", [
    ("constant", lambda t: 1.0),
    ("cosine", lambda t: cosine(t, 10)),
    ("linear", lambda t: 1 - t / 10),
    ("inverse_time", lambda t: 1 / (1 + 0.5 * t)),
    ("inverse_sqrt", lambda t: 1 / math.sqrt(max(t, 1))),
])  # fmt: skip
def test_trainers_schedules(name, formula):
    """40 steps in 10 epochs; t of the formulas counts epochs."""
    config = TrainConfig(lr=2.0, epochs=10, scheduler=name, lr_decay=0.5)
    found = [learning_rate(config, step, 40) for step in range(40)]
    assert found == pytest.approx([2 * formula(step / 4) for step in range(40)])
    warm = TrainConfig(lr=2.0, epochs=10, scheduler=name, lr_decay=0.5, warmup=8)
    assert [learning_rate(warm, step, 48) for step in range(8)] == pytest.approx([step / 4 for step in range(8)])
    # the decay fills what the warm-up leaves of the run
    assert learning_rate(warm, 8, 48) == 2.0
    if name in ("cosine", "linear"):
        assert learning_rate(warm, 48, 48) == pytest.approx(0)
