"""Counting: the lectures' own figures, PyTorch's and torchvision's counts, receptive fields seen in gradients."""

import csv
import functools
import io
import json
import math
from dataclasses import replace

import pytest
import torch
from test_trace import Functions
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastcnn.benchmarks import networks
from fastcnn.models import create_model
from fastcnn.study import summary
from fastcnn.study.receptive import fields
from fastcnn.study.trace import trace


@functools.cache
def counted(name, size=224):
    return summary(networks.build_on_meta(name), image_size=size)


# what the lecture prints beside every layer of VGG16
VGG16 = """
INPUT: [224x224x3] memory: 224*224*3=150K params: 0
CONV3-64: [224x224x64] memory: 224*224*64=3.2M params: (3*3*3)*64 = 1,728
CONV3-64: [224x224x64] memory: 224*224*64=3.2M params: (3*3*64)*64 = 36,864
POOL2: [112x112x64] memory: 112*112*64=800K params: 0
CONV3-128: [112x112x128] memory: 112*112*128=1.6M params: (3*3*64)*128 = 73,728
CONV3-128: [112x112x128] memory: 112*112*128=1.6M params: (3*3*128)*128 = 147,456
POOL2: [56x56x128] memory: 56*56*128=400K params: 0
CONV3-256: [56x56x256] memory: 56*56*256=800K params: (3*3*128)*256 = 294,912
CONV3-256: [56x56x256] memory: 56*56*256=800K params: (3*3*256)*256 = 589,824
CONV3-256: [56x56x256] memory: 56*56*256=800K params: (3*3*256)*256 = 589,824
POOL2: [28x28x256] memory: 28*28*256=200K params: 0
CONV3-512: [28x28x512] memory: 28*28*512=400K params: (3*3*256)*512 = 1,179,648
CONV3-512: [28x28x512] memory: 28*28*512=400K params: (3*3*512)*512 = 2,359,296
CONV3-512: [28x28x512] memory: 28*28*512=400K params: (3*3*512)*512 = 2,359,296
POOL2: [14x14x512] memory: 14*14*512=100K params: 0
CONV3-512: [14x14x512] memory: 14*14*512=100K params: (3*3*512)*512 = 2,359,296
CONV3-512: [14x14x512] memory: 14*14*512=100K params: (3*3*512)*512 = 2,359,296
CONV3-512: [14x14x512] memory: 14*14*512=100K params: (3*3*512)*512 = 2,359,296
POOL2: [7x7x512] memory: 7*7*512=25K params: 0
FC: [4096] memory: 4096 params: 7*7*512*4096 = 102,760,448
FC: [4096] memory: 4096 params: 4096*4096 = 16,777,216
FC: [1000] memory: 1000 params: 4096*1000 = 4,096,000
"""


def test_the_lectures_table_of_vgg16():
    found = counted("torchvision:vgg16")
    lines = VGG16.split("\n")[1:-1]
    for row, line in zip(found.rows, lines, strict=True):
        layer, _, rest = line.partition(": [")
        output, _, rest = rest.partition("] memory: ")
        memory, _, weights = rest.partition(" params: ")
        assert "x".join(map(str, row.output)) == output, line
        assert row.activations == math.prod(map(int, memory.partition("=")[0].split("*"))), line
        assert row.weights == int(weights.rpartition("= ")[2].replace(",", "")), line
        kinds = {"CONV3": f"conv 3x3, {row.output[-1]}", "POOL2": "max pool 2x2/2", "FC": f"linear, {row.output[-1]}"}
        assert row.kind.startswith(kinds.get(layer.partition("-")[0], "")), line
    assert round(found.parameters / 1e6) == 138
    # the lecture says 24M numbers and 96 MB; its own lines, which are ours, add up to 15.2M and 61 MB
    assert found.activations == sum(row.activations for row in found.rows) == 15_237_608
    assert "15,237,608 numbers of an image: 61.0 MB forward, 121.9 MB with backward" in str(found)


