"""The results pages: those committed equal what the committed rows give; what rows of every kind become."""

import json
import re
import shutil
import xml.etree.ElementTree
from pathlib import Path

import pytest

from fastcnn.benchmarks import plots, report
from fastcnn.benchmarks.judge import judged, lines
from fastcnn.benchmarks.rows import slug

ROOT = Path(__file__).parent.parent
RESULTS, PAGE, FRONT = ROOT / "benchmarks/results", ROOT / "benchmarks/README.md", ROOT / "README.md"

CPU = {"device": "A CPU, 2 threads", "device_type": "cpu", "driver": None, "cudnn": None}
GPU = {"device": "NVIDIA H100 80GB HBM3", "device_type": "cuda", "driver": "570.1", "cudnn": 91200}


def row(provider="fastcnn", ms=1.0, label="forward", **changes):
    """A result row as the harness writes it."""
    made = {
        "op": "max_pool2d", "case": "resnet50.maxpool", "shape": "32x64x112x112, window 3x3, stride 2",
        "provider": provider, "pass": label, "graph": False, "dtype": "float32", "layout": "contiguous", "batch": 32,
        "status": "ok", "reason": None, "ms": ms, "p20": ms, "p80": ms, "samples": 20, "host_ms": None, "noise": 0.02,
        "flops": 10**9, "bytes": 10**8, "tflops": 1.0, "gbs": 100.0, "tflops_share": 0.1, "gbs_share": 0.61,
        "peak_bytes": 200_000_000, "saved_bytes": 50_000_000, "copy_gbs": 2990.0, "matmul_tflops": 780.0, **GPU,
        "threads": 2, "torch": "2.13.0", "triton": "3.7.1", "commit": "abc1234", "date": "2026-11-21T10:00:00Z",
        "run": "2026-11-21T09:00:00Z",
    }  # fmt: skip
    return made | changes


def refused(status, reason, provider="fastcnn", **changes):
    none = dict.fromkeys(("ms", "p20", "p80", "samples", "tflops_share", "gbs_share", "peak_bytes", "saved_bytes"))
    return row(provider, status=status, reason=reason, **none | changes)


def save(folder, rows):
    folder.mkdir(exist_ok=True, parents=True)
    for made in rows:
        with open(folder / f"{slug(made['device'])}.jsonl", "a") as file:
            file.write(json.dumps(made) + "\n")
    return folder


def pages(tmp_path, *rows):
    """The Report of these rows."""
    return report.make(save(tmp_path / "results", rows))


