"""Checkpoints under kill -9, bit flips, truncation and other people's files."""

import os
import pickle
import random
import signal
import time
import zipfile

import pytest
import torch

from fastcnn.models import create_model
from fastcnn.train.checkpoint import FORMAT, load_checkpoint, load_weights, save_checkpoint, write_atomically


def state(version=0, size=1000):
    return {"config": {"model": "lenet5"}, "epoch": version, "model": {"weight": torch.full((size,), float(version))}}


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "last.pt", state(7))
    return tmp_path / "last.pt"


def test_round_trip(path):
    loaded = load_checkpoint(path)
    assert loaded["epoch"] == 7 and torch.equal(loaded["model"]["weight"], torch.full((1000,), 7.0))
    assert os.listdir(path.parent) == ["last.pt"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_kill_during_a_save_leaves_a_whole_checkpoint(path):
    random.seed(0)
    temporaries = 0
    for _ in range(12):
        before = load_checkpoint(path)["epoch"]
        child = os.fork()
        if child == 0:
            for version in range(before + 1, before + 10**6):
                save_checkpoint(path, state(version, 500_000))
        time.sleep(0.02 + random.random() * 0.06)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        temporaries += (path.parent / "last.pt.tmp").exists()
        loaded = load_checkpoint(path)
        assert loaded["epoch"] >= before and (loaded["model"]["weight"] == loaded["epoch"]).all()
    assert loaded["epoch"] > 7, "no save was finished"
    assert temporaries, "no save was interrupted: the test proves nothing"
    save_checkpoint(path, state(8))
    assert os.listdir(path.parent) == ["last.pt"]


def test_a_failed_write_keeps_the_old_file(path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot write .*last.pt .No space left on device.; its previous content is kept"):
        save_checkpoint(path, state(8))
    assert load_checkpoint(path)["epoch"] == 7 and os.listdir(path.parent) == ["last.pt"]


def test_flipped_bits_are_refused(path):
    content = path.read_bytes()
    whole = load_checkpoint(path)
    random.seed(1)
    refused = 0
    for _ in range(100):
        bit = random.randrange(len(content) * 8)
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            loaded = load_checkpoint(path)
        except ValueError:
            refused += 1
        else:
            # a bit outside what is read, such as padding or a time stamp
            assert torch.equal(loaded["model"]["weight"], whole["model"]["weight"])
            assert {**loaded, "model": None} == {**whole, "model": None}
    assert refused >= 60


def test_a_flipped_bit_in_the_weights_is_refused(path):
    with zipfile.ZipFile(path) as archive:
        weights = max(archive.infolist(), key=lambda part: part.file_size)
    content = bytearray(path.read_bytes())
    content[weights.header_offset + 500] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch does not notice
    with pytest.raises(ValueError, match="last.pt is damaged: the checksum of its part .*data/0 is wrong"):
        load_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99, -1])
def test_truncated_is_refused(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="last.pt is not a whole checkpoint"):
        load_checkpoint(path)


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_other_files_are_refused(path, tmp_path):
    mark = tmp_path / "executed"
    for content in (b"not a checkpoint", pickle.dumps({"format": FORMAT}), pickle.dumps(Hostile(mark))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="last.pt is not a whole checkpoint"):
            load_checkpoint(path)
    torch.save({"format": FORMAT, "model": Hostile(mark)}, path)
    with pytest.raises(ValueError, match="last.pt is not a whole checkpoint"):
        load_checkpoint(path)
    assert not mark.exists()
    for other in (torch.zeros(3), {"epoch": 1}, {"format": "fastcnn checkpoint 0"}):
        torch.save(other, path)
        with pytest.raises(ValueError, match="last.pt is not a checkpoint of fastcnn train"):
            load_checkpoint(path)
    for model in (None, 5, {"weight": 5}):
        save_checkpoint(path, {"model": model})
        with pytest.raises(ValueError, match="last.pt holds no weights"):
            load_checkpoint(path)
    with pytest.raises(ValueError, match="cannot read the checkpoint .*none.pt: No such file"):
        load_checkpoint(tmp_path / "none.pt")


def test_a_tensor_larger_than_its_file_is_refused(path):
    save_checkpoint(path, {"model": {"weight": torch.zeros(1).expand(10**12)}})
    assert path.stat().st_size < 3000
    with pytest.raises(ValueError, match="without the bytes for it"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weights: weights.pop("conv1.weight"), "does not fit a LeNet5: it lacks conv1.weight"),
        (lambda weights: weights.update(fc9=torch.zeros(1)), "it has the unknown fc9"),
        (lambda weights: weights.update({"fc3.bias": torch.zeros(7)}), "it has another shape of fc3.bias"),
    ],
)
def test_weights_of_another_model_are_refused(path, change, message):
    weights = create_model("lenet5").state_dict()
    change(weights)
    model = create_model("lenet5")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, {"model": weights}, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_write_atomically_to_nowhere(tmp_path):
    with pytest.raises(OSError, match="cannot write .*none"):
        write_atomically(tmp_path / "none" / "file", b"")
