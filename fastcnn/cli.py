"""The command line: fastcnn train | eval | predict | bench | tune | models | study | explain | env.

Options of `train` are the fields of `TrainConfig`. What a user can get wrong ends in one line and exit code 2.
Everything heavy is imported by the sub-command that needs it.
"""

import os
import re
import shlex
import sys
from argparse import ArgumentError
from dataclasses import MISSING, fields
from pathlib import Path

from jsonargparse import ArgumentParser


def main(argv=None):
    """Run the command line.

    Args:
        argv: the words after `fastcnn`; default: those of the process.

    Returns:
        Exit code: 0, 1 if `bench` or `tune` found a kernel wrong, 2 for a mistake of the user, 130 after Ctrl-C.
    """
    command = None
    try:
        options = _parser().parse_args(argv)
        command = options.subcommand
        options = options[command]
        if command == "train" and options.resume:
            # the run's own options are the defaults of its continuation
            options = _parser(resume=_train_config(options).out).parse_args(argv)["train"]
        return COMMANDS[command](options)
    except KeyboardInterrupt:
        print("\nfastcnn: stopped" + (_how_to_resume(options) if command == "train" else ""), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # nobody reads our output any more; the interpreter would complain again while closing it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ArgumentError, ValueError, OSError, FloatingPointError) as error:
        # jsonargparse speaks of <class 'int'>
        message = re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(error).split()))
        print(f"fastcnn: error: {message}", file=sys.stderr)
        return 2


def _parser(resume=None):
    parser = _new("Train convolutional networks with hand-written kernels.", prog="fastcnn")
    commands = parser.add_subcommands(required=True)
    commands.add_subcommand("train", _train_parser(resume), help="train a model into a run folder")

    sub = _new("Accuracy and confusion matrix of a run's best model on its test images.")
    sub.add_argument("run", help="run folder")
    sub.add_argument("--data-dir", type=str | None, default=None, help="where the data lies now, if it moved")
    sub.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")
    commands.add_subcommand("eval", sub, help="measure a trained model")

    sub = _new(
        "Class and probability of image files (PNG, JPEG, ...; any size, grey or RGB). The middle square is brought to "
        "the model's size and normalised as in training. Digits and MNIST models expect light ink on a dark ground, "
        "filling the picture as their training images do."
    )
    sub.add_argument("run", help="run folder")
    sub.add_argument("images", nargs="+", help="image files")
    sub.add_argument("--invert", action="store_true", help="turn light into dark first: for ink on paper")
    sub.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")
    commands.add_subcommand("predict", sub, help="classify images with a trained model")

    commands.add_subcommand("bench", _bench_parser(), help="measure against PyTorch")

    commands.add_subcommand("tune", _tune_parser(), help="measure and keep the fastest launches of a network")

    sub = _new(
        "The networks of fastcnn.models: year, parameters, million multiply-adds and memory of an image, and the speed "
        "of a training step where one was measured."
    )
    sub.add_argument("pattern", nargs="?", default="*", help="of the names, e.g. 'resnet*'")
    sub.add_argument("--sort", default="year", type=str, help="name, year, parameters, macs or memory")
    sub.add_argument("--plot", default=None, type=str | None, help="draw them into this file, as bubbles")
    sub.add_argument("--results", default="benchmarks/results", type=str, help="folder of measured rows")
    commands.add_subcommand("models", sub, help="list the networks")

    study = _new("What can be known of a network without training it.")
    commands.add_subcommand("study", study, help="look into a network")
    study.add_subcommands(required=True).add_subcommand("summary", _summary_parser(), help="count it layer by layer")

    sub = _new("Which kernels run each op on this machine and why; with a run folder, which ones ran there.")
    sub.add_argument("run", nargs="?", help="run folder")
    commands.add_subcommand("explain", sub, help="show which kernels run")
    commands.add_subcommand(
        "env", _new("Versions, GPUs and backends, for a bug report."), help="show versions and GPUs"
    )
    return parser


def _new(description, **kwargs):
    return ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False, **kwargs)


