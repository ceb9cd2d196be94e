"""Read a photograph or a mask as it comes from a camera or an annotation tool."""

import os
import unicodedata
import warnings
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
FORMATS = ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF"]  # Pillow's rarer decoders are where its security holes are
THRESHOLD = 127  # a mask pixel above it is foreground, on the scale of 8 bits
FRINGE = 32  # JPEG leaves pixels this far from black and white around an edge
MAX_LABELS = 32  # a mask with more values than this was blurred or compressed, and not labelled
TINTS = [(0, 255, 0), (255, 0, 255), (0, 128, 255), (255, 255, 0), (255, 0, 0), (0, 255, 255)]  # of labels 1, 2, …
COLOURS = ["black", "blue", "green", "cyan", "red", "magenta", "yellow", "white"]  # bits: red 4, green 2, blue 1


class BadFile(Exception):  # noqa: N818 - it is the file that is bad
    """A file that cannot be used; the message is the reason, "kind: details", without the file's name."""


class Picture(NamedTuple):
    """A photograph or a mask, and what had to be done to it."""

    pixels: NDArray[np.uint8]  # (H, W, 3) RGB, or (H, W) with 0 and 255
    repairs: list[str]
    orientation: int  # EXIF, as stored in the file: 1 is upright, 2 to 8 were turned


# --- files -----------------------------------------------------------------------------------


def find_files(folder: Path) -> list[Path]:
    """List all files below a folder, sorted, without hidden ones.

    A link to a folder is listed like a file and not followed, because it may lead in a circle.

    Raises:
        OSError: a folder may not be read.
    """

    def fail(error: OSError) -> NoReturn:
        raise error  # os.walk would leave the folder out without a word

    found = []
    for place, folders, files in os.walk(folder, onerror=fail):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, name) for name in files + links if not name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
    return sorted(found, key=Path.as_posix)


def find_images(folder: Path) -> list[Path]:
    """List all files below a folder whose ending, in any case, is that of an image."""
    return [path for path in find_files(folder) if path.suffix.lower() in IMAGE_ENDINGS]


def stem_below(folder: Path, path: Path) -> str:
    """Name an image or a mask so that both have the same name: "hands/a" for <folder>/hands/a.jpg.

    macOS stores é as e and an accent, Linux as one letter; here both are one letter.
    """
    return unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())


def printable(path: Path) -> str:
    """The path with what is not UTF-8 in it, and what would command a terminal, written as \\xff and \\x1b."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" else c for c in text)


def refuse_name(path: Path) -> None:
    """Raise BadFile for a name that neither a CSV file nor a terminal can show."""
    if printable(path) != str(path):
        raise BadFile("name that is not UTF-8, or has control characters in it: rename the file")


# --- photographs -----------------------------------------------------------------------------


def read_image(path: Path) -> Picture:
    """Read a photograph as 8-bit RGB, (H, W, 3), with its EXIF rotation applied.

    Raises:
        BadFile: it cannot be read, or its pixels have neither 8 nor 16 bits.
    """
    picture, repairs = open_picture(path, "image")
    orientation = orientation_of(picture)
    if orientation > 1:
        picture = ImageOps.exif_transpose(picture)
        repairs.append("image turned as its EXIF says")
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture)
        if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise BadFile("image with neither 8 nor 16 bits: save it as a PNG with 8 bits")
        picture = Image.fromarray((values // 257).astype(np.uint8))  # 65535 / 257 = 255
        repairs.append("16-bit image scaled to 8 bits")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
        repairs.append("transparent image laid on white")
    elif picture.mode != "RGB":
        repairs.append(f"{name_of_mode(picture.mode)} image made RGB")
    return Picture(np.array(picture.convert("RGB")), repairs, orientation)


def open_picture(path: Path, kind: str) -> tuple[Image.Image, list[str]]:
    """Open a file and decode it. Returns the picture, not turned yet, and a list of repairs.

    Args:
        path: of an image or a mask.
        kind: "image" or "mask", for the names of the repairs.

    Raises:
        BadFile: not a file, empty, truncated, no image, or too large to be an honest one.
    """
    if not path.is_file():  # opening a pipe would wait for ever
        raise BadFile("not a file")
    if path.stat().st_size == 0:
        raise BadFile("empty file")
    repairs = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF entries and palettes: nothing to act upon
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(path, formats=FORMATS)
            if getattr(picture, "n_frames", 1) > 1:
                repairs.append(f"{kind} file with several pictures: the first one taken")
            if picture.mode.startswith("RGB") and ";16" in str(picture.tile):
                repairs.append(f"16-bit {kind} scaled to 8 bits")  # Pillow does it while it decodes
            picture.load()
            picture.getexif()
        return picture, repairs
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadFile(f"too large: more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise BadFile(f"no image: none of {', '.join(FORMATS)}") from error
    except Exception as error:  # there is no list of what decoders raise on a broken file
        details = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadFile(f"unreadable or truncated: {details}") from error


def orientation_of(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where there is none or none that is valid."""
    orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def name_of_mode(mode: str) -> str:
    """Pillow's name of a pixel format, in a word that a person knows."""
    names = {"1": "grey", "L": "grey", "P": "palette", "LA": "transparent", "PA": "transparent", "RGBA": "transparent"}
    return names.get(mode, "16-bit" if mode.startswith("I") else mode)


