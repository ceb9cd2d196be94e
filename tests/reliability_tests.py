"""Whatever happens, nothing is lost, and the message helps: bad data, odd names, damaged runs, full disks, chance.

The parts' tests import these; they have a fixture `part`. The table in tests/README.md lists all kinds.
"""

import os
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import ROOT, Part

PHOTOGRAPHS = 24


class Bad(NamedTuple):
    """A kind of bad data."""

    spoil: Callable[[Path], Any]  # what happens to the prepared folder
    words: list[str]  # of the message
    code: int  # 0: nothing is wrong with it


@pytest.fixture(scope="module")
def small_root(part: Part, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few photographs, prepared by the part itself."""
    root = tmp_path_factory.mktemp("small") / "nails"
    command = [part.python, ROOT / "sample_data.py", "--data_root", root, "--images", PHOTOGRAPHS]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    part.run("data_preparation.py", "--data_root", root)
    return root


def copy(root: Path, to: Path) -> Path:
    """A copy of prepared data, made of links: its files have to be replaced, and not be written to."""
    return Path(shutil.copytree(root, to, copy_function=os.link))


def replace(file: Path, content: bytes | str | Image.Image | None) -> None:
    """Give a file other content, or with None delete it."""
    file.unlink()
    if isinstance(content, Image.Image):
        content.save(file)
    elif content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)


def first(root: Path, column: str = "images", side: str = "train") -> Path:
    """The file of the first row."""
    return root / pd.read_csv(root / "csv_file" / f"{side}.csv")[column][0]


def edit_csv(change: Callable[[str], bytes | str | None], side: str = "train") -> Callable[[Path], None]:
    """Change the text of train.csv and of each source's, or of valid.csv; None deletes them."""

    def spoil(root: Path) -> None:
        for file in (root / "csv_file").glob("valid.csv" if side == "valid" else "train*.csv"):
            replace(file, change(file.read_text()))

    return spoil


def edit_table(change: Callable[[pd.DataFrame], pd.DataFrame], side: str = "train") -> Callable[[Path], None]:
    """The same with a table."""

    def edit(text: str) -> str:
        return change(pd.read_csv(StringIO(text), dtype=str, keep_default_na=False)).to_csv(index=False)

    return edit_csv(edit, side)


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def halve(file: Path) -> None:
    replace(file, file.read_bytes()[: file.stat().st_size // 2])


def bomb(side: int) -> bytes:
    """A black PNG of so many pixels squared: small as a file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(side // 8 + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)  # one bit a pixel
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def resize_pair(root: Path, width: int, height: int, side: str = "train") -> None:
    """Give the first photograph and its mask another size; the tables know it."""
    for column in ("images", "masks"):
        file = first(root, column, side)
        replace(file, Image.open(file).resize((width, height), Image.Resampling.NEAREST))

    def change(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[table["images"] == str(first(root, "images", side).relative_to(root)), ["width", "height"]] = [
            str(width),
            str(height),
        ]
        return table

    edit_table(change, side)(root)


def blacken_masks(root: Path) -> None:
    for side in ("train", "valid"):
        for path in pd.read_csv(root / "csv_file" / f"{side}.csv")["masks"]:
            replace(root / path, Image.new("L", Image.open(root / path).size))


AGAIN = "data_preparation.py"
OUTSIDE = "is no file below"
# Of the CSV files, which part 7 does without.
TABLES = {
    "no train.csv": Bad(edit_csv(lambda text: None), ["train.csv", AGAIN], 2),
    "no valid.csv": Bad(edit_csv(lambda text: None, "valid"), ["valid.csv", AGAIN], 2),
    "train.csv is empty": Bad(edit_csv(lambda text: ""), ["train.csv is damaged", AGAIN], 2),
    "train.csv is not text": Bad(edit_csv(lambda text: bytes(range(256))), ["train.csv is damaged", AGAIN], 2),
    "train.csv is a folder": Bad(lambda root: make_folder(root / "csv_file/train.csv"), ["train.csv", AGAIN], 2),
    "no photographs for validation": Bad(
        edit_csv(lambda text: text.splitlines()[0] + "\n", "valid"), ["valid.csv names no photographs", AGAIN], 2
    ),
    "no column masks": Bad(edit_table(lambda table: table.drop(columns="masks")), ["train", "masks", AGAIN], 2),
    "a row with too many fields": Bad(edit_csv(lambda text: text + "a,b,c,d,e,f,g,h,i,j\n"), ["train", AGAIN], 2),
    "a row without a mask": Bad(edit_table(lambda table: table.assign(masks="")), ["train", OUTSIDE, AGAIN], 2),
    "an absolute path": Bad(
        edit_table(lambda table: table.assign(images="/etc/passwd")), ["train", "/etc/passwd", OUTSIDE], 2
    ),
    "a path with ..": Bad(
        edit_table(lambda table: table.assign(masks="train/../../x.png"), "valid"), ["valid.csv", OUTSIDE], 2
    ),
    "more columns, in another order": Bad(
        edit_table(lambda table: table.assign(mine="1")[["mine", *reversed(table.columns)]]), [], 0
    ),
    "Windows line ends and a byte-order mark": Bad(
        edit_csv(lambda text: ("\ufeff" + text.replace("\n", "\r\n")).encode()), [], 0
    ),
    "one source only": Bad(edit_table(lambda table: table.assign(source="0")), [], 0),
}
FILES = {
    "a photograph is gone": Bad(lambda root: first(root).unlink(), ["{image}", AGAIN], 1),
    "a mask is gone": Bad(lambda root: first(root, "masks").unlink(), ["{mask}", AGAIN], 1),
    "a photograph is cut off": Bad(lambda root: halve(first(root)), ["{image}", AGAIN], 1),
    "a mask is cut off": Bad(lambda root: halve(first(root, "masks")), ["{mask}", AGAIN], 1),
    "a photograph is empty": Bad(lambda root: replace(first(root), b""), ["{image}", AGAIN], 1),
    "a photograph is text": Bad(lambda root: replace(first(root), "no image"), ["{image}", AGAIN], 1),
    "a photograph is a folder": Bad(lambda root: make_folder(first(root)), ["{image}", AGAIN], 1),
    "a photograph is a bomb": Bad(lambda root: replace(first(root), bomb(40_000)), ["{image}", AGAIN], 1),
    "a mask of another size": Bad(
        lambda root: replace(first(root, "masks"), Image.new("L", (30, 40))), ["{name}", AGAIN], 1
    ),
    "a mask with labels": Bad(
        lambda root: replace(
            first(root, "masks"), Image.fromarray(np.array(Image.open(first(root, "masks"))) // 255 * 3)
        ),
        ["{mask}"],
        1,
    ),
    "a photograph has become grey": Bad(lambda root: replace(first(root), Image.open(first(root)).convert("L")), [], 0),
    "a photograph has become transparent": Bad(
        lambda root: replace(first(root), Image.open(first(root)).convert("RGBA")), [], 0
    ),
    "a photograph of one pixel": Bad(lambda root: resize_pair(root, 1, 1), [], 0),
    "a photograph of 20,000 pixels": Bad(lambda root: resize_pair(root, 20_000, 40), [], 0),
    "all masks are empty": Bad(blacken_masks, [], 0),
}
KINDS = TABLES | FILES
# Part 7 looks for all photographs first, knows no masks but those in its annotations, and these have a size.
CODES_OF_PART7 = {kind: 0 for kind in FILES if "mask" in kind} | {
    "a photograph is gone": 2,
    "a photograph is a folder": 2,
    "a photograph of one pixel": 1,
    "a photograph of 20,000 pixels": 1,
}


def flags(part: Part, root: Path, work_dir: Path, *more: object) -> list[object]:
    if part.name == "part2_balanced_data":
        more = ("--balance", "none", *more)  # else it would not look at each photograph
    return ["--data_root", root, "--work_dir", work_dir, *part.small, "--batch_size", 4, "--epochs", 1, *more]


def message_of(done: subprocess.CompletedProcess[str]) -> str:
    """What stands behind our "error: "; libraries may have said something before."""
    return re.split(r"^(?:train.py: )?error: ", done.stderr, maxsplit=1, flags=re.MULTILINE)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_data_is_told_or_does_no_harm(part: Part, small_root: Path, tmp_path: Path, kind: str) -> None:
    if part.ending == "pth" and kind in TABLES:
        pytest.skip("part 7 reads annotations, see test_own_annotations_of_several_classes")
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
        "metrics": ("logs/metrics.csv", lambda file: file.write_bytes(b"\x00\xff")),
        "metrics gone": ("logs/metrics.csv", Path.unlink),
        "cut off": (f"weights/{last}", halve),
        "text": (f"weights/{last}", lambda file: file.write_text("text")),
        "gone": (f"weights/{last}", Path.unlink),
    }
    for name, (file, damage) in damages.items():
        copied = tmp_path / name
        shutil.copytree(run, copied)
        damage(part.run_dir(copied) / file)
        done = part.run("train.py", *flags(part, small_root, copied, "--epochs", 3, "--resume"), code=2)
        assert file.split("/")[-1].split("-")[0] in done.stderr or name == "gone", (name, done.stderr)
        assert len(message_of(done).splitlines()) == 1, done.stderr
    nothing = part.run("train.py", *flags(part, small_root, tmp_path / "none", "--resume"), code=2)
    assert "--resume" in nothing.stderr


def test_a_run_that_was_killed_before_its_last_lines_gets_them(part: Part, small_root: Path, run: Path) -> None:
    curves = part.run_dir(run) / "training_curves.png"
    curves.unlink()
    printed = part.run("train.py", *flags(part, small_root, run, "--epochs", 2, "--resume")).stdout
    assert "all 2 epochs are done" in printed and "best " in printed and "predict.py --weights" in printed
    assert Image.open(curves).size[0] > 500


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
    assert {path.suffix for path in weights.iterdir()}.isdisjoint({".tmp"})


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
    more = [1e30, "--optimizer", "adamw"] if part.ending == "h5" else [1e300, "--limit_batches", 1]
    args = flags(part, small_root, tmp_path, "--epochs", 5, "--learning_rate", *more)
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
    halve_copy = images / "half.png"
    shutil.copy(first(small_root), halve_copy)
    halve(halve_copy)
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
    for bad in [tmp_path / "nowhere.x", tmp_path, file, small_root / "csv_file" / "train.csv"]:
        failed = part.run("predict.py", "--weights", bad, "--images", images / "good.png", code=2)
        assert "--weights" in failed.stderr and str(bad) in failed.stderr
