"""The gate on machine code: every kind of loss is seen, occupancy follows CUDA's rules, an update keeps other parts."""

import dataclasses
from pathlib import Path

import aot_report
import pytest
from aot_report import COLUMNS, Row, compare, gate, instruction_mix, losses, read, resident_warps, write

ROOT = Path(__file__).parent.parent
ROW = Row(
    "conv2d_forward_kernel", "conv2d: resnet50 3x3", 90, registers=168, shared=98304, warps=8, resident=8,
    instructions=1000, tensor="16 HGMMA.64x128x16", copies="24 LDGSTS.128, 4 LDGSTS.32", loads="8 x128, 2 x16",
    stores="16 x128", shared_loads=8, shared_stores=32, arithmetic=64, special=0, barriers=9, other=839,
)  # fmt: skip


def but(**changes):
    return dataclasses.replace(ROW, **changes)


@pytest.mark.parametrize(
    "target, registers, shared, warps, expected",
    [
        # no limit but the 64 warps of an SM: 16 blocks of 4
        (90, 32, 0, 4, 64),
        # 33 x 32 = 1,056 registers of a warp round up to 1,280; 16,384 / 1,280 = 12 in each of 4 parts
        (90, 33, 0, 4, 48),
        # 65 x 32 = 2,080 -> 2,304; 16,384 / 2,304 = 7; 28 warps are 7 blocks of 4, but 3 blocks of 8
        (80, 65, 0, 4, 28),
        (80, 65, 0, 8, 24),
        # 255 x 32 = 8,160 -> 8,192; 2 in each part: one block of 8, none of 16
        (100, 255, 0, 8, 8),
        (100, 255, 0, 16, 0),
        # at most 32 blocks
        (80, 16, 0, 1, 32),
        # registers go to at least 4 warps: 96 x 32 = 3,072; 16,384 / 3,072 = 5; 20 warps are 5 blocks even of one warp
        (80, 96, 0, 1, 5),
        # 48 KiB + 1 of CUDA's: 3 in 164 KiB, 4 in 228 KiB
        (80, 32, 48 * 1024, 4, 12),
        (90, 32, 48 * 1024, 4, 16),
        # 3 x (75 KiB + 1) = 228 KiB exactly; one byte more costs a block
        (90, 32, 75 * 1024, 4, 12),
        (90, 32, 75 * 1024 + 1, 4, 8),
        (80, 32, 163 * 1024, 8, 8),
        (80, 32, 163 * 1024 + 1, 8, 0),
    ],
)
def test_occupancy_follows_cudas_rules(target, registers, shared, warps, expected):
    assert resident_warps(target, registers, shared, warps) == expected


def test_tensor_memory_limits_occupancy_too():
    assert resident_warps(100, 32, 1024, 4) == 64
    # 512 columns
    assert resident_warps(100, 32, 1024, 4, tensor_memory=128) == 16
    assert resident_warps(100, 32, 1024, 4, tensor_memory=512) == 4


