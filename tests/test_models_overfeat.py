"""OverFeat, and detection with a classifier's windows."""

import copy
import doctest

import pytest
import torch
from torch import nn

import fastcnn
from fastcnn.models import Detector, create_model, detection, merge_boxes, to_fully_convolutional


def multiply_adds(name):
    """Of the convolutions and linear layers for one image."""
    counts = []

    def count(module, args, out):
        counts.append(module.weight[0].numel() * out[0].numel())

    with torch.device("meta"):
        model = create_model(name).eval()
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        model(torch.empty(1, 3, model.image_size, model.image_size))
    return sum(counts)


def test_multiply_adds_are_the_papers_connections():
    # table 4: 2810 and 5369 million
    assert multiply_adds("overfeat") == 2_801_403_904
    assert multiply_adds("overfeat_accurate") == 5_355_446_784


@pytest.mark.parametrize(
    "name, strides, shapes",
    [
        # tables 1 and 3: the maps that the layers read
        ("overfeat", 32, [(28, 28), (12, 12), (12, 12), (12, 12), (6, 6)]),
        ("overfeat_accurate", 36, [(36, 36), (15, 15), (15, 15), (15, 15), (15, 15), (5, 5)]),
    ],
)
def test_maps_are_the_papers(name, strides, shapes):
    with torch.device("meta"):
        model = create_model(name)
        images = torch.empty(1, 3, model.image_size, model.image_size)
        assert [tuple(x.shape[2:]) for x in model.run(images, model.feature_stages)[1].values()] == shapes
        slid = to_fully_convolutional(model, model.image_size)
        assert slid.stride == (strides, strides)
        # table 5 of the paper, the smallest two scales: 1x1 and 2x3 windows
        if name == "overfeat_accurate":
            assert slid(torch.empty(1, 3, 245, 245)).shape == (1, 1000, 1, 1)
            assert slid(torch.empty(1, 3, 281, 317)).shape == (1, 1000, 2, 3)


def test_first_weights():
    model = create_model("overfeat", widths=(8, 8, 8, 64, 64), hidden=(16, 16), image_size=103)
    assert float(model.features[10].weight.detach().std()) == pytest.approx(0.01, rel=0.03)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"images of shape \[N, 3, 231, 231\], got \[1, 3, 240, 240\]"):
        with torch.device("meta"):
            create_model("overfeat")(torch.empty(1, 3, 240, 240))
    with pytest.raises(ValueError, match="image_size is too small"):
        create_model("overfeat", image_size=60)
    with pytest.raises(ValueError, match="widths must have 5 numbers and hidden 2"):
        create_model("overfeat", widths=(8, 8))


def tiny_detector():
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, 32), nn.ReLU(), nn.Linear(32, 2),
    )  # fmt: skip
    return Detector(model, 31 - 2, hidden=(64, 32))


def test_boxes_are_those_of_the_windows():
    detector = tiny_detector().double()
    slid = detector.classifier
    assert slid.window == (29, 29) and slid.stride == (4, 4) and slid.features_shape == (32, 4, 4)
    images = torch.randn(2, 1, 33, 41, dtype=torch.float64)
    scores, boxes = detector(images)
    assert scores.shape == (2, 2, 2, 4) and boxes.shape == (2, 4, 2, 4)
    for i, j in [(0, 0), (1, 0), (1, 3)]:
        window = images[:, :, 4 * i : 4 * i + 29, 4 * j : 4 * j + 29]
        alone, box = detector(window)
        torch.testing.assert_close(scores[:, :, i, j], alone[:, :, 0, 0])
        moved = box[:, :, 0, 0] + torch.tensor([4 * j, 4 * i, 0, 0])
        torch.testing.assert_close(boxes[:, :, i, j], moved)
        features = slid.features(window)
        in_units = detector.regressor(features)[:, :, 0, 0]
        torch.testing.assert_close(box[:, :, 0, 0], in_units * 29)


