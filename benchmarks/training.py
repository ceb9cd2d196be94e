"""Whole trainings: train.py in each precision, and beside it what one would write without this project.

    .venv-pt/bin/python benchmarks/training.py

The peers are in peers/, each as the documentation of its library says. All train the same network from scratch on the
same photographs, as many steps, with the same batch and size. Seconds are those of an epoch with its validation,
without the first one; memory is that of all processes; the IoU (part 7: segm mAP) is the best of all epochs. On a GPU
the networks, photographs and batches are larger, and float16, --compile, and part 4, which augments there, are measured
as well; the table is then that of gpu.json. The peer of part 6 needs accelerate (benchmarks/requirements.txt).
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from results import (
    ON_GPU,
    SMALL_MASK_RCNN,
    Done,
    describe_machine,
    draw_data,
    multiplies_bf16,
    python_of,
    run_measured,
    run_train,
    save,
    spread,
)

EPOCHS = 4
SIZE = ["--image_size", 384, "--batch_size", 16] if ON_GPU else ["--image_size", 96, "--batch_size", 8]
IMAGES = 1000 if ON_GPU else 100
ENCODER = "efficientnet-b4" if ON_GPU else "resnet18"
COMMON = [*SIZE, "--epochs", EPOCHS, "--learning_rate", 2e-3]
BF16 = {"bfloat16": ["--mixed_precision", "bf16"]} if ON_GPU or multiplies_bf16() else {}
FP16 = {"float16": ["--mixed_precision", "fp16"]} if ON_GPU else {}
FP32 = {"float32": ["--mixed_precision", "False"]}
COMPILE = {"float16, `--compile`": ["--mixed_precision", "fp16", "--compile"]} if ON_GPU else {}
ON_THE_GPU = {"float16, `--augment_on device`": [*FP16.get("float16", []), "--augment_on", "device"]} if ON_GPU else {}
IN_CPU = {"float16, `--augment_on cpu`": [*FP16.get("float16", []), "--augment_on", "cpu"]} if ON_GPU else {}


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
    "part4_kornia": Part("", "", [*UNET, "--loss", "dice"], IN_CPU | ON_THE_GPU),
    "part6_segformer": Part(
        "hf_trainer.py", "Hugging Face Trainer", [*SCRATCH, "--loss", "dice_bce"], FP32 | BF16 | FP16 | COMPILE
    ),
    "part7_mmdetection": Part(
        "mmdet_plain.py", "MMDetection's tools/train.py", ["--encoder", "resnet18", *SCRATCH, *MASK_RCNN], FP32 | FP16
    ),
}


class Result(NamedTuple):
    """What a training has used and reached."""

    done: Done
    epoch_seconds: list[float]
    train_seconds: list[float]
    reached: list[float]  # IoU, or segm mAP


def train_peer(part: str, peer: str, data_root: Path) -> Result:
    """Run a peer, which leaves its figures in peer.json."""
    encoder = [] if part == "part6_segformer" else ["--encoder", PARTS[part].flags[1]]
    with tempfile.TemporaryDirectory() as work_dir:
        words = [python_of(part), Path(__file__).parent / "peers" / peer, "--data_root", data_root]
        done = run_measured([*words, "--work_dir", work_dir, "--workers", 2, *COMMON, *encoder])
        figures = json.loads((Path(work_dir) / "peer.json").read_text())
    reached = figures.get("iou") or figures["segm_mAP"]
    return Result(done, figures["epoch_seconds"], figures["train_seconds"], reached)


def train_ours(part: str, flags: list[Any], data_root: Path) -> Result:
    """Run train.py of a part."""
    done, metrics = run_train(part, "--data_root", data_root, "--workers", 2, *COMMON, *PARTS[part].flags, *flags)
    images = len((data_root / "csv_file" / "train.csv").read_text().splitlines()) - 1
    used = images // SIZE[-1] * SIZE[-1]
    score = metrics["segm_mAP" if part == "part7_mmdetection" else "val_iou"]
    train_seconds = used / metrics["images_per_second"]
    return Result(done, metrics["seconds"].tolist(), train_seconds.tolist(), score.tolist())


def main() -> None:
    """Measure all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only print these")
    args = parser.parse_args()
    rows, bars, figures = [], {}, {}
    for part in args.parts:
        data_root = draw_data(part, images=IMAGES)
        peer, title, _, choices = PARTS[part]
        results = {title: train_peer(part, peer, data_root)} if peer else {}
        for name, flags in choices.items():
            results[f"train.py, {name}"] = train_ours(part, flags, data_root)
        for name, result in results.items():
            figures[f"{part}, {name}"] = result._asdict()
            memory = [f"{max(result.done.megabytes):,.0f}", *([f"{result.done.gpu_megabytes:,.0f}"] if ON_GPU else [])]
            seconds = [spread(result.epoch_seconds[1:], ".1f"), spread(result.train_seconds[1:], ".1f")]
            rows.append([part, name, *seconds, *memory, f"{max(result.reached):.3f}"])
            bars[f"{part}, {name}"] = result.epoch_seconds[1:]
            print(" | ".join(rows[-1]), flush=True)
    if args.parts == list(PARTS):
        networks = f"{ENCODER} (part 6: mit_b0, part 7: resnet18) from scratch"
        photographs = f"{IMAGES * 4 // 5} photographs for training and {IMAGES // 5} for validation"
        regime = f"{networks}; {photographs}; {SIZE[1]} pixels, batch {SIZE[3]}, {EPOCHS} epochs."
        memory = ["MB", *(["MB on the GPU"] if ON_GPU else [])]
        columns = ["part", "who", "s an epoch, median (range)", "of it training", *memory, "IoU, part 7: segm mAP"]
        name = "gpu" if ON_GPU else "training"
        save(name, describe_machine("torch", "tensorflow"), regime, columns, rows, bars, "s an epoch", figures)


if __name__ == "__main__":
    main()
