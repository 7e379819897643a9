"""Group norm: y = (x - mean) / sqrt(var + eps) * weight + bias, x [N, C, ...], weight and bias [C].

mean and var (biased) are those of a group of C / num_groups neighbouring channels of one image. Contiguous and
channels_last tensors are normalised where they lie: the output has the layout of x (PyTorch on CUDA makes it
contiguous). Saved for backward: x, weight, and mean and 1 / sqrt(var + eps), one of each per group and image.
On CPU only groups of one channel, instance norm, have kernels of ours.
Torch counterpart: torch.nn.functional.group_norm. Source: Wu and He 2018.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastcnn.backends import Op
from fastcnn.ops import common

TILE = 2048  # elements of a tile of the strips: 16 per thread of 4 warps
PROGRAMS = 1024  # strips times channel blocks at most: eight programs per multiprocessor of an H100
FUSED = 16384  # elements of whole groups that one program holds; a quarter of it in fp64
FUSED_BYTES = 64  # of a channels_last pixel at least: two sectors of memory
REGISTERS = 128  # of a thread of the backward sums
FINALIZE = 512  # partial sums of a block of groups
PARAMETERS = dict(BLOCK_R=128, BLOCK_C=16)


def group_norm_reference(x, num_groups, weight, bias, eps):
    """Group norm in plain PyTorch."""
    return F.group_norm(x, num_groups, weight, bias, eps)


class View(NamedTuple):
    """A tensor as N images of S pixels and C channels in G groups, and the distances in memory between each."""

    N: int
    C: int
    G: int
    S: int
    stride_n: int
    stride_s: int
    stride_c: int

    def sizes(self):
        return self.C, self.G, self.C // self.G, self.S

    def strides(self):
        return self.stride_n, self.stride_s, self.stride_c


def memory_format(x):
    """The layout of the output: channels_last if x is, else contiguous."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _view(x, num_groups):
    """x, a copy of it if it is neither contiguous nor channels_last, and its view."""
    layout = memory_format(x)
    x = x.contiguous(memory_format=layout)
    N, C = x.shape[:2]
    S = math.prod(x.shape[2:])
    rows = layout != torch.contiguous_format or S == 1
    return x, View(N, C, num_groups, S, C * S, *((C, 1) if rows else (1, S)))


def output_dtype(x):
    """The dtype torch's norms give: under autocast on a GPU that of float32."""
    return torch.float32 if x.is_cuda and common.autocast_dtype(x) and x.element_size() < 4 else x.dtype


