"""Choices that change no result by much, but the speed: a training step with and without each of them.

    .venv-pt/bin/python benchmarks/choices.py

A step is that of bare.py, on batches in memory. "As it is" is what train.py does without further flags. The choices of
a network take turns, step by step, and a ratio is that of neighbours: so a machine that gets slower meanwhile slows all
of them. Needs all environments (make setup).
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np
from bare import create_step, parse_flags

from results import ON_GPU, SMALL_MASK_RCNN, describe_machine, draw_data, multiplies_bf16, python_of, save, spread

HALF = ["bf16"] if ON_GPU or multiplies_bf16() else []
ON_TORCH = ["contiguous", "not fused", *HALF]
SMALL = ["--encoder_weights", "none", "--image_size", 128, "--batch_size", 8]
NETWORKS = {  # its part, its flags, what is tried with it
    "part 1: U-Net, resnet18": ("part1_tensorflow", ["--encoder", "resnet18", "--optimizer", "adamw"], HALF),
    "parts 3 to 5: U-Net, resnet18": ("part3_lightning", ["--encoder", "resnet18"], [*ON_TORCH, "compile"]),
    "parts 3 to 5: U-Net, efficientnet-b0": ("part3_lightning", ["--encoder", "efficientnet-b0"], ON_TORCH),
    "part 6: SegFormer, mit_b0": ("part6_segformer", [], ["channels last", "not fused", *HALF, "compile"]),
    "part 7: Mask R-CNN, resnet18": (
        "part7_mmdetection",
        ["--encoder", "resnet18", "--config", SMALL_MASK_RCNN],
        ["not fused", "channels last"],
    ),
}
AS_IT_IS = "as it is"
WARM_UP, ROUNDS = 2, 5


def measure(part: str, flags: list[str], choices: list[str]) -> list[list[float]]:
    """Milliseconds of a step: a row for each round, and in it one for each choice."""
    args = parse_flags(part, flags)
    steps = [create_step(args, choice) for choice in choices]
    milliseconds = []
    for _ in range(WARM_UP + ROUNDS):
        row = []
        for step in steps:
            began = time.perf_counter()
            step()
            row.append(1000 * (time.perf_counter() - began))
        milliseconds.append(row)
    return milliseconds[WARM_UP:]


def main() -> None:
    """Measure all networks, or, in the process that this starts for each, one."""
    if sys.argv[1:2] == ["--one"]:
        part, choices, *flags = sys.argv[2:]
        print(json.dumps(measure(part, flags, choices.split(","))))
        return
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows, bars, figures = [], {}, {}
    for name, (part, flags, tried) in NETWORKS.items():
        choices = [AS_IT_IS, *tried]
        data = ["--data_root", draw_data(part)]
        words = [python_of(part), __file__, "--one", part, ",".join(choices), *data, *SMALL, *flags]
        done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, text=True, check=True)
        milliseconds = np.array(json.loads(done.stdout.splitlines()[-1]))
        figures[name] = {choice: milliseconds[:, i].tolist() for i, choice in enumerate(choices)}
        for i, choice in enumerate(choices):
            faster = spread(milliseconds[:, 0] / milliseconds[:, i], ".2f") if i else "1"
            rows.append([name, choice, f"{np.median(milliseconds[:, i]):.0f}", faster])
            bars[f"{name}, {choice}"] = milliseconds[:, i]
            print(" | ".join(rows[-1]), flush=True)
    regime = "128 pixels, batch 8, from scratch, float32 if nothing else is said."
    columns = ["network", "choice", "ms a step, median", "times as fast, median (range)"]
    save("choices", describe_machine("torch", "tensorflow"), regime, columns, rows, bars, "ms a step", figures)


if __name__ == "__main__":
    main()