# --- masks -----------------------------------------------------------------------------------


def read_mask(path: Path, image: Picture | None = None, classes: int = 1) -> Picture:
    """Read a mask as (H, W) with exactly 0 and 255, or with labels.

    Args:
        path: the mask; any kind of image file with two values, or with the fringes that JPEG leaves.
        image: its photograph. The mask must have its size, and is turned with it if it is not turned yet.
        classes: if more than 1, the values are labels from 0 to classes - 1, and are kept.

    Raises:
        BadFile: it cannot be read, has another size than `image`, or has labels that it should not have.
    """
    picture, repairs = open_picture(path, "mask")
    orientation = orientation_of(picture)
    if orientation > 1:
        repairs.append("mask turned as its EXIF says")
    elif image is not None:
        orientation, more = turned_like(image, picture.size)
        repairs += more
    picture.getexif()[ExifTags.Base.Orientation] = orientation
    picture = ImageOps.exif_transpose(picture)
    if image is not None and picture.size != image.pixels.shape[1::-1]:
        width, height = image.pixels.shape[1::-1]
        raise BadFile(f"mask of another size: {picture.width} x {picture.height}, the image has {width} x {height}")
    if classes > 1:
        return Picture(read_labels(picture, classes), repairs, orientation)
    grey, more = one_channel(picture)
    foreground, last = separate(grey)
    return Picture(foreground.astype(np.uint8) * 255, repairs + more + last, orientation)


def read_labels(picture: Image.Image, classes: int) -> NDArray[np.uint8]:
    """The labels of a mask, (H, W): its grey values, or the numbers of its palette's colours.

    Raises:
        BadFile: there are others than 0 to classes - 1.
    """
    labels = np.asarray(picture) if picture.mode == "P" else one_channel(picture)[0]
    values = np.unique(labels)
    if not np.isin(values, range(classes)).all():
        some = ", ".join(str(value) for value in values[:MAX_LABELS])
        raise BadFile(f"mask with other labels than 0 to {classes - 1}: {some}")
    return labels.astype(np.uint8)


def turned_like(image: Picture, size: tuple[int, int]) -> tuple[int, list[str]]:
    """Find how to turn a mask without EXIF if its image was turned. Returns an orientation and a list of repairs.

    Args:
        image: the photograph, turned.
        size: width and height of the mask, not turned.
    """
    height, width = image.pixels.shape[:2]
    if image.orientation >= 5 and width != height:  # turned by a quarter: the size tells
        return (image.orientation, ["mask turned like its image"]) if size == (height, width) else (1, [])
    if image.orientation > 1:  # annotation tools show an image as its EXIF says; we hope that this one did
        return 1, ["mask of a turned image left as it is, its size does not tell: look at it"]
    return 1, []


