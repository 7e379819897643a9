"""Depthwise separable convolution as one layer."""

import torch

from fastcnn import functional as F
from fastcnn.nn.conv import Conv2d


class SeparableConv2d(torch.nn.Module):
    """A depthwise convolution and a 1x1 convolution of its result: fastcnn.functional.separable_conv2d.

    Parameters are named and drawn as those of torch.nn.Conv2d layers `depthwise` and `pointwise`, whose forward is not
    called: hooks belong on this layer.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode, device, dtype: as of
            torch.nn.Conv2d; stride, padding and dilation are the depthwise convolution's.
        bias: whether the 1x1 convolution has one.
        depth_multiplier: depthwise filters per input channel.
        depthwise_bias: whether the depthwise convolution has a bias.

    Shape:
        [N, in_channels, H, W] or [in_channels, H, W] to [..., out_channels, P, Q].

    Raises:
        ValueError: depth_multiplier is not a positive int, or an argument is not right for torch.nn.Conv2d.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, bias=True, depth_multiplier=1,
        depthwise_bias=False, padding_mode="zeros", device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if isinstance(depth_multiplier, bool) or not isinstance(depth_multiplier, int) or depth_multiplier < 1:
            raise ValueError(f"depth_multiplier must be a positive int, got {depth_multiplier!r}")
        channels, where = in_channels * depth_multiplier, dict(device=device, dtype=dtype)
        self.depthwise = Conv2d(
            in_channels, channels, kernel_size, stride, padding, dilation, in_channels, depthwise_bias, padding_mode,
            **where,
        )  # fmt: skip
        self.pointwise = Conv2d(channels, out_channels, 1, bias=bias, **where)

    def forward(self, input):
        depthwise, pointwise = self.depthwise, self.pointwise
        padding = depthwise.padding
        if depthwise.padding_mode != "zeros":
            input = F.pad(input, depthwise._reversed_padding_repeated_twice, mode=depthwise.padding_mode)
            padding = 0
        return F.separable_conv2d(
            input, depthwise.weight, pointwise.weight, pointwise.bias, depthwise.stride, padding, depthwise.dilation,
            depthwise.bias,
        )  # fmt: skip
