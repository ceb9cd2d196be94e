"""What it gains to keep the memory of freed tensors (memory.py of parts 1 to 6): a training step with and without.

    .venv-pt/bin/python benchmarks/freed_memory.py

A step is that of bare.py, on batches in memory, at the size that train.py has by default. A process keeps its freed
memory from the start or never, so there are two, which take turns step by step, and a ratio is that of neighbours.
"""

import argparse
import itertools
import resource
import sys
import time
from collections.abc import Callable

import numpy as np
from bare import create_step, parse_flags

from results import describe_machine, draw_data, multiplies_bf16, python_of, save, spread
from turns import Measurer, answer, rounds

HALF = ["--mixed_precision", "bf16"] if multiplies_bf16() else []
SIZE = ["--image_size", 384, "--batch_size", 16, "--encoder_weights", "none", *HALF]
NETWORKS = {  # its part, its flags
    "parts 3 to 5: U-Net, resnet18": ("part3_lightning", ["--encoder", "resnet18"]),
    "part 6: SegFormer, mit_b0": ("part6_segformer", []),
}
WAYS = ["given back", "kept"]
WARM_UP = 2
LEAST, ROUNDS, SECONDS = 2, 3, 20  # at least and at most so many rounds; in between none after so many seconds


def measure_step(step: Callable[[], object]) -> list[float]:
    """Milliseconds and page faults of a step, and the process's peak of memory so far in MB."""
    faults, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    step()
    milliseconds, used = 1000 * (time.perf_counter() - began), resource.getrusage(resource.RUSAGE_SELF)
    return [milliseconds, used.ru_minflt - faults, used.ru_maxrss / 1024]


def start(part: str, flags: list[str], way: str) -> Measurer:
    """The process of a network that keeps its freed memory, or gives it back."""
    return Measurer([python_of(part), __file__, "--one", part, way, "--data_root", draw_data(part), *SIZE, *flags])


def main() -> None:
    """Measure all networks, or, in the process that this starts for each way, one of them."""
    if sys.argv[1:2] == ["--one"]:
        part, way, *flags = sys.argv[2:]
        step = create_step(parse_flags(part, ["--device", "cpu", *flags], keep_freed_memory=way == "kept"))
        answer(lambda _: measure_step(step))
        return
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows, bars, figures = [], {}, {}
    networks = {name: [start(*of, way) for way in WAYS] for name, of in NETWORKS.items()}
    for process in itertools.chain(*networks.values()):
        process.ask()  # the first of WARM_UP; once all have started, each goes on only when it is asked
    for name, processes in networks.items():
        for _ in range(WARM_UP - 1):
            for process in processes:
                process.ask()
        values = np.array([[process.ask() for process in processes] for _ in rounds(LEAST, ROUNDS, SECONDS)])
        for process in processes:
            process.end()
        figures[name] = values.tolist()  # (rounds, ways, 3)
        faster = spread(values[:, 0, 0] / values[:, 1, 0], ".2f")
        for number, way in enumerate(WAYS):
            milliseconds, faults, _ = np.median(values[:, number], axis=0)
            peak = values[LEAST - 1, number, 2]  # after as many steps on each machine
            cells = [f"{milliseconds:.0f}", faster if number else "1", f"{faults:,.0f}", f"{peak:,.0f}"]
            rows.append([name, way, *cells])
            bars[f"{name}, {way}"] = values[:, number, 0]
            print(" | ".join(rows[-1]), flush=True)
    precision = "bfloat16" if HALF else "float32"
    regime = f"384 pixels, batch 16, from scratch, {precision}, on the CPU; at most {ROUNDS} steps."
    columns = ["network", "freed memory is", "ms a step, median", "times as fast, median (range)"]
    columns += ["page faults a step", "peak, MB"]
    save("freed_memory", describe_machine("torch"), regime, columns, rows, bars, "ms a step", figures)


if __name__ == "__main__":
    main()
