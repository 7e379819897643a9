"""Both gradients of a 1x1 convolution of stride 1 in one kernel, for layers that memory bounds.

With rows of pixels, dy = grad_output [M, K] after its correction, z = what the convolution read [M, C], w [K, C]:

    dz = dy @ w       grad_input = dz, through a pending activation or a join, + add       grad_weight = dy.T @ z

dy and the input are read once, where conv2d_backward_input and conv2d_backward_weight read them twice. The options mean
what they mean there. Whether it pays: conv2d_backward_launch. Saved for backward: nothing of its own.
Torch counterpart: torch.ops.aten.convolution_backward. Source: fastcnn's documentation of the chain.
"""

import torch

from fastcnn.ops import common
from fastcnn.ops import conv2d_backward_launch as launches
from fastcnn.ops.activation import activation_reference
from fastcnn.ops.chips import chip
from fastcnn.ops.conv_problem import is_one_pixel
from fastcnn.ops.conv_sums import sum_parts, sum_rows_in_parts, sum_slabs


def conv2d_backward_reference(grad_output, input, weight, *, correction=None, pending=None, join=None, add=None):
    """The same in plain PyTorch, in the dtype of the tensors given: (grad_input, grad_weight, sums or None)."""
    dy = grad_output if correction is None else correction.reference(grad_output)
    z = input if pending is None else pending.reference(input)
    grad, grad_weight, _ = torch.ops.aten.convolution_backward(
        dy, z, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    sums = None
    if pending is not None:
        scale, shift = (vector.to(grad.dtype).view(1, -1, 1, 1) for vector in pending[:2])
        raw = input.to(grad.dtype)
        if pending.activation != "none":
            with torch.enable_grad():
                u = (raw * scale + shift).detach().requires_grad_()
                z = activation_reference(u, pending.activation, pending.slope)
            (grad,) = torch.autograd.grad(z, u, grad)
        sums = torch.stack([(grad * raw).sum((0, 2, 3)), grad.sum((0, 2, 3))])
        grad = grad * scale if pending.scaled else grad
    if add is not None:
        grad = grad + add.to(grad.dtype)
    if join is not None:
        grad, *sums = join.reference(grad)
        sums = torch.stack(sums)
    return grad, grad_weight, sums


def _pixel_stride(image):
    """Elements from a pixel to the next, if all are that far apart in NHWC order and start on 16 bytes; else None."""
    n, c, h, w = image.shape
    if c * image.element_size() % 16 or image.data_ptr() % 16 or (c > 1 and image.stride(1) != 1):
        return None
    stride = c
    for size, dim, pixels in ((n, 0, h * w), (h, 2, w), (w, 3, 1)):
        if size > 1:
            stride = image.stride(dim) // pixels
    apart = {3: stride, 2: w * stride, 0: h * w * stride}
    in_order = all(image.shape[dim] == 1 or image.stride(dim) == size for dim, size in apart.items())
    return stride if in_order and stride >= c and stride * image.element_size() % 16 == 0 else None


def why_not(
    grad_output,
    input,
    weight,
    stride=(1, 1),
    padding=(0, 0),
    groups=1,
    *,
    correction=None,
    pending=None,
    join=None,
    add=None,
    out=None,
):
    """None if conv2d_backward gives right results for these arguments, else the sentence that says why not."""
    k, _, r, s = weight.shape
    if groups != 1 or not is_one_pixel(r, s, stride, padding):
        return "one kernel for both gradients needs 1x1 filters, stride 1, no padding and one group"
    if input.dtype not in (torch.float16, torch.bfloat16):
        return f"one kernel for both gradients needs 16-bit tensors and got {input.dtype}"
    if pending is not None and join is not None:
        return "pending and join exclude each other: an input is one of them"
    if (
        join is not None
        and join.output is not None
        and (join.output.data_ptr() != input.data_ptr() or join.output.stride() != input.stride())
    ):
        return "join.output must be the tensor that the convolution read, input"
    n, c, h, w = input.shape
    images = {"input": input, "add": add, "out": out, "join.left": join and join.left}
    others = {"grad_output": grad_output, "correction.y": correction and correction.y, "weight": weight}
    packed = {"join.left", *others} if join is None else {*images, *others}
    for name, tensor in (images | others).items():
        if tensor is None:
            continue
        shape = (n, c, h, w) if name in images else (k, c, 1, 1) if name == "weight" else (n, k, h, w)
        if tensor.shape != shape:
            return f"{name} must have shape {shape}, got {tuple(tensor.shape)}"
        if tensor.dtype != input.dtype:
            return f"{name} must have the dtype of input ({input.dtype}), got {tensor.dtype}"
        between = _pixel_stride(tensor)
        if between is None or (name in packed and between != tensor.shape[1]):
            gaps = " and without gaps" if name in packed else ""
            return f"{name} must be channels_last, with pixels that start on 16 bytes{gaps}"
    if n * h * w >= 2**30:
        return f"one kernel for both gradients counts fewer than 2^30 pixels, got {n} * {h} * {w}"
    problem = _problem(input, k, correction, pending, join, add)
    if launches.choose(problem, chip(input.device)) is None:
        return f"no tile of one kernel for both gradients holds {k} filters"
    return None


def _problem(input, filters, correction, pending, join, add):
    n, c, h, w = input.shape
    x = "pending" if pending is not None else "join" if join is not None else "plain"
    masked = join is not None and join.output is not None
    corrected = correction is not None and correction.y is not None
    return launches.Backward(n * h * w, c, filters, corrected, x, masked, add is not None)


def pays(grad_output, input, weight, stride, padding, groups, **options):
    """Whether conv2d_backward can run and is predicted to be faster than two kernels. options: those of why_not."""
    if why_not(grad_output, input, weight, stride, padding, groups, **options) is not None:
        return False
    options.pop("out", None)
    fused = {name: options.get(name) for name in ("correction", "pending", "join", "add")}
    return launches.pays(_problem(input, weight.shape[0], **fused), chip(input.device))


def conv2d_backward(
    grad_output, input, weight, *, correction=None, pending=None, join=None, add=None, out=None, tile=None,
    in_parts=False,
):  # fmt: skip
    """Gradients of the input and of the weight of a 1x1 convolution of stride 1 without padding, one group.

    Args:
        grad_output: [N, K, H, W], fp16 or bf16, as every image channels_last.
        input: [N, C, H, W], what the convolution read: raw with pending, the join's output with join. Without join its
            pixels, and those of add and out, may lie apart: a slice of wider images' channels.
        weight: [K, C, 1, 1].
        correction: conv_fusion.Correction, applied to grad_output as it is loaded, or None.
        pending: the conv_fusion.Pending through which the convolution read its input, or None.
        join: the conv_fusion.Join whose output is the input, or None. Not with pending.
        add: a gradient that is added, shaped as the input, or None: before a join, after a pending activation.
        out: where the gradient of the input is written, or None. It may be add: then that is accumulated.
        tile: a conv2d_backward_launch.Tile; None for the one predicted to be fastest.
        in_parts: the sums are [S, 2, C], to be added up.

    Returns:
        (grad_input, grad_weight with the strides of weight, sums): sums [2, C] in fp32 are the gradients of pending's
        scale and shift, or the join's sums of dm * left and of dm; None without either.

    Raises:
        ValueError: what why_not says.
    """
    options = dict(correction=correction, pending=pending, join=join, add=add)
    reason = why_not(grad_output, input, weight, **options, out=out)
    if reason is not None:
        raise ValueError(reason)
    grad_input = torch.empty_like(input) if out is None else out
    grad_weight = torch.empty_like(weight)
    summed = pending is not None or join is not None
    if input.numel() == 0:
        sums = torch.zeros((1, 2, input.shape[1]), dtype=torch.float32, device=input.device)
        sums = sums if in_parts else sums[0]
        return grad_input, grad_weight.zero_(), sums if summed else None
    from fastcnn.kernels.triton.conv2d_backward import conv2d_backward_kernel

    k, c = weight.shape[:2]
    here = chip(input.device)
    problem = _problem(input, k, **options)
    tile = tile or launches.choose(problem, here)
    bands, share, _ = launches.bands(problem, tile, here)
    slabs = torch.empty((bands, k * c), dtype=torch.float32, device=input.device)
    partial = torch.empty((bands, 2, c), dtype=torch.float32, device=input.device) if summed else None
    vectors = lambda tensors: [None if vector is None else vector.contiguous() for vector in tensors]
    images = input, add, grad_input
    strides = [None if image is None or _pixel_stride(image) == c else _pixel_stride(image) for image in images]
    with common.device_guard(input):
        conv2d_backward_kernel[(bands * -(-c // tile.block_c),)](
            grad_output,
            *([correction.y, *vectors(correction[1:])] if correction else (None,) * 4),
            weight,
            input,
            *(vectors(pending[:2]) if pending else (None, None)),
            *(join and join.left, add, grad_input),
            slabs,
            partial,
            *(problem.rows, c, k, share, *strides),
            PENDING=pending.activation if pending else None,
            PENDING_SLOPE=pending.slope if pending else 0.0,
            SCALED=pending is not None and pending.scaled,
            MASKED=problem.masked,
            INT64=common.exceeds_int32(grad_output, *images),
            BLOCK_M=tile.block_m,
            BLOCK_C=tile.block_c,
            BLOCK_K=tile.block_k,
            STAGES=tile.stages,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        sum_slabs(slabs, grad_weight)
        if not summed:
            return grad_input, grad_weight, None
        parts = sum_rows_in_parts(partial)
        return grad_input, grad_weight, parts if in_parts else sum_parts(parts)