def test_regression_follows_the_strides_of_the_classifier():
    # the head pools 4x4 features to 2x2: windows are two features apart
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    detector = Detector(model, 9, hidden=(4, 4))
    scores, boxes = detector(torch.randn(1, 3, 21, 17))
    assert detector.classifier.stride == (4, 4) and detector.classifier.features_stride == (2, 2)
    assert scores.shape[2:] == boxes.shape[2:] == (4, 3)


def test_of_networks_of_ours():
    with fastcnn.backend("torch"):
        detector = Detector(create_model("lenet5"), 32, hidden=(8, 4))
        scores, boxes = detector(torch.randn(1, 1, 36, 44))
        assert scores.shape == (1, 10, 2, 4) and boxes.shape == (1, 4, 2, 4)
        (scores.square().mean() + boxes.square().mean()).backward()
        assert all(p.grad is not None for p in detector.parameters())
        plain = Detector(create_model("lenet5", fused=False), 32, hidden=(8, 4))
        images = torch.randn(1, 1, 40, 36)
        compiled = torch.compile(plain, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), plain(images))


def test_box_loss():
    detector = tiny_detector()
    true = torch.tensor([[2.0, 3.0, 10.0, 8.0], [100.0, 100.0, 5.0, 5.0]])
    boxes = true[:, :, None, None].expand(2, 4, 2, 3).clone()
    assert detector.box_loss(boxes, true) == 0
    boxes[0, 2, 0, 0] += 2.9  # a tenth of a window wider; the last column sees 4 of its 10 pixels
    boxes[1] += 50  # no window sees this one
    assert float(detector.box_loss(boxes, true)) == pytest.approx(0.01 / 4 / 4)
    # windows of 29 pixels, 4 apart: half of this box is in the second and third column
    true = torch.tensor([[27.0, 0.0, 8.0, 8.0]]).expand(2, 4)
    boxes = true[:, :, None, None].expand(2, 4, 1, 3).clone()
    boxes[:, 0, :, 0] += 1000
    assert detector.box_loss(boxes, true) == 0
    boxes[:, 0, :, 1] += 29
    assert float(detector.box_loss(boxes, true)) == pytest.approx(1 / 4 / 2)
    with pytest.raises(ValueError, match=r"true must be one box \[x, y, w, h\] an image, \[2, 4\], got \[2, 5\]"):
        detector.box_loss(boxes, torch.zeros(2, 5))


def test_merged_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [50.0, 50, 20, 20], [2.0, 2, 10, 10], [1.0, 1, 10, 10]])
    merged, scores = merge_boxes(boxes, torch.tensor([0.5, 0.9, 0.5, 0.4]))
    # the first with the last (or the third), their average with what is left
    assert scores.tolist() == pytest.approx([1.4, 0.9])
    torch.testing.assert_close(merged[1], boxes[1])
    assert (merged[0] - torch.tensor([1.0, 1, 10, 10])).abs().max() <= 0.5
    apart, scores = merge_boxes(boxes, torch.ones(4), limit=0)
    assert len(apart) == 4
    same, scores = merge_boxes(boxes[:1].repeat(3, 1), torch.ones(3), limit=0)
    assert same.tolist() == boxes[:1].tolist() and scores.tolist() == [3]
    assert merge_boxes(boxes[:0], torch.ones(0))[0].shape == (0, 4)
    # of one centre, but not of one size
    inside = torch.tensor([[0.0, 0, 20, 20], [8.0, 8, 4, 4]])
    assert len(merge_boxes(inside, torch.ones(2))[0]) == 2


def squares(count, size, generator):
    """Images with a bright square, none in every third, and its box."""
    side = torch.randint(6, 13, (count,), generator=generator)
    corner = torch.stack([(torch.rand(count, generator=generator) * (size - side)).long() for _ in range(2)], 1)
    boxes = torch.cat([corner, side[:, None], side[:, None]], 1).float()
    images = 0.1 * torch.randn(count, 1, size, size, generator=generator)
    shown = torch.arange(count) % 3 > 0
    for image, (x, y, w, h), there in zip(images, boxes.long(), shown, strict=True):
        if there:
            image[0, y : y + h, x : x + w] += 1
    return images, boxes, shown


