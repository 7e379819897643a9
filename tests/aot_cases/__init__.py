"""What `tests/aot.py` compiles: per op, calls of its host functions that reach every kernel and every launch choice.

Each op is a generator of (name, call). Shapes come from networks people train. Tensors are on torch's "meta" device:
shapes and strides without memory, so that a case may exceed 2^31 elements. Optimizers read addresses: theirs are real.
"""

from aot_cases.activation import activation
from aot_cases.chain import batch_norm_vectors, dense_block_passes, pending_activation
from aot_cases.convolution import conv2d, conv2d_fused, conv2d_tiles, conv_transpose2d, linear
from aot_cases.convolution_backward import conv2d_backward
from aot_cases.convolution_join import conv2d_join
from aot_cases.depthwise import depthwise_conv2d
from aot_cases.depthwise_backward import depthwise_conv2d_backward
from aot_cases.losses import cross_entropy, elementwise_loss, multi_margin_loss
from aot_cases.norms import batch_norm, group_norm, layer_norm, local_response_norm
from aot_cases.optimizers import optimizers
from aot_cases.pooling import (
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool2d,
    fractional_max_pool2d,
    lp_pool2d,
    max_pool2d,
    pending_pool,
)
from aot_cases.random import dropout, feature_dropout
from aot_cases.separable import separable_conv2d
from aot_cases.squeeze_excite import squeeze_excite
from aot_cases.whitening import decorrelated_batch_norm

CASES = {
    cases.__name__: cases
    for cases in (
        activation,
        adaptive_avg_pool2d,
        adaptive_max_pool2d,
        avg_pool2d,
        batch_norm,
        batch_norm_vectors,
        conv2d,
        conv2d_backward,
        conv2d_fused,
        conv2d_join,
        conv2d_tiles,
        conv_transpose2d,
        cross_entropy,
        decorrelated_batch_norm,
        dense_block_passes,
        depthwise_conv2d,
        depthwise_conv2d_backward,
        dropout,
        elementwise_loss,
        feature_dropout,
        fractional_max_pool2d,
        group_norm,
        layer_norm,
        linear,
        local_response_norm,
        lp_pool2d,
        max_pool2d,
        multi_margin_loss,
        optimizers,
        pending_activation,
        pending_pool,
        separable_conv2d,
        squeeze_excite,
    )
}