def test_instructions_are_counted_by_kind():
    opcodes = """LDC.64 LDG.E.128.CONSTANT LDG.E.64 LDG.E LDG.E.U16 LDG.E.S8 LDG.E.ENL2.256 STG.E.128 STG.E.U8
        LDGSTS.E.BYPASS.LTC128B.128 LDGSTS.E.64 LDGSTS.E UTMALDG.2D UBLKCP.S.G HMMA.16816.F32.BF16 HMMA.16816.F32.BF16
        HMMA.1688.F32.TF32 HGMMA.64x128x16.F32.BF16 UTCHMMA DMMA.8x8x4 LDS.128 LDSM.16.M88.4 STS.64 FFMA FADD.FTZ HFMA2
        DMUL FMNMX FFMA2 MUFU.EX2 BAR.SYNC.DEFER_BLOCKING SYNCS.EXCH.64 IMAD.WIDE LOP3.LUT FSEL F2FP.BF16.F32.PACK_AB
        EXIT NOP NOP""".split()
    assert instruction_mix(opcodes) == {
        "instructions": 37,
        "tensor": "1 DMMA.8x8x4, 1 HGMMA.64x128x16, 2 HMMA.16816, 1 HMMA.1688, 1 UTCHMMA",
        "copies": "1 LDGSTS.128, 1 LDGSTS.32, 1 LDGSTS.64, 1 UBLKCP, 1 UTMALDG",
        "loads": "1 x128, 1 x16, 1 x256, 1 x32, 1 x64, 1 x8",
        "stores": "1 x128, 1 x8",
        "shared_loads": 2,
        "shared_stores": 1,
        "arithmetic": 6,
        "special": 1,
        "barriers": 2,
        "other": 6,
    }


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(resident=4, registers=255), "occupancy 8 -> 4 of 64 warps (registers 168 -> 255)"),
        (dict(resident=4, shared=1 << 17), "occupancy 8 -> 4 of 64 warps (shared 98304 -> 131072)"),
        (dict(tensor=""), "tensor-core instructions lost: 16 -> 0 HGMMA.64x128x16"),
        (dict(tensor="64 HMMA.16816"), "tensor-core instructions lost: 16 -> 0 HGMMA.64x128x16"),
        (dict(tensor="8 HGMMA.64x128x16"), "tensor-core instructions fewer: 16 -> 8 HGMMA.64x128x16"),
        (dict(copies="24 LDGSTS.128"), "asynchronous copies lost: 4 -> 0 LDGSTS.32"),
        (dict(copies="16 LDGSTS.128, 4 LDGSTS.32"), "asynchronous copies fewer: 24 -> 16 LDGSTS.128"),
        (dict(loads="64 x16"), "global loads narrower: 8 x128, 2 x16 -> 64 x16"),
        (dict(loads="4 x128, 34 x16"), "global loads narrower: 8 x128, 2 x16 -> 4 x128, 34 x16"),
        (dict(stores="128 x16"), "global stores narrower: 16 x128 -> 128 x16"),
        (dict(instructions=1251), "code +25% (instructions 1000 -> 1251)"),
    ],
)
def test_a_loss_is_a_sentence(change, sentence):
    assert losses(ROW, but(**change)) == [sentence]
    lost, other = compare([ROW], [but(**change)])
    assert lost == [f"conv2d_forward_kernel on sm_90: {sentence} (conv2d: resnet50 3x3)"] and other == []


@pytest.mark.parametrize(
    "change",
    [
        dict(resident=16, registers=128),
        dict(registers=176),
        dict(tensor="32 HGMMA.64x128x16"),
        dict(copies="48 LDGSTS.128, 4 LDGSTS.32, 1 UTMALDG"),
        dict(loads="4 x128, 2 x16"),
        dict(loads="10 x128"),
        dict(instructions=1250),
        dict(instructions=500, other=339),
        dict(special=9),
    ],
)
def test_other_differences_make_the_file_out_of_date(change):
    lost, (sentence,) = compare([ROW], [but(**change)])
    assert lost == [] and all(name in sentence for name in change)


def test_kernels_that_come_and_go_are_named_and_equal_sentences_are_merged():
    rows = [but(case=f"conv2d: {i}") for i in range(5)]
    new = [dataclasses.replace(row, tensor="") for row in rows[:4]] + [but(case="conv2d: more")]
    lost, other = compare(rows, new)
    assert lost == [
        "conv2d_forward_kernel on sm_90: tensor-core instructions lost: 16 -> 0 HGMMA.64x128x16 (conv2d: 0 and 3 more)"
    ]
    assert other == [
        "conv2d_forward_kernel on sm_90 is gone (conv2d: 4)",
        "conv2d_forward_kernel on sm_90 is new (conv2d: more)",
    ]


def all_of_it(row):
    return True


def test_the_gate_speaks_until_the_file_is_updated(tmp_path, capsys):
    path = tmp_path / "results/aot"
    assert not gate(path, "3.7.1", [ROW], all_of_it, update=False) and not path.exists()
    assert gate(path, "3.7.1", [ROW], all_of_it, update=True)
    assert gate(path, "3.7.1", [ROW], all_of_it, update=False)
    capsys.readouterr()

    before = (path / "conv2d.tsv").read_text()
    worse = [but(resident=4, registers=255)]
    assert not gate(path, "3.7.1", worse, all_of_it, update=False)
    assert "LOST conv2d_forward_kernel on sm_90: occupancy 8 -> 4 of 64 warps" in capsys.readouterr().out
    assert (path / "conv2d.tsv").read_text() == before
    # an update writes losses too, and says them
    assert gate(path, "3.7.1", worse, all_of_it, update=True) and "LOST" in capsys.readouterr().out
    assert read(path) == ("3.7.1", worse)

    assert not gate(path, "3.7.1", [], all_of_it, update=False)
    assert "is gone" in capsys.readouterr().out


