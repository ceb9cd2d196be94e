"""What parts 3 to 6 do otherwise on a GPU: they read its results now and then only, and record passes of the network.

The first is tested without a GPU as well, as if there were one; the second only where there is one.
"""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import SMALL, Part

needs_gpu = pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="needs an NVIDIA GPU")


def change(part: Part, file: str, old: str, new: str) -> None:
    """Put something else in the place of what is there once in a file of the part."""
    path = part.folder / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def read_as_on_a_gpu(part: Part) -> None:
    """Let it read results as seldom as on a GPU."""
    change(part, "callbacks.py", 'on_gpu = trainer.strategy.root_device.type != "cpu"', "on_gpu = True")


def test_losses_that_nobody_has_read_are_looked_at_before_weights_are_saved(data_root: Path, tmp_path: Path) -> None:
    part = Part("part3_lightning", tmp_path)
    read_as_on_a_gpu(part)
    root = tmp_path / "nails"
    shutil.copytree(data_root, root)
    train = pd.read_csv(root / "csv_file" / "train.csv")
    steps = len(train) // 8
    args = ["--data_root", root, *SMALL, "--learning_rate", "1e30", "--loss", "cross_entropy", "--seed", 42]
    done = part.run("train.py", *args, "--work_dir", tmp_path / "to the end", code=1)
    assert f"by step {steps} of this epoch" in done.stderr  # the loss is nan from the second step on
    # The last photograph of the first epoch cannot be read: what was learned before it would be saved.
    last = np.random.default_rng([42, 0]).permutation(len(train))[8 * steps - 1]
    (root / train["images"][last]).write_bytes(b"")
    done = part.run("train.py", *args, "--work_dir", tmp_path / "interrupted", code=1)
    assert f"by step {steps - 1} of this epoch" in done.stderr
    assert not list(tmp_path.rglob("last.ckpt"))


COUNT = """
import atexit
from torch import Tensor

reads = dict.fromkeys(["item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"], 0)

def counted(name, read):
    def count(self, *words, **more):
        reads[name] += 1
        return read(self, *words, **more)
    return count

for name in reads:
    setattr(Tensor, name, counted(name, getattr(Tensor, name)))
atexit.register(lambda: print(*reads.values()))
"""


@pytest.mark.parametrize("name", ["part3_lightning", "part6_segformer"])
def test_most_steps_read_nothing(name: str, data_root: Path, tmp_path: Path) -> None:
    part = Part(name, tmp_path)
    read_as_on_a_gpu(part)
    change(part, "train.py", "from pathlib import Path\n", f"from pathlib import Path\n{COUNT}\n")
    small = [*part.small, "--batch_size", 4, "--workers", 0, "--epochs", 1]
    assert len(pd.read_csv(data_root / "csv_file" / "valid.csv")) <= 3 * 4  # so validation is the same for both
    reads = []
    for steps in (3, 9):
        work_dir = tmp_path / f"{steps} steps"
        done = part.run("train.py", "--data_root", data_root, *small, "--work_dir", work_dir, "--limit_batches", steps)
        reads.append(done.stdout.splitlines()[-1])
    assert reads[0] == reads[1]  # those of the first and the last step, and of validation


@pytest.mark.parametrize("name", ["part3_lightning", "part6_segformer"])
def test_no_loader_is_at_work_when_passes_are_recorded(name: str, data_root: Path, tmp_path: Path) -> None:
    part = Part(name, tmp_path)
    look = "print('threads and processes:', len(threading.enumerate()), len(multiprocessing.active_children()))"
    change(part, "compiling.py", "import shutil\n", "import multiprocessing\nimport shutil\nimport threading\n")
    start = "        if not self.is_possible:\n"
    change(part, "compiling.py", start, f"        {look}\n{start}")
    args = ["--data_root", data_root, "--work_dir", tmp_path / "work", *part.small, "--workers", 1]
    done = part.run("train.py", *args, "--epochs", 1, "--limit_batches", 1)
    assert "threads and processes: 1 0" in done.stdout.splitlines()


FULL = """
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        finally:  # what the end of a recording says then
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
"""


def test_a_gpu_that_is_full_while_recording(data_root: Path, tmp_path: Path) -> None:
    part = Part("part3_lightning", tmp_path)
    change(part, "compiling.py", "\n        if not self.is_possible:\n            return\n", FULL)
    done = part.run("train.py", "--data_root", data_root, *SMALL, "--work_dir", tmp_path / "work", code=1)
    assert "out of memory; try a smaller --batch_size" in done.stderr


def train(part: Part, data_root: Path, *flags: object) -> tuple[pd.DataFrame, list[str]]:
    """The metrics of two epochs, and the lines that were printed."""
    work_dir = part.folder / "work_dir"
    args = ["--data_root", data_root, "--work_dir", work_dir, *part.small, "--learning_rate", 1e-4, "--epochs", 2]
    done = part.run("train.py", *args, *flags)
    assert "AccumulateGrad" not in done.stderr  # torch's warning of the stream on which gradients are recorded
    return pd.read_csv(part.run_dir(work_dir) / "logs" / "metrics.csv"), done.stdout.splitlines()


@needs_gpu
@pytest.mark.parametrize("name", ["part3_lightning", "part4_kornia", "part6_segformer"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("more", [[], ["--ema", 0.9, "--gradient_clip", 1]], ids=["", "ema and clip"])
def test_recorded_passes_train_as_others_do(
    name: str, precision: str, more: list[object], data_root: Path, tmp_path: Path
) -> None:
    part, unrecorded = Part(name, tmp_path / "recorded"), Part(name, tmp_path / "plain")
    flags = ["--mixed_precision", precision.replace("fp32", "False"), *more]
    change(part, "compiling.py", "recorded = network.forward\n", "recorded = network.forward; print('recorded')\n")
    recorded, printed = train(part, data_root, *flags)
    assert "recorded" in printed
    change(unrecorded, "compiling.py", 'self.is_possible = args.device[0] != "cpu"', "self.is_possible = False")
    plain, _ = train(unrecorded, data_root, *flags)
    assert plain["train_loss"].iloc[0] > 1.02 * plain["train_loss"].iloc[-1]  # more than what they may differ by
    for loss in ["train_loss", "val_loss"]:
        assert recorded[loss].tolist() == pytest.approx(plain[loss].tolist(), rel=0.01)


@needs_gpu
@pytest.mark.parametrize("when", ["True", "not module.training"])
def test_a_network_that_looks_at_results_trains_unrecorded(when: str, data_root: Path, tmp_path: Path) -> None:
    part = Part("part3_lightning", tmp_path)
    look = f"lambda module, images, features: print('!') if {when} and features[0].isnan().all() else None"
    hook = f"network.encoder.register_forward_hook({look})"
    end = "    # Convolutions are faster when"
    change(part, "model.py", end, f"    {hook}\n{end}")
    metrics, printed = train(part, data_root)
    assert any("cannot be recorded" in line for line in printed)
    assert metrics["train_loss"].notna().all()
