import contextlib
import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import fastcnn
import fastcnn.optim
from fastcnn.optim import table
from fastcnn.testing import assert_close_to_truth

LANES = ("triton", "cpu")
INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in fastcnn.optim.__all__}
# empty, scalar, a vector, an odd matrix, one element more than a Triton chunk
SHAPES = [(0, 4), (), (7,), (3, 5), (table.BLOCK + 1,)]
VARIANTS = [
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5}),
    ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1}),
    ("RMSprop", {"weight_decay": 0.1}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {"betas": (0.8, 0.9)}),
]
variants = pytest.mark.parametrize("name, kwargs", VARIANTS, ids=[f"{n} {sorted(k)}" for n, k in VARIANTS])


def ours(name):
    return getattr(fastcnn.optim, name)


def theirs(name):
    return getattr(torch.optim, name)


def parameters(device="cpu", shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def set_grads(params, step):
    """The same fp32 gradients for every set of parameters, in the dtype, device and layout of each."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


def assert_equal_state(a, b, exact=False):
    tolerance = dict(rtol=0, atol=0) if exact else dict(rtol=1e-5, atol=2e-6)
    for p, q in zip(params_of(a), params_of(b), strict=True):
        torch.testing.assert_close(p, q, equal_nan=True, **tolerance)
        assert set(a.state[p]) == set(b.state[q])
        for key in a.state[p]:
            torch.testing.assert_close(
                torch.as_tensor(a.state[p][key]).cpu(),
                torch.as_tensor(b.state[q][key]).cpu(),
                equal_nan=True,
                check_dtype=key != "step",
                **tolerance,
            )


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def run(optimizers, steps=3, start=0):
    for step in range(start, start + steps):
        for optimizer in optimizers:
            set_grads(params_of(optimizer), step)
            if isinstance(optimizer, fastcnn.optim.multi_tensor.MultiTensorStep):
                optimizer.step()
            else:
                with fastcnn.strict(False):
                    optimizer.step()


def pair(name, lane, shapes=SHAPES, **kwargs):
    """Our optimizer and torch's, on equal parameters of the lane's device."""
    return ours(name)(parameters(lane.device, shapes), **kwargs), theirs(name)(
        parameters(lane.device, shapes), **kwargs
    )


def samples():
    for name, info in INFOS.items():
        # torch lists the capturable inputs for CUDA alone
        for sample in info.optim_inputs_func(device="cuda"):
            yield pytest.param(name, sample.kwargs, id=f"{name}: {sample.desc}")


@pytest.mark.parametrize("name, kwargs", list(samples()))
def test_matches_torch_on_its_own_samples(lane, name, kwargs):
    params = parameters(lane.device)
    reference = [torch.nn.Parameter(p.detach().clone().cpu()) for p in params]
    truth = [torch.nn.Parameter(p.detach().cpu().double()) for p in params]

    def plain(value):
        return value.item() if isinstance(value, torch.Tensor) else value

    def plain_kwargs():
        result = {k: tuple(map(plain, v)) if k == "betas" else plain(v) for k, v in kwargs.items()}
        result.pop("capturable", None)
        return result

    lr = kwargs.get("lr")
    mine = {**kwargs, "lr": lr.to(lane.device)} if isinstance(lr, torch.Tensor) else kwargs
    optimizers = [ours(name)(params, **mine)] + [theirs(name)(ps, **plain_kwargs()) for ps in (reference, truth)]
    for step in range(5 if lane.name == "interpret" else 20):
        for ps, optimizer in zip((params, reference, truth), optimizers, strict=True):
            set_grads(ps, step)
            optimizer.step()
    for mine, torchs, true in zip(params, reference, truth, strict=True):
        assert_close_to_truth("parameter", mine.detach().cpu(), torchs.detach(), true.detach(), torch.float32)
    state, torch_state = optimizers[0].state_dict()["state"], optimizers[1].state_dict()["state"]
    assert {i: set(s) for i, s in state.items()} == {i: set(s) for i, s in torch_state.items()}
    for i, s in torch_state.items():
        for key, value in s.items():
            torch.testing.assert_close(state[i][key].cpu(), value, rtol=1e-5, atol=1e-6)


@variants
def test_a_thousand_steps_track_the_truth(lane, name, kwargs):
    params = parameters(lane.device, [(3, 5)])
    reference = [torch.nn.Parameter(p.detach().clone().cpu()) for p in params]
    truth = [torch.nn.Parameter(p.detach().cpu().double()) for p in params]
    optimizers = [ours(name)(params, **kwargs)] + [theirs(name)(ps, **kwargs) for ps in (reference, truth)]
    for step in range(30 if lane.name == "interpret" else 1000):
        for ps, optimizer in zip((params, reference, truth), optimizers, strict=True):
            set_grads(ps, step)
            with fastcnn.strict(optimizer is optimizers[0]):
                optimizer.step()
    assert_close_to_truth("parameter", *(ps[0].detach().cpu() for ps in (params, reference, truth)), torch.float32)
    for key, true in optimizers[2].state[truth[0]].items():
        if true.dim():
            torchs, mine = optimizers[1].state[reference[0]][key], optimizers[0].state[params[0]][key]
            assert_close_to_truth(key, mine.cpu(), torchs, true, torch.float32)


@pytest.mark.parametrize("name", INFOS)
def test_refuses_what_torch_refuses(name):
    for sample in INFOS[name].optim_error_inputs_func(device="cpu", dtype=torch.float32):
        assert sample.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        inputs = sample.optimizer_error_input
        params = inputs.params if inputs.params is not None else parameters()
        if sample.error_type is UserWarning:
            with pytest.warns(UserWarning, match=sample.error_regex):
                ours(name)(params, **inputs.kwargs)
        else:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                ours(name)(params, **inputs.kwargs)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16), ids=str)
@variants
def test_dtypes(lane, name, kwargs, dtype):
    if lane.name == "cpu" and dtype != torch.float64:
        pytest.skip("PyTorch runs fp16 and bf16 on CPU")
    if dtype == torch.float16 and kwargs.get("centered"):
        pytest.skip("square_avg underflows in fp16, and square_avg - grad_avg^2 is negative: NaN in PyTorch too")
    params = parameters(lane.device, dtype=dtype)
    # torch rounds state and parameter after every operation here and we once per step: the truth rounds nothing
    reference = [torch.nn.Parameter(p.detach().clone().cpu()) for p in params]
    truth = [torch.nn.Parameter(p.detach().cpu().double()) for p in params]
    if dtype == torch.float16 and "momentum" not in kwargs:
        kwargs = {**kwargs, "eps": 0.1}
    optimizers = [ours(name)(params, **kwargs)] + [theirs(name)(ps, **kwargs) for ps in (reference, truth)]
    for step in range(5):
        set_grads(params, step)
        set_grads(reference, step)
        for t, r in zip(truth, reference, strict=True):
            t.grad = r.grad.double()
        for optimizer in optimizers:
            optimizer.step()
    for mine, torchs, true in zip(params, reference, truth, strict=True):
        assert mine.dtype == dtype
        assert_close_to_truth("parameter", mine.detach().cpu(), torchs.detach(), true.detach(), dtype)


def test_fp16_and_bf16_on_cpu_and_mixed_groups_run():
    shapes = [(5,), (3, 3)]
    for name in INFOS:
        a, b = (
            cls([*parameters(dtype=torch.bfloat16, shapes=shapes), *parameters(shapes=shapes)])
            for cls in (ours(name), theirs(name))
        )
        calls = dict(ours(name)._op.calls)
        with fastcnn.backend("cpu"):
            run([a, b])
        assert_equal_state(a, b)
        new = {k: n - calls.get(k, 0) for k, n in ours(name)._op.calls.items() if n != calls.get(k, 0)}
        assert sorted((backend, n) for (backend, _), n in new.items()) == [("cpu", 3), ("torch", 3)]


@variants
def test_state_dict_goes_both_ways_in_mid_run(lane, name, kwargs):
    a, b = pair(name, lane, **kwargs)
    run([a, b], steps=3)
    # each continues with the other's state, through a file
    states = []
    for optimizer in (a, b):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        states.append(torch.load(file, weights_only=True))
    assert set(states[0]["param_groups"][0]) == set(states[1]["param_groups"][0])
    a.load_state_dict(states[1])
    b.load_state_dict(states[0])
    run([a, b], steps=3, start=3)
    assert_equal_state(a, b)


def test_a_step_that_is_a_number_in_an_old_checkpoint(lane):
    a, b = pair("Adam", lane)
    run([a, b])
    for optimizer in (a, b):
        state = optimizer.state_dict()
        state = {**state, "state": {i: {**s, "step": float(s["step"])} for i, s in state["state"].items()}}
        optimizer.load_state_dict(state)
    run([a, b], start=3)
    assert_equal_state(a, b)
    # without load_state_dict
    for state in a.state.values():
        state["step"] = int(state["step"])
    run([a, b], start=6)
    assert_equal_state(a, b)


def test_steps_of_another_dtype(lane):
    torch.set_default_dtype(torch.float64)
    try:
        b = theirs("Adam")(parameters(lane.device))
        run([b])
    finally:
        torch.set_default_dtype(torch.float32)
    a = ours("Adam")([torch.nn.Parameter(p.detach().clone()) for p in params_of(b)])
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    run([a, b], start=3)
    assert_equal_state(a, b)


@variants
def test_special_values(lane, name, kwargs):
    a, b = pair(name, lane, shapes=[(9,)], **kwargs)
    run([a, b], steps=2)
    # square_avg - grad_avg^2 of a gradient whose square overflows: infinite if fused, NaN if not
    largest = 1e18 if kwargs.get("centered") else -3e38
    values = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-30, 1e-23, 1e19, largest]
    for optimizer in (a, b):
        (p,) = params_of(optimizer)
        p.grad = torch.tensor(values, device=lane.device)
        optimizer.step()
    assert_equal_state(a, b)
    run([a, b], steps=2, start=2)
    assert_equal_state(a, b)


@pytest.mark.parametrize("kwargs", ({}, {"amsgrad": True}, {"eps": 0.0}, {"betas": (0.0, 0.0)}, {"lr": 0.0}))
def test_adam_first_step_with_tiny_gradients(lane, kwargs):
    # v underflows to a denormal or to 0
    a, b = pair("Adam", lane, shapes=[(6,)], **kwargs)
    for optimizer in (a, b):
        (p,) = params_of(optimizer)
        p.grad = torch.tensor([0.0, -0.0, 1e-30, 1e-20, 1e-21, 1e-8], device=lane.device)
        optimizer.step()
    assert_equal_state(a, b)


def test_infinite_parameters_without_weight_decay(lane):
    for name in INFOS:
        a, b = pair(name, lane, shapes=[(3,)], weight_decay=0)
        for optimizer in (a, b):
            with torch.no_grad():
                params_of(optimizer)[0].copy_(torch.tensor([torch.inf, -torch.inf, torch.nan]))
        run([a, b])
        assert_equal_state(a, b)


def test_hundreds_of_tensors_and_chunk_borders(lane):
    chunk = table.CPU_CHUNK if lane.name == "cpu" else table.BLOCK
    shapes = [(chunk - 1,), (chunk,), (chunk + 1,), (2 * chunk,)] + [
        (1 + i % 3,) for i in range(400 if lane.name == "cpu" else 20)
    ]
    launches = []
    for name, kwargs in VARIANTS:
        a, b = pair(name, lane, shapes=shapes, **kwargs)
        run([a, b], steps=2)
        assert_equal_state(a, b)
        launches.append(len(a._plans[0].buckets))
    assert launches == [1] * len(VARIANTS)


@variants
def test_layouts(lane, name, kwargs):
    def build(cls):
        base = torch.arange(500.0, device=lane.device) / 100
        weight = torch.nn.Parameter(base[:72].reshape(2, 4, 3, 3).to(memory_format=torch.channels_last))
        pointwise = torch.nn.Parameter(base[:20].reshape(5, 4, 1, 1).to(memory_format=torch.channels_last))
        transposed = torch.nn.Parameter(base[100:135].clone().reshape(5, 7).t())
        # views into one buffer at an address that no 16-byte load may use
        flat = base[200:].clone()
        unaligned = torch.nn.Parameter(flat[1:38])
        return cls([weight, pointwise, transposed, unaligned], **kwargs)

    def grads(optimizer, step):
        weight, pointwise, transposed, unaligned = params_of(optimizer)
        generator = torch.Generator().manual_seed(step)

        def random(*shape):
            return torch.randn(shape, generator=generator).to(lane.device)

        weight.grad = random(2, 4, 3, 3)  # contiguous
        pointwise.grad = random(5, 4, 1, 1)
        transposed.grad = random(7, 5) if step % 2 else random(5, 7).t()
        unaligned.grad = random(1).expand(37)

    a, b = build(ours(name)), build(theirs(name))
    for step in range(4):
        for optimizer in (a, b):
            grads(optimizer, step)
            optimizer.step()
        if step == 1:
            # torch may keep a momentum buffer in the layout of the gradient
            a.load_state_dict(copy.deepcopy(b.state_dict()))
    assert_equal_state(a, b)


def test_parameters_that_are_not_dense_or_shared_run_on_torch(lane):
    base = torch.arange(24.0, device=lane.device).reshape(4, 6)
    for name in INFOS:
        sliced = ours(name)([torch.nn.Parameter(base.clone()[:, ::2])])
        (p,) = params_of(sliced)
        p.grad = torch.ones_like(p)
        with pytest.raises(NotImplementedError, match="do not fill one block of memory"):
            sliced.step()
        assert not sliced.state or name == "Adagrad"  # whose state torch makes at once
        with fastcnn.strict(False):
            sliced.step()
        data = base.clone()
        tied = [torch.nn.Parameter(data), torch.nn.Parameter(data)]
        for q in tied:
            q.grad = torch.ones_like(q)
        with pytest.raises(NotImplementedError, match="two parameters share their memory"):
            ours(name)(tied).step()


def test_a_parameter_listed_twice_is_updated_as_torch_does():
    results = []
    for cls in (fastcnn.optim.Adam, torch.optim.Adam):
        p = torch.nn.Parameter(torch.ones(3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = cls([p, p])
        p.grad = torch.ones(3)
        optimizer.step()
        results.append((p.detach(), optimizer.state[p]["step"]))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1] == 2


@variants
def test_gradients_that_are_none_are_skipped(lane, name, kwargs):
    a, b = pair(name, lane, **kwargs)
    for step in range(4):
        for optimizer in (a, b):
            set_grads(params_of(optimizer), step)
            # every parameter misses another step, so the step counts differ
            params_of(optimizer)[step].grad = None
            optimizer.step()
    assert_equal_state(a, b)
    empty = ours(name)(parameters(lane.device), **kwargs)
    before = len(empty.state)
    empty.step()
    assert len(empty.state) == before


@pytest.mark.parametrize("name", ("SGD", "Adagrad"))
def test_sparse_gradients_run_on_torch(lane, name):
    results = []
    for cls in (ours(name), theirs(name)):
        optimizer = cls(parameters(lane.device, shapes=[(3,), (4, 2)]), lr=0.1)
        for step in range(2):
            params = params_of(optimizer)
            set_grads(params, step)
            params[1].grad = params[1].grad * torch.tensor([[1.0], [0.0], [0.0], [1.0]], device=lane.device)
            params[1].grad = params[1].grad.to_sparse()
            with fastcnn.strict(False):
                optimizer.step()
        results.append(optimizer)
    assert_equal_state(*results)
    backends = {backend for backend, _ in ours(name)._op.calls}
    assert backends >= {"torch", "cpu" if lane.name == "cpu" else "triton"}
    with pytest.raises(NotImplementedError, match="l1 and max_grad_norm do not go with sparse gradients"):
        ours(name)(params_of(results[0]), max_grad_norm=1.0).step()


@pytest.mark.parametrize("name", [name for name in INFOS if name not in ("SGD", "Adagrad")])
def test_sparse_and_complex_are_refused_and_nothing_is_applied(lane, name):
    params = parameters(lane.device, shapes=[(3,), (4, 2)])
    optimizer = ours(name)(params)
    set_grads(params, 0)
    params[1].grad = params[1].grad.to_sparse()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=f"{name} does not support sparse gradients: parameter 1 of group 0"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)) and not optimizer.state
    with pytest.raises(ValueError, match=r"does not support complex parameters: params\[1\] is torch.complex64"):
        ours(name)([params[0], torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="complex"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ("Adam", "SGD"))
def test_a_model_changed_under_its_optimizer_is_an_error(lane, name):
    kwargs = {"momentum": 0.9} if name == "SGD" else {}
    (p,) = params = parameters(lane.device, shapes=[(3,)])
    optimizer = ours(name)(params, **kwargs)
    run([optimizer])
    p.data = torch.zeros(50, device=lane.device)
    with pytest.raises(RuntimeError, match="a parameter of group 0 is .50,. on .* and its gradient .3,."):
        optimizer.step()
    p.grad = torch.zeros(50, device=lane.device)
    with pytest.raises(RuntimeError, match="make the optimizer after changing or moving the model"):
        optimizer.step()


def test_an_error_in_the_last_group_leaves_the_first_untouched(lane):
    a, b = parameters(lane.device, shapes=[(3,), (4,)])
    optimizer = fastcnn.optim.Adam([{"params": [a]}, {"params": [b]}])
    run([optimizer], steps=1)
    del optimizer.state[b]["exp_avg"]
    before = a.detach().clone()
    with pytest.raises(KeyError):
        optimizer.step()
    assert torch.equal(a, before) and optimizer.state[a]["step"] == 1


@variants
def test_deepcopy_and_pickle(lane, name, kwargs):
    model = torch.nn.ParameterList(parameters(lane.device, shapes=[(3, 5), (7,)]))
    optimizer = ours(name)(model, **kwargs)
    run([optimizer])
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    run([optimizer, *copies], start=3)
    for other in copies:
        assert type(other) is type(optimizer)
        assert all(p is not q for p, q in zip(params_of(other), params_of(optimizer), strict=True))
        assert_equal_state(other, optimizer, exact=True)


@variants
def test_lr_schedulers_changes_and_new_groups(lane, name, kwargs):
    a, b = pair(name, lane, shapes=[(3, 5), (7,)], lr=0.1, **kwargs)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (a, b)]
    for step in range(6):
        run([a, b], steps=1, start=step)
        for scheduler in schedulers:
            scheduler.step()
        if step == 3:
            for optimizer in (a, b):
                optimizer.add_param_group({"params": parameters(lane.device, [(4,)], seed=9), "lr": 0.7})
    assert a.param_groups[0]["lr"] == 0.1 / 8
    assert_equal_state(a, b)


def test_a_learning_rate_tensor_is_read_at_every_step(lane):
    lr = torch.tensor(0.5, device=lane.device)
    a = fastcnn.optim.SGD(parameters(lane.device, [(3,)]), lr=lr)
    b = torch.optim.SGD(parameters(lane.device, [(3,)]), lr=0.5)
    run([a, b])
    lr.fill_(0.25)
    b.param_groups[0]["lr"] = 0.25
    run([a, b], start=3)
    assert_equal_state(a, b)


def test_a_backward_after_the_step_notices(lane):
    for name in INFOS:
        (p,) = params = parameters(lane.device, [(3,)])
        optimizer = ours(name)(params)
        loss = (p * p).sum()
        set_grads(params, 0)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@variants
def test_ten_runs_are_bit_identical(lane, name, kwargs):
    optimizers = [ours(name)(parameters(lane.device, [(33, 5)]), **kwargs) for _ in range(10)]
    run(optimizers, steps=2)
    for other in optimizers[1:]:
        assert_equal_state(other, optimizers[0], exact=True)


@variants
def test_grad_scale_and_found_inf(lane, name, kwargs):
    a, b = pair(name, lane, **kwargs)

    def scaled_step(found):
        a.grad_scale = torch.tensor(4.0, device=lane.device)
        a.found_inf = torch.tensor(float(found), device=lane.device)
        for p in params_of(a):
            p.grad *= 4
        a.step()
        del a.grad_scale, a.found_inf

    def snapshot():
        return copy.deepcopy([(p.detach(), a.state[p]) for p in params_of(a) if p in a.state])

    # a skipped first step starts nothing
    set_grads(params_of(a), 7)
    scaled_step(found=1)
    for step in range(3):
        set_grads(params_of(a), step)
        set_grads(params_of(b), step)
        scaled_step(found=0)
        b.step()
        assert_equal_state(a, b)
        for p, q in zip(params_of(a), params_of(b), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    before = snapshot()
    set_grads(params_of(a), 5)
    grads = [p.grad.clone() for p in params_of(a)]
    scaled_step(found=2)
    for (p, state), (q, old) in zip(snapshot(), before, strict=True):
        assert torch.equal(p, q) and all(torch.equal(state[k], old[k]) for k in old)
    assert all(torch.equal(p.grad, 4 * g) for p, g in zip(params_of(a), grads, strict=True))


@pytest.mark.parametrize("unscale", (False, True))
@pytest.mark.parametrize("backend", ("lane", "torch"))
def test_grad_scaler(lane, unscale, backend):
    model = torch.nn.Linear(5, 3, device=lane.device)
    reference = copy.deepcopy(model)
    results = []
    for module, cls in ((model, fastcnn.optim.Adam), (reference, torch.optim.Adam)):
        optimizer = cls(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(lane.device.type, init_scale=1024.0, growth_interval=2)
        for step in range(5):
            optimizer.zero_grad()
            x = torch.full((2, 5), torch.inf if step == 2 else step + 1.0, device=lane.device)
            scaler.scale(module(x).square().mean()).backward()
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            with contextlib.ExitStack() as stack:
                if backend == "torch":
                    stack.enter_context(fastcnn.backend("torch"))
                    stack.enter_context(fastcnn.strict(False))
                scaler.step(optimizer)
            scaler.update()
        results.append((optimizer, scaler.get_scale()))
    assert results[0][1] == results[1][1]
    assert_equal_state(results[0][0], results[1][0])


def test_strict_mode_really_runs_ours(lane):
    for name in INFOS:
        optimizer = ours(name)(parameters(lane.device))
        op = ours(name)._op
        before = dict(op.calls)
        run([optimizer], steps=2)
        (key,) = {k for k, n in op.calls.items() if n != before.get(k, 0)}
        assert key == ("cpu" if lane.name == "cpu" else "triton", None)
        assert op.name in fastcnn.explain()


def test_types_and_signatures_begin_with_torchs():
    for name in INFOS:
        assert isinstance(ours(name)(parameters()), theirs(name))
        assert repr(ours(name)(parameters())) == repr(theirs(name)(parameters()))
        names = list(inspect.signature(theirs(name)).parameters)
        parameters_of_ours = inspect.signature(ours(name)).parameters
        assert list(parameters_of_ours)[: len(names)] == names
        extra = {"l1", "max_grad_norm", "ema_decay", "bf16_copy"}
        assert set(list(parameters_of_ours)[len(names) :]) - {"bias_correction"} == extra


@pytest.mark.parametrize("backend", ("auto", "torch"))
@pytest.mark.parametrize("name", INFOS)
def test_hooks_run_once_and_closures_with_gradients(name, backend):
    # making one has torch wrap its own class's step, which must not run the hooks again
    theirs(name)(parameters())
    optimizer = ours(name)(parameters())
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        seen.append("closure")
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params_of(optimizer))
        loss.backward()
        return loss

    with fastcnn.backend(backend), torch.no_grad():
        first, second = float(optimizer.step(closure)), float(optimizer.step(closure))
    assert second < first
    assert seen == ["pre", "closure", "post"] * 2


@variants
def test_backend_torch_is_torchs_own_step(name, kwargs):
    a, b = ours(name)(parameters(), **kwargs), theirs(name)(parameters(), **kwargs)
    with fastcnn.backend("torch"):
        run([a, b])
    assert_equal_state(a, b, exact=True)


@pytest.mark.parametrize("flags", ({"foreach": True}, {"fused": True}, {"foreach": False}, {"fused": False}))
def test_foreach_and_fused_are_accepted(lane, flags):
    for name in INFOS:
        if set(flags) <= set(inspect.signature(theirs(name)).parameters):
            a, b = pair(name, lane, **flags)
            run([a, b])
            assert_equal_state(a, b)


def test_differentiable_runs_on_torch():
    results = []
    for cls in (fastcnn.optim.Adam, torch.optim.Adam):
        start = torch.ones(3, dtype=torch.float64, requires_grad=True)
        p = start.clone()
        optimizer = cls([p], differentiable=True)
        p.grad = (start * torch.arange(1.0, 4.0, dtype=torch.float64)).clone()
        optimizer.step()
        results.append(torch.autograd.grad(p.sum(), start)[0])
    assert torch.equal(*results)


def test_compiled_step():
    for name in ("Adam", "SGD", "RMSprop"):
        a, b = ours(name)(parameters()), theirs(name)(parameters())
        set_grads(params_of(a), 0)
        set_grads(params_of(b), 0)
        torch.compile(a.step, backend="eager")()
        b.step()
        assert_equal_state(a, b)


def test_sgd_without_momentum_runs_on_torch_where_that_is_faster():
    a = fastcnn.optim.SGD(parameters())
    set_grads(params_of(a), 0)
    (group,) = a.param_groups
    with fastcnn.backend("auto"), fastcnn.strict():
        with pytest.raises(NotImplementedError, match="without momentum and decay PyTorch's loop is faster"):
            a.step()
        group["weight_decay"] = 0.1
        with pytest.raises(NotImplementedError, match="PyTorch's loop is faster for few parameters"):
            a.step()
        group["momentum"] = 0.9
        a.step()
    b = [cls(parameters(), lr=0.1) for cls in (fastcnn.optim.SGD, torch.optim.SGD)]
    with fastcnn.backend("auto"):
        run(b)
    assert_equal_state(*b, exact=True)


def test_names_that_we_do_not_have_are_torchs():
    assert fastcnn.optim.Rprop is torch.optim.Rprop
    assert fastcnn.optim.lr_scheduler.StepLR is torch.optim.lr_scheduler.StepLR


def test_a_users_subclass_with_its_own_step(lane):
    class Decaying(fastcnn.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] *= 0.5
            return super().step(closure)

    a = Decaying(parameters(lane.device, [(3,)]), lr=1.0)
    b = torch.optim.SGD(parameters(lane.device, [(3,)]), lr=0.5)
    run([a, b], steps=1)
    assert_equal_state(a, b)


@pytest.mark.gpu
@variants
def test_a_step_on_the_gpu_waits_for_nothing(name, kwargs):
    optimizer = ours(name)(parameters("cuda"), **kwargs)
    run([optimizer])
    set_grads(params_of(optimizer), 3)
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("Adam", "NAdam", "RAdam", "RMSprop"))
def test_a_step_in_a_cuda_graph(name):
    lr = torch.tensor(0.1, device="cuda")
    a = ours(name)(parameters("cuda"), lr=lr, capturable=True)
    b = theirs(name)(parameters("cuda"), lr=0.1)
    run([a, b], steps=1)
    static = [p.grad for p in params_of(a)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run([a], steps=1, start=1)
    torch.cuda.current_stream().wait_stream(stream)
    run([b], steps=1, start=1)
    for p, grad in zip(params_of(a), static, strict=True):
        p.grad = grad
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    for step in (2, 3, 4):
        lr.fill_(0.1 / step)
        b.param_groups[0]["lr"] = 0.1 / step
        set_grads(params_of(b), step)
        for grad, p in zip(static, params_of(b), strict=True):
            grad.copy_(p.grad)
        graph.replay()
        b.step()
    assert_equal_state(a, b)
