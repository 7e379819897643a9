"""The benchmark of training steps: rows, gate, families, on small networks."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastcnn
from fastcnn.benchmarks import bench_models, networks, rows, training_step
from fastcnn.benchmarks.families import REST, _kernels, families, family
from fastcnn.benchmarks.harness import restored_switches

CPU = torch.device("cpu")
PROVIDERS = ["torch", "torch-nhwc", "fastcnn", "fastcnn-auto", "fastcnn-chain"]


class OwnReLU(nn.ReLU):
    """A user's layer, which is not to be touched."""


def small_network():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        OwnReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 16, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(16, 7),
    )


class WithAuxiliary(nn.Module):
    """Two classifiers in training, one in evaluation, as GoogLeNet."""

    def __init__(self):
        super().__init__()
        self.body, self.side = small_network(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7))

    def forward(self, x):
        return (self.body(x), self.side(x), None) if self.training else self.body(x)


@pytest.fixture
def small(monkeypatch):
    """networks.build("small") is a small network on 32x32 images; measuring takes no longer than it must."""
    made = {"small": small_network, "auxiliary": WithAuxiliary, "no classifier": lambda: nn.Conv2d(3, 4, 3)}
    monkeypatch.setattr(networks, "build", lambda name: made[name]().train())
    monkeypatch.setattr(networks, "input_shape", lambda name: (3, 32, 32))
    found = {"copy_gbs": 10.0, "matmul_tflops": {"float32": 0.1}}
    monkeypatch.setattr(bench_models, "ceilings", lambda device: found)
    measure = bench_models.measure
    monkeypatch.setattr(
        bench_models, "measure", lambda calls, device, seconds, **more: measure(calls, device, 0, **more)
    )


def test_rows(small, tmp_path, capsys):
    found = bench_models.run(["small"], PROVIDERS, CPU, True, tmp_path, parts=True)
    saved = rows.read_rows(tmp_path)
    assert len(saved) == len(found)
    for old, row in zip(saved, found, strict=True):
        assert {name: old[name] for name in row if name != "date"} == {n: v for n, v in row.items() if n != "date"}
    assert [(row["provider"], row["pass"]) for row in found] == [
        (p, label) for p in PROVIDERS for label in bench_models.PASSES
    ]
    assert len(rows.newest(found)) == len(found)
    by = {(row["provider"], row["pass"]): row for row in found}
    for provider in ("torch", "torch-nhwc", "fastcnn-auto", "fastcnn-chain"):
        step = by[provider, "step"]
        assert step["status"] == "ok" and step["samples"] >= 3 and 0 < step["p20"] <= step["ms"] <= step["p80"]
        parts = [by[provider, label] for label in ("forward", "backward", "optimizer")]
        assert 0 < max(part["ms"] for part in parts) <= step["p80"]
        assert step["flops"] == sum(part["flops"] for part in parts) > 0
        assert step["peak_bytes"] > step["saved_bytes"] > 0
        assert sum(step["families"].values()) == pytest.approx(step["ms"], rel=0.01)
        assert not any("families" in part for part in parts)
        assert step["noise"] == by["torch", "step"]["noise"] >= 0
    for label in bench_models.PASSES:
        row = by["fastcnn", label]
        assert row["status"] == "none" and "conv2d would fall back" in row["reason"] and row["ms"] is None
    text = capsys.readouterr().out
    assert "7 classes" in text and "fastcnn: none: conv2d" in text and REST in text and "optimizer ms" in text


