"""What every op shares: argument checks, layout rules, and the differentiable backward."""

import contextlib
import functools

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# the library that holds every op pair of fastcnn: torch.ops.fastcnn.<op>
library = torch.library.Library("fastcnn", "DEF")


def register(schema, function, fake):
    """Define torch.ops.fastcnn.<name> from its schema, for CPU and CUDA tensors alike; return the callable overload.

    Args:
        schema: e.g. "relu(Tensor input, str backend) -> Tensor".
        function: the host function; it sees real tensors, never autograd.
        fake: the same for fake tensors: shapes, dtypes and strides of the results, no data.
    """
    name = schema[: schema.index("(")]
    # the strides we were traced with are the strides we get: our kernels choose their loops by layout
    library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    library.impl(name, function, "CPU")
    library.impl(name, function, "CUDA")
    torch.library.register_fake(f"fastcnn::{name}", fake, lib=library)
    return getattr(torch.ops.fastcnn, name).default


def device_guard(tensor):
    """Context in which kernels launch on the tensor's GPU; nothing for a CPU tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check_tensor(name, value, ranks=None):
    """Raise TypeError or ValueError unless value is a tensor with one of these numbers of dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if ranks is not None and value.dim() not in ranks:
        wanted = " or ".join(f"{rank}-D" for rank in ranks)
        raise ValueError(f"{name} must be {wanted}, got {value.dim()}-D with shape {tuple(value.shape)}")


def check_float(name, tensor):
    """Raise TypeError unless the tensor has a floating-point dtype."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")


def check_alike(name, tensor, like_name, like, dtype=True):
    """Raise unless both tensors live on one device and, if asked, have one dtype."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name} ({like.device}), got {tensor.device}")
    if dtype and tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name} ({like.dtype}), got {tensor.dtype}")


def pair(name, value, minimum):
    """An int, or a sequence of one or two ints, as (height, width); each at least `minimum`."""
    values = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value, value)
    if len(values) == 1:
        values = values * 2
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if len(values) != 2:
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    if values[0] < minimum or values[1] < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return values


def is_channels_last(tensor):
    """Whether torch would keep this 4-D tensor in channels_last.

    Sizes of one leave the strides ambiguous: a tensor that is also contiguous does not count as channels_last.
    """
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def is_dense(tensor):
    """Whether the tensor's elements fill one block of memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape, strict=True) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def with_strides_of(tensor, like):
    """The tensor itself if it has the memory order of `like` (which is dense), else a copy that has."""
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def exceeds_int32(*tensors):
    """Whether any element of these tensors lies further than a 32-bit offset reaches."""
    for tensor in tensors:
        if tensor is not None and tensor.numel() > 0:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            if last >= 2**31 - 2**20:  # room for the offsets of masked lanes in the last block
                return True
    return False


def differentiable_grads(reference, inputs, grad_output, needs):
    """Gradients of `reference(*inputs)` that autograd can differentiate again.

    Our kernels are opaque to autograd, so a second derivative through them would be silently wrong. When a backward
    runs with grad mode on (create_graph=True), it calls this instead: PyTorch's own ops, slower and right.

    Args:
        reference: plain PyTorch function of the inputs.
        inputs: tensors or None, as saved for backward.
        needs: for each input, whether its gradient is wanted.

    Returns:
        tuple with one gradient or None per input.
    """
    with torch.enable_grad():
        # fresh aliases: the gradient must stop at this op's inputs even where one input was computed from another
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        output = reference(*aliases)
        wanted = [alias for alias, need in zip(aliases, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True, allow_unused=True))
        return tuple(next(grads) if need else None for need in needs)


def autocast_enabled(tensor):
    """Whether autocast is on for this tensor's device; the meta device has none."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def autocast_dtype(tensor):
    """The dtype autocast wants for conv-like ops on this tensor, or None outside autocast."""
    # fp64 is left alone, as torch does
    if autocast_enabled(tensor) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return None


def cpu_threads(elements):
    """Give the next numba kernel as many threads as PyTorch would use for this many elements: one for small tensors."""
    import numba

    numba.set_num_threads(threads_for(elements))


def threads_for(elements):
    """How many threads a numba kernel over this many elements shall have."""
    return min(torch.get_num_threads() if elements >= 32768 else 1, _start_threads())


@functools.cache
def _start_threads():
    """Start numba's threads; how many there are."""
    import numba

    threads = torch.get_num_threads()
    numba.get_num_threads()
    if torch.get_num_threads() != threads:
        # numba starts its OpenMP pool on all cores, a setting that PyTorch shares where it uses the same library
        torch.set_num_threads(threads)
    return numba.config.NUMBA_NUM_THREADS
