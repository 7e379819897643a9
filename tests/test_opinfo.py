"""PyTorch's own samples of our ops (torch.testing._internal): values, gradients, side effects, strides, errors agree.

On CPU every op runs under backend "cpu" (our kernels where they exist) and "auto". In the interpreter the Triton
kernels run all samples but those of max_pool2d, of which every seventh runs; those of convolution once more in each of
the families that take any tensor.
"""

import os
from collections import Counter

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

import fastcnn
import fastcnn.functional as F
from fastcnn.backends import OPS
from fastcnn.ops import conv_launch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = {
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    **{
        f"nn.functional.{name}": name
        for name in (
            "adaptive_avg_pool2d",
            "adaptive_max_pool2d",
            "avg_pool2d",
            "batch_norm",
            "binary_cross_entropy_with_logits",
            "conv2d",
            "conv_transpose2d",
            "cross_entropy",
            "gelu",
            "group_norm",
            "hardswish",
            "huber_loss",
            "instance_norm",
            "l1_loss",
            "layer_norm",
            "leaky_relu",
            "linear",
            "local_response_norm",
            "max_pool2d",
            "mse_loss",
            "multi_margin_loss",
            "relu",
            "relu6",
            "silu",
            "smooth_l1_loss",
        )
    },
}
INFOS = {NAMES[info.name]: info for info in op_db if info.name in NAMES and info.variant_test_name == ""}
BACKENDS = ("triton",) if INTERPRET else ("cpu", "auto")
EVERY = {"max_pool2d": 7} if INTERPRET else {}


# channels_last stays where PyTorch makes the output contiguous
KEEP_LAYOUT = ("instance_norm",)
# of a row of one element PyTorch's gradient is rounding times 1 / sqrt(eps), and ours the truth, 0
TOLERANCES = {"layer_norm": dict(rtol=1.3e-6, atol=1e-4)}
# what takes some of an op's calls
ALSO = {"conv2d": "depthwise_conv2d"}


def test_all_ops_have_samples():
    assert set(INFOS) == set(NAMES.values())


def backends():
    mark = [pytest.mark.interpret] if INTERPRET else []
    return [pytest.param(name, marks=mark) for name in BACKENDS]


def plain(tensor):
    return tensor


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def every_second(tensor):
    """The same values with gaps of NaN between the elements of the last dimension."""
    if tensor.dim() == 0:
        return tensor
    wide = torch.full((*tensor.shape, 2), torch.nan if tensor.is_floating_point() else 0, dtype=tensor.dtype)
    wide[..., 0] = tensor.detach()
    return wide[..., 0].requires_grad_(tensor.requires_grad)


