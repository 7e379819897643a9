"""Pools: torch.nn's modules on fastcnn's ops, of which only `forward` differs."""

from torch import nn

from fastcnn import functional as F


class MaxPool2d(nn.MaxPool2d):
    """torch.nn.MaxPool2d on fastcnn.functional.max_pool2d."""

    def forward(self, input):
        return F.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class AvgPool2d(nn.AvgPool2d):
    """torch.nn.AvgPool2d on fastcnn.functional.avg_pool2d."""

    def forward(self, input):
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """torch.nn.AdaptiveAvgPool2d on fastcnn.functional.adaptive_avg_pool2d."""

    def forward(self, input):
        return F.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    """torch.nn.AdaptiveMaxPool2d on fastcnn.functional.adaptive_max_pool2d."""

    def forward(self, input):
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class FractionalMaxPool2d(nn.FractionalMaxPool2d):
    """torch.nn.FractionalMaxPool2d on fastcnn.functional.fractional_max_pool2d."""

    def forward(self, input):
        return F.fractional_max_pool2d(
            input,
            self.kernel_size,
            self.output_size,
            self.output_ratio,
            self.return_indices,
            _random_samples=self._random_samples,
        )


class LPPool2d(nn.LPPool2d):
    """torch.nn.LPPool2d on fastcnn.functional.lp_pool2d."""

    def forward(self, input):
        return F.lp_pool2d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)
