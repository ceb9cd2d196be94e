"""Does it stay as fast, and as small, when the work grows? 1,000 to 100,000 photographs, and 50 epochs.

    .venv-pt/bin/python benchmarks/growth.py

The photographs are 192 drawn ones, each with up to 521 paths, through links to their folders. Runs with each number of
them start one by one, where a start is quick those with the least and the most twice; then the last ones take turns,
epoch by epoch.
Images per second are those of train.py, of training without validation. Then 50 short epochs: the last four of one run
take turns with the second to fifth of another one, which is the same but for its age. Before that, all parts train at
the same time, each in one thread. Needs all environments (make setup).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from results import SMALL_MASK_RCNN, describe_machine, draw_data, save, spread
from trainings import MEMORY_DISK, ONE_THREAD, Training, go_on_together, start_train
from turns import rounds
from usage import session_megabytes

NUMBERS = [1_000, 10_000, 100_000]
STEPS = 4
STARTS = (1, 2, 30)  # at least and at most so many; no second one if the first ones took so many seconds
LEAST, ROUNDS, SECONDS = 3, 8, 20  # at least and at most so many epochs; in between none after so many seconds
LONG, COMPARED, LONG_STEPS = 50, 4, 1
SMALL = ["--encoder_weights", "none", "--encoder", "resnet18", "--batch_size", 4, "--image_size", 64]
SMALL += ["--mixed_precision", "False"]
PARTS: dict[str, list[Any]] = {
    "part1_tensorflow": [],
    "part3_lightning": [],
    "part7_mmdetection": ["--config", SMALL_MASK_RCNN],
}


def link_photographs(source: Path, data_root: Path, number: int) -> None:
    """A prepared data_root with `number` photographs for training and a fifth of that for validation.

    Each link to the folder of the drawn ones gives all of them another path. The copies of a photograph follow each
    other. So those that part 7 uses, evenly spread, are the same with each number.
    """
    for side, wanted in [("train", number), ("valid", number // 5)]:
        table = pd.read_csv(source / "csv_file" / f"{side}.csv", dtype=str, keep_default_na=False)
        copies = table.iloc[np.arange(wanted) * len(table) // wanted].reset_index(drop=True)
        link = copies.groupby("images").cumcount().astype(str)
        for column in ("images", "masks"):
            folder = data_root / side / column
            folder.mkdir(parents=True)
            for name in link.unique():
                (folder / name).symlink_to(source / side / column)
            copies[column] = f"{side}/{column}/" + link + copies[column].str.removeprefix(f"{side}/{column}")
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


def start_alone(part: str, data_root: Path, work_dir: Path) -> tuple[Training, float]:
    """A run that has done its first epoch, and the seconds from its start to the beginning of that epoch."""
    # The last epoch, which also draws predictions, is not waited for.
    length = ["--epochs", ROUNDS + 2, "--limit_batches", STEPS]
    began = time.perf_counter()
    run = start_train(part, work_dir, *SMALL, *PARTS[part], *length, "--data_root", data_root)
    run.go_on(look=True)
    return run, time.perf_counter() - began - run.metrics()["seconds"].iloc[0]


def start_each(part: str, data: Path, work_dir: Path) -> tuple[dict[int, Training], dict[int, list[float]]]:
    """For each number of photographs the last run, and the seconds of its starts."""
    runs: dict[int, Training] = {}
    seconds: dict[int, list[float]] = {number: [] for number in NUMBERS}
    for start in rounds(*STARTS):
        # What is between the least and the most starts only once: each start takes ten seconds.
        for number in [NUMBERS[0], NUMBERS[-1]] if start else NUMBERS:
            if start:
                runs[number].end()
            runs[number], took = start_alone(part, data / f"{number}", work_dir / f"{number}, start {start}")
            seconds[number].append(took)
    return runs, seconds


def measure_numbers() -> None:
    """A few steps with each number of photographs."""
    rows, bars, figures = [], {}, {}
    for part in PARTS:
        source = draw_data(part)
        with (
            tempfile.TemporaryDirectory() as data,
            tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder,
        ):
            for number in NUMBERS:
                link_photographs(source, Path(data) / f"{number}", number)
            runs, seconds = start_each(part, Path(data), Path(folder))
            for _ in rounds(LEAST, ROUNDS, SECONDS):
                for run in runs.values():
                    run.go_on()
                    run.look()
            for run in runs.values():
                run.end()
            speeds = {number: run.metrics()["images_per_second"].to_numpy()[1:] for number, run in runs.items()}
        for number, run in runs.items():
            speed, started = speeds[number], seconds[number]
            figures[f"{part}, {number}"] = {"MB": run.megabytes, "started": started, "images/s": speed.tolist()}
            is_least = number == NUMBERS[0]
            later = np.subtract(started, seconds[NUMBERS[0]][: len(started)])
            cells = [
                f"{run.megabytes:,.0f}",
                spread(speed, ".1f"),
                "1" if is_least else spread(speed / speeds[NUMBERS[0]], ".2f"),
                spread(started, ".1f"),
                "" if is_least else spread(later, "z.1f"),  # z: no -0.0
            ]
            rows.append([part, f"{number:,}", *cells])
            bars[f"{part}, {number:,}"] = run.megabytes
            print(" | ".join(rows[-1]), flush=True)
    regime = f"resnet18, 64 pixels, batch 4, float32; at most {ROUNDS} epochs of {STEPS} steps."
    columns = ["part", "photographs", "most MB", "images/s", "beside those with 1,000, median (range)"]
    columns += ["s to the first epoch", "more than with 1,000"]
    save("growth", describe_machine("torch", "tensorflow"), regime, columns, rows, bars, "MB", figures)


AGES = ["young", "old"]
LITTLE = 1e-5  # The runs of many epochs learn next to nothing, so each epoch has the same to do.


def start_long(part: str, work_dir: Path) -> Training:
    """A run of many short epochs, in one thread, because several networks at a time would disturb each other."""
    length = ["--epochs", LONG, "--limit_batches", LONG_STEPS, "--learning_rate", LITTLE]
    return start_train(part, work_dir, *SMALL, *PARTS[part], *length, "--data_root", draw_data(part), **ONE_THREAD)


def measure_epochs() -> None:
    """Early epochs against late ones, in turns."""
    rows, bars, figures = [], {}, {}
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:
        young, old = ({part: start_long(part, Path(folder) / f"{part}, {age}") for part in PARTS} for age in AGES)
        go_on_together([*young.values(), *old.values()])
        go_on_together(old.values(), rows=9)
        megabytes = {part: [session_megabytes(run.process.pid)] for part, run in old.items()}
        go_on_together(old.values(), rows=LONG - COMPARED - 10)
        for part, run in old.items():
            megabytes[part].append(session_megabytes(run.process.pid))
            # 2 with 47, 3 with 48, ...: every fifth one also draws predictions.
            turns = np.array([young[part].go_on() + run.go_on() for _ in range(COMPARED)])
            young[part].end()
            run.end()
            figures[part] = {"seconds": turns.tolist(), "megabytes": megabytes[part]}
            early, late = turns.T
            cells = [spread(early, ".2f"), spread(late, ".2f"), spread(late / early, ".3f")]
            rows.append([part, *cells, *(f"{size:,.0f}" for size in megabytes[part])])
            bars[f"{part}, early"], bars[f"{part}, late"] = early, late
            print(" | ".join(rows[-1]), flush=True)
    regime = "resnet18, 64 pixels, batch 4, float32; one thread; "
    regime += f"{LONG} epochs, each of {LONG_STEPS} step, validation and saving."
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
