"""Whatever happens, nothing is lost, and the message helps: damaged runs, full disks, chance, strangers' files.

The parts' tests import these; they have a fixture `part`. Bad data is in bad_data_tests.py.
"""

import fcntl
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from bad_data import copy, first, halve, replace
from conftest import ROOT, Part

PHOTOGRAPHS = 24


@pytest.fixture(scope="module")
def small_root(part: Part, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few photographs, prepared by the part itself."""
    root = tmp_path_factory.mktemp("small") / "nails"
    command = [part.python, ROOT / "sample_data.py", "--data_root", root, "--images", PHOTOGRAPHS]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    part.run("data_preparation.py", "--data_root", root)
    return root


def flags(part: Part, root: Path, work_dir: Path | str, *more: object) -> list[object]:
    if part.name == "part2_balanced_data":
        more = ("--balance", "none", *more)  # else it would not look at each photograph
    size = ["--image_size", 64 if part.ending == "pth" else 32, "--batch_size", 4]  # nothing has to be found
    return ["--data_root", root, "--work_dir", work_dir, *part.small, *size, "--epochs", 1, *more]


def message_of(done: subprocess.CompletedProcess[str]) -> str:
    """What stands behind our "error: "; libraries may have said something before."""
    return re.split(r"^(?:train.py: )?error: ", done.stderr, maxsplit=1, flags=re.MULTILINE)[1]


@pytest.fixture(scope="module")
def run(part: Part, small_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs."""
    work_dir = tmp_path_factory.mktemp("runs")
    part.run("train.py", *flags(part, small_root, work_dir, "--epochs", 2))
    return work_dir


EVIL = """
import os, pickle, sys

class Evil:
    def __reduce__(self):
        return os.mkdir, (sys.argv[2],)

if sys.argv[3] == "torch":
    import torch
    torch.save({"state_dict": Evil(), "hyper_parameters": {}, "NailDataModule": {"epoch": 0}}, sys.argv[1])
else:
    with open(sys.argv[1], "wb") as file:
        pickle.dump(Evil(), file)
"""


def test_damaged_runs_are_told(part: Part, small_root: Path, run: Path, tmp_path: Path) -> None:
    last = {"ckpt": "last.ckpt", "pth": "last.pth", "h5": "last-2.index"}[part.ending]

    damages: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "config": ("config.json", lambda file: file.write_text("{")),
        "config gone": ("config.json", Path.unlink),
        "metrics": ("logs/metrics.csv", lambda file: file.write_bytes(b"\x00\xff")),
        "metrics of a spreadsheet": (
            "logs/metrics.csv",
            lambda file: file.write_text(file.read_text().replace(",", ";")),
        ),
        "metrics gone": ("logs/metrics.csv", Path.unlink),
        "cut off": (f"weights/{last}", halve),
        "text": (f"weights/{last}", lambda file: file.write_text("text")),
        "gone": (f"weights/{last}", Path.unlink),
    }
    if part.ending == "h5":  # last-2.index tells where in this file what is
        damages["data cut off"] = ("weights/last-2.data-00000-of-00001", halve)
    for name, (file, damage) in damages.items():
        copied = tmp_path / name
        shutil.copytree(run, copied)
        damage(part.run_dir(copied) / file)
        done = part.run("train.py", *flags(part, small_root, copied, "--epochs", 3, "--resume"), code=2)
        assert file.split("/")[-1].split("-")[0] in done.stderr or name == "gone", (name, done.stderr)
        assert len(message_of(done).splitlines()) == 1, done.stderr
    nothing = part.run("train.py", *flags(part, small_root, tmp_path / "none", "--resume"), code=2)
    assert "--resume" in nothing.stderr
    # After one epoch, what is left may as well be of a run that was killed in its first one.
    part.run("train.py", *flags(part, small_root, tmp_path / "one"))
    for checkpoint in (part.run_dir(tmp_path / "one") / "weights").glob("last*"):
        checkpoint.unlink()
    printed = part.run("train.py", *flags(part, small_root, tmp_path / "one", "--resume")).stdout
    assert "best " in printed and "epochs are done" not in printed


