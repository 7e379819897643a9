import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as fF
from fastcnn import nn
from fastcnn.ops.decorrelated_batch_norm import DecorrelatedBatchNormFunction, decorrelated_batch_norm_reference
from fastcnn.testing import assert_matches

LANES = ("triton", "cpu")


def backend_of(lane):
    return "cpu" if lane.name == "cpu" else "triton"


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def mixed(*shape, seed=0):
    """Channels that depend on each other: N(0, 1) times a random matrix."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    matrix = torch.randn(shape[1], shape[1], generator=generator) / shape[1] ** 0.5
    x = torch.einsum("nc...,kc->nk...", x, matrix).contiguous()
    return x + torch.randn(shape[1], generator=generator).view(-1, *[1] * (len(shape) - 2))


CASES = {
    "two groups of 16": ((3, 32, 7, 5), 16, lambda x: x),
    "channels_last": ((3, 32, 7, 5), 16, channels_last),
    "several tiles a plane": ((2, 16, 13, 11), 16, lambda x: x),
    "groups of 3": ((4, 21, 5, 3), 3, lambda x: x),
    "groups of 3, channels_last": ((4, 21, 5, 3), 3, channels_last),
    "groups of 4": ((3, 20, 6, 5), 4, channels_last),
    "groups of 24": ((6, 48, 5, 5), 24, channels_last),
    "1 channel": ((3, 1, 4, 4), 1, lambda x: x),
    "2-D": ((70, 12), 6, lambda x: x),
    "3-D": ((9, 8, 11), 8, lambda x: x),
    "5-D channels_last": ((2, 4, 3, 4, 5), 4, lambda x: x.to(memory_format=torch.channels_last_3d)),
    "slice": ((4, 16, 6, 5), 8, lambda x: x[:, ::2, 1:]),
}


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("case", CASES)
def test_decorrelated_batch_norm_matches_the_reference(lane, case, training):
    shape, d, make = CASES[case]
    x = make(mixed(*shape)).to(lane.device).detach()
    C = x.shape[1]
    w, b = (torch.randn(C, device=lane.device).requires_grad_() for _ in range(2))
    mean = torch.randn(C, device=lane.device)
    whitening = torch.randn(C // d, d, d, device=lane.device)
    assert_matches(
        lambda x, w, b: fF.decorrelated_batch_norm(
            x, mean.to(x.dtype), whitening.to(x.dtype), w, b, training, 0.0, 1e-3, group_size=d
        ),
        lambda x, w, b: decorrelated_batch_norm_reference(
            x, mean.to(x.dtype), whitening.to(x.dtype), w, b, training, 1e-3, d
        ),
        x.requires_grad_(),
        w,
        b,
    )
    y = fF.decorrelated_batch_norm(x, mean, whitening, w, b, training, group_size=d)
    assert y.stride() == F.batch_norm(x, None, None, training=True).stride()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("parameters", (torch.float32, None), ids=str)
def test_dtypes(lane, dtype, parameters):
    if dtype == torch.float64 and parameters is not None:
        pytest.skip("float32 parameters go with 16-bit inputs")
    w, b = (torch.randn(32, device=lane.device).to(parameters or dtype).requires_grad_() for _ in range(2))
    assert_matches(
        lambda x, w, b: fF.decorrelated_batch_norm(x, None, None, w, b, True, eps=1e-2),
        lambda x, w, b: decorrelated_batch_norm_reference(x, None, None, w, b, True, 1e-2, 16),
        channels_last(mixed(4, 32, 5, 6)).to(lane.device, dtype).requires_grad_(),
        w,
        b,
    )


def test_the_output_is_white(lane):
    x = channels_last(mixed(8, 32, 9, 7)).to(lane.device)
    y = fF.decorrelated_batch_norm(x, None, None, training=True)
    flat = y.double().transpose(0, 1).reshape(2, 16, -1)
    covariance = flat @ flat.mT / flat.shape[2]
    torch.testing.assert_close(covariance, torch.eye(16).to(covariance).expand(2, -1, -1), atol=5e-3, rtol=0)
    assert float(flat.mean(2).abs().max()) < 1e-5
    # ZCA: the whitening matrix is symmetric, so whitening what is white changes nothing
    torch.testing.assert_close(fF.decorrelated_batch_norm(y, None, None, training=True), y, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("last", (False, True))
def test_groups_of_one_channel_are_batch_norm(lane, last):
    x = mixed(4, 18, 5, 3).to(lane.device)
    x = (channels_last(x) if last else x).requires_grad_()
    w, b = (torch.randn(18, device=lane.device).requires_grad_() for _ in range(2))
    assert_matches(
        lambda x, w, b: fF.decorrelated_batch_norm(x, None, None, w, b, True, group_size=1),
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        x,
        w,
        b,
    )
    mean, var = torch.randn(18, device=lane.device), torch.rand(18, device=lane.device) + 0.5
    y = fF.decorrelated_batch_norm(x, mean, (var + 1e-5).rsqrt().view(18, 1, 1), w, b, group_size=1)
    torch.testing.assert_close(y, F.batch_norm(x, mean, var, w, b, eps=1e-5), rtol=1e-5, atol=1e-5)


def test_running_statistics_move_towards_those_of_the_batch(lane):
    x = mixed(6, 8, 5, 5).to(lane.device)
    mean, whitening = torch.ones(8, device=lane.device), torch.ones(2, 4, 4, device=lane.device)
    fF.decorrelated_batch_norm(x, mean, whitening, training=True, momentum=0.25, group_size=4)
    flat = x.double().transpose(0, 1).reshape(2, 4, -1)
    batch_mean = flat.mean(2)
    values, vectors = torch.linalg.eigh((flat - batch_mean[..., None]) @ (flat - batch_mean[..., None]).mT / 150)
    root = vectors @ torch.diag_embed((values + 1e-5).rsqrt()) @ vectors.mT
    torch.testing.assert_close(mean.double(), 0.75 + 0.25 * batch_mean.view(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whitening.double(), 0.75 + 0.25 * root, rtol=1e-4, atol=1e-5)


def test_large_mean_small_variance(lane):
    """About a pivot: squares of the values themselves would leave no correct digit."""
    x = (mixed(8, 16, 9, 5, seed=3) * 0.1 + 3000).to(lane.device).requires_grad_()
    grads = []
    for function in (
        lambda x: fF.decorrelated_batch_norm(x, None, None, training=True, eps=1e-3),
        lambda x: decorrelated_batch_norm_reference(x, None, None, None, None, True, 1e-3, 16),
    ):
        inputs = x if not grads else x.detach().double().requires_grad_()
        y = function(inputs)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        grads.append((y.detach().double(), torch.autograd.grad(y, inputs, weights)[0].double()))
    for ours, truth in zip(*grads, strict=True):
        assert float((ours - truth).abs().max()) < 2e-4 * float(truth.abs().max())


def test_a_first_image_unlike_the_others(lane):
    x = mixed(33, 16, 4, 4).to(lane.device) + 100
    x[0] = 0
    assert_matches(
        lambda x: fF.decorrelated_batch_norm(x, None, None, training=True, eps=1e-2),
        lambda x: decorrelated_batch_norm_reference(x, None, None, None, None, True, 1e-2, 16),
        x.requires_grad_(),
    )


@pytest.mark.parametrize("d, training", [(4, True), (3, True), (4, False)])
def test_gradcheck(lane, d, training):
    C = 2 * d
    x, w, b = (
        t.double().to(lane.device).requires_grad_() for t in (mixed(3, C, 3, 2), torch.rand(C) + 1, torch.randn(C))
    )
    mean, whitening = torch.randn(C).to(w), torch.randn(2, d, d).to(w)

    def function(x, w, b):
        return DecorrelatedBatchNormFunction.apply(
            x, w, b, mean, whitening, training, 0.0, 1e-2, d, backend_of(lane)
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, w, b), fast_mode=True)


def test_gradient_where_eigenvalues_coincide(lane):
    """White data: every eigenvalue is 1, and a gradient through the eigenvectors is NaN."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(3):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    x = hadamard[:, 1:5].to(lane.device).requires_grad_()  # 8 samples of 4 channels, orthogonal and of mean 0

    def function(x):
        return fF.decorrelated_batch_norm(x, None, None, training=True, eps=1e-3, group_size=4)

    assert torch.autograd.gradcheck(function, x)
    # fewer samples than channels: zero eigenvalues, several times
    x = torch.randn(3, 8, dtype=torch.float64, device=lane.device, requires_grad=True)
    y = fF.decorrelated_batch_norm(x, None, None, training=True, eps=1e-1, group_size=8)
    assert torch.autograd.grad(y.square().sum(), x)[0].isfinite().all()
    # constant channels
    x = torch.full((2, 16, 3, 3), 5.0, device=lane.device, requires_grad=True)
    y = fF.decorrelated_batch_norm(x, None, None, training=True)
    assert not y.any() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_nan_and_inf_stay_in_their_group(lane, value):
    x = mixed(3, 48, 4, 4).to(lane.device)
    x[1, 20, 2, 2] = value
    mean, whitening = torch.zeros(48, device=lane.device), torch.zeros(3, 16, 16, device=lane.device)
    y = fF.decorrelated_batch_norm(x, mean, whitening, training=True)
    assert y[:, 16:32].isnan().all() and whitening[1].isnan().all() and not mean[20].isfinite()
    x[1, 20, 2, 2] = 0
    expected = fF.decorrelated_batch_norm(x, None, None, training=True)
    for c in (slice(0, 16), slice(32, 48)):
        assert torch.equal(y[:, c], expected[:, c])
    y = fF.decorrelated_batch_norm(x.fill_(value), mean.zero_(), whitening.fill_(1))
    assert not y.isfinite().any()


