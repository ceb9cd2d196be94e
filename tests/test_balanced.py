"""Part 2, from a copied folder: what is drawn, the metric of each source, resuming, devices, mistakes."""

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_tensorflow import COLUMNS, free_port

from conftest import ROOT, SMALL, Part, wait_for_rows
from reliability_tests import (  # noqa: F401 - all of them are run for part 1, which has the same code
    run,
    small_root,
    test_a_full_disk_leaves_the_last_checkpoint,
    test_chance_follows_from_the_seed_alone,
)

SHARES = {"0": 0.4, "1": 0.3, "2": 0.2, "3": 0.1, "4": 0.0}


@pytest.fixture(scope="module")
def part2(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return Part("part2_balanced_data", tmp_path_factory.mktemp("copied alone"))


@pytest.fixture(scope="module")
def part(part2: Part) -> Part:
    return part2


@pytest.fixture(scope="module")
def trained(part2: Part, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of a few epochs with TensorBoard, with weights given by hand: its folder and what it printed."""
    work_dir = tmp_path_factory.mktemp("trained")
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--optimizer", "adamw"]
    args += ["--balance", *(f"{source}={share}" for source, share in SHARES.items()), "--monitor", "macro_iou"]
    done = part2.run("train.py", *args, "--learning_rate", 3e-3, "--epochs", 15, "--log", "tensorboard")
    return work_dir / "balanced", done.stdout


def test_what_is_drawn_is_what_was_asked_for(trained: tuple[Path, str], data_root: Path) -> None:
    metrics = pd.read_csv(trained[0] / "logs" / "metrics.csv")
    metrics["drawn/4"] = metrics.get("drawn/4", 0.0)  # neither trained nor validated with
    assert np.allclose(metrics[[f"drawn/{source}" for source in SHARES]].sum(axis=1), 1)
    train = pd.read_csv(data_root / "csv_file" / "train.csv", dtype=str)
    photographs = (train["source"] != "4").sum() // 8 * 8 * len(metrics)
    for source, share in SHARES.items():
        deviation = (share * (1 - share) / photographs) ** 0.5
        assert metrics[f"drawn/{source}"].mean() == pytest.approx(share, abs=4 * deviation)
    assert f"15 epochs of {photographs // 8 // 15} steps" in trained[1]  # as long as the data: no source ends it early


def test_metrics_of_each_source(trained: tuple[Path, str], part2: Part, data_root: Path, tmp_path: Path) -> None:
    run_dir, printed = trained
    metrics = pd.read_csv(run_dir / "logs" / "metrics.csv")
    assert list(metrics)[:8] == COLUMNS
    of_sources = metrics[[name for name in metrics if name.startswith("val_iou/")]]
    valid = pd.read_csv(data_root / "csv_file" / "valid.csv", dtype=str)
    assert set(of_sources) == {f"val_iou/{source}" for source in valid["source"]}
    assert np.allclose(metrics["val_macro_iou"], of_sources.mean(axis=1))
    assert np.allclose(metrics["val_worst_iou"], of_sources.min(axis=1))
    best = metrics.loc[metrics["val_macro_iou"].argmax()]
    assert best["val_iou"] > 0.15  # a guess of all foreground has 0.05
    assert f"{best['val_macro_iou']:.4f}" in printed and f"{best['val_worst_iou']:.4f}" in printed

    # predict.py counts the same in the photographs' own size, with the weights that --monitor chose
    weights = run_dir / "weights" / "best.h5"
    done = part2.run("predict.py", "--weights", weights, "--images", data_root, "--output_dir", tmp_path)
    table = pd.read_csv(tmp_path / "metrics_by_source.csv", index_col="source")
    per_image = pd.read_csv(tmp_path / "metrics.csv", dtype={"source": str})
    pixels = per_image.groupby("source")[["intersection", "union"]].sum()
    assert table.loc["macro", "iou"] == pytest.approx((pixels["intersection"] / pixels["union"]).mean())
    assert table.loc["worst", "iou"] == pytest.approx((pixels["intersection"] / pixels["union"]).min())
    assert table.loc["macro", "iou"] == pytest.approx(best["val_macro_iou"], abs=0.1)
    assert table.loc["all", "iou"] == pytest.approx(best["val_iou"], abs=0.1)
    assert f"{table.loc['macro', 'iou']:.4f}" in done.stdout


def test_tensorboard_has_a_curve_for_each_source(trained: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0] / "logs" / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert {"val_iou/0", "val_iou/3", "val_macro_iou", "val_worst_iou", "drawn/0"} <= set(events.Tags()["tensors"])
    assert len(events.Tensors("val_iou/3")) == 15


DRAWS = """
import numpy as np
from dataloader import balanced_draws
numbers = np.repeat([0, 1, 2], [70, 25, 5])
draws = list(balanced_draws(numbers, [1 / 3, 1 / 3, 1 / 3], seed=1).take(3000).as_numpy_iterator())
count = np.array([draw for draw, _ in draws])
index = np.array([index for _, index in draws])
print((count == np.arange(3000)).all())
print(*np.bincount(numbers[index]))
# Within a source each photograph is drawn as often as any other, up to one.
print(*[np.ptp(np.bincount(index, minlength=100)[numbers == n]) for n in range(3)])
halves = [list(balanced_draws(numbers, [1 / 3, 1 / 3, 1 / 3], seed=1).shard(2, m).take(50)) for m in range(2)]
print(all(int(pair[1]) == index[2 * i + m] for m in range(2) for i, pair in enumerate(halves[m])))
again = [index for _, index in balanced_draws(numbers, [1 / 3, 1 / 3, 1 / 3], seed=1).skip(500).take(100)]
print((np.array(again) == index[500:600]).all())
other = [index for _, index in balanced_draws(numbers, [1 / 3, 1 / 3, 1 / 3], seed=2).take(100)]
print((np.array(other) == index[:100]).all())
"""


def test_draws(part2: Part) -> None:
    (part2.folder / "draws.py").write_text(DRAWS)
    lines = part2.run("draws.py").stdout.splitlines()[-6:]
    assert lines[0] == "True"  # no two draws have one number, which their augmentation follows from
    assert [int(word) for word in lines[1].split()] == pytest.approx([1000] * 3, abs=4 * (3000 * 2 / 9) ** 0.5)
    assert max(int(word) for word in lines[2].split()) <= 1
    assert lines[3] == "True"  # two machines share the draws of one
    assert lines[4:] == ["True", "False"]  # a run goes on with the same draws; another seed draws otherwise


def test_a_small_source_is_augmented_strongly(part2: Part, data_root: Path, work_dir: Path) -> None:
    (part2.folder / "plan.py").write_text(
        "from balance import plan_balance\n"
        "for balance in ['uniform', 'sqrt', 'none']:\n"
        "    plan = plan_balance([balance], None, {'many': 80, 'some': 18, 'few': 2})\n"
        "    print(*plan['weight'].round(3), *plan['repeats'].round(2), *plan['strong'])\n"
    )
    lines = part2.run("plan.py").stdout.splitlines()
    assert lines[0] == "0.333 0.333 0.333 0.42 1.85 16.67 False False True"
    assert lines[1] == "0.613 0.291 0.097 0.77 1.61 4.84 False False True"
    assert lines[2] == "0.8 0.18 0.02 1.0 1.0 1.0 False False False"
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 1, "--limit_batches", 1]
    done = part2.run("train.py", *args, "--strong_augmentation", "0", "1", "--mixed_precision", "True")
    assert "bf16" in done.stdout
    augmentation = dict(re.findall(r"^(\d) .* (usual|strong) ", done.stdout, re.MULTILINE))
    # A first look validates photographs of the last source, too, not only those that come first.
    valid = pd.read_csv(data_root / "csv_file" / "valid.csv", dtype=str)
    assert len(valid) > 8
    assert f"val_iou/{valid['source'].iloc[-1]}" in pd.read_csv(work_dir / "balanced" / "logs" / "metrics.csv")
    assert augmentation == {"0": "strong", "1": "strong", "2": "usual", "3": "usual", "4": "usual"}


LOSS = """
import numpy as np
from model import F1, IoU, create_loss, create_model
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
masks = (rng.random((4, 32, 32, 1)) < 0.3).astype(np.float32)
model = create_model("resnet18", 32, None)
model.compile(loss=create_loss(), weighted_metrics=[IoU(3), F1(3)])
print(float(create_loss()(masks, model(images))))
for sources in [[0, 0, 0, 0], [0, 1, 2, 2]]:
    print(model.test_on_batch(images, masks, np.array(sources), return_dict=True)["loss"])
"""


def test_the_number_of_a_source_is_no_weight_of_the_loss(part2: Part) -> None:
    (part2.folder / "loss.py").write_text(LOSS)
    plain, of_one_source, of_three = [float(word) for word in part2.run("loss.py").stdout.split()[-3:]]
    assert [of_one_source, of_three] == pytest.approx([plain, plain], rel=1e-5)


def test_killed_and_resumed_ends_like_an_uninterrupted_run(part2: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, *SMALL, "--epochs", 4, "--limit_batches", 3, "--cache", "memory"]
    part2.run("train.py", *args, "--work_dir", work_dir / "whole")
    killed = part2.start("train.py", *args, "--work_dir", work_dir / "killed")
    csv_file = work_dir / "killed" / "balanced" / "logs" / "metrics.csv"
    wait_for_rows(csv_file, 2, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    args += ["--work_dir", work_dir / "killed", "--resume"]
    refused = part2.run("train.py", *args, "--balance", "none", code=2)
    assert "--balance uniform" in refused.stderr
    part2.run("train.py", *args)
    whole = pd.read_csv(work_dir / "whole" / "balanced" / "logs" / "metrics.csv")
    resumed = pd.read_csv(csv_file)
    compared = [name for name in whole if name not in ("seconds", "images_per_second")]
    pd.testing.assert_frame_equal(whole[compared], resumed[compared], rtol=1e-6)


def test_several_devices_and_machines(part2: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, *SMALL, "--epochs", 2, "--limit_batches", 2]
    part2.run("train.py", *args, "--work_dir", work_dir / "devices", "--device", "cpu", "cpu")
    cluster = {"worker": [f"localhost:{free_port()}", f"localhost:{free_port()}"]}
    machines = [
        part2.start(
            "train.py",
            *[*args, "--work_dir", work_dir / "machines"],
            TF_CONFIG=json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}),
        )
        for index in range(2)
    ]
    printed = [machine.communicate(timeout=600) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    # All of them draw the same photographs, and count each one once.
    names = [f"drawn/{source}" for source in range(5)]
    devices, machines = [
        pd.read_csv(work_dir / name / "balanced" / "logs" / "metrics.csv").reindex(columns=names)
        for name in ("devices", "machines")
    ]
    pd.testing.assert_frame_equal(devices, machines)
    assert np.allclose(devices.fillna(0).sum(axis=1), 1)
    assert np.allclose(devices.fillna(0) * 16 % 1, 0)  # shares of 2 batches of 8


def test_mistakes_are_told(part2: Part, data_root: Path, work_dir: Path, tmp_path: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL]
    done = part2.run("train.py", *args, "--balance", "0=0.5", "5=0.5", code=2)
    assert "--balance 5=0.5" in done.stderr and "the sources are 0, 1, 2, 3, 4" in done.stderr
    done = part2.run("train.py", *args, "--strong_augmentation", "seven", code=2)
    assert "--strong_augmentation seven" in done.stderr and "0, 1, 2, 3, 4" in done.stderr

    check = "import sys; from balance import source_weights; source_weights(sys.argv[1:], {'a': 5, 'b': 1, 'c=d': 1})"
    for words, part_of_message in [
        (["even"], "uniform, sqrt, none"),
        (["a=0.5", "b=0.5"], "source c=d has no weight"),
        (["a=0.5", "b=0.5", "c=d=0.5"], "add up to 1.5"),
        (["a=-1", "b=2", "c=d=0"], "not a number from 0 to 1"),
        (["a=nan", "b=0", "c=d=0"], "not a number from 0 to 1"),
        (["a=0.5", "a=0.5"], "two weights"),
        (["uniform", "a=1"], "SOURCE=WEIGHT"),
    ]:
        done = part2.run("-c", check, *words, code=2)
        assert "--balance" in done.stderr and part_of_message in done.stderr

    without = tmp_path / "a source is missing"
    shutil.copytree(data_root / "csv_file", without / "csv_file")
    (without / "csv_file" / "train2.csv").unlink()
    done = part2.run("train.py", "--data_root", without, "--work_dir", work_dir, *SMALL, code=2)
    assert "csv_file/train2.csv" in done.stderr and "data_preparation.py" in done.stderr


def test_a_source_with_one_photograph_and_one_for_validation_only(
    part2: Part, data_root: Path, work_dir: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name in ["train", "valid"]:
        (root / name).symlink_to(data_root / name)
    shutil.copytree(data_root / "csv_file", root / "csv_file")
    for source in ["1", "4"]:
        file = root / "csv_file" / f"train{source}.csv"
        pd.read_csv(file, dtype=str).head(1).to_csv(file, index=False)
    train = pd.read_csv(root / "csv_file" / "train.csv", dtype=str)
    train[train["source"] != "3"].to_csv(root / "csv_file" / "train.csv", index=False)  # 3 is not trained with
    args = ["--data_root", root, "--work_dir", work_dir, *SMALL, "--epochs", 1]
    done = part2.run("train.py", *args)
    metrics = pd.read_csv(work_dir / "balanced" / "logs" / "metrics.csv")
    assert metrics["drawn/1"].item() > 0 and metrics["drawn/3"].item() == 0
    assert "val_iou/3" in metrics
    assert re.search(r"^3 +0\.0% +[\d.]+ *$", done.stdout, re.MULTILINE)  # a row with not much but its IoU


def test_the_example_of_the_readme_for_classes(part2: Part) -> None:
    readme = (ROOT / "part2_balanced_data" / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "labels" in block)
    (part2.folder / "classes.py").write_text(code)
    shares = [float(word) for word in part2.run("classes.py").stdout.split()[-3:]]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.05)
