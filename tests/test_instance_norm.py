import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn import nn
from fastcnn.ops import group_norm as groups
from fastcnn.ops import instance_norm as ops
from fastcnn.testing import assert_close_to_truth, assert_matches

LANES = ("triton", "cpu")


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def plain(x):
    return x


def tensors(lane, shape, dtype=torch.float32, layout=plain, seed=0):
    """Leaves input, weight and bias, and running statistics, all far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    x = layout((torch.randn(shape, generator=generator) * 2 + 3).to(lane.device, dtype)).requires_grad_()
    values = torch.randn(3, shape[1], generator=generator).to(lane.device, dtype)
    variance = torch.rand(shape[1], generator=generator).to(lane.device, dtype) + 0.5
    return x, values[0].clone().requires_grad_(), values[1].clone().requires_grad_(), values[2].clone(), variance


CASES = [
    pytest.param(dict(shape=(3, 5, 7, 9)), id="odd sizes"),
    pytest.param(dict(shape=(3, 5, 7, 9), layout=channels_last), id="channels_last, odd sizes"),
    pytest.param(dict(shape=(2, 1, 4, 5)), id="one channel"),
    pytest.param(dict(shape=(3, 17, 4, 4), dtype=torch.float64), id="fp64"),
    pytest.param(dict(shape=(3, 17, 4, 4), dtype=torch.float64, layout=channels_last), id="fp64 channels_last"),
    pytest.param(dict(shape=(2, 9, 5, 5), dtype=torch.bfloat16, layout=channels_last), id="bf16"),
    pytest.param(dict(shape=(2, 3, 11)), id="3-D"),
    pytest.param(dict(shape=(2, 3, 2, 3, 5)), id="5-D"),
    pytest.param(
        dict(shape=(2, 3, 2, 3, 5), layout=lambda x: x.to(memory_format=torch.channels_last_3d)),
        id="5-D channels_last",
    ),
    pytest.param(dict(shape=(2, 70, 33, 45), layout=channels_last), id="more channels than a block, strips"),
    pytest.param(dict(shape=(1, 2, 71, 67)), id="more pixels than a run"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_instance_norm_matches_torch(lane, case):
    if lane.name == "cpu" and case.get("dtype") == torch.bfloat16:
        pytest.skip("numba has no 16-bit floats")
    x, weight, bias, mean, var = tensors(lane, **case)
    truth = [t.double() for t in (mean, var)]
    F.instance_norm(x.detach().double(), *truth, momentum=0.3)
    after = {}

    def call(function):
        def run(x, weight, bias, mean, var):
            running = mean.clone(), var.clone()
            y = function(x, *running, weight, bias, True, 0.3, 1e-3)
            after[function] = running
            return y

        return run

    assert_matches(call(fF.instance_norm), call(lambda *a: F.instance_norm(*a)), x, weight, bias, mean, var)
    theirs = mean.clone(), var.clone()
    F.instance_norm(x, *theirs, weight, bias, True, 0.3)
    for name, ours, torch_result, true in zip(("mean", "var"), after[fF.instance_norm], theirs, truth, strict=True):
        assert_close_to_truth(f"running {name}", ours, torch_result, true, ours.dtype)


@pytest.mark.parametrize("pytorch", (False, True))
@pytest.mark.parametrize("layout", (plain, channels_last))
def test_instance_norm_channels_last_gradient_of_one_image(lane, layout, pytorch):
    # PyTorch 2.13's instance_norm gets it wrong on CPU: compare with groups of one channel; also where PyTorch runs
    x = layout(torch.randn(1, 5, 4, 6, device=lane.device)).requires_grad_()
    with fastcnn.strict(not pytorch), fastcnn.backend("torch" if pytorch else fastcnn.backends.current_backend()):
        y = fF.instance_norm(x)
    grad = channels_last(torch.randn(y.shape, device=lane.device))
    leaf = x.detach().double().contiguous().requires_grad_()
    expected = F.group_norm(leaf, 5)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    (ours,) = torch.autograd.grad(y, x, grad)
    (theirs,) = torch.autograd.grad(expected, leaf, grad.double().contiguous())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", (plain, channels_last))
def test_instance_norm_with_running_statistics_is_batch_norm(lane, layout):
    x, weight, bias, mean, var = tensors(lane, (3, 4, 5, 6), layout=layout)
    assert_matches(
        lambda x, w, b: fF.instance_norm(x, mean, var, w, b, use_input_stats=False),
        lambda x, w, b: F.instance_norm(x, mean, var, w, b, use_input_stats=False),
        x, weight, bias,
    )  # fmt: skip


def test_instance_norm_strips_of_the_cpu_kernel(lane, monkeypatch):
    # several strips of an image, the last one ragged
    if lane.name == "cpu":
        x, weight, bias, _, _ = tensors(lane, (2, 48, 61, 53), layout=channels_last)
        assert_matches(
            lambda x, w, b: fF.instance_norm(x, weight=w, bias=b),
            lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
            x, weight, bias,
        )  # fmt: skip


@pytest.mark.parametrize("layout", (plain, channels_last))
@pytest.mark.parametrize("mean", (1e2, 1e4))
def test_instance_norm_mean_far_from_zero(lane, mean, layout):
    x = layout(torch.randn(2, 3, 16, 16, dtype=torch.float64) + mean).to(lane.device, torch.float32)
    running = torch.zeros(3, device=lane.device), torch.zeros(3, device=lane.device)
    y = fF.instance_norm(x, *running, momentum=1.0)
    expected = F.instance_norm(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=mean * 1.2e-7 + 2e-6)
    torch.testing.assert_close(running[1].double(), x.double().var((2, 3)).mean(0), rtol=3e-6, atol=0)


@pytest.mark.parametrize("layout", (plain, channels_last))
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_instance_norm_bad_value_stays_in_its_plane(lane, bad, layout):
    x, weight, bias, _, _ = tensors(lane, (2, 4, 5, 6), layout=layout)
    dirty = x.detach().clone()
    dirty[1, 2, 3, 1] = bad
    dirty.requires_grad_()
    results = []
    for tensor in (x, dirty):
        y = fF.instance_norm(tensor, weight=weight, bias=bias)
        results.append((y, torch.autograd.grad(y, tensor, torch.ones_like(y))[0]))
    clean = torch.ones(2, 4, dtype=torch.bool)
    clean[1, 2] = False
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a[clean], b[clean], rtol=0, atol=0)
        assert b[1, 2].isnan().all()


@pytest.mark.parametrize("make", (channels_last, lambda x: x[:, :, ::2, 1:], lambda x: x.transpose(2, 3)))
def test_instance_norm_layouts(lane, make):
    x = make(torch.randn(4, 3, 5, 6, device=lane.device)).detach().requires_grad_()
    y, expected = fF.instance_norm(x), F.instance_norm(x)
    wanted = channels_last(x) if groups.memory_format(x) == torch.channels_last else x.contiguous()
    assert y.stride() == wanted.stride()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(y.shape, device=lane.device)
    for layout in (grad, channels_last(grad), grad[:1, :1, :1, :1].expand(y.shape)):
        (ours,) = torch.autograd.grad(y, x, layout, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected, x, layout, retain_graph=True)
        assert ours.stride() == wanted.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", (plain, channels_last))
@pytest.mark.parametrize("needed", ["input", "weight", "bias", ""])
def test_instance_norm_only_the_gradients_asked_for(lane, needed, layout):
    leaves = dict(zip(("input", "weight", "bias"), tensors(lane, (2, 4, 5, 5), layout=layout)[:3], strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in needed.split())
    assert_matches(
        lambda x, w, b: fF.instance_norm(x, None, None, w, b),
        lambda x, w, b: F.instance_norm(x, None, None, w, b),
        *leaves.values(),
    )


@pytest.mark.parametrize("layout", (plain, channels_last))
def test_instance_norm_without_parameters(lane, layout):
    x, *_ = tensors(lane, (2, 4, 5, 5), layout=layout)
    assert_matches(lambda x: fF.instance_norm(x), lambda x: F.instance_norm(x), x)


@pytest.mark.parametrize("shape", [(0, 4, 4, 4), (2, 4, 0, 4), (2, 0, 4, 4)])
def test_instance_norm_empty(lane, shape):
    x = torch.randn(shape, device=lane.device, requires_grad=True)
    mean, var = torch.full((shape[1],), 2.0, device=lane.device), torch.full((shape[1],), 3.0, device=lane.device)
    y = fF.instance_norm(x, mean, var)
    assert y.shape == x.shape and (mean == 2).all() and (var == 3).all()
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_instance_norm_second_derivative(lane):
    x, weight, bias, _, _ = tensors(lane, (2, 3, 4), torch.float64)
    function = lambda x, w, b: fF.instance_norm(x, None, None, w, b)
    assert torch.autograd.gradcheck(function, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, weight, bias), fast_mode=True)


@pytest.mark.parametrize("layout", (plain, channels_last))
def test_instance_norm_same_bits_with_any_number_of_threads(lane, layout):
    if lane.name != "cpu":
        pytest.skip("threads of the CPU")
    x, weight, bias, _, _ = tensors(lane, (3, 32, 60, 61), layout=layout)
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = fF.instance_norm(x, None, None, weight, bias)
        runs.append((y, *torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y) * 0.3)))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", (plain, channels_last))
def test_instance_norm_registration(lane, layout):
    x, weight, bias, _, _ = (t.detach() for t in tensors(lane, (2, 4, 4, 5), layout=layout))
    backend = "cpu" if lane.name == "cpu" else "triton"
    torch.library.opcheck(groups._forward, (x, 4, weight, bias, 1e-5, x.dtype, backend))
    statistics = torch.randn(2, 4, device=lane.device), torch.rand(2, 4, device=lane.device)
    torch.library.opcheck(groups._backward, (torch.randn_like(x), x, 4, weight, *statistics, True, True, backend))


def test_instance_norm_compiles_and_updates_running_statistics(lane):
    x, weight, bias, mean, var = tensors(lane, (2, 3, 4, 4))
    ours, theirs = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    compiled = torch.compile(
        lambda x: fF.instance_norm(x * 2, *ours, weight, bias), fullgraph=True, backend="aot_eager"
    )
    y, expected = compiled(x), F.instance_norm(x * 2, *theirs, weight, bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dimensions", (1, 2, 3))
@pytest.mark.parametrize("track", (True, False))
def test_instance_norm_modules(lane, dimensions, track):
    name = f"InstanceNorm{dimensions}d"
    modules = [getattr(m, name)(3, affine=True, track_running_stats=track).to(lane.device) for m in (nn, torch.nn)]
    for training in (True, False):
        for shape in ((2, 3, *(4, 5, 6)[:dimensions]), (3, *(4, 5, 6)[:dimensions])):  # and without a batch
            x = torch.randn(shape, device=lane.device)
            y, expected = (m.train(training)(x) for m in modules)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(m.state_dict() for m in modules))


def test_instance_norm_cpu_takes_channels_last():
    chosen = []
    large = torch.randn(4, 32, 64, 64)
    for x in (channels_last(large), large, large[:1], channels_last(large[:, :8]), channels_last(large)[:, :, :4, :4]):
        ops._op.calls.clear()
        with fastcnn.backend("auto"):
            fF.instance_norm(x)
        chosen += [backend for backend, _ in ops._op.calls]
    assert chosen in (["cpu", "torch", "torch", "torch", "torch"], ["triton"] * 5)


REFUSED = [
    (TypeError, "input must be a torch.Tensor, got list", dict(input=[1.0])),
    (ValueError, "running_mean and running_var must be both tensors or both None", dict(running_mean=None)),
    (ValueError, "must be defined without use_input_stats",
     dict(running_mean=None, running_var=None, use_input_stats=False)),
    (ValueError, r"running_var must have 3 elements, one per channel, got shape \(4,\)",
     dict(running_var=torch.ones(4))),
    (ValueError, "running_var must not require a gradient", dict(running_var=torch.ones(3, requires_grad=True))),
    (ValueError, r"Expected more than 1 spatial element when training, got input size \(2, 3, 1, 1\)",
     dict(input=torch.zeros(2, 3, 1, 1))),
    (TypeError, "use_input_stats must be a bool, got 1", dict(use_input_stats=1)),
    (TypeError, "momentum must be a number, got None", dict(momentum=None)),
]  # fmt: skip


@pytest.mark.parametrize("error, message, changed", REFUSED, ids=[message[:40] for _, message, _ in REFUSED])
def test_instance_norm_refuses_bad_arguments(error, message, changed):
    running = dict(running_mean=torch.zeros(3), running_var=torch.ones(3))
    with fastcnn.backend("cpu"), pytest.raises(error, match=message):
        fF.instance_norm(**(dict(input=torch.randn(2, 3, 4, 4)) | running | changed))
    assert (running["running_mean"] == 0).all() and (running["running_var"] == 1).all()
