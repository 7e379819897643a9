"""The C library keeps freed memory when asked to: a step after the first takes no new pages from the system."""

import json
import subprocess
import sys

CODE = """
import json, resource, sys
import torch
from fastcnn.train.memory import keep_freed_memory

took_effect = sys.argv[1] == "keep" and keep_freed_memory()


def faults(function):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


torch.set_num_threads(1)


def steps():
    for _ in range(8):
        torch.ones(2**24) + 1  # two blocks of 64 MiB


steps()  # small blocks between the large ones may cost new ones until the heap has settled
print(json.dumps([took_effect, faults(steps)]))
"""


def faults(how):
    output = subprocess.check_output([sys.executable, "-c", CODE, how], text=True)
    return json.loads(output)


def test_freed_memory_is_kept():
    took_effect, kept = faults("keep")
    assert took_effect is sys.platform.startswith("linux")
    _, usual = faults("as usual")
    if took_effect:
        # glibc asks for pages of 4 KiB, or of 2 MiB where the system has huge ones
        assert usual >= 64 and kept < usual / 10