def test_the_lectures_first_layer_of_alexnet():
    alexnet = nn.Sequential(nn.Conv2d(3, 96, 11, 4), nn.ReLU(), nn.MaxPool2d(3, 2), nn.LocalResponseNorm(5))
    row, pool = summary(alexnet, (3, 227, 227)).rows[1:]
    assert row.output == (55, 55, 96) and pool.output == (27, 27, 96)
    assert row.weights == 11 * 11 * 3 * 96 == 34_848
    assert row.field == (11, 11) and row.jump == (4, 4) and pool.field == (19, 19) and pool.jump == (8, 8)


def _inception(inputs, ones=None):
    """The lecture's module at 28 x 28 x 256; with ones, 1x1 convolutions of so many outputs before and after."""
    conv = lambda c, k, n: nn.Conv2d(c, k, n, padding=n // 2)
    before = lambda *layer: nn.Sequential(*([conv(inputs, ones, 1)] if ones else []), *layer)
    wide = ones or inputs
    return Functions(
        lambda self, x: torch.cat([child(x) for child in self.children()], 1),
        one=conv(inputs, 128, 1),
        three=before(conv(wide, 192, 3)),
        five=before(conv(wide, 96, 5)),
        pool=nn.Sequential(nn.MaxPool2d(3, 1, 1), *([conv(inputs, ones, 1)] if ones else [])),
    )


def test_the_lectures_inception_modules():
    naive, reduced = (summary(_inception(256, ones), (256, 28, 28)) for ones in (None, 64))
    assert naive.rows[-1].output == (28, 28, 672) and reduced.rows[-1].output == (28, 28, 480)
    assert round(naive.macs / 1e6) == 854
    # the lecture says 358M; its six lines, which are ours, are 271M, and 358M with the 3x3 convolution counted twice
    three = next(row for row in reduced.rows if row.kind == "conv 3x3, 192")
    assert round(reduced.macs / 1e6) == 271 and round((reduced.macs + three.macs) / 1e6) == 358
    assert sorted(row.macs for row in reduced.rows if row.macs) == sorted(
        28 * 28 * n for n in (64 * 256, 64 * 256, 128 * 256, 192 * 9 * 64, 96 * 25 * 64, 64 * 256)
    )
    assert naive.rows[-1].field == (5, 5)


def test_three_3x3_are_one_7x7():
    three = summary(nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(3))), (64, 32, 32))
    one = summary(nn.Conv2d(64, 64, 7, padding=3, bias=False), (64, 32, 32))
    assert [row.field for row in three.rows] == [(1, 1), (3, 3), (5, 5), (7, 7)]
    assert one.rows[-1].field == (7, 7)
    assert three.weights == 3 * 3**2 * 64**2 and one.weights == 7**2 * 64**2
    assert three.parameters == three.weights


def test_lenet5():
    found = summary(create_model("lenet5"), (1, 32, 32))
    assert found.parameters == 61_706 and found.unread == 0
    outputs = [(28, 28, 6), (14, 14, 6), (10, 10, 16), (5, 5, 16), (120,), (84,), (10,)]
    assert [row.output for row in found.rows[1:]] == outputs
    assert [row.field for row in found.rows[1:]] == [(5, 5), (6, 6), (14, 14), (16, 16), None, None, None]
    assert found.macs == 28**2 * 6 * 25 + 10**2 * 16 * 25 * 6 + 400 * 120 + 120 * 84 + 84 * 10


@pytest.mark.parametrize(
    "name",
    [
        *("torchvision:squeezenet1_1", "torchvision:googlenet"),
        *(
            pytest.param(name, marks=pytest.mark.nightly)
            for name in (
                "torchvision:densenet121",
                "torchvision:efficientnet_b0",
                "timm:seresnet50",
                "timm:resnetv2_50",
            )
        ),
    ],
)
def test_the_same_however_a_network_is_written(name):
    ours, theirs = summary(create_model(name.partition(":")[2]), image_size=224), counted(name)
    assert [replace(row, name="", kind="") for row in ours.rows] == [
        replace(row, name="", kind="") for row in theirs.rows
    ]
    assert ours.macs == theirs.macs > 0


