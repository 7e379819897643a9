"""One training step of a network as each provider runs it, its CUDA graph, and the gate: is what it computes right?

A step is what a training loop does: clear the gradients, forward, cross-entropy loss, backward, SGD with momentum.

The gate compares loss and all gradients with those in fp64. Rounding grows through a deep network at its random start,
and a ReLU flips here in one library and there in another. So it compares networks and not elements: see
`assert_gradients_close`.
"""

import copy
import functools

import torch
from torch import nn

import fastcnn
from fastcnn.benchmarks.harness import MEMORY_FORMATS, OF_NETWORKS, api_of, layout_of, set_switches

WARM_UP = 3  # steps before anything is measured: to compile, to choose algorithms, to fill caches
GATE_IMAGES = 8


class Step:
    """One provider's training step.

    Args:
        model: the network; it is copied.
        images, labels: [N, C, H, W] and [N], on the device.
        provider: name of `harness.PROVIDERS`; it decides on layers, layout, loss and optimizer.
        layout: of the providers that have none of their own.
        autocast: whether the forward pass runs in bf16 autocast.
    """

    def __init__(self, model, images, labels, provider, layout, autocast):
        memory_format = MEMORY_FORMATS[layout_of(provider, layout)]
        api = api_of(provider)
        self.model = with_layers(copy.deepcopy(model), fastcnn.nn if api is fastcnn else nn)
        self.model.to(images.device, images.dtype, memory_format=memory_format)
        if provider in OF_NETWORKS:
            fastcnn.convert(self.model)
        self.images, self.labels = images.contiguous(memory_format=memory_format), labels
        self.autocast = functools.partial(torch.autocast, images.device.type, torch.bfloat16, enabled=autocast)
        self.loss_of = functools.partial(loss_of, self.model, api.functional.cross_entropy)
        if provider.startswith("compile"):
            mode = "max-autotune" if provider == "compile-max" else None
            self.loss_of = torch.compile(self.loss_of, mode=mode, dynamic=False)
        # so small a rate that hundreds of steps on the same images neither diverge nor converge: both change the clocks
        self.optimizer = api.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.loss = None

    def forward(self):
        self.optimizer.zero_grad()
        with self.autocast():
            self.loss = self.loss_of(self.images, self.labels)

    def backward(self):
        # the graph and all it holds must go with the pass
        loss, self.loss = self.loss, None
        loss.backward()

    def update(self):
        self.optimizer.step()

    def __call__(self):
        self.forward()
        self.backward()
        self.update()

    def results(self):
        """Loss and gradients by parameter name, after one forward and backward pass."""
        self.forward()
        loss = self.loss.detach()
        self.backward()
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        return loss, grads


class Graph:
    """A step captured in a CUDA graph, as PyTorch's notes on CUDA semantics do it for whole networks.

    Args:
        step: `Step`; its images and labels are the graph's.
        pool: memory pool of graphs that never run at the same time, or None.
    """

    def __init__(self, step, pool=None):
        self.step = step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # gradients of None, so that backward allocates them in the graph's own memory
        step.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self.graph, pool=pool):
            step()

    def __call__(self):
        self.graph.replay()


class Expected:
    """What a network's loss and gradients should be, on a few of the images: in fp64, and PyTorch's own errors.

    Rounding errors are random: PyTorch's are those of `torch` and `torch-nhwc`, whichever are larger.
    """

    def __init__(self, model, images, labels, layout):
        self.model = _without_randomness(copy.deepcopy(model))
        self.images, self.labels = images[:GATE_IMAGES], labels[:GATE_IMAGES]
        self.layout, self.autocasts = layout, [False] + [True] * images.is_cuda
        set_switches("torch", images.device)
        self.truth = Step(self.model, self.images.double(), self.labels, "torch", layout, autocast=False).results()
        self.yardsticks = []
        for autocast in self.autocasts:
            both = [errors(self._results(name, autocast), self.truth) for name in ("torch", "torch-nhwc")]
            largest = max(error for _, relative in both for error in relative.values())
            self.yardsticks.append((max(loss for loss, _ in both), largest))

    def check(self, provider):
        """Raise AssertionError if this provider is wrong: in fp32, and on a GPU in autocast as well."""
        for autocast, yardstick in zip(self.autocasts, self.yardsticks, strict=True):
            assert_gradients_close(self._results(provider, autocast), self.truth, yardstick, autocast)

    def _results(self, provider, autocast):
        set_switches(provider, self.images.device)
        return Step(self.model, self.images, self.labels, provider, self.layout, autocast).results()


def errors(results, truth):
    """(error of the loss, gradient's name -> relative error), of `Step.results` against those in fp64.

    A gradient's error is the root mean square of its differences, relative to that of its true values plus a hundredth
    of that of all gradients: a bias before a batch norm has the gradient zero and nothing but rounding errors.
    """
    grads = truth[1]
    squares, elements = (sum(f(g) for g in grads.values()) for f in (lambda g: _rms(g) ** 2 * g.numel(), torch.numel))
    usual = (squares / elements) ** 0.5
    relative = {name: _rms(results[1][name].double() - g) / (_rms(g) + 1e-2 * usual) for name, g in grads.items()}
    return abs(float(results[0]) - float(truth[0])), relative


def assert_gradients_close(results, truth, yardstick, autocast=False):
    """Raise AssertionError unless loss and gradients are about as close to the truth as PyTorch's.

    Args:
        results: `Step.results` to judge.
        truth: the same in fp64.
        yardstick: (error of the loss, largest relative error of a gradient) of PyTorch. Three times as much may be
            chance; and a few roundings are allowed where PyTorch happens to have none.
        autocast: whether those are roundings to bf16.
    """
    differing = sorted(set(results[1]) ^ set(truth[1]))
    if differing:
        raise AssertionError(f"gradient of {differing[0]}: there where PyTorch has none, or the other way round")
    floor = 1e-2 if autocast else 1e-5
    loss, relative = errors(results, truth)
    if not loss <= 3 * yardstick[0] + floor * (1 + abs(float(truth[0]))):
        raise AssertionError(f"loss: {float(results[0]):.6g}, truth {float(truth[0]):.6g}")
    for name, error in relative.items():
        if not error <= 3 * yardstick[1] + floor:
            raise AssertionError(
                f"gradient of {name}: relative error {error:.3g}, PyTorch's largest in this network {yardstick[1]:.3g}"
            )


def with_layers(model, library):
    """Make every layer that torch.nn and fastcnn.nn both have the class of this library; in place, parameters stay.

    A subclass of such a layer is left alone: it may do something else.
    """
    for module in model.modules():
        kind = type(module)
        if kind in (getattr(nn, kind.__name__, None), getattr(fastcnn.nn, kind.__name__, None)):
            module.__class__ = getattr(library, kind.__name__)
    return model


def loss_of(model, cross_entropy, images, labels):
    outputs = model(images)
    if isinstance(outputs, torch.Tensor):
        return cross_entropy(outputs, labels)
    # GoogLeNet and Inception have auxiliary classifiers, which count 0.3 (Szegedy et al. 2015)
    first, *others = (output for output in outputs if output is not None)
    return cross_entropy(first, labels) + 0.3 * sum(cross_entropy(output, labels) for output in others)


def _without_randomness(model):
    # providers draw other random numbers: nothing is dropped in what is compared
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
        # what timm's and torchvision's blocks call it
        for name in ("drop_prob", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def _rms(tensor):
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0
