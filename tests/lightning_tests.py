"""What parts 3 to 6 all go through: training, checkpoints, resuming, processes, prediction, classes.

They train with the same code, on data that comes another way or with another network. test_lightning.py imports all of
these tests, and those of the later parts what their lesson touches; each has a fixture `part`.
"""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_tensorflow import COLUMNS

from conftest import Part, stop_group, wait_for_rows


@pytest.fixture(scope="module")
def trained(part: Part, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of a few epochs with TensorBoard: its folder and what it printed."""
    work_dir = tmp_path_factory.mktemp("trained")
    args = ["--data_root", data_root, "--work_dir", work_dir, *part.small, "--loss", "dice_bce"]
    args += [] if part.name == "part5_dali" else ["--cache", "memory"]
    done = part.run("train.py", *args, "--learning_rate", part.learning_rate, "--epochs", 21, "--log", "tensorboard")
    return part.run_dir(work_dir), done.stdout


def test_training_finds_nails_and_leaves_what_it_should(trained: tuple[Path, str], part: Part) -> None:
    run_dir, printed = trained
    metrics = pd.read_csv(run_dir / "logs" / "metrics.csv")
    assert list(metrics)[:8] == COLUMNS
    assert metrics["epoch"].tolist() == list(range(1, 22))
    assert metrics["val_iou"].max() > (0.12 if part.name == "part6_segformer" else 0.3)  # all foreground has 0.05
    assert np.isfinite(metrics).all().all()
    assert metrics["learning_rate"].iloc[-1] == pytest.approx(part.learning_rate / 100, rel=1e-3)  # at the last step
    assert metrics["learning_rate"].iloc[9] > part.learning_rate / 3  # it falls with the steps, not with the epochs
    assert np.allclose(metrics["val_f1"], 2 * metrics["val_iou"] / (1 + metrics["val_iou"]))
    assert f"{metrics['val_iou'].max():.4f}" in printed
    assert "predict.py --weights" in printed
    config = json.loads((run_dir / "config.json").read_text())
    assert config["encoder"] and config["versions"]["torch"]
    assert Image.open(run_dir / "training_curves.png").size[0] > 500
    assert {path.name for path in (run_dir / "weights").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_tensorboard_has_curves_and_pictures(trained: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0] / "logs" / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert {"val_iou", "train_loss", "learning_rate"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("val_iou")) == 21
    assert len(events.Images("photograph, truth, prediction")) == 5  # epochs 5, 10, 15, 20 and the last


def masks_below(folder: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(folder)): np.array(Image.open(path)) for path in folder.rglob("*_mask.png")}


def test_predict_and_export(trained: tuple[Path, str], part: Part, data_root: Path, tmp_path: Path) -> None:
    weights = trained[0] / "weights" / "best.ckpt"
    torch_args = ["--weights", weights, "--images", data_root, "--output_dir", tmp_path / "torch"]
    part.run("predict.py", *torch_args, warm=False)  # it has to import what it needs by itself
    valid = pd.read_csv(data_root / "csv_file" / "valid.csv", dtype={"source": str})
    counts = []
    for row in valid.itertuples():
        name = Path(row.images).relative_to("valid/images").with_suffix("")
        mask = np.array(Image.open(tmp_path / "torch" / f"{name}_mask.png"))
        assert mask.shape == (row.height, row.width) and set(np.unique(mask)) <= {0, 255}
        assert Image.open(tmp_path / "torch" / f"{name}_overlay.png").size == (row.width, row.height)
        truth = np.array(Image.open(data_root / row.masks)) > 0
        counts.append(((truth & (mask > 0)).sum(), (truth | (mask > 0)).sum()))
    intersection, union = np.sum(counts, axis=0)
    by_source = pd.read_csv(tmp_path / "torch" / "metrics_by_source.csv", index_col="source")
    assert by_source.loc["all", "iou"] == pytest.approx(intersection / union)
    assert set(by_source.index) == {*valid["source"], "all"}
    # Nearly that of the training's end, which measures at the network's size instead of the photograph's.
    trained_iou = pd.read_csv(trained[0] / "logs" / "metrics.csv")["val_iou"].max()
    assert by_source.loc["all", "iou"] == pytest.approx(trained_iou, abs=0.1)

    # ONNX predicts the same, without torch.
    exported = part.run("export.py", "--weights", weights, "--output", tmp_path / "nails.onnx")
    assert float(exported.stdout.split()[-1]) < 1e-4
    without_torch = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('predict.py', run_name='__main__')"
    args = ["--weights", tmp_path / "nails.onnx", "--images", data_root, "--output_dir", tmp_path / "onnx"]
    part.run("-c", without_torch, *args)
    masks, onnx_masks = masks_below(tmp_path / "torch"), masks_below(tmp_path / "onnx")
    assert masks.keys() == onnx_masks.keys() and len(masks) == len(valid)
    assert max((masks[name] != onnx_masks[name]).mean() for name in masks) < 1e-3  # a pixel of exactly 0.5 may flip
    # Looked at four ways, or in tiles, nails stay nails.
    part.run("predict.py", *args[:-1], tmp_path / "tta", "--tta")
    tta = pd.read_csv(tmp_path / "tta" / "metrics_by_source.csv", index_col="source")
    assert tta.loc["all", "iou"] == pytest.approx(by_source.loc["all", "iou"], abs=0.1)


SAME = """
import sys
import torch

def leaves(value, name=""):
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name}/{key}")
    else:
        yield name, value

