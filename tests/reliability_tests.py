"""Whatever happens, nothing is lost, and the message helps: bad data, odd names, damaged runs, full disks, chance.

The parts' tests import these; they have a fixture `part`. The table in tests/README.md lists all kinds.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bad_data import AGAIN, CODES_OF_PART7, KINDS, TABLES, bomb, copy, edit_table, first, halve, replace
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
    return ["--data_root", root, "--work_dir", work_dir, *part.small, "--batch_size", 4, "--epochs", 1, *more]


def message_of(done: subprocess.CompletedProcess[str]) -> str:
    """What stands behind our "error: "; libraries may have said something before."""
    return re.split(r"^(?:train.py: )?error: ", done.stderr, maxsplit=1, flags=re.MULTILINE)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_data_is_told_or_does_no_harm(part: Part, small_root: Path, tmp_path: Path, kind: str) -> None:
    if kind in TABLES and part.name[4] in "57":
        pytest.skip("part 5 reads tables as part 3 does; part 7 annotations: test_own_annotations_of_several_classes")
    bad = KINDS[kind]
    code = CODES_OF_PART7.get(kind, bad.code) if part.ending == "pth" else bad.code
    root = copy(small_root, tmp_path / "nails")
    paths = {"image": first(root), "mask": first(root, "masks"), "name": first(root).name}
    bad.spoil(root)
    done = part.run("train.py", *flags(part, root, tmp_path / "runs"), code=code)
    if code:
        assert "error: " in done.stderr
        for word in bad.words:
            assert word.format(**paths) in done.stderr
        assert len(message_of(done).splitlines()) <= 3  # the message, and how to go on
    else:
        metrics = pd.read_csv(part.run_dir(tmp_path / "runs") / "logs" / "metrics.csv")
        assert np.isfinite(metrics[["train_loss", "val_iou", "val_f1"]]).all().all()
    shutil.rmtree(tmp_path)


def test_folders_that_cannot_be_used(part: Part, small_root: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    few = ["--batch_size", 100]
    for root, work_dir, more, words in [
        (file, tmp_path, [], ["--data_root", str(file)]),
        (tmp_path / "nowhere", tmp_path, [], ["--data_root", "nowhere"]),
        (tmp_path, tmp_path, [], [AGAIN]),  # a folder, but not a prepared one
        (small_root, file, [], ["--work_dir", str(file)]),
        (small_root, file / "below", [], ["--work_dir", str(file)]),
        (small_root, Path("/proc/nails"), [], ["--work_dir", "/proc/nails"]),
        (small_root, tmp_path / ("x" * 300), [], ["--work_dir", "xxx"]),
        (small_root, tmp_path, few, ["--batch_size 100", "there are only"]),
        (small_root, tmp_path, ["--encoder_weights", ""], ["--encoder_weights", "empty"]),
        (small_root, "~no_such_user/runs", [], ["--work_dir", "~no_such_user"]),
        (small_root, tmp_path, ["--encoder", "nothing"], ["--encoder", "nothing"]),
        (small_root, tmp_path, ["--encoder_weights", "nowhere.x"], ["--encoder_weights", "nowhere.x"]),
    ]:
        done = part.run("train.py", *flags(part, root, work_dir, *more), code=2)
        for word in words:
            assert word in done.stderr, (words, done.stderr)
        assert len(message_of(done).splitlines()) == 1


ODD = 'it\'s a "quoted" é 漢 [1]*? $HOME; #'


def test_odd_names_are_names_like_others(part: Part, small_root: Path, tmp_path: Path) -> None:
    root = copy(small_root, tmp_path / ODD / ("long" * 50) / "nails")
    runs = tmp_path / ODD / "runs"
    if part.ending == "h5":  # TensorFlow takes the path of a checkpoint for a pattern
        assert "--work_dir" in part.run("train.py", *flags(part, root, runs), code=2).stderr
        runs = tmp_path / re.sub(r"[\[*?]", "", ODD) / "runs"
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    part.run("train.py", *flags(part, root, runs))
    part.run("train.py", *flags(part, root, runs, "--epochs", 2, "--resume"))
    weights = next((part.run_dir(runs) / "weights").glob("best.*"))
    photograph = tmp_path / f"{ODD}.png"
    shutil.copy(first(root), photograph)
    part.run("predict.py", "--weights", weights, "--images", photograph, "--output_dir", tmp_path / ODD / "found")
    assert (tmp_path / ODD / "found" / f"{ODD}_mask.png").exists()
    assert sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*")) == before  # read-only would do


# --- runs that were damaged ----------------------------------------------------------------------


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


# --- prediction ----------------------------------------------------------------------------------


def test_bad_photographs_are_skipped_and_told(part: Part, small_root: Path, run: Path, tmp_path: Path) -> None:
    weights = next((part.run_dir(run) / "weights").glob("best.*"))
    images = tmp_path / "images"
    images.mkdir()
    good = Image.open(first(small_root))
    good.save(images / "good.png")
    good.resize((1, 1)).save(images / "pixel.png")
    good.resize((20_000, 40)).save(images / "wide.png")
    good.convert("L").save(images / "grey.jpg")
    good.save(images / "un\aknown.png")  # a bell
    shutil.copy(first(small_root), images / "half.png")
    halve(images / "half.png")
    (images / "empty.jpg").touch()
    (images / "text.png").write_text("no image")
    (images / "bomb.png").write_bytes(bomb(40_000))
    os.mkfifo(images / "pipe.png")
    (images / "notes.txt").write_text("of no interest")
    args = ["--weights", weights, "--images"]
    done = part.run("predict.py", *args, images, "--output_dir", tmp_path / "out", code=1)
    bad = ["half.png", "empty.jpg", "text.png", "bomb.png", "pipe.png", "un\\x07known.png"]
    bad += ["wide.png"] if part.ending == "pth" else []  # it keeps the shape, and then nothing is left of the height
    for name in bad:
        assert f"skipped {images}/{name}: " in done.stderr
    assert f"error: {len(bad)} of 10 photographs" in done.stderr
    masks = {path.name.removesuffix("_mask.png") for path in (tmp_path / "out").glob("*_mask.png")}
    assert masks == {"good", "pixel", "wide", "grey"} - {Path(name).stem for name in bad}
    assert Image.open(tmp_path / "out" / "good_mask.png").size == good.size

    file, empty, twins = tmp_path / "file.png", tmp_path / "empty", tmp_path / "twins"
    file.touch()
    empty.mkdir()
    twins.mkdir()
    good.save(twins / "hand.png")
    good.save(twins / "hand.bmp")
    outside = copy(small_root, tmp_path / "outside")
    edit_table(lambda table: table.assign(fold="0", images="/train/images/0/a.png"))(outside)
    of_folds = [
        ([small_root, "--fold", 9], 2, ["--fold 9"]),
        ([outside, "--fold", 0], 2, ["--fold", "outside"]),
        ([empty, "--fold", 0], 2, ["--fold", "empty"]),
    ]
    for more, code, words in (of_folds if part.ending == "ckpt" else []) + [
        ([twins], 2, ["2 photographs named hand"]),
        ([tmp_path / "nowhere"], 2, ["--images", "nowhere"]),
        ([empty], 2, ["--images", "no photographs"]),
        ([images / "good.png", "--output_dir", file], 2, ["--output_dir"]),
        ([images / "good.png", "--output_dir", file / "below"], 1, [str(file)]),
        ([images / "good.png", "--output_dir", "/proc/nails"], 1, ["/proc/nails"]),
        ([images, "--output_dir", images / "below"], 2, ["--output_dir"]),
        ([images / "good.png", "--masks", empty, "--output_dir", tmp_path / "one"], 1, ["--masks"]),
        ([images / "good.png", "--masks", file], 2, ["--masks"]),
    ]:
        failed = part.run("predict.py", *args, *more, code=code)
        assert all(word in failed.stderr for word in words), failed.stderr
    for no_weights in [tmp_path / "nowhere.x", tmp_path, file, small_root / "csv_file" / "train.csv"]:
        failed = part.run("predict.py", "--weights", no_weights, "--images", images / "good.png", code=2)
        assert "--weights" in failed.stderr and str(no_weights) in failed.stderr
