"""Tensors without memory, for shapes that people train."""

import torch

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def t(*shape, dtype=bf16, channels_last=True):
    """A tensor without memory; 4-D ones in channels_last unless told otherwise."""
    memory_format = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