def test_conv_is_the_largest_family_of_a_network_of_convs(small):
    images = torch.randn(8, 3, 32, 32)
    step = training_step.Step(small_network(), images, torch.zeros(8, dtype=torch.long), "torch", "contiguous", False)
    step()
    profiles = [families(step, CPU, 50.0) for _ in range(3)]
    for found in profiles:
        assert sum(found.values()) == pytest.approx(50.0)
        assert list(found)[-1] == REST and found[REST] > 0
    # the least of three: whatever else runs on this machine may stretch any op once
    found = {kind: min(profile[kind] for profile in profiles) for kind in profiles[0] if kind != REST}
    convs = found.pop("conv forward") + found.pop("conv backward")
    assert convs > max(found.values())
    assert {"norm", "activation", "pool", "linear", "loss", "optimizer"} <= set(found)
    assert found.get("other", 0) < 5


def test_families_of_our_kernels():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64 * 64, 3))
    step = training_step.Step(
        model, torch.randn(4, 4, 64, 64), torch.zeros(4, dtype=torch.long), "fastcnn-auto", "contiguous", False
    )
    with fastcnn.backend("cpu"):
        step()
        before = sum(op.calls.get(("cpu", None), 0) for op in fastcnn.backends.OPS if op.name == "batch_norm")
        found = families(step, CPU, 10.0)
        after = sum(op.calls.get(("cpu", None), 0) for op in fastcnn.backends.OPS if op.name == "batch_norm")
    assert after == before + 1
    assert found["norm"] > 0 and found["optimizer"] > 0


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["aten::cudnn_convolution", "aten::convolution", "aten::conv2d", "sm90_xmma_fprop_implicit_gemm"],
            "conv forward",
        ),
        (["aten::add_", "aten::_convolution", "aten::conv2d", "elementwise_kernel"], "conv forward"),
        (["aten::convolution_backward", "autograd::engine: ConvolutionBackward0", "sm90_xmma_gemm"], "conv backward"),
        (["nchwToNhwcKernel"], "copy / layout"),
        (["aten::copy_", "aten::_to_copy", "aten::to", "aten::conv2d"], "copy / layout"),
        (["aten::cat"], "copy / layout"),
        (["fastcnn::conv2d_backward_weight", "Conv2dFunctionBackward"], "conv backward"),
        (["conv2d_forward_kernel"], "conv forward"),
        (["batch_norm_statistics_kernel"], "norm"),
        (["aten::mm", "AddmmBackward0"], "linear"),
        (["fastcnn::linear"], "linear"),
        (["aten::threshold_backward", "ReluBackward0"], "activation"),
        (["aten::hardtanh_backward"], "activation"),
        (["fastcnn::max_pool2d"], "pool"),
        (["aten::nll_loss_backward", "NllLossBackward0"], "loss"),
        (["aten::_foreach_mul_", "Optimizer.step#SGD.step"], "optimizer"),
        (["sgd_kernel"], "optimizer"),
        (["aten::mul", "MulBackward0"], "elementwise"),
        (["triton_poi_fused_add_convolution_native_batch_norm_relu_3", "## Call CompiledFxGraph"], "norm"),
        (["triton_poi_fused__to_copy_convolution_1"], "elementwise"),
        (["triton_tem_fused_convolution_2"], "conv forward"),
        (["aten::nonzero"], "other"),
    ],
)
def test_family(names, expected):
    assert family(names) == expected


def test_kernels_of_a_gpu_profile_stand_under_the_op_that_launched_them():
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def op(number, name, parent=None):
        return SimpleNamespace(id=number, name=name, device_type=cpu, cpu_parent=parent)

    def kernel(name, op, ms, annotation=False):
        return SimpleNamespace(
            name=lambda: name,
            device_type=lambda: cuda,
            linked_correlation_id=lambda: op,
            duration_ns=lambda: ms * 1e6,
            is_user_annotation=lambda: annotation,
        )

    backward = op(1, "ConvolutionBackward0")
    # the runtime's own numbers may be the same as those of ops
    ops = [backward, op(2, "aten::convolution_backward", backward), op(3, "aten::add"), op(2, "cudaLaunchKernel")]
    kernels = [
        kernel("sm90_xmma_gemm_bf16", 2, 5.0),
        kernel("nchwToNhwcKernel", 2, 1.0),
        kernel("vectorized_elementwise_kernel", 3, 0.5),
        kernel("sgd_kernel", 0, 0.25),
        kernel("Optimizer.step#SGD.step", 0, 0.3),
        kernel("a range", 0, 0.3, annotation=True),
    ]
    result = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: kernels))
    found = _kernels(SimpleNamespace(events=lambda: ops, profiler=result))
    expected = [("conv backward", 5.0), ("copy / layout", 1.0), ("elementwise", 0.5), ("optimizer", 0.25)]
    assert [(family(names), ms) for names, ms in found] == expected


