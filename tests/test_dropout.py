import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastcnn
import fastcnn.functional as fF
from fastcnn.ops.dropout import (
    DropoutFunction,
    dropout_forward,
    dropout_forward_,
    dropout_reference,
    philox_reference,
)
from fastcnn.testing import assert_matches

LANES = ("triton", "cpu")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
SEED = 0x299F31D0A4093822


def backend_of(lane):
    return "cpu" if lane.name == "cpu" else "triton"


def seed_on(lane, value=SEED):
    return torch.tensor(value, device=lane.device)


def kept(lane, n, p, **kwargs):
    """The mask of one public call, as fp64."""
    y = fF.dropout(torch.ones(n, device=lane.device), p, **kwargs)
    return (y != 0).double().cpu()


# published by Salmon et al. with Random123: counter, key, words
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", VECTORS)
def test_philox_gives_the_published_words(counter, key, words):
    def tensors(values):
        return [torch.tensor(v) for v in values]

    assert tuple(int(w) for w in philox_reference(tensors(counter), tensors(key))) == words
    if not INTERPRET:
        import numpy as np

        from fastcnn.kernels.cpu.dropout import philox

        assert tuple(int(w) for w in philox.py_func(*(np.uint64(v) for v in counter + key))) == words


def layouts():
    def case(name, shape, make=lambda x: x):
        return pytest.param(shape, make, id=name)

    def channels_last(x):
        return x.to(memory_format=torch.channels_last)

    return [
        case("two blocks and one", (1, 2049)),
        case("one", (1,)),
        case("scalar", ()),
        case("contiguous 4-D", (2, 3, 5, 7)),
        case("channels_last, pixels in fours", (3, 33, 4, 5), channels_last),
        case("channels_last, odd pixels", (2, 67, 5, 3), channels_last),
        case("channels_last, odd pixels, channels in fours", (3, 68, 5, 3), channels_last),
        case("channels_last, pixels in fours, few channels", (3, 5, 4, 3), channels_last),
        case("channels_last, 1 channel", (2, 1, 5, 3), channels_last),
        case("channels_last, 1 pixel", (4, 70, 1, 1), channels_last),
        case("channels_last_3d", (2, 5, 2, 3, 2), lambda x: x.to(memory_format=torch.channels_last_3d)),
        case("transposed matrix", (6, 10), lambda x: x.t()),
        case("another order", (2, 3, 4, 5), lambda x: x.permute(3, 1, 0, 2)),
        case("slice", (4, 6, 5), lambda x: x[:, ::2, 1:]),
        case("slice of channels_last", (2, 6, 4, 4), lambda x: channels_last(x)[:, 1:4]),
        case("expanded", (1, 6, 5), lambda x: x.expand(3, -1, -1)),
    ]


@pytest.mark.parametrize("shape, make", layouts())
def test_dropout_mask_is_that_of_the_stream(lane, shape, make):
    x = make(torch.randn(shape, device=lane.device))
    for seed in (0, -1, SEED):
        seed = seed_on(lane, seed)
        y = dropout_forward(x, seed, 0.3, backend_of(lane))
        expected = dropout_reference(x, seed, 0.3)
        assert torch.equal(y == 0, expected == 0)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)
        assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("channels_last", (False, True))
def test_dropout_matches_the_reference(lane, dtype, channels_last):
    if lane.name == "cpu" and dtype.itemsize == 2:
        pytest.skip("PyTorch runs fp16 and bf16 on CPU")
    x = torch.randn(3, 9, 7, 11, device=lane.device).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    seed = seed_on(lane)
    assert_matches(
        lambda x: DropoutFunction.apply(x, seed, 0.2, False, backend_of(lane)),
        lambda x: dropout_reference(x, seed, 0.2),
        x.requires_grad_(),
    )


def test_dropout_accepts_all_dtypes_as_torch():
    with fastcnn.backend("auto"):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            y = fF.dropout(torch.ones(1000, dtype=dtype), 0.5)
            assert y.dtype == dtype and set(y.tolist()) == {0.0, 2.0}


def test_dropout_of_few_elements_is_torchs_on_cpu():
    with fastcnn.backend("auto"), fastcnn.strict():
        fF.dropout(torch.ones(8192))
        with pytest.raises(NotImplementedError, match="faster on CPU below 8,192 elements"):
            fF.dropout(torch.ones(8191))


def test_dropout_special_values(lane):
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e38], device=lane.device)
    for p in (0.5, 1.0, 1e-7, 1 - 1e-7):
        x = values.repeat(300).requires_grad_()
        y = DropoutFunction.apply(x, seed_on(lane), p, False, backend_of(lane))
        torch.testing.assert_close(y, dropout_reference(x, seed_on(lane), p), equal_nan=True, rtol=1e-6, atol=0)
        grad = values.flip(0).repeat(300)
        (ours,) = torch.autograd.grad(y, x, grad)
        torch.testing.assert_close(ours, dropout_reference(grad, seed_on(lane), p), equal_nan=True, rtol=1e-6, atol=0)


