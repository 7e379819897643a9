"""The list of all networks, its plot and its page."""

import dataclasses
import xml.etree.ElementTree

import pytest
from architectures import ROWS as NETWORKS

from fastcnn.benchmarks import gallery as pages
from fastcnn.benchmarks import plots
from fastcnn.benchmarks.rows import read_rows
from fastcnn.models import MODELS, list_models
from fastcnn.study import gallery

SMALL = "vgg1?"  # no batch norms: quick to count


def row(case, provider, ms, device="NVIDIA H100", kind="cuda", **more):
    found = dict(op="model", graph=False, dtype="bfloat16", layout="channels_last", batch=256, status="ok", noise=0.01)
    found |= {"device": device, "device_type": kind, "case": case, "provider": provider, "ms": ms, "pass": "step"}
    return found | {"run": "1", "shape": "", "reason": None} | more


ROWS = [
    row("vgg11", "torch", 40.0), row("vgg11", "torch-nhwc", 32.0),
    row("vgg11", "fastcnn-chain", 16.0), row("vgg11", "fastcnn-auto", 20.0),
    row("vgg11", "fastcnn-chain", 1.0, **{"pass": "forward"}),
    row("vgg16", "torch", 300.0, "a CPU", "cpu", batch=8),
    row("vgg16", "fastcnn-chain", 200.0, "a CPU", "cpu", batch=8),
    row("vgg16", "fastcnn-chain", None, status="none"),
    row("no_network", "fastcnn-chain", 1.0), row("vgg19", "torch", 1.0),
]  # fmt: skip


@pytest.fixture(scope="module")
def facts():
    return gallery.gallery(SMALL, ROWS)


def test_facts(facts):
    assert [one.name for one in facts] == list_models(SMALL)
    found = {one.name: one for one in facts}["vgg16"]
    # torchvision publishes 15.470 GFLOPS
    assert (found.year, found.image, found.parameters) == (2014, (3, 224, 224), 138_357_544)
    assert round(found.macs / 1e9, 3) == 15.470 and found.memory == 8 * found.activations
    assert found.milliseconds("a CPU") == 25 and found.milliseconds("NVIDIA H100") is None


def test_speeds_are_those_of_our_fastest_step(facts):
    head, *lines = gallery.table(facts)
    assert head[-2:] == ["NVIDIA H100", "a CPU"]
    speeds = {name: cells[-2:] for name, *cells in lines}
    assert speeds["vgg11"] == ["16,000 (2.00×)", ""]  # images per second on a GPU
    assert speeds["vgg16"] == ["", "1.50×"]  # a CPU is shared: the ratio alone
    assert all(speeds[name] == ["", ""] for name in ("vgg19", "vgg13"))


@pytest.mark.parametrize("key", gallery.KEYS)
def test_sorted(key):
    found = [getattr(one, key) for one in gallery.gallery("vgg1[13]", sort=key)]
    assert found == sorted(found) and len(found) == 2


def test_mistakes():
    with pytest.raises(ValueError, match="unknown key 'parameter': did you mean 'parameters'"):
        gallery.gallery(SMALL, sort="parameter")
    with pytest.raises(ValueError, match=r"no network is called 'x\*': there are .*lenet5"):
        gallery.gallery("x*")


def test_text(facts):
    lines = gallery.text(facts).splitlines()
    assert lines[0].split()[-4:] == ["speed", "A", "speed", "B"]
    assert lines[1].split()[:5] == ["vgg11", "2014", "224x224x3", "132,863,336", "531"]
    assert f"{len(facts)} networks." in lines[len(facts) + 2] and "speed A: NVIDIA H100" in lines
    assert "speed" not in gallery.text(gallery.gallery("lenet5")).lower()


@pytest.mark.parametrize("measured", [True, False])
def test_plot(facts, measured, tmp_path):
    facts = facts if measured else [dataclasses.replace(one, speeds={}) for one in facts]
    figure = gallery.plot(facts, tmp_path / "models.svg")
    xml.etree.ElementTree.parse(tmp_path / "models.svg")
    panels = [axes for axes in figure.axes if axes.get_xlabel()]
    assert len(panels) == 1 + measured
    bubbles = panels[0].collections[0]
    assert sorted(bubbles.get_offsets()[:, 0]) == sorted(one.macs / 1e6 for one in facts)
    assert sorted(bubbles.get_offsets()[:, 1]) == sorted(one.parameters / 1e6 for one in facts)
    if measured:
        # one network has a time on a GPU
        assert panels[1].collections[0].get_offsets().tolist() == [[facts[0].macs / 1e6, 16 / 256]]


def test_labels_cover_no_others(facts):
    crowd = [dataclasses.replace(one, name=f"{one.name}_{i}") for one in facts for i in range(20)]
    for chosen, few in ((facts, len(facts)), (crowd, 8)):
        axes = gallery.plot(chosen).axes[0]
        axes.figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in axes.texts]
        assert few <= len(boxes) <= len(chosen)
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])


def test_page(facts):
    text = pages.page(facts)
    assert f"The {len(facts)} networks" in text and f"]({pages.PLOT})" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == len(facts) + 2


def test_the_command_writes_page_and_plot(tmp_path, capsys):
    pages.main(tmp_path, "lenet5")
    first = (tmp_path / pages.PLOT).read_bytes()
    assert (
        capsys.readouterr().out.count(tmp_path.name) == 2 and "| lenet5 | 1998 |" in (tmp_path / pages.PAGE).read_text()
    )
    facts = gallery.gallery("lenet5")
    assert plots.digest_in(tmp_path / pages.PLOT) == pages.digest(facts)
    (tmp_path / pages.PLOT).unlink()
    pages.main(tmp_path, "lenet5")
    assert (tmp_path / pages.PLOT).read_bytes() == first


COMMITTED = pages.RESULTS / pages.PAGE
STALE = "run python -m fastcnn.benchmarks.gallery"


def test_committed_page_has_every_network():
    lines = [line.split(" | ") for line in COMMITTED.read_text().splitlines() if line.startswith("| ")]
    found = {name.removeprefix("| "): (year, parameters) for name, year, _, parameters, *_ in lines[2:]}
    expected = {row.name: (str(MODELS[row.name].year), f"{row.parameters:,}") for row in NETWORKS}
    assert found == expected, STALE
    assert list(found) == sorted(list_models(), key=lambda name: (MODELS[name].year, name)), STALE


@pytest.mark.parametrize("name", ["lenet5", "mobilenet_v2", "vgg16"])
def test_committed_page_has_the_counts_and_speeds(name):
    _, cells = gallery.table(gallery.gallery(name, read_rows(pages.RESULTS)))
    (line,) = [line for line in COMMITTED.read_text().splitlines() if line.startswith(f"| {name} | ")]
    # the page has a column for every device
    found = [cell for cell in line[2:-2].split(" | ") if cell]
    assert found == [cell for cell in cells if cell], STALE


@pytest.mark.nightly
def test_committed_page_and_plot_are_what_the_networks_have():
    facts = gallery.gallery(rows=read_rows(pages.RESULTS))
    assert COMMITTED.read_text() == pages.page(facts), STALE
    assert plots.digest_in(pages.RESULTS / pages.PLOT) == pages.digest(facts), STALE