def cells(text, start):
    """The cells of the one table line that starts with `start`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def op_page(made, device=GPU, op="max_pool2d"):
    return made.pages[f"{slug(device['device'])}/{op}.md"]


def test_committed_pages_show_the_committed_rows():
    assert report.stale(RESULTS, PAGE, FRONT) == [], "run `make results` and commit what it writes"


def test_links_of_the_committed_pages_lead_somewhere():
    for page in (PAGE, FRONT, *RESULTS.glob("*/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page} links to {target}"


def test_no_rows(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        made = report.make(folder)
        assert report.NOTHING in made.page and report.NOTHING in made.front
        assert report.NO_GPU in made.page and report.NO_GPU in made.front
        assert not made.pages and not made.plots


def test_not_measured_on_a_gpu(tmp_path):
    made = pages(tmp_path, row("torch", 1.5, **CPU), row("fastcnn", 1.0, **CPU))
    assert report.NO_GPU in made.page and report.NO_GPU in made.front
    assert report.NOTHING not in made.page
    with_gpu = pages(tmp_path, row("torch", 1.5), row("fastcnn", 1.0))
    assert report.NO_GPU not in with_gpu.page and report.NO_GPU not in with_gpu.front
    # GPUs stand first
    assert with_gpu.front.index(GPU["device"]) < with_gpu.front.index(CPU["device"])


def test_times_of_cpus_are_not_shown(tmp_path):
    providers = {"torch": 7.77, "torch-nhwc": 6.66, "fastcnn": 5.55}
    rows = [row(p, ms, label, **CPU) for p, ms in providers.items() for label in ("forward", "backward")]
    rows += [row(p, ms, "step", **CPU, op="model", case="resnet50") for p, ms in providers.items()]
    made = pages(tmp_path, *rows)
    text = "".join([made.page, made.front, *made.pages.values()])
    assert not re.search(r"7\.77|6\.66|5\.55|2,990|780|\bms\b|img/s|images per second", text)
    assert cells(op_page(made, CPU), "`resnet50.maxpool`")[3:6] == ["0.86×", "1.00×", "1.20×"]


def test_ratio_is_against_the_fastest_torch(tmp_path):
    made = pages(tmp_path, row("torch", 2.0), row("torch-nhwc", 1.2), row("compile", 0.8), row("fastcnn", 1.0))
    assert cells(op_page(made), "`resnet50.maxpool`")[3:7] == ["2.00", "1.20", "0.800 (1.50×)", "1.00 (1.20×)"]
    # neither a wrong reference nor another layout's or batch's counts
    wrong = refused("FAIL", "wrong", "torch-nhwc")
    judgements = judged([row("torch", 2.0), wrong, row("torch-nhwc", 0.1, batch=64), row("fastcnn", 1.0)])
    assert judgements[-1]["ratio"] == 2.0


def test_ratio_is_within_one_run(tmp_path):
    old, new = {"run": "2026-11-20T00:00:00Z", "date": "2026-11-20T00:00:00Z"}, {"run": "2026-11-22T00:00:00Z"}
    rows = [row("torch", 3.0, **old), row("fastcnn", 1.0, **old), row("torch", 2.0, **new)]
    # PyTorch was measured once more, on a better day: the ratio stays that of fastcnn's run
    assert [made["ratio"] for made in judged(rows)] == [1.0, 3.0]
    alone = row("fastcnn", 1.0, run="2026-11-23T00:00:00Z")
    assert judged([*rows, alone])[1]["ratio"] is None
    assert cells(op_page(pages(tmp_path / "gpu", *rows, alone)), "`resnet50.maxpool`")[4] == "1.00"


def test_newest_row_wins(tmp_path):
    later = {"run": "2026-11-22T09:00:00Z", "date": "2026-11-22T10:00:00Z", "commit": "def5678"}
    made = pages(
        tmp_path, row("torch", 2.0), row("fastcnn", 1.0), row("torch", 2.0, **later), row("fastcnn", 4.0, **later)
    )
    found = cells(op_page(made), "`resnet50.maxpool`")
    assert found[4] == "4.00 (**0.50×** ▼)" and found[-1] == "2026-11-22 def5678"
    assert "1.00 (2.00×)" not in op_page(made)


def test_losing_rows_stay_and_are_marked(tmp_path):
    made = pages(
        tmp_path,
        row("torch", 1.0), row("fastcnn", 1.6), row("fastcnn-auto", 0.5),
        row("torch", 1.0, "backward"), row("fastcnn", 2.0, "backward"), row("fastcnn-auto", 0.5, "backward"),
        row("torch", 1.0, case="vgg16.features.4"), row("fastcnn", 0.5, case="vgg16.features.4"),
    )  # fmt: skip
    assert cells(op_page(made), "`resnet50.maxpool`")[4] == "1.60 (**0.62×** ▼)"
    # the list of losses names the slowest pass
    assert cells(made.page, "`max_pool2d`") == [
        "`max_pool2d`", "`resnet50.maxpool`", "fastcnn", "backward", "**0.50×** ▼",
    ]  # fmt: skip
    line = cells(made.front, "[max_pool2d]")
    # forward: sqrt(1 / 1.6 * 2); backward: 1 / 2
    assert line[1] == "1.12 / 0.50"
    assert line[2] == "0.50× `resnet50.maxpool` backward" and line[3] == "2.00× `vgg16.features.4` forward"
    assert line[4] == "1 of 2 ▼" and line[6] == "0 of 1"


def test_wrong_results_never_show_a_time(tmp_path):
    # even if a row had one
    wrong = refused("FAIL", "output: element [0, 1] is 3 | should\nbe 4", ms=0.123)
    rows = [row("torch", 1.0), wrong, row("torch", 1.0, "step")]
    made = pages(tmp_path, *rows)
    text = "".join([made.page, made.front, *made.pages.values(), report.terminal_table(rows)])
    assert "0.123" not in text and "8.13" not in text
    page = op_page(made)
    assert cells(page, "`resnet50.maxpool`")[4] == "**FAIL** <sup>1</sup>"
    # the pass that the refused provider did not name
    assert cells(page, " |  | step")[4] == "**FAIL** <sup>1</sup>"
    assert "<sup>1</sup> output: element [0, 1] is 3 \\| should be 4" in page
    assert "**1 FAIL**" in made.front and "Wrong results" in made.page
    assert re.search(r"FAIL \[1\].*\n.*FAIL \[1\]\n\[1\] output: element", report.terminal_table(rows))


def test_none_has_its_reason(tmp_path):
    none = refused("none", "max_pool2d: no kernel for this")
    made = pages(tmp_path, row("torch", 1.0), none, row("fastcnn-auto", 0.5))
    assert cells(op_page(made), "`resnet50.maxpool`")[4] == "– <sup>1</sup>"
    assert "<sup>1</sup> max_pool2d: no kernel for this" in op_page(made)
    line = cells(made.front, "[max_pool2d]")
    assert line[1:5] == ["–"] * 4 and line[5] == "2.00"


@pytest.mark.parametrize(
    "ms, noise, usual, expected",
    [
        (1.03, 0.05, 0.0, "≈0.97×"),
        (0.97, 0.05, 0.0, "≈1.03×"),
        (1.03, 0.01, 0.0, "**0.97×** ▼"),
        (0.97, 0.01, 0.0, "1.03×"),
        # one lucky repetition makes no line exact: the median of the op counts, too
        (1.03, 0.0, 0.06, "≈0.97×"),
    ],
)
def test_ratios_within_the_noise_are_marked(tmp_path, ms, noise, usual, expected):
    others = [row("torch", 1.0, case=f"vgg16.features.{i}", noise=usual) for i in range(5)]
    made = pages(tmp_path, row("torch", 1.0, noise=noise), row("fastcnn", ms, noise=noise), *others)
    assert cells(op_page(made), "`resnet50.maxpool`")[4] == f"{'1.03' if ms > 1 else '0.970'} ({expected})"


def test_lines_tell_dtypes_and_order_layers(tmp_path):
    names = ("resnet50.layer10.conv", "resnet50.layer2.conv", "alexnet.conv")
    found = lines(judged([row(case=name) for name in names] + [row(case=names[1], dtype="bfloat16")]))
    assert [label for label, _, _ in found] == [
        "resnet50.layer2.conv, bfloat16", "resnet50.layer2.conv, float32", "resnet50.layer10.conv, float32",
        "alexnet.conv, float32",
    ]  # fmt: skip


def test_networks(tmp_path):
    model = {"op": "model", "case": "resnet50", "batch": 256, "label": "step"}
    shares = {"conv": 30.0, "norm": 20.0}
    made = pages(
        tmp_path,
        row("torch", 100.0, **model, families={"conv": 60.0, "norm": 40.0}),
        row("torch-nhwc", 64.0, **model),
        row("fastcnn", 50.0, **model, families=shares, peak_bytes=150_000_000),
        row("torch-nhwc", 60.0, **model, graph=True), row("fastcnn", 40.0, **model, graph=True),
    )  # fmt: skip
    assert cells(made.front, "`resnet50`") == ["`resnet50`", "256", "2,560", "4,000", "5,120 (1.28×)"]
    assert cells(made.front, "`resnet50, CUDA graph`")[4] == "6,400 (1.50×)"
    assert cells(made.page, "`resnet50`")[5] == "200 → 150"
    page = op_page(made, op="model")
    assert cells(page, "conv ") == ["conv", "60.0", "30.0"]
    # on CPU the shares of a step
    cpu = pages(tmp_path / "cpu", row("torch", 50.0, **model, **CPU, families=shares))
    assert cells(op_page(cpu, CPU, "model"), "conv ") == ["conv", "60%"]


def test_a_cut_off_network_breaks_nothing(tmp_path):
    made = pages(tmp_path, row("torch", 1.0, op="model", case="resnet50"))
    assert not made.plots and "resnet50" in op_page(made, op="model")


def test_facts_of_a_device(tmp_path):
    rows = [row("torch", 1.0, noise=noise, case=f"net.{i}") for i, noise in enumerate([0.01] * 9 + [0.5])]
    text = pages(tmp_path, *rows, row("torch", 1.0, dtype="bfloat16", matmul_tflops=800.0, commit="new+")).page
    assert "torch 2.13.0, Triton 3.7.1, cuDNN 91200, driver 570.1" in text
    assert (
        "a copy 2,990 GB/s, a matrix product 780 TFLOP/s in float32, a matrix product 800 TFLOP/s in bfloat16" in text
    )
    assert "Noise: median 1.0%, 90% of the lines up to 2.0%." in text
    assert "Measured 2026-11-21 at commit abc1234, new+" in text


def all_kinds():
    rows = []
    for device in (CPU, GPU):
        for i, op in enumerate(("conv2d", "max_pool2d")):
            for provider in ("torch", "torch-nhwc", "fastcnn", "fastcnn-auto"):
                rows += [row(provider, 1.0 + 0.1 * i, p, op=op, **device) for p in ("forward", "backward", "step")]
        rows += [row(p, 1.0, "step", op="optim", case="Adam.resnet50", **device) for p in ("torch", "fastcnn")]
        rows += [row(p, 9.0, "step", op="model", case="resnet50", **device) for p in ("torch", "fastcnn")]
        rows.append(refused("FAIL", "wrong", op="conv2d", case="resnet50.conv1", **device))
        rows.append(refused("none", "no kernel", op="model", case="vgg16", label="step", **device))
    return rows


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A results folder with rows of all kinds, and the pages and plots made from them."""
    folder = save(tmp_path_factory.mktemp("drawn") / "results", all_kinds())
    report.write(folder)
    return folder


