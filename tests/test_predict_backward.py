"""One kernel for both gradients of a 1x1 convolution or two: the page and the choice are what the model says."""

from pathlib import Path

from fastcnn.benchmarks import predict_backward
from fastcnn.ops.chips import CHIPS
from fastcnn.ops.conv2d_backward_launch import TILES, Backward, apart, bands, choose, pays, tiles, together

RESULTS = Path(__file__).parent.parent / "benchmarks/results"
H100 = CHIPS["h100-sxm"]


def test_the_committed_page_is_the_model_s():
    assert (RESULTS / predict_backward.PAGE).read_text() == predict_backward.page(), "run `make results` and commit it"


def test_one_kernel_where_memory_bounds_and_filters_fit():
    chosen = {layer["name"]: pays(problem, H100) for layer, problem in predict_backward.layers("resnet50")}
    assert all(one for name, one in chosen.items() if name.startswith("layer1") or name == "layer2.0.conv1")
    assert not any(one for name, one in chosen.items() if name.startswith(("layer3", "layer4")))
    for network in predict_backward.NETWORKS:
        for _, problem in predict_backward.layers(network):
            tile = choose(problem, H100)
            expected = tile is not None and together(problem, tile, H100).seconds < apart(problem, H100).seconds
            assert pays(problem, H100) is expected


def test_bytes_are_those_of_the_tensors():
    # rows, 64 channels, 256 filters: y, its gradient, raw input, what is added, result
    image, dy = 2 * 1000 * 64, 2 * 1000 * 256
    layer = Backward(1000, 64, 256, corrected=True, x="pending", added=True)
    assert layer.bytes_apart == (2 * dy + 3 * image) + (2 * dy + image)
    assert layer.bytes_together(1) == 2 * dy + 3 * image
    assert layer.bytes_together(2) == 4 * dy + 3 * image
    join = Backward(1000, 64, 256, corrected=True, x="join", masked=True, added=True)
    assert join.bytes_apart == (2 * dy + 4 * image) + (2 * dy + image)
    assert join.bytes_together(1) == 2 * dy + 4 * image
    plain = Backward(1000, 64, 256, corrected=False)
    assert plain.bytes_apart == (dy + image) + (dy + image)
    assert plain.bytes_together(1) == dy + 2 * image


def test_bands_cover_every_pixel_once_on_every_chip():
    for chip in CHIPS.values():
        for tile, kinds in TILES.items():
            for x in {x for of_chip in kinds.values() for x in of_chip}:
                for rows in (1, 1000, 802816):
                    problem = Backward(rows, 2 * tile.block_c, tile.block_k, x=x)
                    if tile not in tiles(problem, chip):
                        continue
                    count, share, resident = bands(problem, tile, chip)
                    assert share % tile.block_m == 0 and (count - 1) * share < rows <= count * share
                    assert 2 * count <= max(2, chip.sms * resident)
