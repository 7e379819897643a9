"""A whole training step as one CUDA graph: its launches, some 180 for ResNet-50, no longer wait for Python.

    step = fastcnn.graphed_step(model, loss_fn, optimizer)
    for images, labels in loader:
        loss = step(images, labels)

A graph is a recording: it repeats the same launches on the same memory. So what a training loop changes between steps
is looked at in every call: batch and learning rate are copied to where the graph reads them; a batch of another shape
runs without the graph; and where anything else that the recording takes for granted (`_premises`) has changed, it is
recorded again.

The first calls run as they are, on the stream of the capture: they compile, measure and create state, as PyTorch asks
for. They are steps of the training like all others, on the batch of their call. So nothing has to be put back after
them, neither weights nor running statistics nor random numbers nor a loss scale.

Source: "CUDA Graphs" in PyTorch's notes on CUDA semantics.
"""

import contextlib
import gc
import linecache
import logging
import os
import traceback
import warnings

import torch
from torch import nn

from fastcnn.optim.multi_tensor import MultiTensorStep
from fastcnn.optim.options import OPTIONS
from fastcnn.optim.table import is_dtensor

logger = logging.getLogger("fastcnn")

LIMITS = (
    "A CUDA graph holds work on the GPU alone, the same in every step: no .item(), print or if on a tensor's value, no "
    "tensors from the CPU"
)


def graphed_step(model, loss_fn, optimizer, *, autocast=None, scaler=None, warmup=3):
    """Make a training step that a GPU repeats from a CUDA graph.

    Args:
        model: torch.nn.Module on one device. On CPU every step runs eagerly, with the same results.
        loss_fn: function of the model's output and the target that returns the loss, a scalar. It runs inside of the
            step, so it may also count, in place: `correct.add_((output.argmax(1) == target).sum())`.
        optimizer: one of fastcnn.optim, or of torch.optim with capturable=True or (where it has no such option)
            fused=True. Its learning rates may be changed between steps, by hand or by any scheduler.
        autocast: dtype of automatic mixed precision, torch.bfloat16 or torch.float16, or None for none.
        scaler: torch.amp.GradScaler, or None.
        warmup: how many calls run before the graph is recorded; at least 2.

    Returns:
        function (input, target) -> loss: one step on tensors on any device (pinned memory makes their copies
        asynchronous). It drops gradients that are there, runs model, loss, backward pass and optimizer, and leaves no
        gradients behind. The loss is a tensor of its own, detached. Batches shaped otherwise than that of the first
        call, such as the last of an epoch, run without the graph and need memory of their own; for larger images later
        in the training, make a new step.

    A graph repeats work on the GPU and no Python: hooks run, and numbers in the model's attributes are looked at, while
    it is recorded. It is recorded again after a change of training mode, of requires_grad, of an option of the
    optimizer, after optimizer.load_state_dict, and when a parameter's memory is another.

    Raises:
        TypeError, ValueError: an argument is none of these, or model and optimizer are not on one device.
        NotImplementedError: the model is distributed (DDP, FSDP2, DataParallel).
        RuntimeError: (by the function, after its last call before the recording) the step waits for the GPU, which a
            graph cannot; the message names the lines. Or recording it failed; then start a new process.
    """
    _check(model, loss_fn, optimizer, autocast, scaler, warmup)
    device = _device(model, optimizer)
    if device.type != "cuda":
        logger.warning("graphed_step: the model is on %s, so its steps run without a CUDA graph", device)
        return _Step(model, loss_fn, optimizer, autocast, scaler, device)
    reason = _why_not(optimizer, scaler)
    if reason is not None:
        raise ValueError(reason)
    several = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    if several or any(map(is_dtensor, model.parameters())):
        raise NotImplementedError(
            f"graphed_step takes models on one GPU, and this {type(model).__name__} is on several"
        )
    return _GraphedStep(model, loss_fn, optimizer, autocast, scaler, device, warmup, _Recorder(device))


class _Step:
    """The step as Python runs it."""

    def __init__(self, model, loss_fn, optimizer, autocast, scaler, device):
        self.model, self.loss_fn, self.optimizer, self.device = model, loss_fn, optimizer, device
        self.autocast = autocast
        self.scaler = torch.amp.GradScaler(device.type, enabled=False) if scaler is None else scaler

    def __call__(self, input, target):
        _check_batch(input, target)
        return self._run(input, target)[0]

    def _run(self, input, target):
        """The loss, and the norm of the gradients where the optimizer has it."""
        input, target = (t.detach().to(self.device, non_blocking=True) for t in (input, target))
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            loss = self.loss_fn(self.model(input), target)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach(), getattr(self.optimizer, "grad_norm", None)


