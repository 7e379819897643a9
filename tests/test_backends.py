import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastcnn
import fastcnn.functional as F
from fastcnn import backends


def test_backend_is_a_setting_and_a_context():
    assert backends.current_backend() == "auto"
    with fastcnn.backend("torch"):
        assert backends.current_backend() == "torch"
        with fastcnn.backend("cpu"):
            assert backends.current_backend() == "cpu"
        assert backends.current_backend() == "torch"
    assert backends.current_backend() == "auto"
    before = fastcnn.backend("torch")
    assert backends.current_backend() == "torch"
    before.__exit__(None, None, None)
    with pytest.raises(ValueError, match="backend must be one of auto, triton, cpu, torch, got 'cuda'"):
        fastcnn.backend("cuda")
    assert backends.current_backend() == "auto"


def test_backend_is_restored_after_an_error():
    with pytest.raises(KeyError), fastcnn.backend("torch"), fastcnn.strict():
        raise KeyError
    assert backends.current_backend() == "auto" and not backends.is_strict()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("torch", "the backend is set to torch"),
        ("triton", "Triton kernels need a CUDA tensor"),
        ("auto", "no CPU kernel of ours"),
    ],
)
def test_strict_raises_with_the_reason(name, sentence):
    with fastcnn.backend(name), fastcnn.strict(), pytest.raises(NotImplementedError, match=sentence):
        F.relu(torch.zeros(2))


def test_max_pool2d_on_cpu_is_ours_when_asked():
    with fastcnn.backend("cpu"), fastcnn.strict():
        F.max_pool2d(torch.zeros(1, 1, 4, 4), 2)
        with pytest.raises(NotImplementedError, match="float16"):
            F.max_pool2d(torch.zeros(1, 1, 4, 4, dtype=torch.float16), 2)


def gpu_tensor(index=0):
    """What `route` looks at in a tensor, for a GPU that is not there."""
    return SimpleNamespace(device=torch.device("cuda", index), is_cuda=True, dtype=torch.float32)


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "torch"), ((8, 0), "triton"), ((9, 0), "triton"), ((12, 0), "triton")]
)
def test_old_gpus_run_pytorch_and_say_so_once(monkeypatch, caplog, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(backends, "_gpu_refusals", {})
    monkeypatch.setattr(backends, "OPS", [])
    op = backends.Op("example", cpu_kernel=False, cpu_auto=False, why="none")
    with caplog.at_level(logging.WARNING, "fastcnn"):
        assert [op.route(gpu_tensor(), lambda backend: None) for _ in range(3)] == [expected] * 3
    assert len(caplog.records) == (expected == "torch")
    if expected == "torch":
        assert "example runs on PyTorch: the kernels need compute capability 8.0" in caplog.text


def test_missing_triton_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(backends, "_gpu_refusals", {})
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.gpu_refusal(torch.device("cuda", 0)) == "Triton is not installed (pip install triton)"


def test_explain_lists_every_op_and_what_ran():
    with fastcnn.backend("cpu"):
        F.max_pool2d(torch.zeros(1, 1, 4, 4), 2)
    # convolutions that ran before have a second table, below an empty line
    table, *_ = fastcnn.explain().split("\n\n")
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert {op.name for op in backends.OPS} <= set(lines)
    assert "cpu" in lines["max_pool2d"]
    assert "PyTorch" in lines["conv2d"]
    assert "oneDNN" in lines["conv2d"]


def test_env_names_versions_and_backend():
    table = fastcnn.env()
    assert torch.__version__.split("+")[0] in table
    assert fastcnn.__version__ in table
    with fastcnn.backend("torch"), fastcnn.strict():
        assert "torch, strict" in fastcnn.env()


@pytest.mark.parametrize(("value", "expected"), [("torch", "torch\n"), ("gpu", "FASTCNN_BACKEND must be one of")])
def test_environment_variable_is_the_default(value, expected):
    code = "import fastcnn.backends as b\ntry: print(b.current_backend())\nexcept ValueError as e: print(e)"
    environment = {**os.environ, "FASTCNN_BACKEND": value}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert expected in result.stdout


def test_torch_first_counts_and_gives_way(monkeypatch):
    """CPU tensors reach PyTorch's function at once; what it refuses, what is large and every other setting do not."""
    monkeypatch.setattr(backends, "OPS", [])
    op = backends.Op("example", cpu_kernel=True, cpu_auto=True, why="none")

    def torchs(input, p=0.5):
        if p > 1:
            raise RuntimeError("a poor sentence")
        return "torch"

    @op.torch_first(torchs, below=10)
    def example(input, p=0.5):
        """An example."""
        if p > 1:
            raise ValueError(f"p must be at most 1, got {p}")
        return op.route(input, lambda backend: None)

    x = torch.zeros(3)
    assert example.__name__ == "example" and example.__doc__ == "An example."
    assert example(x) == example(input=x, p=0.1) == "torch"
    assert op.calls == {("torch", "PyTorch is faster on CPU below 10 elements"): 2}
    assert example(torch.zeros(10)) == "cpu"
    with pytest.raises(ValueError, match="p must be at most 1, got 2") as caught:
        example(x, 2)
    assert caught.value.__context__ is None
    with pytest.raises(TypeError, match="example.* missing 1 required positional argument: 'input'"):
        example()
    with fastcnn.backend("cpu"):
        assert example(x) == "cpu"
        with fastcnn.strict():
            assert example(x) == "cpu"
    with fastcnn.strict():
        assert example(x) == "cpu"
    assert example(x) == "torch"
    monkeypatch.setattr(backends._state, "interpret", True)
    monkeypatch.setattr(backends._state, "plain_auto", None)
    assert example(x) == "triton"
