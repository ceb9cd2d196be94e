"""Part 7, from a copied folder: annotations, operators, training, resuming, processes, prediction, strangers' files."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_tensorflow import COLUMNS

from conftest import ROOT, Part, wait_for_rows
from conftest import SMALL_MASK_RCNN as SMALL
from lightning_tests import (
    SAME,
    test_torchrun_starts_again_from_the_last_checkpoint,  # noqa: F401 - for the part that `part` is
    test_when_one_process_is_killed_the_other_ends,  # noqa: F401
)
from reliability_tests import *  # noqa: F403 - all of its tests


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return Part("part7_mmdetection", tmp_path_factory.mktemp("copied alone"))


@pytest.fixture(scope="module")
def data_root(part: Part, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 sample photographs, prepared with annotations."""
    root = tmp_path_factory.mktemp("data") / "nails of a hand"
    command = [str(part.python), str(ROOT / "sample_data.py"), "--data_root", str(root), "--images", "60"]
    subprocess.run(command, check=True, capture_output=True)
    part.run("data_preparation.py", "--data_root", root)
    return root


# --- annotations -------------------------------------------------------------------------------


def make_pair(raw: Path, name: str, mask: np.ndarray) -> None:
    photograph = np.random.default_rng(int(name[-1])).integers(0, 256, (*mask.shape, 3))  # two alike are kept together
    for folder, pixels in [("images", photograph), ("masks", mask)]:
        (raw / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(raw / folder / f"{name}.png")


def decode(annotation: dict) -> np.ndarray:
    """COCO's run lengths, column by column, by the description of the format."""
    text, counts = annotation["segmentation"]["counts"].encode(), []
    position = 0
    while position < len(text):
        value = shift = 0
        more = True
        while more:
            byte = text[position] - 48
            value |= (byte & 0x1F) << 5 * shift
            more, position, shift = bool(byte & 0x20), position + 1, shift + 1
            if not more and byte & 0x10:
                value |= -1 << 5 * shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    values = np.concatenate([np.full(number, index % 2) for index, number in enumerate(counts)])
    return values.reshape(annotation["segmentation"]["size"][::-1]).T


def test_annotations_are_the_pixels(part: Part, tmp_path: Path) -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[10:20, 5:15] = 255
    mask[13:16, 8:12] = 0  # a hole
    mask[0:7, 70:80] = 255  # at the border
    mask[40:42, 40:43] = 255  # a speck of 6 pixels
    mask[50:60, 20:30] = 255
    mask[45:50, 30:40] = 255  # touches the one before at a corner
    for index in range(5):
        make_pair(tmp_path / "raw", f"hand{index}", mask)
    printed = part.run("data_preparation.py", "--data_root", tmp_path / "nails", "--raw", tmp_path / "raw").stdout
    assert "15" in printed.split("instances:")[1].split("\n")[0] and "left out: 5," in printed
    content = json.loads((tmp_path / "nails" / "annotations" / "train.json").read_text())
    first = [one for one in content["annotations"] if one["image_id"] == 1]
    masks = [decode(one) for one in first]
    mask[40:42, 40:43] = 0
    assert np.array_equal(np.sum(masks, axis=0), mask // 255)
    for annotation, one in zip(first, masks, strict=True):
        rows, columns = np.nonzero(one)
        width, height = columns.max() - columns.min() + 1, rows.max() - rows.min() + 1
        assert annotation["bbox"] == [columns.min(), rows.min(), width, height]
        assert annotation["area"] == one.sum()  # of the mask, not of the box
    assert sorted(one["area"] for one in first) == [70, 88, 150]
    assert content["images"][0]["width"] == 80 and content["images"][0]["height"] == 60
    assert (tmp_path / "nails" / content["images"][0]["file_name"]).exists()


def test_noise_is_counted_and_crowds_are_told(part: Part, tmp_path: Path) -> None:
    noise, crowd = np.zeros((500, 500), np.uint8), np.zeros((500, 500), np.uint8)
    noise[::2, ::2] = 255  # 62,500 specks: a mask for each of them would take 16 GB
    noise[100:110, 100:110] = 255
    crowd[np.ix_(np.arange(500) % 10 < 5, np.arange(500) % 10 < 5)] = 255  # 2,500 squares of 25 pixels
    for index in range(4):
        make_pair(tmp_path / "raw", f"hand{index}", crowd if index == 3 else noise)
    printed = part.run("data_preparation.py", "--data_root", tmp_path / "nails", "--raw", tmp_path / "raw").stdout
    assert "instances: 2503; left out: " in printed
    assert "more than 1000 instances" in printed and "hand3.png" in printed


def test_own_annotations_are_not_replaced(part: Part, data_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "nails"
    shutil.copytree(data_root, root)
    args = ["--data_root", root, "--valid_fraction", 0.3]
    part.run("data_preparation.py", *args)  # those that it made itself may go
    own = root / "annotations" / "train.json"
    content = json.loads(own.read_text())
    del content["info"]
    own.write_text(json.dumps(content))
    refused = part.run("data_preparation.py", *args, code=2)
    assert "annotations/train.json" in refused.stderr
    assert json.loads(own.read_text()) == content


def test_masks_that_number_their_instances_are_taken_as_they_are(part: Part, tmp_path: Path) -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[5:15, 5:10], mask[5:15, 10:15] = 3, 7  # two that touch
    mask[20:30, 5:10] = 3  # and one in two pieces
    for index in range(5):
        make_pair(tmp_path / "raw", f"hand{index}", mask)
    args = ["--data_root", tmp_path / "nails", "--raw", tmp_path / "raw", "--numbered"]
    part.run("data_preparation.py", *args)
    content = json.loads((tmp_path / "nails" / "annotations" / "valid.json").read_text())
    assert [one["area"] for one in content["annotations"]] == [100, 50]
    assert [one["bbox"] for one in content["annotations"]] == [[5, 5, 5, 25], [10, 5, 5, 10]]


# --- operators ---------------------------------------------------------------------------------

OPERATORS = """
import ops
ops.provide_operators()
import numpy as np
import torch
from mmcv.ops import RoIAlign, nms, soft_nms

rng = np.random.default_rng(0)
corners = rng.uniform(0, 40, (200, 2))
boxes = np.hstack([corners, corners + rng.uniform(1, 20, (200, 2))]).astype(np.float32)
scores = rng.permutation(200).astype(np.float32)

def overlap(one, other):
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    both = np.prod(np.maximum(high - low, 0))
    return both / (np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - both)

kept = []
for index in np.argsort(-scores):
    if all(overlap(boxes[index], boxes[other]) <= 0.5 for other in kept):
        kept.append(index)
print(nms(torch.tensor(boxes), torch.tensor(scores), 0.5)[1].tolist() == kept, 50 < len(kept) < 200)

def bilinear(feature, y, x):
    height, width = feature.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return feature.sum() * 0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = feature[top, left] * (1 - (x - left)) + feature[top, right] * (x - left)
    lower = feature[bottom, left] * (1 - (x - left)) + feature[bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)

def reference(features, roi, scale, points):
    _, x1, y1, x2, y2 = (float(value) * scale - 0.5 for value in roi)
    cells = []
    for row in range(7):
        for column in range(7):
            found = [
                bilinear(features, y1 + (y2 - y1) / 7 * (row + (i + 0.5) / points),
                         x1 + (x2 - x1) / 7 * (column + (j + 0.5) / points))
                for i in range(points) for j in range(points)
            ]
            cells.append(sum(found) / len(found))
    return torch.stack(cells).view(7, 7)

torch.manual_seed(0)
features = torch.rand(2, 1, 20, 24, dtype=torch.float64).float().requires_grad_()
rois = torch.tensor([[0, 3.0, 4, 60, 50], [1, -8, -8, 30, 41], [1, 70, 60, 110, 90]])
ours = RoIAlign((7, 7), spatial_scale=0.25, sampling_ratio=2, aligned=True)(features, rois)
weights = torch.rand_like(ours)
gradient, = torch.autograd.grad((ours * weights).sum(), features)
theirs = torch.stack([reference(features[int(roi[0]), 0], roi, 0.25, 2) for roi in rois])[:, None]
expected, = torch.autograd.grad((theirs * weights).sum(), features)
print((ours - theirs).abs().max().item() < 1e-5, (gradient - expected).abs().max().item() < 1e-4)
try:
    soft_nms(torch.tensor(boxes), torch.tensor(scores))
except NotImplementedError as error:
    print(error)
"""


def test_operators_agree_with_a_reference_and_others_are_named(part: Part) -> None:
    (part.folder / "operators.py").write_text(OPERATORS)
    lines = part.run("operators.py").stdout.splitlines()
    assert lines[:2] == ["True True", "True True"]
    assert "softnms" in lines[2] and "make mmcv" in lines[2]


# --- training ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(part: Part, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of a few epochs with TensorBoard: its folder and what it printed."""
    work_dir = tmp_path_factory.mktemp("trained")
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 10, "--learning_rate", 4e-3]
    done = part.run("train.py", *args, "--log", "tensorboard")
    return part.run_dir(work_dir), done.stdout


def test_training_finds_nails_and_leaves_what_it_should(trained: tuple[Path, str]) -> None:
    run_dir, printed = trained
    metrics = pd.read_csv(run_dir / "logs" / "metrics.csv")
    assert list(metrics)[:8] == COLUMNS and list(metrics)[8:] == ["bbox_mAP", "segm_mAP"]
    assert metrics["epoch"].tolist() == list(range(1, 11))
    assert metrics["segm_mAP"].max() > 0.03 and metrics["bbox_mAP"].max() > 0.03  # an untrained network has 0.000
    assert metrics["val_iou"].max() > 0.15
    assert np.isfinite(metrics.drop(columns="val_loss")).all().all()
    assert metrics["learning_rate"].max() < 1.01e-3  # a quarter of 4e-3: four photographs a step instead of 16
    assert metrics["learning_rate"].iloc[-1] < 1.1e-5
    assert f"by segm_mAP, {metrics['segm_mAP'].max():.4f}" in printed and "predict.py --weights" in printed
    assert "loading annotations" not in printed
    assert {path.name for path in (run_dir / "weights").iterdir()} == {"best.pth", "last.pth"}
    assert Image.open(run_dir / "training_curves.png").size[0] > 500
    assert Image.open(run_dir / "predictions" / "validation.png").size[0] > 500

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "logs" / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert len(events.Scalars("segm_mAP")) == 10
    assert events.Tags()["images"] == ["truth, prediction"] and len(events.Images("truth, prediction")) == 2


def test_predict_finds_each_nail(trained: tuple[Path, str], part: Part, data_root: Path, tmp_path: Path) -> None:
    weights = trained[0] / "weights" / "best.pth"
    args = ["--weights", weights, "--images", data_root, "--output_dir", tmp_path]
    part.run("predict.py", *args)
    valid = pd.read_csv(data_root / "csv_file" / "valid.csv", dtype={"source": str})
    counts, instances = [], 0
    for row in valid.itertuples():
        name = Path(row.images).relative_to("valid/images").with_suffix("")
        mask = np.array(Image.open(tmp_path / f"{name}_mask.png"))
        numbers = np.array(Image.open(tmp_path / f"{name}_instances.png"))
        assert mask.shape == numbers.shape == (row.height, row.width)
        assert np.array_equal(mask, (numbers > 0) * 255)
        assert Image.open(tmp_path / f"{name}_overlay.png").size == (row.width, row.height)
        crops = list((tmp_path / name.parent / "crops").glob(f"{name.name}_*.png"))
        assert len(crops) >= len(np.unique(numbers)) - 1
        for crop in crops:
            alpha = np.array(Image.open(crop))[..., 3]
            assert set(np.unique(alpha)) <= {0, 255} and alpha[0].any() and alpha[:, -1].any()
        instances += len(crops)
        truth = np.array(Image.open(data_root / row.masks)) > 0
        counts.append(((truth & (mask > 0)).sum(), (truth | (mask > 0)).sum()))
    intersection, union = np.sum(counts, axis=0)
    table = pd.read_csv(tmp_path / "metrics_by_source.csv", index_col="source")
    assert table.loc["all", "iou"] == pytest.approx(intersection / union)
    metrics = pd.read_csv(trained[0] / "logs" / "metrics.csv")
    best = metrics.loc[metrics["segm_mAP"].idxmax()]  # the first of several, whose weights are kept
    # The validation of the training looked at the same photographs, in the same size.
    assert table.loc["all", "segm_mAP"] == pytest.approx(best["segm_mAP"], abs=1e-3)
    assert table.loc["all", "bbox_mAP"] == pytest.approx(best["bbox_mAP"], abs=1e-3)
    assert table.loc["all", "iou"] == pytest.approx(best["val_iou"], abs=1e-3)
    results = json.loads((tmp_path / "coco_results.json").read_text())
    assert sum(one["score"] >= 0.5 for one in results) == instances > 0
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} <= results[0].keys()


def test_killed_and_resumed_ends_like_an_uninterrupted_run(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, *SMALL, "--epochs", 4, "--limit_batches", 4]
    part.run("train.py", *args, "--work_dir", work_dir / "whole", "--workers", 0)
    run_dirs = [part.run_dir(work_dir / "whole")]
    for how, code in [(signal.SIGKILL, -9), (signal.SIGTERM, 130)]:
        run_dirs.append(part.run_dir(work_dir / how.name))
        process = part.start("train.py", *args, "--work_dir", work_dir / how.name)
        wait_for_rows(run_dirs[-1] / "logs" / "metrics.csv", 2, process)
        time.sleep(0.4)  # somewhere in an epoch
        os.killpg(process.pid, how)
        _, err = process.communicate(timeout=300)
        assert process.returncode == code, err
        assert "Traceback" not in err
        if how == signal.SIGTERM:
            assert "--resume" in err
            refused = part.run("train.py", *args, "--work_dir", work_dir / how.name, code=2)  # nothing is overwritten
            assert "--resume" in refused.stderr
        part.run("train.py", *args, "--work_dir", work_dir / how.name, "--resume")
    for run_dir in run_dirs[1:]:
        metrics = [pd.read_csv(folder / "logs" / "metrics.csv") for folder in (run_dirs[0], run_dir)]
        pd.testing.assert_frame_equal(*[table.drop(columns=COLUMNS[6:]) for table in metrics])
    (part.folder / "same.py").write_text(SAME)
    for line in part.run("same.py", *[run_dir / "weights" / "last.pth" for run_dir in run_dirs]).stdout.splitlines():
        number, different = line.split(" ", 1)
        assert int(number) > 500 and different == "[]"  # weights and optimizer: to the last bit


def test_two_processes_give_the_metrics_of_one(
    trained: tuple[Path, str], part: Part, data_root: Path, work_dir: Path
) -> None:
    """They go on from trained weights, with a rate that changes nothing, so only the validation is compared."""
    args = ["--data_root", data_root, *SMALL, "--epochs", 1, "--limit_batches", 3, "--learning_rate", 1e-30]
    args[args.index("none")] = trained[0] / "weights" / "best.pth"
    for name, devices in [("one", ["cpu"]), ("two", ["cpu", "cpu"])]:
        done = part.run("train.py", *args, "--work_dir", work_dir / name, "--device", *devices)
        assert done.stdout.count("best ") == 1
    one, two = [pd.read_csv(part.run_dir(work_dir / name) / "logs" / "metrics.csv").iloc[0] for name in ("one", "two")]
    assert one["segm_mAP"] > 0.02
    for name in ["val_iou", "val_f1", "bbox_mAP", "segm_mAP"]:
        assert two[name] == pytest.approx(one[name], abs=0.02)  # BatchNorm's averages do move
    # What two processes left, one can go on from.
    args[args.index("--epochs") + 1] = 2
    part.run("train.py", *args, "--work_dir", work_dir / "two", "--resume")
    assert len(pd.read_csv(part.run_dir(work_dir / "two") / "logs" / "metrics.csv")) == 2
    # What is wrong is told once, by whoever finds it.
    wrong = part.run("train.py", *args, "--work_dir", work_dir / "three", "--device", "cpu", "cpu", "cpu", code=2)
    assert wrong.stderr.count("cannot be shared equally") >= 1


READ_WRONG = """
import contextlib, json, sys
from pathlib import Path
import ops
from dataloader import read_annotations

root = Path(sys.argv[1])
content = json.loads((root / "annotations" / "train.json").read_text())
for changed, _ in json.loads(Path(sys.argv[2]).read_text()):
    (root / "annotations" / "train.json").write_text(json.dumps(content | changed))
    with contextlib.suppress(SystemExit):
        read_annotations(root, "train")
"""


def test_own_annotations_of_several_classes(part: Part, data_root: Path, work_dir: Path, tmp_path: Path) -> None:
    root = tmp_path / "own"
    shutil.copytree(data_root / "valid" / "images", root / "photographs")
    content = json.loads((data_root / "annotations" / "valid.json").read_text())
    content["categories"] = [{"id": 4, "name": "left nail"}, {"id": 9, "name": "right nail"}]
    widths = {image["id"]: image["width"] for image in content["images"]}
    for image in content["images"]:
        image["file_name"] = image["file_name"].replace("valid/images", "photographs")
    for one in content["annotations"]:
        one["category_id"] = 4 if one["bbox"][0] < widths[one["image_id"]] / 2 else 9
    (root / "annotations").mkdir()
    for side in ["train", "valid"]:
        (root / "annotations" / f"{side}.json").write_text(json.dumps(content))
    args = ["--data_root", root, *SMALL, "--epochs", 1]
    part.run("train.py", *args, "--work_dir", work_dir)
    weights = part.run_dir(work_dir) / "weights" / "best.pth"
    part.run("predict.py", "--weights", weights, "--images", root / "photographs", "--output_dir", tmp_path / "found")
    results = json.loads((tmp_path / "found" / "coco_results.json").read_text())
    assert {one["category_id"] for one in results} <= {4, 9}
    # What is wrong with such a file is told with its name.
    wrong = [
        [{"images": [{"id": 1, "file_name": "gone.png", "width": 9, "height": 9}]}, "gone.png"],
        [{"images": [{"id": 1, "file_name": "../../etc/passwd", "width": 9, "height": 9}]}, "leads outside"],
        [{"annotations": []}, "no annotations"],
        [{"categories": None}, "no COCO file"],
        [{"annotations": [{"id": 7, "image_id": 1}]}, "id 7: area"],
        [{"images": content["images"][:1] * 2}, "an id occurs twice"],
    ]
    (part.folder / "read_wrong.py").write_text(READ_WRONG)
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    told = part.run("read_wrong.py", root, tmp_path / "wrong.json").stderr.splitlines()
    assert len(told) == len(wrong)
    for line, (_, said) in zip(told, wrong, strict=True):
        assert said in line and "train.json" in line
    done = part.run("train.py", *args, "--work_dir", work_dir / "wrong", code=2)
    assert "train.json: among its images, an id occurs twice" in done.stderr


def test_what_cfg_options_changed_is_known_to_predict_and_resume(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 2, "--limit_batches", 2]
    options = ["--cfg_options", "model.roi_head.mask_head.num_convs=1"]
    part.run("train.py", *args, *options)
    weights = part.run_dir(work_dir) / "weights" / "best.pth"
    part.run("predict.py", "--weights", weights, "--images", data_root)
    assert "num_convs" in part.run("train.py", *args, "--resume", code=2).stderr
    # The weights of a ResNet-18 are none of a ResNet-34, and MMEngine alone would be silent about it.
    args[args.index("none")], args[args.index("resnet18")], args[3] = weights, "resnet34", work_dir / "other"
    assert "not of this network" in part.run("train.py", *args, code=2).stderr


def test_a_photograph_that_became_corrupt_is_named(part: Part, data_root: Path, work_dir: Path) -> None:
    broken = next((data_root / "train" / "images").rglob("*.png"))
    content = broken.read_bytes()
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 1]
    broken.write_bytes(content[: len(content) // 20])
    try:
        done = part.run("train.py", *args, code=1)
    finally:
        broken.write_bytes(content)
    assert f"error: {broken}: " in done.stderr and "--resume" in done.stderr


FETCHED = """
import sys
import ops
import torch
from model import fetch
hub = sys.argv[1]
name = "mask_rcnn_r50_fpn_2x_coco_bbox_mAP-0.392__segm_mAP-0.354_20200505_003907-3e542a40.pth"
print(fetch(f"file://{hub}/{name}", "coco"))
"""


def test_checksums_of_mmdetections_weights_are_found(part: Part, work_dir: Path) -> None:
    """Their names have a - before the one that the checksum follows, where torch looks for it."""
    work_dir.mkdir(parents=True)
    (part.folder / "fetched.py").write_text(FETCHED)
    name = "mask_rcnn_r50_fpn_2x_coco_bbox_mAP-0.392__segm_mAP-0.354_20200505_003907-3e542a40.pth"
    (work_dir / name).write_bytes(b"not what it was")
    done = part.run("fetched.py", work_dir, code=2, TORCH_HOME=str(work_dir))
    assert "3e542a40" in done.stderr and "damaged" in done.stderr


def test_rtmdet_trains_too(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 1, "--limit_batches", 2]
    args[args.index("configs/nail_mask_rcnn_small.py")] = "configs/nail_rtmdet_ins.py"
    part.run("train.py", *args)
    weights = part.run_dir(work_dir) / "weights" / "best.pth"
    part.run("predict.py", "--weights", weights, "--images", data_root)


def test_a_loss_that_is_not_finite_ends_the_run(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 2, "--learning_rate", 1e30]
    done = part.run("train.py", *args, code=1)
    assert "nan or infinite" in done.stderr and "--learning_rate" in done.stderr


def test_early_stopping_looks_at_segm_map(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 9, "--limit_batches", 1]
    done = part.run("train.py", *args, "--learning_rate", 1e-30, "--early_stopping", 2)
    assert "no better segm mAP in 2 epochs" in done.stdout
    assert len(pd.read_csv(part.run_dir(work_dir) / "logs" / "metrics.csv")) == 3  # the first was the best


def test_without_network_the_ways_out_are_named(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, "--batch_size", 4]
    nowhere = {"TORCH_HOME": str(work_dir), "https_proxy": "http://127.0.0.1:9"}
    for weights in ["imagenet", "coco"]:
        done = part.run("train.py", *args, "--encoder_weights", weights, code=2, **nowhere)
        for way in ["--encoder_weights none", "--encoder_weights FILE", str(work_dir)]:
            assert way in done.stderr
    assert not any(part.run_dir(work_dir).glob("weights/*"))  # nothing was trained


EVIL = """
import json, os, sys
import torch

class Evil:
    def __reduce__(self):
        return os.system, (f"touch '{sys.argv[2]}'",)

checkpoint = torch.load(sys.argv[1], weights_only=True)
torch.save(checkpoint | {"extra": Evil()}, "pickled.pth")
network = json.loads(checkpoint["meta"]["network"])
network["model"]["neck"] = {"type": "os.system", "command": f"touch '{sys.argv[2]}'"}
checkpoint["meta"]["network"] = json.dumps(network)
torch.save(checkpoint, "imports.pth")
"""


def test_nothing_in_a_checkpoint_is_executed(
    trained: tuple[Path, str], part: Part, data_root: Path, work_dir: Path
) -> None:
    (part.folder / "evil.py").write_text(EVIL)
    executed = work_dir / "executed"
    work_dir.mkdir(parents=True)
    part.run("evil.py", trained[0] / "weights" / "best.pth", executed)
    for name in ["pickled.pth", "imports.pth"]:
        done = part.run("predict.py", "--weights", name, "--images", data_root, code=2)
        assert name in done.stderr
        assert not executed.exists()
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 1]
    args[args.index("none")] = "pickled.pth"
    assert "pickled.pth" in part.run("train.py", *args, code=2).stderr
    assert not executed.exists()