def run(function, sample, layout):
    """Outputs, gradients of a fixed random gradient, and the arguments after the call."""
    leaves = []

    def fresh(value):
        if not isinstance(value, torch.Tensor):
            return value
        copy = layout(value.detach().clone().requires_grad_(value.requires_grad))
        if copy.requires_grad and copy.is_floating_point():
            copy = copy.detach().requires_grad_()
            leaves.append(copy)
        return copy

    args = [fresh(sample.input), *(fresh(a) for a in sample.args)]
    kwargs = {k: fresh(v) for k, v in sample.kwargs.items()}
    outputs = function(*args, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(0)
    differentiable = [o for o in outputs if o.requires_grad]
    grads = []
    if differentiable and leaves:
        weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in differentiable]
        grads = torch.autograd.grad(differentiable, leaves, weights, allow_unused=True)
    return outputs, grads, [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("layout", (plain, channels_last, every_second), ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", INFOS)
def test_samples_agree(name, layout, backend):
    check_samples(name, layout, backend)


def check_samples(name, layout, backend):
    """Our function and torch's agree on the samples, in values, strides, gradients and side effects."""
    info, ours = INFOS[name], getattr(F, name)
    samples = list(info.sample_inputs("cpu", torch.float32, requires_grad=True))[:: EVERY.get(name, 1)]
    with fastcnn.backend(backend):
        for number, sample in enumerate(samples):
            theirs = run(info.op, sample, layout)
            mine = run(ours, sample, layout)
            for what, a, b in zip(("output", "gradient", "argument"), mine, theirs, strict=True):
                assert len(a) == len(b)
                for x, y in zip(a, b, strict=True):
                    place = f"{what} of sample {number}: {sample.input.shape} {sample.args} {sample.kwargs}"
                    assert (x is None) == (y is None), place
                    if x is not None:
                        torch.testing.assert_close(
                            x, y, equal_nan=True, msg=lambda m, p=place: f"{p}\n{m}", **TOLERANCES.get(name, {})
                        )
                    if what == "output" and name not in KEEP_LAYOUT:
                        sizes = [(st, si) for st, si in zip(x.stride(), x.shape, strict=True) if si > 1]
                        expected = [(st, si) for st, si in zip(y.stride(), y.shape, strict=True) if si > 1]
                        assert sizes == expected or x.numel() == 0, place


@pytest.mark.parametrize("name", ("dropout", "dropout2d", "dropout3d"))
@pytest.mark.parametrize("backend", backends())
def test_dropout_samples(backend, name):
    """Random, so not equal to torch's: every element is 0 or scaled, as its gradient is, and eval is the identity."""
    info = next(info for info in op_db if info.name == f"nn.functional.{name}")
    with fastcnn.backend(backend):
        for sample in info.sample_inputs("cpu", torch.float32, requires_grad=True):
            x = sample.input.detach().clone().requires_grad_()
            p, training = sample.kwargs.get("p", 0.5), sample.kwargs.get("training", True)
            y = getattr(F, name)(x, *sample.args, **{k: v for k, v in sample.kwargs.items() if k != "inplace"})
            (grad,) = torch.autograd.grad(y.sum(), x)
            factor = 1.0 if not training else 0.0 if p == 1 else 1 / (1 - p)
            assert y.shape == x.shape and y.dtype == x.dtype
            assert ((grad == 0) | ((grad - factor).abs() < 1e-6)).all()
            torch.testing.assert_close(y, x * grad)
            if not training or p == 0:
                assert torch.equal(y, x)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", [n for n, info in INFOS.items() if info.error_inputs_func is not None])
def test_errors_agree(name, backend):
    info, ours = INFOS[name], getattr(F, name)
    with fastcnn.backend(backend):
        for error in info.error_inputs("cpu"):
            sample = error.sample_input
            with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)) as caught:
                ours(sample.input, *sample.args, **sample.kwargs)
            assert str(caught.value), f"no message for {sample}"


if INTERPRET:

    @pytest.mark.interpret
    @pytest.mark.parametrize("family", ("gather", "folded"))
    @pytest.mark.parametrize("name", ("conv2d", "conv_transpose2d"))
    def test_samples_agree_in_a_family(name, family, monkeypatch):
        """Whatever is predicted to be faster. No sample has the whole rows of memory that images and stem need."""
        ranked, families = conv_launch.ranked, set()

        def preferred(problem, chip):
            found = sorted(ranked(problem, chip), key=lambda pair: pair[1].family != family)
            families.add(found[0][1].family)
            return found

        monkeypatch.setattr(conv_launch, "ranked", preferred)
        monkeypatch.setattr(conv_launch, "_chosen", {})
        check_samples(name, channels_last, "triton")
        assert family in families

    @pytest.mark.interpret
    @pytest.mark.parametrize("name", INFOS)
    def test_our_kernels_ran_the_samples(name):
        """The comparison above means something only where our kernel ran: it takes at least nine samples of ten."""
        ops = [op for op in OPS if op.name in (name, ALSO.get(name))]
        for op in ops:
            op.calls.clear()
        samples = list(INFOS[name].sample_inputs("cpu", torch.float32, requires_grad=False))[:: EVERY.get(name, 1)]
        with fastcnn.backend("triton"):
            for sample in samples:
                getattr(F, name)(sample.input, *sample.args, **sample.kwargs)
        ran = Counter()
        for op in ops:
            for (backend, reason), count in op.calls.items():
                ran[backend if backend == "triton" else reason] += count
        assert ran["triton"] >= 0.9 * len(samples), dict(ran)
