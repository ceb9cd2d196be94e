"""data_preparation.py with one file of each kind: what it repairs, rejects and tells."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image

PART = Path(__file__).parents[1] / "part1_tensorflow"
HEIGHT, WIDTH = 40, 60
MASK = np.zeros((HEIGHT, WIDTH), np.uint8)
MASK[5:15, 8:30] = 255  # in a corner, so that a turned mask is another mask


def photograph(seed: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """A smooth random picture, (height, width, 3): JPEG changes it little."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, pixels: NDArray | Image.Image, **options: Any) -> Path:
    """Write an image in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def tree(root: Path) -> dict[str, str]:
    """A checksum of each prepared file."""
    files = [path for piece in ("train", "valid", "csv_file") for path in (root / piece).rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_csv(root: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(root / "csv_file" / f"{name}.csv", dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess]:
    """Run the script in a copy of the part's folder, outside of which it may need nothing. Checks its exit code."""
    copy = tmp_path_factory.mktemp("copied") / "part"
    shutil.copytree(PART, copy, ignore=shutil.ignore_patterns("work_dir", "__pycache__"))

    def run(*flags: object, code: int = 0) -> subprocess.CompletedProcess:
        command = [sys.executable, str(copy / "data_preparation.py"), *map(str, flags)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == code, result.stdout + result.stderr
        assert "Traceback" not in result.stderr and "\x1b" not in result.stdout
        return result

    return run


# --- one raw folder with a file of each kind -------------------------------------------------


class Messy(NamedTuple):
    raw: Path
    root: Path
    output: str
    expected: dict[str, NDArray]  # stem: the photograph that is to come out
    rejected: dict[str, str]  # file: the beginning of the reason


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory, prepare: Callable) -> Messy:
    raw = tmp_path_factory.mktemp("raw data é")
    images, masks = raw / "images", raw / "masks"
    expected: dict[str, NDArray] = {}

    def good(
        stem: str, image_ending: str = ".png", mask_ending: str = ".png", mask: NDArray | Image.Image = MASK
    ) -> None:
        expected[stem] = photograph(len(expected))
        save(images / (stem + image_ending), expected[stem])
        save(masks / (stem + mask_ending), mask)

    good("plain")
    good("upper", ".PNG", ".Png")
    good("two words é")
    good("fringes", ".jpg", ".jpg")
    edge = MASK.copy()
    edge[5, 8:10] = [127, 128]
    good("edge", mask=edge)
    good("zero_one", mask=MASK // 255)
    good("rgb_mask", mask=np.dstack([MASK, MASK // 2, MASK]))
    palette = Image.fromarray(np.where(MASK > 0, np.uint8(0), np.uint8(1)))
    palette.putpalette([255, 255, 255, 0, 0, 0])  # entry 0 is white
    good("palette_mask", mask=palette)
    good("alpha_mask", mask=np.dstack([np.full_like(MASK, 200)] * 3 + [MASK]))
    good("painted_mask", mask=np.dstack([MASK, MASK * 0, MASK * 0, np.full_like(MASK, 255)]))
    good("mask16", mask=MASK.astype(np.uint16) * 257)
    good("mask_of_ids16", mask=(MASK // 255).astype(np.uint16))
    good("empty_mask", mask=MASK * 0)
    for stem in ["twin_a", "twin_b", "grey", "image16", "colour16", "rgba"]:
        good(stem)
    save(images / "twin_b.png", expected["twin_a"])
    expected["twin_b"] = expected["twin_a"]

    grey = photograph(99)[..., 0]
    expected["grey"] = expected["image16"] = np.dstack([grey] * 3)
    save(images / "grey.png", grey)
    save(images / "image16.png", grey.astype(np.uint16) * 257)
    cv2.imwrite(str(images / "colour16.png"), expected["colour16"][..., ::-1].astype(np.uint16) * 257)
    save(images / "rgba.png", np.dstack([expected["rgba"], MASK]))
    expected["rgba"] = np.where(MASK[..., None] > 0, expected["rgba"], 255)

    for stem, turned_mask in [("exif", False), ("exif_upright", True)]:  # stored lying, shown standing
        good(stem, mask=np.rot90(MASK, -1) if turned_mask else MASK)
        (images / f"{stem}.png").unlink()
        exif = Image.Exif()
        exif[0x0112] = 6
        save(images / f"{stem}.jpg", expected[stem], exif=exif, quality=95)
        expected[stem] = np.rot90(expected[stem], -1)

    save(images / ".hidden.png", photograph(0))
    (images / "notes.txt").write_text("not an image")

    for stem in [
        "cut",
        "nothing",
        "text",
        "size",
        "labels",
        "colours",
        "photo_as_mask",
        "grey_photo",
        "same",
        "bomb",
        "outside",
    ]:
        save(images / f"{stem}.png", photograph(1000 + len(stem) * 7))
        save(masks / f"{stem}.png", MASK)
    save(images / "alone.png", photograph(1))
    save(masks / "lonely.png", MASK)
    whole = save(masks / "cut.jpg", photograph(2)).read_bytes()
    (masks / "cut.jpg").unlink()
    (images / "cut.png").rename(images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "nothing.png").write_bytes(b"")
    (images / "text.png").write_text("this is no image")
    save(masks / "size.png", MASK[:-1])
    save(masks / "labels.png", MASK // 255 + (np.arange(WIDTH) > 50).astype(np.uint8) * 3)
    save(masks / "colours.png", np.dstack([MASK, np.roll(MASK, 25, axis=0), MASK * 0]))
    save(masks / "photo_as_mask.png", photograph(3))
    save(masks / "grey_photo.png", photograph(3)[..., 0])
    save(images / "same.bmp", photograph(4))
    save(images / "bomb.png", Image.new("1", (20000, 20000)))
    os.mkfifo(masks / "pipe.png")
    save(images / "pipe.png", photograph(5))
    secret = save(tmp_path_factory.mktemp("outside") / "secret.png", photograph(6))
    (images / "outside.png").unlink()
    (images / "outside.png").symlink_to(secret)
    (images / "folder").symlink_to(secret.parent)
    rejected = {
        "images/alone.png": "image without mask",
        "masks/lonely.png": "mask without image",
        "images/cut.jpg": "unreadable or truncated: ",
        "images/nothing.png": "empty file",
        "images/text.png": "no image: ",
        "masks/size.png": "mask of another size: 60 x 39, the image has 60 x 40",
        "masks/labels.png": "mask with several labels: 0, 1, 3",
        "masks/colours.png": "mask in several colours: green, red",
        "masks/photo_as_mask.png": "mask in several colours: ",
        "masks/grey_photo.png": "mask is grey all over: ",
        "images/same.png": "several files with one name: images/same.bmp, images/same.png",
        "images/same.bmp": "several files with one name: images/same.bmp, images/same.png",
        "masks/same.png": "several files with one name: images/same.bmp, images/same.png",
        "images/bomb.png": "too large: ",
        "masks/pipe.png": "not a file",
        "images/outside.png": "link that leads outside the raw folder",
        "images/folder": "link to a folder: ",
    }
    root = tmp_path_factory.mktemp("prepared ü")
    output = prepare("--data_root", root, "--raw", raw).stdout
    return Messy(raw, root, output, expected, rejected)


def prepared(messy: Messy) -> pd.DataFrame:
    """All rows, by stem."""
    rows = pd.concat([read_csv(messy.root, "train"), read_csv(messy.root, "valid")])
    return rows.set_index(rows["images"].map(lambda name: Path(name).stem))


def test_photographs_come_out_upright_and_as_8_bit_rgb(messy: Messy) -> None:
    rows = prepared(messy)
    assert sorted(rows.index) == sorted(messy.expected)
    for stem, expected in messy.expected.items():
        image = Image.open(messy.root / rows.loc[stem, "images"])
        assert (image.format, image.mode, not image.getexif()) == ("PNG", "RGB", True)
        tolerance = 30 if stem in ("fringes", "exif", "exif_upright") else 0  # JPEG
        np.testing.assert_allclose(np.asarray(image).astype(int), expected, atol=tolerance, err_msg=stem)


def test_masks_come_out_as_0_and_255_and_fit_their_photographs(messy: Messy) -> None:
    for stem, row in prepared(messy).iterrows():
        mask = np.asarray(Image.open(messy.root / row["masks"]))
        expected = np.rot90(MASK, -1) if "exif" in str(stem) else MASK * (stem != "empty_mask")
        assert mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255}
        if stem in ("fringes", "edge"):
            raw_mask = messy.raw / "masks" / ("fringes.jpg" if stem == "fringes" else "edge.png")
            expected = np.where(np.asarray(Image.open(raw_mask)) > 127, 255, 0)
        np.testing.assert_array_equal(mask, expected, err_msg=str(stem))
        assert (int(row["height"]), int(row["width"])) == mask.shape
        assert float(row["foreground"]) == pytest.approx((mask > 0).mean(), abs=1e-6)
        assert (row["source"], row["fold"]) == ("0", "")


def test_max_size_shrinks_what_is_larger(prepare: Callable[..., subprocess.CompletedProcess], tmp_path: Path) -> None:
    for stem, height, width in [("wide", 200, 301), ("tall", 120, 40), ("small", 40, 60)]:
        mask = np.zeros((height, width), np.uint8)
        mask[: height // 2, : width // 4] = 255
        save(tmp_path / "images" / f"{stem}.png", photograph(1, height, width))
        save(tmp_path / "masks" / f"{stem}.png", mask)
    done = prepare("--data_root", tmp_path, "--max_size", 100)
    assert "2 pair shrunk to --max_size" in " ".join(done.stdout.split())
    for row in pd.concat([read_csv(tmp_path, "train"), read_csv(tmp_path, "valid")]).itertuples():
        height, width = {"wide": (66, 100), "tall": (100, 33), "small": (40, 60)}[Path(row.images).stem]
        image, mask = (np.asarray(Image.open(tmp_path / path)) for path in (row.images, row.masks))
        assert image.shape[:2] == mask.shape == (height, width) == (int(row.height), int(row.width))
        assert set(np.unique(mask)) == {0, 255}
        assert mask[: height // 2 - 1, : width // 4 - 1].all() and not mask[height // 2 + 1 :].any()
        np.testing.assert_allclose(image.astype(int), photograph(1, height, width), atol=25)


def test_each_bad_file_is_rejected_with_its_reason(messy: Messy) -> None:
    table = read_csv(messy.root, "rejected")
    assert list(table.columns) == ["file", "reason"]
    reasons = dict(zip(table["file"], table["reason"], strict=True))
    assert reasons.keys() == messy.rejected.keys()
    for file, beginning in messy.rejected.items():
        assert reasons[file].startswith(beginning), file
        assert str(messy.raw) not in reasons[file]


@pytest.mark.parametrize(
    "line",
    [
        "layout    images/* and masks/*",
        "other files: 1 .txt",
        "2  16-bit image scaled to 8 bits: 0/colour16, 0/image16",
        "grey image made RGB: 0/grey, 0/image16",
        "1  transparent image laid on white: 0/rgba",
        "2  image turned as its EXIF says: 0/exif, 0/exif_upright",
        "1  mask turned like its image: 0/exif",
        "2  mask with grey fringes thresholded at 127: 0/edge, 0/fringes",
        "2  mask of 0 and 1 made 0 and 255: 0/mask_of_ids16, 0/zero_one",
        "1  palette mask made one channel: 0/palette_mask",
        "2  transparent mask made one channel: 0/alpha_mask, 0/painted_mask",
        "1  mask without foreground: 0/empty_mask",
        "on one side of the split: 0/grey = 0/image16, 0/twin_a = 0/twin_b",
        "1  mask of another size: masks/size.png (60 x 39, the image has 60 x 40)",
        "3  several files with one name: images/same.bmp",
    ],
)
def test_the_summary_tells(messy: Messy, line: str) -> None:
    assert line in messy.output


def test_a_second_run_gives_the_same_bytes_and_leaves_the_raw_data_alone(messy: Messy, prepare: Callable) -> None:
    def stamps() -> list[tuple[str, int, int]]:
        return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in messy.raw.rglob("*"))

    before, raw_before = tree(messy.root), stamps()
    prepare("--data_root", messy.root, "--raw", messy.raw)
    assert tree(messy.root) == before and stamps() == raw_before
    assert sorted(path.name for path in messy.root.iterdir()) == ["csv_file", "train", "valid"]
    rows = prepared(messy)
    assert rows.loc["twin_a", "images"].split("/")[0] == rows.loc["twin_b", "images"].split("/")[0]


def test_strict_lists_what_is_wrong_and_changes_nothing(messy: Messy, prepare: Callable) -> None:
    before = tree(messy.root)
    error = prepare("--data_root", messy.root, "--raw", messy.raw, "--strict", "--seed", 7, code=2).stderr
    assert all(f"{file}: {reason}" in error for file, reason in messy.rejected.items())
    assert tree(messy.root) == before and not (messy.root / ".prepared_new").exists()


def test_labels_are_kept_when_classes_are_asked_for(prepare: Callable, tmp_path: Path) -> None:
    labels = (MASK > 0).astype(np.uint8) * (1 + np.arange(WIDTH) // 20 % 2).astype(np.uint8)  # 0, 1 and 2
    palette = Image.fromarray(labels, mode="L")
    palette.putpalette([0, 0, 0, 200, 10, 10, 10, 200, 10])
    masks = {"grey": labels, "palette": palette, "rgb": np.dstack([labels] * 3), "too_high": labels * 3}
    for seed, (name, mask) in enumerate(masks.items()):
        save(tmp_path / "raw" / "images" / f"{name}.png", photograph(seed))
        save(tmp_path / "raw" / "masks" / f"{name}.png", mask)
    root = tmp_path / "prepared"
    prepare("--data_root", root, "--raw", tmp_path / "raw", "--classes", 3)
    written = {path.stem: np.array(Image.open(path)) for path in root.glob("*/masks/0/*.png")}
    assert written.keys() == {"grey", "palette", "rgb"}
    for mask in written.values():
        assert np.array_equal(mask, labels)
    rejected = dict(read_csv(root, "rejected").itertuples(index=False))
    assert rejected == {"masks/too_high.png": "mask with other labels than 0 to 2: 0, 3, 6"}
