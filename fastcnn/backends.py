"""Which implementation runs an op: our Triton kernel, our CPU kernel, or PyTorch; and how to see and steer the choice.

Every op owns one `Op` and asks it to `route` each call. The answer is "triton", "cpu" or "torch":

| tensors                   | backend "auto"                                          |
|---------------------------|---------------------------------------------------------|
| CUDA                      | triton; torch where the kernel cannot (logged once)     |
| CPU                       | cpu (numba) where it was measured faster, else torch    |
| CPU, TRITON_INTERPRET=1   | triton, in Triton's interpreter                         |
"""

import functools
import importlib.util
import logging
import os
import platform

import torch

BACKENDS = ("auto", "triton", "cpu", "torch")

logger = logging.getLogger("fastcnn")


class _State:
    # None until first asked for, so that importing fastcnn reads no environment
    backend = None
    strict = False
    interpret = None
    # backend "auto", not strict, no interpreter; None after a change, until asked for
    plain_auto = None


_state = _State()
_gpu_refusals = {}


def _check_backend(name, source="backend"):
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def current_backend():
    """The backend asked for now: one of `BACKENDS`. The default comes from FASTCNN_BACKEND, else "auto"."""
    if _state.backend is None:
        _state.backend = _check_backend(os.environ.get("FASTCNN_BACKEND", "auto"), "FASTCNN_BACKEND")
    return _state.backend


def is_strict():
    """Whether falling back to PyTorch raises."""
    return _state.strict


def interpreting():
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1 when fastcnn first looked)."""
    if _state.interpret is None:
        _state.interpret = os.environ.get("TRITON_INTERPRET") == "1"
    return _state.interpret


class backend:
    """Choose the backend: as a call, from now on; as a context manager, inside the block.

    Args:
        name: "auto" (the fastest known), "triton" (Triton kernels wherever they can run), "cpu" (our CPU kernels, also
            where PyTorch is faster) or "torch" (PyTorch alone).
    """

    def __init__(self, name):
        _check_backend(name)
        self.previous = current_backend()
        _state.backend, _state.plain_auto = name, None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        _state.backend, _state.plain_auto = self.previous, None


class strict:
    """Make falling back to PyTorch an error: as a call, from now on; as a context manager, inside the block.

    Benchmarks and tests use it, so that nobody measures PyTorch against itself by accident.
    """

    def __init__(self, enabled=True):
        self.previous = _state.strict
        _state.strict, _state.plain_auto = bool(enabled), None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        _state.strict, _state.plain_auto = self.previous, None


def _plain_auto():
    if _state.plain_auto is None:
        _state.plain_auto = current_backend() == "auto" and not _state.strict and not interpreting()
    return _state.plain_auto


def gpu_refusal(device):
    """None if our Triton kernels run on this CUDA device, else the sentence that says why not."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index not in _gpu_refusals:
        sentence = None
        major, minor = torch.cuda.get_device_capability(index)
        if importlib.util.find_spec("triton") is None:
            sentence = "Triton is not installed (pip install triton)"
        elif torch.version.hip is not None:
            sentence = "the kernels are written for NVIDIA GPUs and this is an AMD one"
        elif major < 8:
            sentence = f"the kernels need compute capability 8.0 or newer and this GPU has {major}.{minor}"
        _gpu_refusals[index] = sentence
    return _gpu_refusals[index]


def _transformed():
    # our kernels have no tangents and no batching rules; an op that skipped them would be silently wrong
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


OPS = []


