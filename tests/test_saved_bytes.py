"""What an op keeps for its backward, in bytes: as its docstring says, never more than PyTorch keeps, and no masks.

Parameters do not count, for they lie there anyway. Every storage counts once.
"""

import pytest
import torch
import torch.nn.functional

import fastcnn.functional
from fastcnn.backends import OPS

LANES = ("triton", "cpu")
N, C, H, W = 4, 16, 8, 6
X = 4 * N * C * H * W  # bytes of an image batch in fp32
CHANNELS = 4 * C
SEED = 8


def image(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, H, W, generator=generator)
    return x.to(memory_format=torch.channels_last)


def parameters():
    return [torch.ones(C), torch.zeros(C)]


def eager_batch_norm(F, x, weight, bias, activation=None, residual=None):
    if F is fastcnn.functional:
        return F.batch_norm(x, None, None, weight, bias, True, activation=activation, residual=residual)
    y = F.batch_norm(x, None, None, weight, bias, True)
    y = y if residual is None else y + residual
    return y if activation is None else getattr(F, activation)(y)


def separable(F, x, bias, depthwise, pointwise):
    if F is fastcnn.functional:
        return F.separable_conv2d(x, depthwise, pointwise, bias)
    return F.conv2d(F.conv2d(x, depthwise, groups=C), pointwise, bias)


# cross_entropy keeps the logits themselves, where PyTorch keeps a new tensor of their size, and three numbers per row
ROWS = 3 * 4 * N
# name: (function of a functional module and its tensors, tensors that get gradients, the others,
#        bytes that we keep at most, op as in OPS)
CLASSES = 1000
LOGITS = 4 * N * CLASSES
CASES = {
    "batch_norm": (eager_batch_norm, [image], parameters, X + 2 * CHANNELS, "batch_norm"),
    "batch_norm, relu": (
        lambda F, x, w, b: eager_batch_norm(F, x, w, b, "relu"), [image], parameters, X + 2 * CHANNELS, "batch_norm"
    ),
    "batch_norm, silu": (
        lambda F, x, w, b: eager_batch_norm(F, x, w, b, "silu"), [image], parameters, X + 2 * CHANNELS, "batch_norm"
    ),
    # one bit per element says where the sum was positive
    "batch_norm, add, relu": (
        lambda F, x, z, w, b: eager_batch_norm(F, x, w, b, "relu", z),
        [image, lambda: image(1)], parameters, X + X // 32 + 2 * CHANNELS, "batch_norm",
    ),
    "batch_norm, add": (
        lambda F, x, z, w, b: eager_batch_norm(F, x, w, b, None, z),
        [image, lambda: image(1)], parameters, X + 2 * CHANNELS, "batch_norm",
    ),
    "group_norm": (
        lambda F, x, w, b: F.group_norm(x, 4, w, b), [image], parameters, X + 2 * 4 * N * 4, "group_norm"
    ),
    "instance_norm": (
        lambda F, x, w, b: F.instance_norm(x, None, None, w, b), [image], parameters, X + 2 * 4 * N * C,
        "instance_norm",
    ),
    "layer_norm": (
        lambda F, x, w, b: F.layer_norm(x.permute(0, 2, 3, 1), (C,), w, b), [image], parameters,
        X + 2 * 4 * N * H * W, "layer_norm",
    ),
    "local_response_norm": (
        lambda F, x: F.local_response_norm(x, 5), [image], list, X, "local_response_norm"
    ),
    "separable_conv2d": (
        separable, [image], lambda: [torch.ones(C), torch.ones(C, 1, 3, 3), torch.ones(C, C, 1, 1)], X,
        "separable_conv2d",
    ),
    "dropout": (lambda F, x: F.dropout(x, 0.5), [image], list, SEED, "dropout"),
    "dropout2d": (lambda F, x: F.dropout2d(x, 0.5), [image], list, SEED, "dropout2d"),
    "max_pool2d": (lambda F, x: F.max_pool2d(x, 2), [image], list, N * C * (H // 2) * (W // 2), "max_pool2d"),
    "max_pool2d, overlapping": (
        lambda F, x: F.max_pool2d(x, 3, 2, 1), [image], list, N * C * (H // 2) * (W // 2), "max_pool2d"
    ),
    "avg_pool2d": (lambda F, x: F.avg_pool2d(x, 2), [image], list, 0, "avg_pool2d"),
    "adaptive_avg_pool2d": (lambda F, x: F.adaptive_avg_pool2d(x, 1), [image], list, 0, "adaptive_avg_pool2d"),
    "cross_entropy": (
        lambda F, x: F.cross_entropy(x, torch.arange(N, device=x.device)),
        [lambda: torch.randn(N, CLASSES)], list, LOGITS + 8 * N + ROWS + 4, "cross_entropy",
    ),
    "mse_loss": (
        lambda F, x, t: F.mse_loss(x, t), [image], lambda: [image(1)], 2 * X, "mse_loss"
    ),
    "smooth_l1_loss": (
        lambda F, x, t: F.smooth_l1_loss(x, t), [image], lambda: [image(1)], 2 * X, "smooth_l1_loss"
    ),
    "binary_cross_entropy_with_logits": (
        lambda F, x, t: F.binary_cross_entropy_with_logits(x, t), [image], lambda: [image(1).sigmoid()], 2 * X,
        "binary_cross_entropy_with_logits",
    ),
    "multi_margin_loss": (
        lambda F, x: F.multi_margin_loss(x, torch.arange(N, device=x.device)),
        [lambda: torch.randn(N, CLASSES)], list, LOGITS + 8 * N, "multi_margin_loss",
    ),
}  # fmt: skip


def kept(function, tensors):
    """The tensors kept for backward, each storage once, without the given parameters."""
    found = {}
    own = {t.untyped_storage().data_ptr() for t in tensors["parameters"]}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    return list(found.values())


def run(F, case, device):
    call, make, others, _, _ = CASES[case]
    leaves = [make().to(device).requires_grad_() for make in make]
    rest = [t.to(device) for t in others()]
    is_parameter = rest and rest[0].shape == (C,)
    if is_parameter:
        rest = [t.requires_grad_() for t in rest]
    return kept(lambda: call(F, *leaves, *rest), {"parameters": rest if is_parameter else []})


def size(tensors):
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("case", CASES)
def test_kept_for_backward(case, lane):
    *_, most, name = CASES[case]
    op = next(op for op in OPS if op.name == name)
    # where PyTorch itself runs, our way to it keeps nothing more
    own = lane.name != "cpu" or (op.cpu_kernel and "silu" not in case)
    fastcnn.strict(own)
    ours, theirs = (run(F, case, lane.device) for F in (fastcnn.functional, torch.nn.functional))
    assert size(ours) <= size(theirs) + (ROWS if case == "cross_entropy" and own else 0)
    if own:
        assert size(ours) <= most
        for tensor in ours:
            assert tensor.dtype != torch.bool, "a mask"
            assert tensor.dtype != torch.int64 or tensor.numel() <= N, "64-bit indices"
