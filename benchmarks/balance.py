"""Does balancing help? Part 2 with and without it, from the same start, with the same number of steps.

    .venv-tf/bin/python sample_data.py --data_root data/balance --images 480
    .venv-tf/bin/python part2_balanced_data/data_preparation.py --data_root data/balance --valid_fraction 0.5
    .venv-tf/bin/python benchmarks/balance.py --data_root data/balance

Balancing and the strong augmentation, which comes with it, are measured one by one. Half of the
photographs are for validation, because a fifth of the smallest source would be three. For each seed
all runs start with the same weights; seeds differ in these and in what is drawn, but not in the
split. Compared are last epochs, not best ones, so nothing is chosen by what is compared. Draws
part2_balanced_data/imgs/balance.png, prints a table and writes balance.json. 40 minutes on 2 cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from results import describe_machine

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
FLAGS = ["--encoder", "resnet18", "--encoder_weights", "none", "--image_size", "96", "--batch_size", "8"]
FLAGS += ["--optimizer", "adamw", "--learning_rate", "3e-3", "--cache", "memory", "--epochs", "10"]
# Name: flags, colour. With "none" no source is drawn often enough for the strong augmentation.
ARMS = {
    "none": (["none"], "tab:blue"),
    "uniform": (["uniform", "--strong_augmentation", "none"], "tab:green"),
    "uniform, strong augmentation": (["uniform"], "tab:orange"),
}
SEEDS = [1, 2, 3]
PANELS = {
    "val_iou": "IoU, all",
    "val_f1": "F1, all",
    "val_macro_iou": "IoU, macro",
    "val_worst_iou": "IoU, worst source",
}


def train(data_root: Path, balance: list[str], seed: int) -> pd.DataFrame:
    """Train once and return metrics.csv."""
    with tempfile.TemporaryDirectory() as work_dir:
        command = [sys.executable, ROOT / "part2_balanced_data" / "train.py", "--data_root", data_root]
        command += ["--work_dir", work_dir, *FLAGS, "--seed", seed, "--balance", *balance]
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
        return pd.read_csv(Path(work_dir) / "balanced" / "logs" / "metrics.csv")


def draw(runs: dict[str, list[pd.DataFrame]], file: Path) -> None:
    """Each metric over the epochs: the mean of the seeds as a line, their range as a band."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(14, 3.5), sharey=True, layout="constrained")
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        for arm, tables in runs.items():
            values = np.array([table[name] for table in tables])
            epochs, colour = tables[0]["epoch"], ARMS[arm][1]
            axes.plot(epochs, values.mean(axis=0), color=colour, label=arm)
            axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(file, dpi=80)
    plt.close(figure)


def print_table(runs: dict[str, list[pd.DataFrame]]) -> None:
    """The last epochs, and by how much each arm differs from "none", seed by seed."""
    print(f"| last epoch, mean of {len(SEEDS)} seeds | {' | '.join(runs)} |\n|---|{'---|' * len(runs)}")
    of_sources = [name for name in runs["none"][0] if name.startswith("val_iou/")]
    for name in [*PANELS, *of_sources]:
        cells = []
        for arm, tables in runs.items():
            last = np.array([table[name].iloc[-1] for table in tables])
            none = np.array([table[name].iloc[-1] for table in runs["none"]])
            differences = "" if arm == "none" else f" ({', '.join(f'{change:+.2f}' for change in last - none)})"
            cells.append(f"{last.mean():.3f}{differences}")
        print(f"| {PANELS.get(name, name.replace('val_iou/', 'IoU, source '))} | {' | '.join(cells)} |")


def main() -> None:
    """Train all runs, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True)
    args = parser.parse_args()
    runs: dict[str, list[pd.DataFrame]] = {arm: [] for arm in ARMS}
    for seed in SEEDS:
        for arm, (balance, _) in ARMS.items():
            runs[arm].append(train(args.data_root, balance, seed))
            last = runs[arm][-1].iloc[-1]
            scores = ", ".join(f"{title} {last[name]:.3f}" for name, title in PANELS.items())
            print(f"seed {seed}, {arm}: {scores}", flush=True)
    print_table(runs)
    draw(runs, ROOT / "part2_balanced_data" / "imgs" / "balance.png")
    train_csv = pd.read_csv(args.data_root / "csv_file" / "train.csv", dtype={"source": str})
    about = {
        "date": str(date.today()),
        "machine": describe_machine("tensorflow"),
        "flags": " ".join(FLAGS),
        "photographs": train_csv["source"].value_counts(sort=False).to_dict(),
        "seeds": SEEDS,
        "runs": {arm: [table.to_dict("list") for table in tables] for arm, tables in runs.items()},
    }
    (Path(__file__).parent / "balance.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
