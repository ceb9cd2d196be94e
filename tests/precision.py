"""Does a part reach with mixed precision what it reaches in float32? Trains it with three seeds in each.

    .venv-tf/bin/python tests/precision.py part3_lightning --forms bf16 fp16

It prints the best validation IoU of each run, their mean, and by how much that is better than in float32. On one seed
alone, chance would decide: any rounding leads to another run. On a CPU that does not multiply bfloat16, --imitate
spares hours: see imitated.py. Part 7 is not here: on a CPU, MMEngine has only float32.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from conftest import PARTS, ROOT, Part

SEEDS = (1, 2, 3)
PHOTOGRAPHS, EPOCHS = 200, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[part for part in PARTS if part != "part7_mmdetection"])
    parser.add_argument("--forms", nargs="+", choices=["bf16", "fp16"], default=["bf16"])
    parser.add_argument("--imitate", action="store_true", help="bf16 in float32 that is rounded, for older CPUs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        part, data_root = Part(args.part, folder), folder / "nails"
        draw = [part.python, ROOT / "sample_data.py", "--data_root", data_root, "--images", PHOTOGRAPHS]
        subprocess.run(list(map(str, draw)), check=True, capture_output=True)
        part.run("data_preparation.py", "--data_root", data_root)
        shutil.copy(ROOT / "tests" / "imitated.py", part.folder)
        flags = ["--data_root", data_root, *part.small, "--epochs", EPOCHS, "--learning_rate", part.learning_rate]
        flags += ["--optimizer", "adamw"] if part.ending == "h5" else ["--loss", "dice_bce"]
        if args.part == "part6_segformer":  # whose loss may leap otherwise, in float32 too: that would be chance
            flags += ["--learning_rate", "1e-3", "--gradient_clip", "1"]
        means = {}
        print(" | ".join(["part", "form", *[f"seed {seed}" for seed in SEEDS], "mean", "better than float32"]))
        for form in ["False", *args.forms]:
            best = []
            for seed in SEEDS:
                work_dir = folder / f"{form}{seed}"
                how = ["imitated.py"] if args.imitate and form == "bf16" else []
                command = [part.python, *how, "train.py", *flags, "--work_dir", work_dir, "--seed", seed]
                command += ["--mixed_precision", form]
                subprocess.run(list(map(str, command)), cwd=part.folder, check=True, stdout=subprocess.DEVNULL)
                best.append(pd.read_csv(part.run_dir(work_dir) / "logs" / "metrics.csv")["val_iou"].max())
            means[form] = np.mean(best)
            row = [args.part, form, *[f"{iou:.3f}" for iou in best], f"{means[form]:.3f}"]
            print(" | ".join([*row, f"{means[form] - means['False']:+.3f}"]), flush=True)


if __name__ == "__main__":
    main()
