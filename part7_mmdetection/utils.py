"""Flags, devices, precision and the folder of a run: what every part needs and no lesson is about."""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd


def stop(message: str, code: int = 2) -> NoReturn:
    """Say what is wrong and what to do, without a traceback, and leave.

    Args:
        message: names the file or the flag, and the way out.
        code: 2 if the command was wrong, 1 if something went wrong while it ran.
    """
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# --- flags -----------------------------------------------------------------------------------
# argparse puts the name of the flag in front of these messages and leaves with exit code 2.


def whole_number(lowest: int = 1) -> Any:
    """A parser for whole numbers of at least `lowest`."""

    def parse(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or not lowest <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")
        return int(text)

    return parse


def positive_number(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 < number < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def fraction(text: str) -> float:
    """Parse a number between 0 and 1, both excluded."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 < number < 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return number


def image_side(text: str) -> int:
    """Parse the side of the network's input: a multiple of 32, because an encoder halves it five times."""
    if not text.isdecimal() or int(text) < 32 or int(text) % 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 32 (such as 256, 384, 512)")
    return int(text)


def precision(text: str) -> str:
    """Parse --mixed_precision; "False" is a word here and not a truthy string."""
    values = {"true": "True", "false": "False", "fp16": "fp16", "bf16": "bf16"}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is none of True, False, fp16, bf16")
    return values[text.lower()]


def device(text: str) -> str:
    """Parse one word of --device: the number of a GPU, or "cpu"."""
    if text != "cpu" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a GPU nor 'cpu'")
    return text


def folder(text: str) -> Path:
    """Parse the path of a folder that is there."""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return path


def train_parser(description: str | None, encoder: str) -> argparse.ArgumentParser:
    """The flags that train.py has in every part; `encoder` is the part's default."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--data_root", type=folder, required=True, help="the folder that data_preparation.py wrote to")
    add("--work_dir", type=Path, default=Path("work_dir"), help="weights, logs and predictions go here (%(default)s)")
    add("--device", type=device, nargs="+", help="'0', '0 1' or 'cpu' ('cpu cpu' tries two devices without a GPU)")
    add("-b", "--batch_size", type=whole_number(), default=16, help="images a step, over all devices (%(default)s)")
    add("-e", "--epochs", type=whole_number(), default=100, help="(%(default)s)")
    add("--learning_rate", type=positive_number, default=1e-3, help="at the start; it falls (%(default)s)")
    add("--mixed_precision", type=precision, help="True, False, fp16 or bf16 (True on a GPU, False on a CPU)")
    add("--image_size", type=image_side, default=384, help="side of the network's input in pixels (%(default)s)")
    add("--encoder", default=encoder, help="the network's first half (%(default)s)")
    add("--encoder_weights", default="imagenet", help="'imagenet', 'none', or where weights are (%(default)s)")
    add(
        "--workers",
        type=whole_number(0),
        default=len(os.sched_getaffinity(0)),
        help="threads or processes that load (%(default)s)",
    )
    add("--seed", type=whole_number(0), default=42, help="everything random follows from it (%(default)s)")
    add("--log", choices=["none", "tensorboard", "wandb"], default="none", help="beside metrics.csv (%(default)s)")
    add("--resume", action="store_true", help="go on where the last run in work_dir stopped")
    add("--early_stopping", type=whole_number(), metavar="EPOCHS", help="stop after so many without a better IoU")
    add("--limit_batches", type=whole_number(), metavar="N", help="batches an epoch, for a first look")
    return parser


# --- devices and precision -------------------------------------------------------------------


def choose_devices(requested: Sequence[str] | None, gpus: Sequence[str]) -> list[str]:
    """Turn --device into device names.

    Args:
        requested: the words after --device, or None for the default.
        gpus: the names of the GPUs that the framework sees, in its order.

    Returns:
        Such as ["gpu:0", "gpu:1"], or ["cpu"].
    """
    if requested is None:
        if not gpus and shutil.which("nvidia-smi"):
            print("warning: this machine has an NVIDIA driver, but no GPU is found; training on the CPU")
        return ["gpu:0"] if gpus else ["cpu"]
    if set(requested) == {"cpu"}:
        return list(requested)
    if "cpu" in requested or len(set(requested)) < len(requested):
        stop(f"--device {' '.join(requested)}: give different GPUs, or only 'cpu'")
    for number in requested:
        if int(number) >= len(gpus):
            there = ", ".join(f"{i} ({name})" for i, name in enumerate(gpus)) or "none"
            stop(f"--device {number}: there is no such GPU. GPUs that are there: {there}. 'cpu' always works")
    return [f"gpu:{number}" for number in requested]


def choose_precision(requested: str | None, on_gpu: bool) -> str:
    """Turn --mixed_precision into "fp32", "fp16" or "bf16": True is fp16 on a GPU and bf16 on a CPU."""
    if requested is None:
        requested = str(on_gpu)
    if requested == "fp16" and not on_gpu:
        print("warning: CPUs calculate in fp16 several times slower than in fp32; bf16 is the faster one here")
    return {"True": "fp16" if on_gpu else "bf16", "False": "fp32"}.get(requested, requested)


# --- the folder of a run ---------------------------------------------------------------------


def open_run(args: argparse.Namespace, part: str, fixed: Sequence[str]) -> Path:
    """Make <work_dir>/<part>/ and write config.json there: all flags, the versions, the commit.

    A folder that holds weights is only used again with --resume, so no run overwrites another; and
    with --resume the flags named in `fixed` have to be those of the run that goes on.
    """
    run_dir = args.work_dir / part
    config_file = run_dir / "config.json"
    if args.resume:
        if not config_file.exists():
            stop(f"--resume: there is no run in {run_dir}; leave --resume away to start one")
        before = json.loads(config_file.read_text())
        for name in fixed:
            value = before.get(name)
            if value != json.loads(json.dumps(getattr(args, name), default=str)):  # tuples come out of it as lists
                words = " ".join(value) if isinstance(value, list) else value
                way = f"without --{name}; leave it away" if value is None else f"with --{name} {words}; use the same"
                stop(f"--resume: the run in {run_dir} was started {way}")
    elif any((run_dir / "weights").glob("*")):
        stop(f"{run_dir} holds an earlier run: add --resume to go on with it, or choose another --work_dir")
    try:
        for name in ["weights", "logs"]:
            (run_dir / name).mkdir(parents=True, exist_ok=True)
        config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        config |= {"versions": installed_versions(), "commit": git_commit()}
        beside = config_file.with_suffix(".tmp")
        beside.write_text(json.dumps(config, indent=2) + "\n")
        beside.replace(config_file)
    except OSError as error:
        stop(f"--work_dir {args.work_dir}: {error.strerror}: {error.filename}")
    return run_dir


def installed_versions() -> dict[str, str]:
    """The version of Python and of each package that this part's requirements.in names."""
    lines = Path(__file__).with_name("requirements.in").read_text().splitlines()
    versions = {"python": sys.version.split()[0]}
    for line in lines:
        name = re.split(r"[^\w.-]", line)[0]  # before an extra, a version or a comment
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):  # who needs it has said so
            versions[name] = importlib.metadata.version(name)
    return versions


def git_commit() -> str | None:
    """The commit of this folder, if it is in a git repository."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_metrics(run_dir: Path, epochs: int) -> list[dict[str, float]]:
    """The first `epochs` rows of a run's metrics.csv; those of epochs that have to be repeated are left out."""
    file = run_dir / "logs" / "metrics.csv"
    return pd.read_csv(file).head(epochs).to_dict("records") if file.exists() else []


def write_metrics(run_dir: Path, rows: list[dict[str, float]]) -> None:
    """Write metrics.csv beside and rename it: whoever reads it, or kills the run, never meets half a file."""
    file = run_dir / "logs" / "metrics.csv"
    beside = file.with_suffix(".tmp")
    pd.DataFrame(rows).to_csv(beside, index=False)
    beside.replace(file)


def plot_training_curves(metrics: pd.DataFrame, file: Path) -> None:
    """Draw loss and validation metrics over the epochs into a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # there may be no screen
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    precisions = [name for name in metrics if name.endswith("mAP")]  # part 7 has them, and no val_loss
    for axes, names in [(left, ["train_loss", "val_loss"]), (right, ["val_iou", "val_f1", *precisions])]:
        for name in [name for name in names if metrics[name].notna().any()]:
            axes.plot(metrics["epoch"], metrics[name], marker=".", label=name)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    right.set_ylim(0, 1)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def report(
    run_dir: Path, rows: list[dict[str, float]], photographs: Sequence[object], monitor: str = "val_iou"
) -> None:
    """Say what a person wants to know at the end: how good, where, how fast, and what comes next.

    Args:
        rows: of metrics.csv; the best epoch is the first one with the highest `monitor`.
        photographs: what stands behind --images in the command that comes next.
    """
    metrics = pd.DataFrame(rows)
    best = metrics.iloc[metrics[monitor].argmax()]
    weights = next((run_dir / "weights").glob("best.*"))
    warm = metrics.iloc[1:] if len(metrics) > 1 else metrics  # in the first epoch much is built once
    plot_training_curves(metrics, run_dir / "training_curves.png")
    predict = command("predict.py", "--weights", weights, "--images", *photographs)
    print(f"\nbest      IoU {best['val_iou']:.4f}, F1 {best['val_f1']:.4f} in validation: ", end="")
    print(f"epoch {best['epoch']:.0f} of {len(metrics)}, by {monitor}, {best[monitor]:.4f}")
    print(f"speed     {warm['images_per_second'].median():.1f} images/s, {warm['seconds'].median():.1f} s an epoch")
    print(f"weights   {weights}")
    print(f"curves    {run_dir / 'training_curves.png'}")
    print(f"now run   {predict}")


def command(script: str, *words: object) -> str:
    """A command, ready to be pasted into a shell, that calls a script beside the one that runs now."""
    # sys.executable is absolute; what is in this folder, as .venv-tf/bin/python, reads better without it
    python = "python" if shutil.which("python") == sys.executable else sys.executable.removeprefix(f"{Path.cwd()}/")
    return shlex.join([python, str(Path(sys.argv[0]).with_name(script)), *map(str, words)])


def resume_command() -> str:
    """This very command with --resume."""
    return command("train.py", *[word for word in sys.argv[1:] if word != "--resume"], "--resume")


def treat_sigterm_like_ctrl_c() -> None:
    """Schedulers end a job with SIGTERM; it shall leave the same way as after Ctrl-C."""

    def interrupt(signum: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
