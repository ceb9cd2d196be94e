"""What it gains to keep the memory of freed tensors (memory.py of parts 3 to 6): a training step with and without.

    .venv-pt/bin/python benchmarks/freed_memory.py

A step is that of bare.py, on batches in memory. A process keeps its freed memory from the start or never, so here it is
processes that take turns, and a ratio is that of neighbours.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
from bare import create_step, parse_flags

from results import describe_machine, draw_data, multiplies_bf16, python_of, save, spread

HALF = ["--mixed_precision", "bf16"] if multiplies_bf16() else []
UNET = ["--encoder", "resnet18", *HALF]
NETWORKS = {  # its part, the size of its images, how many are in a batch, its flags
    "parts 3 to 5: U-Net, resnet18": ("part3_lightning", 128, 8, UNET),
    "parts 3 to 5: the same": ("part3_lightning", 384, 16, UNET),
    "part 6: SegFormer, mit_b0": ("part6_segformer", 384, 16, HALF),
}
WAYS = ["given back", "kept"]
WARM_UP, STEPS, ROUNDS = 1, 3, 3


def measure(part: str, way: str, flags: list[str]) -> list[float]:
    """The median of some steps in ms, the page faults of a step, and the process's peak of memory in MB."""
    step = create_step(parse_flags(part, ["--device", "cpu", *flags], keep_freed_memory=way == "kept"))
    for _ in range(WARM_UP):
        step()
    faults, milliseconds = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, []
    for _ in range(STEPS):
        began = time.perf_counter()
        step()
        milliseconds.append(1000 * (time.perf_counter() - began))
    used = resource.getrusage(resource.RUSAGE_SELF)
    return [float(np.median(milliseconds)), (used.ru_minflt - faults) / STEPS, used.ru_maxrss / 1024]


def main() -> None:
    """Measure all networks, or, in the process that this starts for each round, one of them one way."""
    if sys.argv[1:2] == ["--one"]:
        part, way, *flags = sys.argv[2:]
        print(json.dumps(measure(part, way, flags)))
        return
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows, bars, figures = [], {}, {}
    for name, (part, size, batch, flags) in NETWORKS.items():
        data = ["--data_root", draw_data(part), "--image_size", size, "--batch_size", batch]
        found = []
        for _ in range(ROUNDS):
            for way in WAYS:
                words = [python_of(part), __file__, "--one", part, way, "--encoder_weights", "none", *data, *flags]
                done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, text=True, check=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
        values = np.array(found).reshape(ROUNDS, len(WAYS), 3)
        figures[f"{name}, {size} pixels, batch {batch}"] = values.tolist()
        faster = spread(values[:, 0, 0] / values[:, 1, 0], ".2f")
        for number, way in enumerate(WAYS):
            milliseconds, faults, megabytes = np.median(values[:, number], axis=0)
            cells = [f"{milliseconds:.0f}", faster if number else "1", f"{faults:,.0f}", f"{megabytes:,.0f}"]
            rows.append([name, f"{size}, {batch}", way, *cells])
            bars[f"{name}, {size} pixels, batch {batch}, {way}"] = values[:, number, 0]
            print(" | ".join(rows[-1]), flush=True)
    regime = f"From scratch, {'bfloat16' if HALF else 'float32'}, on the CPU."
    columns = ["network", "pixels, batch", "freed memory is", "ms a step, median", "times as fast, median (range)"]
    columns += ["page faults a step", "peak, MB"]
    save("freed_memory", describe_machine("torch"), regime, columns, rows, bars, "ms a step", figures)


if __name__ == "__main__":
    main()