class Op:
    """One op's routing policy and the record of what ran.

    Args:
        name: the public function's name.
        cpu_kernel: whether kernels/cpu has a kernel for it.
        cpu_auto: whether "auto" takes that kernel on CPU tensors. Set by measurement, never by hope.
        why: one sentence of evidence for the choice on CPU, shown by `explain`.
    """

    def __init__(self, name, *, cpu_kernel, cpu_auto, why):
        self.name = name
        self.cpu_kernel = cpu_kernel
        self.cpu_auto = cpu_auto
        self.why = why
        self.calls = {}  # (backend, reason) -> number of calls
        OPS.append(self)

    def torch_first(self, torch_function, below=None):
        """Decorator of the op's public function: CPU tensors that "auto" leaves to PyTorch reach it at once.

        Looking at all arguments takes ours 5 to 20 us, as long as PyTorch takes for a small tensor. PyTorch looks at
        them, too: where it raises, ours runs after all, and says what is wrong or lets PyTorch say it again.

        Args:
            torch_function: PyTorch's function of the same signature; it must change nothing where it raises. Where it
                takes what ours refuses, one that raises anything there and else calls it.
            below: elements of the input from which `route` decides; None where PyTorch takes them all.
        """
        if below is None:
            key = ("torch", self.why)
        else:
            key = ("torch", f"PyTorch is faster on CPU below {below:,} elements")

        def decorate(function):
            @functools.wraps(function)
            def public(*args, **kwargs):
                tensor = args[0] if args else kwargs.get("input")
                if (
                    (_state.plain_auto or _plain_auto())
                    and isinstance(tensor, torch.Tensor)
                    and tensor.is_cpu
                    and (below is None or tensor.numel() < below)
                ):
                    try:
                        result = torch_function(*args, **kwargs)
                    except Exception:
                        pass  # ours runs outside of this block: its error shall not carry PyTorch's along
                    else:
                        if not torch.compiler.is_compiling():
                            self.calls[key] = self.calls.get(key, 0) + 1
                        return result
                return function(*args, **kwargs)

            return public

        return decorate

    def route(self, tensor, why_not):
        """Choose what runs this call: "triton", "cpu" or "torch".

        Args:
            tensor: the op's input; its device decides.
            why_not: function of a candidate ("triton" or "cpu") that returns None or the sentence why that candidate
                cannot take these arguments.

        Raises:
            NotImplementedError: PyTorch would run and `strict` is on; the message is the sentence.
        """
        candidate, reason = self._candidate(tensor)
        if candidate != "torch":
            reason = why_not(candidate)
            if reason is not None:
                candidate = "torch"
        if not torch.compiler.is_compiling():
            if candidate != "torch" and _transformed():
                candidate, reason = "torch", "torch.func transforms and forward-mode gradients run on PyTorch's own ops"
            key = (candidate, reason)
            self.calls[key] = count = self.calls.get(key, 0) + 1
            if candidate == "torch" and count == 1 and tensor.is_cuda and current_backend() != "torch":
                logger.warning("%s runs on PyTorch: %s", self.name, reason)
        if candidate == "torch" and _state.strict:
            raise NotImplementedError(f"{self.name} would fall back to PyTorch in strict mode: {reason}")
        return candidate

    def _candidate(self, tensor):
        wanted = current_backend()
        if wanted == "torch":
            return "torch", "the backend is set to torch"
        if tensor.device.type == "cuda":
            if wanted == "cpu":
                return "torch", "the backend is set to cpu and the tensor is on a GPU"
            refusal = gpu_refusal(tensor.device)
            return ("triton", None) if refusal is None else ("torch", refusal)
        if tensor.device.type != "cpu":
            return "torch", f"there are no kernels for {tensor.device.type} tensors"
        if interpreting() and wanted != "cpu":
            return "triton", None
        if wanted == "triton":
            return "torch", "Triton kernels need a CUDA tensor (or TRITON_INTERPRET=1 for a CPU one)"
        if self.cpu_kernel and (self.cpu_auto or wanted == "cpu"):
            return "cpu", None
        return "torch", self.why


def explain():
    """A table of every op: what runs it on CPU and on this machine's GPU, why, and what has run so far.

    A second table, where convolutions have run, has one line for each pass of each: fastcnn's launch, what it and cuDNN
    take, and whether that was measured at the first call, tuned (`fastcnn tune`) or predicted.

    Returns:
        str, ready to print.
    """
    import fastcnn.functional  # noqa: F401  (declares the ops)
    import fastcnn.optim  # noqa: F401
    from fastcnn.ops import conv_launch

    gpu = "no GPU"
    if torch.cuda.is_available():
        refusal = gpu_refusal(torch.device("cuda", torch.cuda.current_device()))
        gpu = "triton" if refusal is None else "torch"
    rows = [("op", "on CPU", "on GPU", "ran so far", "why")]
    for op in OPS:
        candidate, _ = op._candidate(torch.empty(0))
        names = {"cpu": "fastcnn (numba)", "triton": "fastcnn (interpreter)", "torch": "PyTorch"}
        ran = ", ".join(f"{backend} {count}x" for (backend, _), count in op.calls.items()) or "-"
        rows.append((op.name, names[candidate], gpu, ran, op.why))
    convolutions = conv_launch.table()
    return _table(rows) + ("\n\n" + _table(convolutions) if convolutions else "")


def env():
    """A table of versions, GPUs and backends, to put into a bug report.

    Returns:
        str, ready to print.
    """
    from importlib import metadata

    from fastcnn import __version__

    rows = [("fastcnn", __version__), ("python", platform.python_version()), ("platform", platform.platform())]
    for name in ("torch", "triton", "numba", "numpy"):
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    rows.append(("CUDA of torch", torch.version.cuda or "none"))
    rows.append(("cuDNN", str(torch.backends.cudnn.version() or "none")))
    rows.append(("CPU threads", str(torch.get_num_threads())))
    for index in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        state = gpu_refusal(torch.device("cuda", index)) or "Triton kernels run"
        rows.append((f"GPU {index}", f"{name}, compute capability {capability[0]}.{capability[1]}: {state}"))
    if not torch.cuda.is_available():
        rows.append(("GPU", "none"))
    rows.append(("backend", current_backend() + (", strict" if is_strict() else "")))
    rows.append(("Triton interpreter", "on" if interpreting() else "off"))
    return _table(rows)


def _table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)
