"""data_preparation.py: raw layouts, groups, the split, and what it leaves when it is refused, interrupted or killed."""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

PART = Path(__file__).parents[1] / "part1_tensorflow"
TEN = [f"{source}/p{i}" for source in ("left", "right") for i in range(5)]
Run = Callable[..., subprocess.CompletedProcess]


def make_pairs(
    raw: Path, names: Iterable[str], images: str = "images", masks: str = "masks", size: tuple[int, int] = (12, 16)
) -> Path:
    """Write a pair for each name ("source/x" or "x"), each with another photograph; size is height and width."""
    for name in names:
        pixels = np.random.default_rng(list(f"{images}{name}".encode())).integers(0, 256, (*size, 3), dtype=np.uint8)
        mask = np.zeros(size, np.uint8)
        mask[2:5, 2:6] = 255
        for folder, content in [(images, pixels), (masks, mask)]:
            path = raw / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(path, compress_level=0)
    return raw


def tree(root: Path) -> dict[str, str]:
    """A checksum of each prepared file."""
    files = [path for piece in ("train", "valid", "csv_file") for path in (root / piece).rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_csv(root: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(root / "csv_file" / f"{name}.csv", dtype=str, keep_default_na=False)


def prepared_names(root: Path, side: str) -> list[str]:
    """The photographs of a side as "source/x", from the CSV; the files are checked to be there."""
    table = read_csv(root, side)
    assert all((root / path).is_file() for path in [*table["images"], *table["masks"]])
    assert list(table["images"].str.replace("/images/", "/masks/")) == list(table["masks"])
    return [path.removeprefix(f"{side}/images/").removesuffix(".png") for path in table["images"]]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script in a copy of the part's folder, outside of which it may need nothing."""
    copy = tmp_path_factory.mktemp("copied") / "part"
    shutil.copytree(PART, copy, ignore=shutil.ignore_patterns("work_dir", "__pycache__"))
    return copy / "data_preparation.py"


def start(script: Path, *flags: object, **options: object) -> subprocess.Popen:
    command = [sys.executable, str(script), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, **options)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def prepare(script: Path) -> Run:
    """Run the script and check its exit code."""

    def run(*flags: object, code: int = 0, **options: object) -> subprocess.CompletedProcess:
        process = start(script, *flags, **options)
        output, error = process.communicate(timeout=60)
        assert process.returncode == code, output + error
        assert "Traceback" not in error
        assert code == 0 or error.startswith(("error: ", "usage: "))
        return subprocess.CompletedProcess(process.args, code, output, error)

    return run


# --- layouts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "masks"), [("Images", "Masks"), ("images", "labels")])
def test_raw_data_beside_the_prepared_data(tmp_path: Path, prepare: Run, images: str, masks: str) -> None:
    make_pairs(tmp_path, TEN, images, masks)
    assert f"layout    {images}/* and {masks}/*" in prepare("--data_root", tmp_path).stdout
    train, valid = prepared_names(tmp_path, "train"), prepared_names(tmp_path, "valid")
    assert sorted(train + valid) == TEN
    assert sorted(name.split("/")[0] for name in valid) == ["left", "right"]  # a fifth of each source
    assert prepared_names(tmp_path, "train") == sorted(train)
    left = read_csv(tmp_path, "train").query("source == 'left'").reset_index(drop=True)
    pd.testing.assert_frame_equal(read_csv(tmp_path, "trainleft"), left)


def test_data_that_is_split_stays_split_and_leaks_are_told(tmp_path: Path, prepare: Run) -> None:
    raw = make_pairs(tmp_path / "raw", ["a", "b", "cold/c"], "train/images", "train/masks")
    make_pairs(raw, ["a", "d"], "valid/images", "valid/masks")
    shutil.copy(raw / "train/images/b.png", raw / "valid/images/d.png")
    root = tmp_path / "new folder"
    output = prepare("--data_root", root, "--raw", raw).stdout
    assert prepared_names(root, "train") == ["0/a", "0/b", "cold/c"] and prepared_names(root, "valid") == ["0/a", "0/d"]
    assert "the same photograph in train and in valid, so that validation is too good: 0/b = 0/d" in output
    for flags in [("--folds", 2), ("--valid_fraction", 0.5)]:
        assert "is split already" in prepare("--data_root", root, "--raw", raw, *flags, code=2).stderr
    assert (
        "choose another --data_root" in prepare("--data_root", raw, code=2).stderr
    )  # its own train/ would be replaced
    assert "holds prepared data" in prepare("--data_root", root, code=2).stderr


def test_nothing_found_and_nothing_usable(tmp_path: Path, prepare: Run) -> None:
    assert "Images/<source>/* and Masks/<source>/*" in prepare("--data_root", tmp_path, code=2).stderr
    raw = make_pairs(tmp_path / "raw", ["a", "b"])
    (raw / "masks/a.png").unlink()
    (raw / "images/b.png").write_bytes(b"no")
    error = prepare("--data_root", tmp_path / "out", "--raw", raw, code=2).stderr
    assert "images/a.png: image without mask" in error and "images/b.png: no image" in error
    assert not any((tmp_path / "out").iterdir())


# --- the split -------------------------------------------------------------------------------


def test_groups_and_photographs_that_are_the_same_stay_together(tmp_path: Path, prepare: Run) -> None:
    raw = make_pairs(tmp_path / "raw", [f"p{i:02}" for i in range(20)])
    groups = {f"p{i:02}.png": f"hand {i // 4}" for i in range(20)}  # 5 groups of 4
    shutil.copy(raw / "images/p00.png", raw / "images/p19.png")  # the first and the last hang together now
    file = tmp_path / "groups.csv"
    pd.DataFrame({"note": "x", "file": groups.keys(), "group": groups.values()}).to_csv(file, index=False)
    flags = ["--data_root", tmp_path / "out", "--raw", raw, "--groups", file]
    splits = set()
    for seed in range(3):
        prepare(*flags, "--valid_fraction", 0.4, "--seed", seed)
        train, valid = (prepared_names(tmp_path / "out", side) for side in ("train", "valid"))
        assert len(valid) == 8 and len(train) == 12
        of_train, of_valid = ({name.split("/")[0] for name in names} for names in (train, valid))
        assert not of_train & of_valid
        assert ("hand 0" in of_valid) == ("hand 4" in of_valid)
        splits.add(tuple(valid))
    assert len(splits) > 1  # the seed does something
    prepare(*flags, "--folds", 4)
    folds = pd.concat([read_csv(tmp_path / "out", "train"), read_csv(tmp_path / "out", "valid")])
    assert sorted(folds["fold"].value_counts()) == [4, 4, 4, 8]
    assert (folds.groupby("source")["fold"].nunique() == 1).all()
    assert "needs at least 5" in prepare(*flags, "--folds", 5, code=2).stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,group\na.png,x\n", "does not name 1 photographs: b.png"),
        ("file,group\na.png,../x\nb.png,y\n", "'../x', which cannot be the name of a folder"),
        ("file,group\na.png,\nb.png,y\n", "'', which cannot"),
        ("file,group\na.png,x\nb.png,y\na.png,y\n", "a.png is in two groups"),
        ("name,group\na.png,x\n", "the columns file and group is needed"),
    ],
)
def test_groups_that_cannot_be_used(tmp_path: Path, prepare: Run, text: str, message: str) -> None:
    raw = make_pairs(tmp_path / "raw", ["a", "b"])
    (tmp_path / "groups.csv").write_text(text)
    flags = ["--data_root", tmp_path / "out", "--raw", raw, "--groups", tmp_path / "groups.csv"]
    assert message in prepare(*flags, code=2).stderr
    assert not (tmp_path / "out").exists()