@pytest.mark.parametrize("size, kernel, stride, padding", [(227, 11, 4, 0), (32, 5, 1, 2), (7, 3, 2, 1), (9, 2, 3, 0)])
def test_output_size_is_n_plus_2p_minus_f_over_s_plus_1(size, kernel, stride, padding):
    row = summary(nn.Conv2d(3, 8, kernel, stride, padding), (3, size, size)).rows[-1]
    assert row.output == (*[(size + 2 * padding - kernel) // stride + 1] * 2, 8)


FAMILIES = (
    *("resnet26t ecaresnet26t resnetblur50 skresnet18 res2net50_26w_4s resnest14d regnetz_b16 mixnet_s").split(),
    *("mobilenetv4_conv_small ghostnetv2_100 hrnet_w18_small dla34 dpn48b ese_vovnet19b_dw cspdarknet53").split(),
    *("xception41 nasnetalarge pnasnet5large repvgg_a0 mobileone_s0 fastvit_t8 convnextv2_atto nfnet_l0").split(),
    *("tresnet_m selecsls42b rexnet_100 poolformer_s12 botnet26t_256 halonet26t swin_tiny_patch4_window7_224").split(),
)


@pytest.mark.parametrize(
    "name",
    [
        *("resnet50", "mobilenet_v2", "timm:convnext_atto"),
        *(pytest.param(f"timm:{name}", marks=pytest.mark.nightly) for name in FAMILIES),
    ],
)
def test_multiply_adds_are_half_of_pytorch_s_flops(name):
    model = networks.build_on_meta(name).to("meta").eval()
    shape = networks.input_shape(name) if name.startswith("timm:") else (3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *shape, device="meta"))
    assert 2 * summary(model, shape).macs == counter.get_total_flops()


# torchvision's figures of these, and nightly of the others
PUBLISHED = (
    *("alexnet convnext_tiny googlenet inception_v3 mnasnet1_0 mobilenet_v3_small resnet18 shufflenet_v2_x1_0").split(),
    *("squeezenet1_1 vgg13_bn").split(),
)
NIGHTLY = (
    *("densenet121 efficientnet_b4 regnet_y_400mf convnext_base convnext_large convnext_small densenet161").split(),
    *("densenet169 densenet201 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3").split(),
    *("efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_l efficientnet_v2_m").split(),
    *("efficientnet_v2_s maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_3 mobilenet_v2 mobilenet_v3_large").split(),
    *("regnet_x_400mf regnet_x_8gf regnet_y_8gf resnet34 resnet50 resnet101 resnet152 resnext50_32x4d").split(),
    *("resnext101_32x8d resnext101_64x4d shufflenet_v2_x0_5 shufflenet_v2_x2_0 squeezenet1_0 vgg11 vgg13").split(),
    *("vgg16 vgg19 vgg11_bn vgg16_bn vgg19_bn wide_resnet50_2 wide_resnet101_2").split(),
)


@pytest.mark.parametrize("name", [*PUBLISHED, *(pytest.param(n, marks=pytest.mark.nightly) for n in NIGHTLY)])
def test_torchvision_publishes_the_same(name):
    weights = networks.import_torchvision().models.get_model_weights(name).DEFAULT
    found = counted(f"torchvision:{name}", weights.transforms().crop_size[0])
    assert round(found.macs / 1e9, 3) == weights.meta["_ops"]
    # GoogLeNet's figure is without auxiliary classifiers, Inception's with them
    assert weights.meta["num_params"] in (found.parameters, found.parameters - found.unread)


# Araujo et al. 2019, table 1: of the last feature map
PUBLISHED_FIELDS = {
    "torchvision:alexnet": (224, 195), "torchvision:vgg11": (224, 150), "torchvision:vgg16": (224, 212),
    "torchvision:inception_v3": (299, 1311), "timm:inception_v4": (299, 2071), "timm:inception_resnet_v2": (299, 3039),
    "timm:mobilenetv1_100": (224, 315),
}  # fmt: skip


def last_field(found):
    return [row.field for row in found.rows if any(row.jump)][-1]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.nightly] * n.startswith("timm:inc")) for n in PUBLISHED_FIELDS]
)
def test_published_receptive_fields(name):
    size, field = PUBLISHED_FIELDS[name]
    assert last_field(counted(name, size)) == (field, field)