def test_opcheck_and_empty_batch(lane):
    w, mean, whitening = (torch.rand(shape, device=lane.device) for shape in ((8,), (8,), (2, 4, 4)))
    basis, roots = torch.rand(2, 4, 4).double().to(w.device), torch.rand(2, 4).double().to(w.device)
    ops = torch.ops.fastcnn
    for x in (torch.randn(3, 8, 2, 2), channels_last(torch.randn(3, 8, 2, 2)), torch.randn(0, 8, 2, 2)):
        x = x.to(lane.device)
        forward = (x, w, w, mean.clone(), whitening.clone(), 0.1, 1e-3, 4, backend_of(lane))
        torch.library.opcheck(ops.decorrelated_batch_norm.default, forward)
        torch.library.opcheck(
            ops.decorrelated_batch_norm_eval.default, (x, w, None, mean, whitening, 4, backend_of(lane))
        )
        for arguments in ((mean.double(), basis, roots), (mean, whitening, None)):
            torch.library.opcheck(
                ops.decorrelated_batch_norm_backward.default, (x, x, w, *arguments, 4, True, True, backend_of(lane))
            )
        x.requires_grad_()
        y = fF.decorrelated_batch_norm(x, mean, whitening, w, w, True, group_size=4)
        assert y.shape == x.shape
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_only_the_input_is_kept(lane):
    x, w = mixed(4, 32, 6, 6).to(lane.device).requires_grad_(), torch.ones(32, device=lane.device).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fF.decorrelated_batch_norm(x, None, None, w, w, True)
    own = {t.untyped_storage().data_ptr() for t in (x, w)}
    extra = sum(t.nbytes for t in saved if t.untyped_storage().data_ptr() not in own)
    assert extra == 8 * (32 + 2 * 16 * 16 + 32)