def _cdiv(a, b):
    return -(-a // b)


def _power_of_two(n):
    return 1 << (n - 1).bit_length()


def _fused_plan(x, view):
    """Grid and keyword arguments of the kernels that hold whole groups, or None where these are too large."""
    D = view.C // view.G
    wide = x.element_size() == 8
    limit = FUSED // 4 if wide else FUSED
    block_s, block_d, block_g = _power_of_two(view.S), _power_of_two(D), 1
    least = FUSED_BYTES // x.element_size() if view.stride_c == 1 else 1
    while block_g < view.G and (block_g * D < least or 2 * block_g * block_d * block_s <= TILE):
        block_g *= 2
    tile = block_s * block_d * block_g
    if tile > limit:
        return None
    how = dict(BLOCK_S=block_s, BLOCK_G=block_g, BLOCK_D=block_d, D=D, INT64=common.exceeds_int32(x))
    warps = max(4, min(16, tile // (256 if wide else 512)))
    return (view.N * _cdiv(view.G, block_g),), dict(how, num_warps=warps)


def _strips_plan(x, view):
    """Grid, number of strips, tiles of each, and keyword arguments of the kernels that go strip by strip."""
    if view.stride_c == 1:
        block_c = min(_power_of_two(view.C), 64)
        block_s = min(TILE // block_c, _power_of_two(view.S))
    else:
        block_s = min(_power_of_two(view.S), 1024, TILE)
        block_c = min(_power_of_two(view.C), TILE // block_s)
    tiles = _cdiv(view.S, block_s)
    c_blocks = _cdiv(view.C, block_c)
    tiles_per_strip = _cdiv(tiles, max(1, PROGRAMS // (c_blocks * view.N)))
    strips = _cdiv(tiles, tiles_per_strip)
    how = dict(INT64=common.exceeds_int32(x), BLOCK_S=block_s, BLOCK_C=block_c)
    return (view.N * strips, c_blocks), strips, tiles_per_strip, how


def _merge_plan(view, strips):
    """Grid and blocks of the kernels that merge the strips and channels of groups."""
    block_t = min(_power_of_two(view.C // view.G * strips), FINALIZE)
    block_g = min(_power_of_two(view.G), FINALIZE // block_t)
    return (view.N, _cdiv(view.G, block_g)), dict(BLOCK_G=block_g, BLOCK_T=block_t)


def strips_forward(x, y, weight, bias, mean, rstd, view, eps, per_pixel=False):
    """Launch statistics, their merging and normalising: fills y, mean and rstd."""
    from fastcnn.kernels.triton import group_norm as kernels

    grid, strips, per_strip, how = _strips_plan(x, view)
    merge_grid, merge = _merge_plan(view, strips)
    partial = x.new_empty((grid[0], 3, view.C), dtype=mean.dtype)
    C, G, D, S = view.sizes()
    kernels.group_norm_statistics_kernel[grid](x, partial, C, S, strips, per_strip, *view.strides(), **how)
    rows = per_strip * how["BLOCK_S"]
    kernels.group_norm_finalize_kernel[merge_grid](partial, mean, rstd, C, G, D, S, strips, rows, EPS=eps, **merge)
    kernels.group_norm_apply_kernel[grid](
        x, y, mean, rstd, weight, bias, C, G, D, S, strips, per_strip, *view.strides(), PER_PIXEL=per_pixel, **how
    )


def strips_backward(grad_output, x, weight, mean, rstd, grads, view, need_input, need_params, per_pixel=False):
    """Launch the sums, their merging and dx: fills grads, without those of the parameters where these are per pixel."""
    from fastcnn.kernels.triton import group_norm as kernels

    grid, strips, per_strip, how = _strips_plan(x, view)
    sizes = view.sizes()
    where = (*sizes, strips, per_strip, *view.strides())
    grad_input, grad_weight, grad_bias = grads
    partial = x.new_empty((grid[0], 2, view.C), dtype=mean.dtype)
    # said aloud, else some versions of ptxas aim at 64 and spill
    registers = dict(maxnreg=REGISTERS) if x.element_size() < 8 else {}
    kernels.group_norm_backward_reduce_kernel[grid](
        grad_output, x, mean, weight, partial, *where, PER_PIXEL=per_pixel, **how, **registers
    )
    if need_params and not per_pixel:
        sum_parameters(partial, rstd, grad_weight, grad_bias, strips, view)
    if need_input:
        along_one, along_xhat = torch.empty_like(mean), torch.empty_like(mean)
        merge_grid, merge = _merge_plan(view, strips)
        kernels.group_norm_backward_finalize_kernel[merge_grid](
            partial, rstd, weight, along_one, along_xhat, *sizes, strips, PER_PIXEL=per_pixel, **merge
        )
        kernels.group_norm_backward_apply_kernel[grid](
            grad_output, x, grad_input, mean, rstd, weight, along_one, along_xhat, *where, PER_PIXEL=per_pixel, **how
        )


def sum_parameters(partial, rstd, grad_weight, grad_bias, strips, view):
    """Add up partial sums [rows, 2, C]; rstd scales those of the weight, None where that is done."""
    from fastcnn.kernels.triton.group_norm import group_norm_parameters_kernel

    grid = (_cdiv(view.C, PARAMETERS["BLOCK_C"]),)
    group_norm_parameters_kernel[grid](
        partial, rstd, grad_weight, grad_bias, partial.shape[0], strips, *view.sizes()[:3], **PARAMETERS
    )


def group_norm_forward(x, num_groups, weight, bias, eps, dtype, backend):
    """(y, mean, rstd), y in this dtype and the layout of x, the statistics [N, num_groups]."""
    y, mean, rstd = _allocate_forward(x, num_groups, dtype)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    x, view = _view(x, num_groups)
    if backend == "cpu":
        _run_on_cpu("forward", view, (x, y), (weight, bias, mean, rstd), eps)
        return y, mean, rstd
    from fastcnn.kernels.triton import group_norm as kernels

    plan = _fused_plan(x, view)
    with common.device_guard(x):
        if plan is None:
            strips_forward(x, y, weight, bias, mean, rstd, view, eps)
        else:
            grid, how = plan
            kernels.group_norm_fused_kernel[grid](
                x, y, mean, rstd, weight, bias, view.C, view.G, view.S, *view.strides(), EPS=eps, **how
            )
    return y, mean, rstd


def group_norm_backward(grad_output, x, num_groups, weight, mean, rstd, need_input, need_params, backend):
    """(grad_input, grad_weight, grad_bias), the latter two in the dtype of weight; empty where not needed."""
    grads = _allocate_backward(x, weight, need_input, need_params)
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    grad_output = grad_output.contiguous(memory_format=memory_format(x))
    x, view = _view(x, num_groups)
    if backend == "cpu":
        _run_on_cpu("backward", view, (grad_output, x, grads[0]), (weight, mean, rstd, *grads[1:]))
        return grads
    from fastcnn.kernels.triton import group_norm as kernels

    plan = _fused_plan(x, view)
    with common.device_guard(x):
        if plan is None:
            strips_backward(grad_output, x, weight, mean, rstd, grads, view, need_input, need_params)
        else:
            grid, how = plan
            partial = x.new_empty((view.N, 2, view.C), dtype=mean.dtype) if need_params else None
            kernels.group_norm_fused_backward_kernel[grid](
                grad_output, x, grads[0] if need_input else None, mean, rstd, weight, partial,
                view.C, view.G, view.S, *view.strides(), **how,
            )  # fmt: skip
            if need_params:
                sum_parameters(partial, None, *grads[1:], 1, view)
    return grads


def _run_on_cpu(direction, view, tensors, parameters, *scalars):
    """Call a numba kernel of instance norm; what is None or empty becomes an empty array of the right type."""
    from fastcnn.kernels.cpu import instance_norm as kernels

    common.cpu_threads(view.N * view.C * view.S)
    rows = view.stride_c == 1
    shape = (view.N, view.S * view.C) if rows else (view.N, view.C, view.S)
    flat = [t.detach().as_strided((t.numel(),), (1,)).numpy() for t in tensors]
    arrays = [a.reshape(shape if a.size else (0,) * len(shape)) for a in flat]
    arrays += [flat[0][:0] if t is None else t.detach().numpy() for t in parameters]
    getattr(kernels, ("rows_" if rows else "planes_") + direction)(*arrays, *scalars)


def statistics_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _allocate_forward(x, num_groups, dtype):
    mean = x.new_empty((x.shape[0], num_groups), dtype=statistics_dtype(x))
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format(x)), mean, torch.empty_like(mean)


def _allocate_backward(x, weight, need_input, need_params):
    grad_input = torch.empty_like(x, memory_format=memory_format(x)) if need_input else x.new_empty(0)
    like = x if weight is None else weight
    sizes = (x.shape[1],) if need_params else (0,)
    return grad_input, like.new_empty(sizes), like.new_empty(sizes)


_forward = common.register(
    "group_norm(Tensor input, int num_groups, Tensor? weight, Tensor? bias, float eps, ScalarType dtype, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    group_norm_forward,
    lambda x, num_groups, weight, bias, eps, dtype, backend: _allocate_forward(x, num_groups, dtype),
)
_backward = common.register(
    "group_norm_backward(Tensor grad_output, Tensor input, int num_groups, Tensor? weight, Tensor mean, Tensor rstd, "
    "bool need_input, bool need_params, str backend) -> (Tensor, Tensor, Tensor)",
    group_norm_backward,
    lambda grad_output, x, num_groups, weight, mean, rstd, need_input, need_params, backend: _allocate_backward(
        x, weight, need_input, need_params
    ),
)


class GroupNormFunction(torch.autograd.Function):
    """y, and the statistics without a gradient."""

    @staticmethod
    def forward(ctx, x, num_groups, weight, bias, eps, dtype, backend):
        y, mean, rstd = _forward(x, num_groups, weight, bias, eps, dtype, backend)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.arguments = (num_groups, eps, backend)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, mean, rstd

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 7
        x, weight, bias, mean, rstd = ctx.saved_tensors
        num_groups, eps, backend = ctx.arguments
        need_input, _, need_weight, need_bias = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            grads = common.differentiable_grads(
                lambda x, weight, bias: group_norm_reference(x, num_groups, weight, bias, eps),
                (x, weight, bias), grad_output, (need_input, need_weight, need_bias),
            )  # fmt: skip
        else:
            grads = _backward(
                grad_output, x, num_groups, weight, mean, rstd, need_input, need_weight or need_bias, backend
            )
        grad_input, grad_weight, grad_bias = grads
        return (
            grad_input if need_input else None,
            None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            *[None] * 3,
        )


def why_not(name, backend, x, parameters):
    """The support check that group, instance and layer norm share."""
    if x.dtype not in common.FLOATS:
        return f"{name} has kernels for floating-point tensors and got {x.dtype}"
    if not all(t is None or t.is_contiguous() for t in parameters):
        return f"{name} has kernels for contiguous weight and bias"
    if backend == "cpu" and x.dtype not in (torch.float32, torch.float64):
        return f"{name} on CPU has kernels for float32 and float64 and got {x.dtype}"
    return None


_op = Op(
    "group_norm",
    cpu_kernel=False,
    cpu_auto=False,
    why="numba took 0.9 to 4 times as long as PyTorch's group_norm, which is vectorised in both layouts",
)


@_op.torch_first(F.group_norm)
def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    """Group norm of input [N, C, ...]: statistics of C / num_groups channels of one image.

    As torch.nn.functional.group_norm, but channels_last stays channels_last on every device.

    Args:
        input: floating-point tensor of two dimensions or more.
        num_groups: divides C.
        weight, bias: [C] or None, of the dtype of input, or float32 for a float16 or bfloat16 input.
        eps: added to the variance.

    Returns:
        tensor with the shape, layout and dtype of input (float32 under autocast on a GPU, as PyTorch's).

    Raises:
        TypeError: an argument is no tensor or number as it should be, or the dtypes do not go together.
        ValueError: wrong sizes or devices, C not divisible by num_groups, one value per group.
    """
    check("group_norm", input, weight, bias, eps)
    if isinstance(num_groups, bool) or not isinstance(num_groups, (int, torch.SymInt)):
        raise TypeError(f"num_groups must be an int, got {num_groups!r}")
    N, C = input.shape[:2]
    if num_groups <= 0 or C % num_groups != 0:
        raise ValueError(f"num_groups must be positive and divide the {C} channels of input, got {num_groups}")
    if N * (C // num_groups) * math.prod(input.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)}")
    backend = _op.route(input, lambda backend: why_not("group_norm", backend, input, (weight, bias)))
    if backend == "torch":
        return F.group_norm(input, num_groups, weight, bias, eps)
    return GroupNormFunction.apply(input, num_groups, weight, bias, float(eps), output_dtype(input), backend)[0]


def check(name, input, weight, bias, eps):
    """Raise unless input is [N, C, ...] and the parameters fit it."""
    common.check_tensor("input", input)
    if input.dim() < 2:
        raise ValueError(f"input must have at least 2 dimensions, [N, C, ...], got shape {tuple(input.shape)}")
    common.check_float("input", input)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {eps!r}")
    for which, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            common.check_tensor(which, tensor)
            if tensor.shape != input.shape[1:2]:
                raise ValueError(
                    f"{which} must have {input.shape[1]} elements, one per channel, got shape {tuple(tensor.shape)}"
                )
            check_parameter(which, tensor, input)
    if weight is not None and bias is not None:
        common.check_alike("bias", bias, "weight", weight)


def check_parameter(name, tensor, input):
    """Raise unless the parameter has the device of input, and its dtype or float32."""
    common.check_alike(name, tensor, "input", input, dtype=False)
    half = input.dtype in (torch.float16, torch.bfloat16)
    if tensor.dtype == input.dtype or (half and tensor.dtype == torch.float32) or common.autocast_enabled(input):
        return
    raise TypeError(f"{name} must have the dtype of input ({input.dtype}) or float32, got {tensor.dtype}")