def one_channel(picture: Image.Image) -> tuple[NDArray[Any], list[str]]:
    """Make a mask of any pixel format grey: (H, W), any type of number, 0 is background."""
    if picture.mode in ("1", "L") and not picture.has_transparency_data:
        return np.asarray(picture.convert("L")), []
    repairs = [f"{name_of_mode(picture.mode)} mask made one channel"]
    if picture.mode.startswith(("I", "F")):
        return np.asarray(picture), repairs
    bands = picture.convert("RGBA").split()  # through the palette: its entry 0 may be white
    red, green, blue, alpha = (np.asarray(band) for band in bands)
    if alpha.min() < 255:
        if alpha.max() > alpha.min() and all(band.min() == band.max() for band in (red, green, blue)):
            return alpha, repairs  # drawn with transparency only
        red, green, blue = ((band * (alpha / 255)).astype(np.uint8) for band in (red, green, blue))  # laid on black
    brightest = np.maximum(np.maximum(red, green), blue)
    darkest = np.minimum(np.minimum(red, green), blue)
    if (brightest - darkest > FRINGE).any():
        bright = brightest > THRESHOLD
        refuse_several_colours(np.stack([red[bright], green[bright], blue[bright]], axis=1))
    return brightest, repairs


def refuse_several_colours(pixels: NDArray[np.uint8]) -> None:
    """Refuse a mask that paints labels in colours, which as grey values would look like one.

    Args:
        pixels: its bright pixels, (N, 3) RGB.

    Raises:
        BadFile: more than one colour covers more than 1 % of these pixels; JPEG fringes cover less.
    """
    strong_channels = pixels > pixels.max(axis=1, keepdims=True) / 2
    counts = np.bincount(strong_channels @ np.array([4, 2, 1]), minlength=8)
    colours = [COLOURS[i] for i in range(8) if counts[i] > 0.01 * len(pixels)]
    if len(colours) > 1:
        raise BadFile(f"mask in several colours: {', '.join(colours)}")


def separate(grey: NDArray[Any]) -> tuple[NDArray[np.bool_], list[str]]:
    """Tell foreground from background in a grey mask of any range. Returns (H, W) bools and a list of repairs.

    0 and any other value is binary, whatever that value is. Of more values, nearly all must be near 0 or near the
    highest one, as JPEG leaves them. All else are labels, or no mask at all.

    Raises:
        BadFile: with the values.
    """
    if grey.dtype == np.uint8:
        counts = np.bincount(grey.ravel(), minlength=256)  # several times faster than np.unique
        values, counts = np.flatnonzero(counts), counts[counts > 0]
    else:
        values, counts = np.unique(grey, return_counts=True)
    highest = values[-1].item()  # nan, where there is one
    if len(values) == 1 or (len(values) == 2 and values[0] == 0):
        return grey > 0, ([] if highest in (0, 255) else [f"mask of 0 and {highest} made 0 and 255"])

    scale = 1 if highest <= 255 else 257  # 16 bits
    between = (values > FRINGE * scale) & (values < highest - FRINGE * scale)
    share_between = counts[between].sum() / counts[values != 0].sum()
    most = 0.0 if len(values) == 2 else 0.1 if len(values) <= MAX_LABELS else 0.5  # a blurred edge is wider than JPEG's
    if len(values) > MAX_LABELS and share_between > most:
        raise BadFile(f"mask is grey all over: {len(values)} values from {values[0]} to {highest}; is it a photograph?")
    if not highest > THRESHOLD * scale or share_between > most:
        some = ", ".join(str(value) for value in values[:MAX_LABELS])
        raise BadFile(f"mask with several labels: {some}{', …' if len(values) > MAX_LABELS else ''}")
    return grey > THRESHOLD * scale, ["mask with grey fringes thresholded at 127"]


# --- drawing ---------------------------------------------------------------------------------


def overlay(image: NDArray[np.uint8], labels: NDArray[Any]) -> NDArray[np.uint8]:
    """Tint what is labelled, (H, W), on a photograph, (H, W, 3): label 1 (or True) green, others in other colours."""
    tinted = image.copy()
    for label in np.unique(labels[labels > 0]):
        colour = np.array(TINTS[(int(label) - 1) % len(TINTS)])
        tinted[labels == label] = (image[labels == label] * 0.5 + colour * 0.5).astype(np.uint8)
    return tinted
