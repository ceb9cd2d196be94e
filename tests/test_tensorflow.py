"""Part 1, from a copied folder: training, logs, checkpoints, resuming, devices, prediction."""

import json
import signal
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bad_data_tests import *  # noqa: F403 - all of its tests, for the part that `part` is
from conftest import SMALL, Part, wait_for_rows
from reliability_tests import *  # noqa: F403 - and these

COLUMNS = ["epoch", "train_loss", "val_loss", "val_iou", "val_f1", "learning_rate", "seconds", "images_per_second"]


@pytest.fixture(scope="module")
def part(part1: Part) -> Part:
    return part1


@pytest.fixture(scope="module")
def trained(part1: Part, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of a few epochs with TensorBoard: its folder and what it printed."""
    work_dir = tmp_path_factory.mktemp("trained")
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--optimizer", "adamw"]
    done = part1.run("train.py", *args, "--learning_rate", 3e-3, "--epochs", 21, "--log", "tensorboard")
    return work_dir / "tensorflow", done.stdout


def test_training_finds_nails_and_leaves_what_it_should(trained: tuple[Path, str]) -> None:
    run_dir, printed = trained
    metrics = pd.read_csv(run_dir / "logs" / "metrics.csv")
    assert list(metrics)[:8] == COLUMNS
    assert metrics["epoch"].tolist() == list(range(1, 22))
    assert metrics["val_iou"].max() > 0.3  # a guess of all foreground has 0.05
    assert np.isfinite(metrics).all().all()
    assert metrics["learning_rate"].iloc[-1] == pytest.approx(3e-5, rel=1e-3)  # a hundredth, reached at the last step
    f1 = 2 * metrics["val_iou"] / (1 + metrics["val_iou"])
    assert np.allclose(metrics["val_f1"], f1)  # one follows from the other if they count the same pixels
    assert f"{metrics['val_iou'].max():.4f}" in printed
    assert "predict.py --weights" in printed
    config = json.loads((run_dir / "config.json").read_text())
    assert config["image_size"] == 64 and config["versions"]["tensorflow"]
    assert Image.open(run_dir / "training_curves.png").size[0] > 500
    assert {"best.h5", "checkpoint"} <= {path.name for path in (run_dir / "weights").iterdir()}


def test_tensorboard_has_curves_and_pictures(trained: tuple[Path, str], part1: Part) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0] / "logs" / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    assert {"val_iou", "train_loss", "learning_rate"} <= set(events.Tags()["tensors"])
    grids = events.Tensors("photograph, truth, prediction")
    assert [grid.step for grid in grids] == [5, 10, 15, 20, 21]


def test_predict_writes_masks_of_the_original_size_and_true_metrics(
    trained: tuple[Path, str], part1: Part, data_root: Path, tmp_path: Path
) -> None:
    done = part1.run(
        "predict.py",
        "--weights",
        trained[0] / "weights" / "best.h5",
        "--images",
        data_root,
        "--output_dir",
        tmp_path,
        warm=False,  # predict.py has to import what it needs by itself
    )
    valid = pd.read_csv(data_root / "csv_file" / "valid.csv", dtype={"source": str})
    counts = []
    for row in valid.itertuples():
        name = Path(row.images).relative_to("valid/images").with_suffix("")
        mask = np.array(Image.open(tmp_path / f"{name}_mask.png"))
        overlay = np.array(Image.open(tmp_path / f"{name}_overlay.png"))
        assert mask.shape == (row.height, row.width) and overlay.shape == (row.height, row.width, 3)
        assert set(np.unique(mask)) <= {0, 255}
        truth = np.array(Image.open(data_root / row.masks)) > 0
        counts.append(((truth & (mask > 0)).sum(), (truth | (mask > 0)).sum()))
    intersection, union = np.sum(counts, axis=0)
    by_source = pd.read_csv(tmp_path / "metrics_by_source.csv", index_col="source")
    assert by_source.loc["all", "iou"] == pytest.approx(intersection / union)
    assert set(by_source.index) == {*valid["source"], "all"}
    assert f"{by_source.loc['all', 'iou']:.4f}" in done.stdout
    # Nearly that of the training's end, which measures at the network's size instead of the photograph's.
    trained_iou = pd.read_csv(trained[0] / "logs" / "metrics.csv")["val_iou"].max()
    assert by_source.loc["all", "iou"] == pytest.approx(trained_iou, abs=0.1)


def test_killed_and_resumed_ends_like_an_uninterrupted_run(part1: Part, data_root: Path, work_dir: Path) -> None:
    # efficientnet has dropout, whose random numbers have to go on as well
    args = ["--data_root", data_root, *SMALL, "--encoder", "efficientnetb0", "--epochs", 4, "--limit_batches", 3]
    part1.run("train.py", *args, "--work_dir", work_dir / "whole")
    killed = part1.start("train.py", *args, "--work_dir", work_dir / "killed")
    csv_file = work_dir / "killed" / "tensorflow" / "logs" / "metrics.csv"
    wait_for_rows(csv_file, 2, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    part1.run("train.py", *args, "--work_dir", work_dir / "killed", "--resume")
    whole = pd.read_csv(work_dir / "whole" / "tensorflow" / "logs" / "metrics.csv")
    resumed = pd.read_csv(csv_file)
    compared = COLUMNS[:6]
    pd.testing.assert_frame_equal(whole[compared], resumed[compared], rtol=1e-6)


def test_interrupted_says_how_to_go_on(part1: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, *SMALL, "--work_dir", work_dir, "--epochs", 50]
    process = part1.start("train.py", *args)
    wait_for_rows(work_dir / "tensorflow" / "logs" / "metrics.csv", 1, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in err and "Traceback" not in err
    # and a new run does not overwrite what is there
    refused = part1.run("train.py", *args, code=2)
    assert "--resume" in refused.stderr
    other = part1.run("train.py", *args, "--encoder", "mobilenetv2", "--resume", code=2)
    assert "--encoder resnet18" in other.stderr


ONEDNN = """
from keras2 import tf
from tensorflow.python.util import _pywrap_util_port
print(_pywrap_util_port.IsMklEnabled())
"""


def test_convolutions_are_fast_on_older_cpus(part1: Part) -> None:
    assert part1.run("-c", ONEDNN).stdout.splitlines()[-1] == "True"  # on newer ones it is, whatever keras2.py does


HOW_OFTEN_RECORDED = """
import numpy as np
import train
from keras2 import build_optimizer, tf
from model import create_optimizer
def build_and_keep(model):
    build_optimizer(model)
    models.append(model)
models, train.build_optimizer = [], build_and_keep
train.main()
for policy in ["float32", "mixed_float16"]:
    tf.keras.mixed_precision.set_global_policy(policy)
    for name in ["radam", "adamw"]:
        model = tf.keras.Sequential([tf.keras.layers.Dense(1)])
        model.build((None, 1))
        model.compile(create_optimizer(name, 1e-3), "mse")
        build_and_keep(model)
        model.train_on_batch(np.zeros((1, 1)), np.zeros((1, 1)))
print(*[model.train_tf_function.experimental_get_tracing_count() for model in models])
"""


def test_a_step_is_recorded_once(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--image_size", 32]
    done = part.run("-c", HOW_OFTEN_RECORDED, *args, "--epochs", 1, "--limit_batches", 1)
    assert done.stdout.splitlines()[-1] == "1 1 1 1 1"  # train.py, and both optimizers in both precisions


def test_goes_on_in_another_precision(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--image_size", 32, "--limit_batches", 1]
    part.run("train.py", *args, "--epochs", 1, "--mixed_precision", "fp16")
    done = part.run("train.py", *args, "--epochs", 2, "--mixed_precision", "False", "--resume")
    over = part.run("train.py", *args, "--epochs", 2, "--mixed_precision", "fp16", "--resume")
    assert "all 2 epochs are done" in over.stdout
    assert "unrestored" not in done.stderr + over.stderr  # a warning of TensorFlow, of what finds no place
    assert len(pd.read_csv(work_dir / "tensorflow" / "logs" / "metrics.csv")) == 2


def test_wandb_offline_and_bf16_and_cache_and_adamw(part1: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--log", "wandb", "--mixed_precision", "True", "--cache", "disk", "--optimizer", "adamw"]
    keys = {"WANDB_API_KEY": "5ecre7" * 6 + "5ecr", "KAGGLE_KEY": "kagg1e" * 5}
    args += ["--epochs", 2]
    done = part1.run("train.py", "--data_root", data_root, "--work_dir", work_dir, *SMALL, *args, **keys)
    assert "bf16" in done.stdout
    assert "AutoGraph" not in done.stdout + done.stderr  # it warns of functions that it cannot read
    run_dir = work_dir / "tensorflow"
    written = [path.read_bytes() for path in run_dir.rglob("*") if path.is_file()]
    for key in keys.values():  # a key is told to nobody
        assert not any(key.encode() in content for content in [done.stdout.encode(), done.stderr.encode(), *written])
    assert list((run_dir / "logs" / "wandb").glob("offline-run-*/*.wandb"))
    assert np.isfinite(pd.read_csv(run_dir / "logs" / "metrics.csv")).all().all()


def test_no_network_is_said_at_once(part1: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, "--encoder", "efficientnetb0"]
    nowhere = {"HOME": str(work_dir), "https_proxy": "http://127.0.0.1:9"}
    done = part1.run("train.py", *args, code=2, **nowhere, NO_ALBUMENTATIONS_UPDATE="")
    assert "--encoder_weights none" in done.stderr and "--encoder_weights FILE" in done.stderr
    assert "albumentations" not in done.stderr  # else it has asked the network for its newest version
    args += ["--encoder_weights", "none", "--log", "wandb"]
    done = part1.run("train.py", *args, code=2, **nowhere, WANDB_MODE="online")
    assert "--log wandb: " in done.stderr and "WANDB_MODE=offline" in done.stderr


EVALUATE = """
import sys
from dataloader import create_loader, load_data_path
from keras2 import tf
from model import F1, IoU, create_loss
from pathlib import Path
from predict import load_model
import argparse
args = argparse.Namespace(data_root=Path(sys.argv[2]), image_size=64, batch_size=8, workers=1, cache="none", seed=0)
args.limit_batches = None
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
paths = load_data_path(args.data_root, "valid.csv")
paths = paths[:11]
for strategy in [tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["cpu:0", "cpu:1"])]:
    with strategy.scope():
        model, _ = load_model(Path(sys.argv[1]))
        model.compile(loss=create_loss(), metrics=[IoU(), F1()])
    loader = strategy.distribute_datasets_from_function(lambda context: create_loader(args, None, paths, context, 2))
    print(*model.evaluate(loader, steps=2, verbose=0)[1:])