def test_groups_that_merge_folders(tmp_path: Path, prepare: Run) -> None:
    raw = make_pairs(tmp_path / "raw", ["left/a", "right/a", "left/b", "right/c"])
    (tmp_path / "groups.csv").write_text("file,group\na.png,x\nb.png,x\nright/c.png,y\n")
    prepare("--data_root", tmp_path, "--raw", raw, "--groups", tmp_path / "groups.csv")
    assert prepared_names(tmp_path, "train") + prepared_names(tmp_path, "valid") in (["x/b", "y/c"], ["y/c", "x/b"])
    assert list(read_csv(tmp_path, "rejected")["file"]) == ["images/left/a.png", "images/right/a.png"]


def test_folds_are_balanced_in_each_source(tmp_path: Path, prepare: Run) -> None:
    raw = make_pairs(tmp_path / "raw", TEN)
    prepare("--data_root", tmp_path, "--raw", raw, "--folds", 5)
    train, valid = read_csv(tmp_path, "train"), read_csv(tmp_path, "valid")
    assert set(train["fold"]) == {"1", "2", "3", "4"} and set(valid["fold"]) == {"0"}
    assert (pd.concat([train, valid]).groupby(["source", "fold"]).size() == 1).all()
    flags = ["--data_root", tmp_path, "--raw", raw, "--folds", 5, "--valid_fraction", 0.2]
    assert "--folds and --valid_fraction" in prepare(*flags, code=2).stderr


# --- what is there already -------------------------------------------------------------------