def test_write_and_stale(tmp_path, drawn):
    folder = shutil.copytree(drawn, tmp_path / "results")
    page, front = tmp_path / "page.md", tmp_path / "front.md"
    for path in (page, front):
        path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(folder, page, front)
    assert page.read_text().startswith(f"before\n{report.BEGIN}\n") and page.read_text().endswith(
        f"{report.END}\nafter\n"
    )
    assert "old" not in page.read_text()
    assert report.stale(folder, page, front) == []
    # again: nothing is drawn twice
    written = report.write(folder, page, front)
    assert not [path for path in written if path.suffix == ".svg"]
    # another row of the one device: its pages and plots are out of date, not the other's
    save(folder, [row("fastcnn", 5.0, "forward", op="max_pool2d", **CPU)])
    stem = slug(CPU["device"])
    expected = ["page.md", "front.md", f"{stem}/max_pool2d.md"]
    expected += [f"plots/{stem}/max_pool2d.svg", f"plots/{stem}/overview.svg"]
    assert sorted(report.stale(folder, page, front)) == sorted(expected)
    report.write(folder, page, front)
    assert report.stale(folder, page, front) == []
    # what a hand changed
    page.write_text(page.read_text().replace("conv2d", "conv3d"))
    assert report.stale(folder, page, front) == ["page.md"]


