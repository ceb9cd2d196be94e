"""The folder of a run: its flags, its metrics, and what is said at its end."""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from utils import RESTARTED, command, stop

STARTED_BY = "started_by"  # in config.json: which torchrun has begun the run
DATA = "checksum_of_data"  # in config.json


def open_run(args: argparse.Namespace, part: str, fixed: Sequence[str]) -> Path:
    """Make <work_dir>/<part>/ and write config.json there: all flags, the versions, the commit.

    A folder that holds weights is only used again with --resume, or by the torchrun that began the run, so no run
    overwrites another; and then the flags named in `fixed` have to be those of the run that goes on. Nor is it used
    while another process trains in it.
    """
    run_dir = args.work_dir / part
    config_file = run_dir / "config.json"
    try:
        if goes_on(args, config_file):
            refuse_other_flags(args, config_file, fixed)
        elif any((run_dir / "weights").glob("*")):
            stop(f"{run_dir} holds an earlier run: add --resume to go on with it, or choose another --work_dir")
        for name in ["weights", "logs"]:
            (run_dir / name).mkdir(parents=True, exist_ok=True)
        refuse_another_process(run_dir)
        config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        config |= {"versions": installed_versions(), "commit": git_commit(), STARTED_BY: this_torchrun()}
        config |= {DATA: checksum(args.data_root)}
        beside = config_file.with_suffix(".tmp")
        beside.write_text(json.dumps(config, indent=2) + "\n")
        beside.replace(config_file)
    except OSError as error:
        stop(f"--work_dir {args.work_dir}: {error.strerror}: {error.filename or run_dir}")
    return run_dir


def goes_on(args: argparse.Namespace, config_file: Path) -> bool:
    """Whether a run is to be continued: with --resume, or when torchrun starts again what it has started before."""
    if "--resume" in sys.argv or not RESTARTED:  # after a restart, args.resume is true in any case
        return args.resume
    return config_file.exists() and read_config(config_file).get(STARTED_BY) == this_torchrun()


def this_torchrun() -> str | None:
    """What the processes of one torchrun have in common, also those that it starts again; None without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"torchrun {run_id}, process {os.getppid()}" if run_id else None


def read_config(config_file: Path) -> dict[str, Any]:
    """The flags of the run that goes on; leaves with a message if there is none."""
    try:
        return dict(json.loads(config_file.read_text()))
    except FileNotFoundError:
        if any((config_file.parent / "weights").glob("*")):
            stop(f"--resume: {config_file} is gone; put it back, or start again in another --work_dir")
        stop(f"--resume: there is no run in {config_file.parent}; leave --resume away to start one")
    except (ValueError, TypeError) as error:
        stop(f"--resume: {config_file} is damaged ({error}); start again in another --work_dir")


def refuse_other_flags(args: argparse.Namespace, config_file: Path, fixed: Sequence[str]) -> None:
    """Leave with a message if the run that goes on was started with others of these flags."""
    before = read_config(config_file)
    for name in fixed:
        value = before.get(name)
        if value != json.loads(json.dumps(getattr(args, name), default=str)):  # tuples come out of it as lists
            missing = value is None or value is False
            way = f"without --{name}" if missing else f"with {as_typed(name, value)}"
            stop(f"--resume: the run in {config_file.parent} was started {way}; do the same")
    if before.get(DATA) not in (None, checksum(args.data_root)):
        print("warning: --resume: these are not the photographs, or not the split, that the run has begun with")


def checksum(data_root: Path) -> str:
    """What tells one set of prepared data from another: made of its tables or, in part 7, of its annotations."""
    places = ["csv_file/train.csv", "csv_file/valid.csv", "annotations/train.json", "annotations/valid.json"]
    digest = hashlib.sha256()
    for path in [data_root / place for place in places if (data_root / place).is_file()]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def refuse_another_process(run_dir: Path) -> None:
    """Leave with a message if another process trains in run_dir: each would overwrite what the other one saves."""
    lock = os.open(run_dir / "logs" / ".lock", os.O_RDWR | os.O_CREAT)  # held, and open, until this process ends
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        stop(f"another process is training in {run_dir}: wait for its end, or choose another --work_dir")
    except OSError:  # a network drive that knows no locks
        os.close(lock)


def as_typed(name: str, value: Any) -> str:
    """A flag as it stood on the command line: --name, --name VALUE, --name A B or --name KEY=VALUE."""
    if isinstance(value, dict):
        value = [f"{key}={one}" for key, one in value.items()]
    words = [] if value is True else value if isinstance(value, list) else [value]
    return " ".join([f"--{name}", *map(str, words)])


def installed_versions() -> dict[str, str]:
    """The version of Python and of each package that this part's requirements.in names."""
    file = Path(__file__).with_name("requirements.in")
    versions = {"python": sys.version.split()[0]}
    for line in file.read_text().splitlines() if file.exists() else []:
        name = re.split(r"[^\w.-]", line)[0]  # before an extra, a version or a comment
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):  # not installed, or no name
            versions[name] = importlib.metadata.version(name)
    return versions


