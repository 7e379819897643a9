"""Lanes. A test that asks for `lane` runs on every lane its module serves (LANES, default both kernels):

* cpu        our CPU kernels (module's LANES contains "cpu")
* interpret  the Triton kernels in Triton's interpreter: a process of its own, TRITON_INTERPRET=1 pytest -m interpret
* gpu        the Triton kernels compiled, on a GPU: pytest -m gpu

Every lane is strict: an op that falls back to PyTorch fails its test.
"""

import os
from types import SimpleNamespace

import pytest
import torch

import fastcnn

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRET:
    import interpreter_repairs  # noqa: F401  (before any kernel is defined)


def pytest_generate_tests(metafunc):
    if "lane" in metafunc.fixturenames:
        served = getattr(metafunc.module, "LANES", ("triton",))
        if INTERPRET:
            lanes = [pytest.param("interpret", marks=pytest.mark.interpret)] if "triton" in served else []
        else:
            lanes = [pytest.param("cpu")] if "cpu" in served else []
            lanes += [pytest.param("gpu", marks=pytest.mark.gpu)] if "triton" in served else []
        metafunc.parametrize("lane", lanes, indirect=True)


@pytest.fixture
def lane(request):
    """.device to put tensors on; .name; strict mode is on and the lane's backend chosen."""
    name = request.param
    with fastcnn.backend("cpu" if name == "cpu" else "triton"), fastcnn.strict():
        yield SimpleNamespace(name=name, device=torch.device("cuda" if name == "gpu" else "cpu"))


@pytest.fixture(autouse=True, scope="session")
def settable_flags():
    # torch.testing._internal, once imported, forbids setting backend flags; the trainer does what users may do
    with torch.backends.__allow_nonbracketed_mutation():
        yield


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)
    # one thread per worker: two workers share two cores
    torch.set_num_threads(1)
    # torch.empty now returns NaN: an output our kernels forget to write shows
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