def test_what_has_no_rows_any_more_is_removed(tmp_path, drawn):
    folder = shutil.copytree(drawn, tmp_path / "results")
    stem = slug(GPU["device"])
    other = folder / "plots" / stem / "roofline.svg"
    other.write_text("<svg/>")
    (folder / f"{stem}.jsonl").unlink()
    assert f"{stem}/conv2d.md" in report.stale(folder) and f"plots/{stem}/conv2d.svg" in report.stale(folder)
    report.write(folder)
    assert not (folder / stem / "conv2d.md").exists() and not (folder / "plots" / stem / "conv2d.svg").exists()
    # not ours to remove
    assert other.exists()


def test_plots_are_the_same_every_time(tmp_path, drawn):
    folder = shutil.copytree(drawn, tmp_path / "results")
    first = {path: path.read_bytes() for path in folder.glob("plots/*/*.svg")}
    names = {path.stem for path in first}
    assert names == {"conv2d", "max_pool2d", "optim", "overview", "models", "ceilings"}
    for content in first.values():
        xml.etree.ElementTree.fromstring(content)
    shutil.rmtree(folder / "plots")
    report.write(folder)
    assert {path: path.read_bytes() for path in folder.glob("plots/*/*.svg")} == first


def test_plots_show_every_case_and_failures():
    rows = judged([row(p, 1.0, case=f"vgg16.features.{i}") for i in range(70) for p in ("torch", "fastcnn")])
    rows.append(judged([refused("FAIL", "wrong", case="vgg16.features.99")])[0])
    axes = plots.cases("a device", rows).axes[0]
    assert len(axes.get_yticks()) == 71
    assert any(line.get_label() == "FAIL" for line in axes.lines)
    # no label covers its neighbour
    figure = axes.figure
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    tops = sorted((box.y0, box.y1) for box in boxes)
    assert all(below[1] <= above[0] + 1 for below, above in zip(tops, tops[1:], strict=False))


@pytest.mark.parametrize("text", ["nothing", report.BEGIN, report.END + report.BEGIN, 2 * (report.BEGIN + report.END)])
def test_a_page_without_its_markers(text):
    with pytest.raises(ValueError, match=r"page\.md must have one line '<!-- results:begin"):
        report.splice(text, "block", "page.md")


def test_terminal_table():
    rows = [
        row("torch", 2.0),
        row("torch-nhwc", 1.0),
        row("fastcnn", 1.25),
        row("fastcnn-auto", 0.99),
        row("compile", 0.5),
    ]
    text = report.terminal_table(rows)
    assert text.splitlines()[0].split() == ["case", "pass", "torch", "torch-nhwc", "compile", "fastcnn", "fastcnn-auto"]
    line = text.splitlines()[1]
    assert line.split()[:8] == ["resnet50.maxpool", "forward", "2.00", "(0.50)", "1.00", "(1.00)", "0.500", "(2.00)"]
    assert line.split()[8:] == ["1.25", "(0.80)v", "0.990", "(1.01)~"]
    assert "Noise: median 2.0%" in text
