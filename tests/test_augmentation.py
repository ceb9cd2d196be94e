"""Parts 3, 4 and 5 augment alike: what reaches the network in each, recorded while Lightning trains."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import Part

PHOTOGRAPHS, BATCH_SIZE, IMAGE_SIZE = 45, 8, 96
# Each part's ways to the same batches: other threads or processes, another device, other files.
SAME = {
    "part3_lightning": [["--workers", "0"], ["--workers", "3"]],
    "part4_kornia": [["--workers", "0"], ["--workers", "3"], ["--augment_on", "cpu"]],
    "part5_dali": [["--workers", "1"], ["--workers", "3"], ["--data_format", "npy"]],
}

# Each run of two epochs ends in a file: what the network was given, whole epochs joined.
RECORD = """
import json
import sys
from pathlib import Path
import numpy as np
import pytorch_lightning as pl
import torch
import train

class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.batches = {"train": [], "valid": []}
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        self.batches["train"].append(batch)
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.batches["valid"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

for name, flags in json.loads(sys.argv[1]).items():
    sys.argv[1:] = flags
    args = train.parse_args()
    args.device, args.mixed_precision = ["cpu"], "fp32"
    form = [args.data_format] if "data_format" in args else []
    paths = [train.load_data_path(args.data_root, f"{side}.csv", *form) for side in ("train", "valid")]
    recorder = Recorder()
    train.create_trainer(args, args.work_dir, []).fit(recorder, train.NailDataModule(args, *paths))
    arrays = {}
    for side, batches in recorder.batches.items():
        arrays |= {f"{side}_images": torch.cat([images for images, _ in batches]).numpy()}
        arrays |= {f"{side}_masks": torch.cat([masks for _, masks in batches]).numpy()}
        arrays |= {f"{side}_sizes": [len(images) for images, _ in batches]}
    np.savez(args.work_dir / name, **arrays)
"""


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory, part1: Part) -> Path:
    """Photographs of a bright disc, each in a place and of a size of its own, whose mask is that disc; prepared."""
    raw = tmp_path_factory.mktemp("discs")
    rng = np.random.default_rng(0)
    for folder in ["images", "masks"]:
        (raw / folder).mkdir()
    for number in range(PHOTOGRAPHS):
        height, width = rng.integers(100, 160, 2)
        rows, columns = np.mgrid[:height, :width]
        row, column, radius = rng.uniform(0.25, 0.75) * height, rng.uniform(0.25, 0.75) * width, rng.uniform(15, 25)
        disc = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
        grey = rng.integers(0, 60, (height, width)) + 160 * disc
        image = grey[..., np.newaxis] * [1.0, 0.8, 0.6]  # a warm light
        Image.fromarray(image.astype(np.uint8)).save(raw / "images" / f"{number}.png")
        Image.fromarray(disc).save(raw / "masks" / f"{number}.png")
    root = raw / "prepared"
    part1.run("data_preparation.py", "--data_root", root, "--raw", raw, "--npy")
    return root


@pytest.fixture(scope="module")
def recorded(discs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """What the network is given, of each part and each of its runs."""
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, ways in SAME.items():
        part = Part(name, tmp_path_factory.mktemp("copied alone"))
        (part.folder / "record.py").write_text(RECORD)
        common = ["--data_root", discs, "--work_dir", part.folder, "--image_size", IMAGE_SIZE, "--epochs", 2]
        common = [*map(str, common), "--batch_size", str(BATCH_SIZE), "--encoder_weights", "none"]
        runs = {" ".join(way): [*common, *way] for way in ways} | {"other seed": [*common, "--seed", "7"]}
        if name == "part5_dali":
            runs["torch"] = [*common, "--loader", "torch"]
        part.run("record.py", json.dumps(runs))
        found[name] = {run: dict(np.load(part.folder / f"{run}.npz")) for run in runs}
    return found


def as_photographs(images: np.ndarray) -> np.ndarray:
    """Undo the normalisation: back to [0, 1]."""
    mean, std = np.reshape([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], (2, 3, 1, 1))
    return images * std + mean


@pytest.mark.parametrize("name", SAME)
def test_masks_stay_labels_and_images_keep_their_range(name: str, recorded: dict) -> None:
    for run in recorded[name].values():
        for side in ["train", "valid"]:
            assert set(np.unique(run[f"{side}_masks"])) == {0, 1} and run[f"{side}_masks"].dtype == np.int64
            images = as_photographs(run[f"{side}_images"])
            assert run[f"{side}_images"].dtype == np.float32 and images.shape[1:] == (3, IMAGE_SIZE, IMAGE_SIZE)
            assert images.min() > -1e-5 and images.max() < 1 + 1e-5
            assert images.min() < 0.1 and images.max() > 0.7


@pytest.mark.parametrize("name", SAME)
def test_image_and_mask_are_moved_alike(name: str, recorded: dict) -> None:
    for run in recorded[name].values():
        bright = as_photographs(run["train_images"]).mean(axis=1)
        middle = (bright.min(axis=(1, 2)) + bright.max(axis=(1, 2))) / 2
        bright = bright > middle[:, np.newaxis, np.newaxis]
        masks = run["train_masks"] > 0
        iou = (bright & masks).sum(axis=(1, 2)) / (bright | masks).sum(axis=(1, 2))
        assert iou.min() > 0.85  # noise and blur move the edge by a part of a pixel


@pytest.mark.parametrize("name", SAME)
def test_the_same_seed_gives_the_same_batches(name: str, recorded: dict) -> None:
    first, *others = [recorded[name][" ".join(way)] for way in SAME[name]]
    for other in others:
        np.testing.assert_allclose(first["train_images"], other["train_images"], atol=1e-5)
        np.testing.assert_array_equal(first["train_masks"], other["train_masks"])
    assert not np.array_equal(first["train_masks"], recorded[name]["other seed"]["train_masks"])
    epochs = np.split(first["train_images"], 2)
    assert not np.array_equal(*[np.sort(epoch.reshape(len(epoch), -1).sum(axis=1)) for epoch in epochs])


@pytest.mark.parametrize("name", SAME)
def test_half_of_the_photographs_change_their_colour(name: str, recorded: dict) -> None:
    run = recorded[name][" ".join(SAME[name][0])]
    steps = PHOTOGRAPHS * 4 // 5 // BATCH_SIZE
    assert run["train_sizes"].tolist() == [BATCH_SIZE] * steps * 2  # what fills no batch is left out
    red, _, blue = as_photographs(run["train_images"]).mean(axis=(2, 3)).T
    assert 0.25 < (np.abs(blue / red - 0.6) > 0.02).mean() < 0.75


def test_validation_is_the_same_in_all_parts(recorded: dict) -> None:
    reference = recorded["part3_lightning"]["--workers 0"]
    assert reference["valid_sizes"].sum() == 2 * PHOTOGRAPHS // 5  # the last batch, and a smaller one, as well
    for name, runs in recorded.items():
        for way, run in runs.items():
            np.testing.assert_array_equal(reference["valid_masks"], run["valid_masks"])
            difference = np.abs(as_photographs(reference["valid_images"]) - as_photographs(run["valid_images"]))
            # DALI shrinks with another filter than OpenCV.
            assert difference.mean() < (2 / 255 if name == "part5_dali" and way != "torch" else 1e-6), (name, way)