def test_a_run_goes_on_alone_and_with_what_is_its_own(part: Part, small_root: Path, run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "runs"
    shutil.copytree(run, copied)
    run_dir = part.run_dir(copied)
    args = flags(part, small_root, copied, "--resume")
    with (run_dir / "logs" / ".lock").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # as another run would
        refused = part.run("train.py", *args, "--epochs", 3, code=2)
        assert "another process" in refused.stderr and str(run_dir) in refused.stderr
    other_root = copy(small_root, tmp_path / "nails")
    train_csv, train_json = other_root / "csv_file" / "train.csv", other_root / "annotations" / "train.json"
    replace(train_csv, "".join(train_csv.read_text().splitlines(keepends=True)[:-1]))
    if train_json.exists():
        replace(train_json, json.dumps(json.loads(train_json.read_text()), indent=1))
    assert "not the photographs" not in part.run("train.py", *args, "--epochs", 2).stdout
    other = flags(part, other_root, copied, "--resume", "--epochs", 3)
    assert "warning: --resume: these are not the photographs" in part.run("train.py", *other).stdout
    next((run_dir / "weights").glob("best.*")).unlink()
    assert "best.* is gone" in part.run("train.py", *args, "--epochs", 3, code=1).stderr


def test_predictions_replace_nothing_of_the_users(part: Part, small_root: Path, run: Path, tmp_path: Path) -> None:
    weights = next((part.run_dir(run) / "weights").glob("best.*"))
    photograph, mine = tmp_path / "a.png", tmp_path / "a_mask.png"
    shutil.copy(first(small_root), photograph)
    mine.write_text("mine")
    metrics_csv = part.run_dir(run) / "logs" / "metrics.csv"
    before = metrics_csv.read_bytes()
    for images, output_dir in [(photograph, tmp_path), (small_root, metrics_csv.parent), (small_root, "")]:
        args = ["--weights", weights, "--images", images, "--output_dir", output_dir]
        assert "--output_dir" in part.run("predict.py", *args, code=2).stderr
    assert mine.read_text() == "mine" and metrics_csv.read_bytes() == before


def test_a_run_that_was_killed_before_its_last_lines_gets_them(part: Part, small_root: Path, run: Path) -> None:
    curves = part.run_dir(run) / "training_curves.png"
    curves.unlink()
    printed = part.run("train.py", *flags(part, small_root, run, "--epochs", 2, "--resume")).stdout
    assert "all 2 epochs are done" in printed and "best " in printed and "predict.py --weights" in printed
    assert Image.open(curves).size[0] > 500


def test_a_run_that_has_stopped_early_is_over(part: Part, small_root: Path, tmp_path: Path) -> None:
    more = ["--epochs", 40, "--limit_batches", 1, "--learning_rate", 1e-30, "--early_stopping", 2]
    args = flags(part, small_root, tmp_path, *more)
    assert "in 2 epochs: stopping early" in part.run("train.py", *args).stdout
    metrics_csv = part.run_dir(tmp_path) / "logs" / "metrics.csv"
    metrics = pd.read_csv(metrics_csv)
    assert len(metrics) == metrics["segm_mAP" if part.ending == "pth" else "val_iou"].argmax() + 3 < 40
    printed = part.run("train.py", *args, "--resume").stdout
    assert f"stopped early, after {len(metrics)} epochs" in printed and "best " in printed
    assert len(pd.read_csv(metrics_csv)) == len(metrics)


def test_a_full_disk_leaves_the_last_checkpoint(part: Part, small_root: Path, run: Path, tmp_path: Path) -> None:
    """A limit to the size of a file is met where a full disk would be."""
    copied = tmp_path / "runs"
    shutil.copytree(run, copied)
    weights = part.run_dir(copied) / "weights"
    before = {path.name: path.read_bytes() for path in weights.iterdir()}
    args = flags(part, small_root, copied, "--epochs", 3, "--resume", "--workers", 0)
    command = ["prlimit", "--fsize=200000", part.python, "train.py", *args]
    done = subprocess.run(list(map(str, command)), cwd=part.folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    message = message_of(done)
    assert "File too large" in message and str(weights) in message and "--resume" in message
    assert {name: (weights / name).read_bytes() for name in before} == before
    part.run("train.py", *args)
    leftovers = [path.name for path in weights.iterdir() if path.name.endswith((".tmp", "_temp", "new.h5"))]
    assert leftovers == []


def test_chance_follows_from_the_seed_alone(part: Part, small_root: Path, tmp_path: Path) -> None:
    tables = []
    for name, more in [
        ("first", ["--workers", 2]),
        ("again", ["--workers", 0]),
        ("one", ["--workers", 1]),
        ("other", ["--seed", 7]),
    ]:
        part.run("train.py", *flags(part, small_root, tmp_path / name, "--epochs", 2, *more))
        metrics = pd.read_csv(part.run_dir(tmp_path / name) / "logs" / "metrics.csv")
        tables.append(metrics.drop(columns=["seconds", "images_per_second"]))
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
    pd.testing.assert_frame_equal(tables[0], tables[2], check_exact=True)
    assert not tables[0].equals(tables[3])


def test_a_loss_that_is_not_finite_leaves_no_such_weights(part: Part, small_root: Path, tmp_path: Path) -> None:
    # With one step an epoch, its loss is still a number; the weights that it makes are none.
    rate, more = (1e30, ["--optimizer", "adamw"]) if part.ending == "h5" else (1e300, ["--limit_batches", 1])
    args = flags(part, small_root, tmp_path, "--epochs", 5, "--learning_rate", rate, *more)
    done = part.run("train.py", *args, code=1)
    assert ("nan" in done.stderr or "inf" in done.stderr) and "--learning_rate" in done.stderr
    assert part.ending != "ckpt" or "in validation" in done.stderr
    assert "--mixed_precision False" in done.stderr
    assert not any((part.run_dir(tmp_path) / "weights").iterdir())


def test_nothing_that_a_checkpoint_says_is_executed(part: Part, small_root: Path, run: Path, tmp_path: Path) -> None:
    (part.folder / "evil.py").write_text(EVIL)
    executed = tmp_path / "executed"
    kind = "pickle" if part.ending == "h5" else "torch"
    bad = tmp_path / f"best.{part.ending}"
    part.run("evil.py", bad, executed, kind)
    trust = {"torch": "torch.load(sys.argv[1], weights_only=False)", "pickle": "pickle.load(open(sys.argv[1], 'rb'))"}
    part.run("-c", f"import sys, {kind}; {trust[kind]}", bad)
    assert executed.exists()  # it does what it says to whoever trusts it
    executed.rmdir()
    assert str(bad) in part.run("predict.py", "--weights", bad, "--images", small_root, code=2).stderr
    args = flags(part, small_root, tmp_path / "runs", "--encoder_weights", bad)
    part.run("train.py", *args, code=2)
    if part.ending != "h5":
        copied = tmp_path / "copied"
        shutil.copytree(run, copied)
        shutil.copy(bad, part.run_dir(copied) / "weights" / f"last.{part.ending}")
        part.run("train.py", *flags(part, small_root, copied, "--epochs", 3, "--resume"), code=2)
    assert not executed.exists()
