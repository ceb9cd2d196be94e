"""Part 3, from a copied folder: training, checkpoints, resuming, processes, losses, folds, classes, prediction."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_tensorflow import COLUMNS, MARKER, RESIZED, free_port

from conftest import SMALL, Part, wait_for_rows


@pytest.fixture(scope="module")
def part3(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return Part("part3_lightning", tmp_path_factory.mktemp("copied alone"))


@pytest.fixture(scope="module")
def trained(part3: Part, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of a few epochs with TensorBoard: its folder and what it printed."""
    work_dir = tmp_path_factory.mktemp("trained")
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--loss", "dice_bce", "--cache", "memory"]
    done = part3.run("train.py", *args, "--learning_rate", 3e-3, "--epochs", 21, "--log", "tensorboard")
    return work_dir / "lightning", done.stdout


def test_training_finds_nails_and_leaves_what_it_should(trained: tuple[Path, str]) -> None:
    run_dir, printed = trained
    metrics = pd.read_csv(run_dir / "logs" / "metrics.csv")
    assert list(metrics)[:8] == COLUMNS
    assert metrics["epoch"].tolist() == list(range(1, 22))
    assert metrics["val_iou"].max() > 0.3  # a guess of all foreground has 0.05
    assert np.isfinite(metrics).all().all()
    assert metrics["learning_rate"].iloc[-1] == pytest.approx(3e-5, rel=1e-3)  # a hundredth, reached at the last step
    assert metrics["learning_rate"].iloc[9] > 1e-3  # it falls with the steps, not with the epochs
    assert np.allclose(metrics["val_f1"], 2 * metrics["val_iou"] / (1 + metrics["val_iou"]))
    assert f"{metrics['val_iou'].max():.4f}" in printed
    assert "predict.py --weights" in printed
    config = json.loads((run_dir / "config.json").read_text())
    assert config["arch"] == "Unet" and config["versions"]["torch"]
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


def test_predict_and_export(trained: tuple[Path, str], part3: Part, data_root: Path, tmp_path: Path) -> None:
    weights = trained[0] / "weights" / "best.ckpt"
    part3.run("predict.py", "--weights", weights, "--images", data_root, "--output_dir", tmp_path / "torch")
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
    exported = part3.run("export.py", "--weights", weights, "--output", tmp_path / "nails.onnx")
    assert float(exported.stdout.split()[-1]) < 1e-4
    without_torch = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('predict.py', run_name='__main__')"
    args = ["--weights", tmp_path / "nails.onnx", "--images", data_root, "--output_dir", tmp_path / "onnx"]
    part3.run("-c", without_torch, *args)
    masks, onnx_masks = masks_below(tmp_path / "torch"), masks_below(tmp_path / "onnx")
    assert masks.keys() == onnx_masks.keys() and len(masks) == len(valid)
    assert max((masks[name] != onnx_masks[name]).mean() for name in masks) < 1e-3  # a pixel of exactly 0.5 may flip
    # Looked at four ways, or in tiles, nails stay nails.
    part3.run("predict.py", *args[:-1], tmp_path / "tta", "--tta")
    tta = pd.read_csv(tmp_path / "tta" / "metrics_by_source.csv", index_col="source")
    assert tta.loc["all", "iou"] == pytest.approx(by_source.loc["all", "iou"], abs=0.1)


CALLED = """
import numpy as np
from inference import Network, predict_tiles, predict_labels
rng = np.random.default_rng(0)
image = rng.integers(0, 256, (150, 211, 3), np.uint8)
red = Network(lambda images: images[..., 0][:, None] / 255, image_size=64, classes=1)
print(np.abs(predict_tiles(red, image, False, 64)[..., 0] - image[..., 0] / 255).max())
print(np.abs(predict_tiles(red, image, True, 64)[..., 0] - image[..., 0] / 255).max())
# A network that is wrong at the edge of what it sees: the middle of other tiles must outvote it.
def blind_at_the_edge(images):
    seen = np.zeros((len(images), 1, 64, 64))
    seen[:, :, 2:-2, 2:-2] = 1
    return seen
edges = predict_tiles(Network(blind_at_the_edge, 64, 1), image, False, 64)[8:-8, 8:-8]
print(edges.min())
print(predict_labels(red, image[:40, :50], tile=64).shape)
"""


