"""What our optimizers take besides torch's arguments, and those that torch does not have, against literal formulas."""

import copy
import math

import pytest
import torch
from test_optim import assert_equal_state, ours, parameters, params_of, run, set_grads, theirs

import fastcnn
import fastcnn.optim
from fastcnn.optim import table
from fastcnn.testing import assert_close_to_truth

LANES = ("triton", "cpu")
SHAPES = [(0, 4), (), (3, 5), (table.BLOCK + 1,)]
# one of each kernel, and the forms whose table has other rows
VARIANTS = [
    ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01, "maximize": True}),
    ("Adagrad", {"lr": 0.1}),
    ("RMSprop", {"centered": True, "momentum": 0.9, "eps": 0.1}),
    ("NAdam", {}),
    ("RAdam", {"betas": (0.8, 0.9)}),
]
variants = pytest.mark.parametrize("name, kwargs", VARIANTS, ids=[f"{n} {sorted(k)}" for n, k in VARIANTS])


@variants
@pytest.mark.parametrize("backend", ("lane", "torch"))
def test_everything_at_once_matches_torch_with_the_same_done_by_hand(lane, name, kwargs, backend):
    l1, max_norm, decay = 0.05, 0.7, 0.9
    a = ours(name)(
        parameters(lane.device, SHAPES), **kwargs, l1=l1, max_grad_norm=max_norm, ema_decay=decay, bf16_copy=True
    )
    with torch.no_grad():
        params_of(a)[3][:5] = 0.0  # the sign of 0 is 0
    b = theirs(name)([torch.nn.Parameter(p.detach().clone()) for p in params_of(a)], **kwargs)
    averages = [p.detach().clone() for p in params_of(b)]
    for step in range(3):
        set_grads(params_of(a), step)
        grads = [p.grad.clone() for p in params_of(a)]
        with fastcnn.backend("torch" if backend == "torch" else fastcnn.backends.current_backend()):
            with fastcnn.strict(backend != "torch"):
                a.step()
        set_grads(params_of(b), step)
        norm = torch.nn.utils.clip_grad_norm_(params_of(b), max_norm)
        for p in params_of(b):
            p.grad += (-l1 if kwargs.get("maximize") else l1) * p.detach().sign()
        b.step()
        for average, p in zip(averages, params_of(b), strict=True):
            average.mul_(decay).add_(p.detach(), alpha=1 - decay)
        assert a.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        assert all(torch.equal(p.grad, g) for p, g in zip(params_of(a), grads, strict=True))
    for p, q, average in zip(params_of(a), params_of(b), averages, strict=True):
        assert torch.equal(a.state[p]["bf16"], p.detach().bfloat16())
        torch.testing.assert_close(a.state[p].pop("ema"), average, rtol=1e-5, atol=1e-6)
        del a.state[p]["bf16"]
        if name != "SGD" or kwargs.get("momentum"):
            assert set(a.state[p]) == set(b.state[q])
    if name != "SGD" or kwargs.get("momentum"):
        assert_equal_state(a, b)


def test_options_belong_to_groups(lane):
    p, q = parameters(lane.device, [(5,), (4,)])
    a = fastcnn.optim.SGD(
        [{"params": [p], "l1": 0.0}, {"params": [q], "ema_decay": None}], lr=1.0, l1=0.5, ema_decay=0.5
    )
    before = [p.detach().clone(), q.detach().clone()]
    p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    a.step()
    assert torch.equal(p, before[0]) and "ema" in a.state[p]
    torch.testing.assert_close(q.detach(), before[1] - 0.5 * before[1].sign())
    assert "ema" not in a.state[q]
    # options that nobody asked for leave no trace in a checkpoint
    plain = fastcnn.optim.SGD([p], lr=0.1, momentum=0.9).state_dict()["param_groups"][0]
    assert set(plain) == set(torch.optim.SGD([p], lr=0.1).state_dict()["param_groups"][0])


