import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastcnn
import fastcnn.functional as fF
from fastcnn import nn
from fastcnn.ops.stochastic_depth import stochastic_depth_reference
from fastcnn.testing import assert_matches

LANES = ("triton", "cpu")


def seed_of_next_call(lane):
    """The seed that the next call draws."""
    torch.manual_seed(11)
    seed = torch.randint(2**63 - 1, (), device=lane.device)
    torch.manual_seed(11)
    return seed


@pytest.mark.parametrize("mode", ("row", "batch"))
@pytest.mark.parametrize("with_residual", (False, True))
@pytest.mark.parametrize("last", (False, True))
def test_stochastic_depth_matches_the_reference(lane, mode, with_residual, last):
    layout = torch.channels_last if last else torch.contiguous_format
    x, residual = (torch.randn(17, 6, 5, 3, device=lane.device).contiguous(memory_format=layout) for _ in range(2))
    seed = seed_of_next_call(lane)

    def ours(x, residual):
        torch.manual_seed(11)
        return fF.stochastic_depth(x, 0.4, mode, residual=residual)

    assert_matches(
        ours,
        lambda x, residual: stochastic_depth_reference(x, residual, seed, 0.4, mode),
        x.requires_grad_(),
        residual.requires_grad_() if with_residual else None,
    )


def test_whole_samples_are_dropped(lane):
    x = torch.randn(64, 3, 5, device=lane.device)
    factors = (fF.stochastic_depth(x, 0.25, "row") / x).flatten(1)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    assert {round(v, 4) for v in factors[:, 0].tolist()} == {0.0, 1.3333}
    seen = {round(float((fF.stochastic_depth(x, 0.5, "batch") / x).mean()), 4) for _ in range(40)}
    assert seen == {0.0, 2.0}


def test_gradient_of_the_residual_is_that_of_the_output(lane):
    x, residual = (torch.randn(4, 6, device=lane.device, requires_grad=True) for _ in range(2))
    y = fF.stochastic_depth(x, 0.5, residual=residual)
    grad = torch.randn(4, 6, device=lane.device)
    grad_x, grad_residual = torch.autograd.grad(y, (x, residual), grad)
    assert torch.equal(grad_residual, grad)
    torch.testing.assert_close(grad_x, grad * ((y - residual) / x).detach())


def test_residual_of_another_layout_or_expanded(lane):
    x = torch.randn(5, 4, 3, 3, device=lane.device).to(memory_format=torch.channels_last)
    for residual in (torch.randn(5, 4, 3, 3), torch.randn(1, 4, 3, 3).expand(5, -1, -1, -1), torch.randn(3, 3, 5, 4)):
        residual = residual.to(lane.device)
        if residual.shape != x.shape:
            residual = residual.permute(2, 3, 0, 1)
        seed = seed_of_next_call(lane)
        y = fF.stochastic_depth(x, 0.5, residual=residual)
        torch.testing.assert_close(y, stochastic_depth_reference(x, residual, seed, 0.5, "row"))
        assert y.stride() == x.stride()


def test_identity_in_evaluation(lane):
    x, residual = torch.randn(3, 4, device=lane.device), torch.randn(3, 4, device=lane.device)
    state = torch.get_rng_state()
    assert fF.stochastic_depth(x, 0.5, "row", False) is x and fF.stochastic_depth(x, 0.0) is x
    assert torch.equal(fF.stochastic_depth(x, 0.5, training=False, residual=residual), x + residual)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fF.stochastic_depth(x, 1.0, residual=residual), residual)


def test_stochastic_depth_in_a_checkpointed_segment(lane):
    x = torch.ones(40, 5, device=lane.device)
    weight = torch.ones_like(x, requires_grad=True)
    torch.manual_seed(1)
    y = checkpoint(lambda w: fF.stochastic_depth(x * w, 0.5) ** 2, weight, use_reentrant=False)
    torch.rand(1, device=lane.device)
    y.sum().backward()
    assert torch.equal(weight.grad, 2 * y)


def test_double_backward_with_a_residual(lane):
    x, residual = (torch.randn(4, 6, device=lane.device, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x, residual):
        torch.manual_seed(2)
        return fF.stochastic_depth(x, 0.5, residual=residual).tanh()

    assert torch.autograd.gradcheck(function, (x, residual))
    assert torch.autograd.gradgradcheck(function, (x, residual))


def test_pytorch_runs_where_ours_does_not():
    x, residual = torch.ones(400, 4, dtype=torch.float16), torch.ones(400, 4, dtype=torch.float16)
    with fastcnn.backend("torch"):
        assert set(fF.stochastic_depth(x, 0.5).flatten().tolist()) == {0.0, 2.0}
        assert set(fF.stochastic_depth(x, 0.5, residual=residual).flatten().tolist()) == {1.0, 3.0}
        assert not fF.stochastic_depth(x, 1.0).any()


def test_module_is_as_torchvisions():
    module = nn.StochasticDepth(0.2, "batch")
    assert repr(module) == "StochasticDepth(p=0.2, mode=batch)"
    assert not list(module.parameters())
    x = torch.ones(1000, 2)
    assert module.eval()(x) is x
    y = nn.StochasticDepth(0.5)(x, x)
    assert set(y.flatten().tolist()) == {1.0, 3.0}


def test_stochastic_depth_refuses_bad_arguments():
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match="mode has to be either 'batch' or 'row', but got 'column'"):
        fF.stochastic_depth(x, 0.5, "column")
    with pytest.raises(ValueError, match="has to be between 0 and 1, but got 2"):
        fF.stochastic_depth(x, 2)
    with pytest.raises(ValueError, match=r"residual must have the shape of input, \(3, 2\), got \(2,\)"):
        fF.stochastic_depth(x, 0.5, residual=x[0])
    with pytest.raises(TypeError, match="residual must have the dtype of input"):
        fF.stochastic_depth(x, 0.5, residual=x.double())
    with pytest.raises(TypeError, match="input must have a floating-point dtype"):
        fF.stochastic_depth(x.long(), 0.5)
    with pytest.raises(ValueError, match="got a scalar"):
        fF.stochastic_depth(x[0, 0], 0.5)
    with pytest.raises(TypeError, match="training must be a bool"):
        fF.stochastic_depth(x, 0.5, "row", None)