class _GraphedStep(_Step):
    """The step from a graph, once that is recorded."""

    def __init__(self, model, loss_fn, optimizer, autocast, scaler, device, warmup, recorder):
        super().__init__(model, loss_fn, optimizer, autocast, scaler, device)
        self.warmup, self.recorder = warmup, recorder
        self.rates = _Rates(optimizer, device)
        self.options = {*optimizer.defaults, *OPTIONS}
        self.batch = None  # where the graph reads input and target
        self.done = 0  # steps since something changed
        self.premises = None  # of the graph, once there is one
        self.modules = self.parameters = self.held = None  # whom the premises are about
        self.results = None  # where the graph writes

    def __call__(self, input, target):
        _check_batch(input, target)
        self.rates.refresh()
        if self.premises is not None and self.premises != self._premises():
            logger.warning(
                "graphed_step: model or optimizer changed since the CUDA graph was recorded (mode, requires_grad, an "
                "option, state or memory), so it is recorded again"
            )
            self.recorder.drop()
            self.premises, self.results, self.done = None, None, 0
        if not self._load(input, target):
            with self.rates.in_groups():
                return self._run(input, target)[0]
        if self.premises is None:
            if self.done < self.warmup:
                return self._warm_up()
            self._record()
        self.recorder.replay()
        loss, norm = self.results
        if norm is not None:
            self.optimizer.grad_norm = norm.clone()
        return loss.clone()

    def _load(self, input, target):
        """Copy the batch to where the graph reads it; False if it is shaped otherwise."""
        batch = input, target
        if self.batch is None:
            self.batch = tuple(torch.empty_like(t, device=self.device, requires_grad=False) for t in batch)
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(self.batch, batch, strict=True)):
            return False
        with torch.no_grad():
            for static, t in zip(self.batch, batch, strict=True):
                static.copy_(t, non_blocking=True)
        return True

    def _warm_up(self):
        # the first may compile and measure, which waits for the GPU; the last must be as the graph will be
        run = self.recorder.rehearse if self.done == self.warmup - 1 else self.recorder.warm_up
        with self.rates.in_groups():
            loss, _ = run(lambda: self._run(*self.batch))
        self.done += 1  # not after an error: what may not be recorded is not tried
        return loss

    def _record(self):
        with self.rates.in_groups():
            self.results = self.recorder.record(lambda: self._run(*self.batch))
        groups = self.optimizer.param_groups
        self.modules = list(self.model.modules())
        known = [*self.model.parameters(), *(p for group in groups for p in group["params"])]
        self.parameters = list({id(p): p for p in known}.values())
        # what the premises know by its id must live
        self.held = [*self.optimizer.state.values(), *map(dict, groups)]
        self.premises = self._premises()

    def _premises(self):
        """What a graph keeps as it was when it was recorded, and Python would look at in every step."""
        groups = self.optimizer.param_groups
        options = [
            (name, id(value) if isinstance(value, torch.Tensor) else value)
            for group in groups
            for name, value in group.items()
            if name in self.options and (name != "lr" or isinstance(value, torch.Tensor))
        ]
        options.append(self.optimizer.defaults.get("max_grad_norm"))
        parameters = [(p.data_ptr(), p.requires_grad) for p in self.parameters]
        parameters += [len(group["params"]) for group in groups]
        # load_state_dict puts new tensors into new dictionaries
        state = [id(value) for value in self.optimizer.state.values()]
        return options, parameters, state, [module.training for module in self.modules]


class _Rates:
    """The learning rates of an optimizer's groups on the GPU, where a graph reads them.

    The groups themselves keep what the user or a scheduler put there.
    """

    def __init__(self, optimizer, device):
        self.optimizer, self.device = optimizer, device
        self.ours = isinstance(optimizer, MultiTensorStep)
        self.tensors, self.values = [], []

    def refresh(self):
        """Bring the tensors up to date."""
        for i, group in enumerate(self.optimizer.param_groups):
            if i == len(self.tensors):
                # our kernels take a number as fp64; PyTorch's fused ones read an fp32 tensor
                dtype = torch.float64 if self.ours else torch.float32
                self.tensors.append(torch.zeros((), dtype=dtype, device=self.device))
                self.values.append(0.0)
            if not self._is_there(group):
                value = float(group["lr"])
                if value != self.values[i]:
                    self.tensors[i].fill_(value)
                    self.values[i] = value

    def _is_there(self, group):
        return isinstance(group["lr"], torch.Tensor) and group["lr"].device == self.device

    @contextlib.contextmanager
    def in_groups(self):
        """Context: inside it the groups hold the tensors, in the steps before the recording, too: it is another kernel
        that reads the rate from memory, and it must be compiled by then."""
        before = []
        for group, tensor in zip(self.optimizer.param_groups, self.tensors, strict=False):
            before.append((group, {name: group[name] for name in ("lr", "capturable") if name in group}))
            if not self._is_there(group):
                group["lr"] = tensor
            if self.ours and "capturable" in group:
                group["capturable"] = True  # our state is on the GPU in any case
        try:
            yield
        finally:
            for group, own in before:
                group.update(own)


