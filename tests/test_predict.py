"""The page of predicted convolutions: the committed one is what the model gives; measured rows find their place."""

from pathlib import Path

import pytest

from fastcnn.benchmarks import predict
from fastcnn.benchmarks.rows import read_rows
from fastcnn.ops.conv_prediction import ranked

RESULTS = Path(__file__).parent.parent / "benchmarks/results"


def row(case="resnet50.layer1.0.conv2", label="forward", provider="fastcnn", ms=0.2, run="1", **changes):
    """What of a result row counts here."""
    made = {
        "device": "NVIDIA H100 80GB HBM3", "op": "conv2d", "case": case, "provider": provider, "pass": label,
        "graph": False, "dtype": "bfloat16", "layout": "channels_last", "batch": 256, "status": "ok", "ms": ms,
        "run": run,
    }  # fmt: skip
    return made | changes


def lines(page):
    """The cells of the table's rows."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")
    ][2:]


def test_the_committed_page_is_the_model_s():
    committed = (RESULTS / predict.PAGE).read_text()
    assert committed == predict.page(read_rows(RESULTS)), "run `make results` and commit what it writes"


def test_all_shapes_and_passes():
    found = predict.layers()
    assert len(found) == 23 and sum(layer["count"] for layer, _ in found) == 53
    table = lines(predict.page([]))
    assert len(table) == 69 and {line[2] for line in table} == {"forward", "grad_input", "grad_weight"}
    for line, (_, problem) in zip(table, ((layer, p) for layer, ps in found for p in ps.values()), strict=True):
        prediction, launch = ranked(problem, predict.CHIPS[predict.GPU])[0]
        assert line[3] == str(launch) and float(line[6]) == round(prediction.seconds * 1e6)
        assert float(line[6]) >= float(line[7]) > 0
        assert line[8:] == ["–"] * 3
    assert predict.NOT_MEASURED in predict.page([])


def test_measured_rows_stand_beside_their_predictions():
    rows = [
        row(ms=0.3, run="0"), row(provider="torch-nhwc", ms=0.5, run="0"),
        # the newest counts, and cuDNN of the same run
        row(ms=0.2), row(provider="torch-nhwc", ms=0.1), row(provider="torch", ms=0.9),
        row(label="grad_weight", ms=0.25),
        row("resnet50.conv1", ms=0.4), row("resnet50.conv1", provider="torch-nhwc", ms=0.8),
        row("resnet50.layer2.0.conv1", device="NVIDIA A100-SXM4-80GB"), row("resnet50.layer2.0.conv1", dtype="float16"),
        row("resnet50.layer2.0.conv1", batch=32), row("resnet50.layer2.0.conv1", status="FAIL", ms=None),
        row("resnet50.layer2.0.conv1", layout="contiguous"), row("resnet50.layer2.0.conv1", op="linear"),
        row("resnet50.layer2.0.conv1", graph=True),
    ]  # fmt: skip
    page = predict.page(rows)
    found = {
        (shape, label): cells
        for shape, _, label, *_, own, cudnn, ratio in lines(page)
        for cells in [(own, cudnn, ratio)]
    }
    assert found["256x64x56x56, 64 filters 3x3", "forward"] == ("200", "100", "0.50×")
    assert found["256x64x56x56, 64 filters 3x3", "grad_weight"] == ("250", "–", "–")
    assert found["256x3x224x224, 64 filters 7x7, stride 2", "forward"] == ("400", "800", "2.00×")
    assert sum(cells != ("–", "–", "–") for cells in found.values()) == 3
    assert "Measured: 2 of 69 passes, geometric mean of cuDNN / fastcnn 1.00×, lowest 0.50×" in page
    assert predict.NOT_MEASURED not in page


def test_the_command_writes_the_page(tmp_path, capsys):
    predict.main(tmp_path)
    assert (tmp_path / predict.PAGE).read_text() == predict.page([])
    assert capsys.readouterr().out.endswith(f"{tmp_path.name}/{predict.PAGE}\n")


@pytest.mark.parametrize("column, words", [(3, "images"), (5, "memory"), (5, "L2")])
def test_what_the_page_is_about_is_there(column, words):
    assert any(words in line[column] for line in lines(predict.page([])))
