"""Decorrelated batch norm: y = W (x - mean) * weight + bias, W = (S + eps I)^-1/2 whitens groups of channels (ZCA).

x [N, C, ...]. S [d, d] is the covariance of a group of d channels over everything but the channels, its symmetric
inverse root W comes from the eigenvectors V and eigenvalues l of S: W = V diag((l + eps)^-1/2) V^T. In evaluation
running_mean [C] and running_whitening [C / d, d, d] take the places of mean and W; training moves them towards those
of the batch. Groups of one channel are batch norm. Saved for backward: x, weight, mean, and per group V and the
(l + eps)^-1/2 (training) or the running statistics (evaluation). Torch has no counterpart. Source: Huang, Yang, Lang
and Deng 2018.

The gradient of W's inverse root has the closed form V (K * (V^T dW V)) V^T, K_ij = -r_i^2 r_j^2 / (r_i + r_j) with
r = (l + eps)^-1/2, which holds for equal eigenvalues, too; a gradient through torch.linalg.eigh divides by their
difference. Means, covariances and the decomposition are in fp64; sums of products are about a pivot near the mean.
"""

import torch

from fastcnn.backends import Op
from fastcnn.ops import channel_groups as groups
from fastcnn.ops import common

SAMPLE = 1024  # pixels, at most and spread over all, whose mean is the pivot