def test_failed_capture_is_a_reason_and_harms_nobody(small):
    images, labels = torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
    if torch.cuda.is_available():
        pytest.skip("captures succeed where there is a GPU")
    with restored_switches():
        found, refused = bench_models._time_graphs(
            small_network(), images, labels, ["torch-nhwc", "fastcnn-auto"], "contiguous", CPU, True
        )
    assert found == {} and {status for status, _ in refused.values()} == {"none"}
    assert all(reason.startswith("no CUDA graph: ") for _, reason in refused.values())


def test_provider_that_fails_while_timed_leaves_the_others(small, monkeypatch):
    forward, calls = fastcnn.nn.ReLU.forward, []

    def breaks(self, x):
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("broke later")
        return forward(self, x)

    monkeypatch.setattr(fastcnn.nn.ReLU, "forward", breaks)
    info = rows.run_info(CPU, bench_models.ceilings(CPU))
    found = bench_models.run_network("small", small_network(), ["torch", "fastcnn-auto"], CPU, True, info)
    assert {(row["provider"], row["status"]) for row in found} == {("torch", "ok"), ("fastcnn-auto", "FAIL")}
    assert all(row["noise"] is not None for row in found)
    assert {row["reason"] for row in found} == {None, "RuntimeError: broke later"}


def broken_value(self, x):
    return 1.2 * torch.relu(x)


def broken_gradient(self, x):
    return x + (torch.relu(x) - x).detach()


@pytest.mark.parametrize("broken", [broken_value, broken_gradient])
def test_wrong_layer_fails_and_has_no_time(small, tmp_path, monkeypatch, capsys, broken):
    monkeypatch.setattr(fastcnn.nn.ReLU, "forward", broken)
    found = bench_models.run(["small"], ["torch", "fastcnn-auto"], CPU, True, tmp_path)
    wrong = [row for row in found if row["provider"] == "fastcnn-auto"]
    assert {row["status"] for row in wrong} == {"FAIL"} and len(wrong) == 4
    assert all(row["ms"] is None and row["tflops"] is None and row["reason"] for row in wrong)
    assert all(row["ms"] for row in found if row["provider"] == "torch")
    assert "FAIL" in capsys.readouterr().out


def test_gate_compares_every_gradient():
    truth = torch.tensor(2.0), {"a": torch.ones(4), "b": torch.full((3,), 1e-3), "zero": torch.zeros(2)}
    yardstick = (1e-6, 1e-3)
    training_step.assert_gradients_close(truth, truth, yardstick)
    noise = {"a": torch.ones(4) + 1e-3, "b": truth[1]["b"] * 1.002, "zero": torch.full((2,), 1e-6)}
    training_step.assert_gradients_close((torch.tensor(2.0), noise), truth, yardstick)
    nan = torch.full((4,), torch.nan)
    for name, wrong in (("b", torch.zeros(3)), ("a", 1.1 * torch.ones(4)), ("a", nan), ("zero", torch.ones(2))):
        with pytest.raises(AssertionError, match=f"gradient of {name}: relative error"):
            training_step.assert_gradients_close((torch.tensor(2.0), noise | {name: wrong}), truth, yardstick)
    with pytest.raises(AssertionError, match="gradient of b: there"):
        training_step.assert_gradients_close((truth[0], {k: noise[k] for k in ("a", "zero")}), truth, yardstick)
    with pytest.raises(AssertionError, match="loss: 2.1, truth 2"):
        training_step.assert_gradients_close((torch.tensor(2.1), noise), truth, yardstick)


