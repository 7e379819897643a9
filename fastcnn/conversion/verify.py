"""A converted model against stock PyTorch and the truth, on one batch."""

import copy

import torch

from fastcnn import testing
from fastcnn.backends import _table, backend


class Verification:
    """Printed, a table; `ok` is whether every tensor passed, also as bool().

    rows: list of (name, our error, PyTorch's error, "" or what is wrong).
    """

    def __init__(self, rows):
        self.rows = rows

    @property
    def ok(self):
        """Whether our errors are at most twice PyTorch's plus the dtype's floor everywhere."""
        return not any(row[3] for row in self.rows)

    __bool__ = ok.fget

    def __str__(self):
        lines = [(name, f"{mine:.2e}", f"{theirs:.2e}", wrong) for name, mine, theirs, wrong in self.rows]
        return _table([("tensor", "error", "PyTorch's", "wrong"), *lines])

    __repr__ = __str__


def verify(model, batch):
    """Compare a converted model with stock PyTorch on one batch: outputs, every gradient, running statistics.

    Both run on copies, in the model's mode, from the same random numbers; the truth is stock PyTorch in fp64. A tensor
    passes if its error is at most twice PyTorch's own plus the floor of its dtype. Models that drop at random agree
    only where ours draws PyTorch's numbers: set dropouts to 0 or use evaluation.

    Args:
        model: torch.nn.Module, converted or not; it stays as it is.
        batch: a tensor, or a tuple of the arguments, on the model's device.

    Returns:
        Verification: `print(...)` it, or ask `.ok`.
    """
    from fastcnn.conversion import revert

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    arguments = batch if isinstance(batch, tuple) else (batch,)
    stock = revert(copy.deepcopy(model))
    truth = copy.deepcopy(stock).double()
    devices = sorted({t.device.index for t in model.parameters() if t.is_cuda})
    with torch.random.fork_rng(devices):
        seed = torch.seed()
        ours = _tensors(copy.deepcopy(model), arguments, seed)
        with backend("torch"):
            theirs = _tensors(stock, arguments, seed)
            doubles = tuple(a.double() if _is_float(a) else a for a in arguments)
            true = _tensors(truth, doubles, seed)
    rows = []
    for name, mine in ours.items():
        wrong = ""
        try:
            testing.assert_close_to_truth(name, mine, theirs[name], true[name].double(), mine.dtype)
        except AssertionError as error:
            wrong = str(error)
        rows.append((name, _error(mine, true[name]), _error(theirs[name], true[name]), wrong))
    return Verification(rows)


def _is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _error(tensor, truth):
    return float((tensor.double() - truth.double()).abs().max()) if tensor.numel() else 0.0


def _tensors(model, arguments, seed):
    # {name: tensor} of all that one step makes
    torch.manual_seed(seed)
    leaves = [a.detach().requires_grad_() if _is_float(a) else a for a in arguments]
    outputs = []
    _collect(model(*leaves), outputs)
    found = {f"output {i}" if len(outputs) > 1 else "output": t.detach() for i, t in enumerate(outputs)}
    differentiable = [t for t in outputs if t.requires_grad]
    if differentiable:
        torch.autograd.backward(differentiable, [testing.make_grad(t, i) for i, t in enumerate(differentiable)])
    for i, leaf in enumerate(leaves):
        if _is_float(leaf) and leaf.grad is not None:
            found[f"gradient of input {i}"] = leaf.grad
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def _collect(value, found):
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)
