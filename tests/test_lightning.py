"""Part 3, from a copied folder: batches, losses, flags, folds, prediction in tiles; and all of lightning_tests.py."""

import contextlib
import os
import pty
import re
import shutil
import subprocess
import termios
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_tensorflow_loader import MARKER, RESIZED

from bad_data_tests import *  # noqa: F403 - all of its tests, for the part that `part` is
from conftest import SMALL, Part
from lightning_tests import *  # noqa: F403 - and these
from reliability_tests import *  # noqa: F403 - and these


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return Part("part3_lightning", tmp_path_factory.mktemp("copied alone"))


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


def test_tiles_have_no_seams(part: Part) -> None:
    (part.folder / "called.py").write_text(CALLED)
    same, flipped, edges, *shape = part.run("called.py").stdout.split()
    assert float(same) < 1e-6 and float(flipped) < 1e-6
    assert float(edges) > 0.8
    assert shape == ["(40,", "50)"]


STACK = """
import numpy as np
from torch.utils.data import DataLoader
from shared_memory import stack
image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
samples = {"alike": [image, image[:, ::-1]], "numbers": [np.int64(3), np.int64(4)]}
samples["turned"] = [image, image.swapaxes(0, 1)]
for workers in (0, 1):
    for name, arrays in samples.items():
        try:
            (batch,) = DataLoader(arrays, batch_size=2, num_workers=workers, collate_fn=stack)
            print(name, batch.dtype, (batch.numpy() == np.stack(arrays)).all(), *batch.shape)
        except ValueError:
            print(name, "cannot be stacked")
"""


def test_batches_of_processes_are_those_of_none(part: Part) -> None:
    lines = part.run("-c", STACK).stdout.splitlines()
    assert lines[:3] == ["alike torch.uint8 True 2 2 4 3", "numbers torch.int64 True 2", "turned cannot be stacked"]
    assert lines[3:] == lines[:3]


LOAD = """
import sys
from pathlib import Path
import numpy as np
import torch
from torch.utils.data import DataLoader
from dataloader import NailDataset, ShuffledEpochs, collate, load_data_path
paths = load_data_path(Path(sys.argv[1]), "train.csv")

def batches(workers, epochs=(0, 1), seed=1, cache=False, start=(0, 0), rank=0, ranks=1):
    dataset = NailDataset(paths, 96, 1, seed)
    if cache:
        dataset.cache(2)
    sampler = ShuffledEpochs(len(paths), 16, seed, rank, ranks)
    sampler.start = start
    loader = DataLoader(
        dataset, 8 // ranks, sampler=sampler, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
    )
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


def test_the_same_seed_gives_the_same_batches(part: Part, data_root: Path) -> None:
    (part.folder / "load.py").write_text(LOAD)
    lines = part.run("load.py", data_root).stdout.splitlines()[-6:]
    assert lines[0] == "4 True"  # masks stay 0 and 1
    assert lines[1] == "True True True"  # whatever the number of workers, and from the cache
    assert lines[2] == "True False False"  # an epoch has its own order, and a seed its own
    assert lines[3] == "True"  # a run that was interrupted after a batch goes on with the next
    assert lines[4] == "True"  # two processes share a batch, each photograph goes to one of them
    assert int(lines[5]) > 8  # some are left as they are


def test_image_and_mask_are_moved_and_resized_alike(part: Part) -> None:
    (part.folder / "marker.py").write_text(MARKER)
    different, worst = part.run("marker.py").stdout.split()[-2:]
    assert int(different) > 130 and float(worst) > 0.9  # see part 1
    (part.folder / "resized.py").write_text(RESIZED)
    offset = [float(word) for word in part.run("resized.py").stdout.split()[-2:]]
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
        with torch.autocast("cpu", torch.bfloat16):
            rounded = loss_fn(logits, masks)
        print(name, classes, "half", torch.allclose(rounded.float(), loss_fn(logits, masks), rtol=1e-5))
        loss_fn(logits, torch.zeros_like(masks)).backward()  # nothing to find
        print(name, classes, torch.isfinite(logits.grad).all().item(), True)
iou, f1 = scores(torch.tensor([[50, 10, 0], [20, 20, 0], [0, 0, 0]]))
print(iou.tolist() == [0.4, 1.0], f1.tolist() == [2 * 20 / 70, 1.0])
for name, model in MODELS.items():
    network = create_network(**model, classes=1).eval()
    print(name, network(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 64, 64))
"""


