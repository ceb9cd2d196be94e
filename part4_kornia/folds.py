"""--fold: validate with one of several folds, or each in turn: how much does the result depend on the split?"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from runs import why_over
from utils import resume_command, stop


def fold_or_all(text: str) -> str:
    """Parse --fold: the number of a fold, or "all"."""
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a fold nor 'all'")
    return text


def find_folds(train_paths: pd.DataFrame, valid_paths: pd.DataFrame) -> list[str]:
    """The folds that data_preparation.py --folds wrote; leaves with a message if it wrote none."""
    tables = [train_paths, valid_paths]
    folds = {fold for table in tables for fold in table.get("fold", []) if fold.isdecimal()}
    if len(folds) < 2:
        stop("--fold: the data has no folds; data_preparation.py --folds 5 makes five")
    return sorted(folds, key=int)


def split_by_fold(train_paths: pd.DataFrame, valid_paths: pd.DataFrame, fold: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All folds but one for training, and that one for validation; leaves with a message if there is none."""
    folds = find_folds(train_paths, valid_paths)
    if fold not in folds:
        stop(f"--fold {fold}: there is no such fold, only {', '.join(folds)}")
    paths = pd.concat([valid_paths, train_paths]).sort_values("images")
    return paths[paths["fold"] != fold], paths[paths["fold"] == fold]


def train_all_folds(args: argparse.Namespace, run_dir: Path, folds: list[str]) -> None:
    """Call this very command for each fold, and print the mean and the deviation over the folds.

    Each fold is a process and a run of its own, in <run_dir>/fold<k>. With --resume, folds that are done
    are left as they are. Leaves with the exit code of the first one that fails.
    """
    if "RANK" in os.environ:
        stop("--fold all: every process of torchrun would train all folds; give --device 0 1 without torchrun")
    rows = []
    for fold in folds:
        fold_dir = run_dir / f"fold{fold}"
        if not (args.resume and is_finished(fold_dir, args)):
            print(f"\n== fold {fold} of {', '.join(folds)}", flush=True)
            begun = (fold_dir / "config.json").exists()
            words = [word for word in sys.argv if word != "--resume" or begun]
            code = wait_for(subprocess.Popen([sys.executable, *words, "--fold", fold]))  # the last --fold counts
            if code:
                stop(f"stopped in fold {fold}. Go on with all of them:\n    {resume_command()}", code)
        metrics = pd.read_csv(fold_dir / "logs" / "metrics.csv")
        best = metrics.iloc[metrics["val_iou"].argmax()]
        rows.append({"fold": fold, "best_epoch": int(best["epoch"]), "iou": best["val_iou"], "f1": best["val_f1"]})
    table = pd.DataFrame(rows)
    table.to_csv(run_dir / "folds.csv", index=False)
    print(f"\n{table.to_string(index=False, float_format='%.4f')}\n")
    for name in ["iou", "f1"]:
        print(f"{name:4}  mean {table[name].mean():.4f}, standard deviation {table[name].std():.4f}")
    print(f"\nThe deviation tells how much the split matters. The table is in {run_dir / 'folds.csv'}, too")


def is_finished(fold_dir: Path, args: argparse.Namespace) -> bool:
    """Whether a fold has trained all its epochs, or has stopped early."""
    metrics_csv = fold_dir / "logs" / "metrics.csv"
    if not (fold_dir / "training_curves.png").exists():  # the last thing that a run writes
        return False
    return why_over(args, pd.read_csv(metrics_csv).to_dict("records")) is not None


def wait_for(process: subprocess.Popen) -> int:
    """The exit code of a process that gets our signals and deals with them itself; never 0 after one of them."""
    signals = []

    def pass_on(number: int, frame: Any) -> None:
        signals.append(number)
        if number == signal.SIGTERM:  # Ctrl-C reaches it without our help
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    return process.wait() or (130 if signals else 0)  # 0: it was about to end, and has; but no other shall begin