def git_commit() -> str | None:
    """The commit of this folder, if it is in a git repository."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_metrics(run_dir: Path, epochs: int, resume: bool) -> list[dict[str, float]]:
    """The first `epochs` rows of a run's metrics.csv: all, or all but that of an epoch that has to be repeated.

    Leaves with a message if it does not go with the last checkpoint, after so many epochs: the rows tell which was
    the best one.
    """
    file = run_dir / "logs" / "metrics.csv"
    if not resume or (epochs == 0 and not file.exists()):
        return []
    try:
        table = pd.read_csv(file)
        table[["epoch", "val_iou", "val_f1"]].astype(float)  # a spreadsheet may have made a text of them
        rows = table.to_dict("records")
    except (OSError, ValueError, LookupError) as error:
        stop(f"--resume: {file} is damaged ({error}); put it back, or start again in another --work_dir")
    if len(rows) not in (epochs, epochs + 1):  # a run may be killed after it has written a row, and before it saves
        way = "put back what is missing, or start again in another --work_dir"
        stop(f"--resume: {file} has {len(rows)} epochs, the last checkpoint in weights/ {epochs}; {way}")
    return rows[:epochs]


def epochs_since_best(rows: Sequence[dict[str, float]], monitor: str = "val_iou") -> int:
    """How many epochs ago the best one was: the first with the highest `monitor`."""
    return len(rows) - 1 - max(range(len(rows)), key=lambda index: rows[index][monitor])


def why_over(args: argparse.Namespace, rows: Sequence[dict[str, float]], monitor: str = "val_iou") -> str | None:
    """What to say where --resume finds a run without an epoch left to do; None if there are some."""
    if rows and args.early_stopping and epochs_since_best(rows, monitor) >= args.early_stopping:
        return f"this run has stopped early, after {len(rows)} epochs; a larger --early_stopping would go on"
    return f"all {len(rows)} epochs are done" if len(rows) >= args.epochs else None


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


def report(args: argparse.Namespace, run_dir: Path, rows: list[dict[str, float]], monitor: str = "val_iou") -> None:
    """Say what a person wants to know at the end: how good, where, how fast, and what comes next.

    Args:
        args: the flags; data_root and fold stand in the command that comes next.
        rows: of metrics.csv; the best epoch is the first one with the highest `monitor`.
    """
    metrics = pd.DataFrame(rows)
    best = metrics.iloc[metrics[monitor].argmax()]
    weights = next((run_dir / "weights").glob("best.*"), None)
    if weights is None:
        stop(f"{run_dir}/weights: best.* is gone; put it back, or start again in another --work_dir", code=1)
    warm = metrics.iloc[1:] if len(metrics) > 1 else metrics  # in the first epoch much is built once
    curves = run_dir / "training_curves.png"
    try:
        plot_training_curves(metrics, curves)
    except OSError as error:
        stop(f"{error.strerror}: {curves}. All epochs are done and saved; with --resume, the curves are drawn", code=1)
    fold = ["--fold", args.fold] if "fold" in args and args.fold else []
    predict = command("predict.py", "--weights", weights, "--images", args.data_root, *fold)
    print(f"\nbest      IoU {best['val_iou']:.4f}, F1 {best['val_f1']:.4f} in validation: ", end="")
    print(f"epoch {best['epoch']:.0f} of {len(metrics)}, by {monitor}, {best[monitor]:.4f}")
    print(f"speed     {warm['images_per_second'].median():.1f} images/s, {warm['seconds'].median():.1f} s an epoch")
    print(f"weights   {weights}")
    print(f"curves    {curves}")
    print(f"now run   {predict}")
