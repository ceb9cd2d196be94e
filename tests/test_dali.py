"""Part 5, from a copied folder: training, and what only DALI has."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bad_data_tests import test_bad_data_is_told, test_odd_data_does_no_harm  # noqa: F401 - they are run for `part`
from conftest import SMALL, Part
from lightning_tests import (  # noqa: F401 - they are run for `part`
    test_a_file_that_became_corrupt_is_named_and_the_run_goes_on,
    test_killed_or_interrupted_and_resumed_ends_like_an_uninterrupted_run,
    test_several_classes,
    test_training_finds_nails_and_leaves_what_it_should,
    test_two_processes_give_the_metrics_of_one,
    test_two_processes_train,
    trained,
)
from reliability_tests import (  # noqa: F401 - those that reading has to do with; all are run for part 3
    run,
    small_root,
    test_a_full_disk_leaves_the_last_checkpoint,
    test_chance_follows_from_the_seed_alone,
)


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return Part("part5_dali", tmp_path_factory.mktemp("copied alone"))


@pytest.fixture(scope="module")
def npy_root(part: Part, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few photographs, prepared with --npy."""
    raw, root = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("npy") / "nails"
    shutil.copytree(data_root / "valid", raw, dirs_exist_ok=True)
    part.run("data_preparation.py", "--data_root", root, "--raw", raw, "--npy")
    return root


def test_preparation_writes_arrays_and_takes_them_away(part: Part, npy_root: Path, tmp_path: Path) -> None:
    for side in ["train", "valid"]:
        table = pd.read_csv(npy_root / "csv_file" / f"{side}.csv")
        arrays = pd.read_csv(npy_root / "csv_file" / f"npy_{side}.csv")
        assert len(table) == len(arrays) > 0
        for row, array in zip(table.itertuples(), arrays.itertuples(), strict=True):
            assert Path(row.images).with_suffix(".npy") == Path(array.images)
            image, mask = np.load(npy_root / array.images), np.load(npy_root / array.masks)
            assert image.shape == (row.height, row.width, 3) and image.dtype == np.uint8
            assert mask.shape == (row.height, row.width) and set(np.unique(mask)) <= {0, 255}
            assert (mask > 0).mean() == pytest.approx(row.foreground, abs=1e-6)
    # Prepared again, with and without, its own arrays are not in the way.
    raw, root = tmp_path / "raw", tmp_path / "again"
    shutil.copytree(npy_root / "valid", raw, ignore=shutil.ignore_patterns("*.npy"))
    for flags in [["--npy"], ["--npy"], []]:
        part.run("data_preparation.py", "--data_root", root, "--raw", raw, *flags)
        assert any(root.rglob("*.npy")) == bool(flags)


LOAD = """
import sys
from pathlib import Path
import numpy as np
import torch
from dataloader import NailDataset, ShuffledEpochs, load_data_path
from pipelines import LightningWrapper
paths = load_data_path(Path(sys.argv[1]), "train.csv")

def batches(epochs=(0, 1), start=(0, 0), rank=0, ranks=1):
    sampler = ShuffledEpochs(len(paths), 24, 1, rank, ranks)
    loader = LightningWrapper(NailDataset(paths, 64, 1, 1), sampler, 8 // ranks, 2, rank=rank, start=start)
    assert len(loader) == 3
    found = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        found += [[images.numpy(), masks.numpy()] for images, masks in loader]
    return found

def same(left, right):
    return all(np.array_equal(a, b) for l, r in zip(left, right, strict=True) for a, b in zip(l, r, strict=True))

reference = batches()
print(len(reference), same(reference, batches()))
print(same(reference[2:], batches(start=(0, 2))), same(reference[4:], batches(epochs=[1], start=(1, 1))))

valid = LightningWrapper(NailDataset(paths, 64, 1), [(0, index) for index in range(len(paths))], 10, 2)
whole = [images.numpy() for images, _ in valid]
print([len(images) for images in whole], len(valid))
for number in range(3):  # an epoch that is abandoned, as by Lightning's sanity check, is not gone on with
    iterator = iter(valid)
    for _ in range(number):
        next(iterator)
    again = [images.numpy() for images, _ in valid]
    print(all(map(np.array_equal, whole, again)), len(again) == len(whole))

# The shares of two processes are, without augmentation, the photographs of one.
places = list(ShuffledEpochs(len(paths), 24, 1))
dataset = NailDataset(paths, 64, 1)
alone = torch.cat([images for images, _ in LightningWrapper(dataset, places, 8, 1)])
shares = [LightningWrapper(dataset, list(ShuffledEpochs(len(paths), 24, 1, r, 2)), 4, 1, rank=r) for r in (0, 1)]
first, second = (torch.cat([images for images, _ in share]) for share in shares)
print(torch.equal(torch.stack([first, second], dim=1).flatten(0, 1), alone))
# And they do not augment alike: the same photographs, loaded by another process, come out different.
one, other = (LightningWrapper(NailDataset(paths, 64, 1, 1), places, 8, 1, rank=rank) for rank in (0, 1))
print(not torch.equal(torch.cat([images for images, _ in one]), torch.cat([images for images, _ in other])))
"""


