"""Part 7, from a copied folder: training, resuming, processes, prediction, strangers' files."""

import json
import os
import re
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

from bad_data_tests import *  # noqa: F403 - all of its tests, for the part that `part` is
from conftest import ROOT, Part, wait_for_rows
from conftest import SMALL_MASK_RCNN as SMALL
from lightning_tests import (
    SAME,
    test_torchrun_starts_again_from_the_last_checkpoint,  # noqa: F401 - for the part that `part` is
    test_when_one_process_is_killed_the_other_ends,  # noqa: F401
)
from reliability_tests import *  # noqa: F403 - and these


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
    config = (run_dir / "logs" / "mmengine" / "nail_mask_rcnn_small.py").read_text()
    # No list in it is as long as there are photographs: MMEngine formats it whole with each checkpoint.
    assert max(numbers.count(",") for numbers in re.findall(r"\[[\d,\s]+\]", config)) < 10
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
    # What is wrong with such a file is told with its name; test_annotations.py has more of it.
    (root / "annotations" / "train.json").write_text(json.dumps(content | {"images": content["images"] * 2}))
    done = part.run("train.py", *args, "--work_dir", work_dir / "wrong", code=2)
    assert "train.json: among its images, an id occurs twice" in done.stderr


def test_what_cfg_options_changed_is_known_to_predict_and_resume(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 2, "--limit_batches", 2]
    options = ["--cfg_options", "model.roi_head.mask_head.num_convs=1"]
    part.run("train.py", *args, *options)
    weights = part.run_dir(work_dir) / "weights" / "best.pth"
    part.run("predict.py", "--weights", weights, "--images", data_root, warm=False)
    assert "num_convs" in part.run("train.py", *args, "--resume", code=2).stderr
    for wrong in ["model.roi_head.mask_head.num_convz=1", "model.type=Other", "optim_wrapper.optimizer.decay=1"]:
        done = part.run("train.py", *args, "--work_dir", work_dir / "wrong", "--cfg_options", wrong, code=2)
        assert "--cfg_options: " in done.stderr
    own = work_dir / "own.py"
    own.write_text(f"_base_ = {[str(part.folder / SMALL[1])]!r}\nmodel = dict(type='Other')")
    for config in [own, work_dir / "nowhere.py"]:
        done = part.run("train.py", *args, "--work_dir", work_dir / "wrong", "--config", config, code=2)
        assert "--config" in done.stderr and config.name in done.stderr
    # The weights of a ResNet-18 are none of a ResNet-34, and MMEngine alone would be silent about it.
    args[args.index("none")], args[args.index("resnet18")], args[3] = weights, "resnet34", work_dir / "other"
    assert "not of this network" in part.run("train.py", *args, code=2).stderr


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


SCHEDULE = """
import ops
import torch
from mmengine.optim import CosineAnnealingLR, LinearLR
from train import schedule

for total in [*range(1, 41), 600]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    kinds = {"LinearLR": LinearLR, "CosineAnnealingLR": CosineAnnealingLR}
    schedulers = [kinds[its.pop("type")](optimizer, **its) for its in schedule(total)]
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert max(rates) > 0.99, (total, rates)
    middle = total // 2
    assert rates[middle:] == sorted(rates[middle:], reverse=True), (total, rates)
    if total >= 20:
        assert rates[0] < 0.02 and rates[middle] > 0.99 and rates[-1] < 0.1, (total, rates)
print("fine")
"""


def test_the_learning_rate_rises_however_short_a_run_is(part: Part) -> None:
    (part.folder / "rates.py").write_text(SCHEDULE)
    assert part.run("rates.py").stdout.splitlines()[-1] == "fine"


def test_a_loss_that_is_not_finite_ends_the_run(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 2, "--learning_rate", 1e30]
    done = part.run("train.py", *args, code=1)
    assert "nan or infinite" in done.stderr and "--learning_rate" in done.stderr


def test_without_network_the_ways_out_are_named(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, "--batch_size", 4]
    nowhere = {"TORCH_HOME": str(work_dir), "https_proxy": "http://127.0.0.1:9", "NO_ALBUMENTATIONS_UPDATE": ""}
    for weights in ["imagenet", "coco"]:
        done = part.run("train.py", *args, "--encoder_weights", weights, code=2, **nowhere)
        for way in ["--encoder_weights none", "--encoder_weights FILE", str(work_dir)]:
            assert way in done.stderr
        assert "albumentations" not in done.stderr  # else it has asked the network for its newest version
    no_account = {"HOME": str(work_dir), "WANDB_MODE": "online", "https_proxy": "http://127.0.0.1:9"}
    done = part.run(
        "train.py", "--data_root", data_root, "--work_dir", work_dir, *SMALL, "--log", "wandb", code=2, **no_account
    )
    assert "--log wandb: " in done.stderr and "WANDB_MODE=offline" in done.stderr
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