def test_a_part_is_compared_and_updated_alone(tmp_path):
    path = tmp_path / "aot"
    others = [but(case="linear: head"), but(target=80)]
    write(path, "3.7.1", [ROW, *others])
    part = lambda row: row.op == "conv2d" and row.target == 90
    changed = but(registers=160)
    assert gate(path, "3.7.1", [ROW], part, update=False)
    assert not gate(path, "3.7.1", [changed], part, update=False)
    assert gate(path, "3.7.1", [changed], part, update=True)
    assert sorted(read(path)[1], key=lambda row: row.key) == sorted([changed, *others], key=lambda row: row.key)


def test_every_op_has_its_file_and_files_of_two_tritons_are_refused(tmp_path):
    path = tmp_path / "aot"
    write(path, "3.7.1", [ROW, but(case="linear: head")])
    assert sorted(file.name for file in path.iterdir()) == ["conv2d.tsv", "linear.tsv"]
    write(path, "3.7.1", [ROW])
    assert [file.name for file in path.iterdir()] == ["conv2d.tsv"]
    (path / "linear.tsv").write_text((path / "conv2d.tsv").read_text().replace("3.7.1", "3.6.0"))
    with pytest.raises(ValueError, match="several versions of Triton.*3.6.0"):
        read(path)


def test_another_triton_is_not_compared_and_not_mixed(tmp_path, capsys):
    path = tmp_path / "aot"
    write(path, "3.6.0", [ROW])
    before = (path / "conv2d.tsv").read_text()
    assert gate(path, "3.7.1", [but(tensor="")], all_of_it, update=False)
    assert capsys.readouterr().out == "aot was made with Triton 3.6.0 and this is 3.7.1: not compared\n"
    assert not gate(path, "3.7.1", [], lambda row: row.op == "linear", update=True)
    assert (path / "conv2d.tsv").read_text() == before
    assert gate(path, "3.7.1", [ROW], all_of_it, update=True) and read(path)[0] == "3.7.1"


def test_a_damaged_report_is_named_and_can_be_rewritten(tmp_path):
    path = tmp_path / "aot"
    write(path, "3.7.1", [ROW])
    file = path / "conv2d.tsv"
    file.write_text(file.read_text().replace("\t168\t", "\tmany\t"))
    with pytest.raises(ValueError, match="line 3: .*many"):
        read(path)
    file.write_text("registers\n")
    with pytest.raises(ValueError, match="make aot-update"):
        gate(path, "3.7.1", [ROW], all_of_it, update=False)
    assert gate(path, "3.7.1", [ROW], all_of_it, update=True)
    assert read(path) == ("3.7.1", [ROW])


def test_the_committed_report_is_of_our_triton_sorted_and_small():
    path = ROOT / "benchmarks/results/aot"
    version, rows = read(path)
    assert f"triton=={version}" in (ROOT / "constraints.txt").read_text().splitlines()
    keys = [row.key for row in rows]
    assert keys == sorted(set(keys)) and {row.target for row in rows} == {80, 90, 100}
    for file in path.glob("*.tsv"):
        assert file.stat().st_size < 400_000
        assert len(file.read_text().splitlines()[1].split("\t")) == len(COLUMNS)


def test_every_row_accounts_for_all_its_instructions():
    for row in read(ROOT / "benchmarks/results/aot")[1]:
        counted = sum(sum(aot_report.kinds(cell).values()) for cell in (row.tensor, row.copies, row.loads, row.stores))
        counted += row.shared_loads + row.shared_stores + row.arithmetic + row.special + row.barriers + row.other
        assert counted == row.instructions, row
        assert 0 < row.resident <= 64, row
