"""Kinds of prepared data that has become bad: what happens to the folder, and what is said about it."""

import os
import shutil
import struct
import zlib
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageOps


class Bad(NamedTuple):
    """A kind of bad data."""

    spoil: Callable[[Path], Any]  # what happens to the prepared folder
    words: list[str]  # of the message, where there is one
    code: int  # 0: nothing is wrong with it


def copy(root: Path, to: Path) -> Path:
    """A copy of prepared data, made of links: its files have to be replaced, and not be written to."""
    return Path(shutil.copytree(root, to, copy_function=os.link))


def replace(file: Path, content: bytes | str | Image.Image | None) -> None:
    """Give a file other content, or with None delete it."""
    file.unlink(missing_ok=True)
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


def move_on(root: Path) -> None:
    """Make the second photograph of train.csv the first one, and the first one the last."""
    edit_table(lambda table: pd.concat([table[1:], table[:1]]))(root)


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
    "one source only": Bad(edit_table(lambda table: table.assign(source="0")), [], 0),
    "more columns, in another order": Bad(
        edit_table(lambda table: table.assign(mine="1")[["masks", "mine", *table.columns.drop("masks")]]), [], 0
    ),
    "Windows line ends and a byte-order mark": Bad(
        edit_csv(lambda text: ("\ufeff" + text.replace("\n", "\r\n")).encode()), [], 0
    ),
}
FILES = {
    "all masks are empty": Bad(blacken_masks, [], 0),
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
    "a mask has become red": Bad(
        lambda root: replace(
            first(root, "masks"), ImageOps.colorize(Image.open(first(root, "masks")).convert("L"), "black", "red")
        ),
        ["{mask}"],
        1,
    ),
    "a photograph has become grey": Bad(lambda root: replace(first(root), Image.open(first(root)).convert("L")), [], 0),
    "a photograph has become transparent": Bad(
        lambda root: replace(first(root), Image.open(first(root)).convert("RGBA")), [], 0
    ),
    "a photograph of one pixel": Bad(lambda root: resize_pair(root, 1, 1), ["{image}", "in the annotations"], 0),
    "a photograph of 20,000 pixels": Bad(
        lambda root: resize_pair(root, 20_000, 40), ["{image}", "in the annotations"], 0
    ),
}
KINDS = TABLES | FILES
# Part 7 looks for all photographs first, knows no masks but those in its annotations, and these have a size.
CODES_OF_PART7 = {kind: 0 for kind in FILES if "mask" in kind} | {
    "a photograph is gone": 2,
    "a photograph is a folder": 2,
    "a photograph of one pixel": 1,
    "a photograph of 20,000 pixels": 1,
}