def test_tiles_have_no_seams(part3: Part) -> None:
    (part3.folder / "called.py").write_text(CALLED)
    same, flipped, edges, *shape = part3.run("called.py").stdout.split()
    assert float(same) < 1e-6 and float(flipped) < 1e-6
    assert float(edges) > 0.8
    assert shape == ["(40,", "50)"]


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
    part3: Part, data_root: Path, work_dir: Path
) -> None:
    # efficientnet has dropout, whose random numbers have to go on as well
    args = ["--data_root", data_root, *SMALL, "--encoder", "efficientnet-b0", "--epochs", 4, "--limit_batches", 6]
    args += ["--ema", 0.9, "--accumulate_grad_batches", 2]
    whole = work_dir / "whole" / "lightning"
    part3.run("train.py", *args, "--work_dir", work_dir / "whole")
    lasts = [whole / "weights" / "last.ckpt"]
    for how, code in [(signal.SIGKILL, -9), (signal.SIGINT, 130)]:
        run_dir = work_dir / how.name / "lightning"
        process = part3.start("train.py", *args, "--work_dir", work_dir / how.name)
        wait_for_rows(run_dir / "logs" / "metrics.csv", 2, process)
        time.sleep(0.4)  # somewhere in an epoch
        if how == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, how)  # Ctrl-C in a terminal reaches the processes that load, too
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        if how == signal.SIGINT:
            assert "--resume" in err and "Traceback" not in err
            refused = part3.run("train.py", *args, "--work_dir", work_dir / how.name, code=2)  # nothing is overwritten
            assert "--resume" in refused.stderr
            other = [*args, "--work_dir", work_dir / how.name, "--resume", "--encoder", "resnet34"]
            assert "--encoder efficientnet-b0" in part3.run("train.py", *other, code=2).stderr
        part3.run("train.py", *args, "--work_dir", work_dir / how.name, "--resume")
        metrics = [pd.read_csv(folder / "logs" / "metrics.csv")[COLUMNS[:6]] for folder in (whole, run_dir)]
        pd.testing.assert_frame_equal(*metrics, rtol=1e-6)
        lasts.append(run_dir / "weights" / "last.ckpt")
    (part3.folder / "same.py").write_text(SAME)
    for line in part3.run("same.py", *lasts).stdout.splitlines():
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
    part3: Part, trained: tuple[Path, str], data_root: Path, work_dir: Path
) -> None:
    (part3.folder / "evaluate.py").write_text(EVALUATE)
    weights = str(trained[0] / "weights" / "best.ckpt")
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--workers", 0, "--device"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port(), "evaluate.py"]
    runs = [["evaluate.py", *args, "cpu"], ["evaluate.py", *args, "cpu", "cpu"], [*torchrun, *args, "cpu", "cpu"]]
    one, *two = [[float(word) for word in part3.run(*run, WEIGHTS=weights).stdout.split()[-2:]] for run in runs]
    assert one[0] > 0.1
    for metrics in two:
        assert metrics == pytest.approx(one, abs=1e-6)


def test_two_processes_train(part3: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 2, "--limit_batches", 2]
    args += ["--encoder", "efficientnet-b0"]  # it has layers that a U-Net does not use
    done = part3.run("train.py", *args, "--device", "cpu", "cpu")
    assert done.stdout.count("best ") == 1 and "cpu cpu" in done.stdout
    assert len(pd.read_csv(work_dir / "lightning" / "logs" / "metrics.csv")) == 2
    # What two processes left, one can go on from.
    args[args.index("--epochs") + 1] = 3
    part3.run("train.py", *args, "--resume")
    assert len(pd.read_csv(work_dir / "lightning" / "logs" / "metrics.csv")) == 3


