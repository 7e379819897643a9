"""Activations."""

from aot_cases.common import bf16, fp16, fp32, fp64, t
from fastcnn.ops import activation as act


def activation():
    for kind in ("relu", "relu6", "leaky_relu", "silu", "sigmoid", "tanh", "hardswish", "gelu", "gelu_tanh"):
        for dtype in (bf16, fp32) if kind in ("relu", "gelu") else (bf16,):
            x = t(256, 64, 56, 56, dtype=dtype)
            yield (
                f"{kind} {dtype}",
                lambda kind=kind, x=x: (
                    act.activation_forward(x, kind, 0.01, "triton"),
                    act.activation_backward(x, x, kind, 0.01, "triton"),
                ),
            )
    x = t(2048, 64, 224, 224)
    yield (
        "silu above 2^31 elements",
        lambda x=x: (
            act.activation_forward(x, "silu", 0.0, "triton"),
            act.activation_backward(x, x, "silu", 0.0, "triton"),
        ),
    )
    for dtype in (fp16, fp64):
        x = t(33, 7, 5, 3, dtype=dtype)
        yield (
            f"silu {dtype}, odd size",
            lambda x=x: (
                act.activation_forward(x, "silu", 0.0, "triton"),
                act.activation_backward(x, x, "silu", 0.0, "triton"),
            ),
        )