@pytest.mark.parametrize("name, field", [("resnet50", 483), pytest.param("resnet152", 1507, marks=pytest.mark.nightly)])
def test_published_receptive_fields_of_resnets(name, field):
    # that table's ResNets halve the image in a stage's last block, torchvision's in its first
    model = networks.build_on_meta(f"torchvision:{name}")
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv2.stride = stage[0].downsample[0].stride = (1, 1)
    for stage in (model.layer1, model.layer2, model.layer3):
        stage[-1].conv2.stride, stage[-1].downsample = (2, 2), nn.MaxPool2d(1, 2)
    assert last_field(summary(model, image_size=224)) == (field, field)


SEEN = {
    "strides": nn.Sequential(nn.Conv2d(2, 2, (3, 5), (2, 1), (1, 0)), nn.AvgPool2d(2), nn.Conv2d(2, 2, 3, dilation=2)),
    "even": nn.Sequential(nn.Conv2d(2, 2, 4, 2, 1), nn.Conv2d(2, 2, 2, padding="same"), nn.AvgPool2d(3, 2, 1)),
    "branches": Functions(
        lambda m, x: torch.cat([m.a(x), F.avg_pool2d(m.b(x), 3, 2, 1)], 1),
        a=nn.Conv2d(2, 3, 4, 2, 1),
        b=nn.Sequential(nn.ZeroPad2d((2, 0, 0, 3)), nn.Conv2d(2, 3, (4, 3))),
    ),
    "shortcut": Functions(lambda m, x: m.b(m.a(x)) + x[:, :1], a=nn.Conv2d(2, 2, 3, 1, 1), b=nn.Conv2d(2, 1, 3, 1, 1)),
    "slices": Functions(lambda m, x: m.a(x[:, :, 1::2, 2:-3]) + m.a(x[..., ::2, 5:]), a=nn.Conv2d(2, 2, 3)),
    "views": Functions(
        lambda m, x: m.b(m.a(x).unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2))[:, None].squeeze(1),
        a=nn.Conv2d(2, 4, 3), b=nn.Conv2d(4, 2, 3, 2),
    ),
    "chunks": Functions(lambda m, x: torch.cat([m.a(x[:, :1]), x.chunk(2, 1)[1]], 1), a=nn.Conv2d(1, 1, 3, 1, 1)),
    "nhwc": Functions(
        lambda m, x: m.b(m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), a=nn.Linear(2, 3), b=nn.Conv2d(3, 2, 3, 2)
    ),
    "space to depth": Functions(
        lambda m, x: m.a(x.view(1, 2, 7, 4, 14, 2).permute(0, 3, 5, 1, 2, 4).reshape(1, 16, 7, 14)),
        a=nn.Conv2d(16, 2, 3),
    ),
    "unshuffled": nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(8, 2, 3)),
}  # fmt: skip
NEVER_LESS = {
    "transposed": nn.Sequential(nn.Conv2d(2, 2, 3, 2), nn.ConvTranspose2d(2, 2, 4, 2, 1), nn.Conv2d(2, 2, 3)),
    "upsampled": nn.Sequential(nn.Conv2d(2, 2, 3, 2), nn.Upsample(scale_factor=2), nn.Conv2d(2, 2, 3)),
    "bilinear": nn.Sequential(nn.Upsample(scale_factor=1.5, mode="bilinear"), nn.Conv2d(2, 2, 3)),
    "corners": nn.Sequential(nn.Upsample(size=37, mode="bilinear", align_corners=True), nn.Conv2d(2, 2, 3)),
    "bicubic": nn.Sequential(nn.Conv2d(2, 2, 3), nn.Upsample(size=17, mode="bicubic")),
    "nearest": nn.Sequential(nn.Conv2d(2, 2, 3), nn.Upsample(size=11), nn.Conv2d(2, 2, 2)),
    "fractional": nn.Sequential(nn.FractionalMaxPool2d(3, 11), nn.Conv2d(2, 2, 3)),
    "shuffled": nn.Sequential(nn.Conv2d(2, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 2, 3)),
    "adaptive": nn.Sequential(nn.Conv2d(2, 2, 3), nn.AdaptiveAvgPool2d(7)),
    "gate": Functions(lambda m, x: x * m.a(x).mean((2, 3), keepdim=True), a=nn.Conv2d(2, 2, 3)),
    "halves": Functions(lambda m, x: m.a(x).chunk(2, 2)[1], a=nn.Conv2d(2, 2, 3)),
}