def test_dropout_identity_returns_its_input(lane):
    x = torch.randn(5, device=lane.device)
    empty = torch.zeros(0, 3, device=lane.device)
    state = torch.get_rng_state()
    for y in (fF.dropout(x, 0.5, False), fF.dropout(x, 0.0), fF.dropout(x, 1.0, training=False)):
        assert y is x
    assert fF.dropout(empty, 0.5) is empty
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_with_p_1_is_zero(lane):
    x = torch.tensor([1.0, torch.nan, torch.inf, -3.0], device=lane.device, requires_grad=True)
    y = fF.dropout(x, 1)
    torch.testing.assert_close(y, F.dropout(x, 1.0), equal_nan=True)
    assert torch.equal(torch.autograd.grad(y[::3].sum(), x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("channels_last", (False, True))
def test_dropout_in_place(lane, channels_last):
    leaf = torch.randn(2, 6, 4, 4, device=lane.device)
    if channels_last:
        leaf = leaf.to(memory_format=torch.channels_last)
    leaf.requires_grad_()
    x = leaf * 1
    torch.manual_seed(3)
    y = fF.dropout(x, 0.5, inplace=True)
    assert y is x
    torch.manual_seed(3)
    expected = fF.dropout(leaf, 0.5)
    assert torch.equal(y, expected) and bool((y == 0).any())
    assert torch.equal(torch.autograd.grad((y * y).sum(), leaf)[0], torch.autograd.grad((expected**2).sum(), leaf)[0])
    with pytest.raises(RuntimeError, match="leaf"):
        fF.dropout(leaf, inplace=True)
    # a saved tensor written over is noticed
    x = leaf * 1
    z = x * x
    fF.dropout(x, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_dropout_in_place_on_a_slice(lane):
    x = torch.ones(8, 40, device=lane.device)
    with pytest.raises(NotImplementedError, match="in place needs contiguous or channels_last memory"):
        fF.dropout(x[:, ::2], inplace=True)
    with fastcnn.strict(False):
        fF.dropout(x[:, ::2], inplace=True)
    assert bool((x[:, ::2] == 0).any()) and bool((x[:, 1::2] == 1).all())


@pytest.mark.parametrize("make", [lambda g: g, lambda g: g.transpose(2, 3), lambda g: g[:1].expand(4, -1, -1, -1)])
@pytest.mark.parametrize("channels_last", (False, True))
def test_dropout_gradient_of_any_layout(lane, make, channels_last):
    x = torch.randn(4, 3, 6, 6, device=lane.device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    grad = make(torch.randn(4, 3, 6, 6, device=lane.device))
    seed = seed_on(lane)
    (ours,) = torch.autograd.grad(DropoutFunction.apply(x, seed, 0.5, False, backend_of(lane)), x, grad)
    torch.testing.assert_close(ours, dropout_reference(grad, seed, 0.5))
    if channels_last:
        assert ours.is_contiguous(memory_format=torch.channels_last)


def test_dropout_gradcheck(lane):
    seed = seed_on(lane)
    x = torch.randn(2, 3, 2, 3, device=lane.device, dtype=torch.float64, requires_grad=True)

    def function(x):
        return DropoutFunction.apply(x, seed, 0.4, False, backend_of(lane))

    assert torch.autograd.gradcheck(function, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


def test_dropout_opcheck(lane):
    base = torch.randn(2, 3, 4, 4, device=lane.device)
    for x in (base, base.to(memory_format=torch.channels_last), base[:, ::2], base[:0]):
        torch.library.opcheck(torch.ops.fastcnn.dropout.default, (x, seed_on(lane), 0.5, backend_of(lane)))
    torch.library.opcheck(torch.ops.fastcnn.dropout_.default, (base.clone(), seed_on(lane), 0.5, backend_of(lane)))


def test_dropout_compiles_without_a_graph_break(lane):
    compiled = torch.compile(lambda x, p: fF.dropout(x * 2, p) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(64, 9, device=lane.device, requires_grad=True)
    y = compiled(x, 0.25)
    dropped = y == 1
    assert 0 < int(dropped.sum()) < x.numel() // 2
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad == 0, dropped)
    assert not torch.equal(compiled(x, 0.25) == 1, dropped)


def test_dropout_under_autocast_keeps_the_dtype(lane):
    with torch.autocast(lane.device.type, torch.bfloat16):
        assert fF.dropout(torch.ones(4, device=lane.device)).dtype == torch.float32


def test_dropout_follows_the_generator(lane):
    torch.manual_seed(7)
    first, second = kept(lane, 4096, 0.5), kept(lane, 4096, 0.5)
    torch.manual_seed(7)
    assert torch.equal(kept(lane, 4096, 0.5), first)
    assert not torch.equal(first, second)


def test_dropout_backward_has_the_mask_of_forward(lane):
    x = torch.ones(3000, device=lane.device, requires_grad=True)
    y = fF.dropout(x, 0.5)
    torch.rand(10, device=lane.device)
    fF.dropout(x, 0.5)
    for _ in range(2):
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
        assert torch.equal(grad, y)


def test_dropout_in_a_checkpointed_segment(lane):
    x = torch.ones(2000, device=lane.device)

    def gradient(**kwargs):
        torch.manual_seed(1)
        weight = torch.ones_like(x, requires_grad=True)
        y = checkpoint(lambda w: fF.dropout(x * w, 0.5) ** 2, weight, use_reentrant=False, **kwargs)
        torch.rand(1, device=lane.device)
        y.sum().backward()
        return y.detach(), weight.grad

    y, grad = gradient()
    # y = (2 m)^2, so its gradient is 8 m: wrong where the mask of the recomputation is another one
    assert torch.equal(grad, 2 * y)
    y, grad = gradient(preserve_rng_state=False)
    assert not torch.equal(grad, 2 * y)


N = 2**17


@pytest.mark.parametrize("p", (0.5, 0.1, 0.97))
def test_dropout_statistics(lane, p):
    # 6 sigma: a right stream fails one of these in 10^8 runs
    mask = kept(lane, N, p)
    sigma = (p * (1 - p)) ** 0.5
    assert abs(float(mask.mean()) - (1 - p)) < 6 * sigma / N**0.5
    centred = (mask - (1 - p)) / sigma
    for lag in (1, 2, 3, 4, 5, 7, 8, 32, 1000, 1024, 2048, N // 2):
        correlation = float((centred[lag:] * centred[:-lag]).mean())
        assert abs(correlation) < 6 / (N - lag) ** 0.5, f"lag {lag}: {correlation}"
    # each of the four words alone
    assert (centred.reshape(-1, 4).mean(0).abs() < 6 / (N / 4) ** 0.5).all()


def test_dropout_streams_are_uncorrelated(lane):
    def correlation(a, b):
        return abs(float(((2 * a - 1) * (2 * b - 1)).mean()))

    # neighbouring seeds, and seeds that differ in the high word alone
    ones = torch.ones(N, device=lane.device)
    first = (dropout_forward(ones, seed_on(lane, 5), 0.5, backend_of(lane)) != 0).double().cpu()
    for seed in (6, 5 + 2**32):
        other = (dropout_forward(ones, seed_on(lane, seed), 0.5, backend_of(lane)) != 0).double().cpu()
        assert correlation(first, other) < 6 / N**0.5
    # two layers of one forward
    assert correlation(kept(lane, N, 0.5), kept(lane, N, 0.5)) < 6 / N**0.5


def test_dropout_beyond_32_bits_of_groups():
    import numpy as np

    if INTERPRET:
        pytest.skip("the CPU kernel has a lane of its own")
    from fastcnn.kernels.cpu.dropout import fill_verdicts

    first = 2**32 - 2
    verdicts = np.empty(16, np.uint8)
    fill_verdicts(verdicts, first, 4, np.int64(SEED), np.uint64(2**31))
    group = torch.arange(first, first + 4)
    zero = torch.zeros_like(group)
    key = torch.tensor(SEED & 0xFFFFFFFF), torch.tensor(SEED >> 32)
    words = torch.stack(philox_reference((group & 0xFFFFFFFF, group >> 32, zero, zero), key), dim=1).reshape(-1)
    assert verdicts.tolist() == (words >= 2**31).int().tolist()


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRET, reason="runs in the interpreter")
@pytest.mark.parametrize("pixels", (None, 4, 3))
def test_dropout_beyond_32_bits_of_offsets(monkeypatch, pixels):
    # virtual tensors of more than 2^31 elements, of which one program's are touched
    from triton.runtime.interpreter import interpreter_builder

    from fastcnn.kernels.triton.dropout import dropout_kernel, dropout_transposed_kernel
    from fastcnn.ops.dropout import BLOCK

    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        numel = (2**31 // (24 * BLOCK) + 2) * 24 * BLOCK
        x, y = (torch.empty(numel, dtype=torch.float16) for _ in range(2))
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    pid = numel // BLOCK - 1
    set_grid_idx = interpreter_builder.set_grid_idx

    def last_program(*_):
        interpreter_builder.grid_dim = (numel // BLOCK, 1, 1)
        set_grid_idx(pid, 0, 0)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", last_program)
    x[-BLOCK:] = 1
    seed = torch.tensor(SEED)
    if pixels is None:
        dropout_kernel[(1,)](x, y, seed, numel, 2**31, 2.0, INT64=True, BLOCK=BLOCK)
        i = torch.arange(numel - BLOCK, numel)
    else:
        C = 8
        dropout_transposed_kernel[(1,)](
            x, y, seed, numel, pixels, C, 2**31, 2.0, QUADS=pixels % 4 == 0, INT64=True, BLOCK=BLOCK
        )
        offset = torch.arange(numel - BLOCK, numel)
        n, pixel, c = offset // (pixels * C), offset // C % pixels, offset % C
        i = (n * C + c) * pixels + pixel
    zero = torch.zeros_like(i)
    key = torch.tensor(SEED & 0xFFFFFFFF), torch.tensor(SEED >> 32)
    words = torch.stack(philox_reference((i // 4, zero, zero, zero), key))
    expected = (words.gather(0, (i % 4)[None])[0] >= 2**31).half() * 2
    assert torch.equal(y[-BLOCK:], expected)


def test_dropout_host_functions_take_every_layout_in_place(lane):
    x = torch.ones(2, 4, 4, 4, device=lane.device).to(memory_format=torch.channels_last)
    expected = dropout_forward(x, seed_on(lane), 0.5, backend_of(lane))
    dropout_forward_(x, seed_on(lane), 0.5, backend_of(lane))
    assert torch.equal(x, expected)


def test_dropout_refuses_bad_arguments():
    x = torch.ones(3)
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"has to be between 0 and 1, but got"):
            fF.dropout(x, p)
        with pytest.raises(ValueError, match=r"has to be between 0 and 1, but got"):
            fF.dropout(x, p, training=False)
    with pytest.raises(TypeError, match="p must be a float, got '0.5'"):
        fF.dropout(x, "0.5")
    with pytest.raises(TypeError, match="input must be a torch.Tensor, got list"):
        fF.dropout([1.0])
    with pytest.raises(TypeError, match="input must have a floating-point dtype, got torch.int64"):
        fF.dropout(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="input must have a floating-point dtype, got torch.complex64"):
        fF.dropout(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="training must be a bool, got 1"):
        fF.dropout(x, 0.5, 1)
    with pytest.raises(TypeError, match="inplace must be a bool, got None"):
        fF.dropout(x, inplace=None)


def test_dropout_under_vmap_is_torchs():
    with fastcnn.backend("auto"):
        y = torch.func.vmap(lambda x: fF.dropout(x, 0.5), randomness="different")(torch.ones(4, 100))
    assert set(y.flatten().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_plain_dropout_scales_in_evaluation(lane, dtype):
    x = torch.randn(2000, device=lane.device, dtype=dtype, requires_grad=True)
    torch.manual_seed(4)
    y = fF.dropout(x, 0.25, inverted=False)
    torch.manual_seed(4)
    inverted = fF.dropout(x, 0.25)
    torch.testing.assert_close(y, inverted * 0.75)
    assert torch.equal(y[y != 0], x[y != 0])
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, (y != 0).to(dtype))
    assert torch.equal(fF.dropout(x, 0.25, False, inverted=False), x * 0.75)
    scaled = x.detach().clone()
    assert fF.dropout(scaled, 0.25, False, True, inverted=False) is scaled
    assert torch.equal(scaled, x.detach() * 0.75)
    assert fF.dropout(x, 0.0, False, inverted=False) is x


def test_plain_dropout_on_pytorch_and_as_a_module():
    x = torch.ones(1000)
    with fastcnn.backend("torch"):
        assert set(fF.dropout(x, 0.5, inverted=False).tolist()) == {0.0, 1.0}
        assert set(fF.dropout(x.clone(), 0.5, inplace=True, inverted=False).tolist()) == {0.0, 1.0}
    module = fastcnn.nn.PlainDropout(0.25)
    assert set(module(x).tolist()) == {0.0, 1.0} and set(module.eval()(x).tolist()) == {0.75}
    with pytest.raises(TypeError, match="inverted must be a bool, got 0"):
        fF.dropout(x, inverted=0)


def test_dropout_words_are_uniform(lane):
    """Chi-square of the kept elements in every run of four, over the sixteen patterns they make."""
    mask = kept(lane, N, 0.5).reshape(-1, 4).long()
    counts = torch.bincount((mask * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16).double()
    expected = N / 4 / 16
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # 15 degrees of freedom: above 75 with a probability of 10^-9
    assert chi_square < 75