def overlap(one, two):
    low, high = torch.maximum(one[:2], two[:2]), torch.minimum(one[:2] + one[2:], two[:2] + two[2:])
    shared = (high - low).clamp(min=0).prod()
    return float(shared / (one[2:].prod() + two[2:].prod() - shared))


def test_finds_squares_in_larger_images():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    detector = tiny_detector()
    optimizer = fastcnn.optim.Adam(detector.parameters(), lr=2e-3)
    for _ in range(150):
        images, boxes, shown = squares(48, 29, generator)
        scores, found = detector(images)
        loss = nn.functional.cross_entropy(scores.flatten(1), shown.long())
        loss = loss + 10 * detector.box_loss(found[shown], boxes[shown])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, boxes, shown = squares(24, 49, generator)
    # the second class is a square; scores of windows that see a part of it are left to chance
    overlaps = []
    for found, box, there in zip(detector.detect(images, top=2), boxes, shown, strict=True):
        found = found["boxes"][found["labels"] == 1]
        if there:
            overlaps.append(overlap(found[0], box) if len(found) else 0.0)
    assert len(overlaps) == 16 and sum(o > 0.5 for o in overlaps) >= 13, overlaps
    both = detector.detect(images[1:2], scales=(1.0, 1.5), top=2)[0]
    best = both["boxes"][both["labels"] == 1][0]
    assert overlap(best, boxes[1]) > 0.5


def test_detections():
    detector = tiny_detector()
    images = torch.randn(3, 1, 40, 44)
    before = copy.deepcopy(detector.state_dict())
    found = detector.detect(images, top=2, threshold=0.0)
    assert len(found) == 3
    for one in found:
        assert one["boxes"].shape == (len(one["scores"]), 4) and one["labels"].shape == one["scores"].shape
        assert (one["scores"].diff() <= 0).all() and not one["boxes"].requires_grad
        # every window votes for both classes
        assert float(one["scores"].sum()) == pytest.approx(3 * 4, rel=1e-4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in detector.state_dict().items())
    assert all(len(one["boxes"]) == 0 for one in detector.detect(images, threshold=1.1))
    for top in (0, 3):
        with pytest.raises(ValueError, match=f"top must be of 1 to 2, the number of classes, got {top}"):
            detector.detect(images, top=top)
    with pytest.raises(ValueError, match="of at least 29 x 29"):
        detector.detect(images, scales=(0.5,))


def test_boxes_of_resized_images_are_pixels_of_the_image():
    detector = tiny_detector()
    images = torch.randn(1, 1, 20, 35)
    # 20 * 1.46 = 29.2, 35 * 1.46 = 51.1
    resized = nn.functional.interpolate(images, (29, 51), mode="bilinear", antialias=True)
    with torch.no_grad():
        scores, boxes = detector(resized)
        boxes = boxes[0].flatten(1).t() * torch.tensor([35 / 51, 20 / 29, 35 / 51, 20 / 29])
        probabilities = scores.softmax(1)[0].flatten(1)
        expected, votes = merge_boxes(boxes, probabilities[probabilities.amax(1).argmax()])
    found = detector.detect(images, scales=(1.46,), threshold=0.0)[0]
    torch.testing.assert_close(found["boxes"], expected)
    torch.testing.assert_close(found["scores"], votes)


def test_docstring_examples_run():
    names = {"torch": torch, "fastcnn": fastcnn, "create_model": create_model}
    found = doctest.DocTestFinder().find(detection, extraglobs=names)
    assert sum(doctest.DocTestRunner().run(test).attempted for test in found if test.examples) > 0
