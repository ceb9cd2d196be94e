"""What a larger SegFormer costs: parameters, and a training step of part 6 with each of its encoders.

    .venv-pt/bin/python benchmarks/segformer.py

From scratch, in float32, and bfloat16 where the CPU can multiply it. Prints a table and writes segformer.json.
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
sys.path.insert(0, str(ROOT / "part6_segformer"))

from losses import create_loss
from model import ENCODERS, create_network, find_config
from results import describe_machine, multiplies_bf16, spread

IMAGE_SIZE, BATCH_SIZE, WARM_UP, REPEATS = 256, 2, 1, 5


def step_seconds(network: torch.nn.Module, half: bool, device: str) -> np.ndarray:
    """Train on one batch of noise, again and again."""
    images = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    masks = torch.randint(0, 2, (BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE), device=device)
    loss_fn, optimizer = create_loss("dice", classes=1), torch.optim.AdamW(network.parameters())
    seconds = []
    for _ in range(WARM_UP + REPEATS):
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logits = network(images)
        loss_fn(logits.float(), masks).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return np.array(seconds[WARM_UP:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    halves = [False, True] if device == "cuda" or multiplies_bf16() else [False]
    machine = describe_machine("torch", "transformers")
    about = {"date": str(date.today()), "machine": machine, "device": device, "rows": []}
    print(
        "| encoder | parameters, millions |", *[f"{'bfloat16' if half else 'float32'}, s a step |" for half in halves]
    )
    print("|---|---|" + "---|" * len(halves))
    for encoder in ENCODERS:
        network = create_network(find_config(encoder, classes=1), classes=1).to(device)
        millions = sum(weights.numel() for weights in network.parameters()) / 1e6
        seconds = [step_seconds(network, half, device) for half in halves]
        about["rows"].append([encoder, millions, *[one.tolist() for one in seconds]])
        print(f"| {encoder} | {millions:.1f} |", *[f"{spread(one, '.2f')} |" for one in seconds], flush=True)
    (Path(__file__).parent / "segformer.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
