"""Norms of the tensors of a step: one launch that sums squares per chunk, one that adds the sums up in their order."""

import torch

from fastcnn.ops import common
from fastcnn.optim.table import NUMPY_LIKE

SUMS_AT_ONCE = 4096  # that the one program of the second launch reads at a time


def square_sums(backend, bucket, sums, parameters=False):
    """Fill sums, fp64, with the sum of squares of each chunk of the gradients; then, if asked, of the parameters."""
    table = bucket.table
    if not table.count:
        return
    if backend == "cpu":
        from fastcnn.kernels.cpu.multi_tensor import square_sums as kernel

        common.cpu_threads(bucket.total // 8)
        for row, part in zip((1, 0) if parameters else (1,), sums.view(-1, table.count).numpy(), strict=True):
            kernel(table.table, table.chunks, NUMPY_LIKE[bucket.params[0].dtype], row, part)
        return
    from fastcnn.kernels.triton.multi_tensor_norm import square_sums_kernel

    with common.device_guard(sums):
        square_sums_kernel[(table.count,)](
            table.table,
            table.chunks,
            len(bucket.params),
            table.count,
            sums,
            PARAMETERS=parameters,
            SIZES=len(table.rows),
            **bucket.launch_keywords(),
        )


def clip_factor(launches, max_norm, scale):
    """The factor of all gradients that brings their norm to max_norm, at most 1; and the norm.

    Args:
        launches: list of (backend, bucket), tables made.
        scale: what the gradients of "triton" are still multiplied by, a tensor, or None.

    Returns:
        fp64 [2] on the device of the parameters.

    Raises:
        NotImplementedError: they are on several devices.
    """
    devices = {bucket.params[0].device for _, bucket in launches}
    if len(devices) > 1:
        names = sorted(map(str, devices))
        raise NotImplementedError(f"max_grad_norm takes parameters on one device, and these are on {names}")
    (device,) = devices
    on_triton = any(backend == "triton" for backend, _ in launches)
    scale = scale.to(device, non_blocking=True) if on_triton and scale is not None else None
    counts = [1 if backend == "torch" else bucket.table.count for backend, bucket in launches]
    sums = torch.empty(sum(counts), dtype=torch.float64, device=device)
    for (backend, bucket), part in zip(launches, sums.split(counts), strict=True):
        if backend == "torch":
            norms = torch.stack(torch._foreach_norm([p.grad for p in bucket.params], 2, dtype=torch.float64))
            # PyTorch's gradients are unscaled by now
            part.copy_((norms if scale is None else norms * scale).square().sum())
        else:
            square_sums(backend, bucket, part)
    clip = torch.empty(2, dtype=torch.float64, device=device)
    if on_triton:
        from fastcnn.kernels.triton.multi_tensor_norm import clip_kernel

        with common.device_guard(clip):
            clip_kernel[(1,)](sums, len(sums), scale, max_norm, clip, BLOCK=SUMS_AT_ONCE)
    else:
        clip[1] = sums.sum().sqrt()
        clip[0] = (max_norm / (clip[1] + 1e-6)).clamp(max=1.0)
    return clip
