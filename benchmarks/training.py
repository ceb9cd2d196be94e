"""Whole trainings: train.py in each precision, and beside it what one would write without this project.

    .venv-pt/bin/python benchmarks/training.py

The peers are in peers/, each as the documentation of its library says. All train the same network from scratch on the
same photographs, as many steps, with the same batch and size. Those of a part take turns, epoch by epoch, and a ratio
is that of neighbours; those of part 1 train one after the other. Seconds are those of an epoch, with validation and
saving, without the first one; memory is that of all processes, at the most; the IoU (part 7: segm mAP) is the best of
all epochs. On a GPU the networks, photographs and batches are larger, and float16, --compile, and part 4, which
augments there, are measured as well; the table is then that of gpu.json. The peer of part 6 needs accelerate
(benchmarks/requirements.txt).
"""

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from results import (
    ON_GPU,
    SMALL_MASK_RCNN,
    describe_machine,
    draw_data,
    multiplies_bf16,
    python_of,
    save,
    spread,
)
from trainings import MEMORY_DISK, Training, start_train

EPOCHS = 4
SIZE = ["--image_size", 384, "--batch_size", 16] if ON_GPU else ["--image_size", 96, "--batch_size", 4]
IMAGES = 1000 if ON_GPU else 100
ENCODER = "efficientnet-b4" if ON_GPU else "resnet18"
COMMON = [*SIZE, "--epochs", EPOCHS, "--learning_rate", 2e-3]
BF16 = {"bfloat16": ["--mixed_precision", "bf16"]} if ON_GPU or multiplies_bf16() else {}
FP16 = {"float16": ["--mixed_precision", "fp16"]} if ON_GPU else {}
FP32 = {"float32": ["--mixed_precision", "False"]}
COMPILE = {"float16, `--compile`": ["--mixed_precision", "fp16", "--compile"]} if ON_GPU else {}
AUGMENT_ON = ("cpu", "device") if ON_GPU else ()
AUGMENT = {f"float16, `--augment_on {where}`": [*FP16["float16"], "--augment_on", where] for where in AUGMENT_ON}


class Part(NamedTuple):
    """What is measured for a part."""

    peer: str
    title: str  # of the peer
    flags: list[Any]  # of train.py
    choices: dict[str, list[Any]]  # further flags, by what the table calls them


UNET = ["--encoder", ENCODER, "--encoder_weights", "none"]
SCRATCH = ["--encoder_weights", "none"]
MASK_RCNN = ["--config", SMALL_MASK_RCNN]
PARTS = {
    "part1_tensorflow": Part(
        "keras_sequence.py",
        "Keras Sequence",
        ["--encoder", ENCODER.replace("-", ""), *SCRATCH, "--optimizer", "adamw"],
        FP32 | BF16 | FP16,
    ),
    "part3_lightning": Part(
        "smp_loop.py", "smp's loop, torchvision", [*UNET, "--loss", "dice"], FP32 | BF16 | FP16 | COMPILE
    ),
    "part4_kornia": Part("", "", [*UNET, "--loss", "dice"], AUGMENT),
    "part6_segformer": Part(
        "hf_trainer.py", "Hugging Face Trainer", [*SCRATCH, "--loss", "dice_bce"], FP32 | BF16 | FP16 | COMPILE
    ),
    "part7_mmdetection": Part(
        "mmdet_plain.py", "MMDetection's tools/train.py", ["--encoder", "resnet18", *SCRATCH, *MASK_RCNN], FP32 | FP16
    ),
}
# After a stop, an epoch of a Keras Sequence takes twice as long: its loader waits with a timeout of 5 seconds. And
# TensorFlow takes all memory of a GPU.
ONE_BY_ONE = list(PARTS) if ON_GPU else ["part1_tensorflow"]


class Result(NamedTuple):
    """What a training has used and reached."""

    epoch_seconds: list[float]
    megabytes: float
    gpu_megabytes: float
    reached: list[float]  # IoU, or segm mAP


def start_peer(part: str, data_root: Path, work_dir: Path) -> Training:
    """What the part is compared with."""
    encoder = [] if part == "part6_segformer" else ["--encoder", PARTS[part].flags[1]]
    words = [python_of(part), Path(__file__).parent / "peers" / PARTS[part].peer, "--data_root", data_root]
    return Training([*words, "--work_dir", work_dir, "--workers", 2, *COMMON, *encoder], work_dir / "peer.csv")


def start_ours(part: str, flags: list[Any], data_root: Path, work_dir: Path) -> Training:
    """train.py of a part."""
    return start_train(part, work_dir, "--data_root", data_root, "--workers", 2, *COMMON, *PARTS[part].flags, *flags)


def measure(part: str, starts: dict[str, Callable[[Path], Training]]) -> dict[str, Result]:
    """Let them train."""
    runs, seconds = [], []
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:
        for number, start in enumerate(starts.values()):
            runs.append(start(Path(folder) / f"{number}"))
            if part in ONE_BY_ONE:
                seconds.append(runs[-1].go_on(EPOCHS, look=True)[1:])
                runs[-1].end()
            else:
                runs[-1].go_on(look=True)
        if part not in ONE_BY_ONE:
            rounds = [[run.go_on(look=True)[0] for run in runs] for _ in range(EPOCHS - 1)]
            seconds = np.transpose(rounds).tolist()
        score = "segm_mAP" if part == "part7_mmdetection" else "val_iou"
        for run in runs:
            run.end()
        return {
            name: Result(its, run.megabytes, run.gpu_megabytes, run.metrics()[score].tolist())
            for name, run, its in zip(starts, runs, seconds, strict=True)
        }


def main() -> None:
    """Measure all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measure these only, and print them"
    )
    args = parser.parse_args()
    rows, bars, figures = [], {}, {}
    for part in args.parts:
        data_root = draw_data(part, images=IMAGES)
        starts = {PARTS[part].title: functools.partial(start_peer, part, data_root)} if PARTS[part].peer else {}
        for name, flags in PARTS[part].choices.items():
            starts[f"train.py, {name}"] = functools.partial(start_ours, part, flags, data_root)
        results = measure(part, starts)
        first: Result | None = None
        for name, result in results.items():
            first = first or result
            figures[f"{part}, {name}"] = result._asdict()
            memory = [f"{result.megabytes:,.0f}", *([f"{result.gpu_megabytes:,.0f}"] if ON_GPU else [])]
            faster = spread(np.divide(first.epoch_seconds, result.epoch_seconds), ".2f") if result is not first else "1"
            cells = [spread(result.epoch_seconds, ".1f"), faster]
            rows.append([part, name, *cells, *memory, f"{max(result.reached):.3f}"])
            bars[f"{part}, {name}"] = result.epoch_seconds
            print(" | ".join(rows[-1]), flush=True)
    if args.parts == list(PARTS):
        networks = f"{ENCODER} (part 6: mit_b0, part 7: resnet18) from scratch"
        photographs = f"{IMAGES * 4 // 5} photographs for training and {IMAGES // 5} for validation"
        regime = f"{networks}; {photographs}; {SIZE[1]} pixels, batch {SIZE[3]}, {EPOCHS} epochs."
        memory = ["MB", *(["MB on the GPU"] if ON_GPU else [])]
        columns = ["part", "who", "s an epoch, median (range)", "times as fast, median (range)", *memory]
        columns += ["IoU, part 7: segm mAP"]
        name = "gpu" if ON_GPU else "training"
        save(name, describe_machine("torch", "tensorflow"), regime, columns, rows, bars, "s an epoch", figures)


if __name__ == "__main__":
    main()
