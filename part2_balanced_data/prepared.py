"""The prepared folders: what is in them, and how new ones take the place of old ones."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from image_files import printable
from pairs import Pair, RawData
from utils import stop

PIECES = ["annotations", "csv_file", "train", "valid"]  # the folders that are replaced; the first is part 7's
MADE_BY = "made by data_preparation.py"
COLUMNS = ["images", "masks", "source", "fold", "width", "height", "foreground"]


def npy_of(file: Path | str) -> str:
    """The name of the array beside a PNG."""
    return str(file).removesuffix(".png") + ".npy"


def is_ours(annotations: Path) -> bool:
    """Whether part 7's data_preparation.py wrote this COCO file: it says so at its beginning."""
    if not annotations.is_file():
        return False
    with annotations.open("rb") as file:
        return MADE_BY.encode() in file.read(100)


def foreign_files(root: Path) -> list[str]:
    """List the files in these folders that an earlier run of data_preparation.py did not write."""
    known = set()
    for side in ["train", "valid"]:
        try:
            table = pd.read_csv(root / "csv_file" / f"{side}.csv", dtype=str, keep_default_na=False)
        except (OSError, ValueError):
            continue  # none, or not ours: then what it should name is not ours, either
        if list(table.columns) == COLUMNS:
            known |= {f"csv_file/{side}.csv", "csv_file/rejected.csv", *table["images"], *table["masks"]}
            known |= {f"csv_file/{side}_info.csv"}
            # There could be somebody's own COCO file instead.
            if is_ours(root / "annotations" / f"{side}.json"):
                known.add(f"annotations/{side}.json")
            known |= {f"csv_file/train{source}.csv" for source in table["source"]}
            known |= {f"csv_file/npy_{side}.csv", *table["images"].map(npy_of), *table["masks"].map(npy_of)}
    paths = [path for piece in PIECES for path in [root / piece, *(root / piece).rglob("*")]]
    files = {printable(path.relative_to(root)) for path in paths if path.is_symlink() or path.is_file()}
    return sorted(files - known)


def refuse_overlap(root: Path, data: RawData) -> None:
    """Stop if this run would replace files that it reads, or that it did not write."""
    foreign = foreign_files(root)
    for raw_folder in [path for _, *paths in data.folders for path in paths]:
        for piece in [root / piece for piece in PIECES]:
            if piece.is_relative_to(raw_folder) or raw_folder.is_relative_to(piece):
                if (root / "csv_file" / "train.csv").exists() and not foreign:
                    stop(f"{root} holds prepared data, ready for train.py; to prepare other data, name it with --raw")
                stop(f"{raw_folder} is raw data and would be replaced: choose another --data_root, and give --raw")
    if foreign:
        some = ", ".join(foreign[:5]) + (", …" if len(foreign) > 5 else "")
        advice = "move them away, or choose another --data_root"
        stop(f"{root} holds {len(foreign)} files that this script did not write and would replace: {some}; {advice}")


def write_csv_files(pairs: list[Pair], rejected: Mapping[str, str], csv_folder: Path, npy: bool) -> None:
    """Write train.csv, valid.csv, a train<source>.csv for each source, rejected.csv, and the npy_*.csv of arrays."""
    csv_folder.mkdir()
    rows = [(p.target("images"), p.target("masks"), p.source, p.fold, p.width, p.height, p.foreground) for p in pairs]
    table = pd.DataFrame(rows, columns=COLUMNS).sort_values("images")
    in_train = table["images"].str.startswith("train/")
    tables = {"train": table[in_train], "valid": table[~in_train]}
    if npy:
        arrays = table.assign(images=table["images"].map(npy_of), masks=table["masks"].map(npy_of))
        tables |= {"npy_train": arrays[in_train], "npy_valid": arrays[~in_train]}
    tables |= {f"train{source}": part for source, part in table[in_train].groupby("source")}
    tables["rejected"] = pd.DataFrame(sorted(rejected.items()), columns=["file", "reason"])
    for name, part in tables.items():
        part.to_csv(csv_folder / f"{name}.csv", index=False, lineterminator="\n")


def move_to_sides(pairs: list[Pair], new: Path) -> None:
    """Move the files that were written before the split was known."""
    for pair in pairs:
        for kind in ["images", "masks"]:
            source, target = new / replace(pair, side="unsplit").target(kind), new / pair.target(kind)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
            if Path(npy_of(source)).exists():
                Path(npy_of(source)).rename(npy_of(target))


def swap(root: Path, new: Path, old: Path) -> None:
    """Put the new folders in the place of the old ones.

    Killed anywhere in here, it does the rest when it is called again: `old` exists only while a swap goes on.
    """
    begins = not old.exists()
    old.mkdir(exist_ok=True)
    for piece in PIECES:
        # What is not written anew goes as well, it would no longer fit; but only now, when nothing new is in its place.
        if (root / piece).exists() and ((new / piece).exists() or begins):
            (root / piece).rename(old / piece)
    for piece in reversed(PIECES):
        if (new / piece).exists():
            (new / piece).rename(root / piece)
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old)
