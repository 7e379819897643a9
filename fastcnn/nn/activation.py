"""Activations: torch.nn's modules on fastcnn's ops, of which only `forward` differs."""

from torch import nn

from fastcnn import functional as F


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
