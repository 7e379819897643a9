"""The page of predicted convolutions: the committed one is what the model gives; measured rows find their place."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fastcnn.benchmarks import predict
from fastcnn.benchmarks.rows import read_rows
from fastcnn.ops import conv2d, conv_launch
from fastcnn.ops.conv_prediction import pending_seconds, ranked

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


def test_the_committed_page_of_pending_activations_is_the_model_s():
    assert (RESULTS / predict.PENDING_PAGE).read_text() == predict.pending_page(), "run `make results` and commit it"


def test_what_is_materialized_is_what_the_predictions_say(monkeypatch):
    """ResNet-50 with every input pending, from tensors."""
    choices = {}
    for gpu, written in ((predict.GPU, 0), ("a100-sxm", 2)):
        monkeypatch.setattr(conv_launch, "chip", lambda device, gpu=gpu: predict.CHIPS[gpu])
        choices[gpu] = []
        for layer, problems in predict.layers():
            p = problems["forward"]
            how = dict(dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
            x, w = torch.empty((p.n, p.c, p.h, p.w), **how), torch.empty((p.k, p.c // p.groups, p.r, p.s), **how)
            if layer["input_grad"]:
                geometry = (p.p, p.q), p.stride, p.padding, p.dilation, p.groups, True, "conv"
                choices[gpu].append(conv2d.should_materialize(x, w, *geometry))
                on_load, write = pending_seconds(p, predict.CHIPS[gpu])
                assert choices[gpu][-1] == (write < on_load)
        assert sum(choices[gpu]) == written
    # the transform can only cost, and writing costs two passes
    deep = dataclasses.replace(p, n=256, c=512, k=512, h=7, w=7, p=7, q=7, r=3, s=3, padding=(1, 1))
    h100 = predict.CHIPS[predict.GPU]
    pending = [dataclasses.replace(deep, fused=True, pending=pending) for pending in (True, False)]
    slow, fast = (ranked(one, h100)[0][0].seconds for one in pending)
    assert slow >= fast


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


def test_the_command_writes_the_pages(tmp_path, capsys):
    predict.main(tmp_path)
    assert (tmp_path / predict.PAGE).read_text() == predict.page([])
    assert (tmp_path / predict.PENDING_PAGE).read_text() == predict.pending_page()
    pages = f"{tmp_path.name}/{predict.PAGE}", f"{tmp_path.name}/{predict.PENDING_PAGE}"
    assert all(line.endswith(page) for line, page in zip(capsys.readouterr().out.split(), pages, strict=True))


@pytest.mark.parametrize("column, words", [(3, "images"), (5, "memory"), (5, "L2")])
def test_what_the_page_is_about_is_there(column, words):
    assert any(words in line[column] for line in lines(predict.page([])))
