"""fastcnn: hand-written kernels for training convolutional networks in PyTorch. See README.md."""

from fastcnn.backends import backend, env, explain, strict

__version__ = "0.1.0"
SUBMODULES = ("compression", "data", "functional", "models", "nn", "optim", "study", "testing", "train")
__all__ = ["backend", "convert", "env", "explain", "graphed_step", "revert", "strict", "verify", *SUBMODULES]


def __getattr__(name):
    # submodules on first use, so that importing fastcnn costs little more than importing torch
    if name in SUBMODULES:
        import importlib

        return importlib.import_module(f"fastcnn.{name}")
    if name == "graphed_step":
        from fastcnn.graphs import graphed_step

        return graphed_step
    if name in ("convert", "revert", "verify"):
        from fastcnn import conversion

        return getattr(conversion, name)
    raise AttributeError(f"module 'fastcnn' has no attribute {name!r}")
