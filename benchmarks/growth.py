"""Does it stay as fast, and as small, when the work grows? 1,000 to 100,000 photographs, and 50 epochs.

    .venv-pt/bin/python benchmarks/growth.py

The photographs are links to 160 drawn ones; a run takes a few steps with each number of them. "Seconds in all" are from
the command to its end, so what the run with 100,000 has more of is what they cost at the start. Then a run of 50 short
epochs: its last ten against its second to eleventh. Needs all environments (make setup).
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from results import SMALL_MASK_RCNN, describe_machine, draw_data, run_train, save, spread

NUMBERS = [1_000, 10_000, 100_000]
EPOCHS, STEPS = 2, 20
LONG, LONG_STEPS = 50, 2
SMALL = ["--encoder_weights", "none", "--encoder", "resnet18", "--batch_size", 8]
PARTS: dict[str, list[Any]] = {
    "part1_tensorflow": [],
    "part3_lightning": [],
    "part7_mmdetection": ["--config", SMALL_MASK_RCNN],
}


def link_photographs(source: Path, data_root: Path, number: int) -> None:
    """A prepared data_root with `number` photographs for training and a fifth of that for validation."""
    for side, wanted in [("train", number), ("valid", number // 5)]:
        table = pd.read_csv(source / "csv_file" / f"{side}.csv", dtype=str, keep_default_na=False)
        copies = table.iloc[np.arange(wanted) % len(table)].reset_index(drop=True)
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
        original = originals[i % len(originals)]
        content["images"].append(original | {"id": i, "file_name": image})
        for annotation in of_image[original["id"]]:
            content["annotations"].append(annotation | {"id": len(content["annotations"]) + 1, "image_id": i})
    (data_root / "annotations").mkdir(exist_ok=True)
    (data_root / "annotations" / f"{side}.json").write_text(json.dumps(content))


def measure_numbers() -> None:
    """A few steps with each number of photographs."""
    rows, bars, figures = [], {}, {}
    for number in NUMBERS:
        for part, flags in PARTS.items():
            source = draw_data(part)
            data_root = Path(tempfile.mkdtemp(dir=source.parent))  # on the same disk, for the links
            link_photographs(source, data_root, number)
            length = ["--data_root", data_root, "--epochs", EPOCHS, "--limit_batches", STEPS, "--image_size", 64]
            done, metrics = run_train(part, *SMALL, *flags, *length)
            shutil.rmtree(data_root)
            speed, most = metrics["images_per_second"].iloc[-1], max(done.megabytes)
            figures[f"{part}, {number}"] = [speed, done.megabytes, done.seconds]
            rows.append([part, f"{number:,}", f"{most:,.0f}", f"{speed:.1f}", f"{done.seconds:.1f}"])
            bars[f"{part}, {number:,}"] = [most]
            print(" | ".join(rows[-1]), flush=True)
    regime = f"resnet18, 64 pixels, batch 8, float32, {EPOCHS} epochs of {STEPS} steps."
    columns = ["part", "photographs", "MB", "images/s in the last epoch", "seconds in all"]
    save("growth", describe_machine("torch", "tensorflow"), regime, columns, rows, bars, "MB", figures)


def measure_epochs() -> None:
    """Many short epochs."""
    rows, bars, figures = [], {}, {}
    for part in PARTS:
        length = ["--data_root", draw_data(part), "--epochs", LONG, "--limit_batches", LONG_STEPS, "--image_size", 64]
        done, metrics = run_train(part, *SMALL, *PARTS[part], *length)
        seconds, megabytes = metrics["seconds"].to_numpy(), np.array_split(done.megabytes, 10)
        early, late = seconds[1:11], seconds[-10:]
        figures[part] = [seconds.tolist(), done.megabytes]
        memory = [f"{np.median(megabytes[tenth]):,.0f}" for tenth in (4, 9)]
        times = [spread(early, ".2f"), spread(late, ".2f"), f"{np.median(late) / np.median(early):.3f}"]
        rows.append([part, *times, *memory])
        bars[f"{part}, epochs 2 to 11"], bars[f"{part}, epochs {LONG - 9} to {LONG}"] = early, late
        print(" | ".join(rows[-1]), flush=True)
    regime = f"resnet18, 64 pixels, batch 8, float32, {LONG} epochs of {LONG_STEPS} steps."
    late = f"epochs {LONG - 9} to {LONG}"
    columns = ["part", "epochs 2 to 11, s", f"{late}, s", "ratio of the medians", "MB in the middle", "MB at the end"]
    save("epochs", describe_machine("torch", "tensorflow"), regime, columns, rows, bars, "s an epoch", figures)


def main() -> None:
    """Measure both."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    measure_numbers()
    measure_epochs()


if __name__ == "__main__":
    main()
