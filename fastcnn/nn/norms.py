"""Norms: torch.nn's modules on fastcnn's ops, of which only `forward` differs."""

import torch
from torch import nn

from fastcnn import functional as F
from fastcnn.ops.batch_norm_module import arguments, group_of
from fastcnn.ops.batch_norm_sync import sync_batch_norm


class _BatchNorm:
    def forward(self, input, *, activation=None, residual=None):
        """activation(batch_norm(input) + residual), as fastcnn.functional.batch_norm; both may be None."""
        self._check_input_dim(input)
        fused = dict(activation=activation, residual=residual)
        running_mean, running_var, training, momentum = arguments(self)
        return F.batch_norm(
            input, running_mean, running_var, self.weight, self.bias, training, momentum, self.eps, **fused
        )


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d on fastcnn.functional.batch_norm."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d on fastcnn.functional.batch_norm."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d on fastcnn.functional.batch_norm."""


class SyncBatchNorm(_BatchNorm, nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm on fastcnn's kernels; takes CPU tensors, too, over gloo."""

    def forward(self, input, *, activation=None, residual=None):
        """As BatchNorm2d's, with the statistics of all processes in training."""
        group = group_of(self)
        if group is None:
            return super().forward(input, activation=activation, residual=residual)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        running_mean, running_var, _, momentum = arguments(self)
        return sync_batch_norm(
            input, running_mean, running_var, self.weight, self.bias, momentum, self.eps, group,
            activation=activation, residual=residual,
        )  # fmt: skip

    @classmethod
    def convert_sync_batchnorm(cls, module, process_group=None):
        """The module with every batch norm in it, torch's or ours, as SyncBatchNorm; parameters and buffers stay."""
        converted = super().convert_sync_batchnorm(module, process_group)
        for part in converted.modules():
            if type(part) is nn.SyncBatchNorm:
                part.__class__ = cls
        return converted


class GroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm on fastcnn.functional.group_norm."""

    def forward(self, input):
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm on fastcnn.functional.layer_norm."""

    def forward(self, input):
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class _InstanceNorm:
    def _apply_instance_norm(self, input):
        return F.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
        )


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d on fastcnn.functional.instance_norm."""


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d on fastcnn.functional.instance_norm."""


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d on fastcnn.functional.instance_norm."""


class LocalResponseNorm(nn.LocalResponseNorm):
    """torch.nn.LocalResponseNorm on fastcnn.functional.local_response_norm."""

    def forward(self, input):
        return F.local_response_norm(input, self.size, self.alpha, self.beta, self.k)


class DecorrelatedBatchNorm2d(nn.Module):
    """Batch norm that whitens groups of channels: fastcnn.functional.decorrelated_batch_norm.

    Args:
        num_features: channels of the input [N, C, H, W].
        group_size: channels that are whitened together, a divisor of num_features.
        eps, momentum, affine: as of torch.nn.BatchNorm2d.
    """

    def __init__(self, num_features, group_size=16, eps=1e-5, momentum=0.1, affine=True, device=None, dtype=None):
        super().__init__()
        if num_features % group_size:
            raise ValueError(f"group_size must divide num_features = {num_features}, got {group_size}")
        self.num_features, self.group_size, self.eps, self.momentum = num_features, group_size, eps, momentum
        how = dict(device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.ones(num_features, **how)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, **how)) if affine else None
        identity = torch.eye(group_size, **how).repeat(num_features // group_size, 1, 1)
        self.register_buffer("running_mean", torch.zeros(num_features, **how))
        self.register_buffer("running_whitening", identity)
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))

    def forward(self, input):
        if input.dim() != 4:
            raise ValueError(f"input must be 4-D, got {input.dim()}-D with shape {tuple(input.shape)}")
        momentum = self.momentum
        if self.training:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        return F.decorrelated_batch_norm(
            input,
            self.running_mean,
            self.running_whitening,
            self.weight,
            self.bias,
            self.training,
            0.0 if momentum is None else momentum,
            self.eps,
            group_size=self.group_size,
        )

    def extra_repr(self):
        return (
            f"{self.num_features}, group_size={self.group_size}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.weight is not None}"
        )