first, *others = [dict(leaves(torch.load(file, weights_only=True))) for file in sys.argv[1:]]
for other in others:
    assert first.keys() == other.keys()
    different = [k for k, v in first.items() if not (torch.equal(v, other[k]) if torch.is_tensor(v) else v == other[k])]
    print(len(first), different)
"""


def test_killed_or_interrupted_and_resumed_ends_like_an_uninterrupted_run(
    part: Part, data_root: Path, work_dir: Path
) -> None:
    args = ["--data_root", data_root, *part.small, "--epochs", 4, "--limit_batches", 6]
    args += ["--encoder", part.with_dropout]  # its random numbers have to go on as well
    args += ["--ema", 0.9, "--accumulate_grad_batches", 2]
    whole = part.run_dir(work_dir / "whole")
    part.run("train.py", *args, "--work_dir", work_dir / "whole")
    lasts = [whole / "weights" / "last.ckpt"]
    # A killed run begins an epoch anew, whatever the part; an interrupted one goes on in its middle.
    in_part3 = [(signal.SIGKILL, -9), (signal.SIGTERM, 130)]
    for how, code in in_part3 if part.name == "part3_lightning" else [(signal.SIGINT, 130)]:
        run_dir = part.run_dir(work_dir / how.name)
        process = part.start("train.py", *args, "--work_dir", work_dir / how.name)
        wait_for_rows(run_dir / "logs" / "metrics.csv", 2, process)
        time.sleep(0.4)  # somewhere in an epoch
        if how == signal.SIGKILL:
            process.send_signal(how)
        else:
            os.killpg(process.pid, how)  # Ctrl-C and a scheduler's SIGTERM reach the processes that load, too
        _, err = process.communicate(timeout=300)
        assert process.returncode == code, err
        if how != signal.SIGKILL:
            assert "error: interrupted" in err and "--resume" in err and "Traceback" not in err
            refused = part.run("train.py", *args, "--work_dir", work_dir / how.name, code=2)  # nothing is overwritten
            assert "--resume" in refused.stderr
            other = [*args, "--work_dir", work_dir / how.name, "--resume", "--encoder", part.larger]
            assert f"--encoder {part.with_dropout}" in part.run("train.py", *other, code=2).stderr
        part.run("train.py", *args, "--work_dir", work_dir / how.name, "--resume")
        metrics = [pd.read_csv(folder / "logs" / "metrics.csv")[COLUMNS[:6]] for folder in (whole, run_dir)]
        pd.testing.assert_frame_equal(*metrics, rtol=1e-6)
        lasts.append(run_dir / "weights" / "last.ckpt")
    (part.folder / "same.py").write_text(SAME)
    for line in part.run("same.py", *lasts).stdout.splitlines():
        number, different = line.split(" ", 1)
        assert int(number) > 1000 and different == "[]"  # weights, optimizer, averages: to the last bit


EVALUATE = """
import os
import train
args = train.parse_args()
args.mixed_precision = "fp32"
paths = train.load_data_path(args.data_root, "valid.csv")[:11]
data = train.NailDataModule(args, paths, paths)
trainer = train.create_trainer(args, args.work_dir, [])
metrics = trainer.validate(train.SegmentationModel.load_from_checkpoint(os.environ["WEIGHTS"]), data, verbose=False)[0]
if trainer.is_global_zero:
    print(metrics["val_iou"], metrics["val_f1"])