def _train_parser(resume):
    from fastcnn.train.config import TrainConfig

    parser = _new("Train a model. Everything the run needs and gives is in its run folder.")
    parser.add_argument("--config", action="config", help="YAML or JSON file with any of these options")
    for spec in fields(TrainConfig):
        default = spec.default_factory() if spec.default is MISSING else spec.default
        bare = {"nargs": "?", "const": True} if spec.type is bool else {}  # --fuse is --fuse true
        name = f"--{spec.name.replace('_', '-')}"
        parser.add_argument(name, type=spec.type, default=default, help=spec.metadata["help"], **bare)
    if resume is not None:
        from fastcnn.train.evaluate import load_config

        parser.set_defaults({**load_config(resume).saved(), "out": resume})
    return parser


def _bench_parser():
    parser = _new(
        "Measure fastcnn against PyTorch, both checked for right results first: ops (single layers of real networks), "
        "models (training steps of whole networks), steps (the same taken apart: forward, backward, optimizer, kinds "
        "of kernels), all (ops, then models). Rows are appended to the results folder as they come; tables and plots "
        "are drawn from it at the end. roofline prints and draws what a network's bytes and FLOPs allow; report only "
        "draws again."
    )
    whats = ("all", "ops", "models", "steps", "roofline", "report")
    parser.add_argument("what", nargs="?", default="all", choices=whats, help="what to measure")
    parser.add_argument(
        "networks",
        nargs="*",
        default=[],
        help="for models, steps, roofline: resnet50, timm:convnext_tiny, fastcnn:lenet5, ...",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few cases of every op, in under 8 minutes on a GPU, 5 on CPU"
    )
    parser.add_argument("--op", nargs="+", default=None, type=str, help="only these ops")
    parser.add_argument("--case", default="", type=str, help="only cases whose name contains this")
    parser.add_argument(
        "--provider",
        nargs="+",
        default=None,
        type=str,
        help="only these of torch, torch-nhwc, compile, compile-max, fastcnn (own kernels alone), fastcnn-auto, "
        "fastcnn-chain (networks, by fastcnn.convert)",
    )
    parser.add_argument("--device", default="auto", type=str, help="auto, cpu or cuda")
    parser.add_argument("--dtype", default=None, type=str | None, help="bf16, fp16 or fp32")
    parser.add_argument("--layout", default=None, type=str | None, help="channels_last or contiguous")
    parser.add_argument("--batch", default=None, type=int | None, help="images")
    parser.add_argument("--seconds", default=None, type=float | None, help="start no new case after so many seconds")
    parser.add_argument("--resume", action="store_true", help="leave out ops' cases that this commit has results of")
    parser.add_argument("--commit", default=None, type=str | None, help="name of the measured state, if git has none")
    parser.add_argument("--results", default="benchmarks/results", type=str, help="folder of the result files")
    parser.add_argument("--gpu", default="h100-sxm", type=str, help="of roofline: which GPU")
    parser.add_argument("--measured", action="store_true", help="of roofline: the newest measured ceilings instead")
    parser.add_argument("--out", default=None, type=str | None, help="of roofline: the picture")
    return parser


def _tune_parser():
    parser = _new(
        "Measure the launches of every convolution of a network on this GPU, cuDNN beside them, all checked for right "
        "results first, and keep the fastest in FASTCNN_CACHE (default: fastcnn in the user's cache folder), where "
        "later processes find them. Without tuning, predictions choose."
    )
    parser.add_argument("model", help="resnet50, timm:convnext_tiny, fastcnn:lenet5, ...")
    parser.add_argument("--batch", default=256, type=int, help="images")
    parser.add_argument("--image-size", default=None, type=int | None, help="height and width")
    parser.add_argument("--dtype", default="bf16", type=str, help="bf16, fp16 or fp32")
    parser.add_argument("--layout", default="channels_last", type=str, help="channels_last or contiguous")
    parser.add_argument("--all", action="store_true", help="measure every candidate, not only the predicted best")
    parser.add_argument("--dry-run", action="store_true", help="print predictions; needs no GPU and measures nothing")
    parser.add_argument("--gpu", default="h100-sxm", type=str, help="of --dry-run: which GPU")
    return parser


def _summary_parser():
    parser = _new(
        "Output, memory, parameters, multiply-adds and receptive field of every layer, and their sums. Norms and "
        "activations belong to the layer before them."
    )
    parser.add_argument("model", help="resnet50, timm:convnext_tiny, fastcnn:lenet5, ...")
    parser.add_argument("--image-size", default=None, type=int | None, help="height and width")
    parser.add_argument("--in-chans", default=None, type=int | None, help="channels of the images")
    parser.add_argument("--num-classes", default=None, type=int | None, help="outputs")
    parser.add_argument("--batch", default=1, type=int, help="images, for the memory of a batch")
    parser.add_argument("--depth", default=None, type=int | None, help="a row per module so deep instead of per layer")
    parser.add_argument("--csv", default=None, type=str | None, help="write the rows into this file, too")
    parser.add_argument("--json", default=None, type=str | None, help="write rows and sums into this file, too")
    return parser