"""


def test_two_devices_give_the_metrics_of_one(part1: Part, trained: tuple[Path, str], data_root: Path) -> None:
    (part1.folder / "evaluate_twice.py").write_text(EVALUATE)
    done = part1.run("evaluate_twice.py", trained[0] / "weights" / "best.h5", data_root)
    one, two = [[float(word) for word in line.split()] for line in done.stdout.splitlines()[-2:]]
    assert one == pytest.approx(two, abs=1e-6)
    assert one[0] > 0.1


def test_two_devices_train(part1: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 2, "--limit_batches", 2]
    done = part1.run("train.py", *args, "--device", "cpu", "cpu")
    assert "cpu cpu" in done.stdout
    assert len(pd.read_csv(work_dir / "tensorflow" / "logs" / "metrics.csv")) == 2


def test_two_machines_train_as_one(part1: Part, data_root: Path, work_dir: Path) -> None:
    ports = [free_port(), free_port()]
    cluster = {"worker": [f"localhost:{port}" for port in ports]}
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 2, "--limit_batches", 2]
    machines = [
        part1.start(
            "train.py",
            *args,
            TF_CONFIG=json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}),
        )
        for index in range(2)
    ]
    printed = [machine.communicate(timeout=600) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    assert len(pd.read_csv(work_dir / "tensorflow" / "logs" / "metrics.csv")) == 2
    assert ["best " in out for out, _ in printed] == [True, False]  # only the first one reports
    # the first machine's checkpoint is one that a single machine can go on from
    args[args.index("--epochs") + 1] = 3
    part1.run("train.py", *args, "--resume")
    assert len(pd.read_csv(work_dir / "tensorflow" / "logs" / "metrics.csv")) == 3


def test_when_one_machine_ends_so_does_the_other(part1: Part, data_root: Path, work_dir: Path) -> None:
    for killed in (0, 1):
        cluster = {"worker": [f"localhost:{free_port()}" for _ in range(2)]}
        args = ["--data_root", data_root, "--work_dir", work_dir / str(killed), *SMALL, "--limit_batches", 1]
        machines = [
            part1.start(
                "train.py",
                *args,
                "--epochs",
                500,
                TF_CONFIG=json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}),
            )
            for index in range(2)
        ]
        wait_for_rows(work_dir / str(killed) / "tensorflow" / "logs" / "metrics.csv", 1, machines[0])
        machines[killed].kill()
        _, err = machines[1 - killed].communicate(timeout=60)
        assert machines[1 - killed].returncode == 1 and "Traceback" not in err
        assert "another process of this run has ended" in err and "--resume" in err
        machines[killed].wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