def test_files_of_others_are_not_replaced(tmp_path: Path, prepare: Run) -> None:
    raw, root = make_pairs(tmp_path / "raw", TEN), tmp_path / "out"
    (root / "train").mkdir(parents=True)
    (root / "train/mine.txt").write_text("precious")
    assert "train/mine.txt" in prepare("--data_root", root, "--raw", raw, code=2).stderr
    assert list(root.iterdir()) == [root / "train"] and (root / "train/mine.txt").read_text() == "precious"
    (root / "train/mine.txt").unlink()
    prepare("--data_root", root, "--raw", raw)
    (root / "csv_file/mine.csv").write_text("precious")
    before = tree(root)
    assert "csv_file/mine.csv" in prepare("--data_root", root, "--raw", raw, "--seed", 1, code=2).stderr
    assert tree(root) == before


def test_a_full_disk_leaves_the_old_data(tmp_path: Path, prepare: Run) -> None:
    raw, root = make_pairs(tmp_path / "raw", TEN, size=(200, 200)), tmp_path / "out"
    prepare("--data_root", root, "--raw", raw)
    before = tree(root)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # noqa: E731
    error = prepare("--data_root", root, "--raw", raw, "--seed", 1, code=1, preexec_fn=limit).stderr
    assert "File too large" in error and len(error.splitlines()) == 1
    assert tree(root) == before and not (root / ".prepared_new").exists()


def processes_that_mention(text: str) -> list[str]:
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return [command.decode(errors="replace") for command in commands if text.encode() in command]


def test_interrupted_or_killed_at_any_moment_it_leaves_the_old_data(tmp_path: Path, script: Path, prepare: Run) -> None:
    raw, root = make_pairs(tmp_path / "raw", [f"p{i}" for i in range(80)], size=(500, 500)), tmp_path / "out"
    prepare("--data_root", root, "--raw", make_pairs(tmp_path / "old", TEN))
    before = tree(root)
    for kind, files in [(signal.SIGINT, 10), (signal.SIGTERM, 10), (signal.SIGKILL, 1), (signal.SIGKILL, 30)]:
        process = start(script, "--data_root", root, "--raw", raw, start_new_session=True)
        while len(list(root.glob(".prepared_new/unsplit/images/0/*"))) < files:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        (os.killpg if kind == signal.SIGINT else os.kill)(process.pid, kind)  # Ctrl-C goes to the workers, too
        _, error = process.communicate(timeout=20)
        assert tree(root) == before
        if kind != signal.SIGKILL:
            assert process.returncode == 130 and error.startswith("error: interrupted") and error.count("\n") == 1
            assert not (root / ".prepared_new").exists()
        time.sleep(0.3)
        assert not processes_that_mention(str(root))  # no worker is left behind
    prepare("--data_root", root, "--raw", raw)
    assert len(prepared_names(root, "train")) == 64 and not (root / ".prepared_new").exists()


KILL_IN_SWAP = """
import os, pathlib, shutil, sys
script, old, raw, nothing = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(script).parent))
import data_preparation
def run(*flags):
    if os.fork() == 0:
        sys.argv[1:] = map(str, flags)
        data_preparation.main()
    return os.wait()[1]
def dies(function):
    def call(*args, **kwargs):
        dies.left -= 1
        if dies.left < 0:
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return call
swap, rename, rmtree = data_preparation.swap, pathlib.Path.rename, shutil.rmtree
def swap_and_die(*folders):
    pathlib.Path.rename, shutil.rmtree = dies(rename), dies(rmtree)
    swap(*folders)
for step in range(8):
    dies.left = step
    root = shutil.copytree(old, f"{old}{step}")
    data_preparation.swap = swap_and_die
    assert run("--data_root", root, "--raw", raw) == 9, step
    data_preparation.swap = swap
    assert run("--data_root", root, "--raw", nothing) == 2 << 8, step
"""


def test_killed_while_it_swaps_the_next_run_finishes_first(tmp_path: Path, script: Path, prepare: Run) -> None:
    old, raw = tmp_path / "out", make_pairs(tmp_path / "raw", TEN)
    prepare("--data_root", old, "--raw", make_pairs(tmp_path / "old", ["a", "b"]))
    folders = [script, old, raw, tmp_path]  # nothing to prepare in the last one
    killer = [sys.executable, "-c", KILL_IN_SWAP, *map(str, folders)]
    result = subprocess.run(killer, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for step in range(8):
        root = Path(f"{old}{step}")
        assert sorted(path.name for path in root.iterdir()) == ["csv_file", "train", "valid"]
        assert sorted(prepared_names(root, "train") + prepared_names(root, "valid")) == TEN
