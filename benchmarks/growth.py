"""Does it stay as fast, and as small, when the work grows? 1,000 to 100,000 photographs, and 50 epochs.

    .venv-pt/bin/python benchmarks/growth.py

The photographs are links to 192 drawn ones; a run takes a few steps with each number of them. Seconds beside the epochs
are those of start and end, so what the run with 100,000 has more of is what they cost at the start. Then 50 short
epochs: the last ones of one run take turns, epoch by epoch, with the second to tenth of another one, which is the same
but for its age. Needs all environments (make setup).
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import numpy as np
import pandas as pd

from results import (
    ROOT,
    SMALL_MASK_RCNN,
    describe_machine,
    draw_data,
    python_of,
    run_train,
    save,
    session_megabytes,
    spread,
)
from turns import InTurns

NUMBERS = [1_000, 10_000, 100_000]
EPOCHS, STEPS = 3, 4
LONG, COMPARED, LONG_STEPS = 50, 9, 1
SMALL = ["--encoder_weights", "none", "--encoder", "resnet18", "--batch_size", 4, "--image_size", 64]
PARTS: dict[str, list[Any]] = {
    "part1_tensorflow": [],
    "part3_lightning": [],
    "part7_mmdetection": ["--config", SMALL_MASK_RCNN],
}


def link_photographs(source: Path, data_root: Path, number: int) -> None:
    """A prepared data_root with `number` photographs for training and a fifth of that for validation.

    Copies of a photograph follow each other. So those that part 7 uses, evenly spread, are the same with each number.
    """
    for side, wanted in [("train", number), ("valid", number // 5)]:
        table = pd.read_csv(source / "csv_file" / f"{side}.csv", dtype=str, keep_default_na=False)
        copies = table.iloc[np.arange(wanted) * len(table) // wanted].reset_index(drop=True)
        for column in ("images", "masks"):
            new = [f"{side}/{column}/0/{i:06d}.png" for i in range(wanted)]
            (data_root / new[0]).parent.mkdir(parents=True)
            for old, path in zip(copies[column], new, strict=True):
                os.link(source / old, data_root / path)
            copies[column] = new
        (data_root / "csv_file").mkdir(exist_ok=True)
        copies["source"] = "0"
        copies.to_csv(data_root / "csv_file" / f"{side}.csv", index=False)
        if side == "train":
            copies.to_csv(data_root / "csv_file" / "train0.csv", index=False)
        if (source / "annotations").exists():
            copy_annotations(source, data_root, side, copies["images"].tolist())


def copy_annotations(source: Path, data_root: Path, side: str, images: list[str]) -> None:
    """The annotations of the photographs that these are copies of."""
    content = json.loads((source / "annotations" / f"{side}.json").read_text())
    of_image: dict[int, list[dict[str, Any]]] = {entry["id"]: [] for entry in content["images"]}
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    originals, content["images"], content["annotations"] = content["images"], [], []
    for i, image in enumerate(images):
        original = originals[i * len(originals) // len(images)]
        content["images"].append(original | {"id": i, "file_name": image})
        for annotation in of_image[original["id"]]:
            content["annotations"].append(annotation | {"id": len(content["annotations"]) + 1, "image_id": i})
    (data_root / "annotations").mkdir(exist_ok=True)
    (data_root / "annotations" / f"{side}.json").write_text(json.dumps(content))


def measure_numbers() -> None:
    """A few steps with each number of photographs."""
    rows, bars, figures = [], {}, {}
    length = ["--epochs", EPOCHS, "--limit_batches", STEPS]
    for part, flags in PARTS.items():
        source = draw_data(part)
        for number in NUMBERS:
            data_root = Path(tempfile.mkdtemp(dir=source.parent))  # on the same disk, for the links
            link_photographs(source, data_root, number)
            done, metrics = run_train(part, *SMALL, *flags, *length, "--data_root", data_root, look_every=0.5)
            shutil.rmtree(data_root)
            figures[f"{part}, {number}"] = {"run": done._asdict(), "metrics": metrics.to_dict("list")}
            speeds, beside = metrics["images_per_second"][1:], done.seconds - metrics["seconds"].sum()
            rows.append([part, f"{number:,}", f"{max(done.megabytes):,.0f}", spread(speeds, ".1f"), f"{beside:.1f}"])
            bars[f"{part}, {number:,}"] = max(done.megabytes)
            print(" | ".join(rows[-1]), flush=True)
    regime = f"resnet18, 64 pixels, batch 4, float32, {EPOCHS} epochs of {STEPS} steps."
    columns = ["part", "photographs", "most MB", "images/s after the first epoch", "s beside the epochs"]
    save("growth", describe_machine("torch", "tensorflow"), regime, columns, rows, bars, "MB", figures)


# The runs of many epochs. Where they can, they write to memory, because what a disk does, it does later; and they learn
# next to nothing, so each epoch has the same to do.
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
LITTLE = 1e-5


class Run(InTurns):
    """A run of train.py with many short epochs, which once started goes on only while an epoch is measured."""

    def __init__(self, part: str, work_dir: Path) -> None:
        length = ["--epochs", LONG, "--limit_batches", LONG_STEPS, "--learning_rate", LITTLE]
        words = [*SMALL, *PARTS[part], *length, "--data_root", draw_data(part), "--work_dir", work_dir]
        self.metrics = work_dir / part.split("_")[1] / "logs" / "metrics.csv"
        super().__init__([python_of(part), ROOT / part / "train.py", *words], stdout=DEVNULL, stderr=DEVNULL)

    def epochs(self) -> int:
        """How many are done."""
        return len(self.metrics.read_text().splitlines()) - 1 if self.metrics.exists() else 0

    def go_on(self, until: int) -> float:
        """Let it train until so many epochs are done, and return the seconds.

        Raises:
            SystemExit: it has ended instead.
        """
        time.sleep(0.3)  # what the one before it has left for the system to do
        with self.turn():
            began = time.perf_counter()
            while self.epochs() < until:
                if self.process.poll() is not None:
                    raise SystemExit(f"{' '.join(self.words)}\nended with {self.process.returncode}")
                time.sleep(0.002)
            return time.perf_counter() - began


def measure_epochs() -> None:
    """Early epochs against late ones, in turns."""
    rows, bars, figures = [], {}, {}
    for part in PARTS:
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
            young, old = Run(part, Path(folder) / "young"), Run(part, Path(folder) / "old")
            young.go_on(1)
            old.go_on(10)
            megabytes = [session_megabytes(old.process.pid)]
            old.go_on(LONG - COMPARED)
            megabytes.append(session_megabytes(old.process.pid))
            # 2 with 42, 3 with 43, ...: every fifth one also draws predictions.
            turns = np.array(
                [[young.go_on(number), old.go_on(LONG - 10 + number)] for number in range(2, COMPARED + 2)]
            )
            young.end()
            old.end()
        figures[part] = {"seconds": turns.tolist(), "megabytes": megabytes}
        early, late = turns.T
        cells = [spread(early, ".2f"), spread(late, ".2f"), spread(late / early, ".3f")]
        rows.append([part, *cells, *(f"{size:,.0f}" for size in megabytes)])
        bars[f"{part}, early"], bars[f"{part}, late"] = early, late
        print(" | ".join(rows[-1]), flush=True)
    regime = f"resnet18, 64 pixels, batch 4, float32, {LONG} epochs of {LONG_STEPS} steps."
    columns = ["part", f"epochs 2 to {COMPARED + 1}, s", f"epochs {LONG - COMPARED + 1} to {LONG}, s"]
    columns += ["late to early, median (range)", "MB after 10", f"MB after {LONG - COMPARED}"]
    save("epochs", describe_machine("torch", "tensorflow"), regime, columns, rows, bars, "s an epoch", figures)


def main() -> None:
    """Measure both."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    measure_numbers()
    measure_epochs()


if __name__ == "__main__":
    main()