def test_wrong_options():
    p = parameters(shapes=[(3,)])
    for name in fastcnn.optim.__all__:
        cls = ours(name)
        for kwargs, message in (
            ({"l1": -1.0}, "l1 must not be negative, got -1.0"),
            ({"l1": math.nan}, "l1 must not be negative, got nan"),
            ({"ema_decay": 1.0}, r"ema_decay must be None or in \[0, 1\), got 1.0"),
            ({"max_grad_norm": 0.0}, "max_grad_norm must be None or positive, got 0.0"),
        ):
            with pytest.raises(ValueError, match=message):
                cls(p, **kwargs)
        with pytest.raises(TypeError, match="bf16_copy must be a bool, got 1"):
            cls(p, bf16_copy=1)
        with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
            cls(p, nothing=1)
        with pytest.raises(ValueError, match="give it to the optimizer"):
            cls([{"params": p, "max_grad_norm": 1.0}])
    optimizer = fastcnn.optim.SGD(p)
    with pytest.raises(ValueError, match="l1 must not be negative"):
        optimizer.add_param_group({"params": parameters(shapes=[(2,)]), "l1": -2.0})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(RuntimeError, match="no parameter has an average"):
        with optimizer.ema_weights():
            pass


def test_options_survive_checkpoints_and_copies(lane):
    kwargs = dict(l1=0.01, max_grad_norm=1.0, ema_decay=0.9, bf16_copy=True)
    model = torch.nn.ParameterList(parameters(lane.device, [(3, 5), (7,)]))
    a = fastcnn.optim.Adam(model, bias_correction=False, **kwargs)
    run([a])
    b = fastcnn.optim.Adam([torch.nn.Parameter(p.detach().clone()) for p in model], bias_correction=False, **kwargs)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    c = copy.deepcopy(a)
    run([a, b, c], start=3)
    for other in (b, c):
        assert_equal_state(a, other, exact=True)
        assert other.state[params_of(other)[0]]["bf16"].dtype == torch.bfloat16
    # torch loads it, and its checkpoint leaves the options as constructed
    t = torch.optim.Adam([torch.nn.Parameter(p.detach().clone()) for p in model])
    t.load_state_dict(copy.deepcopy(a.state_dict()))
    t = torch.optim.Adam([torch.nn.Parameter(p.detach().clone()) for p in model])
    run([t])
    a.load_state_dict(t.state_dict())
    group = a.param_groups[0]
    assert (group["l1"], group["ema_decay"], group["bf16_copy"], group["bias_correction"]) == (0.01, 0.9, True, False)
    run([a])
    assert "ema" in a.state[params_of(a)[0]]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_bf16_copy_is_torchs_rounding(lane, dtype):
    if lane.name == "cpu" and dtype == torch.bfloat16:
        pytest.skip("PyTorch runs bf16 on CPU")
    # halfway cases, overflow to infinity, denormals, NaN
    values = [1.00390625, 1.01171875, -1.00390625, 3.4e38, 1e-39, -0.0, torch.nan, torch.inf, 2.5]
    p = torch.nn.Parameter(torch.tensor(values, device=lane.device, dtype=dtype))
    p.grad = torch.zeros_like(p)
    a = fastcnn.optim.SGD([p], lr=0.0, bf16_copy=True)
    a.step()
    assert a.state[p]["bf16"].dtype == torch.bfloat16
    torch.testing.assert_close(a.state[p]["bf16"], p.detach().bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_average_of_16_bit_parameters_is_fp32_and_stays_so(lane):
    if lane.name == "cpu":
        pytest.skip("PyTorch runs bf16 on CPU")
    a = fastcnn.optim.SGD(parameters(lane.device, [(9,)], torch.bfloat16), lr=0.1, ema_decay=0.99)
    run([a])
    (p,) = params_of(a)
    average = a.state[p]["ema"].clone()
    assert average.dtype == torch.float32 and not torch.equal(average, average.bfloat16().float())
    a.load_state_dict(copy.deepcopy(a.state_dict()))
    assert torch.equal(a.state[p]["ema"], average)
    own = p.detach().clone()
    with a.ema_weights():
        assert torch.equal(p.detach(), average.bfloat16())
    assert torch.equal(p.detach(), own)


def test_the_decks_polyak_average(lane):
    # x_test = 0.995 * x_test + 0.005 * x
    model = torch.nn.Linear(4, 3, device=lane.device)
    optimizer = fastcnn.optim.SGD(model.parameters(), lr=0.1, ema_decay=0.995)
    x_test = model.weight.detach().clone()
    for step in range(4):
        set_grads(list(model.parameters()), step)
        optimizer.step()
        x_test = 0.995 * x_test + 0.005 * model.weight.detach()
    own = model.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), optimizer.ema_weights():
        torch.testing.assert_close(model.weight.detach(), x_test)
        raise ZeroDivisionError
    assert torch.equal(model.weight.detach(), own)


