"""Comparing an op with the truth. Shared by the tests, the benchmarks' correctness gate and `fastcnn.verify`.

The truth is the reference in fp64 on the same rounded inputs. The yardstick is PyTorch's own error in the tested dtype:
a result passes if its error is at most twice that, plus a floor per dtype (the rule of flash-attention's tests).
"""

import math

import torch

# absolute floor for values of order 1: a few roundings of the dtype
FLOORS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def make_grad(output, seed=0):
    """A reproducible random gradient with the shape, dtype, device and strides of an output."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return torch.empty_like(output).copy_(values)


def run_with_grads(function, inputs, grad_output=None):
    """Output of function(*inputs), and the gradients of its floating-point tensor inputs that require grad.

    Returns:
        (output, [gradients]) ; gradients follow the order of inputs, None where there is none.
    """
    leaves = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in inputs]
    output = function(*leaves)
    wanted = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    if not wanted:
        return output.detach(), []
    if grad_output is None:
        grad_output = make_grad(output)
    grads = torch.autograd.grad(output, wanted, grad_output.to(output.dtype), allow_unused=True)
    return output.detach(), list(grads)


def assert_close_to_truth(name, ours, torch_result, truth, dtype):
    """Raise AssertionError unless error(ours) <= 2 * error(torch) + floor, with NaN and Inf in the same places."""
    if ours.shape != truth.shape:
        raise AssertionError(f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}")
    if ours.numel() == 0 or _all_finite_and_close(ours, torch_result, truth, dtype):
        return
    ours64, torch64 = ours.to(truth.device, torch.float64), torch_result.to(truth.device, torch.float64)
    # an overflow of the dtype is no error of ours: what torch has as NaN or Inf, we must have, too
    special = ~torch.isfinite(torch64)
    if not torch.equal(
        torch.nan_to_num(ours64, nan=1.0, posinf=2.0, neginf=3.0)[special],
        torch.nan_to_num(torch64, nan=1.0, posinf=2.0, neginf=3.0)[special],
    ):
        raise AssertionError(f"{name}: NaN or Inf where PyTorch has another one")
    error = (ours64 - truth).abs()[~special]
    if error.numel() == 0:
        return
    yardstick = (torch64 - truth).abs()[~special].max()
    scale = truth[~special].abs().max().clamp(min=1.0)
    limit = 2 * yardstick + FLOORS[dtype] * scale
    if not bool(error.max() <= limit):
        worst = int(torch.where(special, -1.0, (ours64 - truth).abs().nan_to_num(nan=torch.inf)).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ours.shape))
        raise AssertionError(
            f"{name}: error {float(error.max()):.3e} at {index} (ours {float(ours64[index]):.6g}, truth "
            f"{float(truth[index]):.6g}) exceeds twice PyTorch's {float(yardstick):.3e} plus the floor of {dtype}"
        )


def _all_finite_and_close(ours, torch_result, truth, dtype):
    # the usual case in few passes over memory: benchmarks compare billions of elements
    def distance(tensor):
        difference = tensor.to(truth.device, torch.float64, memory_format=torch.contiguous_format)
        return float(torch.linalg.vector_norm(difference - truth, torch.inf))

    scale = max(float(torch.linalg.vector_norm(truth, torch.inf)), 1.0)
    limit = 2 * distance(torch_result) + FLOORS[dtype] * scale
    return math.isfinite(limit) and distance(ours) <= limit  # NaN is in no distance


def assert_matches(function, reference, *inputs):
    """Compare function with reference: output and every gradient, dtype, device and shape.

    Args:
        function: ours.
        reference: plain PyTorch, any dtype.
        inputs: tensors (those with requires_grad get gradients compared) and other arguments. Their first
            floating-point tensor sets the tested dtype.

    Raises:
        AssertionError: naming the tensor and its worst element.
    """
    dtype = next(t.dtype for t in inputs if isinstance(t, torch.Tensor) and t.is_floating_point())

    def to64(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    ours, our_grads = run_with_grads(function, inputs)
    grad_output = make_grad(ours)
    theirs, torch_grads = run_with_grads(reference, inputs, grad_output)
    truth, true_grads = run_with_grads(reference, [to64(t) for t in inputs], grad_output)
    if ours.dtype != theirs.dtype:
        raise AssertionError(f"output: dtype {ours.dtype}, PyTorch gives {theirs.dtype}")
    assert_close_to_truth("output", ours, theirs, truth, dtype)
    wanted = [i for i, t in enumerate(inputs) if isinstance(t, torch.Tensor) and t.requires_grad]
    for i, our, theirs, true in zip(wanted, our_grads, torch_grads, true_grads, strict=True):
        if (our is None) != (theirs is None):
            raise AssertionError(f"gradient of input {i}: {our}, PyTorch gives {theirs}")
        if our is not None:
            if our.dtype != inputs[i].dtype:
                raise AssertionError(f"gradient of input {i}: dtype {our.dtype} for an input of {inputs[i].dtype}")
            assert_close_to_truth(f"gradient of input {i}", our, theirs, true, dtype)
