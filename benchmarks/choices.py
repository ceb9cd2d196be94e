"""Choices that change no result by much, but the speed: a training step with and without each of them.

    .venv-pt/bin/python benchmarks/choices.py
    .venv-pt/bin/python benchmarks/choices.py --compile

A step is that of bare.py, on batches in memory. "As it is" is float32 and AdamW, and all else as train.py does it. The
choices of a network take turns, step by step, and a ratio is that of neighbours: so a machine that gets slower
meanwhile slows all of them. What torch.compile makes of a network has a table of its own, because it first takes
minutes. Needs all environments (make setup).
"""

import argparse
import sys
import time

import numpy as np
from bare import create_step, parse_flags

from results import ON_GPU, SMALL_MASK_RCNN, describe_machine, draw_data, multiplies_bf16, python_of, save, spread
from turns import Measurer, answer, rounds

HALF = ["bf16"] if ON_GPU or multiplies_bf16() else []
ON_TORCH = ["contiguous", "not fused", *HALF]
SMALL = ["--encoder_weights", "none", "--image_size", 128, "--batch_size", 8]
NETWORKS = {  # its part, its flags
    "part 1, U-Net, resnet18": ("part1_tensorflow", ["--encoder", "resnet18", "--optimizer", "adamw"]),
    "part 3, U-Net, resnet18": ("part3_lightning", ["--encoder", "resnet18"]),
    "part 3, U-Net, efficientnet-b0": ("part3_lightning", ["--encoder", "efficientnet-b0"]),
    "part 6, SegFormer, mit_b0": ("part6_segformer", []),
    "part 7, Mask R-CNN, resnet18": ("part7_mmdetection", ["--encoder", "resnet18", "--config", SMALL_MASK_RCNN]),
}
TRIED = {  # by the table: what is tried with a network
    "choices": {
        "part 1, U-Net, resnet18": HALF,
        "part 3, U-Net, resnet18": ON_TORCH,
        "part 3, U-Net, efficientnet-b0": ON_TORCH,
        "part 6, SegFormer, mit_b0": ["channels last", "not fused", *HALF],
        "part 7, Mask R-CNN, resnet18": ["not fused", "channels last"],
    },
    "compile": {"part 3, U-Net, resnet18": ["compile"], "part 6, SegFormer, mit_b0": ["compile"]},
}
AS_IT_IS = "as it is"
WARM_UP = 1  # after a first one, in which they all start
LEAST, ROUNDS, SECONDS = 3, 4, 8  # at least and at most so many; in between none after so many seconds


def answer_with_steps(part: str, flags: list[str], choices: list[str]) -> None:
    """Tell the milliseconds of a step for each choice, whenever asked."""
    args = parse_flags(part, flags)
    steps = [create_step(args, choice) for choice in choices]

    def measure(_: str) -> list[float]:
        milliseconds = []
        for step in steps:
            began = time.perf_counter()
            step()
            milliseconds.append(1000 * (time.perf_counter() - began))
        return milliseconds

    answer(measure)


def start(name: str, tried: list[str]) -> Measurer:
    """The process of a network, which answers with milliseconds: for "as it is", and for each choice."""
    part, flags = NETWORKS[name]
    choices = ",".join([AS_IT_IS, *tried])
    return Measurer([python_of(part), __file__, "--one", part, choices, "--data_root", draw_data(part), *SMALL, *flags])


def main() -> None:
    """Measure all networks, or, in the process that this starts for each, one."""
    if sys.argv[1:2] == ["--one"]:
        part, choices, *flags = sys.argv[2:]
        answer_with_steps(part, flags, choices.split(","))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="torch.compile, and nothing else; takes minutes")
    table = "compile" if parser.parse_args().compile else "choices"
    rows, bars, figures = [], {}, {}
    networks = {name: start(name, tried) for name, tried in TRIED[table].items()}
    for network in networks.values():
        network.ask()  # once all have started, each goes on only when it is asked
    for name, network in networks.items():
        for _ in range(WARM_UP):
            network.ask()
        milliseconds = np.array([network.ask() for _ in rounds(LEAST, ROUNDS, SECONDS)])
        network.end()
        part, choices = NETWORKS[name][0], [AS_IT_IS, *TRIED[table][name]]
        figures[name] = {choice: milliseconds[:, i].tolist() for i, choice in enumerate(choices)}
        for i, choice in enumerate(choices):
            faster = spread(milliseconds[:, 0] / milliseconds[:, i], ".2f") if i else "1"
            cells = [choice, f"{np.median(milliseconds[:, i]):.0f}", faster]
            rows.append([part, name.partition(", ")[2], *cells])
            bars[f"{name}, {choice}"] = milliseconds[:, i]
            print(" | ".join(rows[-1]), flush=True)
    regime = f"128 pixels, batch 8, from scratch, float32 if nothing else is said; at most {ROUNDS} steps."
    columns = ["part", "network", "choice", "ms a step, median", "times as fast, median (range)"]
    packages = ["torch"] if table == "compile" else ["torch", "tensorflow"]
    save(table, describe_machine(*packages), regime, columns, rows, bars, "ms a step", figures)


if __name__ == "__main__":
    main()
