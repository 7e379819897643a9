"""What the pooling ops share: the arguments of windows and parts, the layouts, the taps, the launch."""

import torch

from fastcnn.ops import common, huge_pages

TILE = 1024  # elements per program


def window(input, kernel_size, stride, padding, dilation, ceil_mode):
    """Check the arguments of a pooling window.

    Returns:
        [R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w]. Padding is at most half the kernel,
        and the output has at least one pixel.
    """
    common.check_tensor("input", input, (3, 4))
    if 0 in input.shape[-3:]:
        raise ValueError(f"input must have channels, rows and columns, got shape {tuple(input.shape)}")
    kernel = common.pair("kernel_size", kernel_size, 1)
    # torch takes an empty stride for None
    if stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0):
        stride = kernel
    stride = common.pair("stride", stride, 1)
    padding = common.pair("padding", padding, 0)
    dilation = common.pair("dilation", dilation, 1)
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"ceil_mode must be a bool, got {ceil_mode!r}")
    if 2 * padding[0] > kernel[0] or 2 * padding[1] > kernel[1]:
        raise ValueError(
            f"padding must be at most half of kernel_size, got {tuple(padding)} for kernel_size {tuple(kernel)}"
        )
    result = [*kernel, *stride, *padding, *dilation]
    size = output_size(input.shape[-2:], result, ceil_mode)
    if size[0] < 1 or size[1] < 1:
        raise ValueError(
            f"kernel_size {tuple(kernel)} with dilation {tuple(dilation)} is too large for an input of "
            f"{tuple(input.shape[-2:])} with padding {tuple(padding)}: no output pixel would be left"
        )
    return result


def output_size(input_size, window, ceil_mode):
    """(P, Q) by torch's rule."""
    result = []
    for axis in (0, 1):
        size, k, stride, pad, dil = input_size[axis], *window[axis::2]
        last = size + 2 * pad - dil * (k - 1) - 1
        out = (last + (stride - 1 if ceil_mode else 0)) // stride + 1
        # a window that ceil_mode adds must begin inside the image or the padding before it
        if ceil_mode and (out - 1) * stride >= size + pad:
            out -= 1
        result.append(out)
    return result


def parts(name, output_size, input):
    """Check adaptive pooling's output size; returns [P, Q], where None was the size of the input."""
    size = output_size
    if isinstance(size, (tuple, list)):
        if len(size) != 2:
            raise ValueError(f"{name} must be an int or a pair, got {output_size!r}")
        size = [given if wanted is None else wanted for wanted, given in zip(size, input.shape[-2:], strict=True)]
    return list(common.pair(name, size, 0))


def longest_part(parts, size):
    """A bound on the pixels in the longest of so many parts of `size` pixels; exact where they divide."""
    return size // parts if size % parts == 0 else min(size, size // parts + 2)


def parts_exceed_int32(tensors, shape, output_size):
    """Whether offsets, or the products from which the parts' ends come, need 64 bits."""
    return common.exceeds_int32(*tensors) or any(
        (size + 1) * (out + 1) >= 2**31 for size, out in zip(shape[-2:], output_size, strict=True)
    )


def tap_dtype(taps):
    """The smallest dtype that numbers so many taps."""
    return torch.uint8 if taps <= 2**8 else torch.int16 if taps <= 2**15 else torch.int32


def flat_indices(taps, row, column, width):
    """torch's indices, row * width + column in each plane, int64, with the strides of the taps."""
    # copied, because arithmetic forgets strides of dimensions of size one
    return torch.empty_like(taps, dtype=torch.int64).copy_(row * width + column)


def pick(planes, indices):
    """The elements of each plane [..., H, W] at flat indices [..., P, Q]: the transpose of max pooling's backward."""
    return planes.flatten(-2).gather(-1, indices.flatten(-2)).view(indices.shape)


def follows_channels_last(tensor):
    """Whether torch pools this tensor into a channels_last output: 4-D with strides in that order, dense or not."""
    if tensor.dim() != 4 or tensor.stride(1) == 0:
        return False
    if min(tensor.shape[1:]) > 1 and tensor.is_contiguous():
        return False  # what follows, sooner
    least = 0
    for dim in (1, 3, 2, 0):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        # where all strides are equal (N x C x 1 x 1, one channel), torch says contiguous
        if size == 0 or stride < least or (dim == 0 and least == tensor.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


def memory_format(channels_last):
    return torch.channels_last if channels_last else torch.contiguous_format


def empty(shape, like, channels_last, dtype=None):
    """A dense 3-D or 4-D tensor in the layout that pooling gives; channels_last only for 4-D."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(channels_last))


def batched(tensor):
    """A 3-D tensor as a batch of one."""
    return tensor.unsqueeze(0) if tensor.dim() == 3 else tensor


def as_dense(tensor, channels_last):
    """A 3-D or 4-D tensor as a dense batch in this layout: the same memory where it is one already."""
    return batched(tensor).contiguous(memory_format=memory_format(channels_last))


def run_on_cpu(kernel, inputs, outputs, channels_last, *arguments):
    """Call a numba kernel on the memory of tensors: [N, H, W, C] (channels_last) or [N*C, H, W]; outputs are fresh."""
    arrays = []
    for tensor in (*inputs, *map(huge_pages.advise, outputs)):
        dense = as_dense(tensor.detach(), channels_last)
        arrays.append((dense.permute(0, 2, 3, 1) if channels_last else dense.flatten(0, 1)).numpy())
    common.cpu_threads(max(array.size for array in arrays))
    kernel(*arrays, *arguments)


def tile(dtype, int64=False):
    """Elements per program of kernels that compute much per element: wide numbers would run out of registers."""
    return TILE // 4 if dtype == torch.float64 or int64 else TILE


def launch_arguments(shape, channels_last, tile=TILE):
    """(grid, arguments) of a kernel that writes a dense tensor of this 4-D shape as [rows, columns] tiles."""
    n, c, h, w = shape
    rows, columns = (n * h * w, c) if channels_last else (n * c, h * w)
    block_b = min(256, max(4, 1 << (columns - 1).bit_length()))
    block_a = tile // block_b
    grid = (-(-rows // block_a) * -(-columns // block_b),)
    return grid, dict(rows=rows, columns=columns, C=c, CHANNELS_LAST=channels_last, BLOCK_A=block_a, BLOCK_B=block_b)


def global_launch_arguments(shape, channels_last):
    """(grid, arguments) of a kernel that reduces every plane of this 4-D shape: an image's or some planes' pixels are
    one program's work."""
    n, c, h, w = shape
    _, arguments = launch_arguments(shape, channels_last)
    if channels_last:
        arguments["rows"] = h * w
        return (n * -(-c // arguments["BLOCK_B"]),), arguments
    return (-(-n * c // arguments["BLOCK_A"]),), arguments