def test_pytorch_runs_the_same_formula():
    x = mixed(4, 8, 5, 5).requires_grad_()
    results = []
    for backend in ("cpu", "torch"):
        mean, whitening = torch.zeros(8), torch.zeros(2, 4, 4)
        with fastcnn.backend(backend):
            y = fF.decorrelated_batch_norm(x, mean, whitening, training=True, eps=1e-3, group_size=4)
            evaluated = fF.decorrelated_batch_norm(x, mean, whitening, group_size=4)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        results.append((y, evaluated, mean, whitening, torch.autograd.grad(y, x, weights)[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_module(lane):
    module = nn.DecorrelatedBatchNorm2d(32, momentum=0.5).to(lane.device)
    assert repr(module) == "DecorrelatedBatchNorm2d(32, group_size=16, eps=1e-05, momentum=0.5, affine=True)"
    x = mixed(16, 32, 6, 6).to(lane.device)
    for _ in range(30):
        y = module(x)
    assert int(module.num_batches_tracked) == 30
    torch.testing.assert_close(module.eval()(x), y, rtol=1e-3, atol=1e-3)
    average = nn.DecorrelatedBatchNorm2d(4, 2, momentum=None, affine=False).to(lane.device)
    for seed in range(2):
        average(mixed(5, 4, 3, 3, seed=seed).to(lane.device))
    means = torch.stack([mixed(5, 4, 3, 3, seed=seed).mean((0, 2, 3)) for seed in range(2)]).mean(0)
    torch.testing.assert_close(average.running_mean.cpu(), means, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="group_size must divide num_features = 6, got 4"):
        nn.DecorrelatedBatchNorm2d(6, 4)
    with pytest.raises(ValueError, match="input must be 4-D, got 3-D"):
        module(x[0])


def test_decorrelated_batch_norm_refuses_bad_arguments():
    x = torch.randn(3, 8, 2, 2)
    mean, whitening = torch.zeros(8), torch.zeros(2, 4, 4)

    def call(x=x, mean=mean, whitening=whitening, training=True, group_size=4, **how):
        return fF.decorrelated_batch_norm(x, mean, whitening, training=training, group_size=group_size, **how)

    for how, error, message in (
        (dict(group_size=3), ValueError, "group_size must divide the 8 channels of input, got 3"),
        (dict(group_size=0), ValueError, "group_size must divide"),
        (dict(group_size=2.0), TypeError, "group_size must be an int, got 2.0"),
        (dict(whitening=mean), ValueError, r"running_whitening must have shape \(2, 4, 4\), got \(8,\)"),
        (dict(whitening=None), ValueError, "must be both tensors or both None"),
        (dict(mean=None, whitening=None, training=False), ValueError, "must be tensors in evaluation"),
        (dict(eps=0.0), ValueError, "eps must be positive in training, got 0.0"),
        (dict(momentum=None), TypeError, "momentum must be a number"),
        (dict(training=1), TypeError, "training must be a bool"),
        (dict(weight=mean.double()), TypeError, "weight must have the dtype of input"),
        (dict(weight=mean[:4]), ValueError, r"weight must have shape \(8,\), got \(4,\)"),
        (dict(x=x[:1, :, :1, :1]), ValueError, "more than 1 value per channel"),
        (dict(x=x.long()), TypeError, "floating-point dtype"),
        (dict(x=x[0, :, 0, 0]), ValueError, "at least 2 dimensions"),
    ):
        with pytest.raises(error, match=message):
            call(**how)
    assert not mean.any() and not whitening.any()