@pytest.mark.parametrize(
    "values", ([3e4, -65504.0, 7.0], [torch.inf, 1.0, 2.0], [torch.nan, 1.0, 2.0], [0.0, 0.0, 0.0])
)
def test_clipping_of_extreme_gradients(lane, values):
    a = fastcnn.optim.SGD(parameters(lane.device, [(3,), (2,)]), lr=1.0, max_grad_norm=0.5)
    b = torch.optim.SGD(parameters(lane.device, [(3,), (2,)]), lr=1.0)
    for optimizer in (a, b):
        params_of(optimizer)[0].grad = torch.tensor(values, device=lane.device)
        params_of(optimizer)[1].grad = torch.ones(2, device=lane.device)
    torch.nn.utils.clip_grad_norm_(params_of(b), 0.5)
    a.step()
    b.step()
    assert_equal_state(a, b)


def test_clipping_is_of_all_groups_and_dtypes_and_after_unscaling(lane):
    def build():
        params = parameters(lane.device, [(3, 5), (table.BLOCK + 3,)])
        low = parameters(lane.device, [(7,)], torch.float64 if lane.name == "cpu" else torch.bfloat16, seed=1)
        return [{"params": params[:1], "lr": 0.5}, {"params": [*params[1:], *low]}]

    a = fastcnn.optim.SGD(build(), lr=0.1, max_grad_norm=0.7, momentum=0.9)
    b = torch.optim.SGD(build(), lr=0.1, momentum=0.9)
    for step in range(2):
        for optimizer in (a, b):
            set_grads(params_of(optimizer), step)
        norm = torch.nn.utils.clip_grad_norm_(params_of(b), 0.7)
        with fastcnn.strict(False):
            b.step()
        for p in params_of(a):
            p.grad *= 4
        a.grad_scale, a.found_inf = torch.full((), 4.0, device=lane.device), torch.zeros((), device=lane.device)
        a.step()
        assert a.grad_norm.item() == pytest.approx(norm.item(), rel=1e-2)
    for p, q in zip(params_of(a), params_of(b), strict=True):
        tolerance = {torch.bfloat16: 2e-2}.get(p.dtype, 1e-5)
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    before = copy.deepcopy([(p.detach(), a.state[p]) for p in params_of(a)])
    a.found_inf.fill_(1.0)
    a.step()
    for p, (q, state) in zip(params_of(a), before, strict=True):
        assert torch.equal(p, q) and torch.equal(a.state[p]["momentum_buffer"], state["momentum_buffer"])


@pytest.mark.parametrize("name", fastcnn.optim.__all__)
def test_a_skipped_step_leaves_every_state_alone(lane, name):
    a = ours(name)(parameters(lane.device, [(5,), (3, 2)]), ema_decay=0.9, bf16_copy=True, max_grad_norm=1.0, l1=0.1)
    run([a])
    before = copy.deepcopy([(p.detach(), a.state[p]) for p in params_of(a)])
    a.grad_scale, a.found_inf = torch.full((), 2.0, device=lane.device), torch.ones((), device=lane.device)
    run([a], start=3)
    for p, (q, state) in zip(params_of(a), before, strict=True):
        assert torch.equal(p, q) and all(torch.equal(a.state[p][key], value) for key, value in state.items())


