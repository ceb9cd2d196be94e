"""Two processes on two cores, against one: what is gained, and what gets in the way.

    .venv-pt/bin/python benchmarks/processes.py

Each operation calculates with one thread. "One" has one process. "Two" is --device cpu cpu with the same batch for
each: two processes in part 3, and in part 1 two replicas of the network in one process, as MirroredStrategy has them.
"Apart" is two runs of one process at the same time, which do not know of each other: what it is slower by than twice
one is lost to memory and to loaders that share the cores with the networks; what "two" is slower by than that is lost
to the exchange of gradients. Needs all environments (make setup).
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from results import describe_machine, draw_data, run_train, save, spread

BATCH_SIZE, EPOCHS, STEPS = 8, 4, 5
SMALL = ["--encoder", "resnet18", "--encoder_weights", "none", "--image_size", 64, "--workers", 1]
LENGTH = ["--epochs", EPOCHS, "--limit_batches", STEPS]
PARTS = ["part1_tensorflow", "part3_lightning"]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}


def images_per_second(part: str, processes: int) -> np.ndarray:
    """Of all epochs but the first."""
    devices = ["--device", *["cpu"] * processes, "--batch_size", processes * BATCH_SIZE]
    metrics = run_train(
        part, "--data_root", draw_data(part), *SMALL, *LENGTH, *devices, look_every=0, **ONE_THREAD
    ).metrics
    return metrics["images_per_second"].to_numpy()[1:]


def main() -> None:
    """Measure both parts."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows, bars, figures = [], {}, {}
    for part in PARTS:
        one = images_per_second(part, 1)
        with ThreadPoolExecutor(2) as pool:
            apart = np.sum(list(pool.map(lambda part: images_per_second(part, 1), [part, part])), axis=0)
        two = images_per_second(part, 2)
        figures[part] = {"one": one.tolist(), "apart": apart.tolist(), "two": two.tolist()}
        for name, speed in [("one", one), ("apart", apart), ("two", two)]:
            of_twice_one = "" if name == "one" else f"{np.median(speed) / np.median(one) / 2:.2f}"
            rows.append([part, name, spread(speed, ".1f"), of_twice_one])
            bars[f"{part}, {name}"] = speed
            print(" | ".join(rows[-1]), flush=True)
    regime = f"U-Net, resnet18, 64 pixels, batch {BATCH_SIZE} a network, one thread an operation, float32."
    columns = ["part", "processes", "images/s, median (range)", "of twice one"]
    save("processes", describe_machine("torch", "tensorflow"), regime, columns, rows, bars, "images/s", figures)


if __name__ == "__main__":
    main()