def seen_by(model, image):
    """(row of the output, rows of the image that it depends on), and of columns, by gradients of positive weights."""
    for p in model.parameters():
        p.data.fill_(0.1)
    found = []
    output = model(image.requires_grad_()).sum((0, 1))
    for axis in (0, 1):
        for i in range(output.shape[axis]):
            (gradient,) = torch.autograd.grad(output.select(axis, i).sum(), image, retain_graph=True)
            touched = gradient.abs().sum((0, 1)).sum(1 - axis).nonzero().flatten()
            found.append((axis, i, int(touched.min()), int(touched.max())))
    return found


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", [*SEEN, *NEVER_LESS])
def test_receptive_fields_are_where_gradients_go(name):
    model, size = (SEEN | NEVER_LESS)[name], 28
    calls = trace(model, (1, 2, size, size))
    axes = fields(calls, (1, 2, size, size))[calls[-1].outputs[-1]]
    for axis, i, low, high in seen_by(model, torch.rand(1, 2, size, size)):
        field = axes[axis]
        first, last = field.first + i * field.jump, field.last + i * field.jump
        if name in SEEN:
            assert (max(first, 0), min(last, size - 1)) == (low, high), (axis, i)
        assert math.floor(first) <= low and high <= math.ceil(last), (axis, i)


def test_what_sees_the_whole_image():
    model = Functions(
        lambda m, x: m.conv(x * torch.sigmoid(m.fc(x.mean((2, 3))))[:, :, None, None]),
        fc=nn.Linear(4, 4),
        conv=nn.Conv2d(4, 8, 3),
    )
    rows = {row.name: row for row in summary(model, (4, 16, 16)).rows}
    assert rows["mean"].field is None and rows["mul"].field is None and rows["conv"].field is None
    assert rows["conv"].jump == (0, 0) and "whole image" in str(summary(model, (4, 16, 16)))
    mixed = summary(nn.Sequential(nn.Linear(16, 9), nn.Conv2d(4, 2, 3)), (4, 12, 16)).rows
    assert [row.field for row in mixed] == [(1, 1), (1, 16), (3, 16)]
    attention = Functions(lambda m, x: (x.flatten(2) @ x.flatten(2).mT).softmax(-1) @ x.flatten(2))
    assert summary(attention, (4, 6, 6)).rows[-1].field is None


def test_rows_hold_what_can_write_over_them():
    def forward(m, x):
        a = m.bn(m.conv(x)).relu()
        b = (F.relu(a) * 2 + a).sigmoid()  # two read a: relu cannot write over it
        return torch.cat([b, x], 1).flatten(1)

    model = Functions(forward, conv=nn.Conv2d(3, 5, 3, padding=1, bias=False), bn=nn.BatchNorm2d(5))
    found = summary(model, (3, 8, 8))
    kinds = ["", "conv 3x3, 5, batch_norm, relu", "relu, mul", "add, sigmoid", "cat"]
    assert [row.kind for row in found.rows] == kinds
    assert [row.activations for row in found.rows] == [3 * 64, *[5 * 64] * 3, 8 * 64]
    assert (found.rows[1].weights, found.rows[1].parameters) == (135, 145)
    assert found.uncounted == {"relu": 2, "batch_norm": 1, "mul": 1, "add": 1, "sigmoid": 1, "cat": 1}


