"""The ledger of bytes and FLOPs, against counts by hand and an independent count of five networks."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcnn.benchmarks import networks
from fastcnn.ops.chips import CHIPS
from fastcnn.study import ledger
from fastcnn.study.roofline import command, roofline
from fastcnn.study.trace import trace

# per scheme eager, fused, chain, at 798 TFLOP/s and 3.0 TB/s: (MB forward, MB backward) per image, img/s; and the GFLOP
# per image forward and in all: section 9 of the project's performance study, a count made independently of ours
COUNTED = {
    "resnet50": (((186, 291), (126, 246), (80, 165)), (5931, 7485, 11286), (8.18, 24.30)),
    "vgg16": (((181, 220), (73, 193), (64, 103)), (4616, 5831, 7327), (30.94, 92.65)),
    "mobilenet_v2": (((117, 158), (68, 121), (28, 76)), (10900, 15883, 28707), (0.602, 1.78)),
    "efficientnet_b0": (((133, 206), (82, 168), (33, 86)), (8831, 11956, 25095), (0.772, 2.29)),
    "densenet121": (((248, 396), (185, 302), (48, 165)), (4645, 6133, 14024), (5.67, 16.77)),
}
REAL = {
    "resnet50": (5050, 6312, 9475),
    "vgg16": (3438, 4159, 4965),
    "mobilenet_v2": (9549, 13836, 25229),
    "efficientnet_b0": (7660, 10347, 21959),
    "densenet121": (4015, 5274, 12133),
}
MEASURED = (798, 3.0)


def of_network(name, **options):
    with torch.device("meta"):
        model = networks.build(name)
    return roofline(model, networks.input_shape(name), name=name, **{"ceilings": MEASURED} | options)


@pytest.mark.parametrize("name", COUNTED)
def test_networks_agree_with_the_independent_count(name):
    megabytes, images, gflops = COUNTED[name]
    found = of_network(name)
    for scheme, (forward, backward), rate, real in zip(ledger.SCHEMES, megabytes, images, REAL[name], strict=True):
        assert found.megabytes(scheme, "forward") == pytest.approx(forward, rel=0.02), scheme
        assert found.megabytes(scheme, "backward") == pytest.approx(backward, rel=0.02), scheme
        assert found.images_per_second(scheme) == pytest.approx(rate, rel=0.01), scheme
        assert found.images_per_second(scheme, real=True) == pytest.approx(real, rel=0.01), scheme
    assert found.gflops("forward") == pytest.approx(gflops[0], rel=0.001)
    assert found.gflops() == pytest.approx(gflops[1], rel=0.003)


def test_an_identity_bottleneck_by_hand():
    # tensors of 56 x 56 pixels in bf16: s with 64 channels, b with 256
    s, b = 56 * 56 * 64 * 2, 56 * 56 * 256 * 2
    eager_forward = (
        (b + s)  # conv1: R x, W y1
        + 3 * s  # bn1: R y1 twice (statistics, normalise), W
        + 2 * s  # relu: R W
        + (s + s)  # conv2
        + 3 * s  # bn2
        + 2 * s  # relu
        + (s + b)  # conv3
        + 3 * b  # bn3
        + 3 * b  # join: R both, W
        + 2 * b  # relu
    )
    eager_backward = (
        3 * b  # relu: R dz, R z, W
        + 5 * b  # bn3: R dy and R x for the sums, again for the gradient, W
        + (b + s) * 2  # conv3: dgrad R dy W dx; wgrad R dy R x
        + 3 * s  # relu
        + 5 * s  # bn2
        + (s + s) * 2  # conv2
        + 3 * s  # relu
        + 5 * s  # bn1
        + (s + b) * 2  # conv1
        + 3 * b  # the block's input has two users: R both gradients, W their sum
    )
    mask = b / 16  # one bit for each element of two bytes
    chain_forward = (
        (b + s)  # conv1: R the stored join of the last block, W y1 raw
        + (s + s)  # conv2: R y1 raw, normalised while loading, W y2 raw
        + (s + b)  # conv3
        + (3 * b + mask)  # join: R y3 raw, R shortcut, W their sum, W the mask of its relu
    )
    chain_backward = (
        (b + b + s + s)  # conv3 dgrad: R dz3 (the join's gradient), R y3 for batch norm; R y2 for mask and sums, W dz2
        + (b + b + s)  # conv3 wgrad: R dz3, R y3, R y2
        + (s + s + s + s)  # conv2 dgrad: R dz2, R y2; R y1, W dz1
        + (s + s + s)  # conv2 wgrad: R dz2, R y2, R y1
        + (
            s + s + b + b + mask + b
        )  # conv1 dgrad: R dz1, R y1; R shortcut's gradient, R last y3 for its sums, R mask, W
        + (s + s + b)  # conv1 wgrad: R dz1, R y1, R x
    )
    assert round((eager_forward + eager_backward) / 1e6, 2) == 55.39
    assert round((chain_forward + chain_backward) / 1e6, 2) == 28.30

    # this block follows another identity block; one after a projection finishes two batch norms' gradients
    found = of_network("resnet50")
    expected = {"eager": (eager_forward, eager_backward), "chain": (chain_forward, chain_backward)}
    for scheme, (forward, backward) in expected.items():
        block = [phases for name, phases in found.layers(scheme).items() if name.startswith("layer1.2.")]
        assert sum(phases["forward"][1] for phases in block if "forward" in phases) == forward
        assert sum(phases["backward"][1] for phases in block if "backward" in phases) == backward


class Block(nn.Module):
    """conv - function of its output, once each."""

    def __init__(self, function, **options):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, **options)
        self.bn = nn.BatchNorm2d(8)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def bytes_of(model, scheme, op=None, phase="forward"):
    """Bytes in units of an 8x16x16 bf16 tensor."""
    kernels = ledger.kernels(trace(model, (2, 8, 16, 16)), scheme, 2, 2, 256)
    return sum(k.bytes for k in kernels if k.call and op in (None, k.call.op) and k.phase == phase) / (8 * 16 * 16 * 2)


def test_a_bias_and_an_activation_join_their_convolution():
    model = Block(lambda m, x: F.relu(m.conv(x)), bias=True)
    assert bytes_of(model, "eager") == 2 + 2 + 2  # conv, bias, relu
    assert bytes_of(model, "fused") == 2
    assert bytes_of(model, "chain") == 2 + 1 / 16  # a mask
    # the image needs no gradient: wgrad; bias; relu
    assert bytes_of(model, "eager", phase="backward") == 2 + 1 + 3
    assert bytes_of(model, "fused", phase="backward") == 2 + 3


def test_in_place_activations_other_than_relu_are_cloned():
    for activation, expected in ((F.relu, 2), (F.silu, 4), (F.relu6, 4)):
        model = Block(lambda m, x, f=activation: f(m.bn(m.conv(x)), inplace=True), bias=False)
        op = activation.__name__
        assert bytes_of(model, "eager", op) == expected
        assert bytes_of(model, "fused", op) == bytes_of(model, "chain", op) == 0


def test_squeeze_and_excite():
    def forward(module, x):
        x = module.bn(module.conv(x))
        return module.conv(x * F.adaptive_avg_pool2d(x, 1).sigmoid())

    vector = 1 / 256
    model = Block(forward, bias=False)
    assert bytes_of(model, "eager", "mul") == pytest.approx(2 + vector)
    # backward of the product: R dy R gate W dx; R dy R x W and again R a product, W its sum; the fork
    assert bytes_of(model, "eager", "mul", "backward") == pytest.approx((2 + vector) + (3 + 1 + vector) + 3)
    assert bytes_of(model, "chain", "mul") == 0
    # the second conv: dgrad R dz, R x raw for the gate's gradient, W; wgrad R dz, R x raw. The first: R dz, R y, R x
    assert bytes_of(model, "chain", "conv2d", "backward") == pytest.approx((3 + 2) + 3, abs=2 * vector)
    # one pass of 2R for batch norm's sums
    assert bytes_of(model, "chain", "adaptive_avg_pool2d", "backward") == pytest.approx(2 + vector)


def test_depthwise_backward_is_one_kernel_in_the_chain():
    def forward(module, x):
        return module.conv(module.bn(module.depthwise(module.bn(module.conv(x)))))

    model = Block(forward, bias=False)
    model.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    calls = trace(model, (2, 8, 16, 16))
    for scheme, expected in (("eager", [2, 2]), ("chain", [4])):  # chain: R dz, R y, R x, W dx
        kernels = ledger.kernels(calls, scheme, 2, 2, 256)
        found = [k for k in kernels if k.family == "depthwise" and k.phase == "backward"]
        assert [k.bytes / (8 * 16 * 16 * 2) for k in found] == expected
        assert sum(k.flops for k in found) == 2 * 2 * 8 * 16 * 16 * 9
        assert not any(k.on_tensor_cores for k in found)


def test_any_network_has_a_ledger():
    # no batch norm, layer norm, attention-like products: counted pass by pass
    found = roofline(networks.build("timm:convnext_atto"), (3, 64, 64), batch=8, gpu="a100-sxm", dtype=torch.float32)
    assert found.tflops == 156 and found.tbs == 2.039
    assert found.megabytes("chain") < found.megabytes("eager")
    parameters = sum(p.numel() for p in networks.build("timm:convnext_atto").parameters())
    assert found.megabytes("eager", "optimizer") == pytest.approx(32 * parameters / 8 / 1e6)


def test_time_is_the_slower_of_arithmetic_and_memory():
    found = roofline(nn.Conv2d(8, 8, 3, padding=1, bias=False), (8, 16, 16), batch=4, ceilings=(1.0, 1.0))
    size, flops = 8 * 16 * 16 * 2, 2 * 8 * 8 * 9 * 16 * 16
    # forward and wgrad: arithmetic; the optimizer: 32 bytes for each of 576 weights
    assert found.images_per_second("eager") == pytest.approx(1e12 / (2 * max(flops, 2 * size) + 576 * 32 / 4))
    fast = roofline(nn.Conv2d(8, 8, 3, padding=1, bias=False), (8, 16, 16), batch=4, ceilings=(1e6, 1.0))
    assert fast.images_per_second("eager") == pytest.approx(1e12 / (2 * 2 * size + 576 * 32 / 4))
    gaps = 3 * 1.5e-6 / 4
    real = 2 * max(flops / 0.65, 2 * size / 0.9) + 576 * 32 / 4 / 0.9
    assert found.images_per_second("eager", real=True) == pytest.approx(1 / (real / 1e12 + gaps))
    assert found.step_ms("eager") == pytest.approx(4e3 / found.images_per_second("eager"))


def test_table_sums_to_the_step():
    found = of_network("resnet50")
    lines = found.table().splitlines()
    for group in (
        ("112 x 112", "56 x 56", "28 x 28", "14 x 14", "7 x 7", "vectors", "optimizer"),
        ("conv, linear", "norm"),
    ):
        assert all(any(line.startswith(name) for line in lines) for name in group)
    rows = [line[24:].split() for line in lines if line.startswith(("112 x", "56 x", "28 x", "14 x", "7 x", "vectors"))]
    rows += [next(line for line in lines if line.startswith("optimizer"))[24:].split()]
    assert sum(float(row[0]) for row in rows) == pytest.approx(found.megabytes("eager"), abs=0.05)
    assert sum(float(row[5]) for row in rows) == pytest.approx(1e6 / found.images_per_second("chain"), abs=0.05)
    assert "11,285" in found.table() and "5,931" in found.table()


def result_row(**changes):
    row = {"op": "conv2d", "case": "lenet5.conv1", "provider": "fastcnn", "pass": "forward", "graph": False}
    row |= {"dtype": "float32", "layout": "contiguous", "batch": 32, "status": "ok", "ms": 0.5}
    row |= {"flops": 10**8, "bytes": 10**6, "copy_gbs": 20.0, "matmul_tflops": 0.1}
    row |= {"device": "Some CPU", "device_type": "cpu", "date": "2026-01-01T00:00:00Z"}
    return row | changes


def test_command_prints_draws_and_measures(tmp_path, capsys):
    rows = [
        result_row(),
        result_row(provider="torch", ms=0.7),
        result_row(provider="torch", **{"pass": "backward"}, ms=None, status="FAIL"),
        result_row(case="resnet50.conv1"),
        result_row(device="Older GPU", dtype="bfloat16", copy_gbs=3000.0, date="2025-01-01T00:00:00Z"),
    ]
    (tmp_path / "some-cpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = tmp_path / "roof.png"
    assert command("lenet5", batch=8, results_folder=tmp_path, measured=True, out=picture) == picture
    printed = capsys.readouterr().out
    assert "lenet5, 1x32x32, float32, batch 8" in printed
    assert "Some CPU, measured ceilings: 0.1 TFLOP/s, 0.02 TB/s" in printed
    assert f"2 measured points; picture: {picture}" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_named(tmp_path):
    conv = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match="unknown gpu 'h100'"):
        roofline(conv, (3, 8, 8), gpu="h100")
    with pytest.raises(ValueError, match="batch must be a positive int, got 0"):
        roofline(conv, (3, 8, 8), batch=0)
    with pytest.raises(ValueError, match="dtype must be .* got torch.float64"):
        roofline(conv, (3, 8, 8), dtype=torch.float64)
    with pytest.raises(ValueError, match="ceilings must be two positive numbers"):
        roofline(conv, (3, 8, 8), ceilings=(0, 3))
    with pytest.raises(ValueError, match="has measured ceilings"):
        command("lenet5", results_folder=tmp_path, measured=True)


def test_every_gpu_names_its_source():
    assert list(CHIPS)[:7] == ["a100-sxm", "h100-sxm", "h100-pcie", "h200", "b200", "l40s", "rtx-4090"]
    for gpu in CHIPS.values():
        assert gpu.source.startswith("NVIDIA") and gpu.tensor_16 > gpu.tf32 >= gpu.fp32
        assert 0.5 < gpu.bandwidth < 10