LOAD = """
import sys
from pathlib import Path
import numpy as np
import torch
from torch.utils.data import DataLoader
from dataloader import NailDataset, ShuffledEpochs, load_data_path
paths = load_data_path(Path(sys.argv[1]), "train.csv")

def batches(workers, epochs=(0, 1), seed=1, cache=False, start=(0, 0), rank=0, ranks=1):
    dataset = NailDataset(paths, 96, 1, seed)
    if cache:
        dataset.cache(2)
    sampler = ShuffledEpochs(len(paths), 16, seed, rank, ranks)
    sampler.start = start
    loader = DataLoader(dataset, 8 // ranks, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    found = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        found += [[images.numpy(), masks.numpy()] for images, masks in loader]
    return found

def same(left, right):
    return all(np.array_equal(a, b) for l, r in zip(left, right, strict=True) for a, b in zip(l, r, strict=True))

reference = batches(workers=0)
print(len(reference), set(np.unique(np.concatenate([masks for _, masks in reference]))) == {0, 1})
print(same(reference, batches(2)), same(reference, batches(3)), same(reference, batches(2, cache=True)))
other_seed = batches(2, seed=2)
print(same(reference[2:], batches(2, epochs=[1])), same(reference[:2], reference[2:]), same(reference, other_seed))
print(same(reference[1:2], batches(2, epochs=[0], start=(0, 8))))
shares = [batches(0, rank=rank, ranks=2) for rank in range(2)]
together = [np.sort(np.concatenate([one[0], two[0]]).sum(axis=(1, 2, 3))) for one, two in zip(*shares, strict=True)]
print(all((t == np.sort(r[0].astype(int).sum(axis=(1, 2, 3)))).all() for t, r in zip(together, reference, strict=True)))
# Workers do not repeat each other: one photograph, drawn again and again, is never augmented alike.
again = DataLoader(NailDataset(paths, 96, 1, 1), 1, sampler=[(epoch, 0) for epoch in range(12)], num_workers=3)
print(len({images.numpy().tobytes() for images, _ in again}))
"""


def test_the_same_seed_gives_the_same_batches(part3: Part, data_root: Path) -> None:
    (part3.folder / "load.py").write_text(LOAD)
    lines = part3.run("load.py", data_root).stdout.splitlines()[-6:]
    assert lines[0] == "4 True"  # masks stay 0 and 1
    assert lines[1] == "True True True"  # whatever the number of workers, and from the cache
    assert lines[2] == "True False False"  # an epoch has its own order, and a seed its own
    assert lines[3] == "True"  # a run that was interrupted after a batch goes on with the next
    assert lines[4] == "True"  # two processes share a batch, each photograph goes to one of them
    assert int(lines[5]) > 8  # some are left as they are


def test_image_and_mask_are_moved_and_resized_alike(part3: Part) -> None:
    (part3.folder / "marker.py").write_text(MARKER)
    different, worst = part3.run("marker.py").stdout.split()[-2:]
    assert int(different) > 130 and float(worst) > 0.9  # see part 1
    (part3.folder / "resized.py").write_text(RESIZED)
    offset = [float(word) for word in part3.run("resized.py").stdout.split()[-2:]]
    assert offset == pytest.approx([0, 0], abs=0.1)  # the usual nearest neighbour is off by half a pixel


LEARN = """
import torch
from losses import LOSSES, create_loss, lovasz_extension
from model import MODELS, create_network, scores, to_labels
torch.manual_seed(0)
truth = (torch.rand(1000) < 0.3).float()
errors = (torch.rand(1000) < 0.2).float()
preds = (truth - errors).abs()
iou = (truth * preds).sum() / torch.maximum(truth, preds).sum()
print((lovasz_extension(errors, truth) - (1 - iou)).abs().item() < 1e-5)
for classes in (1, 3):
    masks = torch.randint(0, max(classes, 2), (2, 32, 32))
    right = torch.nn.functional.one_hot(masks, max(classes, 2)).permute(0, 3, 1, 2).float()[:, -classes:]
    for name in LOSSES:
        loss_fn = create_loss(name, classes)
        values = [loss_fn(scale * (2 * right - 1), masks).item() for scale in (-1, 0.1, 1, 20)]
        print(name, classes, values == sorted(values, reverse=True), abs(values[-1]) < 1e-3)
        logits = torch.randn(2, classes, 32, 32, requires_grad=True)
        loss_fn(logits, torch.zeros_like(masks)).backward()  # nothing to find
        print(name, classes, torch.isfinite(logits.grad).all().item(), True)
iou, f1 = scores(torch.tensor([[50, 10, 0], [20, 20, 0], [0, 0, 0]]))
print(iou.tolist() == [0.4, 1.0], f1.tolist() == [2 * 20 / 70, 1.0])
for name, model in MODELS.items():
    network = create_network(**model, classes=1).eval()
    print(name, network(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 64, 64))
"""


