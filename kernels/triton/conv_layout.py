"""Copies of convolution's operands as its kernels read them: channels in whole vectors, groups side by side."""

import triton
import triton.language as tl


@triton.jit
def expand_groups_kernel(
    w_ptr,
    out_ptr,
    numel,
    K,  # filters of one group
    C,  # channels of one group
    R,
    S,
    stride_wk,
    stride_wc,
    stride_wr,
    stride_ws,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program writes BLOCK elements of the block-diagonal weight [K of all groups, R, S, PACK * C]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = i % (PACK * C)
    s = i // (PACK * C) % S
    r = i // (PACK * C * S) % R
    k = i // (PACK * C * S * R)
    own = (i < numel) & (column // C == k // K % PACK)
    values = tl.load(
        w_ptr + k * stride_wk + column % C * stride_wc + r * stride_wr + s * stride_ws, mask=own, other=0.0
    )
    tl.store(out_ptr + i, values, mask=i < numel)


@triton.jit
def contract_groups_kernel(
    packed_ptr,
    dw_ptr,
    numel,
    K,  # filters of one group
    C,  # channels of one group
    R,
    S,
    stride_wk,
    stride_wc,
    stride_wr,
    stride_ws,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program copies BLOCK elements of the diagonal blocks of a gradient [K of all groups, R, S, PACK * C]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = i % C
    s = i // C % S
    r = i // (C * S) % R
    k = i // (C * S * R)
    inside = i < numel
    values = tl.load(packed_ptr + (i // C * PACK + k // K % PACK) * C + c, mask=inside, other=0.0)
    tl.store(dw_ptr + k * stride_wk + c * stride_wc + r * stride_wr + s * stride_ws, values, mask=inside)


@triton.jit(do_not_specialize=["pixels", "C", "P", "Q"])
def pad_channels_kernel(
    x_ptr,
    out_ptr,
    pixels,
    C,
    P,
    Q,
    stride_xn,
    stride_xc,
    stride_xp,
    stride_xq,
    INT64: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program copies BLOCK pixels to [pixels, CHANNELS], with zeros past the C channels that there are
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, CHANNELS)
    if INT64:
        m = m.to(tl.int64)
        c = c.to(tl.int64)
    rows = m // (P * Q) * stride_xn + m % (P * Q) // Q * stride_xp + m % Q * stride_xq
    mask = (m < pixels)[:, None]
    x = tl.load(x_ptr + rows[:, None] + (c * stride_xc)[None, :], mask=mask & (c < C)[None, :], other=0.0)
    tl.store(out_ptr + (m * CHANNELS)[:, None] + c[None, :], x, mask=mask)