def test_layers_change_class_and_nothing_else():
    model = small_network()
    before = dict(model.named_parameters())
    training_step.with_layers(model, fastcnn.nn)
    kinds = [type(module) for module in model]
    assert kinds[:5] == [fastcnn.nn.Conv2d, fastcnn.nn.BatchNorm2d, fastcnn.nn.ReLU, fastcnn.nn.Conv2d, OwnReLU]
    assert kinds[5:] == [
        *(fastcnn.nn.MaxPool2d, fastcnn.nn.Conv2d, fastcnn.nn.AdaptiveAvgPool2d),
        *(nn.Flatten, fastcnn.nn.Dropout, fastcnn.nn.Linear),
    ]
    assert all(p is before[name] for name, p in model.named_parameters())
    training_step.with_layers(model, nn)
    assert [type(module) for module in model] == [type(module) for module in small_network()]


def test_torch_runs_torchs_layers_and_ours_run_ours():
    model, images, labels = networks.build("lenet5"), torch.randn(2, 1, 32, 32), torch.zeros(2, dtype=torch.long)
    for provider, library, optimizer in (("torch", nn, torch.optim), ("fastcnn-auto", fastcnn.nn, fastcnn.optim)):
        step = training_step.Step(model, images, labels, provider, "contiguous", False)
        assert type(step.model.conv1) is library.Conv2d and type(step.optimizer) is optimizer.SGD
    nhwc = training_step.Step(
        networks.build("resnet18"), torch.randn(2, 3, 32, 32), labels, "torch-nhwc", "contiguous", False
    )
    assert nhwc.images.is_contiguous(memory_format=torch.channels_last)
    assert nhwc.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_auxiliary_classifiers_count_a_third_less(small):
    torch.manual_seed(0)
    logits, other, labels = torch.randn(4, 7), torch.randn(4, 7), torch.arange(4)
    entropy = nn.functional.cross_entropy
    loss = training_step.loss_of(lambda images: (logits, other, None), entropy, None, labels)
    torch.testing.assert_close(loss, entropy(logits, labels) + 0.3 * entropy(other, labels))
    found = bench_models.run_network(
        "auxiliary", networks.build("auxiliary"), ["torch"], CPU, True, rows.run_info(CPU, bench_models.ceilings(CPU))
    )
    assert {row["status"] for row in found} == {"ok"}


def test_flops_are_those_of_products_and_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 5))
    found = bench_models._flops(model, (16, 3, 8, 8))
    conv, linear = 2 * 16 * 8 * 8 * 4 * 27, 2 * 16 * 256 * 5
    # the image needs no gradient
    assert found == {
        "forward": conv + linear,
        "backward": conv + 2 * linear,
        "optimizer": 0,
        "step": 2 * conv + 3 * linear,
    }


def test_deadline_and_mistakes(small, tmp_path, capsys):
    assert bench_models.run(["small"], PROVIDERS, CPU, True, tmp_path, time.monotonic() - 1) == []
    assert "out of time: 1 of 1 networks did not run (small)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no classifier does not"):
        bench_models.run(["no classifier"], PROVIDERS, CPU, True, tmp_path)


def test_switches_are_restored(small, tmp_path):
    before = torch.backends.cudnn.benchmark
    bench_models.run(["small"], ["torch-nhwc"], CPU, True, tmp_path)
    assert not fastcnn.backends.is_strict() and fastcnn.backends.current_backend() == "auto"
    assert torch.backends.cudnn.benchmark == before
    # dropout is off in what is compared alone
    assert training_step._without_randomness(small_network())[9].p == 0.0 and small_network()[9].p == 0.5
