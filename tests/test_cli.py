"""The command line, mostly in this process; a few times for real."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastcnn.cli import _parser, _train_config, main
from fastcnn.data import load_data
from fastcnn.models import list_models
from fastcnn.train import load_run, loop


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    torch.set_num_threads(1)
    assert main(["train", "--epochs", "4", "--batch-size", "16", "--lr", "4e-3", "--out", str(out)]) == 0
    return out


def fails(capsys, *argv):
    """The one line that a mistake prints."""
    assert main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastcnn: error: ") and captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err and captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train", "--model", "lenet6"], "unknown model 'lenet6': did you mean 'lenet5'?"),
        (["train", "--data", "digit"], "unknown data set 'digit': did you mean 'digits'?"),
        (["train", "--epochs", "many"], '"epochs": Expected a int. Got value: many'),
        (["train", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["train", "--epoch", "3"], "unrecognized arguments: --epoch"),
        (["train", "--lr", "-1"], "lr must be more than 0, got -1.0"),
        (["train", "--optimizer", "adm"], "unknown optimizer 'adm': did you mean 'adam'?"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "train,eval,predict,bench,tune"),
        (["predict", "somewhere"], "images"),
        (["eval", "nowhere"], "nowhere holds no run of fastcnn train"),
        (["predict", "nowhere", "a.png"], "nowhere holds no run of fastcnn train"),
        (["explain", "nowhere"], "nowhere holds no finished run"),
        (["study"], "study.subcommand"),
        (["study", "summary", "fastcnn:lenet6"], "there is no network 'fastcnn:lenet6'"),
        (["study", "summary", "lenet5", "--depth", "0"], "depth must be a positive int, got 0"),
        (["study", "summary", "lenet5", "--in-chans", "0"], "in_chans must be a positive int, got 0"),
        (["study", "summary", "torchvision:vgg11", "--in-chans", "1"], "in_chans must be 3 for torchvision's networks"),
        (["models", "lenet6"], "no network is called 'lenet6'"),
        (["models", "--sort", "size"], "unknown key 'size'"),
    ],
)
def test_mistakes_are_one_line(capsys, argv, message):
    assert message in fails(capsys, *argv)


def test_a_bare_flag_is_true():
    words = ["--cuda-graph", "--fuse", "false", "--max-grad-norm", "1", "--ema-decay=0.9", "--augment"]
    options = _train_config(_parser().parse_args(["train", *words])["train"])
    assert (options.cuda_graph, options.fuse, options.augment, options.channels_last) == (True, False, True, False)
    assert (options.max_grad_norm, options.ema_decay) == (1.0, 0.9)


def test_mistakes_with_files_are_one_line(capsys, tmp_path, run):
    missing = fails(capsys, "train", "--data", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "a")
    assert "no train-images-idx3-ubyte" in missing
    options = ["train", "--out", tmp_path / "a", "--model-args.activation", "relo"]
    assert "unknown activation 'relo': did you mean 'relu'?" in fails(capsys, *options)
    assert "there is no config.json" in fails(capsys, "train", "--resume", "--out", tmp_path / "b")
    assert "already holds a run" in fails(capsys, "train", "--out", run)
    (tmp_path / "c.yaml").write_text("epochz: 3")
    assert "epochz" in fails(capsys, "train", "--config", tmp_path / "c.yaml")
    assert "File does not exist" in fails(capsys, "train", "--config", tmp_path / "d.yaml")
    (tmp_path / "bad.png").write_bytes(b"")
    assert "bad.png is empty (0 bytes)" in fails(capsys, "predict", run, tmp_path / "bad.png")
    (tmp_path / "file").write_text("in the way")
    assert "fastcnn: error" in fails(capsys, "train", "--out", tmp_path / "file")


def test_eval_prints_what_the_run_measured(run, capsys):
    assert main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    accuracy = json.loads((run / "summary.json").read_text())["test_accuracy"]
    assert f"test accuracy {accuracy:.2%}" in out
    matrix = [[0 if n == "." else int(n) for n in line.split()[1:]] for line in out.splitlines()[3:]]
    assert np.array(matrix).shape == (10, 10) and np.sum(matrix) == 360
    assert np.trace(matrix) == round(accuracy * 360)


def test_predict_sees_what_training_saw(run, tmp_path, capsys):
    data = load_data("digits")
    loaded = load_run(run)
    with torch.no_grad():
        logits = loaded.model(loaded.input.normalise(data.test.images[:20]))
    files = []
    for i in range(20):
        image = Image.fromarray(data.test.images[i, 0].numpy())
        if i % 2:
            image = image.convert("RGB")  # a colour file for a grey model
        files.append(str(tmp_path / f"{i}.png"))
        image.save(files[-1])
    assert torch.allclose(loaded.predict(files), logits.softmax(1), atol=1e-6)
    assert main(["predict", str(run), *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines] == [str(int(row.argmax())) for row in logits]
    assert all(line.split("  ")[0] == file and line.endswith("%") for line, file in zip(lines, files, strict=True))

    Image.fromarray(255 - data.test.images[0, 0].numpy()).resize((90, 90)).save(tmp_path / "paper.jpg")
    assert main(["predict", str(run), str(tmp_path / "paper.jpg"), "--invert"]) == 0
    assert capsys.readouterr().out.split("  ")[1] == lines[0].split("  ")[1]


def test_config_file_and_resume_take_the_run_s_own_options(tmp_path, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_text("epochs: 2\nlr: 1e-3\nmodel_args:\n  activation: tanh\n")
    out = tmp_path / "run"
    original = loop.batches

    def interrupted(*args, train=None, **kwargs):
        if train is not None and train[1] == 2:
            raise KeyboardInterrupt
        return original(*args, train=train, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", interrupted)
        argv = ["train", "--config", str(tmp_path / "c.yaml"), "--batch-size", "64", "--out", str(out)]
        assert main(argv) == 130
    assert f"stopped; continue with: fastcnn train --resume --out {out}" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["model_args"] == {"activation": "tanh"}
    assert "was begun with lr 0.001 and cannot be resumed with 0.5" in fails(
        capsys, "train", "--resume", "--out", out, "--lr", "0.5"
    )
    assert main(["train", "--resume", "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "resuming after epoch 1" in printed and "epoch   2/2" in printed and "epoch   1/2" not in printed
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert "nothing to resume" in capsys.readouterr().out


def test_summary_of_a_network(tmp_path, capsys):
    files = ["--csv", str(tmp_path / "rows.csv"), "--json", str(tmp_path / "all.json")]
    assert main(["study", "summary", "lenet5", "--batch", "4", "--num-classes", "3", *files]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("lenet5, input 32x32x1\n") and "numbers of 4 images" in printed
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 9
    assert json.loads((tmp_path / "all.json").read_text())["parameters"] == 61_706 - 7 * 85
    assert main(["study", "summary", "fastcnn:lenet5", "--in-chans", "3", "--depth", "1"]) == 0
    assert "input 32x32x3" in capsys.readouterr().out
    assert main(["study", "summary", "torchvision:alexnet", "--image-size", "128"]) == 0
    assert "features.0" in capsys.readouterr().out


def test_networks_are_listed(tmp_path, capsys):
    picture = tmp_path / "a.png"
    assert main(["models", "lenet*", "--results", str(tmp_path), "--plot", str(picture)]) == 0
    captured = capsys.readouterr()
    assert "61,706" in captured.out and "counting" not in captured.err
    assert Image.open(picture).width > 500


def test_explain_and_env(run, capsys):
    assert main(["explain", str(run)]) == 0
    assert capsys.readouterr().out == (run / "kernels.txt").read_text()
    assert main(["explain"]) == 0
    assert "relu" in capsys.readouterr().out
    assert main(["env"]) == 0
    assert "torch" in capsys.readouterr().out


def command(*argv, **kwargs):
    argv = [sys.executable, "-m", "fastcnn", *map(str, argv)]
    # in the background of a script the tests may have been told to ignore Ctrl-C, and their children with them
    heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds, **kwargs)


def test_as_a_process(tmp_path):
    """One mistake, and Ctrl-C in a running training, at once."""
    mistake = command("train", "--model", "lenet")
    training = command("train", "--epochs", 1000, "--out", tmp_path / "run", env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while not (tmp_path / "run" / "last.pt").exists() and training.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    training.send_signal(signal.SIGINT)
    _, err = training.communicate(timeout=60)
    assert training.returncode == 130
    assert err.strip() == f"fastcnn: stopped; continue with: fastcnn train --resume --out {tmp_path / 'run'}"
    out, err = mistake.communicate(timeout=60)
    assert mistake.returncode == 2 and out == ""
    known = ", ".join(list_models())
    assert err == f"fastcnn: error: unknown model 'lenet': did you mean 'lenet5'? there are {known}\n"
