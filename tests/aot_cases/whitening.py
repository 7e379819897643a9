"""Norms that whiten."""

import torch

from aot_cases.common import bf16, fp16, fp32, fp64, t
from fastcnn.ops import channel_groups as groups


def decorrelated_batch_norm():
    def launches(x, group_size):
        wide = fp64 if x.dtype == fp64 else fp32
        C = x.shape[1]
        vector = torch.zeros(C, dtype=wide, device="meta")
        matrices = torch.zeros(C // group_size, group_size, group_size, dtype=fp64, device="meta")
        groups.launch_products(None, x, vector, group_size)
        groups.launch_products(x, x, vector, group_size)
        groups.launch_map(None, None, x, vector, matrices, vector, x, group_size)
        groups.launch_map(x, matrices, None, None, None, vector, x, group_size)
        groups.launch_map(x, matrices, x, vector, matrices, vector, x, group_size)

    for name, channels_last in (("nhwc", True), ("nchw", False)):
        for dtype in (bf16, fp32):
            x = t(256, 64, 56, 56, dtype=dtype, channels_last=channels_last)
            yield f"groups of 16 {name} {dtype}", lambda x=x: launches(x, 16)
    for group_size in (1, 4, 32, 64):
        yield f"groups of {group_size}", lambda group_size=group_size: launches(t(256, 128, 28, 28), group_size)
    yield "groups of 64 nchw fp32", lambda: launches(t(64, 128, 28, 28, dtype=fp32, channels_last=False), 64)
    yield "groups of 3, small planes fp16", lambda: launches(t(32, 21, 7, 7, dtype=fp16, channels_last=False), 3)
    yield "groups of 24 fp32", lambda: launches(t(32, 72, 14, 14, dtype=fp32), 24)
    yield "fp64", lambda: launches(t(5, 12, 9, 7, dtype=fp64), 6)
    yield "groups of 16 fp64", lambda: launches(t(5, 128, 9, 7, dtype=fp64), 16)
    yield "above 2^31 elements", lambda: launches(t(2048, 64, 224, 224), 16)
