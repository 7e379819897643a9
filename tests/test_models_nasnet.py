"""What is NASNet's own; the rest is in tests/test_architectures.py."""

import pytest
import torch
from conftest import INTERPRET
from test_architectures import assert_same, hostile, step
from test_chain_bytes import saved_bytes
from torch import nn

import fastcnn
from fastcnn.benchmarks import networks
from fastcnn.models import create_model
from fastcnn.nn.blocks import unfuse
from fastcnn.nn.nasnet_blocks import NormalCell, ReductionCell, SameConv2d


def theirs():
    networks.import_torchvision()
    from timm.models import nasnet

    return nasnet


def gradients(cell, x, previous):
    """Output, gradients and buffers of a cell, or of a function of (x, previous) with the cell's parameters."""
    x, previous = (t.clone().requires_grad_() for t in (x, previous))
    out = cell(x, previous)
    out.backward(torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out))
    return {"out": out.detach(), "x": x.grad, "previous": previous.grad}


def state(cell):
    return {name: p.grad for name, p in cell.named_parameters()} | dict(cell.named_buffers())


# timm's cells take (x, previous), but for those of its stem: (x), (previous, x)
CELLS = {
    "CellStem0": (lambda m: m.CellStem0(6, 4, "same"), lambda: ReductionCell(6, None, 4), 6, 6, 1),
    "CellStem1": (lambda m: m.CellStem1(6, 4, "same"), lambda: ReductionCell(8, 6, 4, True), 8, 6, 2),
    "FirstCell": (lambda m: m.FirstCell(6, 2, 8, 4, "same"), lambda: NormalCell(8, 6, 4, True), 8, 6, 2),
    "NormalCell": (lambda m: m.NormalCell(6, 4, 8, 4, "same"), lambda: NormalCell(8, 6, 4), 8, 6, 1),
    "ReductionCell0": (lambda m: m.ReductionCell0(6, 4, 8, 4, "same"), lambda: ReductionCell(8, 6, 4), 8, 6, 1),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [(8, 7), (5, 6), (7, 7)])
@pytest.mark.parametrize("name", CELLS)
def test_cells_are_timms(name, size, fused):
    build, ours, inputs, previous, larger = CELLS[name]
    cell, mine = hostile(build(theirs()).double()), ours().double()
    mine.load_state_dict(cell.state_dict())
    if not fused:
        unfuse(mine)
    torch.manual_seed(1)
    x = torch.randn(2, inputs, *size, dtype=torch.float64)
    # of the larger size, odd and even ones
    sizes = size if larger == 1 else [2 * n - n % 2 for n in size]
    p = torch.randn(2, previous, *sizes, dtype=torch.float64)
    call = {"CellStem0": lambda x, p: cell(x) + 0 * p.sum(), "CellStem1": lambda x, p: cell(p, x)}.get(name, cell)
    own = (lambda x, p: mine(x, x) + 0 * p.sum()) if name == "CellStem0" else mine
    with fastcnn.backend("torch"):
        found, expected = gradients(own, x, p), gradients(call, x, p)
    assert_same(found | state(mine), expected | state(cell))


@pytest.mark.nightly
# conv0 gives 34 x 16 and 17 x 33 pixels: cells that halve even and odd sizes, along each side
@pytest.mark.parametrize("size, fused", [((69, 34), True), ((36, 67), True), ((36, 67), False)])
def test_all_cells_are_timms(size, fused):
    """22 cells with few channels, their first weights, features and all."""
    torch.manual_seed(0)
    timms = theirs().NASNetALarge(num_classes=3, stem_size=4, num_features=24 * 4)
    torch.manual_seed(0)
    mine = create_model("nasnetalarge", num_classes=3, stem_size=4, filters=4, fused=fused)
    for key, tensor in timms.state_dict().items():
        assert torch.equal(mine.state_dict()[key], tensor), key
    timms, mine = hostile(timms.double()), mine.double()
    mine.load_state_dict(timms.state_dict())
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with fastcnn.backend("torch"):
        assert_same(step(mine, images), step(timms, images))
        mine.eval(), timms.eval()
        with torch.no_grad():
            torch.testing.assert_close(mine(images), timms(images))
            features = timms.forward_intermediates(images, intermediates_only=True)
            for a, b in zip(mine.to_features()(images), features, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize("size", [(7, 7), (8, 8), (7, 8), (6, 9), (2, 1)])
def test_padding_of_convolutions_with_a_stride(k, size):
    conv = SameConv2d(3, 3, k, 2, groups=3, bias=False)
    x = torch.randn(2, 3, *size)
    # every second pixel is a centre, and the last one
    dense = nn.functional.conv2d(x, conv.weight, padding=k // 2, groups=3)
    expected = dense[:, :, (size[0] - 1) % 2 :: 2, (size[1] - 1) % 2 :: 2]
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)


def test_cell_after_a_reduction():
    """It reads the map before the reduction's input, too, in the large network, and in the others that input itself."""
    seen = {}
    for skip in (True, False):
        options = dict(filters=4, cells=(1, 1), stem_size=4, skip_reduction=skip)
        model = create_model("nasnetalarge", num_classes=2, **options)
        for name in ("cell_stem_1", "cell_0"):
            model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out))
        model.cell_6.register_forward_pre_hook(lambda m, inputs: seen.__setitem__("read", inputs[1]))
        model(torch.randn(2, 3, 32, 32))
        assert torch.equal(seen["read"], seen["cell_stem_1" if skip else "cell_0"])


def test_bad_filters_and_images():
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        create_model("nasnetalarge", filters=6)
    with torch.device("meta"):
        for name, size in (("nasnet_mobile", 19), ("nasnet_a_cifar", 3)):
            model = create_model(name, cells=(1, 1, 1)).eval()
            assert model(torch.empty(1, 3, size, size)).shape[0] == 1
            with pytest.raises(ValueError, match=f"at least {size}"):
                model(torch.empty(1, 3, size - 1, size))


@pytest.mark.skipif(INTERPRET, reason="counts bytes, not what kernels compute")
def test_saved_bytes():
    options = dict(num_classes=2, filters=8, cells=(1, 1), stem_size=8)
    images = torch.randn(1, 3, 131, 131)
    eager = saved_bytes(create_model("nasnetalarge", fused=False, **options), images)
    share = saved_bytes(create_model("nasnetalarge", **options), images) / eager
    assert share <= 0.6, f"{share:.3f} of PyTorch's saved bytes"
