"""Seconds for an epoch of part 1, as the article's table has them: batch size, precision, devices.

    .venv-tf/bin/python benchmarks/epochs.py --data_root data/nails

Runs train.py once for each row, leaves out the first epoch (TensorFlow builds its graph in it), and
prints the median and the range of the others. Writes epochs.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import pandas as pd

from machine import describe_machine, multiplies_bf16, spread

ROOT = Path(__file__).parents[1]
NETWORK = ["--encoder", "resnet18", "--encoder_weights", "none", "--image_size", "128"]
EPOCHS = 4
ROWS = [  # batch size, --mixed_precision, --device
    (8, "False", ["cpu"]),
    (8, "bf16", ["cpu"]),
    (16, "False", ["cpu"]),
    (16, "bf16", ["cpu"]),
    (16, "False", ["cpu", "cpu"]),
]


def epoch_seconds(data_root: Path, batch_size: int, precision: str, devices: list[str]) -> pd.Series:
    """Train a few epochs and return the seconds of all but the first."""
    with tempfile.TemporaryDirectory() as work_dir:
        command = [
            sys.executable,
            ROOT / "part1_tensorflow" / "train.py",
            "--data_root",
            data_root,
            "--work_dir",
            work_dir,
        ]
        flags = ["--batch_size", batch_size, "--mixed_precision", precision, "--device", *devices, "--epochs", EPOCHS]
        subprocess.run([str(word) for word in [*command, *NETWORK, *flags]], check=True, capture_output=True)
        metrics = pd.read_csv(Path(work_dir) / "tensorflow" / "logs" / "metrics.csv")
    return metrics["seconds"].iloc[1:]


def main() -> None:
    """Measure all rows and print them as a table for a README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True)
    args = parser.parse_args()
    about = {
        "date": str(date.today()),
        "machine": describe_machine("tensorflow"),
        "regime": f"{' '.join(NETWORK)}, {len(pd.read_csv(args.data_root / 'csv_file' / 'train.csv'))} photographs",
        "rows": [],
    }
    print("| batch size | precision | devices | seconds per epoch, median (range) |\n|---|---|---|---|")
    for batch_size, precision, devices in ROWS:
        if precision == "bf16" and not multiplies_bf16():
            continue
        seconds = epoch_seconds(args.data_root, batch_size, precision, devices)
        row = [batch_size, "float32" if precision == "False" else "bfloat16", len(devices)]
        about["rows"].append([*row, seconds.tolist()])
        print(f"| {' | '.join(map(str, row))} | {spread(seconds, '.1f')} |", flush=True)
    (Path(__file__).parent / "epochs.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
