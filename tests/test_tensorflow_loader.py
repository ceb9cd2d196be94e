"""Part 1, from a copied folder: its batches follow from the seed, and masks stay on their photographs."""

from pathlib import Path

import pytest

from conftest import Part

LOAD = """
import sys
import numpy as np
from dataloader import augment, load_data_path, shuffled_epochs, tf_dataset
from loading import load_from_cache, load_from_files
from pathlib import Path
paths = load_data_path(Path(sys.argv[1]), "train.csv")
size, number = 96, len(paths)

def batches(workers, cache=False, seed=1, first=0):
    load = load_from_files(paths, size)
    if cache:
        load = load_from_cache(load, number, size, workers, None)
    order = shuffled_epochs(number, 16, seed, range(first, 2))
    return list(tf_dataset(load, size, order, [8], workers, augment(seed, workers)).as_numpy_iterator())

def same(left, right):
    return all(np.array_equal(a, b) for l, r in zip(left, right, strict=True) for a, b in zip(l, r, strict=True))

reference = batches(workers=2)
print(len(reference), set(np.unique(np.concatenate([masks for _, masks in reference]))) == {0, 1})
print(same(reference, batches(0)), same(reference, batches(4)), same(reference, batches(2, cache=True)))
print(same(reference[2:], batches(2, first=1)), same(reference[:2], reference[2:]), same(reference, batches(2, seed=2)))
"""


def test_the_same_seed_gives_the_same_batches(part1: Part, data_root: Path) -> None:
    (part1.folder / "load_twice.py").write_text(LOAD)
    lines = part1.run("load_twice.py", data_root).stdout.splitlines()[-3:]
    assert lines[0] == "4 True"  # masks stay 0 and 1
    assert lines[1] == "True True True"  # whatever the number of threads, and from the cache
    assert lines[2] == "True False False"  # an epoch has its own order, and a seed its own


RESIZED = """
import numpy as np
from transform import valid_transform
rows, columns = np.mgrid[:480, :400]
mask = ((rows - 240) ** 2 + (columns - 200) ** 2 < 60**2).astype(np.uint8)
small = valid_transform(128)(image=np.repeat(mask[..., None] * 255, 3, axis=2), mask=mask)
bright = small["image"][..., 0] > 127
print(*(np.argwhere(bright).mean(axis=0) - np.argwhere(small["mask"]).mean(axis=0)))
"""


def test_resizing_keeps_image_and_mask_on_one_another(part1: Part) -> None:
    (part1.folder / "resized.py").write_text(RESIZED)
    offset = [float(word) for word in part1.run("resized.py").stdout.split()[-2:]]
    assert offset == pytest.approx([0, 0], abs=0.1)  # the usual nearest neighbour is off by half a pixel


MARKER = """
import numpy as np
from transform import seed_transform, train_transform
transform = train_transform()
photograph = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
changes = set()
for seed in range(200):
    seed_transform(transform, 1, 2, seed)
    changes.add(transform(image=photograph, mask=photograph[..., 0])["image"].tobytes())
rows, columns = np.mgrid[:128, :128]
worst = 1.0
for seed in range(50):
    mask = ((rows - 50) ** 2 + (columns - 80) ** 2 < 24**2).astype(np.uint8)
    seed_transform(transform, seed)
    moved = transform(image=np.repeat(mask[..., None] * 255, 3, axis=2), mask=mask)
    assert set(np.unique(moved["mask"])) <= {0, 1}
    grey = moved["image"].astype(int).mean(axis=2)
    bright = grey > (grey.min() + grey.max()) / 2
    worst = min(worst, (bright & (moved["mask"] > 0)).sum() / (bright | (moved["mask"] > 0)).sum())
print(len(changes), worst)
"""


def test_image_and_mask_are_moved_alike(part1: Part) -> None:
    (part1.folder / "marker.py").write_text(MARKER)
    different, worst = part1.run("marker.py").stdout.split()[-2:]
    # A photograph is left as it is, or only flipped, one time in five. Steps that did not draw their chances
    # independently of one another would leave it as it is half of the time.
    assert int(different) > 130
    assert float(worst) > 0.9
