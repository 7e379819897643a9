"""Layer shapes of real networks, for the benchmarks: taken by tracing, kept in shapes.json.

    python -m fastcnn.benchmarks.shapes    # rewrites shapes.json

Per network a list of layers, one line each, without the batch:

    {"name": "layer2.0.conv2", "op": "conv2d", "count": 1, "input": [128, 56, 56], "output": [128, 28, 28],
     "input_grad": true, "kernel": [3, 3], "stride": [2, 2], ...}

Layers that agree in everything but the name are one line, under the name of the first; count says how many there are.
input_grad is false where the input is the image: nobody asks for its gradient.
"""

import json
import pathlib

import torch

from fastcnn.benchmarks import networks
from fastcnn.study.trace import trace

FILE = pathlib.Path(__file__).with_name("shapes.json")
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "silu", "sigmoid", "tanh", "hardswish", "gelu")
OPS = (
    *("conv2d", "conv_transpose2d", "linear", "batch_norm", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"),
    *("dropout", *ACTIVATIONS),
)
# attributes that change neither the work nor the result's shape
DROPPED = ("training", "momentum", "eps")


def read():
    """{network: list of layers} as shapes.json has it."""
    return json.loads(FILE.read_text())


def layers(model, input_shape):
    """The distinct layers of a network on an input [C, H, W], in the order of their first calls."""
    found = {}
    for call in trace(model, (2, *input_shape)):  # two images: batch norm needs more than one value
        if call.op not in OPS:
            continue
        attrs = {name: value for name, value in call.attrs.items() if name not in DROPPED}
        op = call.op
        if op not in (*ACTIVATIONS, "dropout"):
            del attrs["inplace"]
        if op == "conv2d" and attrs["groups"] == call.input_shapes[0][1] > 1:
            op = "depthwise_conv2d"
        layer = {"op": op, "input": call.input_shapes[0][1:], "output": call.output_shapes[0][1:]}
        layer |= {"input_grad": call.inputs[0] != 0, **attrs}
        key = json.dumps(layer)
        # the name and the count stand first in a line
        found.setdefault(key, {"name": call.name, "op": op, "count": 0} | layer)["count"] += 1
    return json.loads(json.dumps(list(found.values())))


def collect():
    """{network: list of layers} from the networks themselves."""
    networks.import_torchvision()
    from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

    with torch.device("meta"):  # weights would take seconds to draw
        shapes = {name: layers(networks.build(name), networks.input_shape(name)) for name in networks.NETWORKS}
        # the one transposed convolution among common networks
        mask_head = layers(MaskRCNNPredictor(256, 256, 91), (256, 14, 14))
    return shapes | {"maskrcnn": [layer | {"input_grad": True} for layer in mask_head]}


def text(shapes):
    """shapes.json: one layer a line, so that changes read well."""
    parts = []
    for network, found in shapes.items():
        lines = ",\n".join("    " + json.dumps(layer) for layer in found)
        parts.append(f"  {json.dumps(network)}: [\n{lines}\n  ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(text(collect()))
