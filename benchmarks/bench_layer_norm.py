"""layer_norm: ConvNeXt-T over the channels of channels_last images, ViT-B's tokens, whole images, a ragged one."""

from fastcnn.benchmarks import cases
from fastcnn.benchmarks.bench_group_norm import norm_problem

CASES = [
    cases.Case("layer_norm", name, {"op": "layer_norm", "input": shape, "output": shape, "dimensions": dimensions})
    for name, shape, dimensions in (
        ("convnext_t.stage1", [56, 56, 96], 1),
        ("convnext_t.stage2", [28, 28, 192], 1),
        ("convnext_t.stage3", [14, 14, 384], 1),
        ("convnext_t.stage4", [7, 7, 768], 1),
        ("vit_b.tokens", [197, 768], 1),
        ("images.56", [64, 56, 56], 3),
        ("ragged.c17", [57, 55, 17], 1),
    )
]


def build(case, setting):
    sizes = case.layer["input"][-case.layer["dimensions"] :]
    return norm_problem(
        (setting.batch, *case.layer["input"]),
        sizes,
        setting,
        lambda api, input, weight, bias: api.functional.layer_norm(input, sizes, weight, bias),
        f", over {cases.text(sizes)}",
    )
