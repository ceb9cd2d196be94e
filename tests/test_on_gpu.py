"""What only a GPU shows: passes that are recorded. Without one, these tests are skipped."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from conftest import Part

pytestmark = pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="needs an NVIDIA GPU")


def train(part: Part, data_root: Path, work_dir: Path, *flags: object) -> tuple[pd.DataFrame, str]:
    """The metrics of two epochs, and what was printed."""
    args = ["--data_root", data_root, "--work_dir", work_dir, *part.small, "--learning_rate", 1e-4, "--epochs", 2]
    done = part.run("train.py", *args, *flags)
    assert "Warning" not in done.stderr
    return pd.read_csv(part.run_dir(work_dir) / "logs" / "metrics.csv"), done.stdout


def change(part: Part, file: str, old: str, new: str) -> None:
    path = part.folder / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("name", ["part3_lightning", "part4_kornia", "part6_segformer"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_recorded_passes_train_as_others_do(name: str, precision: str, data_root: Path, tmp_path: Path) -> None:
    part = Part(name, tmp_path)
    flags = ["--mixed_precision", precision.replace("fp32", "False"), "--ema", 0.9, "--gradient_clip", 1]
    recorded, _ = train(part, data_root, tmp_path / "recorded", *flags)
    change(part, "compiling.py", 'self.is_possible = args.device[0] != "cpu"', "self.is_possible = False")
    plain, _ = train(part, data_root, tmp_path / "plain", *flags)
    for loss in ["train_loss", "val_loss"]:
        assert recorded[loss].tolist() == pytest.approx(plain[loss].tolist(), rel=0.01)


def test_a_network_that_looks_at_results_trains_unrecorded(data_root: Path, tmp_path: Path) -> None:
    part = Part("part3_lightning", tmp_path)
    look = "lambda module, images, features: None if features[0].isfinite().all() else features"
    hook = f"network.encoder.register_forward_hook({look})"
    end = "    # Convolutions are faster when"
    change(part, "model.py", end, f"    {hook}\n{end}")
    metrics, printed = train(part, data_root, tmp_path / "work")
    assert "cannot be recorded" in printed
    assert metrics["train_loss"].notna().all()
