"""Host side of the family "images": tiles of one pixel of many images, copied by the tensor memory accelerator.

Takes packed tensors only: NHWC, pixels of 16 bytes; images may be slices of wider ones. See
kernels/triton/conv2d_images.py for the idea.
"""

import functools

import torch

from fastcnn.ops import common
from fastcnn.ops.conv_launch import is_one_pixel
from fastcnn.ops.conv_sums import sum_rows_in_parts, sum_slabs


@functools.lru_cache(maxsize=1024)
def _axis_taps(outputs, inputs, taps, stride, pad, dil, backward):
    """For every position of one axis of the kernel's output: (input position under its first tap, first tap, count).

    Also the steps from one tap to the next, in input positions and in taps. Forward, output o reads input
    o * stride - pad + tap * dil. Backward, `outputs` are pixels of the image and `inputs` those of grad_output.
    """
    found, input_step, tap_step = [], dil, 1
    for o in range(outputs):
        if backward:
            # p = (o + pad - tap * dil) / stride must be whole
            pairs = [(o + pad - t * dil, t) for t in range(taps)]
            reads = [(p // stride, t) for p, t in pairs if p % stride == 0 and 0 <= p // stride < inputs]
        else:
            reads = [(o * stride - pad + t * dil, t) for t in range(taps)]
            reads = [(i, t) for i, t in reads if 0 <= i < inputs]
        found.append((*reads[0], len(reads)) if reads else (0, 0, 0))
        if len(reads) > 1:
            input_step, tap_step = reads[1][0] - reads[0][0], reads[1][1] - reads[0][1]
    return found, input_step, tap_step


@functools.lru_cache(maxsize=1024)
def _taps_table(outputs, inputs, taps, stride, padding, dilation, backward, device):
    """(table [5, output pixels] int32 as the kernel wants it, (step_r, step_s, tap_r, tap_s)).

    Pixels with many taps come first, so that the last tiles to be computed are short ones. A pixel without taps gets
    one that lies before the input and beyond the weight, where both are read as zero.
    """
    rows, step_h, tap_h = _axis_taps(outputs[0], inputs[0], taps[0], stride[0], padding[0], dilation[0], backward)
    columns, step_w, tap_w = _axis_taps(outputs[1], inputs[1], taps[1], stride[1], padding[1], dilation[1], backward)
    h, r, rows = torch.tensor(rows, dtype=torch.int64).T[:, :, None]
    w, s, per_row = torch.tensor(columns, dtype=torch.int64).T[:, None, :]
    pixel = torch.arange(outputs[0] * outputs[1])
    table = [pixel, (h * inputs[1] + w).flatten(), (r * taps[1] + s).flatten()]
    table += [(rows + 0 * per_row).flatten(), (0 * rows + per_row).flatten()]
    table = torch.stack(table)
    empty = table[3] * table[4] == 0
    beyond = torch.tensor([-1, taps[0] * taps[1], 1, 1])
    table[1:, empty] = beyond[:, None]
    order = (table[3] * table[4]).argsort(descending=True, stable=True)
    table = table[:, order].to(torch.int32).contiguous().to(device, non_blocking=True)
    return table, (step_h * inputs[1], step_w, tap_h * taps[1], tap_w)


def _rows(tensor, one_pixel):
    """The tensor [N, C, H, W] as (images, pixels per image, channels); its pixels count as images if one_pixel."""
    n, c, h, w = tensor.shape
    return (n * h * w, 1, c) if one_pixel else (n, h * w, c)


def pixel_pitch(tensor):
    """Elements from one pixel to the next of NHWC images, more than channels in a slice of channels; None of others."""
    n, c, h, w = tensor.shape
    strides = tensor.stride()
    pitch = strides[3] if w > 1 else strides[2] if h > 1 else strides[0] if n > 1 else c
    expected = (h * w * pitch, 1, w * pitch, pitch)
    even = all(size == 1 or a == b for size, a, b in zip(tensor.shape, strides, expected, strict=True))
    return pitch if even and pitch >= c else None


def _gapped_pitch(tensor, one_pixel):
    """pixel_pitch where the kernels do not know it from the channels."""
    pitch = pixel_pitch(tensor)
    return None if one_pixel or pitch == tensor.shape[1] else pitch


def _flat(tensor, block, one_pixel):
    """Descriptor of [images, pixels * pitch]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    images, pixels, channels = _rows(tensor, one_pixel)
    pitch = pixel_pitch(tensor)
    return TensorDescriptor(tensor, [images, (pixels - 1) * pitch + channels], [pixels * pitch, 1], block)


def _image(tensor, block, one_pixel):
    """Descriptor of [images, pixels, channels]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    images, pixels, channels = _rows(tensor, one_pixel)
    pitch = pixel_pitch(tensor)
    return TensorDescriptor(tensor, [images, pixels, channels], [pixels * pitch, pitch, 1], [block[0], 1, block[1]])


def _weight(tensor, block):
    """Descriptor of [filters, taps * channels of a group]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    k, c, r, s = tensor.shape
    return TensorDescriptor(tensor, [k, r * s * c], [r * s * c, 1], block)


def _gate(pending, x, one_pixel):
    """(the gate of a pending x, rows of an image), or twice None."""
    if pending is None or pending.gate is None:
        return None, None
    return pending.gate.contiguous(), x.shape[2] * x.shape[3] if one_pixel else 1


def _blocks(launch):
    return dict(
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


def _captured(table):
    """Keep what a CUDA graph reads for as long as the process lives: the cache above may drop it, the graph replays."""
    if table.is_cuda and torch.cuda.is_current_stream_capturing():
        _tables_of_graphs[table.data_ptr()] = table
    return table


_tables_of_graphs = {}


def _run_pixels(x, weight, y, geometry, precision, launch, backward, fusion):
    """Launch the kernel that forward and gradient of the input share: x is what is read, y what is written.

    Returns:
        sums [S, 2, channels of y] to be added up, or None where fusion asks for none.
    """
    from fastcnn.kernels.triton.conv2d_images import conv2d_images_kernel

    stride, padding, dilation, groups = geometry
    taps = tuple(weight.shape[2:])
    one_pixel = is_one_pixel(*taps, stride, padding)
    images, pixels, channels = _rows(y, one_pixel)
    table, steps = None, (0, 0, 0, 0)
    if not one_pixel:
        key = (tuple(size) for size in (y.shape[2:], x.shape[2:], taps, stride, padding, dilation))
        table, steps = _taps_table(*key, backward, x.device)
        table = _captured(table)
    c, k = x.shape[1] // groups, channels // groups
    reads, writes = [launch.block_m, launch.block_k], [launch.block_m, launch.block_n]
    bias, activation, pending, correction, add, raw, join, pivot = fusion
    rows = -(-images // launch.block_m) * pixels
    sums = None
    if pivot is not None or (backward and (pending is not None or join is not None)):
        sums = torch.empty((rows, 2, channels), dtype=torch.float32, device=y.device)
    gate, image_rows = _gate(pending, x, one_pixel)
    vectors = [bias, *(pending[:2] if pending else (None,) * 2), gate]
    vectors += [*(correction[1:] if correction else (None,) * 3), pivot]
    output = join and join.output
    with common.device_guard(y):
        conv2d_images_kernel[(min(rows * -(-k // launch.block_n) * groups, launch.programs),)](
            _flat(x, reads, one_pixel),
            _weight(weight, [launch.block_k, launch.block_n] if backward else [launch.block_n, launch.block_k]),
            _image(y, writes, one_pixel),
            table,
            _flat(correction.y, reads, one_pixel) if correction and correction.y is not None else None,
            *(None if t is None else _image(t, writes, one_pixel) for t in (raw, output, add)),
            *(None if vector is None else vector.contiguous() for vector in vectors),
            sums,
            *(images, pixels, c, k, groups, *steps, _gapped_pitch(x, one_pixel), image_rows),
            BACKWARD=backward,
            ONE_PIXEL=one_pixel,
            PRECISION=precision,
            HAS_BIAS=bias is not None,
            HAS_ADD=add is not None,
            ACTIVATION=activation[0] if activation else "none",
            SLOPE=activation[1] if activation else 0.0,
            CORRECTED=correction is not None,
            PENDING=pending.activation if pending else None,
            PENDING_SLOPE=pending.slope if pending else 0.0,
            SCALED=backward and pending is not None and pending.scaled,
            JOIN=join and join.activation,
            SUMS=pivot is not None,
            **_blocks(launch),
        )
        if sums is None:
            return None
        return sum_rows_in_parts(sums)


def forward(
    input,
    weight,
    bias,
    y,
    stride,
    padding,
    dilation,
    groups,
    precision,
    launch,
    *,
    pending=None,
    activation=None,
    residual=None,
    pivot=None,
):
    """y = act(conv(pending(input)) + bias + residual); returns the sums [S, 2, K] about a pivot, or None."""
    geometry = stride, padding, dilation, groups
    fusion = bias, activation, pending, None, residual, None, None, pivot
    return _run_pixels(input, weight, y, geometry, precision, launch, False, fusion)


def backward_input(
    grad_output,
    weight,
    bias,
    grad_input,
    stride,
    padding,
    dilation,
    groups,
    precision,
    launch,
    *,
    correction=None,
    pending=None,
    input=None,
    join=None,
    add=None,
):
    """Gradient of the input, or with a bias the transposed convolution; returns the sums [S, 2, C] or None."""
    geometry = stride, padding, dilation, groups
    raw = join.left if join else input if pending else None
    fusion = bias, None, pending, correction, add, raw, join, None
    return _run_pixels(grad_output, weight, grad_input, geometry, precision, launch, True, fusion)


def backward_weight(
    grad_output,
    input,
    grad_weight,
    stride,
    padding,
    dilation,
    groups,
    precision,
    launch,
    *,
    correction=None,
    pending=None,
):
    """Gradient of the weight of conv(pending(input)), in the strides of grad_weight."""
    from fastcnn.kernels.triton.conv2d_images import conv2d_images_backward_weight_kernel

    k, c, r, s = grad_weight.shape
    k //= groups
    one_pixel = is_one_pixel(r, s, stride, padding)
    # as rows of one pixel, an image has one position
    (h, w), (p, q) = ((1, 1), (1, 1)) if one_pixel else (input.shape[2:], grad_output.shape[2:])
    splits = launch.splits
    out = grad_weight
    if splits > 1:
        out = torch.empty((splits, grad_weight.numel()), dtype=torch.float32, device=input.device)
    tiles = -(-c // launch.block_m) * -(-k // launch.block_n) * r * s * groups
    gate, image_rows = _gate(pending, input, one_pixel)
    reads_x, reads_dy = [launch.block_k, launch.block_m], [launch.block_k, launch.block_n]
    with common.device_guard(input):
        conv2d_images_backward_weight_kernel[(tiles * splits,)](
            _flat(grad_output, reads_dy, one_pixel),
            _flat(input, reads_x, one_pixel),
            out,
            _flat(correction.y, reads_dy, one_pixel) if correction and correction.y is not None else None,
            *(pending[:2] if pending else (None, None)),
            gate,
            *(correction[1:] if correction else (None, None, None)),
            *(_rows(input, one_pixel)[0], h, w, p, q, c, k, r, s, groups, splits, grad_weight.numel()),
            *grad_weight.stride(),
            *(*stride, *padding, *dilation, _gapped_pitch(input, one_pixel), _gapped_pitch(grad_output, one_pixel)),
            image_rows,
            PRECISION=precision,
            CORRECTED=correction is not None,
            PENDING=pending.activation if pending else None,
            PENDING_SLOPE=pending.slope if pending else 0.0,
            **_blocks(launch),
        )
        if splits > 1:
            sum_slabs(out, grad_weight)