def test_losses_metrics_and_named_models(part3: Part) -> None:
    (part3.folder / "learn.py").write_text(LEARN)
    lines = part3.run("learn.py").stdout.splitlines()
    assert len(lines) > 30
    assert not [line for line in lines if "False" in line]


def test_other_flags_train(part3: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--encoder_weights", "none", "--image_size", "64", "--batch_size", "8"]
    args += ["--model", "smp_segformer_mit_b0", "--auto_lr_find", "--profiler", "simple", "--gradient_clip", 1]
    args += ["--log", "wandb", "--mixed_precision", "True", "--epochs", 8, "--early_stopping", 1]
    done = part3.run("train.py", *args, "--work_dir", work_dir)
    assert "bf16" in done.stdout and "--auto_lr_find: " in done.stdout
    run_dir = work_dir / "lightning"
    found = float(done.stdout.split("falls fastest at ")[1].split()[0])
    metrics = pd.read_csv(run_dir / "logs" / "metrics.csv")
    assert found / 100 <= metrics["learning_rate"].max() <= found  # it was used
    assert np.isfinite(metrics).all().all()
    stopped = metrics["epoch"].iloc[-1] - metrics.loc[metrics["val_iou"].argmax(), "epoch"]
    assert stopped == 1 or len(metrics) == 8
    assert list((run_dir / "logs" / "wandb").glob("offline-run-*/*.wandb"))
    assert "run_training_batch" in next((run_dir / "logs").glob("*profile*.txt")).read_text()


def test_a_loss_that_is_not_finite_ends_the_run(part3: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--learning_rate", "1e30", "--epochs", 3]
    done = part3.run("train.py", *args, "--loss", "cross_entropy", code=1)
    assert "--learning_rate" in done.stderr and ("nan" in done.stderr or "inf" in done.stderr)


def test_a_file_that_became_corrupt_is_named_and_the_run_goes_on(part3: Part, data_root: Path, work_dir: Path) -> None:
    train = pd.read_csv(data_root / "csv_file" / "train.csv")
    last_batch = np.random.default_rng([42, 0]).permutation(len(train))[40]  # as the sampler shuffles the first epoch
    broken = data_root / train["images"][last_batch]
    content = broken.read_bytes()
    args = ["--data_root", data_root, *SMALL, "--epochs", 1]
    broken.write_bytes(content[: len(content) // 2])
    try:
        done = part3.run("train.py", *args, "--work_dir", work_dir / "broken", code=1)
    finally:
        broken.write_bytes(content)
    assert f"error: {broken}: " in done.stderr and "--resume" in done.stderr
    part3.run("train.py", *args, "--work_dir", work_dir / "broken", "--resume")
    part3.run("train.py", *args, "--work_dir", work_dir / "whole")
    files = [work_dir / name / "lightning" / "logs" / "metrics.csv" for name in ("broken", "whole")]
    pd.testing.assert_frame_equal(*[pd.read_csv(file)[COLUMNS[:6]] for file in files], rtol=1e-6)


def test_no_network_is_said_at_once(part3: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, "--encoder", "resnet18"]
    nowhere = {"HOME": str(work_dir), "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = part3.run("train.py", *args, code=2, **nowhere)
    assert "--encoder_weights none" in done.stderr and "--encoder_weights FILE" in done.stderr
    assert "Retrying" not in done.stderr


def test_several_classes(part3: Part, data_root: Path, work_dir: Path, tmp_path: Path) -> None:
    """Nails to the left of a photograph's middle are label 1, those to the right label 2."""
    raw = tmp_path / "labels"
    for path in sorted((data_root / "train" / "images").rglob("*.png"))[:32]:
        mask = np.array(Image.open(str(path).replace("images", "masks")))
        labels = (mask > 0) * np.where(np.arange(mask.shape[1]) < mask.shape[1] // 2, 1, 2)
        for folder, source in [("images", Image.open(path)), ("masks", Image.fromarray(labels.astype(np.uint8)))]:
            (raw / folder).mkdir(parents=True, exist_ok=True)
            source.save(raw / folder / path.name)
    prepared = tmp_path / "prepared"
    part3.run("data_preparation.py", "--data_root", prepared, "--raw", raw, "--classes", 3)
    args = ["--data_root", prepared, *SMALL, "--loss", "cross_entropy", "--epochs", 2]
    part3.run("train.py", *args, "--classes", 3, "--work_dir", work_dir)
    run_dir = work_dir / "lightning"
    metrics = pd.read_csv(run_dir / "logs" / "metrics.csv")
    assert np.allclose(metrics["val_iou"], (metrics["val_iou/1"] + metrics["val_iou/2"]) / 2)
    part3.run("predict.py", "--weights", run_dir / "weights" / "best.ckpt", "--images", prepared)
    masks = masks_below(run_dir / "predictions")
    assert masks and all(set(np.unique(mask)) <= {0, 1, 2} for mask in masks.values())
    assert {"iou/1", "iou/2"} <= set(pd.read_csv(run_dir / "predictions" / "metrics_by_source.csv"))
    # Labels that the network has no output for are told, with the file; and so is the other way round.
    few = part3.run("train.py", *args, "--classes", 2, "--work_dir", work_dir / "few", code=1)
    assert "--classes 2" in few.stderr and ".png" in few.stderr
    binary = part3.run("train.py", *args, "--work_dir", work_dir / "binary", code=1)
    assert "--classes 1" in binary.stderr


def test_all_folds(part3: Part, data_root: Path, work_dir: Path, tmp_path: Path) -> None:
    folds = tmp_path / "folds"
    raw = tmp_path / "raw"
    shutil.copytree(data_root / "valid", raw)
    part3.run("data_preparation.py", "--data_root", folds, "--raw", raw, "--folds", 2)
    args = ["--data_root", folds, "--work_dir", work_dir, *SMALL, "--batch_size", 4, "--epochs", 1]
    done = part3.run("train.py", *args, "--fold", "all")
    table = pd.read_csv(work_dir / "lightning" / "folds.csv")
    assert table["fold"].tolist() == [0, 1]
    assert f"mean {table['iou'].mean():.4f}, standard deviation {table['iou'].std():.4f}" in done.stdout
    for fold in (0, 1):
        metrics = pd.read_csv(work_dir / "lightning" / f"fold{fold}" / "logs" / "metrics.csv")
        assert metrics["val_iou"].max() == pytest.approx(table["iou"][fold])
    # What fold 1 was not trained with is found, though it lies in train/.
    assert f"--images {folds} --fold 1" in done.stdout
    weights = work_dir / "lightning" / "fold1" / "weights" / "best.ckpt"
    part3.run("predict.py", "--weights", weights, "--images", folds, "--fold", 1, "--output_dir", tmp_path / "fold1")
    tables = pd.concat([pd.read_csv(folds / "csv_file" / f"{side}.csv") for side in ("train", "valid")])
    names = {path.removeprefix("train/images/") for path in tables.loc[tables["fold"] == 1, "images"]}
    assert set(pd.read_csv(tmp_path / "fold1" / "metrics.csv")["file"]) == names
    again = part3.run("train.py", *args, "--fold", "all", "--resume")  # nothing is left to do
    assert "== fold" not in again.stdout and "mean" in again.stdout
    other = part3.run("train.py", *args, "--fold", 2, code=2)
    assert "--fold 2" in other.stderr
    none = part3.run("train.py", "--data_root", data_root, *SMALL, "--fold", 0, code=2)
    assert "--folds 5" in none.stderr
