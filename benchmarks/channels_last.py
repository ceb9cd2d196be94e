"""Does it matter how a pixel's channels lie in memory? A training step of part 3 in both formats.

    .venv-pt/bin/python benchmarks/channels_last.py

For each encoder and precision the two formats take turns, after a warm-up, and the ratio is that of two
neighbours: so a machine that gets slower meanwhile slows both. Prints a table and writes channels_last.json.
"""

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "part3_lightning"))

from losses import create_loss
from machine import describe_machine, multiplies_bf16, spread
from model import create_network

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ENCODERS = ["resnet18", "efficientnet-b0", "mit_b0"]
IMAGE_SIZE, BATCH_SIZE, WARM_UP, REPEATS = 256, 4, 2, 7


def make_step(encoder: str, memory_format: torch.memory_format, half: bool, device: str) -> object:
    """A function that trains a U-Net on one batch of noise and returns the seconds it took."""
    network = create_network("Unet", encoder, classes=1).to(device, memory_format=memory_format)
    images = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, device=device).to(memory_format=memory_format)
    masks = torch.randint(0, 2, (BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE), device=device)
    loss_fn, optimizer = create_loss("dice", classes=1), torch.optim.AdamW(network.parameters())

    def step() -> float:
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logits = network(images)
        loss_fn(logits.float(), masks).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {"date": str(date.today()), "machine": describe_machine("torch"), "device": device, "rows": []}
    print("| encoder | precision | contiguous, ms a step | channels last, ms a step | ratio, median (range) |")
    print("|---|---|---|---|---|")
    for encoder in ENCODERS:
        for half in [False, True] if device == "cuda" or multiplies_bf16() else [False]:
            steps = {name: make_step(encoder, memory_format, half, device) for name, memory_format in FORMATS.items()}
            for _ in range(WARM_UP):
                for step in steps.values():
                    step()
            seconds = np.array([[step() for step in steps.values()] for _ in range(REPEATS)])
            contiguous, last = 1000 * np.median(seconds, axis=0)
            row = [encoder, "bfloat16" if half else "float32"]
            about["rows"].append([*row, seconds.tolist()])
            ratio = spread(seconds[:, 0] / seconds[:, 1], ".2f")
            print(f"| {' | '.join(row)} | {contiguous:.0f} | {last:.0f} | {ratio} |", flush=True)
    (Path(__file__).parent / "channels_last.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