# the optimizers and forms that torch lacks, literally


def literal_adam(deck):
    """The lecture's Adam without bias correction; with deck "amsgrad" its AMSGrad, the form of Reddi et al. 2018."""
    state = {}

    def update(x, dx, lr, beta1, beta2, eps):
        first = state.get("first", torch.zeros_like(x))
        second = state.get("second", torch.zeros_like(x))
        first = beta1 * first + (1 - beta1) * dx
        second = beta2 * second + (1 - beta2) * dx * dx
        largest = torch.maximum(state.get("largest", torch.zeros_like(x)), second)
        state.update(first=first, second=second, largest=largest)
        return x - lr * first / ((largest if deck == "amsgrad" else second).sqrt() + eps)

    return update


@pytest.mark.parametrize("backend", ("lane", "torch"))
@pytest.mark.parametrize("deck", ("adam", "amsgrad"))
def test_adam_without_bias_correction_is_the_decks(lane, deck, backend):
    start = torch.randn(3, 5)
    p = torch.nn.Parameter(start.clone().to(lane.device))
    a = fastcnn.optim.Adam([p], 0.01, (0.9, 0.99), 1e-7, amsgrad=deck == "amsgrad", bias_correction=False)
    true, rounded = start.double(), start.clone()
    update_true, update_rounded = literal_adam(deck), literal_adam(deck)
    for step in range(20):
        # gradients that shrink, so that the maximum matters
        grad = torch.randn(3, 5) / (1 + step)
        p.grad = grad.to(lane.device)
        with fastcnn.backend("torch" if backend == "torch" else fastcnn.backends.current_backend()):
            with fastcnn.strict(backend != "torch"):
                a.step()
        true = update_true(true, grad.double(), 0.01, 0.9, 0.99, 1e-7)
        rounded = update_rounded(rounded, grad, 0.01, 0.9, 0.99, 1e-7)
    assert_close_to_truth("parameter", p.detach().cpu(), rounded, true, torch.float32)


def literal_lion(x, g, m, lr, beta1, beta2, decay):
    return x - lr * (torch.sign(beta1 * m + (1 - beta1) * g) + decay * x), beta2 * m + (1 - beta2) * g


@pytest.mark.parametrize("backend", ("lane", "torch"))
@pytest.mark.parametrize("maximize", (False, True))
def test_lion_is_its_papers(lane, maximize, backend):
    params = parameters(lane.device, SHAPES)
    a = fastcnn.optim.Lion(params, 0.01, (0.9, 0.8), weight_decay=0.1, maximize=maximize)
    true = [(p.detach().cpu().double(), torch.zeros(p.shape).double()) for p in params]
    for step in range(6):
        set_grads(params, step)
        grads = [p.grad.cpu().double() * (-1 if maximize else 1) for p in params]
        with fastcnn.backend("torch" if backend == "torch" else fastcnn.backends.current_backend()):
            with fastcnn.strict(backend != "torch"):
                a.step()
        true = [literal_lion(x, g, m, 0.01, 0.9, 0.8, 0.1) for (x, m), g in zip(true, grads, strict=True)]
    for p, (x, m) in zip(params, true, strict=True):
        torch.testing.assert_close(p.detach().cpu(), x.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.state[p]["exp_avg"].cpu(), m.float(), rtol=1e-5, atol=1e-6)


def literal_lars(x, g, v, lr, momentum, decay, trust, eps):
    x_norm, g_norm = x.norm(), g.norm()
    ratio = trust * x_norm / (g_norm + decay * x_norm + eps) if x_norm > 0 and g_norm > 0 else 1.0
    v = momentum * v + ratio * (g + decay * x)
    return x - lr * v, v