def test_kinds():
    model = nn.Sequential(
        nn.Conv2d(4, 8, (1, 3), (1, 2), groups=2), nn.Conv2d(8, 8, 3, groups=8, dilation=2, stride=2),
        nn.AdaptiveAvgPool2d((2, 1)), nn.ConvTranspose2d(8, 6, 2, 2), nn.AvgPool2d(2, 1),
        nn.Flatten(), nn.Linear(18, 5),
    )  # fmt: skip
    found = summary(model, (4, 32, 32))
    assert [row.kind for row in found.rows[1:]] == [
        "conv 1x3/1x2, 8 in 2 groups", "depthwise 3x3/2 dilated 2x2, 8", "avg pool to 2x1",
        "transposed conv 2x2/2, 6", "avg pool 2x2", "linear, 5",
    ]  # fmt: skip
    # no convolution of the transposed one writes more than once per input pixel and tap
    assert found.rows[4].macs == 2 * 1 * 8 * 6 * 4
    assert found.rows[1].field == (1, 3) and found.rows[1].jump == (1, 2)


def test_shared_and_unread_parameters():
    shared = nn.Linear(6, 6)
    found = summary(Functions(lambda m, x: m.a(m.a(x)), a=shared, unused=nn.Linear(3, 3)), (6,))
    assert [row.parameters for row in found.rows] == [0, 42, 0]
    assert found.parameters == 54 and found.unread == 12 and found.macs == 72
    assert "54, 0.000 MB; 12 of them not read in this pass" in str(found)
    found = counted("torchvision:googlenet")
    assert found.parameters == 13_004_888 and found.unread == 13_004_888 - 6_624_904


def test_matrix_products():
    def forward(m, x):
        left = torch.ones(5, 3) @ x  # [2, 5, 4]
        scores = torch.einsum("nij,nkj->nik", left, x)  # [2, 5, 3]
        return F.scaled_dot_product_attention(scores @ x, x, x) @ torch.ones(4, 7)

    found = summary(Functions(forward), (3, 4))
    assert found.macs == 5 * 3 * 4 + 5 * 3 * 4 + 5 * 3 * 4 + 5 * 3 * (4 + 4) + 5 * 4 * 7
    assert found.uncounted == {}


def test_by_depth():
    found = counted("torchvision:resnet18")
    grouped = found.by_depth(1)
    assert [row.name for row in grouped.rows] == [
        *("input", "conv1", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc")
    ]
    assert (grouped.macs, grouped.parameters, grouped.activations) == (found.macs, found.parameters, found.activations)
    layer4 = grouped.rows[6]
    assert (layer4.kind, layer4.output, layer4.field) == ("7 layers", (7, 7, 512), (435, 435))
    assert [row.name for row in found.by_depth(2).rows][3:5] == ["layer1.0", "layer1.1"]
    with pytest.raises(ValueError, match="depth must be a positive int, got 0"):
        found.by_depth(0)


def test_files():
    found = summary(create_model("lenet5"), (1, 32, 32), batch=8, name="lenet5")
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert len(rows) == 8 and rows[1]["output"] == "28x28x6" and int(rows[1]["macs"]) == found.rows[1].macs
    assert rows[1]["field"] == "5x5" and rows[-1]["field"] == ""
    data = json.loads(found.json())
    assert data["parameters"] == 61_706 and data["rows"][-1]["field"] is None and data["batch"] == 8
    text = str(found)
    assert text.startswith("lenet5, input 32x32x1\n") and "numbers of 8 images" in text


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give either input_shape or image_size, got None and None"),
        ({"input_shape": (3, 8, 8), "image_size": 8}, "give either"),
        ({"image_size": 0}, "input_shape must be positive ints, got (3, 0, 0)"),
        ({"input_shape": (3, 8.0, 8)}, "input_shape must be positive ints"),
        ({"image_size": 8, "batch": 0}, "batch must be positive ints, got 0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError) as error:
        summary(nn.Conv2d(3, 4, 3), **options)
    assert message in str(error.value)
