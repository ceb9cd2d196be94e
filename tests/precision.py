"""Does a part reach with mixed precision what it reaches in float32? Trains it with three seeds in each.

    .venv-tf/bin/python tests/precision.py part3_lightning --forms bf16 fp16

It prints the best validation IoU of each run, and the means. On one seed alone, chance would decide: any rounding leads
to another run.
"""

import argparse
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
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--forms", nargs="+", choices=["bf16", "fp16"], default=["bf16"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        part, data_root = Part(args.part, folder), folder / "nails"
        draw = [part.python, ROOT / "sample_data.py", "--data_root", data_root, "--images", PHOTOGRAPHS]
        subprocess.run(list(map(str, draw)), check=True, capture_output=True)
        part.run("data_preparation.py", "--data_root", data_root)
        flags = ["--data_root", data_root, *part.small, "--epochs", EPOCHS, "--learning_rate", part.learning_rate]
        flags += ["--optimizer", "adamw"] if part.ending == "h5" else ["--loss", "dice_bce"]
        means = {}
        for form in ["False", *args.forms]:
            best = []
            for seed in SEEDS:
                work_dir = folder / f"{form}{seed}"
                part.run("train.py", *flags, "--work_dir", work_dir, "--seed", seed, "--mixed_precision", form)
                best.append(pd.read_csv(part.run_dir(work_dir) / "logs" / "metrics.csv")["val_iou"].max())
            means[form] = np.mean(best)
            row = [args.part, form, *[f"{iou:.3f}" for iou in best], f"{means[form]:.3f}"]
            print(" | ".join([*row, f"{means[form] - means['False']:+.3f}"]), flush=True)


if __name__ == "__main__":
    main()
