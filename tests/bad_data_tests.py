"""Bad data, through training and through prediction: it is told, or does no harm.

The parts' tests import these beside those of reliability_tests.py, whose fixtures they need. The table in
tests/README.md lists all kinds.
"""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bad_data import AGAIN, CODES_OF_PART7, FILES, KINDS, TABLES, bomb, copy, edit_table, first, halve, move_on
from conftest import Part
from reliability_tests import flags, message_of


def code_of(part: Part, kind: str) -> int:
    """The exit code of train.py with this kind of bad data."""
    return CODES_OF_PART7.get(kind, KINDS[kind].code) if part.ending == "pth" else KINDS[kind].code


@pytest.mark.parametrize("kind", KINDS)
def test_bad_data_is_told(part: Part, small_root: Path, tmp_path: Path, kind: str) -> None:
    if kind in TABLES and part.name[4] in "57":
        pytest.skip("part 5 reads tables as part 3 does; part 7 annotations: test_annotations.py")
    if code_of(part, kind) == 0:
        pytest.skip("it does no harm: the next test")
    root = copy(small_root, tmp_path / "nails")
    paths = {"image": first(root), "mask": first(root, "masks"), "name": first(root).name}
    KINDS[kind].spoil(root)
    done = part.run("train.py", *flags(part, root, tmp_path / "runs"), code=code_of(part, kind))
    assert "error: " in done.stderr
    for word in KINDS[kind].words:
        assert word.format(**paths) in done.stderr
    assert len(message_of(done).splitlines()) <= 3  # the message, and how to go on
    shutil.rmtree(tmp_path)


def test_odd_data_does_no_harm(part: Part, small_root: Path, tmp_path: Path) -> None:
    root = copy(small_root, tmp_path / "nails")
    for kind in [*FILES, *TABLES]:  # those of files need tables that can still be read
        if code_of(part, kind) == 0:
            KINDS[kind].spoil(root)
            if kind in FILES:
                move_on(root)  # the next kind is that of another photograph
    part.run("train.py", *flags(part, root, tmp_path / "runs"))
    metrics = pd.read_csv(part.run_dir(tmp_path / "runs") / "logs" / "metrics.csv")
    assert np.isfinite(metrics[["train_loss", "val_iou", "val_f1"]]).all().all()


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
