"""Data sets: small files in the true formats, and every way a file can be wrong."""

import gzip
import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastcnn.data import batches, load_data, read_image
from fastcnn.data.dataset import Arrays, shift_images, split_by_class, statistics

# ---- digits, splits, batches


def test_digits_split_is_fixed_and_stratified():
    data = load_data("digits")
    assert [len(split) for split in (data.train, data.val, data.test)] == [1257, 180, 360]
    assert data.train.images.shape == (1257, 1, 32, 32) and data.train.images.dtype == torch.uint8
    for split in (data.train, data.val, data.test):
        share = torch.bincount(split.labels, minlength=10) / len(split)
        assert share.min() > 0.09 and share.max() < 0.11
    # the split is part of every published number: it may never change
    assert data.test.labels[:12].tolist() == [0, 3, 4, 4, 5, 7, 8, 9, 9, 3, 9, 2]
    normal = data.input.normalise(data.train.images)
    assert abs(normal.mean()) < 1e-4 and abs(normal.std() - 1) < 1e-3


def test_splits_cover_everything_once():
    labels = torch.randint(0, 3, (57,))
    parts = split_by_class(labels, (7, 1, 2))
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(57))
    assert [len(part) for part in split_by_class(torch.zeros(1, dtype=torch.int64), (9, 1))] == [0, 1]


def test_statistics_are_exact():
    images = torch.randint(0, 256, (50, 3, 5, 7), dtype=torch.uint8)
    mean, std = statistics(images)
    scaled = images.double() / 255
    torch.testing.assert_close(torch.tensor(mean).double(), scaled.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.tensor(std).double(), scaled.std((0, 2, 3), correction=0), rtol=1e-6, atol=1e-7)
    assert statistics(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))[1] == [1 / 255]


def counted(n):
    """n images whose pixels all say which one it is."""
    return Arrays(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 6, 6).clone(), torch.arange(n))


def epoch(split, **kwargs):
    found = list(batches(split, 8, **kwargs))
    return torch.cat([images for images, _ in found]), torch.cat([labels for _, labels in found])


def test_batches_depend_on_seed_and_epoch_alone():
    split = counted(30)
    images, labels = epoch(split, train=(3, 5), augment=True)
    torch.rand(7)  # the global stream has no part in it
    before = torch.get_rng_state()
    again, labels_again = epoch(split, train=(3, 5), augment=True, workers=2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert sorted(labels.tolist()) == list(range(30))
    for other in ((3, 6), (4, 5)):
        assert not torch.equal(labels, epoch(split, train=other)[1])
    assert torch.equal(epoch(split)[1], torch.arange(30))


@pytest.mark.parametrize("n, sizes", [(16, [8, 8]), (20, [8, 8, 4]), (17, [8, 9]), (9, [9]), (1, [1])])
def test_a_left_over_image_joins_the_last_batch(n, sizes):
    assert [len(labels) for _, labels in batches(counted(n), 8)] == sizes


def test_shift_moves_down_and_right_and_fills_with_black():
    images = torch.randint(1, 256, (25, 3, 6, 5), dtype=torch.uint8)
    offsets = torch.cartesian_prod(torch.arange(-2, 3), torch.arange(-2, 3))
    shifted = shift_images(images, offsets)
    for image, (down, right), result in zip(images, offsets.tolist(), shifted, strict=True):
        expected = torch.zeros_like(image)
        for row in range(6):
            for col in range(5):
                if 0 <= row - down < 6 and 0 <= col - right < 5:
                    expected[:, row, col] = image[:, row - down, col - right]
        assert torch.equal(result, expected)
    # a grey image must not look like channels_last: the whole network would follow
    grey = images[:, :1].contiguous()
    assert shift_images(grey, offsets).stride() == grey.stride() == (30, 30, 5, 1)


@pytest.mark.parametrize("name, near", [("digit", "digits"), ("MNIST", "mnist"), ("cifar-10", "cifar10")])
def test_unknown_data_set_suggests_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"unknown data set '{name}': did you mean '{near}'"):
        load_data(name)


# ---- MNIST


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def write_mnist(folder, train=40, test=12, packed=False, size=28):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", train), ("t10k", test)):
        arrays[part] = random.integers(0, 256, (n, size, size), np.uint8), (np.arange(n) % 10).astype(np.uint8)
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays[part], strict=True):
            content = idx(array)
            path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return arrays


