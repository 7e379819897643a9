"""What users install: the wheel and the sdist hold what they must; importing fastcnn is cheap and leaves no traces."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command, cwd, path=None):
    """Run a command in another folder, with nothing but `path` on PYTHONPATH; its output."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    process = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, f"{' '.join(map(str, command))}\n{process.stdout}\n{process.stderr}"
    return process.stdout


def python(code, tmp_path, path=ROOT):
    return run(sys.executable, "-c", code, cwd=tmp_path, path=path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with a wheel and an sdist, built from a copy of the tracked files plus two CUDA sources."""
    pytest.importorskip("build")
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to tell sources from leftovers")
    copy = tmp_path_factory.mktemp("source")
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    (copy / "kernels/cuda").mkdir(exist_ok=True)
    for name in ("dummy.cu", "dummy.cuh"):
        (copy / "kernels/cuda" / name).write_text("// nothing\n")
    run(sys.executable, "-m", "build", "--no-isolation", ".", cwd=copy)
    return copy / "dist"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Folder into which the wheel is installed."""
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target")
    run(*pip, target, wheel, cwd=target)
    return target


def kernel_files():
    return {name for name in run("git", "ls-files", "kernels", cwd=ROOT).splitlines() if (ROOT / name).exists()}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {re.sub(r"-[\d.]+\.dist-info", "", name.split("/")[0]) for name in names} == {"fastcnn"}
    code = {name for name in kernel_files() if name.endswith((".py", ".cu", ".cuh"))}
    assert {f"fastcnn/{name}" for name in code} <= names
    assert {"fastcnn/kernels/cuda/dummy.cu", "fastcnn/kernels/cuda/dummy.cuh"} <= names
    # `fastcnn bench` works where no checkout is; results stay in the checkout
    assert {"fastcnn/benchmarks/harness.py", "fastcnn/benchmarks/shapes.json"} <= names
    assert not [name for name in names if name.startswith("fastcnn/benchmarks/results")]
    # the benchmarks' own pytest file travels with them
    assert {name for name in names if "test_" in name} == {"fastcnn/benchmarks/test_benchmarks.py"}
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_sdist_holds_kernels_and_tests(built):
    (sdist,) = built.glob("*.tar.gz")
    names = {name.split("/", 1)[-1] for name in tarfile.open(sdist).getnames()}
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "tests/conftest.py", "tests/aot.py"}
    wanted |= {"benchmarks/harness.py", "benchmarks/shapes.json", "benchmarks/results/aot/conv2d.tsv"}
    assert wanted | kernel_files() | {"kernels/cuda/dummy.cu"} <= names


def test_the_installed_wheel_imports_from_anywhere(installed, tmp_path):
    modules = [f"fastcnn.{name[:-3].replace('/', '.')}" for name in kernel_files() if name.endswith(".py")]
    code = f"""
import importlib, fastcnn
assert fastcnn.__file__.startswith({str(installed)!r}), fastcnn.__file__
import fastcnn.functional, fastcnn.nn, fastcnn.optim, fastcnn.models
for name in {modules}:
    module = importlib.import_module(name)
    assert module.__file__.startswith({str(installed)!r}), module.__file__
"""
    code += """
from fastcnn.benchmarks import cases
assert all(cases.bench(op).CASES for op in cases.OPS)
"""
    python(code, tmp_path, installed)
    assert not (installed / "kernels").exists() and not (installed / "benchmarks").exists()


def test_the_command_is_installed(installed, tmp_path):
    assert "usage: fastcnn" in run(sys.executable, installed / "bin/fastcnn", "--help", cwd=tmp_path, path=installed)


def test_the_checkout_finds_its_kernels(tmp_path):
    code = "from fastcnn.kernels.triton import activation; print(activation.__file__)"
    assert python(code, tmp_path).strip() == str(ROOT / "kernels/triton/activation.py")


def test_importing_fastcnn_leaves_no_traces(tmp_path):
    python(
        """
import os, sys, torch

def state():
    return (torch.nn.Conv2d, torch.nn.functional.conv2d, torch.relu, torch.get_default_dtype(), torch.get_num_threads(),
            torch.is_grad_enabled(), torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark,
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
            torch.are_deterministic_algorithms_enabled(), torch.initial_seed())

read = []
def recording(original):
    def lookup(self, key):
        if "fastcnn" in sys._getframe(1).f_code.co_filename or "fastcnn" in sys._getframe(2).f_code.co_filename:
            read.append(key)
        return original(self, key)
    return lookup

os._Environ.__getitem__ = recording(os._Environ.__getitem__)
os._Environ.__contains__ = recording(os._Environ.__contains__)
before, loaded = state(), set(sys.modules)
import fastcnn
assert state() == before, (before, state())
assert not read, read
assert not torch.cuda.is_initialized()
new = {name.split(".")[0] for name in set(sys.modules) - loaded}
assert not new & {"triton", "numba", "matplotlib", "torchvision", "sklearn", "jsonargparse"}, new
fastcnn.backend("auto")
assert read == ["FASTCNN_BACKEND"], read
""",
        tmp_path,
    )


def test_importing_fastcnn_costs_little_more_than_torch(tmp_path):
    def ratio():
        command = [sys.executable, "-X", "importtime", "-c", "import fastcnn"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        lines = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True).stderr
        cumulative = dict((name, int(us)) for us, name in re.findall(r"\|\s*(\d+) \|\s+(torch|fastcnn)$", lines, re.M))
        return cumulative["fastcnn"] / cumulative["torch"]

    # another process may steal time from one run, hardly from all
    assert min(ratio() for _ in range(3)) < 1.5


def test_without_triton_pytorch_runs(tmp_path):
    output = python(
        """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import torch, fastcnn, fastcnn.nn, fastcnn.functional as F
x = torch.randn(2, 8, 8, 8, requires_grad=True)
model = torch.nn.Sequential(fastcnn.nn.Conv2d(8, 4, 3), fastcnn.nn.BatchNorm2d(4), fastcnn.nn.ReLU())
F.relu(model(x)).sum().backward()
optimizer = fastcnn.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
optimizer.step()
assert x.grad is not None
print(fastcnn.explain(), fastcnn.env(), sep="\\n")
with fastcnn.backend("triton"):
    F.relu(x)
assert "triton" not in sys.modules
""",
        tmp_path,
    )
    assert "relu" in output and "torch" in output
