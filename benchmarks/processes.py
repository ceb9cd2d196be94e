"""A network on each of two cores, against one network on one core: what is gained, and what gets in the way.

    .venv-pt/bin/python benchmarks/processes.py

"One" is a run that may use one core only, for its loader as well. "Two" is --device cpu cpu on two cores, with the same
batch for each: two processes in part 3, and in part 1 two replicas of the network in one process, as MirroredStrategy
has them. "Apart" is two runs at the same time that know nothing of each other, each on a core of its own: what it is
slower by than twice one is lost to what the cores share, such as memory. What "two" is slower by than that is lost to
being one run: to the exchange of gradients, to waiting for the slower one, and in part 1 to a loader that both share.
The three of a part take turns, epoch by epoch, and a ratio is that of neighbours; only their first epoch is at the same
time, with those of the other part. Images per second are those of train.py, of training without validation. Needs all
environments (make setup), and two cores.
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np

from results import CORES, describe_machine, draw_data, save, spread
from trainings import MEMORY_DISK, ONE_THREAD, Training, go_on_together, start_train
from turns import rounds

BATCH_SIZE, STEPS = 8, 4
LEAST, ROUNDS, SECONDS = 2, 4, 20  # at least and at most so many; in between none after so many seconds
SMALL = ["--encoder", "resnet18", "--encoder_weights", "none", "--image_size", 64, "--workers", 1]
LENGTH = ["--epochs", 2 * ROUNDS + 1, "--limit_batches", STEPS]
PARTS = ["part1_tensorflow", "part3_lightning"]


def start(part: str, cores: set[int], work_dir: Path) -> Training:
    """A run with a network for each of these cores."""
    devices = ["--device", *["cpu"] * len(cores), "--batch_size", len(cores) * BATCH_SIZE]
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # the run inherits it
    run = start_train(part, work_dir, "--data_root", draw_data(part), *SMALL, *LENGTH, *devices, **ONE_THREAD)
    os.sched_setaffinity(0, all_cores)
    return run


def last_speed(run: Training) -> float:
    """Images per second of its last epoch."""
    return run.metrics()["images_per_second"].iloc[-1]


def start_each(part: str, work_dir: Path) -> dict[str, Training]:
    """The runs of a part."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    cores = {"one": {first}, "another": {second}, "two": {first, second}}
    return {name: start(part, its, work_dir / name) for name, its in cores.items()}


def measure(one: Training, another: Training, two: Training) -> dict[str, list[float]]:
    """Images per second of "one", "apart" and "two", in each round."""
    speeds: dict[str, list[float]] = {"one": [], "apart": [], "two": []}
    for _ in rounds(LEAST, ROUNDS, SECONDS):
        one.go_on()
        speeds["one"].append(last_speed(one))
        go_on_together([one, another])
        speeds["apart"].append(last_speed(one) + last_speed(another))
        two.go_on()
        speeds["two"].append(last_speed(two))
    for run in (one, another, two):
        run.end()
    return speeds


def main() -> None:
    """Measure both parts."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if CORES < 2:
        print("there is only one core here: not measured")
        return
    rows, bars, figures = [], {}, {}
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:
        runs = {part: start_each(part, Path(folder) / part) for part in PARTS}
        go_on_together([run for its in runs.values() for run in its.values()])  # the first epoch does not count
        for part, its in runs.items():
            figures[part] = measure(**its)
            one = np.array(figures[part]["one"])
            for name, speeds in figures[part].items():
                of_twice_one = "" if name == "one" else spread(speeds / one / 2, ".2f")
                rows.append([part, name, spread(speeds, ".1f"), of_twice_one])
                bars[f"{part}, {name}"] = speeds
                print(" | ".join(rows[-1]), flush=True)
    regime = f"U-Net, resnet18, 64 pixels, batch {BATCH_SIZE} a network, float32; "
    regime += f"at most {ROUNDS} epochs of {STEPS} steps."
    columns = ["part", "networks", "images/s, median (range)", "beside twice one, median (range)"]
    save("processes", describe_machine("torch", "tensorflow"), regime, columns, rows, bars, "images/s", figures)


if __name__ == "__main__":
    main()
