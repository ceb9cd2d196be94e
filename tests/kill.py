"""Kills the training of a part again and again, at random moments, goes on with --resume, and compares the ends.

    .venv-tf/bin/python tests/kill.py part3_lightning

Half of the moments are drawn evenly from the time that a training takes, the others from the 20 ms after a file of a
checkpoint was begun. Each end has to be that of a training that nobody killed: every number in metrics.csv, but the
times, and every number in the checkpoints.
"""

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from conftest import PARTS, ROOT, Part, stop_group
from lightning_tests import SAME

EPOCHS = 4
TIMES = ["seconds", "images_per_second"]  # columns of metrics.csv
SAME_TENSORFLOW = """
import sys
import h5py
import numpy as np
import tensorflow as tf

def arrays(folder):
    reader = tf.train.load_checkpoint(folder)
    names = [name for name in reader.get_variable_to_shape_map() if "_OBJECT_GRAPH" not in name]
    found = {name: reader.get_tensor(name) for name in names}
    with h5py.File(f"{folder}/best.h5") as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found

one, other = arrays(sys.argv[1]), arrays(sys.argv[2])
assert one.keys() == other.keys()
print(len(one), [name for name, value in one.items() if not np.array_equal(value, other[name])])
"""


def wait_until_it_writes(weights: Path, checkpoint: int, is_over: float) -> None:
    """Wait until a file of so many checkpoints has been begun."""
    begun, before = 0, set()
    while begun < checkpoint and time.monotonic() < is_over:
        now = {path.name for path in weights.glob("*") if path.name.endswith((".tmp", "_temp", "new.h5"))}
        begun += len(now - before)
        before = now
        time.sleep(0.0005)


class Trial:
    """A part, small data, and the flags that all its trainings have."""

    def __init__(self, name: str, folder: Path) -> None:
        self.part, self.folder = Part(name, folder), folder
        self.data_root = folder / "nails"
        draw = [self.part.python, ROOT / "sample_data.py", "--data_root", self.data_root, "--images", 24]
        subprocess.run(list(map(str, draw)), check=True, capture_output=True)
        self.part.run("data_preparation.py", "--data_root", self.data_root)
        self.flags = [*self.part.small, "--batch_size", 4, "--epochs", EPOCHS, "--limit_batches", 4]
        if self.part.ending == "ckpt":
            self.flags += ["--encoder", self.part.with_dropout, "--ema", 0.9]

    def command(self, work_dir: Path, *more: str) -> list[str]:
        return [*map(str, ["train.py", "--data_root", self.data_root, "--work_dir", work_dir, *self.flags, *more])]

    def kill_and_resume(self, work_dir: Path, seconds: float, checkpoint: int | None) -> int | None:
        """Returns how many epochs had to be repeated; None if it came too late."""
        run_dir = self.part.run_dir(work_dir)
        process = self.part.start(*self.command(work_dir))
        began = time.monotonic()
        if checkpoint:
            wait_until_it_writes(run_dir / "weights", checkpoint, began + 60)
        time.sleep(seconds)
        stop_group(process.pid)
        process.communicate()
        if process.returncode != -9:
            return None  # it had ended before
        metrics = run_dir / "logs" / "metrics.csv"
        rows = len(pd.read_csv(metrics)) if metrics.exists() else 0
        begun = ["--resume"] if (run_dir / "config.json").exists() else []
        printed = self.part.run("train.py", *self.command(work_dir, *begun)[1:]).stdout
        first = re.search(r"^epoch (\d+)/", printed, re.IGNORECASE | re.MULTILINE)
        return rows - (int(first[1]) - 1 if first else EPOCHS)

    def differences(self, one: Path, other: Path) -> list[str]:
        """What is not the same at the end of two runs."""
        tables = [pd.read_csv(run_dir / "logs" / "metrics.csv").drop(columns=TIMES) for run_dir in (one, other)]
        found = [] if tables[0].equals(tables[1]) else ["metrics.csv"]
        script = self.part.folder / "same.py"
        if self.part.ending == "h5":
            script.write_text(SAME_TENSORFLOW)
            pairs = [(one / "weights", other / "weights")]
        else:
            script.write_text(SAME)
            files = [f"{name}.{self.part.ending}" for name in ("last", "best")]
            pairs = [(one / "weights" / file, other / "weights" / file) for file in files]
        for pair in pairs:
            number, different = self.part.run("same.py", *pair).stdout.split(" ", 1)
            assert int(number) > 50
            found += [] if different.strip() == "[]" else [f"{pair[0].name}: {different.strip()}"]
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(args.part, Path(folder))
        whole, again = Path(folder) / "whole", Path(folder) / "again"
        trial.part.run(*trial.command(whole))
        began = time.monotonic()
        trial.part.run(*trial.command(again))
        seconds = time.monotonic() - began
        runs = [trial.part.run_dir(work_dir) for work_dir in (whole, again)]
        print(
            f"{args.part}: {seconds:.1f} s; not the same in two runs: {trial.differences(*runs) or 'nothing'}",
            flush=True,
        )
        same = repeated_most = 0
        number = 0
        while number < args.times:
            work_dir = Path(folder) / f"killed{number}"
            if number % 2:
                how = (chance.uniform(0, 0.02), chance.randint(1, 2 * EPOCHS - 1))
            else:
                how = (chance.uniform(0, seconds), None)
            repeated = trial.kill_and_resume(work_dir, *how)
            if repeated is None:
                shutil.rmtree(work_dir)
                continue
            number += 1
            different = trial.differences(runs[0], trial.part.run_dir(work_dir))
            after = f"file {how[1]} of its checkpoints was begun" if how[1] else "it was started"
            print(f"  killed {how[0]:.3f} s after {after}: {repeated} epochs repeated; different: ", end="")
            print(different[:4] or "nothing", flush=True)
            same += not different
            repeated_most = max(repeated, repeated_most)
            shutil.rmtree(work_dir)
        print(f"{args.part}: {args.times} times killed, {same} the same end, at most {repeated_most} epoch repeated")
        sys.exit(same < args.times)


if __name__ == "__main__":
    main()
