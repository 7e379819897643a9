"""Traces: what calls a network makes; and shapes.json, which is taken from them."""

import functools
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastcnn
from fastcnn.benchmarks import networks, shapes
from fastcnn.models import create_model
from fastcnn.study.trace import trace


@functools.cache
def network(name):
    with torch.device("meta"):
        return networks.build(name)


@functools.cache
def calls_of(name):
    return trace(network(name), (2, 3, 224, 224))


def parameters(calls):
    found = {name: shape for call in calls for name, shape in call.parameters.items()}
    return sum(math.prod(shape) for shape in found.values())


class Functions(nn.Module):
    """A module whose forward is the function given."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def test_shapes_json_is_what_the_networks_have():
    assert shapes.FILE.read_text() == shapes.text(shapes.collect()), "run python -m fastcnn.benchmarks.shapes"


def test_shapes_count_every_layer_once():
    layers = shapes.read()["resnet50"]
    counts = Counter()
    for layer in layers:
        counts[layer["op"]] += layer["count"]
    expected = {"conv2d": 53, "batch_norm": 53, "relu": 49, "max_pool2d": 1, "adaptive_avg_pool2d": 1, "linear": 1}
    assert counts == expected
    assert [layer["name"] for layer in layers if not layer["input_grad"]] == ["conv1"]
    by_name = {layer["name"]: layer for layer in layers}
    strided = by_name["layer2.0.conv2"]
    assert (strided["input"], strided["output"], strided["count"]) == ([128, 56, 56], [128, 28, 28], 1)
    assert (strided["kernel"], strided["stride"], strided["padding"]) == ([3, 3], [2, 2], [1, 1])


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0"])
def test_calls_are_those_of_torch_fx(name):
    model = network(name)
    calls = Counter(call.op for call in calls_of(name))
    graph = torch.fx.symbolic_trace(model).graph
    modules = Counter(
        type(model.get_submodule(node.target)).__name__ for node in graph.nodes if node.op == "call_module"
    )
    functions = Counter(node.target.__name__ for node in graph.nodes if node.op == "call_function")
    assert calls["conv2d"] == modules["Conv2d"]
    assert calls["batch_norm"] == modules["BatchNorm2d"]
    assert calls["adaptive_avg_pool2d"] == modules["AdaptiveAvgPool2d"]
    assert calls["relu"] == modules["ReLU"] and calls["silu"] == modules["SiLU"]
    assert calls["add"] == functions["add"] + functions["iadd"]
    # drop-path is one function to fx and, here, the product in it
    assert calls["mul"] == functions["mul"] + functions["stochastic_depth"]
    # what fx has not and we have: nothing
    assert calls.total() == sum(1 for node in graph.nodes if node.op.startswith("call_"))


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "densenet121"])
def test_every_parameter_is_read(name):
    assert parameters(calls_of(name)) == sum(p.numel() for p in network(name).parameters())


def test_dataflow_of_a_residual_block():
    calls = {call.name: call for call in calls_of("resnet50")}
    joined = calls["layer1.1.relu_2"]
    (block_input,) = calls["layer1.1.conv1"].inputs
    assert calls["layer1.0.relu_2"].outputs == (block_input,)
    assert calls["layer1.1.bn1"].inputs == calls["layer1.1.conv1"].outputs
    assert calls["layer1.1.relu"].inputs == calls["layer1.1.bn1"].outputs
    assert calls["layer1.1.conv2"].inputs == calls["layer1.1.relu"].outputs  # the in-place result, not what it replaced
    add = calls["layer1.1.add"]
    assert add.inputs == (*calls["layer1.1.bn3"].outputs, block_input) and add.inplace
    assert joined.inputs == add.outputs and joined.outputs == calls["layer1.2.conv1"].inputs
    # the projection's block joins two batch norms
    assert calls["layer1.0.add"].inputs == (*calls["layer1.0.bn3"].outputs, *calls["layer1.0.downsample.1"].outputs)


def test_dataflow_of_a_dense_block():
    calls = {call.name: call for call in calls_of("densenet121")}
    cat = calls["features.denseblock1.denselayer3.cat"]
    made = [calls[f"features.denseblock1.denselayer{i}.conv2"].outputs[0] for i in (1, 2)]
    assert cat.inputs == (*calls["features.pool0"].outputs, *made)
    assert cat.input_shapes == ((2, 64, 56, 56), (2, 32, 56, 56), (2, 32, 56, 56))
    assert calls["features.denseblock1.denselayer3.norm1"].inputs == cat.outputs
    assert cat.attrs == {"dim": 1, "inplace": False}


def test_in_place_calls_give_new_values():
    def forward(module, x):
        y = x + 1
        y += x
        y.mul_(2)
        first = y[:, :2]
        F.relu(first, inplace=True)
        return y * y

    add, iadd, mul, view, relu, product = trace(Functions(forward), (2, 4))
    assert [c.op for c in (add, iadd, mul, view, relu, product)] == ["add", "add", "mul", "getitem", "relu", "mul"]
    assert [c.inplace for c in (add, iadd, mul, view, relu, product)] == [False, True, True, False, True, False]
    assert iadd.inputs == (*add.outputs, 0) and mul.inputs == iadd.outputs
    assert view.inputs == mul.outputs and relu.inputs == view.outputs
    # writing through the view changed y
    assert product.inputs == relu.outputs * 2
    assert [c.name for c in (add, iadd, mul)] == ["add", "add_1", "mul"]


def test_writing_into_a_buffer():
    def forward(module, x):
        out = torch.zeros(2, 6)
        out[:, :4] = x
        return out.sum(1)

    write, total = trace(Functions(forward), (2, 4))
    assert (write.op, write.inputs, total.inputs) == ("setitem", (0,), write.outputs)


def test_functions_and_their_attributes():
    def forward(module, x):
        x = F.conv2d(x, module.conv.weight, None, 2, "valid", 1)
        x = F.max_pool2d(F.relu6(x), 3, ceil_mode=True)
        x = F.avg_pool2d(F.dropout(x, 0.3), (2, 1), stride=1, count_include_pad=False)
        x = torch.cat([x, F.adaptive_avg_pool2d(x, (None, x.shape[3]))], dim=1)
        return torch.flatten(F.hardtanh(x, 0.0, 6.0), 1)

    calls = trace(Functions(forward, conv=nn.Conv2d(3, 8, (3, 5))), (2, 3, 33, 33))
    assert [(call.name, call.op) for call in calls] == [
        (name, name)
        for name in ("conv2d", "relu6", "max_pool2d", "dropout", "avg_pool2d", "adaptive_avg_pool2d", "cat")
    ] + [("relu6_1", "relu6"), ("flatten", "flatten")]
    attrs = {call.name: call.attrs for call in calls}
    conv = {"kernel": (3, 5), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "bias": False}
    assert attrs["conv2d"] == conv | {"inplace": False}
    pool = {"kernel": (3, 3), "stride": (3, 3), "padding": (0, 0), "dilation": (1, 1), "ceil_mode": True}
    assert attrs["max_pool2d"] == pool | {"inplace": False}
    assert attrs["dropout"] == {"p": 0.3, "inplace": False}
    assert attrs["avg_pool2d"]["kernel"] == (2, 1) and attrs["avg_pool2d"]["stride"] == (1, 1)
    assert attrs["avg_pool2d"]["count_include_pad"] is False
    assert attrs["adaptive_avg_pool2d"]["output_size"] == calls[4].output_shapes[0][2:]
    assert attrs["flatten"] == {"start_dim": 1, "inplace": False}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel, expected", [(3, (2, 2)), ((3, 2), "same")])
def test_same_padding(kernel, expected):
    (call,) = trace(nn.Conv2d(3, 4, kernel, padding="same", dilation=2 if kernel == 3 else 1), (1, 3, 8, 8))
    assert call.attrs["padding"] == expected


def test_a_shared_module_is_counted_once_and_named_twice():
    shared = nn.Linear(4, 4)
    calls = trace(nn.Sequential(shared, nn.ReLU(), shared), (2, 4))
    assert [call.name for call in calls] == ["0", "1", "0_1"]
    assert calls[0].parameters == calls[2].parameters == {"0.weight": (4, 4), "0.bias": (4,)}
    assert parameters(calls) == 20


def test_computed_weights_count_as_the_parameters_they_come_from():
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 5))
    calls = trace(layer, (2, 3))
    assert [call.op for call in calls] == ["linear"]
    assert parameters(calls) == 5 + 5 + 15


def test_batch_norm_may_read_its_counter():
    (call,) = trace(nn.BatchNorm2d(3, momentum=None), (2, 3, 4, 4))
    assert call.attrs["momentum"] == 1.0 and call.parameters == {"weight": (3,), "bias": (3,)}


def test_our_lenet():
    with fastcnn.strict():  # is about running, not about tracing
        calls = trace(create_model("lenet5"), (2, 1, 32, 32))
    assert [call.name for call in calls] == ("conv1 act1 pool1 conv2 act2 pool2 flatten fc1 act3 fc2 act4 fc3".split())
    assert parameters(calls) == 61_706
    assert [call.output_shapes[0] for call in calls if call.op == "max_pool2d"] == [(2, 6, 14, 14), (2, 16, 5, 5)]


def test_the_other_mode_runs_no_auxiliary_classifiers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.aux = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.body(x)
            return (x, self.aux(x)) if self.training else x

    assert [call.name for call in trace(Net(), (2, 4))] == ["body", "aux"]
    assert [call.name for call in trace(Net(), (2, 4), training=False)] == ["body"]


def test_indices():
    def forward(module, x):
        return x[:, 1:, ..., None, ::2], x[0], x[torch.arange(2)]

    slices, first, chosen = trace(Functions(forward), (2, 4, 6, 6))
    none = slice(None)
    assert slices.attrs["index"] == (none, slice(1, None), ..., None, slice(None, None, 2))
    assert first.attrs["index"] == (0,) and "index" not in chosen.attrs


def test_our_functions():
    def forward(module, x):
        return fastcnn.functional.relu(fastcnn.functional.max_pool2d(x, 2), inplace=True)

    before = fastcnn.explain()
    with fastcnn.strict():
        pool, relu = trace(Functions(forward), (2, 3, 8, 8))
    assert (pool.op, relu.op, relu.inplace, relu.inputs) == ("max_pool2d", "relu", True, pool.outputs)
    # nothing ran
    assert fastcnn.explain() == before


def test_the_model_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, torch.randn(2, 3, 8, 8))
    assert not model.training and not model[0]._forward_pre_hooks
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "forward",
    [
        lambda module, x: x * 2 if x.sum() > 0 else x,
        lambda module, x: x * x.max().item(),
        lambda module, x: x[x > 0],
        lambda module, x: x + len(x.tolist()),
    ],
)
def test_reading_values_is_one_clear_error(forward):
    with pytest.raises(ValueError, match="cannot trace Sequential: its module 0 reads values of a tensor"):
        trace(nn.Sequential(Functions(forward)), (2, 3))


def test_other_errors_are_the_model_s_own():
    with pytest.raises(RuntimeError, match="reduction dim"):
        trace(nn.Linear(3, 4), (2, 5))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        trace(3, (2, 5))