"""


def test_two_processes_give_the_metrics_of_one(
    part: Part, trained: tuple[Path, str], data_root: Path, work_dir: Path
) -> None:
    (part.folder / "evaluate.py").write_text(EVALUATE)
    weights = str(trained[0] / "weights" / "best.ckpt")
    args = ["--data_root", data_root, "--work_dir", work_dir, *part.small, "--workers", 0, "--device"]
    runs = [["evaluate.py", *args, "cpu"], ["evaluate.py", *args, "cpu", "cpu"]]
    if part.name == "part3_lightning":  # once is enough: each process takes a while to start
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
        runs.append([*torchrun, *runs[1]])
    one, *two = [[float(word) for word in part.run(*run, WEIGHTS=weights).stdout.split()[-2:]] for run in runs]
    assert one[0] > 0.1
    for metrics in two:
        assert metrics == pytest.approx(one, abs=1e-6)


def test_two_processes_train(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *part.small, "--epochs", 2, "--limit_batches", 2]
    args += ["--encoder", part.with_dropout]  # efficientnet also has layers that a U-Net does not use
    done = part.run("train.py", *args, "--device", "cpu", "cpu")
    assert done.stdout.count("best ") == 1 and "cpu cpu" in done.stdout
    assert len(pd.read_csv(part.run_dir(work_dir) / "logs" / "metrics.csv")) == 2
    # What two processes left, one can go on from.
    args[args.index("--epochs") + 1] = 3
    part.run("train.py", *args, "--resume")
    assert len(pd.read_csv(part.run_dir(work_dir) / "logs" / "metrics.csv")) == 3


def children_of(pid: int) -> list[int]:
    """The numbers of the processes that a process has started, and that run train.py."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            is_child = int(stat.read_text().rpartition(")")[2].split()[1]) == pid
            if is_child and b"train.py" in stat.with_name("cmdline").read_bytes():
                found.append(int(stat.parent.name))
    return sorted(found)


def test_when_one_process_is_killed_the_other_ends(part: Part, small_root: Path, work_dir: Path) -> None:
    args = ["--data_root", small_root, *part.small, "--batch_size", 4, "--workers", 0, "--epochs", 500]
    for who in ["the first", "the other"]:
        more = ["--work_dir", work_dir / who, "--device", "cpu", "cpu"]
        process = part.start("train.py", *args, *more, warm=False)
        wait_for_rows(part.run_dir(work_dir / who) / "logs" / "metrics.csv", 1, process)
        others = children_of(process.pid)
        os.kill(process.pid if who == "the first" else others[-1], signal.SIGKILL)
        _, err = process.communicate(timeout=60)  # the pipe is closed when both have ended
        # The other may be waiting for the first one, and be killed by Lightning's watcher, which looks every 5 seconds.
        assert process.returncode in ([-9] if who == "the first" else [1, -9])
        assert "Traceback" not in err
        assert "--resume" in err.split("error: ")[-1]
        stop_group(process.pid)