@pytest.mark.parametrize("packed, inside", [(False, ""), (True, "MNIST/raw")])
def test_mnist(tmp_path, packed, inside):
    arrays = write_mnist(tmp_path / inside, packed=packed)
    data = load_data("mnist", tmp_path)
    assert [len(split) for split in (data.train, data.val, data.test)] == [36, 4, 12]
    images, labels = arrays["t10k"]
    assert data.test.images.shape == (12, 1, 32, 32)
    assert np.array_equal(data.test.images[:, 0, 2:-2, 2:-2], images) and data.test.labels.tolist() == labels.tolist()
    assert data.test.images.sum() == images.sum(dtype=np.int64)


def test_mnist_absent_is_named(tmp_path):
    with pytest.raises(ValueError, match="no train-images-idx3-ubyte.*t10k-labels-idx1-ubyte.*IDX.*--data-dir"):
        load_data("mnist", tmp_path / "nowhere")
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="mnist: no t10k-labels-idx1-ubyte "):
        load_data("mnist", tmp_path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda b: b[:-1], "is truncated: the shape .* needs exactly 9408 bytes"),
        (lambda b: b + b"x", "has bytes left over"),
        (lambda b: b[:9], "is not an IDX file"),
        (lambda b: b"", "is not an IDX file"),
        (lambda b: b"\x89PNG" + b[4:], "is not an IDX file"),
        (lambda b: b[:4] + struct.pack(">3i", 2**31 - 1, 28, 28) + b[16:], "claims the absurd shape"),
        (lambda b: b[:4] + struct.pack(">3i", -1, 28, 28) + b[16:], "claims the absurd shape"),
        (lambda b: b[:4] + struct.pack(">3i", 6, 56, 28) + b[16:], "images of 56x28 pixels, expected 28x28"),
        (lambda b: b[:4] + struct.pack(">3i", 11, 28, 28) + b[16 : 16 + 11 * 784], "11 images and .* 12 labels"),
    ],
)
def test_mnist_damaged_images(tmp_path, damage, message):
    write_mnist(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"t10k-images-idx3-ubyte {message}|{message}"):
        load_data("mnist", tmp_path)


def test_mnist_damaged_gzip_and_label(tmp_path):
    write_mnist(tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:1000] + b"????" + whole[1004:], b"not gzip"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz"):
            load_data("mnist", tmp_path)
    path.write_bytes(whole)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.full(12, 10, np.uint8))))
    with pytest.raises(ValueError, match="holds the label 10, expected 0 to 9"):
        load_data("mnist", tmp_path)


# ---- CIFAR


def cifar_arrays(n, classes):
    return np.random.default_rng(n).integers(0, 256, (n, 3072), np.uint8), [i % classes for i in range(n)]


def write_cifar(folder, name, protocol=2, keys=str.encode):
    """The Python version. protocol 2 and bytes keys are what the original archive has."""
    folder.mkdir(parents=True)
    ten = name == "cifar10"
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    for file in files:
        pixels, labels = cifar_arrays(20, 10 if ten else 100)
        batch = {"data": pixels, "labels" if ten else "fine_labels": labels, "filenames": ["a.png"] * 20}
        (folder / file).write_bytes(pickle.dumps({keys(k): v for k, v in batch.items()}, protocol))
    names = [f"class{i}".encode() for i in range(10 if ten else 100)]
    meta = {keys("label_names" if ten else "fine_label_names"): names}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta, protocol))


@pytest.mark.parametrize("protocol, keys", [(2, str.encode), (4, str)])
def test_cifar10_pickles(tmp_path, protocol, keys):
    write_cifar(tmp_path / "cifar-10-batches-py", "cifar10", protocol, keys)
    data = load_data("cifar10", tmp_path)
    assert [len(split) for split in (data.train, data.val, data.test)] == [90, 10, 20]
    pixels, labels = cifar_arrays(20, 10)
    assert np.array_equal(data.test.images, pixels.reshape(20, 3, 32, 32)) and data.test.labels.tolist() == labels
    assert data.classes[3] == "class3" and data.input.channels == 3


def test_cifar100_pickles_in_the_folder_itself(tmp_path):
    write_cifar(tmp_path / "here", "cifar100")
    data = load_data("cifar100", tmp_path / "here")
    assert len(data.classes) == 100 and len(data.train) == 18
    assert data.test.labels.tolist() == list(range(20))