def test_an_epoch_can_be_abandoned_shared_and_gone_on_with(part: Part, data_root: Path) -> None:
    (part.folder / "load.py").write_text(LOAD)
    lines = part.run("load.py", data_root).stdout.splitlines()
    photographs = len(pd.read_csv(data_root / "csv_file" / "train.csv"))
    full, rest = divmod(photographs, 10)
    assert rest > 0
    assert lines[0] == "6 True"
    assert lines[1] == "True True"
    assert lines[2] == f"{[10] * full + [rest]} {full + 1}"  # the last batch is as small as it has to be
    assert lines[3:6] == ["True True"] * 3
    assert lines[6:] == ["True", "True"]


def test_arrays_that_do_not_fit_are_named(part: Part, npy_root: Path, data_root: Path, work_dir: Path) -> None:
    args = [*SMALL, "--batch_size", 1, "--epochs", 1, "--data_format", "npy"]
    none = part.run("train.py", "--data_root", data_root, "--work_dir", work_dir, *args, code=2)
    assert "npy_train.csv" in none.stderr and "data_preparation.py --npy" in none.stderr
    table = pd.read_csv(npy_root / "csv_file" / "npy_train.csv")
    image, mask = npy_root / table["images"][1], npy_root / table["masks"][2]
    wrong = {
        "other size": (image, lambda: np.save(image, np.zeros((20, 30, 3), np.uint8))),
        "truncated": (image, lambda: image.write_bytes(image.read_bytes()[:1000])),
        "gone": (mask, mask.unlink),
        "labels": (mask, lambda: np.save(mask, np.load(mask) // 100)),
    }
    for name, (file, spoil) in wrong.items():
        content = file.read_bytes()
        spoil()
        done = part.run("train.py", "--data_root", npy_root, "--work_dir", work_dir / name, *args, code=1)
        file.write_bytes(content)
        assert f"error: {file}" in done.stderr and "data_preparation.py" in done.stderr, (name, done.stderr)


def test_no_dali_and_no_gpu_are_said(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 1, "--limit_batches", 1]
    without = "import runpy, sys; sys.modules['nvidia'] = None; runpy.run_path('train.py', run_name='__main__')"
    done = part.run("-c", without, *args, code=2)
    assert "--loader dali" in done.stderr and "--loader torch" in done.stderr
    part.run("-c", without, *args, "--loader", "torch")
    cached = part.run("train.py", *args, "--cache", "memory", code=2)
    assert "--loader torch" in cached.stderr
    on_gpu = "from pathlib import Path; import sys; from dataloader import *; from pipelines import *; "
    on_gpu += "dataset = NailDataset(load_data_path(Path(sys.argv[1]), 'train.csv'), 64, 1); "
    on_gpu += "next(iter(LightningWrapper(dataset, [(0, 0)], 1, 1, device_id=0)))"
    done = part.run("-c", on_gpu, data_root, code=2)
    assert "--device 0: DALI cannot use this GPU" in done.stderr and "--loader torch" in done.stderr
