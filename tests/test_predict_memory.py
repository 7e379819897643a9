"""The page of predicted memory-bound kernels: the committed one is what the machine code gives; the model by hand."""

from pathlib import Path

import pytest

from fastcnn.benchmarks import predict_memory
from fastcnn.benchmarks.predict_memory import KERNELS, SLIDING, Kernel, bytes_of, compiled, limits, wide

RESULTS = Path(__file__).parent.parent / "benchmarks/results"
LINE = {"loads": "2 x128", "stores": "1 x128", "registers": "32", "resident": "64", "instructions": "100"}


def test_the_committed_page_is_the_model_s():
    committed = (RESULTS / predict_memory.PAGE).read_text()
    assert committed == predict_memory.page(), "run `make results` and commit what it writes"


def test_every_kernel_stands_in_the_report_once():
    lines = compiled()
    keys = [(kernel.op, kernel.case, kernel.kernel, kernel.what) for kernel in (*KERNELS, *SLIDING)]
    assert len(set(keys)) == len(keys) and all(key[:3] in lines for key in keys)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.op}: {kernel.kernel}, {kernel.what}")
def test_accesses_of_16_bytes(kernel):
    line = compiled()[kernel.op, kernel.case, kernel.kernel]
    for accesses, of in ((line["loads"], kernel.reads), (line["stores"], kernel.writes)):
        if of:  # a reduction stores little
            narrow = ", ".join(part for part in accesses.split(", ") if part.endswith(("x8", "x16")))
            # parameters, of which there are few, come in fp32
            assert wide(accesses) and 8 * bytes_of(narrow) <= bytes_of(accesses), accesses


def test_bytes_of_accesses():
    assert bytes_of("4 x128, 3 x16") == 70 and bytes_of("") == 0
    assert wide("2 x128, 1 x64, 3 x128") == "2 x128, 3 x128" and not wide("8 x16")


def test_the_limits_by_hand():
    # two fp32 streams in, one out: 4 elements per thread, 48 bytes
    found = limits(Kernel("op", "case", "kernel", "", 8, 4), LINE)
    assert found.in_flight == 64 * 32 * 32
    assert found.instructions == pytest.approx(100 / (48 * 32) * 1024)
    hertz = predict_memory.CHIPS["h100-sxm"].hertz
    assert found.issue == pytest.approx(132 * 4 * hertz * 48 * 32 / 100)
    assert found.latency == pytest.approx(132 * 64 * 32 * 32 / 800e-9 * 12 / 8)
    assert found.share == 1

    # ten times the instructions: 10% of that rate
    slow = limits(Kernel("op", "case", "kernel", "", 8, 4), LINE | {"instructions": "1000"})
    assert slow.issue == pytest.approx(found.issue / 10) and slow.share == pytest.approx(slow.issue / 2.998e12, 0.01)

    # a window whose taps overlap reads every byte twice: half of the loads are from memory
    again = limits(Kernel("op", "case", "kernel", "", 4, 4), LINE)
    assert again.latency == pytest.approx(132 * 64 * 32 * 32 / 2 / 800e-9 * 2)

    # one warp with one load waits most of the time
    alone = limits(Kernel("op", "case", "kernel", "", 4, 4), LINE | {"loads": "1 x128", "resident": "1"})
    assert alone.latency == pytest.approx(132 * 512 / 800e-9 * 2) and alone.share < 0.1

    # a reduction: elements are what it loads
    sums = limits(Kernel("op", "case", "kernel", "", 4, 0), LINE | {"stores": "1 x32"})
    assert sums.issue == pytest.approx(132 * 4 * hertz * 32 * 32 / 100)

    # nothing to wait for
    assert limits(Kernel("op", "case", "kernel", "", 0, 4), LINE).share == 1

    # the branch for the last chunk is not executed elsewhere
    tail = LINE | {"loads": "2 x128, 8 x32", "stores": "1 x128, 4 x32"}
    assert limits(Kernel("op", "case", "kernel", "", 8, 4, tail=True), tail) == found


def test_the_command_writes_the_page(tmp_path, capsys):
    (tmp_path / "aot").symlink_to(RESULTS / "aot")
    predict_memory.main(tmp_path)
    assert (tmp_path / predict_memory.PAGE).read_text() == predict_memory.page()
    assert capsys.readouterr().out.endswith(f"{tmp_path.name}/{predict_memory.PAGE}\n")
