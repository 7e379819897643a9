"""torch.nn's modules on fastcnn's ops: same constructors, parameters, state_dict and repr; only `forward` differs."""

from torch import nn

from fastcnn import functional as F


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d on fastcnn.functional.conv2d."""

    def _conv_forward(self, input, weight, bias):
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class ConvTranspose2d(nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d on fastcnn.functional.conv_transpose2d."""

    def forward(self, input, output_size=None):
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return F.conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class Linear(nn.Linear):
    """torch.nn.Linear on fastcnn.functional.linear."""

    def forward(self, input):
        return F.linear(input, self.weight, self.bias)


class ReLU(nn.ReLU):
    """torch.nn.ReLU on fastcnn.functional.relu."""

    def forward(self, input):
        return F.relu(input, self.inplace)


class ReLU6(nn.ReLU6):
    """torch.nn.ReLU6 on fastcnn.functional.relu6."""

    def forward(self, input):
        return F.relu6(input, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """torch.nn.LeakyReLU on fastcnn.functional.leaky_relu."""

    def forward(self, input):
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class SiLU(nn.SiLU):
    """torch.nn.SiLU on fastcnn.functional.silu."""

    def forward(self, input):
        return F.silu(input, self.inplace)


class Sigmoid(nn.Sigmoid):
    """torch.nn.Sigmoid on fastcnn.functional.sigmoid."""

    def forward(self, input):
        return F.sigmoid(input)


class Tanh(nn.Tanh):
    """torch.nn.Tanh on fastcnn.functional.tanh."""

    def forward(self, input):
        return F.tanh(input)


class Hardswish(nn.Hardswish):
    """torch.nn.Hardswish on fastcnn.functional.hardswish."""

    def forward(self, input):
        return F.hardswish(input, self.inplace)


class GELU(nn.GELU):
    """torch.nn.GELU on fastcnn.functional.gelu."""

    def forward(self, input):
        return F.gelu(input, approximate=self.approximate)


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


class _BatchNorm:
    def forward(self, input):
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        use_batch = self.training or (self.running_mean is None and self.running_var is None)
        update = not self.training or self.track_running_stats
        return F.batch_norm(
            input,
            self.running_mean if update else None,
            self.running_var if update else None,
            self.weight,
            self.bias,
            use_batch,
            momentum,
            self.eps,
        )


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d on fastcnn.functional.batch_norm."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d on fastcnn.functional.batch_norm."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d on fastcnn.functional.batch_norm."""


class Dropout(nn.Dropout):
    """torch.nn.Dropout on fastcnn.functional.dropout."""

    def forward(self, input):
        return F.dropout(input, self.p, self.training, self.inplace)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on fastcnn.functional.cross_entropy."""

    def forward(self, input, target):
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
