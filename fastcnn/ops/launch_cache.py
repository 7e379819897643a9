"""Launch choices that `fastcnn tune` measured, in the user's cache folder: one file per GPU, Triton and kernel source.

A choice measured with other kernels or another compiler is worth nothing, so both are part of the file's name. Several
processes may write at the same time: each merges its choices into what is there. The folder is FASTCNN_CACHE, else
~/.cache/fastcnn.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import tempfile
from pathlib import Path

from fastcnn.ops.conv_problem import Launch, Problem

logger = logging.getLogger("fastcnn")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The fastest own launch of a problem.

    Attributes:
        launch: of one of our families.
        seconds: what it was measured to take.
        cudnn_seconds: what cuDNN took beside it; None where it cannot run the problem.
    """

    launch: Launch
    seconds: float
    cudnn_seconds: float | None


def folder():
    """Where the files are; it need not exist."""
    chosen = os.environ.get("FASTCNN_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path.home() / ".cache/fastcnn"


@functools.cache
def source_hash():
    """Of all source files that a convolution's launch depends on."""
    import fastcnn.kernels.triton as package

    ops, kernels = Path(__file__).parent, Path(package.__path__[0])
    files = [*ops.glob("conv2d*.py"), *kernels.glob("conv*.py"), kernels / "common.py", kernels / "activation.py"]
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def path_for(gpu):
    """The file of a GPU, which torch.cuda.get_device_name names."""
    import triton

    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return folder() / f"{name}-triton-{triton.__version__}-{source_hash()}.json"


def load(gpu):
    """{Problem: Tuned} of a GPU; empty without a file. A damaged file is named in a warning and counts as empty."""
    path = path_for(gpu)
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        _warn(path, error)
        return {}
    try:
        return dict(_entry(**row) for row in json.loads(text)["choices"])
    except (ValueError, TypeError, KeyError) as error:
        _warn(path, error)
        return {}


def _warn(path, error):
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    logger.warning(
        "the tuned launch choices in %s cannot be read and are ignored (%s); `fastcnn tune` writes the file anew",
        *(path, reason),
    )


def _entry(problem, launch, seconds, cudnn_seconds):
    problem = Problem(**{name: tuple(v) if isinstance(v, list) else v for name, v in problem.items()})
    if not (seconds > 0 and (cudnn_seconds is None or cudnn_seconds > 0)):
        raise ValueError(f"times must be positive, got {seconds!r} and {cudnn_seconds!r}")
    return problem, Tuned(Launch(**launch), seconds, cudnn_seconds)


def save(gpu, choices):
    """Merge choices into the file of a GPU.

    Args:
        gpu: its name.
        choices: {Problem: Tuned}; they replace those of the same problems.

    Returns:
        the path of the file.

    Raises:
        OSError: the folder cannot be written.
    """
    from filelock import FileLock

    path = path_for(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        merged = load(gpu) | choices
        rows = [
            {"problem": dataclasses.asdict(problem), **dataclasses.asdict(tuned)} for problem, tuned in merged.items()
        ]
        lines = ",\n".join(json.dumps(row) for row in rows)
        # readers take no lock: they see the old file or the new one
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(f'{{"choices": [\n{lines}\n]}}\n')
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return path