class _Recorder:
    """A CUDA graph, and the stream on which it is prepared and recorded.

    One stream for both: autograd remembers the stream that a parameter's gradient was first made on.
    """

    def __init__(self, device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.graph = None

    def warm_up(self, function):
        """Run the function on the stream, between what came before and what comes after."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def rehearse(self, function):
        """`warm_up`, and RuntimeError afterwards if the function waited for the GPU: with the lines where it did."""
        with _lines_that_wait() as lines:
            result = self.warm_up(function)
        if lines:
            raise RuntimeError(
                f"this training step cannot become a CUDA graph: it waits for the GPU at {'; '.join(lines)}. {LIMITS}. "
                "The step itself was done"
            )
        return result

    def record(self, function):
        """Record what the function launches; nothing runs. Returns its result, which every `replay` fills anew."""
        graph = torch.cuda.CUDAGraph()
        # what is left of steps on other streams, in reference cycles, would draw those into the capture
        gc.collect()
        try:
            # the outer context restores the stream, which torch.cuda.graph does not after a failure;
            # thread_local: the thread of a DataLoader that pins memory goes on meanwhile
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                result = function()
        except RuntimeError as error:
            raise RuntimeError(
                f"this training step cannot become a CUDA graph: {_first_error(error)}. {LIMITS}. Recording broke off, "
                "which can leave PyTorch's random numbers on this GPU unusable: start a new process"
            ) from error
        self.graph = graph
        return result

    def replay(self):
        self.graph.replay()

    def drop(self):
        """Let go of the graph and its memory, when the GPU is done with it."""
        torch.cuda.synchronize(self.device)
        self.graph = None


@contextlib.contextmanager
def _lines_that_wait():
    """Context: the list that it gives holds, afterwards, the lines that made the CPU wait for the GPU."""
    lines, before = [], torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in found:
        text = str(warning.message)
        if "called a synchronizing CUDA operation" in text:
            line = _line(warning.filename, warning.lineno)
            if line not in lines:
                lines.append(line)
        elif "Synchronization debug mode" not in text:  # what it says of itself when it is first switched on
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _line(filename, number):
    return f"{os.path.basename(filename)}:{number} `{linecache.getline(filename, number).strip()}`"


def _first_error(error):
    """What first went wrong in a capture, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    if frames[-1].name == "capture_end" and error.__context__ is not None:
        # ending a capture that failed raises once more
        error = error.__context__
        frames = traceback.extract_tb(error.__traceback__)
    torch_folder = os.path.dirname(torch.__file__)
    frames = [frame for frame in frames if not frame.filename.startswith(torch_folder)]
    text = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return f"{text} at {_line(frames[-1].filename, frames[-1].lineno)}"


def _check(model, loss_fn, optimizer, autocast, scaler, warmup):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of output and target, got {loss_fn!r}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise TypeError(f"autocast must be torch.bfloat16, torch.float16 or None, got {autocast!r}")
    if not isinstance(scaler, torch.amp.GradScaler | None):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")
    if isinstance(warmup, bool) or not isinstance(warmup, int):
        raise TypeError(f"warmup must be an int, got {warmup!r}")
    if warmup < 2:
        raise ValueError(f"warmup must be at least 2, got {warmup}: one step to prepare, one to see that all is ready")


def _check_batch(input, target):
    for name, value in (("input", input), ("target", target)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _device(model, optimizer):
    """The one device of model and optimizer."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    groups = optimizer.param_groups
    tensors += [(f"param_groups[{i}] of the optimizer", p) for i, group in enumerate(groups) for p in group["params"]]
    first, device = tensors[0][0], tensors[0][1].device
    for name, tensor in tensors:
        if tensor.device != device:
            raise ValueError(
                f"model and optimizer must be on one device, and {first} is on {device}, {name} on {tensor.device}"
            )
    return device


def _why_not(optimizer, scaler):
    """None, or the sentence why a graph cannot hold this optimizer's step."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, MultiTensorStep):
        for group in optimizer.param_groups:
            if not group.get("capturable", group.get("fused")):
                option = "capturable=True" if "capturable" in group else "fused=True, where it has that,"
                return (
                    f"a CUDA graph would keep the learning rate of this {name} for ever: use fastcnn.optim, or make it "
                    f"with {option}"
                )
    if scaler is not None and scaler.is_enabled() and not getattr(optimizer, "_step_supports_amp_scaling", False):
        return f"GradScaler makes the CPU wait in every step of this {name}: use fastcnn.optim, or fused=True"
    return None