def _train_config(options):
    from fastcnn.train.config import TrainConfig

    return TrainConfig(**{spec.name: options[spec.name] for spec in fields(TrainConfig)})


def _how_to_resume(options):
    return f"; continue with: fastcnn train --resume --out {shlex.quote(_train_config(options).out)}"


def _train(options):
    from fastcnn.train import train

    train(_train_config(options))
    return 0


def _eval(options):
    from fastcnn.train import load_run

    run = load_run(options.run, options.device)
    result = run.evaluate(options.data_dir)
    confusion, total = result["confusion"], int(result["confusion"].sum())
    print(f"{result['split']} accuracy {result['accuracy']:.2%} ({int(confusion.trace())} of {total} images)")
    if len(run.classes) <= 20:
        width = max(map(len, [*run.classes, str(int(confusion.max()))])) + 2
        print("rows: true class, columns: predicted class")
        print(" " * width + "".join(name.rjust(width) for name in run.classes))
        for name, row in zip(run.classes, confusion.tolist(), strict=True):
            print(name.rjust(width) + "".join((str(n) if n else ".").rjust(width) for n in row))
    return 0


def _predict(options):
    from fastcnn.train import load_run

    run = load_run(options.run, options.device)
    for path, row in zip(options.images, run.predict(options.images, options.invert), strict=True):
        probability, index = row.max(0)
        # a file name may be no valid text
        name = os.fsencode(path).decode(errors="replace")
        print(f"{name}  {run.classes[index]}  {probability:.1%}")
    return 0


def _bench(options):
    from fastcnn.benchmarks import report, run
    from fastcnn.study import roofline

    if options.what == "roofline":
        for network in options.networks or ["resnet50"]:
            roofline.command(network, options.batch or 256, options.gpu, options.results, options.measured, options.out)
        return 0
    found = []
    if options.what != "report":
        found = run.bench(
            options.what,
            options.networks,
            quick=options.quick,
            ops=options.op,
            case=options.case,
            providers=options.provider,
            device=options.device,
            dtype=options.dtype,
            layout=options.layout,
            batch=options.batch,
            seconds=options.seconds,
            resume=options.resume,
            commit=options.commit,
            results=options.results,
        )
    written = report.write(options.results)
    print(f"\n{len(written)} tables and plots in {options.results}")
    wrong = {(r["op"], r["case"]) for r in found if r["status"] == "FAIL" and r["provider"].startswith("fastcnn")}
    for op, case in sorted(wrong):
        print(f"FAIL: fastcnn's {op} is wrong in {case}", file=sys.stderr)
    return 1 if wrong else 0


def _tune(options):
    from fastcnn import tune

    return tune.command(
        options.model,
        batch=options.batch,
        image_size=options.image_size,
        dtype=options.dtype,
        layout=options.layout,
        everything=options.all,
        dry_run=options.dry_run,
        gpu=options.gpu,
    )


def _models(options):
    from fastcnn.study import gallery

    gallery.command(options.pattern, options.sort, options.results, options.plot)
    return 0


def _study(options):
    from fastcnn.study import counting

    chosen = options[options.subcommand]
    names = ("image_size", "in_chans", "num_classes", "batch", "depth", "csv", "json")
    counting.command(chosen.model, **{name: chosen[name] for name in names})
    return 0


def _explain(options):
    if options.run is None:
        from fastcnn import explain

        print(explain())
        return 0
    path = Path(options.run) / "kernels.txt"
    if not path.exists():
        raise ValueError(f"{options.run} holds no finished run: there is no kernels.txt")
    print(path.read_text(), end="")
    return 0


def _env(options):
    from fastcnn import env

    print(env())
    return 0


COMMANDS = {
    "train": _train,
    "eval": _eval,
    "predict": _predict,
    "bench": _bench,
    "tune": _tune,
    "models": _models,
    "study": _study,
    "explain": _explain,
    "env": _env,
}