def test_torchrun_starts_again_from_the_last_checkpoint(part: Part, small_root: Path, work_dir: Path) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1, "train.py"]
    args = ["--data_root", small_root, "--work_dir", work_dir, *part.small, "--batch_size", 4, "--workers", 0]
    process = part.start("-m", *torchrun, *args, "--device", "cpu", "cpu", "--epochs", 6)
    metrics_csv = part.run_dir(work_dir) / "logs" / "metrics.csv"
    wait_for_rows(metrics_csv, 2, process)
    seconds = pd.read_csv(metrics_csv)["seconds"][0]
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    metrics = pd.read_csv(metrics_csv)
    assert metrics["epoch"].tolist() == list(range(1, 7))
    assert metrics["seconds"][0] == seconds  # the first epoch was not done again
    assert out.count("best ") == 1


def test_a_file_that_became_corrupt_is_named_and_the_run_goes_on(part: Part, data_root: Path, work_dir: Path) -> None:
    train = pd.read_csv(data_root / "csv_file" / "train.csv")
    last_batch = np.random.default_rng([42, 0]).permutation(len(train))[40]  # as the sampler shuffles the first epoch
    broken = data_root / train["images"][last_batch]
    content = broken.read_bytes()
    args = ["--data_root", data_root, *part.small, "--epochs", 1]
    broken.write_bytes(content[: len(content) // 2])
    try:
        done = part.run("train.py", *args, "--work_dir", work_dir / "broken", code=1)
    finally:
        broken.write_bytes(content)
    assert f"error: {broken}: " in done.stderr and "--resume" in done.stderr
    part.run("train.py", *args, "--work_dir", work_dir / "broken", "--resume")
    part.run("train.py", *args, "--work_dir", work_dir / "whole")
    files = [part.run_dir(work_dir / name) / "logs" / "metrics.csv" for name in ("broken", "whole")]
    pd.testing.assert_frame_equal(*[pd.read_csv(file)[COLUMNS[:6]] for file in files], rtol=1e-6)


def test_several_classes(part: Part, data_root: Path, work_dir: Path, tmp_path: Path) -> None:
    """Nails to the left of a photograph's middle are label 1, those to the right label 2."""
    raw = tmp_path / "labels"
    for path in sorted((data_root / "train" / "images").rglob("*.png"))[:32]:
        mask = np.array(Image.open(str(path).replace("images", "masks")))
        labels = (mask > 0) * np.where(np.arange(mask.shape[1]) < mask.shape[1] // 2, 1, 2)
        for folder, source in [("images", Image.open(path)), ("masks", Image.fromarray(labels.astype(np.uint8)))]:
            (raw / folder).mkdir(parents=True, exist_ok=True)
            source.save(raw / folder / path.name)
    prepared = tmp_path / "prepared"
    part.run("data_preparation.py", "--data_root", prepared, "--raw", raw, "--classes", 3)
    args = ["--data_root", prepared, *part.small, "--loss", "cross_entropy", "--epochs", 2]
    part.run("train.py", *args, "--classes", 3, "--work_dir", work_dir)
    run_dir = part.run_dir(work_dir)
    metrics = pd.read_csv(run_dir / "logs" / "metrics.csv")
    assert np.allclose(metrics["val_iou"], (metrics["val_iou/1"] + metrics["val_iou/2"]) / 2)
    part.run("predict.py", "--weights", run_dir / "weights" / "best.ckpt", "--images", prepared)
    masks = masks_below(run_dir / "predictions")
    assert masks and all(set(np.unique(mask)) <= {0, 1, 2} for mask in masks.values())
    assert {"iou/1", "iou/2"} <= set(pd.read_csv(run_dir / "predictions" / "metrics_by_source.csv"))
    # Labels that the network has no output for are told, with the file; and so is the other way round.
    few = part.run("train.py", *args, "--classes", 2, "--work_dir", work_dir / "few", code=1)
    assert "--classes 2" in few.stderr and ".png" in few.stderr
    binary = part.run("train.py", *args, "--work_dir", work_dir / "binary", code=1)
    assert "--classes 1" in binary.stderr
