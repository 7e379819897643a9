"""The networks of fastcnn.models, one line each: what tests/test_architectures.py asks of them."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Row:
    """One name of `list_models()`.

    Attributes:
        name: of the network.
        parameters: their exact number, with the network's own num_classes and in_chans, after a paper, a library or
            an arithmetic of one's own.
        theirs: the same network of another library, "torchvision:NAME" or "timm:NAME"; None where there is none.
        size: height and width of the images it is tested on.
        small: options that make it small, for the tests of what every family can (train, convert, compile, export, give
            features); None where another row stands for the family. {} if it is small enough.
        lr: learning rate with which it learns the synthetic images.
        whole: height and width of the images for the whole network, where they must be larger than for the small one.
    """

    name: str
    parameters: int
    theirs: str | None = None
    size: int = 64
    small: dict | None = None
    lr: float = 1e-3
    whole: int | None = None


# kernel, expanded channels, outputs, squeeze-excite, activation, stride; every kind of block of MobileNet v3
V3_BLOCKS = (
    (3, 16, 16, True, nn.ReLU, 2), (3, 32, 16, False, nn.ReLU, 1), (5, 40, 24, True, nn.Hardswish, 2),
    (5, 64, 24, True, nn.Hardswish, 1),
)  # fmt: skip

ROWS = [
    Row("mlp", 397_510, size=28, small={}),
    Row("lenet5", 61_706, size=32, small={}),
    Row("alexnet", 61_100_840, "torchvision:alexnet", small={"width_mult": 0.125}),
    Row("alexnet_lrn", 62_378_344, size=67),
    Row("alexnet_towers", 60_965_224, size=67, small={"width_mult": 0.125, "bias": 0.0}),
    Row(
        "overfeat",
        145_920_872,
        size=103,
        lr=3e-3,
        small={"widths": (8, 8, 8, 8, 8), "hidden": (16, 16), "image_size": 103, "std": 0.1},
    ),  # fmt: skip
    Row("overfeat_accurate", 144_656_488),
    Row("zfnet", 107_627_624, small={"width_mult": 0.125}),
    Row("vgg11", 132_863_336, "torchvision:vgg11", small={"width_mult": 0.125}),
    Row("vgg13", 133_047_848, "torchvision:vgg13"),
    Row("vgg16", 138_357_544, "torchvision:vgg16"),
    Row("vgg19", 143_667_240, "torchvision:vgg19"),
    Row("vgg11_bn", 132_868_840, "torchvision:vgg11_bn", small={"width_mult": 0.125}),
    Row("vgg13_bn", 133_053_736, "torchvision:vgg13_bn"),
    Row("vgg16_bn", 138_365_992, "torchvision:vgg16_bn"),
    Row("vgg19_bn", 143_678_248, "torchvision:vgg19_bn"),
    Row("nin", 7_595_176),
    Row("nin_cifar", 966_986, size=16, small={}, lr=1e-4),
    Row("squeezenet1_0", 1_248_424, "torchvision:squeezenet1_0"),
    Row("squeezenet1_1", 1_235_496, "torchvision:squeezenet1_1", size=32, small={}, lr=3e-4),
    Row("resnet18", 11_689_512, "torchvision:resnet18", size=33, small={"layers": (1, 1, 1, 1)}),
    Row("resnet34", 21_797_672, "torchvision:resnet34"),
    Row("resnet50", 25_557_032, "torchvision:resnet50"),
    Row("resnet101", 44_549_160, "torchvision:resnet101"),
    Row("resnet152", 60_192_808, "torchvision:resnet152"),
    Row("resnet200", 64_673_832, "timm:resnet200"),
    Row("resnext50_32x4d", 25_028_904, "torchvision:resnext50_32x4d"),
    Row("resnext101_32x8d", 88_791_336, "torchvision:resnext101_32x8d"),
    Row("resnext101_64x4d", 83_455_272, "torchvision:resnext101_64x4d"),
    Row("wide_resnet50_2", 68_883_240, "torchvision:wide_resnet50_2"),
    Row("wide_resnet101_2", 126_886_696, "torchvision:wide_resnet101_2"),
    Row("plain20_cifar", 269_722, size=32),
    Row("plain32_cifar", 464_154, size=32),
    Row("plain44_cifar", 658_586, size=32),
    Row("plain56_cifar", 853_018, size=32),
    Row("resnet20_cifar", 269_722, size=16, small={"layers": (1, 1, 1)}),
    Row("resnet32_cifar", 464_154, size=32),
    Row("resnet44_cifar", 658_586, size=32),
    Row("resnet56_cifar", 853_018, size=32),
    Row("resnet110_cifar", 1_727_962, size=32),
    Row("resnet110_stodepth_cifar", 1_727_962, size=16, small={"layers": (1, 1, 1)}),
    Row("resnet1202_cifar", 19_421_274, size=32),
    Row("resnext29_8x64d_cifar", 34_426_698, size=32),
    Row("resnext29_16x64d_cifar", 68_155_210, size=32),
    Row("resnetv2_50", 25_549_352, "timm:resnetv2_50"),
    Row("preact_resnet110_cifar", 1_727_962, size=16, small={"layers": (1, 1, 1)}),
    Row("preact_resnet164_cifar", 1_703_258, size=16, small={"layers": (1, 1, 1)}),
    Row("preact_resnet1001_cifar", 10_327_706, size=32),
    Row("wrn16_8_cifar", 10_961_370, size=16, small={"layers": (1, 1, 1), "widen": 2, "dropout": 0.3}),
    Row("wrn28_10_cifar", 36_479_194, size=32),
    Row("wrn40_4_cifar", 8_949_210, size=32),
    Row("googlenet", 13_004_888, "torchvision:googlenet", small={"widths": (((16, 8, 16, 8, 8, 8),),) * 3}),
    Row(
        "inception_v3",
        27_161_264,
        "torchvision:inception_v3",
        107,
        {"width_mult": 0.125, "layers": (1, 1, 1), "aux_logits": False},
        whole=299,
    ),
    Row("inception_v4", 42_679_816, "timm:inception_v4", 107, {"width_mult": 0.125, "layers": (1, 1, 1)}),
    Row("inception_resnet_v2", 55_843_464, "timm:inception_resnet_v2", 107, {"width_mult": 0.125, "layers": (1, 1, 1)}),
    Row("mobilenet_v1", 4_231_976, "timm:mobilenetv1_100", small={"width_mult": 0.25, "layers": (1,) * 5}),
    Row("mobilenet_v2", 3_504_872, "torchvision:mobilenet_v2", small={"width_mult": 0.25, "layers": (1,) * 7}),
    Row("mobilenet_v3_large", 5_483_032, "torchvision:mobilenet_v3_large"),
    Row("mobilenet_v3_small", 2_542_856, "torchvision:mobilenet_v3_small", small={"blocks": V3_BLOCKS, "last": 64}),
    Row("efficientnet_b0", 5_288_548, "torchvision:efficientnet_b0", small={"width_mult": 0.25, "depth_mult": 0.1}),
    Row("efficientnet_b1", 7_794_184, "torchvision:efficientnet_b1"),
    Row("efficientnet_b2", 9_109_994, "torchvision:efficientnet_b2"),
    Row("efficientnet_b3", 12_233_232, "torchvision:efficientnet_b3"),
    Row("efficientnet_b4", 19_341_616, "torchvision:efficientnet_b4"),
    Row("efficientnet_b5", 30_389_784, "torchvision:efficientnet_b5"),
    Row("efficientnet_b6", 43_040_704, "torchvision:efficientnet_b6"),
    Row("efficientnet_b7", 66_347_960, "torchvision:efficientnet_b7"),
    Row("shufflenet_v1", 1_865_728, small={"layers": (1, 2, 1), "width_mult": 0.5}),
    Row("shufflenet_v2_x0_5", 1_366_792, "torchvision:shufflenet_v2_x0_5", small={"layers": (1, 2, 1)}),
    Row("shufflenet_v2_x1_0", 2_278_604, "torchvision:shufflenet_v2_x1_0"),
    Row("shufflenet_v2_x1_5", 3_503_624, "torchvision:shufflenet_v2_x1_5"),
    Row("shufflenet_v2_x2_0", 7_393_996, "torchvision:shufflenet_v2_x2_0"),
    Row("seresnet50", 28_088_024, "timm:seresnet50", small={"layers": (1, 1, 1, 1), "base_width": 16}),
    Row("seresnet101", 49_326_872, "timm:seresnet101"),
    Row("seresnet152", 66_821_848, "timm:seresnet152"),
    Row("seresnext50_32x4d", 27_559_896, "timm:seresnext50_32x4d"),
    Row("seresnext101_32x4d", 48_955_416, "timm:seresnext101_32x4d"),
    Row("senet154", 115_088_984, "timm:senet154"),
    Row(
        "densenet121",
        7_978_856,
        "torchvision:densenet121",
        small={"block_config": (2, 1), "growth_rate": 8, "num_init_features": 16},
        lr=4e-3,
    ),
    Row("densenet161", 28_681_000, "torchvision:densenet161"),
    Row("densenet169", 14_149_480, "torchvision:densenet169"),
    Row("densenet201", 20_013_928, "torchvision:densenet201"),
    Row("densenet40_12_cifar", 1_019_722, size=32, small={"block_config": (2, 1)}, lr=4e-3),
    Row("densenet_bc100_12_cifar", 769_162, size=32),
    Row("densenet_bc190_40_cifar", 25_624_430, size=32),
    Row("densenet_bc250_24_cifar", 15_324_406, size=32),
    Row("fractalnet20_cifar", 33_724_618, size=16, small={"channels": (8, 12), "dropout": (0.0, 0.0)}),
    Row("fractalnet40_cifar", 19_040_714, size=32),
    Row("nasnetalarge", 88_753_150, "timm:nasnetalarge", size=67),
    Row("nasnet_mobile", 5_289_978),
    Row("nasnet_a_cifar", 3_328_234, size=16, small={"filters": 8, "cells": (0, 1), "stem_size": 8}),
]
