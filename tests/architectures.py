"""The networks of fastcnn.models, one line each: what tests/test_architectures.py asks of them."""

from dataclasses import dataclass


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
    """

    name: str
    parameters: int
    theirs: str | None = None
    size: int = 64
    small: dict | None = None
    lr: float = 1e-3


ROWS = [
    Row("lenet5", 61_706, size=32, small={}),
    Row("mobilenet_v1", 4_231_976, "timm:mobilenetv1_100", small={"width_mult": 0.25}),
    Row("mobilenet_v2", 3_504_872, "torchvision:mobilenet_v2", small={"width_mult": 0.25}),
    Row("mobilenet_v3_large", 5_483_032, "torchvision:mobilenet_v3_large"),
    Row("mobilenet_v3_small", 2_542_856, "torchvision:mobilenet_v3_small", small={"width_mult": 0.5}),
    Row("efficientnet_b0", 5_288_548, "torchvision:efficientnet_b0", small={}),
    Row("efficientnet_b1", 7_794_184, "torchvision:efficientnet_b1"),
    Row("efficientnet_b2", 9_109_994, "torchvision:efficientnet_b2"),
    Row("efficientnet_b3", 12_233_232, "torchvision:efficientnet_b3"),
    Row("efficientnet_b4", 19_341_616, "torchvision:efficientnet_b4"),
    Row("efficientnet_b5", 30_389_784, "torchvision:efficientnet_b5"),
    Row("efficientnet_b6", 43_040_704, "torchvision:efficientnet_b6"),
    Row("efficientnet_b7", 66_347_960, "torchvision:efficientnet_b7"),
    Row("shufflenet_v1", 1_865_728, small={}),
    Row("shufflenet_v2_x0_5", 1_366_792, "torchvision:shufflenet_v2_x0_5", small={}),
    Row("shufflenet_v2_x1_0", 2_278_604, "torchvision:shufflenet_v2_x1_0"),
    Row("shufflenet_v2_x1_5", 3_503_624, "torchvision:shufflenet_v2_x1_5"),
    Row("shufflenet_v2_x2_0", 7_393_996, "torchvision:shufflenet_v2_x2_0"),
    Row("seresnet50", 28_088_024, "timm:seresnet50", small={"layers": (1, 1, 1, 1)}),
    Row("seresnext50_32x4d", 27_559_896, "timm:seresnext50_32x4d"),
    Row("senet154", 115_088_984, "timm:senet154"),
]