def decorrelated_batch_norm_reference(
    x, running_mean, running_whitening, weight, bias, training, eps, group_size
):  # fmt: skip
    """The same in plain PyTorch; leaves the running statistics alone."""
    N, C, *rest = x.shape
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).reshape(C // group_size, group_size, -1)
    if training:
        centred = wide - wide.mean(2, keepdim=True)
        values, vectors = torch.linalg.eigh(centred @ centred.mT / centred.shape[2])
        whitening = (vectors * (values.clamp(min=0) + eps).rsqrt()[:, None, :]) @ vectors.mT
    else:
        centred = wide - running_mean.view(-1, group_size, 1)
        whitening = running_whitening.to(wide.dtype)
    y = (whitening @ centred).reshape(C, N, *rest).transpose(0, 1)
    shape = (C, *[1] * len(rest))
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(x.dtype).contiguous(memory_format=_memory_format(x))


def _why_not(backend, x, parameters, group_size):
    if x.dtype not in common.FLOATS:
        return f"decorrelated_batch_norm has kernels for floating-point tensors and got {x.dtype}"
    largest = groups.LARGEST[x.dtype.itemsize]
    if backend == "triton" and group_size > largest:
        return f"decorrelated_batch_norm has kernels for groups of at most {largest} channels and got {group_size}"
    if not all(t is None or t.is_contiguous() for t in parameters):
        return "decorrelated_batch_norm has kernels for contiguous weight, bias and running statistics"
    return None


def _memory_format(x):
    """The layout of the output: channels_last if x is, else contiguous."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _pivot(x):
    N, _, pixels = x.shape
    image_step = max(1, N // SAMPLE)
    sample = x[::image_step, :, :: max(1, N * pixels // (image_step * SAMPLE))]
    return sample.to(groups.wide_dtype(x)).mean((0, 2)).double()


def _planes(x):
    """x as [N, C, pixels], a view."""
    return x.view(*x.shape[:2], -1) if x.is_contiguous() else x.flatten(2)


def _factors(weight, C, device):
    return torch.ones(C, dtype=torch.float64, device=device) if weight is None else weight.detach().double()


def _matrix_of(basis, roots):
    """The whitening matrix from what is saved: itself in evaluation, its eigenvectors and eigenvalues in training."""
    basis = basis.double()
    return basis if roots is None else (basis * roots[:, None, :]) @ basis.mT


def decorrelated_batch_norm_forward(
    x, weight, bias, running_mean, running_whitening, momentum, eps, group_size, backend
):  # fmt: skip
    """Training: returns (y, mean, basis, roots), the latter three fp64, and updates the running statistics, if any."""
    y, mean, basis, roots = _allocate_forward(x, group_size)
    if x.numel() == 0:
        return y, mean.zero_(), basis.zero_(), roots.zero_()
    C = x.shape[1]
    x = x.contiguous(memory_format=_memory_format(x))
    pixels = x.numel() // C
    pivot = _pivot(_planes(x))
    pivot = torch.where(pivot.isfinite(), pivot, 0.0)
    products, sums = groups.products_of(None, x, pivot, group_size, backend)
    distance = sums / pixels
    mean = pivot + distance
    covariance = products / pixels - groups.outer(distance, distance, group_size)
    # eigh refuses NaN and Inf; a group that has one gets NaN everywhere
    finite = covariance.isfinite().all(2).all(1)[:, None, None]
    values, basis = torch.linalg.eigh(torch.where(finite, covariance, 0.0))
    roots = torch.where(finite[:, 0], (values.clamp(min=0) + eps).rsqrt(), torch.nan)
    whitening = _matrix_of(basis, roots)
    if running_mean is not None:
        running_mean.copy_((1 - momentum) * running_mean.double() + momentum * mean)
        running_whitening.copy_((1 - momentum) * running_whitening.double() + momentum * whitening)
    y = _normalise(x, weight, bias, mean, whitening, group_size, backend)
    return y, mean, basis.contiguous(), roots.contiguous()


def decorrelated_batch_norm_forward_eval(x, weight, bias, mean, whitening, group_size, backend):
    """Evaluation: y from the running statistics."""
    if x.numel() == 0:
        return _allocate_output(x)
    x = x.contiguous(memory_format=_memory_format(x))
    return _normalise(x, weight, bias, mean.double(), whitening.double(), group_size, backend)


def _normalise(x, weight, bias, mean, whitening, group_size, backend):
    scaled = _factors(weight, x.shape[1], x.device).view(-1, group_size, 1) * whitening
    shift = torch.zeros_like(mean) if bias is None else bias.detach().double()
    return groups.map_channels(None, None, x, mean, scaled.mT, shift, x, group_size, backend)


def decorrelated_batch_norm_backward(
    grad_output, x, weight, mean, basis, roots, group_size, need_input, need_params, backend
):  # fmt: skip
    """(grad_input, grad_weight, grad_bias), the latter two in the dtype of weight; empty where not needed.

    mean, basis and roots are what forward returned; in evaluation the running statistics and None.
    """
    grad_input, grad_weight, grad_bias = _allocate_backward(x, weight, need_input, need_params)
    if x.numel() == 0:
        return grad_input.zero_(), grad_weight.zero_(), grad_bias.zero_()
    C = x.shape[1]
    memory_format = _memory_format(x)
    x, grad_output = (t.contiguous(memory_format=memory_format) for t in (x, grad_output))
    mean, whitening = mean.double(), _matrix_of(basis, roots)
    scaled = _factors(weight, C, x.device).view(-1, group_size, 1) * whitening
    if need_params or roots is not None:
        products, sums = groups.products_of(grad_output, x, mean, group_size, backend)
    if need_params:
        grad_weight.copy_((products * whitening).sum(2).view(-1))
        grad_bias.copy_(sums)
    if need_input and roots is None:
        shift = torch.zeros_like(mean)
        grad_input = groups.map_channels(grad_output, scaled, None, None, None, shift, x, group_size, backend)
    elif need_input:
        # through x - mean: scaled^T dy less its mean; through the covariance: x - mean times the matrix `symmetric`
        pixels = x.numel() // C
        grad_whitening = _factors(weight, C, x.device).view(-1, group_size, 1) * products
        squares = roots * roots
        kernel = -squares[:, :, None] * squares[:, None, :] / (roots[:, :, None] + roots[:, None, :])
        symmetric = basis.mT @ (grad_whitening + grad_whitening.mT) @ basis
        symmetric = basis @ (kernel * symmetric) @ basis.mT / pixels
        shift = -(scaled.mT @ sums.view(-1, group_size, 1)).view(-1) / pixels
        grad_input = groups.map_channels(grad_output, scaled, x, mean, symmetric, shift, x, group_size, backend)
    return grad_input, grad_weight, grad_bias


def _allocate_output(x):
    return torch.empty_like(x, memory_format=_memory_format(x))


def _allocate_forward(x, group_size):
    C = x.shape[1]
    shapes = ((C,), (C // group_size, group_size, group_size), (C // group_size, group_size))
    return _allocate_output(x), *(x.new_empty(shape, dtype=torch.float64) for shape in shapes)


def _allocate_backward(x, weight, need_input, need_params):
    grad_input = _allocate_output(x) if need_input else x.new_empty(0)
    like = x if weight is None else weight
    sizes = (x.shape[1],) if need_params else (0,)
    return grad_input, like.new_empty(sizes), like.new_empty(sizes)


_forward = common.register(
    "decorrelated_batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_whitening, float momentum, float eps, int group_size, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    decorrelated_batch_norm_forward,
    lambda x, w, b, mean, whitening, momentum, eps, group_size, backend: _allocate_forward(x, group_size),
)
_forward_eval = common.register(
    "decorrelated_batch_norm_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor whitening, "
    "int group_size, str backend) -> Tensor",
    decorrelated_batch_norm_forward_eval,
    lambda x, *_: _allocate_output(x),
)
_backward = common.register(
    "decorrelated_batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor basis, "
    "Tensor? roots, int group_size, bool need_input, bool need_params, str backend) -> (Tensor, Tensor, Tensor)",
    decorrelated_batch_norm_backward,
    lambda grad_output, x, weight, mean, basis, roots, group_size, need_input, need_params, backend: _allocate_backward(
        x, weight, need_input, need_params
    ),
)


class DecorrelatedBatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_whitening, training, momentum, eps, group_size, backend):
        if training:
            y, mean, basis, roots = _forward(
                x, weight, bias, running_mean, running_whitening, momentum, eps, group_size, backend
            )
        else:
            y = _forward_eval(x, weight, bias, running_mean, running_whitening, group_size, backend)
            mean, basis, roots = running_mean, running_whitening, None
        ctx.save_for_backward(x, weight, bias, mean, basis, roots)
        ctx.arguments = (training, eps, group_size, backend)
        return y

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, bias, mean, basis, roots = ctx.saved_tensors
        training, eps, group_size, backend = ctx.arguments
        need_input, need_weight, need_bias = needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            grads = common.differentiable_grads(
                lambda x, weight, bias: decorrelated_batch_norm_reference(
                    x, mean, basis, weight, bias, training, eps, group_size
                ),
                (x, weight, bias), grad_output, needs,
            )  # fmt: skip
        else:
            need_params = need_weight or need_bias
            grads = _backward(grad_output, x, weight, mean, basis, roots, group_size, need_input, need_params, backend)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 7


_op = Op(
    "decorrelated_batch_norm",
    cpu_kernel=True,
    cpu_auto=True,
    why="PyTorch's matrix products under our gradient, which keeps x alone; PyTorch has no such norm",
)


def decorrelated_batch_norm(
    input, running_mean, running_whitening, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, *,
    group_size=16,
):  # fmt: skip
    """Batch norm that whitens groups of channels: their covariance over batch and pixels becomes the identity.

    Second derivatives run through torch.linalg.eigh and need distinct eigenvalues. NaN and Inf stay in their group,
    except that on GPU groups of fewer than 16 channels share tiles and pass them to each other at the same pixel.

    Args:
        input: [N, C, ...], floating-point, any layout; channels_last stays.
        running_mean: [C], running_whitening: [C / group_size, group_size, group_size]; both or neither. Used in
            evaluation, updated in place in training: running += momentum * (batch - running).
        weight, bias: [C] or None. They and the running statistics share one dtype: that of input, or float32 for a
            float16 or bfloat16 input.
        training: whiten with the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the eigenvalues of the covariance; positive in training.
        group_size: channels that are whitened together, a divisor of C; 1 is batch norm.

    Returns:
        tensor with the shape and dtype of input.

    Raises:
        TypeError: an argument is no tensor, number or bool as it should be, or the dtypes do not go together.
        ValueError: wrong sizes or devices, no running statistics in evaluation, one value per channel in training, eps,
            a group_size that does not divide C.
    """
    parameters = {
        "weight": weight, "bias": bias, "running_mean": running_mean, "running_whitening": running_whitening,
    }  # fmt: skip
    _check(input, parameters, training, momentum, eps, group_size)
    backend = _op.route(input, lambda backend: _why_not(backend, input, parameters.values(), group_size))
    if backend == "torch":
        if not training or running_mean is None:
            return decorrelated_batch_norm_reference(
                input, running_mean, running_whitening, weight, bias, training, eps, group_size
            )
        with torch.no_grad():
            _, mean, basis, roots = decorrelated_batch_norm_forward(
                input.detach(), None, None, running_mean, running_whitening, momentum, eps, group_size, "torch"
            )
        return decorrelated_batch_norm_reference(input, None, None, weight, bias, True, eps, group_size)
    return DecorrelatedBatchNormFunction.apply(
        input, weight, bias, running_mean, running_whitening, training, float(momentum), float(eps), group_size, backend
    )


def _check(input, parameters, training, momentum, eps, group_size):
    common.check_tensor("input", input)
    if input.dim() < 2:
        raise ValueError(f"input must have at least 2 dimensions, [N, C, ...], got shape {tuple(input.shape)}")
    common.check_float("input", input)
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool, got {training!r}")
    for name, value in (("momentum", momentum), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"eps must be {'positive in training' if training else 'at least 0'}, got {eps}")
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size must be an int, got {group_size!r}")
    C = input.shape[1]
    if group_size < 1 or C % group_size:
        raise ValueError(f"group_size must divide the {C} channels of input, got {group_size}")
    if (parameters["running_mean"] is None) != (parameters["running_whitening"] is None):
        raise ValueError("running_mean and running_whitening must be both tensors or both None")
    if not training and parameters["running_mean"] is None:
        raise ValueError("running_mean and running_whitening must be tensors in evaluation, got None")
    shapes = dict.fromkeys(parameters, (C,))
    shapes["running_whitening"] = (C // group_size, group_size, group_size)
    parameters = {name: tensor for name, tensor in parameters.items() if tensor is not None}
    first = next(iter(parameters), None)
    for name, tensor in parameters.items():
        common.check_tensor(name, tensor)
        common.check_alike(name, tensor, "input", input, dtype=False)
        if tensor.shape != shapes[name]:
            raise ValueError(f"{name} must have shape {shapes[name]}, got {tuple(tensor.shape)}")
        if tensor.dtype != input.dtype and not (
            tensor.dtype == torch.float32 and input.dtype in (torch.float16, torch.bfloat16)
        ):
            raise TypeError(f"{name} must have the dtype of input ({input.dtype}) or float32, got {tensor.dtype}")
        common.check_alike(name, tensor, first, parameters[first])
        if name.startswith("running") and tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient")
    if training and input.numel() == C:
        raise ValueError(f"input must have more than 1 value per channel in training, got shape {tuple(input.shape)}")