@pytest.mark.parametrize("backend", ("lane", "torch"))
@pytest.mark.parametrize("options", ({}, {"max_grad_norm": 0.3}, {"l1": 0.2}))
def test_lars_is_its_papers(lane, backend, options):
    params = parameters(lane.device, [(0, 2), (), (3, 5), (2 * table.BLOCK + 5,), (4,)])
    with torch.no_grad():
        params[4].zero_()
    groups = [{"params": params[:4]}, {"params": params[4:], "trust_coefficient": 0.0}]
    a = fastcnn.optim.LARS(groups, 0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.02, **options)
    true = [(p.detach().cpu().double(), torch.zeros(p.shape).double()) for p in params]
    for step in range(4):
        set_grads(params, step)
        grads = [p.grad.cpu().double() for p in params]
        with fastcnn.backend("torch" if backend == "torch" else fastcnn.backends.current_backend()):
            with fastcnn.strict(backend != "torch"):
                a.step()
        if "max_grad_norm" in options:
            norm = torch.stack([g.norm() for g in grads]).norm()
            grads = [g * min(1.0, 0.3 / (norm + 1e-6)) for g in grads]
        penalties = [options.get("l1", 0.0) * x.sign() for x, _ in true]
        new = []
        for i, ((x, v), g, penalty) in enumerate(zip(true, grads, penalties, strict=True)):
            trust = 0.02 if i < 4 else 0.0
            x_norm, g_norm = x.norm(), g.norm()
            plain = trust == 0 or x_norm == 0 or g_norm == 0
            ratio = 1.0 if plain else trust * x_norm / (g_norm + 0.1 * x_norm + 1e-8)
            v = 0.9 * v + ratio * (g + 0.1 * x + penalty)
            new.append((x - 0.5 * v, v))
        if not options:
            literal = [literal_lars(x, g, v, 0.5, 0.9, 0.1, 0.02, 1e-8) for (x, v), g in zip(true, grads, strict=True)]
            for (x, _), (y, _) in zip(new[:4], literal[:4], strict=True):
                torch.testing.assert_close(x, y)
        true = new
    for p, (x, v) in zip(params, true, strict=True):
        torch.testing.assert_close(p.detach().cpu(), x.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.state[p]["momentum_buffer"].cpu(), v.float(), rtol=1e-5, atol=1e-6)


def test_new_optimizers_refuse_wrong_arguments():
    p = parameters(shapes=[(3,)])
    for cls, kwargs, message in (
        (fastcnn.optim.Lion, {"lr": -1.0}, "lr must not be negative, got -1.0"),
        (fastcnn.optim.Lion, {"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        (fastcnn.optim.Lion, {"weight_decay": -0.1}, "weight_decay must not be negative"),
        (fastcnn.optim.LARS, {"trust_coefficient": -1.0}, "trust_coefficient must not be negative"),
        (fastcnn.optim.LARS, {"nesterov": True}, "Nesterov momentum requires a momentum"),
    ):
        with pytest.raises(ValueError, match=message):
            cls(p, **kwargs)


def test_a_gradient_of_another_dtype_runs_on_torch():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad_dtype = torch.bfloat16
    p.grad = torch.ones(3, dtype=torch.bfloat16)
    a = fastcnn.optim.SGD([p], momentum=0.9)
    with fastcnn.backend("cpu"), fastcnn.strict():
        with pytest.raises(NotImplementedError, match="a parameter is torch.float32 and its gradient torch.bfloat16"):
            a.step()


@pytest.mark.gpu
@variants
def test_options_on_the_gpu_wait_for_nothing(name, kwargs):
    a = ours(name)(parameters("cuda"), **kwargs, l1=0.1, max_grad_norm=1.0, ema_decay=0.9, bf16_copy=True)
    run([a])
    set_grads(params_of(a), 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        a.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
