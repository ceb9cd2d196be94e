"""Match photographs with their masks, and split the pairs into training and validation."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from image_files import IMAGE_ENDINGS, find_files, stem_below
from utils import stop

LAYOUTS = """
  Images/<source>/* and Masks/<source>/*
  images/* and labels/* or masks/*
  train/images/*, train/masks/*, valid/images/* and valid/masks/*"""


@dataclass
class Pair:
    """A photograph with its mask, and what becomes known about them on the way."""

    image: Path
    mask: Path
    side: str  # "train" or "valid"; "unsplit" until that is decided
    source: str
    stem: str
    group: str  # pairs of one group stay on one side
    fold: int | str = ""
    width: int = 0
    height: int = 0
    foreground: float = 0.0  # share of the pixels
    digest: str = ""  # of the photograph's pixels: the same photograph has the same one
    repairs: list[str] = field(default_factory=list)
    rejected: tuple[Path, str] | None = None  # the bad file of the two, and the reason

    def target(self, kind: str) -> str:
        """The path of the prepared file, relative to data_root; `kind` is "images" or "masks"."""
        return f"{self.side}/{kind}/{self.source}/{self.stem}.png"


@dataclass
class RawData:
    """What lies in a raw folder."""

    layout: str  # for people
    folders: list[tuple[str, Path, Path]]  # side, images, masks
    pairs: list[Pair] = field(default_factory=list)
    rejected: dict[Path, str] = field(default_factory=dict)  # file: reason
    images: int = 0
    masks: int = 0
    other_endings: Counter[str] = field(default_factory=Counter)  # of files that are no images

    @property
    def is_split(self) -> bool:
        """Whether it came in train/ and valid/."""
        return len(self.folders) == 2


# --- from folders to pairs -------------------------------------------------------------------


def find_layout(raw: Path) -> RawData:
    """Find out in which of three layouts the raw data lies."""
    if not raw.is_dir():
        stop(f"{raw} is not a folder; --raw names the one with the photographs and masks")
    names = {path.name for path in raw.iterdir() if path.is_dir()}
    for images, masks in [("Images", "Masks"), ("images", "labels"), ("images", "masks")]:
        if {images, masks} <= names:
            return RawData(f"{images}/* and {masks}/*", [("unsplit", raw / images, raw / masks)])
    folders = [(side, raw / side / "images", raw / side / "masks") for side in ("train", "valid")]
    if all(images.is_dir() and masks.is_dir() for _, images, masks in folders):
        return RawData("train/{images,masks}/* and valid/{images,masks}/*: split already, and left so", folders)
    there = ", ".join(sorted(names)) or "none"
    stop(f"no photographs with masks in {raw} (folders there: {there}). One of these is needed:{LAYOUTS}")


def collect_pairs(data: RawData) -> None:
    """Match photographs and masks that have the same name in the same sub-folder; the sub-folder is the source."""
    found: dict[tuple[str, str], tuple[list[Path], list[Path]]] = {}
    for side, *tops in data.folders:
        for kind, top in enumerate(tops):
            for path in find_files(top):
                if path.suffix.lower() in IMAGE_ENDINGS:
                    found.setdefault((side, stem_below(top, path)), ([], []))[kind].append(path)
                elif path.is_dir():
                    data.rejected[path] = "link to a folder: copy the folder here, or name it with --raw"
                else:
                    data.other_endings[path.suffix.lower() or "no ending"] += 1
    for (side, name), (images, masks) in sorted(found.items()):
        data.images += len(images)
        data.masks += len(masks)
        if len(images) > 1 or len(masks) > 1:
            reject_same_name(data, images + masks, [path for same in (images, masks) if len(same) > 1 for path in same])
        elif not masks:
            data.rejected[images[0]] = "image without mask"
        elif not images:
            data.rejected[masks[0]] = "mask without image"
        else:
            *folders, stem = name.split("/")
            data.pairs.append(Pair(images[0], masks[0], side, "_".join(folders) or "0", stem, group=str(images[0])))


def reject_same_name(data: RawData, paths: list[Path], same: list[Path]) -> None:
    """Reject `paths`, because those in `same` would become one prepared file."""
    names = ", ".join(f"{path.parent.name}/{path.name}" for path in same)
    data.rejected |= dict.fromkeys(paths, f"several files with one name: {names}")


def reject_clashes(data: RawData) -> None:
    """Reject pairs from different folders that would become one prepared file, because their source is the same."""
    targets: dict[str, list[Pair]] = defaultdict(list)
    for pair in data.pairs:
        targets[pair.target("images")].append(pair)
    for same in targets.values():
        if len(same) > 1:
            images = [pair.image for pair in same]
            reject_same_name(data, images, images)
    data.pairs = [pair for pair in data.pairs if pair.image not in data.rejected]


# --- groups ----------------------------------------------------------------------------------


def read_groups(file: Path) -> dict[str, str]:
    """Read --groups, a CSV file with the columns file and group. Returns the group of each file."""
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")  # -sig: as Excel writes it
        rows = list(zip(table["file"].str.normalize("NFC"), table["group"].str.strip(), strict=True))
    except (OSError, ValueError, KeyError) as error:
        stop(f"--groups {file}: a CSV file with the columns file and group is needed ({error})")
    groups: dict[str, str] = {}
    for name, group in rows:
        if not group or group.startswith(".") or ".." in group or "/" in group or "\\" in group:
            stop(f"--groups {file}: the group of {name} is {group!r}, which cannot be the name of a folder")
        if groups.setdefault(name, group) != group:
            stop(f"--groups {file}: {name} is in two groups, {groups[name]} and {group}")
    return groups


def use_groups(data: RawData, groups: dict[str, str]) -> None:
    """Make the group of each pair its source. A file is named by its path below the images folder, or by its name."""
    unnamed = []
    for pair in data.pairs:
        name = stem_below(data.folders[0][1], pair.image) + pair.image.suffix
        group = groups.get(name) or groups.get(Path(name).name)
        if group:
            pair.source = pair.group = group
        else:
            unnamed.append(name)
    if unnamed:
        more = f" and {len(unnamed) - 20} more" if len(unnamed) > 20 else ""
        stop(f"--groups does not name {len(unnamed)} photographs: {', '.join(unnamed[:20])}{more}")


# --- the split -------------------------------------------------------------------------------

Unit = list[Pair]  # pairs that may not be separated


def find_units(pairs: Iterable[Pair], seed: int) -> dict[str, list[Unit]]:
    """Put pairs together that may not be separated: of one group, or with the same photograph.

    Groups and photographs are the nodes of a graph, each pair connects two of them; a unit is what hangs together.

    Returns:
        The units of each source, both shuffled. The source of a unit is that of its first pair.
    """
    parents: dict[str, str] = {}

    def root(node: str) -> str:
        while parents.setdefault(node, node) != node:
            node = parents[node]
        return node

    for pair in pairs:
        parents[root(pair.digest)] = root(f"group {pair.group}")
    units: dict[str, Unit] = defaultdict(list)
    for pair in pairs:
        units[root(pair.digest)].append(pair)
    by_source: dict[str, list[Unit]] = defaultdict(list)
    for unit in units.values():
        by_source[unit[0].source].append(unit)
    sources = sorted(by_source)
    random.Random(str(seed)).shuffle(sources)  # seeded with text, it is the same on any machine
    for source in sources:
        random.Random(f"{seed}-{source}").shuffle(by_source[source])
    return {source: by_source[source] for source in sources}


def choose_by_source(by_source: dict[str, list[Unit]], share: float) -> list[Unit]:
    """Choose units for validation so that each source comes close to its share of photographs."""
    chosen = []
    for units in by_source.values():
        missing = share * sum(len(unit) for unit in units)
        for unit in units:
            if abs(missing - len(unit)) < abs(missing):
                chosen.append(unit)
                missing -= len(unit)
    every = [unit for units in by_source.values() for unit in units]
    if not chosen:
        chosen = [min(every, key=len)]
    elif len(chosen) == len(every):
        chosen.remove(min(every, key=len))
    return chosen


def choose_by_total(by_source: dict[str, list[Unit]], share: float) -> list[Unit]:
    """Choose units for validation so that all together come as close as possible to a share of the photographs."""
    units = [unit for units in by_source.values() for unit in units]
    total = sum(len(unit) for unit in units)
    steps: dict[int, tuple[int, Unit]] = {}  # a number that can be reached: the number before, and the unit added to it
    for unit in units:
        for count in [0, *steps]:
            steps.setdefault(count + len(unit), (count, unit))
    count = min(
        (number for number in steps if number < total), key=lambda number: (abs(number - share * total), number)
    )
    chosen = []
    while count:
        count, unit = steps[count]
        chosen.append(unit)
    return chosen


def deal_folds(by_source: dict[str, list[Unit]], folds: int) -> None:
    """Give each unit, the largest first, to the fold with the fewest photographs of its source, then of all."""
    counts: Counter[Any] = Counter()
    units = [unit for units in by_source.values() for unit in units]
    for unit in sorted(units, key=len, reverse=True):
        source = unit[0].source
        fold = min(range(folds), key=lambda i: (counts[i, source], counts[i], i))
        counts[fold, source] += len(unit)
        counts[fold] += len(unit)
        for pair in unit:
            pair.fold, pair.side = fold, "train" if fold else "valid"


def split(pairs: list[Pair], share: float, folds: int | None, by_total: bool, seed: int) -> None:
    """Decide the side of each pair, and its fold where there are folds.

    Args:
        pairs: in an order that does not depend on the machine.
        share: of the photographs, for validation.
        folds: instead of a share; fold 0 is for validation.
        by_total: reach the share over all photographs and not in each source.
        seed: of the shuffling.
    """
    by_source = find_units(pairs, seed)
    number = sum(len(units) for units in by_source.values())
    if number < (folds or 2):
        stop(f"{number} photographs or groups of them can be separated; a split needs at least {folds or 2}")
    if folds:
        deal_folds(by_source, folds)
        return
    chosen = (choose_by_total if by_total else choose_by_source)(by_source, share)
    valid = {pair.image for unit in chosen for pair in unit}
    for pair in pairs:
        pair.side = "valid" if pair.image in valid else "train"