@pytest.mark.parametrize("name, coarse", [("cifar10", 0), ("cifar100", 1)])
def test_cifar_binary(tmp_path, name, coarse):
    folder = tmp_path / ("cifar-100-binary" if coarse else "cifar-10-batches-bin")
    folder.mkdir()
    pixels, labels = cifar_arrays(20, 10)
    rows = b"".join(bytes([7] * coarse + [label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True))
    files = ["train.bin", "test.bin"] if coarse else [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for file in files:
        (folder / file).write_bytes(rows)
    names = folder / ("fine_label_names.txt" if coarse else "batches.meta.txt")
    names.write_text("\n".join(f"class{i}" for i in range(100 if coarse else 10)) + "\n\n")
    data = load_data(name, tmp_path)
    assert np.array_equal(data.test.images, pixels.reshape(20, 3, 32, 32)) and data.test.labels.tolist() == labels
    (folder / files[-1]).write_bytes(rows[:-5])
    with pytest.raises(ValueError, match=f"{files[-1]} is truncated"):
        load_data(name, tmp_path)


def test_cifar_absent_is_named(tmp_path):
    with pytest.raises(ValueError, match="cifar10: neither cifar-10-batches-py/ with data_batch_1.*--data-dir"):
        load_data("cifar10", tmp_path)
    write_cifar(tmp_path / "cifar-10-batches-py", "cifar10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(ValueError, match="cifar-10-batches-py lacks data_batch_3"):
        load_data("cifar10", tmp_path)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def batch_of(pixels, labels):
    return pickle.dumps({b"data": pixels, b"labels": labels}, 2)


GOOD_PIXELS, GOOD_LABELS = cifar_arrays(20, 10)


@pytest.mark.parametrize(
    "content, message",
    [
        (pickle.dumps({b"data": Hostile()}), "asks for (posix|nt).mkdir"),
        (batch_of(GOOD_PIXELS, GOOD_LABELS)[:-500], "test_batch is not a readable CIFAR file"),
        (b"", "test_batch is not a readable CIFAR file"),
        (pickle.dumps([1, 2]), "holds a list, expected a dict"),
        (pickle.dumps({b"labels": GOOD_LABELS}, 2), "lacks the array 'data'"),
        (batch_of(GOOD_PIXELS.astype(np.float32), GOOD_LABELS), "array of b?'f4', expected bytes"),
        (batch_of(GOOD_PIXELS[:, :3000].copy(), GOOD_LABELS), r"array of shape \(20, 3000\) for 20 images"),
        (batch_of(np.asfortranarray(GOOD_PIXELS), GOOD_LABELS), "of a form CIFAR does not have"),
        (batch_of(GOOD_PIXELS, GOOD_LABELS[:-1]), r"array of shape \(20, 3072\) for 19 images"),
        (batch_of(GOOD_PIXELS, [10] * 20), "a label outside 0 to 9"),
        (batch_of(GOOD_PIXELS, ["x"] * 20), "labels that are no whole numbers"),
    ],
    ids="code truncated empty list no-data floats narrow fortran labels-short label-10 label-x".split(),
)
def test_cifar_damaged_or_hostile(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "cifar-10-batches-py", "cifar10")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_data("cifar10", tmp_path)
    assert not os.path.exists("executed")


# ---- images


def picture(mode="RGB", size=(40, 30), color=None):
    rgb = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8))
    return rgb.convert(mode) if color is None else Image.new(mode, size, color)


def saved(image, kind, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "image, kind, rgb",
    [
        (picture("RGB", color=(200, 100, 50)), "PNG", (200, 100, 50)),
        (picture("L", color=77), "PNG", (77, 77, 77)),
        (picture("RGB", color=(200, 100, 50)).quantize(4), "PNG", (200, 100, 50)),
        (picture("RGB", color=(200, 100, 50)).convert("P"), "GIF", None),
        (picture("1", color=1), "PNG", (255, 255, 255)),
        (picture("RGBA", color=(200, 100, 50, 255)), "PNG", (200, 100, 50)),
        (picture("RGBA", color=(200, 100, 50, 0)), "PNG", (255, 255, 255)),
        (picture("LA", color=(0, 0)), "PNG", (255, 255, 255)),
        (picture("I;16", color=128 * 257), "PNG", (128, 128, 128)),
        (picture("RGB", color=(200, 100, 50)), "JPEG", (200, 100, 50)),
        (picture("CMYK", color=(0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (picture("L", color=77), "JPEG", (77, 77, 77)),
        (picture("RGB", (1, 1), (9, 8, 7)), "PNG", (9, 8, 7)),
        (picture("RGB", (1, 5000), (9, 8, 7)), "PNG", (9, 8, 7)),
    ],
    ids=lambda value: f"{value.mode}-{value.size[0]}x{value.size[1]}" if isinstance(value, Image.Image) else str(value),
)
def test_images_of_every_kind(tmp_path, image, kind, rgb):
    path = tmp_path / "wrong-ending.png"
    path.write_bytes(saved(image, kind))
    for channels in (1, 3):
        pixels = read_image(path, channels, 8)
        assert pixels.shape == (channels, 8, 8) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
        if rgb is not None:
            expected = rgb if channels == 3 else (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2],)
            assert (pixels.float().mean((1, 2)) - torch.tensor(expected)).abs().max() < 3


def test_image_is_turned_upright(tmp_path):
    image = Image.new("RGB", (20, 20), "black")
    image.paste("white", (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it right
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = read_image(tmp_path / "turned.jpg", 1, 20)[0]
    assert pixels[:, 12:].min() > 200 and pixels[:, :8].max() < 50


def test_broken_exif_does_not_matter(tmp_path):
    content = saved(picture(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + b"\x01" * 30)
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.warns(UserWarning):
        assert read_image(tmp_path / "a.jpg", 3, 8).shape == (3, 8, 8)


PNG, JPEG = saved(picture(), "PNG"), saved(picture(), "JPEG")


def bomb():
    # a header alone: 30000 x 30000 pixels
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return PNG[:8] + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + PNG[33:]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"<html>404 not found</html>", "is not an image of a known kind"),
        (PNG[: len(PNG) // 2], "is truncated or corrupt"),
        (JPEG[: len(JPEG) // 2], "is truncated or corrupt"),
        (JPEG[:20], "is (truncated or corrupt|not an image)"),
        (PNG[:60] + b"\0\0\0\0" + PNG[64:], "is truncated or corrupt"),
        (bomb(), "claims more than .* pixels"),
        (saved(picture("F", color=0.5), "TIFF"), "holds floating-point pixels"),
    ],
    ids=["empty", "text", "half-png", "half-jpeg", "jpeg-head", "png-checksum", "bomb", "float"],
)
def test_bad_image_is_named(tmp_path, content, message):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.png {message}"):
        read_image(path, 3, 8)


def test_absent_image_is_named(tmp_path):
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    for name in ("none.png", "dangling.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read: No such file"):
            read_image(tmp_path / name, 3, 8)
    (tmp_path / "dir.png").mkdir()
    with pytest.raises(ValueError, match="dir.png cannot be read"):
        read_image(tmp_path / "dir.png", 3, 8)


# ---- folders


def write_folder(root, parts=("train", "val"), classes=("cat", "dog"), n=6):
    for part in parts:
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                color = (30 + 150 * label, 10 * i, 0)
                Image.new("RGB", (20 + i, 25), color).save(
                    root / part / name / f"{i}.{'png' if i % 2 else 'JPG'}", "PNG"
                )


def test_folder(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "cat" / "._0.png").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    data = load_data("folder", tmp_path, image_size=16)
    assert data.classes == ["cat", "dog"] and len(data.train) == 12 and data.test is None
    alone = list(batches(data.train, 5, train=(0, 1), augment=True))
    shared = list(batches(data.train, 5, train=(0, 1), augment=True, workers=2))
    for (images, labels), (images2, labels2) in zip(alone, shared, strict=True):
        assert images.shape[1:] == (3, 16, 16)
        assert torch.equal(images, images2) and torch.equal(labels, labels2)
    grey = load_data("folder", tmp_path, image_size=8, channels=1)
    assert next(iter(batches(grey.val, 4)))[0].shape == (4, 1, 8, 8)


def test_folder_bad_file_is_named_from_a_worker_too(tmp_path):
    write_folder(tmp_path)
    data = load_data("folder", tmp_path)
    (tmp_path / "train" / "dog" / "3.png").write_bytes(PNG[:100])
    for workers in (0, 1):
        with pytest.raises(ValueError, match="3.png is truncated or corrupt") as caught:
            list(batches(data.train, 4, train=(0, 1), workers=workers))
        assert "Traceback" not in str(caught.value)


def test_folder_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="no .*train and no .*val; expected ROOT/train/CLASS"):
        load_data("folder", tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="train has no class folders"):
        load_data("folder", tmp_path)
    write_folder(tmp_path / "b")
    (tmp_path / "b" / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"train.empty has no images \(.bmp"):
        load_data("folder", tmp_path / "b")
    (tmp_path / "b" / "train" / "empty").rmdir()
    (tmp_path / "b" / "val" / "extra").mkdir()
    with pytest.raises(ValueError, match="different classes: only one has extra"):
        load_data("folder", tmp_path / "b")
