"""Dense blocks on the fused chain, as those of blocks.py (Huang, Liu, van der Maaten and Weinberger: Densely connected
convolutional networks, 2017).
"""

from torch import nn

from fastcnn import chain
from fastcnn.nn.activation import ReLU
from fastcnn.nn.blocks import CONVOLUTIONS, NORMS, Block, call, conv_norm, is_plain
from fastcnn.nn.dropout import Dropout
from fastcnn.nn.residual_blocks import square_convolution


class DenseLayer(Block):
    """Batch norm, ReLU, 1x1 and again batch norm, ReLU, 3x3: torchvision's _DenseLayer. Source: Huang et al. 2017.

    Args:
        num_input_features: input channels.
        growth_rate: output channels.
        bn_size: the 1x1 convolution has bn_size * growth_rate outputs.
        drop_rate: probability that training drops a number of the output.
    """

    def __init__(self, num_input_features, growth_rate, bn_size=4, drop_rate=0.0):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = square_convolution(num_input_features, bn_size * growth_rate, 1)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = square_convolution(bn_size * growth_rate, growth_rate, 3)
        self.dropout = Dropout(drop_rate)

    def values(self, x):
        """The layer's own channels for a tensor or value, or for a list of them side by side."""
        x = chain.cat(x) if isinstance(x, (list, tuple)) else x
        out = call(self.relu1, call(self.norm1, x))
        out = call(self.relu2, conv_norm(out, self.conv1, self.norm2))
        return call(self.dropout, call(self.conv2, out))


class DenseLayerWithoutBottleneck(Block):
    """Batch norm, ReLU and 3x3: the dense layer before the paper puts a 1x1 convolution into it.

    Args:
        num_input_features: input channels.
        growth_rate: output channels.
        drop_rate: probability that training drops a number of the output.
    """

    def __init__(self, num_input_features, growth_rate, drop_rate=0.0):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = square_convolution(num_input_features, growth_rate, 3)
        self.dropout = Dropout(drop_rate)

    def values(self, x):
        """The layer's own channels for a tensor or value, or for a list of them side by side."""
        x = chain.cat(x) if isinstance(x, (list, tuple)) else x
        return call(self.dropout, call(self.conv1, call(self.relu1, call(self.norm1, x))))


class DenseBlock(Block):
    """Dense layers, each of which reads the block's input and all layers before it: torchvision's _DenseBlock.

    Args:
        num_layers: how many.
        num_input_features, growth_rate, drop_rate: as of DenseLayer; every layer has growth_rate more inputs.
        bn_size: as of DenseLayer; None for layers without the 1x1 convolution.

    Returns of a call: input and all layers' outputs along the channels.
    """

    def __init__(self, num_layers, num_input_features, bn_size, growth_rate, drop_rate=0.0):
        super().__init__()
        for i in range(num_layers):
            inputs = num_input_features + i * growth_rate
            if bn_size is None:
                layer = DenseLayerWithoutBottleneck(inputs, growth_rate, drop_rate)
            else:
                layer = DenseLayer(inputs, growth_rate, bn_size, drop_rate)
            self.add_module(f"denselayer{i + 1}", layer)

    def values(self, x):
        layers = list(self.children())
        if all(_is_known_dense_layer(layer) for layer in layers):
            return chain.dense_block(x, [(layer.norm1, layer.conv1, layer.norm2, layer.conv2) for layer in layers])
        features = [chain.materialize(x)]
        for layer in layers:
            features.append(chain.materialize(call(layer, features)))
        return chain.cat(features)


def _is_known_dense_layer(layer):
    parts = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")
    if type(layer) is not DenseLayer or not all(is_plain(m) for m in (layer, *layer.children())):
        return False
    if type(layer.dropout) not in (nn.Dropout, Dropout) or (layer.dropout.training and layer.dropout.p > 0):
        return False
    kinds = [type(layer.get_submodule(name)) for name in parts]
    relus = {nn.ReLU, ReLU}
    sets = (NORMS, relus, CONVOLUTIONS, NORMS, relus, CONVOLUTIONS)
    return all(kind in known for kind, known in zip(kinds, sets, strict=True))