def test_losses_metrics_and_named_models(part: Part) -> None:
    (part.folder / "learn.py").write_text(LEARN)
    lines = part.run("learn.py").stdout.splitlines()
    assert len(lines) > 44
    assert not [line for line in lines if "False" in line]


def test_other_flags_train(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--encoder_weights", "none", "--image_size", 32, "--batch_size", 8]
    args += ["--model", "smp_segformer_mit_b0", "--auto_lr_find", "--profiler", "simple", "--gradient_clip", 1]
    args += ["--log", "wandb", "--mixed_precision", "True", "--epochs", 8, "--early_stopping", 1]
    keys = {"WANDB_API_KEY": "5ecre7" * 6 + "5ecr", "HF_TOKEN": "hf_" + "7oken" * 7}
    done = part.run("train.py", *args, "--work_dir", work_dir, **keys)
    assert "bf16" in done.stdout and "--auto_lr_find: " in done.stdout
    run_dir = work_dir / "lightning"
    written = [path.read_bytes() for path in run_dir.rglob("*") if path.is_file()]
    for key in keys.values():  # a key is told to nobody
        assert not any(key.encode() in content for content in [done.stdout.encode(), done.stderr.encode(), *written])
    found = float(done.stdout.split("falls fastest at ")[1].split()[0])
    metrics = pd.read_csv(run_dir / "logs" / "metrics.csv")
    assert found / 100 <= metrics["learning_rate"].max() <= found  # it was used
    assert np.isfinite(metrics).all().all()
    stopped = metrics["epoch"].iloc[-1] - metrics.loc[metrics["val_iou"].argmax(), "epoch"]
    assert stopped == 1 or len(metrics) == 8
    assert list((run_dir / "logs" / "wandb").glob("offline-run-*/*.wandb"))
    assert "run_training_batch" in next((run_dir / "logs").glob("*profile*.txt")).read_text()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
def test_a_translated_network_trains_like_itself(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, *SMALL, "--encoder", "tu-test_resnet", "--limit_batches", 3]  # soon translated
    losses = []
    for run, flags in {"as it is": [], "translated": ["--compile"]}.items():
        part.run("train.py", *args, "--work_dir", work_dir / run, "--epochs", 1, *flags)
        losses.append(pd.read_csv(work_dir / run / "lightning" / "logs" / "metrics.csv")["train_loss"].iloc[-1])
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    # Its checkpoint is one of the network as it is.
    part.run("train.py", *args, "--work_dir", work_dir / "translated", "--epochs", 2, "--resume")
    assert len(pd.read_csv(work_dir / "translated" / "lightning" / "logs" / "metrics.csv")) == 2


AVERAGED = """
import sys
import torch
best, last = (torch.load(f"{sys.argv[1]}/{name}.ckpt", weights_only=True) for name in ("best", "last"))
weight = "network.segmentation_head.0.weight"
print([torch.equal(best["state_dict"][weight], last[state][weight]) for state in ("state_dict", "current_model_state")])
"""


def test_the_best_weights_are_averages(part: Part, data_root: Path, work_dir: Path) -> None:
    part.run("train.py", "--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 1, "--ema", 0.9)
    (part.folder / "averaged.py").write_text(AVERAGED)
    assert part.run("averaged.py", work_dir / "lightning" / "weights").stdout.strip() == "[True, False]"


def test_too_few_values_to_normalise_are_told(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 1, "--limit_batches", 1]
    done = part.run("train.py", *args, "--image_size", 32, "--batch_size", 1, code=2)
    assert "--batch_size 2" in done.stderr


def test_a_loss_that_is_not_finite_ends_the_run(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--learning_rate", "1e30", "--epochs", 3]
    done = part.run("train.py", *args, "--loss", "cross_entropy", code=1)
    assert "--learning_rate" in done.stderr and ("nan" in done.stderr or "inf" in done.stderr)


def test_in_a_terminal_a_bar_shows_steps_and_loss(part: Part, data_root: Path, work_dir: Path) -> None:
    screen, terminal = pty.openpty()  # what is written to the second is read from the first
    termios.tcsetwinsize(terminal, (30, 120))
    args = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, "--epochs", 1, "--limit_batches", 3]
    command = [str(part.python), "train.py", *map(str, args)]
    process = subprocess.Popen(command, cwd=part.folder, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    printed = b""
    with contextlib.suppress(OSError):  # how Linux says that nobody is left to write
        while text := os.read(screen, 4096):
            printed += text
    os.close(screen)
    assert process.wait() == 0, printed.decode()
    assert re.search(r"3/3 [^\r\n]*train_loss: \d\.\d", printed.decode())
    assert "epoch 1/1" in printed.decode()


def test_no_network_is_said_at_once(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, "--encoder", "resnet18"]
    nowhere = {"HOME": str(work_dir), "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = part.run("train.py", *args, code=2, **nowhere, NO_ALBUMENTATIONS_UPDATE="")
    assert "--encoder_weights none" in done.stderr and "--encoder_weights FILE" in done.stderr
    assert "Retrying" not in done.stderr
    assert "albumentations" not in done.stderr  # else it has asked the network for its newest version
    args += ["--encoder_weights", "none", "--log", "wandb"]
    done = part.run("train.py", *args, code=2, **nowhere, WANDB_MODE="online")
    assert "--log wandb: " in done.stderr and "WANDB_MODE=offline" in done.stderr


def test_all_folds(part: Part, data_root: Path, work_dir: Path, tmp_path: Path) -> None:
    folds = tmp_path / "folds"
    raw = tmp_path / "raw"
    shutil.copytree(data_root / "valid", raw)
    part.run("data_preparation.py", "--data_root", folds, "--raw", raw, "--folds", 2)
    args = ["--data_root", folds, "--work_dir", work_dir, *SMALL, "--batch_size", 4, "--epochs", 1]
    done = part.run("train.py", *args, "--fold", "all")
    table = pd.read_csv(work_dir / "lightning" / "folds.csv")
    assert table["fold"].tolist() == [0, 1]
    assert f"mean {table['iou'].mean():.4f}, standard deviation {table['iou'].std():.4f}" in done.stdout
    for fold in (0, 1):
        metrics = pd.read_csv(work_dir / "lightning" / f"fold{fold}" / "logs" / "metrics.csv")
        assert metrics["val_iou"].max() == pytest.approx(table["iou"][fold])
    # What fold 1 was not trained with is found, though it lies in train/.
    assert f"--images {folds} --fold 1" in done.stdout
    weights = work_dir / "lightning" / "fold1" / "weights" / "best.ckpt"
    part.run("predict.py", "--weights", weights, "--images", folds, "--fold", 1, "--output_dir", tmp_path / "fold1")
    tables = pd.concat([pd.read_csv(folds / "csv_file" / f"{side}.csv") for side in ("train", "valid")])
    names = {path.removeprefix("train/images/") for path in tables.loc[tables["fold"] == 1, "images"]}
    assert set(pd.read_csv(tmp_path / "fold1" / "metrics.csv")["file"]) == names
    again = part.run("train.py", *args, "--fold", "all", "--resume")  # nothing is left to do
    assert "== fold" not in again.stdout and "mean" in again.stdout
    more = part.run("train.py", *args, "--fold", "all", "--resume", "--epochs", 2, "--early_stopping", 50)
    assert "== fold 0" in more.stdout and "== fold 1" in more.stdout  # neither had stopped early
    other = part.run("train.py", *args, "--fold", 2, code=2)
    assert "--fold 2" in other.stderr
    none = part.run("train.py", "--data_root", data_root, *SMALL, "--fold", 0, code=2)
    assert "--folds 5" in none.stderr
