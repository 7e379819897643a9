"""Stochastic depth: y[n] = residual[n] + x[n] * b[n] / (1 - p), b[n] = 0 with probability p, else 1; x [N, ...].

Mode "row" draws b for every sample, mode "batch" once. Without residual it is torchvision.ops.stochastic_depth; the
same formula is called drop path (timm, FractalNet). Saved for backward: the seed, eight bytes; the residual's gradient
is that of y. Torch has no counterpart. Source: Huang, Sun, Liu, Sedra and Weinberger 2016. The kernels are those of
ops/feature_dropout.py.
"""

import torch

from fastcnn.backends import Op
from fastcnn.ops import common
from fastcnn.ops.dropout import check_p_and_flags, draw_seed
from fastcnn.ops.feature_dropout import FeatureDropoutFunction, feature_dropout_reference, why_not

LEADING = {"row": 1, "batch": 0}


def stochastic_depth_reference(input, residual, seed, p, mode):
    """y for this seed (int64 tensor of one element) in plain PyTorch."""
    return feature_dropout_reference(input, residual, seed, p, LEADING[mode])


_op = Op(
    "stochastic_depth",
    cpu_kernel=True,
    cpu_auto=False,
    why="PyTorch's product and sum are one pass, too, and start fewer kernels",
)


def stochastic_depth(input, p, mode="row", training=True, *, residual=None):
    """Drop whole samples with probability p and scale the others by 1 / (1 - p); the identity in evaluation.

    As torchvision.ops.stochastic_depth, with a random stream of its own and no mask kept for backward.

    Args:
        input: [N, ...], floating-point, any layout: the residual branch.
        p: probability of dropping, between 0 and 1.
        mode: "row" draws for every sample, "batch" once for all.
        training: False drops and scales nothing.
        residual: tensor like input, the shortcut, added in the same pass; or None.

    Returns:
        tensor with the shape, dtype and layout of input.

    Raises:
        TypeError: input is no floating-point tensor, residual has another dtype, or an argument has the wrong type.
        ValueError: p is not between 0 and 1, mode is another, or residual has another shape or device.
    """
    common.check_tensor("input", input)
    check_p_and_flags(p, training=training)
    if mode not in LEADING:
        raise ValueError(f"mode has to be either 'batch' or 'row', but got {mode!r}")
    if input.dim() == 0:
        raise ValueError("input must have a first dimension, the batch, got a scalar")
    common.check_float("input", input)
    if residual is not None:
        common.check_tensor("residual", residual)
        common.check_alike("residual", residual, "input", input)
        if residual.shape != input.shape:
            raise ValueError(
                f"residual must have the shape of input, {tuple(input.shape)}, got {tuple(residual.shape)}"
            )
    if not training or p == 0 or input.numel() == 0:
        return input if residual is None else residual + input
    backend = _op.route(input, lambda backend: why_not(backend, input, LEADING[mode]))
    if backend == "torch":
        size = (len(input) if mode == "row" else 1, *[1] * (input.dim() - 1))
        factors = torch.empty(size, dtype=input.dtype, device=input.device).bernoulli_(1 - p)
        if p < 1:
            factors.div_(1 - p)
        return input * factors if residual is None else torch.addcmul(residual, input, factors)
    return FeatureDropoutFunction.apply(input, residual, draw_seed(input), float(p), LEADING[mode], False, backend)
