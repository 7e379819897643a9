import sys

import pytest
import torch

from fastcnn.ops import huge_pages


def test_only_large_cpu_tensors_are_advised(monkeypatch):
    calls = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(huge_pages, "LEAST", 2**16)
    assert huge_pages.advise(torch.empty(2**14 - 1)) is not None and not calls
    huge_pages.advise(torch.empty(2**20, device="meta"))
    assert not calls
    tensor = torch.empty(2**16)[1:]
    assert huge_pages.advise(tensor) is tensor
    [(begin, size, advice)] = calls
    # whole pages, within the tensor
    assert begin % 4096 == 0 and begin - tensor.data_ptr() < 4096 and advice == 14
    assert begin + size == tensor.data_ptr() + tensor.numel() * 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's advice")
def test_the_system_takes_the_advice():
    tensor = torch.empty(2**23 + 3)
    begin = -(-tensor.data_ptr() // 4096) * 4096
    # 0, or EINVAL from a kernel built without huge pages
    assert huge_pages._madvise()(begin, 2**24, huge_pages.MADV_HUGEPAGE) in (0, -1)
    assert huge_pages.advise(tensor).fill_(1).sum() == tensor.numel()
